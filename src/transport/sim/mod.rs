//! A network in memory: virtual time, a seed, faults. What happens depends on the seed and the calls alone.
//!
//! Delays are drawn per write; each direction of a pipe stays in order, pipes of one pair do not. Time moves
//! only by [`Network::advance`], and [`Network::next_event`] says when it is worth moving.
#![forbid(unsafe_code)]

mod fabric;
#[cfg(test)]
mod tests;

pub use fabric::Fabric;

use crate::error::Cause;
use crate::transport::Pipe;
use crate::transport::board::BoardMemory;
use crate::types::{Rank, Time};
use std::collections::{BTreeMap, VecDeque};
use std::io::IoSlice;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How the network behaves.
#[derive(Clone, Copy, Debug)]
pub struct SimOptions {
    /// Everything random follows from it.
    pub seed: u64,
    /// The shortest delay of a write.
    pub delay_min_ns: u64,
    /// The longest delay of a write.
    pub delay_max_ns: u64,
    /// Bytes under way per pipe and direction; a multiple of 32, at least 64.
    pub capacity_bytes: usize,
    /// Whether writes are cut at random places, so that readers see every kind of fragment.
    pub fragments: bool,
    /// Whether ranks have boards.
    pub boards: bool,
}

impl Default for SimOptions {
    fn default() -> Self {
        SimOptions {
            seed: 0,
            delay_min_ns: 1_000,
            delay_max_ns: 50_000,
            capacity_bytes: 64 << 10,
            fragments: true,
            boards: false,
        }
    }
}

/// One direction of one pipe.
#[derive(Default)]
struct Channel {
    from: Rank,
    to: Rank,
    /// When each run of bytes arrives, in order, with its length.
    arrivals: VecDeque<(Time, usize)>,
    /// Bytes under way or arrived, in order.
    bytes: VecDeque<u8>,
    /// When the reader learns that the pipe was cut.
    cut_at: Option<Time>,
}

struct State {
    options: SimOptions,
    now: Time,
    random: u64,
    channels: Vec<Channel>,
    /// Directions in which everything is dropped silently.
    dropped: Vec<(Rank, Rank)>,
    /// Directions in which the next write is changed by one bit.
    flips: Vec<(Rank, Rank)>,
    /// Ranks whose bytes stand still until they are resumed.
    paused: Vec<Rank>,
    /// Ranks that are gone.
    gone: Vec<Rank>,
    /// Ranks that have something to find which was not there when they were last asked for.
    roused: Vec<Rank>,
    /// Links that were asked for: (from, to), and what becomes of it.
    requests: fabric::Requests,
    /// The board of each rank that has one, from the time that its fabric was made.
    boards: BTreeMap<Rank, Arc<BoardMemory>>,
}

/// The network. Clones are the same network.
#[derive(Clone)]
pub struct Network(Arc<Mutex<State>>);

impl Network {
    /// Whether ranks have boards.
    #[must_use]
    pub fn has_boards(&self) -> bool {
        self.lock().options.boards
    }
    /// A network at time 0.
    #[must_use]
    pub fn new(options: SimOptions) -> Network {
        assert!(
            options.capacity_bytes >= 64 && options.capacity_bytes.is_multiple_of(32),
            "elements are never split"
        );
        assert!(options.delay_min_ns <= options.delay_max_ns, "the shortest delay is not above the longest");
        Network(Arc::new(Mutex::new(State {
            options,
            now: Time(0),
            random: options.seed ^ 0x9E37_79B9_7F4A_7C15,
            channels: Vec::new(),
            dropped: Vec::new(),
            flips: Vec::new(),
            paused: Vec::new(),
            gone: Vec::new(),
            roused: Vec::new(),
            requests: fabric::Requests::default(),
            boards: BTreeMap::new(),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A test that panicked elsewhere leaves the state as good as it was.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The present.
    #[must_use]
    pub fn now(&self) -> Time {
        self.lock().now
    }

    /// Lets time pass. It never goes back.
    pub fn advance(&self, to: Time) {
        let mut state = self.lock();
        let State { now, channels, requests, roused, .. } = &mut *state;
        let passed = |time: &Time| *time > *now && *time <= to;
        for channel in channels.iter() {
            if channel.cut_at.is_some_and(|time| passed(&time))
                || channel.arrivals.iter().any(|(at, _)| passed(at))
            {
                rouse(roused, channel.to);
            }
        }
        for rank in requests.ready(passed) {
            rouse(roused, rank);
        }
        state.now = state.now.max(to);
    }

    /// Ranks for which something has arrived, or room has been made, since this was last asked. (What they see on a
    /// board, or by their clocks, nobody tells.)
    #[must_use]
    pub fn take_roused(&self) -> Vec<Rank> {
        std::mem::take(&mut self.lock().roused)
    }

    /// When the next bytes (or the news of a cut) arrive; none when nothing is under way.
    #[must_use]
    pub fn next_event(&self) -> Option<Time> {
        let state = self.lock();
        let live = state.channels.iter().filter(|c| !state.is_paused(c));
        live.flat_map(|c| {
            let first = c.arrivals.partition_point(|(time, _)| *time <= state.now);
            c.arrivals.get(first).map(|(time, _)| *time).into_iter().chain(c.cut_at)
        })
        .filter(|time| *time > state.now)
        .min()
    }

    /// A pipe between two ranks: its end at `a`, and its end at `b`.
    #[must_use]
    pub fn pipe(&self, a: Rank, b: Rank) -> (SimPipe, SimPipe) {
        let mut state = self.lock();
        let there = state.channels.len();
        state.channels.push(Channel { from: a, to: b, ..Channel::default() });
        state.channels.push(Channel { from: b, to: a, ..Channel::default() });
        drop(state);
        let end = |tx, rx| SimPipe { network: self.clone(), tx, rx, shown: Vec::new(), seen: 0, full: false };
        (end(there, there + 1), end(there + 1, there))
    }

    /// Ends all pipes between two ranks: each side sees [`Cause::Exited`] after what had been written.
    pub fn cut(&self, a: Rank, b: Rank) {
        self.lock().cut(|c| (c.from, c.to) == (a, b) || (c.from, c.to) == (b, a));
    }

    /// The process of a rank ends: all its pipes are cut, and what it is asked for later fails.
    pub fn kill(&self, rank: Rank) {
        let mut state = self.lock();
        state.cut(|c| c.from == rank || c.to == rank);
        state.gone.push(rank);
    }

    /// Silently drops all that `from` sends to `to` from now on (the other direction works).
    pub fn drop_silently(&self, from: Rank, to: Rank) {
        self.lock().dropped.push((from, to));
    }

    /// Changes one bit of what `from` next sends to `to`.
    pub fn flip_bit(&self, from: Rank, to: Rank) {
        self.lock().flips.push((from, to));
    }

    /// Holds all bytes to and from a rank until it is resumed.
    pub fn pause(&self, rank: Rank) {
        self.lock().paused.push(rank);
    }

    /// All processes have been started again: every rank is there, runs, is heard, and has no link yet.
    pub fn forget_faults(&self) {
        let mut state = self.lock();
        state.dropped.clear();
        state.flips.clear();
        state.paused.clear();
        state.gone.clear();
        state.boards.clear();
        let requests = std::mem::take(&mut state.requests);
        drop(state);
        // Its pipes lock the network when they are dropped.
        drop(requests);
    }

    /// Ends a pause.
    pub fn resume(&self, rank: Rank) {
        let mut state = self.lock();
        state.paused.retain(|r| *r != rank);
        let State { channels, roused, .. } = &mut *state;
        let peers = channels.iter().filter(|c| c.from == rank || c.to == rank).map(|c| c.to);
        peers.for_each(|peer| rouse(roused, peer));
    }
}

fn rouse(roused: &mut Vec<Rank>, rank: Rank) {
    if !roused.contains(&rank) {
        roused.push(rank);
    }
}

impl State {
    /// splitmix64 (Steele, Lea, Flood 2014).
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn delay(&mut self) -> u64 {
        let SimOptions { delay_min_ns, delay_max_ns, .. } = self.options;
        delay_min_ns + self.random() % (delay_max_ns - delay_min_ns + 1)
    }

    fn is_paused(&self, channel: &Channel) -> bool {
        self.paused.contains(&channel.from) || self.paused.contains(&channel.to)
    }

    fn cut(&mut self, hit: impl Fn(&Channel) -> bool) {
        for at in 0..self.channels.len() {
            if hit(&self.channels[at]) && self.channels[at].cut_at.is_none() {
                let time = self.now.after_ns(self.delay());
                let channel = &mut self.channels[at];
                let last = channel.arrivals.back().map_or(time, |(last, _)| *last);
                channel.cut_at = Some(time.max(last));
            }
        }
    }

    /// Bytes that have arrived on a channel, and whether the end has.
    fn arrived(&self, at: usize) -> (usize, bool) {
        let channel = &self.channels[at];
        if self.is_paused(channel) {
            return (0, false);
        }
        let bytes = channel.arrivals.iter().take_while(|(time, _)| *time <= self.now).map(|(_, n)| n).sum();
        (bytes, channel.cut_at.is_some_and(|time| time <= self.now))
    }

    fn write(&mut self, at: usize, parts: &[IoSlice<'_>]) -> usize {
        let wanted: usize = parts.iter().map(|part| part.len()).sum();
        let mut n = wanted.min(self.room(at));
        if self.options.fragments && n > 1 && self.random().is_multiple_of(4) {
            n = 1 + (self.random() % n as u64) as usize;
        }
        let time = self.now.after_ns(self.delay());
        let dropped = self.dropped.contains(&(self.channels[at].from, self.channels[at].to));
        let channel = &mut self.channels[at];
        // After a cut, as with a socket, what is written goes nowhere; the reading side tells.
        if n == 0 || dropped || channel.cut_at.is_some() {
            return n;
        }
        let mut left = n;
        for part in parts {
            let k = left.min(part.len());
            channel.bytes.extend(&part[..k]);
            left -= k;
        }
        let time = channel.arrivals.back().map_or(time, |(last, _)| time.max(*last));
        channel.arrivals.push_back((time, n));
        self.flip(at, n);
        n
    }

    /// Changes a bit of the last `n` bytes of a channel, if that was asked for.
    fn flip(&mut self, at: usize, n: usize) {
        let pair = (self.channels[at].from, self.channels[at].to);
        let Some(order) = self.flips.iter().position(|flip| *flip == pair) else { return };
        self.flips.remove(order);
        let bit = (self.random() % (8 * n as u64)) as usize;
        let bytes = &mut self.channels[at].bytes;
        let first = bytes.len() - n;
        bytes[first + bit / 8] ^= 1 << (bit % 8);
    }

    fn room(&self, at: usize) -> usize {
        self.options.capacity_bytes - self.channels[at].bytes.len()
    }

    fn consume(&mut self, at: usize, n: usize) {
        let channel = &mut self.channels[at];
        if n > 0 {
            rouse(&mut self.roused, channel.from);
        }
        channel.bytes.drain(..n);
        let mut left = n;
        while left > 0 {
            let (_, run) = channel.arrivals.front_mut().expect("only what has arrived is consumed");
            let k = left.min(*run);
            *run -= k;
            left -= k;
            if *run == 0 {
                channel.arrivals.pop_front();
            }
        }
    }
}

/// One end of a pipe. Dropping it ends the pipe.
pub struct SimPipe {
    network: Network,
    tx: usize,
    rx: usize,
    /// A copy of what has arrived, so that it can be shown.
    shown: Vec<u8>,
    /// Bytes that had arrived when somebody last looked, less what was consumed since.
    seen: usize,
    /// The last write did not take everything.
    full: bool,
}

impl Pipe for SimPipe {
    fn write(&mut self, parts: &[IoSlice<'_>]) -> Result<usize, Cause> {
        let wanted: usize = parts.iter().map(|part| part.len()).sum();
        let n = self.network.lock().write(self.tx, parts);
        self.full = n < wanted;
        Ok(n)
    }

    fn peek(&mut self) -> Result<&[u8], Cause> {
        let state = self.network.lock();
        let (n, ended) = state.arrived(self.rx);
        if n == 0 && ended {
            return Err(Cause::Exited);
        }
        let from = self.shown.len().min(n);
        let (front, back) = state.channels[self.rx].bytes.as_slices();
        let split = front.len();
        self.shown.extend_from_slice(&front[from.min(split)..n.min(split)]);
        self.shown.extend_from_slice(&back[from.saturating_sub(split)..n.saturating_sub(split)]);
        drop(state);
        self.seen = self.shown.len();
        Ok(&self.shown)
    }

    fn consume(&mut self, n: usize) {
        assert!(n <= self.shown.len(), "only bytes that have been shown are consumed");
        self.shown.drain(..n);
        self.seen -= n;
        self.network.lock().consume(self.rx, n);
    }

    fn flush(&mut self) -> Result<(), Cause> {
        Ok(())
    }

    fn arm(&mut self, blocked: bool) -> Result<bool, Cause> {
        let state = self.network.lock();
        let (n, ended) = state.arrived(self.rx);
        Ok(n > self.seen || (ended && n == 0) || (blocked && self.full && state.room(self.tx) > 0))
    }

    fn disarm(&mut self) {}

    fn descriptor(&self) -> Option<RawFd> {
        None
    }

    fn kind(&self) -> &'static str {
        "sim"
    }
}

impl Drop for SimPipe {
    fn drop(&mut self) {
        let (tx, rx) = (self.tx, self.rx);
        let mut state = self.network.lock();
        let time = state.now.after_ns(state.delay());
        let channel = &mut state.channels[tx];
        let last = channel.arrivals.back().map_or(time, |(last, _)| time.max(*last));
        channel.cut_at.get_or_insert(last);
        // Nobody reads the other direction any more: its memory is given back, and writes go nowhere.
        let channel = &mut state.channels[rx];
        channel.cut_at.get_or_insert(time);
        channel.bytes = VecDeque::new();
        channel.arrivals = VecDeque::new();
        let writer = channel.from;
        rouse(&mut state.roused, writer);
    }
}
