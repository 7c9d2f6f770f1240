//! The ring and the sleep handshake under every interleaving and reordering that C11 allows:
//! `RUSTFLAGS="--cfg loom" cargo test --lib loom`.

use super::ring::{Consumer, Producer, WANTS_DATA, WANTS_ROOM, Word, go_to_sleep, must_wake};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use loom::thread;

impl Word for AtomicU64 {
    fn load_relaxed(&self) -> u64 {
        self.load(Ordering::Relaxed)
    }
    fn load_acquire(&self) -> u64 {
        self.load(Ordering::Acquire)
    }
    fn store_release(&self, value: u64) {
        self.store(value, Ordering::Release);
    }
    fn swap(&self, value: u64) -> u64 {
        self.swap(value, Ordering::SeqCst)
    }
    fn set_bits(&self, bits: u64) {
        self.fetch_or(bits, Ordering::SeqCst);
    }
    fn fence() {
        fence(Ordering::SeqCst);
    }
}

struct World {
    head: AtomicU64,
    tail: AtomicU64,
    cells: [UnsafeCell<u64>; 2],
    /// What each side (0 produces, 1 consumes) waits for, and its eventfd.
    asleep: [AtomicU64; 2],
    rung: [AtomicBool; 2],
}

fn world() -> Arc<World> {
    Arc::new(World {
        head: AtomicU64::new(0),
        tail: AtomicU64::new(0),
        cells: [UnsafeCell::new(0), UnsafeCell::new(0)],
        asleep: [AtomicU64::new(0), AtomicU64::new(0)],
        rung: [AtomicBool::new(false), AtomicBool::new(false)],
    })
}

#[test]
fn loom_ring_hands_over_what_was_written() {
    loom::model(|| {
        let world = world();
        let theirs = world.clone();
        let producer = thread::spawn(move || {
            let mut producer = Producer::new(2);
            let mut sent = 0;
            for _ in 0..4 {
                if sent < 3 && producer.room(&theirs.head, 1).unwrap() > 0 {
                    let at = producer.position();
                    // SAFETY: loom fails the model if the consumer reads this cell at the same time.
                    theirs.cells[at].with_mut(|cell| unsafe { *cell = sent + 10 });
                    producer.publish(&theirs.tail, 1);
                    sent += 1;
                }
            }
        });
        let mut consumer = Consumer::new(2);
        let mut got = 0;
        for _ in 0..3 {
            if consumer.available(&world.tail, 2).unwrap() > 0 {
                let at = consumer.position();
                // SAFETY: loom fails the model if the producer writes this cell at the same time.
                let value = world.cells[at].with(|cell| unsafe { *cell });
                assert_eq!(value, got + 10, "bytes arrive in order, as they were written");
                consumer.release(&world.head, 1);
                got += 1;
            }
        }
        producer.join().unwrap();
    });
}

/// After both are through: whoever sleeps with something to do has been rung.
fn handshake(offer: u64, want: u64) {
    loom::model(move || {
        let world = world();
        let theirs = world.clone();
        let waker = thread::spawn(move || {
            theirs.tail.store_release(1);
            if must_wake(&theirs.asleep[1], offer) {
                theirs.rung[1].store(true, Ordering::Release);
            }
        });
        go_to_sleep(&world.asleep[1], want);
        let saw = world.tail.load_acquire() == 1;
        waker.join().unwrap();
        assert!(saw || world.rung[1].load(Ordering::Acquire), "a wake was lost");
    });
}

#[test]
fn loom_no_wake_is_lost() {
    handshake(WANTS_DATA, WANTS_DATA);
    handshake(WANTS_ROOM, WANTS_DATA | WANTS_ROOM);
}

/// Two pipes share a side's flag: the bell of one must not swallow the wish of the other.
#[test]
fn loom_two_pipes_share_a_bell() {
    loom::model(|| {
        let world = world();
        let theirs = world.clone();
        let waker = thread::spawn(move || {
            theirs.tail.store_release(1);
            let first = must_wake(&theirs.asleep[1], WANTS_DATA);
            theirs.head.store_release(1);
            let second = must_wake(&theirs.asleep[1], WANTS_ROOM);
            if first || second {
                theirs.rung[1].store(true, Ordering::Release);
            }
        });
        go_to_sleep(&world.asleep[1], WANTS_DATA);
        let data = world.tail.load_acquire() == 1;
        go_to_sleep(&world.asleep[1], WANTS_DATA | WANTS_ROOM);
        let room = world.head.load_acquire() == 1;
        waker.join().unwrap();
        assert!((data && room) || world.rung[1].load(Ordering::Acquire), "a wake was lost");
    });
}
