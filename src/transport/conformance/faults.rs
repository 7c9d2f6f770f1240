//! What goes wrong.
#![forbid(unsafe_code)]

use super::Ends;
use super::rig::{Rig, pattern};
use crate::error::Cause;
use crate::transport::Link;
use std::io::IoSlice;

type Make<'a> = &'a mut dyn FnMut() -> Ends;

pub fn lengths_differ(make: Make) {
    // (sent, received): large and large, large and small, small and large, small and small.
    for (i, (ours, theirs)) in
        [(50_000, 60_000), (50_000, 100), (100, 50_000), (100, 200)].into_iter().enumerate()
    {
        for receive_first in [false, true] {
            let mut rig = make().rig();
            let post_s = |rig: &mut Rig| rig.a.send(1, &pattern(ours, 1), 0);
            let post_r = |rig: &mut Rig| rig.b.recv(1, theirs, 0);
            let (s, r) = if receive_first {
                let r = post_r(&mut rig);
                rig.settle();
                (post_s(&mut rig), r)
            } else {
                let s = post_s(&mut rig);
                rig.settle();
                (s, post_r(&mut rig))
            };
            rig.until("both sides to know", |rig| {
                rig.b.lengths.len() == 1 && (rig.a.lengths.len() == 1 || rig.a.is_done(s))
            });
            assert_eq!(rig.b.lengths[0], (r, theirs as u64, ours as u64));
            if !rig.a.is_done(s) {
                assert_eq!(rig.a.lengths[0], (s, ours as u64, theirs as u64));
            }
            assert!(rig.a.is_done(s) == (ours == 100 && rig.a.lengths.is_empty()), "case {i}");
            assert!(!rig.b.is_done(r) && rig.b.result(r).iter().all(|b| *b == 0xEE), "nothing was moved");
            // The stream goes on.
            let bytes = pattern(70_000, 9);
            let (s, r) = (rig.a.send(1, &bytes, 0), rig.b.recv(1, bytes.len(), 0));
            rig.until("the next message", |rig| rig.a.is_done(s) && rig.b.is_done(r));
            assert!(rig.b.result(r) == bytes);
            assert!(rig.a.lengths.len() + rig.b.lengths.len() <= 2, "each side is told once");
        }
    }
}

pub fn peer_dies(make: Make) {
    // In the middle of a message; what it said before is still heard.
    let mut rig = make().rig();
    let r = rig.b.recv(1, 40 << 20, 0);
    rig.a.send(1, &pattern(40 << 20, 1), 0);
    rig.until("the first payload", |r| r.a.link.is_moving());
    for _ in 0..3 {
        rig.step();
    }
    rig.a.link.tell(b"farewell");
    while !rig.a.link.drained() {
        rig.step();
    }
    let Rig { a, b, network } = rig;
    drop(a);
    let mut rig = Rig { a: super::sim_ends(0).rig().a, b, network };
    rig.until("the end", |r| r.b.error.is_some());
    assert_eq!(rig.b.error, Some(Cause::Exited));
    assert_eq!(rig.b.control, [b"farewell".to_vec()], "what was said before the end is heard");
    assert!(!rig.b.is_done(r));
    rig.b.events.clear();
    let again = rig.b.link.progress(&rig.b.memory, crate::types::Time(9), &mut rig.b.events);
    assert_eq!(again, Err(Cause::Exited), "a dead link stays dead");
}

pub fn withdrawn(make: Make) {
    let mut rig = make().rig();
    let big = pattern(12 << 20, 3);
    // A receive in the middle of its payload, a send in the middle of a frame, and some that never began.
    let (s1, r1) = (rig.a.send(1, &big, 0), rig.b.recv(1, big.len(), 0));
    let (s2, r2) = (rig.b.send(2, &big, 0), rig.a.recv(2, big.len(), 0));
    let idle = [rig.a.send(3, &big, 0), rig.a.send(4, &[1; 100], 0), rig.a.recv(5, 100, 0)];
    rig.until("both to move", |r| r.a.link.is_moving() && r.b.link.is_moving());
    rig.b.withdraw(r1);
    rig.b.withdraw(s2);
    for token in idle {
        if !rig.a.is_done(token) {
            rig.a.withdraw(token);
        }
    }
    // Other streams go on, in both directions, over the same lanes.
    let bytes = pattern(300_000, 8);
    let (s, r) = (rig.a.send(10, &bytes, 0), rig.b.recv(10, bytes.len(), 0));
    let (t, q) = (rig.b.send(10, &bytes, 0), rig.a.recv(10, bytes.len(), 0));
    rig.until("other streams", |rig| {
        rig.a.is_done(s) && rig.b.is_done(r) && rig.b.is_done(t) && rig.a.is_done(q)
    });
    assert!(rig.b.result(r) == bytes && rig.a.result(q) == bytes);
    rig.until("the dropped message to be sent", |rig| rig.a.is_done(s1));
    assert!(!rig.a.is_done(r2), "what was withdrawn at the sender never completes");
    assert_eq!((&rig.a.error, &rig.b.error), (&None, &None));
    withdrawn_in_its_last_frame(make);
}

/// A message of one frame that is withdrawn while it is written: whoever receives it whole has its true bytes,
/// though the sender's memory is somebody else's by then.
fn withdrawn_in_its_last_frame(make: Make) {
    for piece in [0, 70_001] {
        let mut rig = make().rig();
        let bytes = pattern(250_000, 5);
        let (s, r) = (rig.a.send(1, &bytes, piece), rig.b.recv(1, bytes.len(), 0));
        rig.until("it to move", |r| r.a.link.is_moving() || r.a.is_done(s));
        if !rig.a.is_done(s) {
            rig.a.withdraw(s);
        }
        // On the same lanes behind it, so that it has arrived if it ever will.
        let later: Vec<_> =
            (2..6).map(|i| (rig.a.send(i, &bytes, 0), rig.b.recv(i, bytes.len(), 0))).collect();
        rig.until("others", |rig| later.iter().all(|&(s, r)| rig.a.is_done(s) && rig.b.is_done(r)));
        assert!(
            !rig.b.is_done(r) || rig.b.result(r) == bytes,
            "a withdrawn message arrived with other bytes"
        );
    }
}

/// Random bytes, and valid headers with random fields, on every pipe: never a panic, and an error that says
/// Misbehaved (or Corrupted, where there are checksums) or nothing at all.
pub fn garbage(make: Make) {
    for seed in 0..24u64 {
        let mut ends = make();
        let mut bytes = pattern(4096, seed + 77);
        if seed % 3 != 0 {
            // Frames that begin well.
            let kinds = [1u32, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17];
            for (i, frame) in bytes.chunks_exact_mut(64).enumerate() {
                let [at8, at24, at40] = [frame[8], frame[24], frame[40]];
                let kind = kinds[(seed as usize / 3 + i) % kinds.len()];
                frame[..4].copy_from_slice(&(0xCA01_0000 | kind).to_le_bytes());
                let len = if kind >= 16 { u32::from(frame[4]) + 1 } else { 0 };
                frame[4..8].copy_from_slice(&len.to_le_bytes());
                frame[8..24].copy_from_slice(&u128::from(at8 % 3).to_le_bytes());
                frame[24..32].copy_from_slice(&u64::from(at24 % 3).to_le_bytes());
                frame[32..40].fill(0);
                frame[40..48].copy_from_slice(&u64::from(len.max(u32::from(at40))).to_le_bytes());
                frame[48..].fill(0);
            }
        }
        let at = (seed % ends.a.len() as u64) as usize;
        let mut attacker = std::mem::take(&mut ends.a);
        ends.a = super::sim_ends(0).a;
        let mut rig = ends.rig();
        let mut tokens = vec![];
        for stream in 0..3 {
            tokens.push(rig.b.recv(stream, 100, 0));
            tokens.push(rig.b.send(stream, &[7; 9000], 0));
            tokens.push(rig.b.recv(stream, 9000, 0));
        }
        let mut sent = 0;
        for _ in 0..200 {
            sent += attacker[at].write(&[IoSlice::new(&bytes[sent..])]).unwrap();
            attacker[at].flush().unwrap();
            // It holds the secret, or it would not be heard: an encrypted pipe proves it when it reads.
            let _ = attacker[at].peek();
            rig.step();
        }
        rig.settle();
        if seed % 3 == 0 {
            // Where a thread of its own moves them they may come later.
            rig.until("random bytes are no frames", |rig| rig.b.error.is_some());
        }
        match &rig.b.error {
            None | Some(Cause::Misbehaved(_) | Cause::Corrupted(_)) => {}
            Some(other) => panic!("garbage is not {other:?}"),
        }
    }
}
