use super::ring::{Consumer, Producer, WANTS_DATA, WANTS_ROOM, go_to_sleep, must_wake};
use super::*;
use crate::transport::Pipe;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicU64;

struct Pair {
    a: (ShmPipe, ShmPipe),
    b: (ShmPipe, ShmPipe),
    wakers: [Waker; 2],
}

fn share() -> Share {
    Budget::new(u64::MAX).take(SEGMENT_BYTES as u64).unwrap()
}

fn pair() -> Pair {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let wakers = [Waker::new().unwrap(), Waker::new().unwrap()];
    let segment = create_segment().unwrap();
    let copy = segment.try_clone().unwrap();
    let eventfd = |w: &Waker| w.as_fd().try_clone_to_owned().unwrap();
    Pair {
        a: open(segment, Side::Creator, ours.into(), wakers[0].clone(), eventfd(&wakers[1]), share())
            .unwrap(),
        b: open(copy, Side::Joiner, theirs.into(), wakers[1].clone(), eventfd(&wakers[0]), share()).unwrap(),
        wakers,
    }
}

fn is_awake(waker: &Waker) -> bool {
    let mut fds = [PollFd::new(waker, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
}

fn refusal(segment: OwnedFd) -> Cause {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let peer = Waker::new().unwrap().as_fd().try_clone_to_owned().unwrap();
    open(segment, Side::Joiner, ours.into(), Waker::new().unwrap(), peer, share()).err().expect("refused")
}

#[test]
fn only_segments_are_opened() {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    let short = memfd_create("x", MemfdFlags::ALLOW_SEALING).unwrap();
    assert!(matches!(refusal(short), Cause::Misbehaved(why) if why.contains("bytes long")));
    let open = memfd_create("x", MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&open, SEGMENT_BYTES as u64).unwrap();
    assert!(matches!(refusal(open), Cause::Misbehaved(why) if why.contains("not sealed")));
    let other = create_segment().unwrap();
    rustix::io::pwrite(&other, &[9], 7).unwrap();
    assert!(matches!(refusal(other), Cause::Misbehaved(why) if why.contains("another version")));
    let segment = create_segment().unwrap();
    assert!(ftruncate(&segment, 4096).is_err(), "nobody takes the memory away");
}

#[test]
fn impossible_indices_are_misbehaviour() {
    for value in [u64::MAX, 1 << 40, SHM_RING_BYTES_PLUS_ONE] {
        let mut p = pair();
        p.b.1.shared.segment.tail(p.a.1.rx).store(value, Ordering::Release);
        assert!(matches!(p.a.1.peek(), Err(Cause::Misbehaved(_))), "tail {value}");
        let mut p = pair();
        p.b.1.shared.segment.head(p.a.1.tx).store(value, Ordering::Release);
        let big = vec![0; 1 << 20];
        let first = p.a.1.write(&[IoSlice::new(&big)]);
        let second = p.a.1.write(&[IoSlice::new(&big)]);
        assert!(matches!((first, second), (Err(_), _) | (_, Err(Cause::Misbehaved(_)))), "head {value}");
    }
}

const SHM_RING_BYTES_PLUS_ONE: u64 = crate::limits::SHM_RING_BYTES as u64 + 1;

#[test]
fn a_sleeper_is_woken_only_for_what_it_waits_for() {
    let mut p = pair();
    assert!(!p.a.1.arm(false).unwrap());
    p.b.1.write(&[IoSlice::new(&[1; 32])]).unwrap();
    assert!(!is_awake(&p.wakers[0]), "nothing is told before flush");
    p.b.1.flush().unwrap();
    assert!(is_awake(&p.wakers[0]));
    p.wakers[0].clear();
    p.b.1.write(&[IoSlice::new(&[1; 32])]).unwrap();
    p.b.1.flush().unwrap();
    assert!(!is_awake(&p.wakers[0]), "who is awake is not woken");
    assert!(p.a.1.arm(false).unwrap(), "bytes that came before the sleep prevent it");
    p.a.1.disarm();
    // Room: told only to who is blocked.
    assert!(!p.b.1.arm(false).unwrap());
    let n = p.a.1.peek().unwrap().len();
    assert_eq!(n, 64);
    p.a.1.consume(32);
    p.a.1.flush().unwrap();
    assert!(!is_awake(&p.wakers[1]));
    p.b.1.disarm();
    assert!(p.b.1.arm(true).unwrap(), "room that was made before the sleep prevents it");
    p.b.1.disarm();
    while p.b.1.write(&[IoSlice::new(&[1; 4096])]).unwrap() > 0 {}
    assert!(!p.b.1.arm(true).unwrap());
    p.a.1.consume(32);
    p.a.1.flush().unwrap();
    assert!(is_awake(&p.wakers[1]));
}

#[test]
fn the_end_is_told_after_the_last_bytes() {
    let Pair { mut a, b: (mut control, data), .. } = pair();
    control.write(&[IoSlice::new(b"farewell")]).unwrap();
    control.flush().unwrap();
    drop((control, data));
    a.0.disarm();
    assert_eq!(a.0.peek().unwrap(), b"farewell");
    a.0.consume(8);
    for _ in 0..super::WAKES_PER_CHECK {
        a.0.disarm();
        a.1.disarm();
    }
    assert_eq!(a.0.peek().err(), Some(Cause::Exited));
    assert_eq!(a.1.peek().err(), Some(Cause::Exited));
}

#[test]
fn ring_indices_wrap_and_bound() {
    let (head, tail) = (AtomicU64::new(0), AtomicU64::new(0));
    let (mut producer, mut consumer) = (Producer::new(64), Consumer::new(64));
    for _ in 0..100 {
        assert_eq!(producer.room(&head, 48).unwrap().min(48), 48);
        producer.publish(&tail, 48);
        assert_eq!(consumer.available(&tail, 64).unwrap(), 48);
        consumer.release(&head, 48);
    }
    assert_eq!((producer.position(), consumer.position()), (4800 % 64, 4800 % 64));
    // A consumer that goes backwards, a producer that goes backwards.
    producer.room(&head, 64).unwrap();
    head.store(4000, Ordering::Release);
    producer.publish(&tail, 1);
    assert!(producer.room(&head, 64).is_err());
    tail.store(4000, Ordering::Release);
    assert!(consumer.available(&tail, 64).is_err());
}

#[test]
fn the_bell_takes_a_flag_once() {
    let asleep = AtomicU64::new(0);
    go_to_sleep(&asleep, WANTS_DATA);
    assert!(!must_wake(&asleep, WANTS_ROOM));
    assert!(must_wake(&asleep, WANTS_DATA));
    assert!(!must_wake(&asleep, WANTS_DATA));
}
