//! The receiving half of a link: orders meet what is wanted, what has landed and what arrives.
#![forbid(unsafe_code)]

use super::checksum::Checksum;
use super::control::Outbox;
use super::frame::{FrameKind, HEADER_BYTES, Header, misbehaved};

use super::landing::{Chain, Landing, landing_cost};
use super::pieces::{Target, TargetCursor};
use super::slab::Slab;
use super::streams::Streams;
use super::{Key, PROMISES_MAX};
use crate::device::Token;
use crate::error::Cause;
use crate::hash::Map;
use crate::limits::{EAGER_CREDIT_BYTES, FRAME_BYTES_MAX};
use crate::memory::{Memory, RunId};
use crate::transport::{Events, LinkEvent, Pipe, Stream};

struct Message {
    token: Token,
    key: Key,
    target: Target,
    len: u64,
    received: u64,
    granted: bool,
    /// Frames that have begun, and that have arrived whole.
    begun: u64,
    ended: u64,
    /// Where the frame behind the last one begins, so that frames in order need no search.
    hint: (u64, TargetCursor),
}

impl Message {
    fn frames(&self) -> u64 {
        self.len.div_ceil(FRAME_BYTES_MAX as u64)
    }
}

/// What is known about a message.
enum Entry {
    Posted(u32),
    Wanted(u64),
    Landing(u32),
}

/// A message in landing space.
struct Landed {
    key: Key,
    chain: Chain,
    /// Whether it is all there, with the right checksum.
    is_whole: bool,
    /// The receive that it has met.
    posted: Option<u32>,
}

/// A frame that is being read from a lane.
pub struct Incoming {
    header: [u8; HEADER_BYTES],
    got: usize,
    body: Option<Body>,
    /// Where frames carry checksums: that of the payload that has arrived.
    sum: Option<Checksum>,
}

struct Body {
    header: Header,
    sink: Sink,
    payload_left: usize,
    padding_left: usize,
}

#[derive(Clone, Copy)]
enum Sink {
    Drop,
    Message(u32, TargetCursor),
    Landing(u32),
}

impl Incoming {
    pub fn new(checked: bool) -> Incoming {
        let sum = checked.then(Checksum::new);
        Incoming { header: [0; HEADER_BYTES], got: 0, body: None, sum }
    }
}

/// The receiving half of a link.
pub struct Recvs {
    messages: Slab<Message>,
    table: Map<Key, Entry>,
    wanted: usize,
    streams: Streams,
    landing: Landing,
    landed: Slab<Landed>,
    /// Landed messages that wait to be copied out.
    ready: Vec<u32>,
    /// Credit to give back.
    owed: u64,
    eager_max: u64,
    news: Vec<LinkEvent>,
}

impl Recvs {
    pub fn new(eager_max: u64) -> Recvs {
        Recvs {
            messages: Slab::new(),
            table: Map::default(),
            wanted: 0,
            streams: Streams::default(),
            landing: Landing::new(),
            landed: Slab::new(),
            ready: Vec::new(),
            owed: 0,
            eager_max,
            news: Vec::new(),
        }
    }

    pub fn post(&mut self, token: Token, stream: Stream, target: Target, outbox: &mut Outbox) {
        let len = target.dst.bytes();
        if let Some(combine) = &target.combine {
            let size = combine.reduction.dtype.size() as u64;
            assert_eq!(len, combine.with.bytes(), "both operands of a reduction are equally long");
            let whole = |range: &crate::memory::PieceRange| range.pieces().iter().all(|p| p.len % size == 0);
            assert!(whole(&target.dst) && whole(&combine.with), "pieces of a reduction hold whole elements");
        }
        let key = Key { stream, ordinal: self.streams.open(stream) };
        let message = Message {
            token,
            key,
            target,
            len,
            received: 0,
            granted: false,
            begun: 0,
            ended: 0,
            hint: (0, TargetCursor::default()),
        };
        let index = self.messages.insert(message);
        match self.table.get(&key) {
            None => {
                self.table.insert(key, Entry::Posted(index));
                if len > self.eager_max {
                    self.grant(index, outbox);
                }
            }
            Some(Entry::Wanted(theirs)) => {
                let theirs = *theirs;
                self.wanted -= 1;
                self.table.insert(key, Entry::Posted(index));
                if theirs == len {
                    self.grant(index, outbox);
                } else {
                    self.refuse(index, theirs, outbox);
                }
            }
            Some(Entry::Landing(landed)) => {
                let landed = *landed;
                self.meet_landed(index, landed, outbox);
            }
            Some(Entry::Posted(_)) => unreachable!("ordinals are given once"),
        }
    }

    fn grant(&mut self, index: u32, outbox: &mut Outbox) {
        let message = self.messages.get(index);
        message.granted = true;
        outbox.notice(FrameKind::Grant, message.key.stream, message.key.ordinal, message.len);
        if message.len == 0 {
            // An empty message is granted when it is announced, and that is all there is to it.
            let message = self.messages.remove(index);
            self.table.remove(&message.key);
            self.streams.close_received(message.key.stream);
            self.news.push(LinkEvent::Done(message.token));
        }
    }

    fn meet_landed(&mut self, index: u32, landed: u32, outbox: &mut Outbox) {
        let ours = self.messages.get(index).len;
        let message = self.landed.get(landed);
        message.posted = Some(index);
        let (chain, is_whole) = (message.chain, message.is_whole);
        if chain.len as u64 != ours {
            // The bytes stay until they have all landed, then they are thrown away.
            message.posted = None;
            self.refuse(index, chain.len as u64, outbox);
            if is_whole {
                self.release(landed);
            }
        } else if is_whole {
            self.ready.push(landed);
        }
    }

    /// Both sides have posted different lengths. Removes the receive.
    fn refuse(&mut self, index: u32, theirs: u64, outbox: &mut Outbox) {
        let message = self.messages.remove(index);
        let Key { stream, ordinal } = message.key;
        outbox.notice(FrameKind::RefuseSend, stream, ordinal, message.len);
        self.table.remove(&message.key);
        self.streams.close_received(stream);
        self.news.push(LinkEvent::Length { token: message.token, ours: message.len, theirs });
    }

    fn release(&mut self, landed: u32) {
        let Landed { chain, .. } = self.landed.remove(landed);
        self.landing.release(chain);
        self.owed += landing_cost(chain.len as u64);
    }

    /// The streams of messages that lie whole in landing space.
    pub fn landed(&self) -> impl Iterator<Item = Stream> {
        let whole = self.landed.iter().filter(|(_, landed)| landed.is_whole);
        whole.map(|(_, landed)| landed.key.stream)
    }

    /// Whether the first message of a stream is announced, or has begun to land, and was not asked for yet.
    pub fn announces(&self, stream: Stream) -> bool {
        let known = self.table.get(&Key { stream, ordinal: 0 });
        matches!(known, Some(Entry::Wanted(_) | Entry::Landing(_)))
    }

    /// A frame of the control pipe that concerns receives.
    pub fn hear(&mut self, header: &Header, outbox: &mut Outbox) -> Result<(), Cause> {
        let key = Key { stream: header.stream, ordinal: header.ordinal };
        match header.kind {
            FrameKind::Want => self.hear_want(key, header.total, outbox),
            FrameKind::RefuseRecv => match self.table.get(&key) {
                Some(Entry::Posted(index)) => {
                    let index = *index;
                    let message = self.messages.get(index);
                    if !message.granted || message.begun > 0 || message.len == header.total {
                        return Err(misbehaved("a refusal of a receive that it had no reason to refuse"));
                    }
                    let message = self.messages.remove(index);
                    self.table.remove(&key);
                    self.streams.close_received(key.stream);
                    let (token, ours) = (message.token, message.len);
                    self.news.push(LinkEvent::Length { token, ours, theirs: header.total });
                    Ok(())
                }
                None if self.streams.is_past(key.stream, key.ordinal) => Ok(()),
                _ => Err(misbehaved("a refusal of a receive that is not posted")),
            },
            FrameKind::Retire => {
                let forgotten = self.streams.forget(key.stream, key.ordinal);
                let answer = if forgotten { FrameKind::Retired } else { FrameKind::Kept };
                outbox.notice(answer, key.stream, key.ordinal, 0);
                Ok(())
            }
            _ => unreachable!("the link sorts frames"),
        }
    }

    fn hear_want(&mut self, key: Key, theirs: u64, outbox: &mut Outbox) -> Result<(), Cause> {
        match self.table.get(&key) {
            Some(Entry::Posted(index)) => {
                let index = *index;
                let message = self.messages.get(index);
                if message.len != theirs {
                    if message.begun > 0 {
                        return Err(misbehaved("two lengths for one message"));
                    }
                    self.refuse(index, theirs, outbox);
                } else if !message.granted {
                    self.grant(index, outbox);
                }
                Ok(())
            }
            Some(_) => Err(misbehaved("a message announced twice")),
            // Granted when it was posted, and complete before this arrived.
            None if self.streams.is_past(key.stream, key.ordinal) => Ok(()),
            None if self.wanted >= PROMISES_MAX => Err(misbehaved("more messages than operations in flight")),
            None => {
                self.wanted += 1;
                self.table.insert(key, Entry::Wanted(theirs));
                Ok(())
            }
        }
    }

    /// Reads from a lane until it is dry or `budget` bytes have moved; says how many did.
    pub fn read(
        &mut self,
        incoming: &mut Incoming,
        pipe: &mut dyn Pipe,
        memory: &Memory,
        budget: usize,
        outbox: &mut Outbox,
        events: &mut Events,
    ) -> Result<usize, Cause> {
        let mut moved = 0;
        while moved < budget {
            let Some(body) = &mut incoming.body else {
                let n = pipe.read(&mut incoming.header[incoming.got..])?;
                incoming.got += n;
                moved += n;
                if incoming.got < HEADER_BYTES {
                    break;
                }
                incoming.got = 0;
                let header = Header::decode(&incoming.header, true, incoming.sum.is_some())?;
                incoming.sum.iter_mut().for_each(Checksum::reset);
                incoming.body = Some(self.begin(&header, outbox)?);
                continue;
            };
            let n = if body.payload_left > 0 {
                let n = self.read_payload(body, pipe, memory, incoming.sum.as_mut())?;
                body.payload_left -= n;
                if body.payload_left == 0 {
                    // Before anybody is told that it is there.
                    if let Some(sum) = &incoming.sum {
                        body.header.check_payload(sum.value())?;
                    }
                    let sink = std::mem::replace(&mut body.sink, Sink::Drop);
                    self.end(sink, events)?;
                }
                n
            } else {
                let n = pipe.peek()?.len().min(body.padding_left);
                pipe.consume(n);
                body.padding_left -= n;
                n
            };
            moved += n;
            if body.payload_left == 0 && body.padding_left == 0 {
                incoming.body = None;
            } else if n == 0 {
                break;
            }
        }
        Ok(moved)
    }

    fn read_payload(
        &mut self,
        body: &mut Body,
        pipe: &mut dyn Pipe,
        memory: &Memory,
        sum: Option<&mut Checksum>,
    ) -> Result<usize, Cause> {
        match &mut body.sink {
            Sink::Drop => {
                let shown = pipe.peek()?;
                let n = shown.len().min(body.payload_left);
                if let Some(sum) = sum {
                    sum.update(&shown[..n]);
                }
                pipe.consume(n);
                Ok(n)
            }
            Sink::Message(index, cursor) => {
                let message = self.messages.get(*index);
                let run = message.token.run;
                let n = cursor.take(&message.target, pipe, memory, run, body.payload_left, sum)?;
                message.received += n as u64;
                Ok(n)
            }
            Sink::Landing(landed) => {
                let chain = &mut self.landed.get(*landed).chain;
                let room = self.landing.room(chain);
                let n = pipe.read(room)?;
                if let Some(sum) = sum {
                    sum.update(&room[..n]);
                }
                self.landing.landed(chain, n);
                Ok(n)
            }
        }
    }

    /// The header of a payload frame has arrived.
    fn begin(&mut self, header: &Header, outbox: &mut Outbox) -> Result<Body, Cause> {
        let key = Key { stream: header.stream, ordinal: header.ordinal };
        let sink = match (header.kind, self.table.get(&key)) {
            (_, Some(Entry::Posted(index))) => {
                let index = *index;
                self.begin_posted(index, header, outbox)?
            }
            (FrameKind::Data, None) if self.streams.is_past(key.stream, key.ordinal) => Sink::Drop,
            (FrameKind::Data, _) => return Err(misbehaved("payload that was not granted")),
            (_, Some(_)) => return Err(misbehaved("a message sent twice")),
            (_, None) if self.streams.is_past(key.stream, key.ordinal) => {
                // Its receive was withdrawn, or refused because of another announcement.
                self.owed += landing_cost(u64::from(header.len));
                Sink::Drop
            }
            (_, None) => {
                let chain = self.landing.claim(header.len as usize)?;
                let landed = self.landed.insert(Landed { key, chain, is_whole: false, posted: None });
                self.table.insert(key, Entry::Landing(landed));
                Sink::Landing(landed)
            }
        };
        Ok(Body { header: *header, sink, payload_left: header.len as usize, padding_left: header.padding() })
    }

    fn begin_posted(&mut self, index: u32, header: &Header, outbox: &mut Outbox) -> Result<Sink, Cause> {
        let message = self.messages.get(index);
        let eager = header.kind == FrameKind::Eager;
        if eager {
            // No landing space was used; what counts is that the peer may send as much again.
            self.owed += landing_cost(u64::from(header.len));
        } else if !message.granted {
            return Err(misbehaved("payload that was not granted"));
        }
        if header.total != message.len {
            if !eager || message.begun > 0 {
                return Err(misbehaved("payload of another length than was granted"));
            }
            self.refuse(index, header.total, outbox);
            return Ok(Sink::Drop);
        }
        message.begun += 1;
        if message.begun > message.frames() {
            return Err(misbehaved("more payload than the message is long"));
        }
        let (at, cursor) = message.hint;
        let cursor =
            if at == header.offset { cursor } else { TargetCursor::at(&message.target, header.offset) };
        let end = header.offset + u64::from(header.len);
        if end < message.len {
            message.hint = (end, TargetCursor::at(&message.target, end));
        }
        Ok(Sink::Message(index, cursor))
    }

    /// The payload of a frame has arrived.
    fn end(&mut self, sink: Sink, events: &mut Events) -> Result<(), Cause> {
        match sink {
            Sink::Drop => {}
            Sink::Message(index, _) => {
                let message = self.messages.get(index);
                message.ended += 1;
                if message.ended == message.frames() {
                    if message.received != message.len {
                        return Err(misbehaved("one part of a message twice"));
                    }
                    self.complete(index, events);
                }
            }
            Sink::Landing(landed) => {
                let message = self.landed.get(landed);
                message.is_whole = true;
                let (key, is_met) = (message.key, message.posted.is_some());
                if is_met {
                    self.ready.push(landed);
                } else if !matches!(self.table.get(&key), Some(Entry::Landing(l)) if *l == landed) {
                    // Refused or withdrawn while it landed, or the table would still hold it.
                    self.release(landed);
                }
            }
        }
        Ok(())
    }

    fn complete(&mut self, index: u32, events: &mut Events) {
        let message = self.messages.remove(index);
        self.table.remove(&message.key);
        self.streams.close_received(message.key.stream);
        events.list.push(LinkEvent::Done(message.token));
    }

    /// Copies out what has landed, tells what was found outside of progress, and gives credit back.
    pub fn settle(&mut self, memory: &Memory, outbox: &mut Outbox, events: &mut Events) -> bool {
        let any = !self.ready.is_empty() || !self.news.is_empty();
        while let Some(landed) = self.ready.pop() {
            let Landed { chain, posted, .. } = self.landed.get(landed);
            let (chain, index) = (*chain, posted.expect("a ready message has met its receive"));
            let message = self.messages.get(index);
            let mut cursor = TargetCursor::default();
            self.landing.visit(&chain, |bytes| {
                cursor.put(&message.target, bytes, memory, message.token.run);
            });
            self.release(landed);
            self.complete(index, events);
        }
        events.list.append(&mut self.news);
        // Not for each message: without credit the sender asks, so nothing ever hangs on a late return.
        if self.owed >= EAGER_CREDIT_BYTES as u64 / 4 {
            outbox.notice(FrameKind::Credit, Stream(0), 0, self.owed);
            self.owed = 0;
        }
        any
    }

    /// Forgets the receives of a run: what still comes for it is read and dropped.
    pub fn withdraw<'a>(&mut self, run: RunId, frames: impl Iterator<Item = &'a mut Incoming>) {
        let gone: Vec<u32> =
            self.messages.iter().filter(|(_, m)| m.token.run == run).map(|(index, _)| index).collect();
        for frame in frames {
            if let Some(body) = &mut frame.body
                && let Sink::Message(index, _) = body.sink
                && gone.contains(&index)
            {
                body.sink = Sink::Drop;
            }
        }
        self.streams.freeze();
        self.news.retain(|event| !super::is_of_run(event, run));
        for index in gone {
            let message = self.messages.remove(index);
            if let Some(Entry::Landing(landed)) = self.table.remove(&message.key) {
                self.ready.retain(|l| *l != landed);
                let message = self.landed.get(landed);
                message.posted = None;
                if message.is_whole {
                    self.release(landed);
                }
            }
            self.streams.close_received(message.key.stream);
        }
    }

    #[cfg(test)]
    pub fn streams(&self) -> usize {
        self.streams.len()
    }
}
