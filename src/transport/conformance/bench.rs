//! Rough figures, on request: `cargo test --release --lib transport::conformance::bench -- --ignored --nocapture`.
#![forbid(unsafe_code)]

use super::rig::Side;
use super::{Ends, shm_ends, tcp_ends};
use crate::transport::Pipe;
use crate::transport::flow::{FlowLink, FlowOptions};
use crate::types::Rank;
use std::time::Instant;

fn drive(side: &mut Side, done: impl Fn(&Side) -> bool) {
    while !done(side) {
        if !side.step() {
            std::hint::spin_loop();
        }
        assert_eq!(side.error, None);
    }
}

fn echo(ends: Ends, len: usize, rounds: usize) -> f64 {
    let bytes = vec![1u8; len];
    let side = |mut pipes: Vec<Box<dyn Pipe>>| {
        let control = pipes.remove(0);
        Side::new(FlowLink::new(Rank(0), control, pipes, FlowOptions::default()))
    };
    let (a, b) = (ends.a, ends.b);
    let theirs = bytes.clone();
    let other = std::thread::spawn(move || {
        let mut side = side(b);
        for _ in 0..rounds {
            let r = side.recv(1, len, 0);
            drive(&mut side, |s| s.is_done(r));
            let s = side.send(1, &theirs, 0);
            drive(&mut side, |side| side.is_done(s));
            side.forget(r);
            side.forget(s);
        }
        side
    });
    let mut side = side(a);
    let mut times = vec![];
    for _ in 0..rounds {
        let r = side.recv(1, len, 0);
        let s = side.send(1, &bytes, 0);
        let start = Instant::now();
        drive(&mut side, |side| side.is_done(s) && side.is_done(r));
        times.push(start.elapsed().as_secs_f64() / 2.0);
        side.forget(r);
        side.forget(s);
    }
    let _other = other.join().unwrap();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

#[test]
#[ignore = "prints figures, asserts nothing"]
fn figures() {
    type Make = fn() -> Ends;
    let transports: [(&str, Make); 3] = [
        ("shm", shm_ends),
        ("tcp, 1 lane", || tcp_ends("127.0.0.1:0", 1)),
        ("tcp, 4 lanes", || tcp_ends("127.0.0.1:0", 4)),
    ];
    for (name, make) in transports {
        let small = echo(make(), 64, 20_000);
        println!("{name}: 64 B one way {:.2} us", small * 1e6);
        for (len, rounds) in [(1 << 20, 200), (64 << 20, 8)] {
            let time = echo(make(), len, rounds);
            println!("{name}: {} MiB one way {:.2} GB/s", len >> 20, len as f64 / time / 1e9);
        }
    }
}
