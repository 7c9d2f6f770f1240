//! Which message of a stream comes next. Counts of streams that have been idle for long are retired by
//! agreement of both sides, so that a job whose streams are always new does not grow.
#![forbid(unsafe_code)]

use super::control::Outbox;
use super::frame::{FrameKind, misbehaved};

use crate::error::Cause;
use crate::hash::Map;
use crate::transport::Stream;
use std::collections::VecDeque;

/// Idle streams that are kept before the older half of them is proposed for retirement.
pub const IDLE_STREAMS_MAX: usize = 1024;

/// The state of one stream in one direction, at one side.
#[derive(Clone, Copy, Default, Debug)]
struct Count {
    /// The ordinal of the next message.
    next: u64,
    /// Messages that are not complete.
    open: u64,
    /// Sender only: a Retire is under way; orders are held until it is answered.
    retiring: bool,
    /// Sender only: the stream stands in the idle queue.
    queued: bool,
}

/// The streams of one direction, at one side.
#[derive(Default)]
pub struct Streams {
    counts: Map<Stream, Count>,
    idle: VecDeque<Stream>,
    frozen: bool,
}

impl Streams {
    /// The ordinal of a new message.
    pub fn open(&mut self, stream: Stream) -> u64 {
        let count = self.counts.entry(stream).or_default();
        let ordinal = count.next;
        count.next += 1;
        count.open += 1;
        ordinal
    }

    /// A message is complete (or was given up).
    pub fn close(&mut self, stream: Stream) {
        let count = self.counts.get_mut(&stream).expect("an open stream has a count");
        count.open -= 1;
        if count.open == 0 && !count.queued {
            count.queued = true;
            self.idle.push_back(stream);
        }
    }

    /// Whether the message has been posted here already, so that news about it may be late.
    pub fn is_past(&self, stream: Stream, ordinal: u64) -> bool {
        self.counts.get(&stream).is_some_and(|count| ordinal < count.next)
    }

    /// Sender: whether new orders of this stream have to wait.
    pub fn is_retiring(&self, stream: Stream) -> bool {
        self.counts.get(&stream).is_some_and(|count| count.retiring)
    }

    /// Sender: proposes to forget the older half of the idle streams when there are many.
    pub fn retire(&mut self, outbox: &mut Outbox) {
        if self.frozen || self.idle.len() < IDLE_STREAMS_MAX {
            return;
        }
        for _ in 0..IDLE_STREAMS_MAX / 2 {
            let Some(stream) = self.idle.pop_front() else { break };
            let count = self.counts.get_mut(&stream).expect("an idle stream has a count");
            count.queued = false;
            if count.open == 0 {
                count.retiring = true;
                outbox.notice(FrameKind::Retire, stream, count.next, 0);
            }
        }
    }

    /// Sender: the answer to a proposal.
    pub fn retired(&mut self, stream: Stream, forgotten: bool) -> Result<(), Cause> {
        let Some(count) = self.counts.get_mut(&stream).filter(|count| count.retiring) else {
            return Err(misbehaved("an answer about a stream that nobody wanted to retire"));
        };
        count.retiring = false;
        if forgotten {
            self.counts.remove(&stream);
        } else if count.open == 0 && !count.queued {
            count.queued = true;
            self.idle.push_back(stream);
        }
        Ok(())
    }

    /// Receiver: forgets the count of a stream on which `sent` messages were sent, if all have been received
    /// and no further receive is posted. Says whether it did.
    pub fn forget(&mut self, stream: Stream, sent: u64) -> bool {
        let agreed = !self.frozen
            && self.counts.get(&stream).is_some_and(|count| count.next == sent && count.open == 0);
        if agreed {
            self.counts.remove(&stream);
        }
        agreed
    }

    /// Receiver: the end of a message. The sender proposes retirement, so nothing is queued here.
    pub fn close_received(&mut self, stream: Stream) {
        self.counts.get_mut(&stream).expect("an open stream has a count").open -= 1;
    }

    /// Forgets nothing any more: payload of withdrawn messages may still be under way, and is known as such by
    /// the counts.
    pub fn freeze(&mut self) {
        self.frozen = true;
    }

    /// Streams that are remembered.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.counts.len()
    }
}
