//! The sending half of a link: orders meet grants, and are cut into frames.
#![forbid(unsafe_code)]

use super::checksum::Checksum;
use super::control::Outbox;
use super::frame::{FrameKind, HEADER_BYTES, Header, misbehaved};

use super::landing::landing_cost;
use super::pieces::Cursor;
use super::slab::Slab;
use super::streams::Streams;
use super::{Key, PROMISES_MAX};
use crate::device::Token;
use crate::error::Cause;
use crate::hash::Map;
use crate::limits::{EAGER_CREDIT_BYTES, FRAME_BYTES_MAX};
use crate::memory::{Memory, PieceRange, RunId};
use crate::transport::{Events, LinkEvent, Pipe, Stream};
use std::collections::VecDeque;
use std::io::IoSlice;

/// Slices that are handed to a pipe at once.
const PARTS_MAX: usize = 64;
const ZEROS: [u8; 4096] = [0; 4096];

struct Message {
    token: Token,
    key: Key,
    src: PieceRange,
    len: u64,
    /// Bytes that have been cut into frames.
    cut: u64,
    /// Where the next frame begins.
    cursor: Cursor,
    /// Bytes that the pipes have taken.
    written: u64,
}

/// What is known about a message that has not met its grant.
enum Entry {
    Posted(u32),
    Granted(u64),
}

/// A frame that is being written to a lane.
pub struct Outgoing {
    header: [u8; HEADER_BYTES],
    header_left: usize,
    /// The message; none when it was withdrawn (the frame is completed from `rest`), or all payload is written.
    message: Option<u32>,
    /// A copy of the payload that was unwritten when the message was withdrawn.
    rest: Vec<u8>,
    cursor: Cursor,
    payload_left: usize,
    padding_left: usize,
}

/// The sending half of a link.
pub struct Sends {
    messages: Slab<Message>,
    table: Map<Key, Entry>,
    granted: usize,
    streams: Streams,
    /// Small messages that have credit. They go ahead of data; credit bounds them.
    eager: VecDeque<u32>,
    /// Granted messages of which frames are left to be cut, one frame at a time in turn.
    data: VecDeque<u32>,
    credit: u64,
    eager_max: u64,
    /// Where frames carry checksums: the one in the making.
    sum: Option<Checksum>,
    /// Orders on streams whose retirement is under way.
    held: VecDeque<(Token, Stream, PieceRange)>,
    /// Found outside of progress; told by the next one.
    news: Vec<LinkEvent>,
}

impl Sends {
    pub fn new(eager_max: u64, checked: bool) -> Sends {
        Sends {
            messages: Slab::new(),
            table: Map::default(),
            granted: 0,
            streams: Streams::default(),
            eager: VecDeque::new(),
            data: VecDeque::new(),
            credit: EAGER_CREDIT_BYTES as u64,
            eager_max,
            sum: checked.then(Checksum::new),
            held: VecDeque::new(),
            news: Vec::new(),
        }
    }

    pub fn post(&mut self, token: Token, stream: Stream, src: PieceRange, outbox: &mut Outbox) {
        if self.streams.is_retiring(stream) {
            self.held.push_back((token, stream, src));
            return;
        }
        let len = src.bytes();
        let key = Key { stream, ordinal: self.streams.open(stream) };
        let message = Message { token, key, src, len, cut: 0, cursor: Cursor::default(), written: 0 };
        let index = self.messages.insert(message);
        if let Some(Entry::Granted(theirs)) = self.table.get(&key) {
            let theirs = *theirs;
            self.granted -= 1;
            self.table.remove(&key);
            self.meet(index, theirs, outbox);
        } else if len > 0 && len <= self.eager_max && landing_cost(len) <= self.credit {
            self.credit -= landing_cost(len);
            self.eager.push_back(index);
        } else {
            outbox.notice(FrameKind::Want, stream, key.ordinal, len);
            self.table.insert(key, Entry::Posted(index));
        }
    }

    /// A send has met its receive.
    fn meet(&mut self, index: u32, theirs: u64, outbox: &mut Outbox) {
        let Message { len, key, .. } = *self.messages.get(index);
        if len == 0 && theirs == 0 {
            // Meeting is all there is to an empty message.
            let message = self.messages.remove(index);
            self.streams.close(message.key.stream);
            self.news.push(LinkEvent::Done(message.token));
            return;
        }
        if len == theirs {
            self.data.push_back(index);
            return;
        }
        outbox.notice(FrameKind::RefuseRecv, key.stream, key.ordinal, len);
        self.refuse(index, theirs);
    }

    fn refuse(&mut self, index: u32, theirs: u64) {
        let message = self.messages.remove(index);
        self.streams.close(message.key.stream);
        self.news.push(LinkEvent::Length { token: message.token, ours: message.len, theirs });
    }

    /// A frame of the control pipe that concerns sends.
    pub fn hear(&mut self, header: &Header, outbox: &mut Outbox) -> Result<(), Cause> {
        let key = Key { stream: header.stream, ordinal: header.ordinal };
        match header.kind {
            FrameKind::Grant => self.hear_grant(key, header.total, outbox),
            FrameKind::RefuseSend => match self.table.get(&key) {
                Some(Entry::Posted(index)) => {
                    let index = *index;
                    self.table.remove(&key);
                    self.refuse(index, header.total);
                    Ok(())
                }
                // It went eagerly, or both sides found out at the same time.
                None if self.streams.is_past(key.stream, key.ordinal) => Ok(()),
                _ => Err(misbehaved("a refusal of a message that was not sent")),
            },
            FrameKind::Credit => {
                self.credit = self.credit.saturating_add(header.total);
                if self.credit > EAGER_CREDIT_BYTES as u64 {
                    return Err(misbehaved("more landing credit than there is landing space"));
                }
                Ok(())
            }
            FrameKind::Retired | FrameKind::Kept => {
                self.streams.retired(key.stream, header.kind == FrameKind::Retired)?;
                for _ in 0..self.held.len() {
                    let (token, stream, src) = self.held.pop_front().expect("just counted");
                    // Posts again, or goes back to the end of the queue, in order.
                    self.post(token, stream, src, outbox);
                }
                Ok(())
            }
            _ => unreachable!("the link sorts frames"),
        }
    }

    fn hear_grant(&mut self, key: Key, theirs: u64, outbox: &mut Outbox) -> Result<(), Cause> {
        match self.table.get(&key) {
            Some(Entry::Posted(index)) => {
                let index = *index;
                self.table.remove(&key);
                self.meet(index, theirs, outbox);
                Ok(())
            }
            Some(Entry::Granted(_)) => Err(misbehaved("a message granted twice")),
            // Sent eagerly against a receive of another length: the receiver finds out.
            None if self.streams.is_past(key.stream, key.ordinal) => Ok(()),
            None if self.granted >= PROMISES_MAX => Err(misbehaved("more grants than operations in flight")),
            None => {
                self.granted += 1;
                self.table.insert(key, Entry::Granted(theirs));
                Ok(())
            }
        }
    }

    /// Whether frames wait for room in a lane.
    pub fn has_frames(&self) -> bool {
        !self.eager.is_empty() || !self.data.is_empty()
    }

    /// Cuts the next frame.
    pub fn cut(&mut self, memory: &Memory) -> Option<Outgoing> {
        let (kind, index) = match self.eager.pop_front() {
            Some(index) => (FrameKind::Eager, index),
            None => (FrameKind::Data, self.data.pop_front()?),
        };
        let message = self.messages.get(index);
        let len = (message.len - message.cut).min(FRAME_BYTES_MAX as u64);
        let cursor = message.cursor;
        let payload_sum = self.sum.as_mut().map_or(0, |sum| {
            sum.reset();
            cursor.sum(memory, message.token.run, &message.src, len as usize, sum);
            sum.value()
        });
        let header = Header {
            kind,
            len: len as u32,
            stream: message.key.stream,
            ordinal: message.key.ordinal,
            offset: message.cut,
            total: message.len,
            payload_sum,
        };
        message.cut += len;
        if message.cut < message.len {
            message.cursor.advance(&message.src, len);
            self.data.push_back(index);
        }
        Some(Outgoing {
            header: header.encode(self.sum.is_some()),
            header_left: HEADER_BYTES,
            message: Some(index),
            rest: Vec::new(),
            cursor,
            payload_left: len as usize,
            padding_left: header.padding(),
        })
    }

    /// Writes as much of a frame as fits; says how much, and whether the frame is complete.
    pub fn write(
        &mut self,
        frame: &mut Outgoing,
        pipe: &mut dyn Pipe,
        memory: &Memory,
        events: &mut Events,
    ) -> Result<(usize, bool), Cause> {
        let mut all = 0;
        loop {
            let (wanted, n) = self.write_once(frame, pipe, memory)?;
            all += n;
            let header = n.min(frame.header_left);
            let payload = (n - header).min(frame.payload_left);
            frame.header_left -= header;
            frame.payload_left -= payload;
            frame.padding_left -= n - header - payload;
            if let Some(index) = frame.message {
                let message = self.messages.get(index);
                frame.cursor.advance(&message.src, payload as u64);
                message.written += payload as u64;
                if message.written == message.len && payload > 0 {
                    events.list.push(LinkEvent::Done(message.token));
                    let stream = message.key.stream;
                    self.messages.remove(index);
                    self.streams.close(stream);
                }
                if frame.payload_left == 0 {
                    // Another lane may complete the message before this frame's padding is written.
                    frame.message = None;
                }
            }
            if frame.header_left + frame.payload_left + frame.padding_left == 0 {
                return Ok((all, true));
            }
            if n < wanted {
                return Ok((all, false));
            }
        }
    }

    fn write_once(
        &mut self,
        frame: &Outgoing,
        pipe: &mut dyn Pipe,
        memory: &Memory,
    ) -> Result<(usize, usize), Cause> {
        let mut parts = [IoSlice::new(&[]); PARTS_MAX + 2];
        let (mut used, mut wanted) = (0, 0);
        if frame.header_left > 0 {
            parts[0] = IoSlice::new(&frame.header[HEADER_BYTES - frame.header_left..]);
            (used, wanted) = (1, frame.header_left);
        }
        let mut left = frame.payload_left;
        if left > 0 {
            let (more, bytes) = match frame.message {
                Some(index) => {
                    let message = self.messages.get(index);
                    let free = &mut parts[used..=PARTS_MAX];
                    frame.cursor.gather(memory, message.token.run, &message.src, left, free)
                }
                None => {
                    parts[used] = IoSlice::new(&frame.rest[frame.rest.len() - left..]);
                    (1, left)
                }
            };
            used += more;
            wanted += bytes;
            left -= bytes;
        }
        if left == 0 && frame.padding_left > 0 {
            parts[used] = IoSlice::new(&ZEROS[..frame.padding_left]);
            used += 1;
            wanted += frame.padding_left;
        }
        Ok((wanted, pipe.write(&parts[..used])?))
    }

    /// Forgets the messages of a run, and touches its memory no more. A frame that has begun is completed from
    /// a copy: with anything but the true bytes the peer, which may need no further frame, would take the
    /// message for whole and give a wrong result before it hears why it was withdrawn.
    pub fn withdraw<'a>(
        &mut self,
        run: RunId,
        memory: &Memory,
        frames: impl Iterator<Item = &'a mut Outgoing>,
    ) {
        let gone: Vec<u32> =
            self.messages.iter().filter(|(_, m)| m.token.run == run).map(|(index, _)| index).collect();
        for frame in frames {
            if let Some(index) = frame.message.filter(|index| gone.contains(index)) {
                frame.rest.resize(frame.payload_left, 0);
                frame.cursor.copy(memory, run, &self.messages.get(index).src, &mut frame.rest);
                frame.message = None;
            }
        }
        self.streams.freeze();
        self.held.retain(|(token, ..)| token.run != run);
        self.news.retain(|event| !super::is_of_run(event, run));
        for index in gone {
            let message = self.messages.remove(index);
            if let Some(Entry::Posted(_)) = self.table.get(&message.key) {
                self.table.remove(&message.key);
            }
            if let Some(at) = self.eager.iter().position(|i| *i == index) {
                // It never left, so the peer will not give its landing space back.
                self.eager.remove(at);
                self.credit += landing_cost(message.len);
            }
            self.data.retain(|i| *i != index);
            self.streams.close(message.key.stream);
        }
    }

    /// Tells what was found outside of progress, and proposes to retire idle streams.
    pub fn settle(&mut self, outbox: &mut Outbox, events: &mut Events) -> bool {
        self.streams.retire(outbox);
        let any = !self.news.is_empty();
        events.list.append(&mut self.news);
        any
    }

    #[cfg(test)]
    pub fn is_moving(&self) -> bool {
        self.messages.iter().any(|(_, m)| m.written > 0)
    }

    #[cfg(test)]
    pub fn streams(&self) -> usize {
        self.streams.len()
    }
}
