//! The index logic of a ring with one producer and one consumer, and of the bell that ends a sleep. Generic
//! over the atomics, so that loom checks the very code that runs.
#![forbid(unsafe_code)]

use crate::error::Cause;

/// A word that two processes share.
pub trait Word {
    fn load_relaxed(&self) -> u64;
    fn load_acquire(&self) -> u64;
    fn store_release(&self, value: u64);
    fn swap(&self, value: u64) -> u64;
    fn set_bits(&self, bits: u64);
    /// A full fence, of the same family of atomics.
    fn fence();
}

impl Word for std::sync::atomic::AtomicU64 {
    fn load_relaxed(&self) -> u64 {
        self.load(std::sync::atomic::Ordering::Relaxed)
    }
    fn load_acquire(&self) -> u64 {
        self.load(std::sync::atomic::Ordering::Acquire)
    }
    fn store_release(&self, value: u64) {
        self.store(value, std::sync::atomic::Ordering::Release);
    }
    fn swap(&self, value: u64) -> u64 {
        self.swap(value, std::sync::atomic::Ordering::SeqCst)
    }
    fn set_bits(&self, bits: u64) {
        self.fetch_or(bits, std::sync::atomic::Ordering::SeqCst);
    }
    fn fence() {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
}

/// The producer's side of a ring of `size` bytes. Indices count bytes from the beginning of time.
pub struct Producer {
    size: u64,
    /// The truth; the shared word only follows it.
    tail: u64,
    /// The consumer's index when it was last read.
    head_seen: u64,
}

impl Producer {
    pub fn new(size: usize) -> Producer {
        Producer { size: size as u64, tail: 0, head_seen: 0 }
    }

    /// Where the next byte goes.
    pub fn position(&self) -> usize {
        (self.tail & (self.size - 1)) as usize
    }

    /// Bytes that may be written. Reads the consumer's index only when fewer than `wanted` are known to be free.
    pub fn room<W: Word>(&mut self, head: &W, wanted: usize) -> Result<usize, Cause> {
        let mut used = self.tail - self.head_seen;
        if self.size - used < wanted as u64 {
            let now = head.load_acquire();
            // Copied out, then checked: the consumer may only have come closer to the tail.
            let still = self.tail.wrapping_sub(now);
            if still > used {
                return Err(impossible("head", now));
            }
            self.head_seen = now;
            used = still;
        }
        Ok((self.size - used) as usize)
    }

    /// Shows `n` more bytes to the consumer.
    pub fn publish<W: Word>(&mut self, tail: &W, n: usize) {
        self.tail += n as u64;
        assert!(self.tail - self.head_seen <= self.size, "a ring is never overfilled");
        tail.store_release(self.tail);
    }

    /// Whether the consumer has made room since it was last looked at.
    pub fn is_news<W: Word>(&self, head: &W) -> bool {
        head.load_acquire() != self.head_seen
    }
}

/// The consumer's side of a ring of `size` bytes.
pub struct Consumer {
    size: u64,
    head: u64,
    tail_seen: u64,
}

impl Consumer {
    pub fn new(size: usize) -> Consumer {
        Consumer { size: size as u64, head: 0, tail_seen: 0 }
    }

    /// Where the next byte is.
    pub fn position(&self) -> usize {
        (self.head & (self.size - 1)) as usize
    }

    /// Bytes that may be read. Looks at the producer's index when fewer than `wanted` are known to be there.
    pub fn available<W: Word>(&mut self, tail: &W, wanted: usize) -> Result<usize, Cause> {
        let mut known = self.tail_seen - self.head;
        if known < wanted as u64 {
            let now = tail.load_acquire();
            let there = now.wrapping_sub(self.head);
            if there < known || there > self.size {
                return Err(impossible("tail", now));
            }
            self.tail_seen = now;
            known = there;
        }
        Ok(known as usize)
    }

    /// The producer's index when it was last looked at, if all up to there has been consumed.
    pub fn drained_at(&self) -> Option<u64> {
        (self.head == self.tail_seen).then_some(self.tail_seen)
    }

    /// Gives the room of `n` bytes back to the producer.
    pub fn release<W: Word>(&mut self, head: &W, n: usize) {
        self.head += n as u64;
        assert!(self.head <= self.tail_seen, "only bytes that have been shown are consumed");
        head.store_release(self.head);
    }

    /// Whether the producer has written since it was last looked at.
    pub fn is_news<W: Word>(&self, tail: &W) -> bool {
        tail.load_acquire() != self.tail_seen
    }
}

fn impossible(which: &str, value: u64) -> Cause {
    Cause::Misbehaved(format!("an impossible {which} index ({value}) in the shared memory"))
}

/// A sleeper wants to be woken when bytes arrive.
pub const WANTS_DATA: u64 = 1;
/// A sleeper wants to be woken when there is room to write.
pub const WANTS_ROOM: u64 = 2;

/// The sleeper's part: says what it waits for, and makes that visible before it looks at its rings again
/// (which the caller does next). Without the fence both sides could miss each other.
pub fn go_to_sleep<W: Word>(asleep: &W, wants: u64) {
    asleep.set_bits(wants);
    W::fence();
}

/// The waker's part, after it has published something: whether the sleeper must be woken.
pub fn must_wake<W: Word>(asleep: &W, offers: u64) -> bool {
    W::fence();
    // The sleeper may have woken and slept again for something else between the two: waking it once too
    // often is harmless, taking its flag without waking it is not.
    asleep.load_relaxed() & offers != 0 && asleep.swap(0) != 0
}
