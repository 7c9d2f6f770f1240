//! The protocol between two ranks, once for all transports: messages meet on streams, small ones travel while
//! landing space lasts, large ones against a grant, and everything is cut into frames that share the lanes.
//!
//! *Matching.* The k-th send on a stream meets the k-th receive on it. Ordinals travel in every frame, so the
//! order in which pipes deliver does not matter. Ordinals of idle streams are forgotten by agreement
//! (`streams`).
//!
//! *Small messages* (at most [`EAGER_BYTES_MAX`]) go at once while credit for
//! landing space lasts. Without credit the sender says Want, and the receiver grants when the receive is posted.
//!
//! *Large messages* travel only against the Grant that the receiver sends when it posts. So payload in a lane
//! always has a place to go: no lane is ever blocked, and process sets that overlap cannot deadlock. A sender
//! that has no grant yet says Want, so that a receive of another length is found out.
//!
//! *Empty messages* (point-to-point only) are announced and granted, and no payload follows.
//!
//! *Lengths that differ* (point-to-point only): both sides get [`LinkEvent::Length`] and nothing moves; a
//! sender whose small message had left eagerly has been told Done already, and stays so.
//!
//! *Checksums* ([`FlowOptions::checksums`]) cover every header, control message and payload. Nobody is told of a
//! message before its checksum is right; a wrong one ends the link with [`Cause::Corrupted`].
#![deny(unsafe_code)]

mod checksum;
mod control;
mod frame;
mod landing;
mod leftovers;
#[allow(unsafe_code)]
pub(in crate::transport) mod pieces;
mod recv;
mod send;
mod slab;
mod streams;
#[cfg(test)]
mod tests;

use crate::error::Cause;
use crate::limits::{CONTROL_BYTES_MAX, EAGER_BYTES_MAX};
use crate::memory::{Memory, RunId};
use crate::transport::board::BoardMemory;
use crate::transport::{Events, Link, LinkEvent, LinkOrder, OrderKind, Pipe, Stream};
use crate::types::{Rank, Time};
use control::{Inbox, Outbox};
use frame::{FrameKind, Header};
pub use leftovers::Leftovers;
use pieces::{Combine, Target};
use recv::{Incoming, Recvs};
use send::{Outgoing, Sends};
use std::os::fd::RawFd;
use std::sync::Arc;

/// Announcements that a peer may have waiting for orders of this side: as many as operations in flight.
const PROMISES_MAX: usize = crate::limits::IN_FLIGHT_MAX;
/// Bytes that one lane moves per call of progress and direction: few enough that the peer, which waits for room or
/// for bytes, and the other links soon get their turn.
const LANE_BUDGET_BYTES: usize = 256 << 10;

/// Control frames that are read per call of progress.
const CONTROL_FRAMES_PER_CALL: usize = 4096;
/// What may wait for the control pipe: several times a frame for each operation in flight. Only a peer that
/// does not read gets there.
const OUTBOX_BYTES_MAX: usize = 4 * PROMISES_MAX * frame::HEADER_BYTES;

/// How long the last words of a peer whose first pipe has ended are waited for.
const LAST_WORDS_NS: u64 = 100_000_000;

/// One message of one stream, in one direction.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Key {
    stream: Stream,
    ordinal: u64,
}

/// What may be set about a link.
#[derive(Clone, Copy, Debug)]
pub struct FlowOptions {
    /// Messages of at most this many bytes may go eagerly. The same on both sides; at most
    /// [`EAGER_BYTES_MAX`].
    pub eager_bytes_max: usize,
    /// Whether frames carry checksums. The same on both sides; on between hosts.
    pub checksums: bool,
}

impl Default for FlowOptions {
    fn default() -> Self {
        FlowOptions { eager_bytes_max: EAGER_BYTES_MAX, checksums: false }
    }
}

struct Lane {
    pipe: Box<dyn Pipe>,
    ended: bool,
    incoming: Incoming,
    outgoing: Option<Outgoing>,
}

/// A [`Link`] made of pipes: one for control, the others (at least one) for payload.
pub struct FlowLink {
    peer: Rank,
    control: Box<dyn Pipe>,
    lanes: Vec<Lane>,
    outbox: Outbox,
    inbox: Inbox,
    sends: Sends,
    recvs: Recvs,
    heard: Time,
    control_ended: bool,
    /// The lanes were not read in the last call.
    put_off: bool,
    /// When the first pipe ended.
    ended_at: Option<Time>,
    dead: Option<Cause>,
    board: Option<Arc<BoardMemory>>,
}

impl FlowLink {
    /// A link to `peer` over these pipes. Both sides give equally many lanes, in any order.
    #[must_use]
    pub fn new(
        peer: Rank,
        control: Box<dyn Pipe>,
        lanes: Vec<Box<dyn Pipe>>,
        options: FlowOptions,
    ) -> FlowLink {
        assert!(!lanes.is_empty(), "a link has at least one lane");
        assert!(options.eager_bytes_max <= EAGER_BYTES_MAX, "landing space is made for EAGER_BYTES_MAX");
        let checked = options.checksums;
        let lanes = lanes
            .into_iter()
            .map(|pipe| Lane { pipe, ended: false, incoming: Incoming::new(checked), outgoing: None })
            .collect();
        FlowLink {
            peer,
            control,
            lanes,
            outbox: Outbox::new(checked),
            inbox: Inbox::new(checked),
            sends: Sends::new(options.eager_bytes_max as u64, checked),
            recvs: Recvs::new(options.eager_bytes_max as u64),
            heard: Time(0),
            control_ended: false,
            put_off: false,
            ended_at: None,
            dead: None,
            board: None,
        }
    }

    /// The same link to a peer that has this board.
    #[must_use]
    pub fn with_board(mut self, board: Option<Arc<BoardMemory>>) -> FlowLink {
        self.board = board;
        self
    }

    /// Whether some message is half written.
    #[cfg(test)]
    pub(crate) fn is_moving(&self) -> bool {
        self.lanes.iter().any(|lane| lane.outgoing.is_some()) || self.sends.is_moving()
    }

    /// Streams whose counts are remembered.
    #[cfg(test)]
    pub(crate) fn streams(&self) -> usize {
        self.sends.streams() + self.recvs.streams()
    }

    fn advance(&mut self, memory: &Memory, now: Time, events: &mut Events) -> Result<bool, Cause> {
        self.flush_backlogs()?;
        let mut moved = self.recvs.settle(memory, &mut self.outbox, events);
        let known = events.control.len();
        let mut heard = self.read_control(events)?;
        moved |= self.sends.settle(&mut self.outbox, events);
        self.write_control()?;
        // What the engine is told first may make it post the receives of what waits in the lanes: then that needs
        // no landing. But never twice in a row, or a peer that talks all the time would hold payload up.
        self.put_off = events.control.len() > known && !self.put_off;
        for at in 0..self.lanes.len() {
            moved |= self.write_lane(at, memory, events)?;
            if !self.put_off {
                heard |= self.read_lane(at, memory, events)?;
            }
        }
        moved |= self.recvs.settle(memory, &mut self.outbox, events);
        moved |= self.sends.settle(&mut self.outbox, events);
        moved |= self.write_control()?;
        if heard {
            self.heard = now;
        }
        self.check_end(now)?;
        Ok(moved || heard)
    }

    fn flush_backlogs(&mut self) -> Result<(), Cause> {
        if self.control.has_backlog() {
            self.control.flush()?;
        }
        self.lanes.iter_mut().filter(|lane| lane.pipe.has_backlog()).try_for_each(|lane| lane.pipe.flush())
    }

    /// A process that ends closes all its pipes, but what it said last (an abort, a goodbye) may arrive after
    /// the end of another pipe. So the link lives until all have ended, for a short while.
    fn check_end(&mut self, now: Time) -> Result<(), Cause> {
        let any = self.control_ended || self.lanes.iter().any(|lane| lane.ended);
        if !any {
            return Ok(());
        }
        let since = *self.ended_at.get_or_insert(now);
        let all = self.control_ended && self.lanes.iter().all(|lane| lane.ended);
        if all || now.since(since) >= LAST_WORDS_NS { Err(Cause::Exited) } else { Ok(()) }
    }

    fn read_control(&mut self, events: &mut Events) -> Result<bool, Cause> {
        let mut heard = false;
        if self.control_ended {
            return Ok(false);
        }
        // A peer that never stops talking does not keep this side from its other work.
        for _ in 0..CONTROL_FRAMES_PER_CALL {
            let (moved, header) = match self.inbox.read(&mut *self.control, events) {
                Err(Cause::Exited) => {
                    self.control_ended = true;
                    (false, None)
                }
                read => read?,
            };
            heard |= moved;
            if let Some(header) = header {
                self.hear(&header)?;
            }
            if !moved || events.control.len() > CONTROL_BYTES_MAX {
                break;
            }
        }
        if self.outbox.len() > OUTBOX_BYTES_MAX {
            return Err(frame::misbehaved("questions without reading the answers"));
        }
        if heard {
            self.control.flush()?;
        }
        Ok(heard)
    }

    fn hear(&mut self, header: &Header) -> Result<(), Cause> {
        use FrameKind::*;
        match header.kind {
            Grant | RefuseSend | Credit | Retired | Kept => self.sends.hear(header, &mut self.outbox),
            Want | RefuseRecv | Retire => self.recvs.hear(header, &mut self.outbox),
            Control | Eager | Data => unreachable!("the inbox and the header's check sort these out"),
        }
    }

    fn write_control(&mut self) -> Result<bool, Cause> {
        if self.outbox.is_empty() {
            return Ok(false);
        }
        let moved = self.outbox.write(&mut *self.control)?;
        if moved {
            self.control.flush()?;
        }
        Ok(moved)
    }

    fn write_lane(&mut self, at: usize, memory: &Memory, events: &mut Events) -> Result<bool, Cause> {
        let lane = &mut self.lanes[at];
        let mut written = 0;
        while written < LANE_BUDGET_BYTES {
            let Some(frame) = &mut lane.outgoing else {
                lane.outgoing = self.sends.cut(memory);
                if lane.outgoing.is_none() {
                    break;
                }
                continue;
            };
            let (n, complete) = self.sends.write(frame, &mut *lane.pipe, memory, events)?;
            written += n;
            if !complete {
                break;
            }
            lane.outgoing = None;
        }
        if written > 0 {
            lane.pipe.flush()?;
        }
        Ok(written > 0)
    }

    fn read_lane(&mut self, at: usize, memory: &Memory, events: &mut Events) -> Result<bool, Cause> {
        let Lane { pipe, ended, incoming, .. } = &mut self.lanes[at];
        if *ended {
            return Ok(false);
        }
        let budget = LANE_BUDGET_BYTES;
        match self.recvs.read(incoming, &mut **pipe, memory, budget, &mut self.outbox, events) {
            Err(Cause::Exited) => *ended = true,
            Ok(0) => {}
            read => {
                read?;
                pipe.flush()?;
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Link for FlowLink {
    fn peer(&self) -> Rank {
        self.peer
    }

    fn kind(&self) -> &'static str {
        self.lanes[0].pipe.kind()
    }

    fn post(&mut self, order: LinkOrder) {
        let LinkOrder { token, stream, kind } = order;
        let (dst, combine) = match kind {
            OrderKind::Send { src } => return self.sends.post(token, stream, src, &mut self.outbox),
            OrderKind::Recv { dst } => (dst, None),
            OrderKind::RecvReduce { dst, with, reduction, incoming_first } => {
                (dst, Some(Combine { with, reduction, incoming_first }))
            }
        };
        self.recvs.post(token, stream, Target { dst, combine }, &mut self.outbox);
    }

    fn withdraw(&mut self, run: RunId, memory: &Memory) {
        self.sends.withdraw(run, memory, self.lanes.iter_mut().filter_map(|lane| lane.outgoing.as_mut()));
        self.recvs.withdraw(run, self.lanes.iter_mut().map(|lane| &mut lane.incoming));
    }

    fn tell(&mut self, message: &[u8]) {
        assert!(message.len() <= CONTROL_BYTES_MAX, "a control message is at most CONTROL_BYTES_MAX long");
        self.outbox.message(message);
        if self.control.is_memory() {
            // The peer may begin with it at once. What does not fit or fails comes up with the next progress.
            let _ = self.write_control();
        }
    }

    /// On `Err`, `events` still holds what happened before: the engine looks at it first.
    fn progress(&mut self, memory: &Memory, now: Time, events: &mut Events) -> Result<bool, Cause> {
        if let Some(cause) = &self.dead {
            return Err(cause.clone());
        }
        self.advance(memory, now, events).inspect_err(|cause| self.dead = Some(cause.clone()))
    }

    fn heard(&self) -> Time {
        self.heard
    }

    fn board(&self) -> Option<Arc<BoardMemory>> {
        self.board.clone()
    }

    fn nudge(&mut self) {
        // A pipe that is broken says so when it is next moved.
        let _ = self.control.nudge();
    }

    fn arm(&mut self) -> Result<bool, Cause> {
        // A pipe that has ended wakes for ever: the owner polls for the last words, which is short.
        let mut ready = self.ended_at.is_some() | self.control.arm(!self.outbox.is_empty())?;
        for lane in &mut self.lanes {
            let blocked = lane.outgoing.is_some() || self.sends.has_frames();
            ready |= lane.pipe.arm(blocked)?;
        }
        Ok(ready)
    }

    fn disarm(&mut self) {
        self.control.disarm();
        for lane in &mut self.lanes {
            lane.pipe.disarm();
        }
    }

    fn descriptors(&self, visit: &mut dyn FnMut(RawFd, bool)) {
        if let Some(descriptor) = self.control.descriptor() {
            visit(descriptor, waits_for_room(&*self.control, !self.outbox.is_empty()));
        }
        for lane in &self.lanes {
            if let Some(descriptor) = lane.pipe.descriptor() {
                let blocked = lane.outgoing.is_some() || self.sends.has_frames();
                visit(descriptor, waits_for_room(&*lane.pipe, blocked));
            }
        }
    }

    fn is_polled(&self) -> bool {
        self.control.is_polled()
    }

    fn landed(&self, of: fn(Stream) -> bool) -> u64 {
        self.recvs.landed().filter(|&stream| of(stream)).count() as u64
    }

    fn holds(&self, stream: Stream) -> bool {
        self.recvs.landed().any(|landed| landed == stream)
    }

    fn announces(&self, stream: Stream) -> bool {
        self.recvs.announces(stream)
    }

    fn leave(self: Box<Self>, of: fn(Stream) -> bool) -> Option<Leftovers> {
        Leftovers::new(self.recvs, of)
    }

    fn drained(&self) -> bool {
        self.outbox.is_empty()
            && self.control.is_settled()
            && self.lanes.iter().all(|lane| lane.pipe.is_settled())
    }
}

/// Whether there is something to be done when the descriptor of a pipe has room.
fn waits_for_room(pipe: &dyn Pipe, blocked: bool) -> bool {
    (blocked && pipe.descriptor_tells_room()) || pipe.has_backlog()
}

fn is_of_run(event: &LinkEvent, run: RunId) -> bool {
    match event {
        LinkEvent::Done(token) | LinkEvent::Length { token, .. } => token.run == run,
        LinkEvent::Control(_) => false,
    }
}
