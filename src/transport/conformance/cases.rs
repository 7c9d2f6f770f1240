//! What works.
#![forbid(unsafe_code)]

use super::Ends;
use super::rig::{Rig, pattern};
use crate::device::Reduction;
use crate::transport::{Link, Stream};
use crate::types::{DType, ReduceOp};

type Make<'a> = &'a mut dyn FnMut() -> Ends;

pub fn sizes(make: Make) {
    let mut rig = make().rig();
    let sizes = [1, 2, 31, 32, 33, 255, 256, 257, 8191, 8192, 8193, 65_537, 262_144, 262_145, 1_048_579];
    for (i, len) in sizes.into_iter().enumerate() {
        let (there, back) = (pattern(len, i as u64), pattern(len, 1000 + i as u64));
        let (s1, r1) = (rig.a.send(i as u128, &there, 0), rig.b.recv(i as u128, len, 0));
        let (s2, r2) = (rig.b.send(i as u128, &back, 0), rig.a.recv(i as u128, len, 0));
        rig.until("a message each way", |r| {
            r.a.is_done(s1) && r.b.is_done(s2) && r.a.is_done(r2) && r.b.is_done(r1)
        });
        assert!(
            rig.b.result(r1) == there && rig.a.result(r2) == back,
            "{len} bytes arrive as they were sent"
        );
    }
}

pub fn many_pieces(make: Make) {
    let mut rig = make().rig();
    for (i, (len, out, into)) in
        [(300, 1, 7), (8000, 3, 0), (70_000, 64, 48), (600_001, 1000, 4097)].into_iter().enumerate()
    {
        let bytes = pattern(len, i as u64);
        let s = rig.a.send(7, &bytes, out);
        let r = rig.b.recv(7, len, into);
        rig.until("a message in pieces", |rig| rig.a.is_done(s) && rig.b.is_done(r));
        assert!(rig.b.result(r) == bytes, "pieces of {out} and {into} bytes hold the same message");
    }
}

pub fn reduces(make: Make) {
    let mut rig = make().rig();
    let reduction = |dtype| Reduction { dtype, op: ReduceOp::Sum };
    for (i, n) in [1usize, 7, 64, 1000, 5000, 100_000, 262_145].into_iter().enumerate() {
        for (j, (apart, first)) in [(false, false), (true, true)].into_iter().enumerate() {
            let stream = (2 * i + j) as u128;
            let mine: Vec<u8> = (0..n as i32).flat_map(|v| (v * 3 - 7).to_le_bytes()).collect();
            let theirs: Vec<u8> = (0..n as i32).flat_map(|v| (1_000_000 - v).to_le_bytes()).collect();
            let s = rig.a.send(stream, &theirs, 0);
            let r = rig.b.recv_reduce(stream, &mine, apart, reduction(DType::I32), first);
            rig.until("a reduction", |rig| rig.a.is_done(s) && rig.b.is_done(r));
            let sum: Vec<u8> = (0..n as i32).flat_map(|v| (v * 2 + 999_993).to_le_bytes()).collect();
            assert!(rig.b.result(r) == sum, "{n} sums, apart {apart}");
        }
    }
    // The first NaN's payload survives an addition on this machine or not; what is asked here is only that
    // both operand orders give the sum.
    let floats = |f: f32| -> Vec<u8> { (0..3001).flat_map(|v| (v as f32 * f).to_le_bytes()).collect() };
    for first in [false, true] {
        let s = rig.a.send(99, &floats(0.5), 4);
        let r = rig.b.recv_reduce(99, &floats(0.25), true, reduction(DType::F32), first);
        rig.until("a sum of floats", |rig| rig.a.is_done(s) && rig.b.is_done(r));
        assert!(rig.b.result(r) == floats(0.75));
    }
}

/// Several messages of mixed sizes on few streams, with sends and receives posted in every interleaving.
pub fn posting_orders(make: Make) {
    for order in 0..6u64 {
        let mut rig = make().rig();
        let lens = [10usize, 9000, 40, 300_000, 8192, 1, 20_000, 64];
        let messages: Vec<(u128, Vec<u8>)> = lens
            .iter()
            .enumerate()
            .map(|(i, len)| ((i % 3) as u128, pattern(*len, order * 100 + i as u64)))
            .collect();
        let (mut sends, mut recvs) = (vec![], vec![]);
        let mut x = order + 1;
        while sends.len() < messages.len() || recvs.len() < messages.len() {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let send_first = match order {
                0 => true,
                1 => false,
                _ => (x >> 60) & 1 == 0,
            };
            if (send_first && sends.len() < messages.len()) || recvs.len() == messages.len() {
                let (stream, bytes) = &messages[sends.len()];
                sends.push(rig.a.send(*stream, bytes, 0));
            } else {
                let (stream, bytes) = &messages[recvs.len()];
                recvs.push(rig.b.recv(*stream, bytes.len(), 0));
            }
            for _ in 0..(x >> 40) % 3 {
                rig.step();
            }
        }
        rig.until("all messages", |r| {
            sends.iter().all(|t| r.a.is_done(*t)) && recvs.iter().all(|t| r.b.is_done(*t))
        });
        for (token, (_, bytes)) in recvs.iter().zip(&messages) {
            assert!(rig.b.result(*token) == *bytes, "the k-th send meets the k-th receive");
        }
    }
}

/// Thousands of small messages without a receive use up the credit; other streams go on all the same.
pub fn eager_without_receives(make: Make) {
    let mut rig = make().rig();
    let count = 2000u64;
    let sends: Vec<_> = (0..count).map(|i| rig.a.send(1, &pattern(200 + (i % 300) as usize, i), 0)).collect();
    let (big, small) = (pattern(500_000, 1), pattern(100, 2));
    let others = [rig.a.send(2, &big, 0), rig.a.send(3, &small, 0)];
    let got = [rig.b.recv(2, big.len(), 0), rig.b.recv(3, small.len(), 0)];
    rig.until("other streams", |r| got.iter().all(|t| r.b.is_done(*t)));
    assert!(rig.b.result(got[0]) == big && rig.b.result(got[1]) == small);
    let done = sends.iter().filter(|t| rig.a.is_done(**t)).count();
    assert!(done > 0 && done < sends.len(), "credit lets some messages go ({done}), not all");
    let recvs: Vec<_> = (0..count).map(|i| rig.b.recv(1, 200 + (i % 300) as usize, 0)).collect();
    rig.until("all messages", |r| {
        recvs.iter().all(|t| r.b.is_done(*t)) && others.iter().chain(&sends).all(|t| r.a.is_done(*t))
    });
    for (i, token) in recvs.iter().enumerate() {
        assert!(rig.b.result(*token) == pattern(200 + i % 300, i as u64));
    }
}

/// Each side posts large messages in the opposite order of the other, both directions at once.
pub fn opposite_streams(make: Make) {
    let mut rig = make().rig();
    let count = 6u128;
    let bytes = |s: u128, side: u64| pattern(700_000, side * 1000 + s as u64);
    let (mut sent, mut got) = (vec![], vec![]);
    for s in 0..count {
        sent.push((rig.a.send(s, &bytes(s, 0), 0), rig.b.send(count - 1 - s, &bytes(count - 1 - s, 1), 0)));
    }
    for _ in 0..20 {
        rig.step();
    }
    for s in 0..count {
        got.push((rig.a.recv(s, 700_000, 0), rig.b.recv(count - 1 - s, 700_000, 0)));
    }
    rig.until("all streams", |r| sent.iter().chain(&got).all(|(a, b)| r.a.is_done(*a) && r.b.is_done(*b)));
    for (s, (a, b)) in got.iter().enumerate() {
        let s = s as u128;
        assert!(rig.a.result(*a) == bytes(s, 1));
        assert!(rig.b.result(*b) == bytes(count - 1 - s, 0));
    }
}

/// A control message arrives while payload that was posted before it is still under way.
pub fn control_overtakes(make: Make) {
    let mut rig = make().rig();
    let bytes = pattern(12 << 20, 5);
    let r = rig.b.recv(1, bytes.len(), 0);
    let s = rig.a.send(1, &bytes, 0);
    rig.until("the first payload", |r| r.a.link.is_moving());
    for i in 0..50u32 {
        rig.a.link.tell(&i.to_le_bytes());
    }
    rig.until("the control messages", |r| r.b.control.len() == 50);
    assert!(!rig.b.is_done(r), "control does not wait for payload");
    for (i, message) in rig.b.control.iter().enumerate() {
        assert_eq!(message[..], (i as u32).to_le_bytes(), "control messages stay in order");
    }
    // Another thread may carry the bytes, and hear a moment later that they have gone.
    rig.until("what was told has left", |r| r.a.link.drained());
    rig.until("the payload", |rig| rig.a.is_done(s) && rig.b.is_done(r));
    assert!(rig.b.result(r) == bytes);
}

pub fn large_control(make: Make) {
    let mut rig = make().rig();
    let lens = [0, 1, 31, 32, 33, 100_000, crate::limits::CONTROL_BYTES_MAX];
    for (i, len) in lens.into_iter().enumerate() {
        rig.b.link.tell(&pattern(len, i as u64));
    }
    assert!(!rig.b.link.drained());
    rig.until("all control messages", |r| r.a.control.len() == lens.len());
    rig.until("the queue to be empty", |r| r.b.link.drained());
    for (i, len) in lens.into_iter().enumerate() {
        assert!(rig.a.control[i] == pattern(len, i as u64));
    }
    assert!(rig.a.link.heard().0 > 0);
}

/// Streams that are always new do not fill the memory.
pub fn streams_are_retired(make: Make) {
    let mut rig = make().rig();
    let mut most = 0;
    for round in 0..60u128 {
        let tokens: Vec<_> = (0..100)
            .map(|i| {
                let stream = round * 100 + i;
                (rig.a.send(stream, &stream.to_le_bytes(), 0), rig.b.recv(stream, 16, 0), stream)
            })
            .collect();
        // A stream of the first round comes back again and again, be it retired or not.
        let again = (rig.a.send(5, &round.to_le_bytes(), 0), rig.b.recv(5, 16, 0));
        rig.until("a round", |r| {
            tokens.iter().all(|(s, t, _)| r.a.is_done(*s) && r.b.is_done(*t))
                && r.a.is_done(again.0)
                && r.b.is_done(again.1)
        });
        assert_eq!(rig.b.result(again.1), round.to_le_bytes());
        for (s, r, stream) in tokens {
            assert_eq!(rig.b.result(r), stream.to_le_bytes());
            rig.a.forget(s);
            rig.b.forget(r);
        }
        most = most.max(rig.a.link.streams()).max(rig.b.link.streams());
    }
    rig.settle();
    let left = rig.a.link.streams().max(rig.b.link.streams());
    assert!(left < 1100, "{left} streams are remembered of 6000");
    assert!(most > 500, "the rounds are too few to show anything ({most})");
}

pub fn random_traffic(make: Make) {
    let mut x = 12345u64;
    let mut next = |n: u64| {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (x >> 33) % n
    };
    let mut rig: Rig = make().rig();
    let (mut sent, mut got) = (vec![], vec![]);
    let mut plan: Vec<(u128, Vec<u8>)> = vec![];
    for i in 0..150 {
        let len = match next(10) {
            0 => 1 + next(900_000),
            1..4 => 1 + next(30_000),
            _ => 1 + next(2000),
        };
        plan.push((u128::from(next(5)), pattern(len as usize, i)));
    }
    while sent.len() < plan.len() || got.len() < plan.len() {
        match next(3) {
            0 if sent.len() < plan.len() => {
                let (stream, bytes) = &plan[sent.len()];
                sent.push(rig.a.send(*stream, bytes, [0, 100, 5000][next(3) as usize]));
            }
            1 if got.len() < plan.len() => {
                let (stream, bytes) = &plan[got.len()];
                got.push(rig.b.recv(*stream, bytes.len(), [0, 333, 4096][next(3) as usize]));
            }
            _ => {
                rig.step();
            }
        }
    }
    rig.until("all traffic", |r| sent.iter().all(|t| r.a.is_done(*t)) && got.iter().all(|t| r.b.is_done(*t)));
    for (token, (_, bytes)) in got.iter().zip(&plan) {
        assert!(rig.b.result(*token) == *bytes);
    }
}

/// What was sent and not asked for yet is known: small messages, which land, and large and empty ones, of which the
/// sender says that it wants to send them.
pub fn unasked_messages_are_known(make: Make) {
    let mut rig = make().rig();
    let messages = [pattern(1000, 1), pattern(3_000_000, 2), Vec::new()];
    let streams = || (0..3).map(|stream| Stream(stream as u128));
    assert!(!streams().any(|stream| rig.b.link.announces(stream)));
    let sent: Vec<_> =
        messages.iter().enumerate().map(|(stream, bytes)| rig.a.send(stream as u128, bytes, 0)).collect();
    rig.until("all are known", |rig| streams().all(|stream| rig.b.link.announces(stream)));
    let got: Vec<_> = messages
        .iter()
        .enumerate()
        .map(|(stream, bytes)| rig.b.recv(stream as u128, bytes.len(), 0))
        .collect();
    rig.until("all are received", |r| {
        sent.iter().all(|t| r.a.is_done(*t)) && got.iter().all(|t| r.b.is_done(*t))
    });
    assert!(!streams().any(|stream| rig.b.link.announces(stream)), "what was received is not there");
    for (token, bytes) in got.iter().zip(&messages) {
        assert!(rig.b.result(*token) == *bytes);
    }
}

/// Messages that were sent before their sender left can be received when the connection is no more.
pub fn what_has_landed_outlives_the_link(make: Make) {
    let mut rig = make().rig();
    let (first, second) = (pattern(1000, 1), pattern(5000, 2));
    let sent = [rig.a.send(1, &first, 0), rig.a.send(2, &second, 3)];
    rig.until("both have landed", |rig| rig.b.link.landed(|_| true) == 2);
    rig.until("both are sent", |rig| sent.iter().all(|token| rig.a.is_done(*token)));
    assert!(rig.b.link.holds(Stream(2)) && !rig.b.link.holds(Stream(3)));
    assert_eq!(rig.b.link.landed(|stream| stream == Stream(1)), 1, "only what is asked for is counted");
    let (mut left, mut receive) = rig.b.leave();
    assert_eq!(receive(&mut left, 3, 10), None, "what was never sent never comes");
    assert_eq!(receive(&mut left, 2, 5000), Some(second));
    assert_eq!(receive(&mut left, 2, 5000), None, "a message comes once");
    assert!(left.holds(Stream(1)) && !left.is_empty());
    assert_eq!(receive(&mut left, 1, 1000), Some(first));
    assert!(left.is_empty());
}
