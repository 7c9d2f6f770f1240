//! Two threads that sleep whenever they can: no wake is lost.

use super::rig::{Side, pattern};
use super::{Ends, shm_ends, tcp_ends, unix_ends};
use crate::transport::Link;
use crate::transport::flow::{FlowLink, FlowOptions};
use crate::transport::{Pipe, wake::Waker};
use crate::types::Rank;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Barrier};
use std::time::Duration;

/// Drives a side until `done`, asleep whenever nothing moves.
fn drive(side: &mut Side, waker: Option<&Waker>, done: impl Fn(&Side) -> bool) {
    while !done(side) {
        assert_eq!(side.error, None);
        if side.step() {
            continue;
        }
        if !side.link.arm().unwrap() {
            let mut watched = vec![];
            side.link.descriptors(&mut |fd, write| watched.push((fd, write)));
            let mut fds: Vec<PollFd> = watched
                .iter()
                .map(|(fd, write)| {
                    let flags = if *write { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
                    // A shared-memory link's socket is always writable and tells nothing by it.
                    let flags = if waker.is_some() { PollFlags::IN } else { flags };
                    // SAFETY: the link keeps the descriptor open.
                    PollFd::from_borrowed_fd(unsafe { BorrowedFd::borrow_raw(*fd) }, flags)
                })
                .collect();
            if let Some(waker) = waker {
                fds.push(PollFd::new(waker, PollFlags::IN));
            }
            let polled = side.link.is_polled();
            let limit = if polled { Duration::from_millis(1) } else { Duration::from_secs(30) };
            let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
            let woken = poll(&mut fds, Some(&limit)).unwrap();
            assert!(woken > 0 || polled, "a wake was lost");
        }
        side.link.disarm();
        if let Some(waker) = waker {
            waker.clear();
        }
    }
}

fn ping_pong(ends: Ends, rounds: u32) {
    let Ends { a, b, wakers, .. } = ends;
    let (wake_a, wake_b) = wakers.unzip();
    let over = Arc::new(Barrier::new(2));
    let run = move |pipes: Vec<Box<dyn Pipe>>, waker: Option<Waker>, first: bool, over: &Barrier| {
        let mut pipes = pipes;
        let control = pipes.remove(0);
        let mut side = Side::new(FlowLink::new(Rank(0), control, pipes, FlowOptions::default()));
        for round in 0..rounds {
            // Mostly small ones; large ones block writers, too.
            let len = if round % 50 == 0 { 5_000_000 } else { 64 };
            let bytes = pattern(len, u64::from(round));
            let r = side.recv(1, len, 0);
            if !first {
                drive(&mut side, waker.as_ref(), |side| side.is_done(r));
            }
            let s = side.send(1, &bytes, 0);
            drive(&mut side, waker.as_ref(), |side| side.is_done(s) && side.is_done(r));
            assert!(side.result(r) == bytes);
            side.forget(s);
            side.forget(r);
        }
        // Closing a socket in which something is unread takes back what is under way.
        over.wait();
    };
    let theirs = over.clone();
    let other = std::thread::spawn(move || run(b, wake_b, false, &theirs));
    run(a, wake_a, true, &over);
    other.join().unwrap();
}

#[test]
fn shm() {
    ping_pong(shm_ends(), 1500);
}

#[test]
fn tcp() {
    ping_pong(tcp_ends("127.0.0.1:0", 2), 500);
}

#[test]
fn unix() {
    ping_pong(unix_ends(), 500);
}

#[cfg(feature = "mpi")]
#[test]
fn mpi() {
    ping_pong(super::mpi_ends(), 300);
}
