//! Transports carry bytes between ranks. A transport supplies *pipes* (ordered byte streams to one peer);
//! [`flow`] makes of them a [`Link`], which matches messages, grants credit and reduces on receipt, once for
//! all transports.

#[cfg(test)]
mod conformance;
pub mod flow;
#[cfg(feature = "mpi")]
pub mod mpi;
pub mod shm;
pub mod board;
pub mod sim;
pub mod tcp;
pub mod tls;
pub mod wake;

use self::board::BoardMemory;
use crate::device::{Reduction, Token};
use crate::error::Cause;
use crate::memory::{Memory, PieceRange};
use crate::types::{Rank, Time};
use std::io::IoSlice;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::Arc;

/// One ordered stream of bytes in each direction between this process and one peer.
pub trait Pipe: Send {
    /// Takes as many bytes as fit now, in order, and says how many; 0 means full. Never blocks.
    fn write(&mut self, parts: &[IoSlice<'_>]) -> Result<usize, Cause>;
    /// Bytes that have arrived and can be looked at where they lie; empty when there are none. Never blocks.
    /// At least as many as in the last call, less what was consumed. A pipe shows at least 32 bytes at a time
    /// as long as whole multiples of 32 bytes are written (frames are padded so), or all that have arrived.
    fn peek(&mut self) -> Result<&[u8], Cause>;
    /// Drops the first `n` of the bytes shown.
    fn consume(&mut self, n: usize);
    /// Moves bytes straight to `dst`, as many as have arrived, and says how many. The default copies from `peek`.
    fn read(&mut self, dst: &mut [u8]) -> Result<usize, Cause> {
        let shown = self.peek()?;
        let n = shown.len().min(dst.len());
        dst[..n].copy_from_slice(&shown[..n]);
        self.consume(n);
        Ok(n)
    }
    /// Makes written bytes visible and wakes the peer if it sleeps.
    fn flush(&mut self) -> Result<(), Cause>;
    /// Something was published to the peer beside the pipe: wakes it if it sleeps.
    fn nudge(&mut self) -> Result<(), Cause> {
        Ok(())
    }
    /// The owner is about to sleep. Asks to be woken when bytes arrive (and, if `blocked`, when there is room
    /// to write), and returns whether something is there already, so that it must not sleep.
    fn arm(&mut self, blocked: bool) -> Result<bool, Cause>;
    /// The owner is awake again.
    fn disarm(&mut self);
    /// What to watch besides the process's own eventfd: a descriptor that becomes readable (and writable, if
    /// armed with `blocked`). Shared-memory pipes show the socket whose end of file tells that the peer died.
    fn descriptor(&self) -> Option<RawFd>;
    /// Whether the descriptor becomes writable when there is room. (The socket beside shared memory always is;
    /// there the eventfd tells.)
    fn descriptor_tells_room(&self) -> bool {
        true
    }
    /// Whether a write is a copy in memory and no system call, so that nothing is gained by gathering several.
    fn is_memory(&self) -> bool {
        false
    }
    /// Whether nothing ends the owner's sleep when bytes come: it must look again by itself, after short naps.
    fn is_polled(&self) -> bool {
        false
    }
    /// Whether bytes that were taken wait in the pipe itself: it is to be flushed when its descriptor has room.
    fn has_backlog(&self) -> bool {
        false
    }
    /// Whether all that was written goes on without this process. Else the owner must go on driving.
    fn is_settled(&self) -> bool {
        !self.has_backlog()
    }
    /// The transport's name: shm, tcp, tls (tcp, encrypted), mpi, sim.
    fn kind(&self) -> &'static str;
}

/// Which messages belong together: the k-th send on a stream meets the k-th receive on it. The engine makes
/// streams from (set, batch, window) or (set, tag).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Stream(pub u128);

/// A message to send or to receive.
#[derive(Clone, Debug)]
pub struct LinkOrder {
    /// Comes back in [`LinkEvent::Done`].
    pub token: Token,
    /// Which receive it meets.
    pub stream: Stream,
    /// What to do.
    pub kind: OrderKind,
}

/// What to do with a message.
#[derive(Clone, Debug)]
pub enum OrderKind {
    /// Send these bytes. Never empty.
    Send {
        /// The bytes.
        src: PieceRange,
    },
    /// Receive into these bytes. Never empty.
    Recv {
        /// Where the bytes go.
        dst: PieceRange,
    },
    /// Receive `x`; write `with ⊕ x`, or `x ⊕ with` when `incoming_first`, to `dst`.
    RecvReduce {
        /// Where the bytes go.
        dst: PieceRange,
        /// The operand that is here.
        with: PieceRange,
        /// Operation and type.
        reduction: Reduction,
        /// Whether the incoming operand is the left one.
        incoming_first: bool,
    },
}

/// What a link tells.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LinkEvent {
    /// The order with this token is complete: a send's bytes may be overwritten, a receive's are there.
    Done(Token),
    /// The peer posted a different length for the matching message (only possible for point-to-point
    /// messages, whose lengths were not agreed). Both sides are told; nothing was moved.
    Length {
        /// The order.
        token: Token,
        /// Bytes posted here.
        ours: u64,
        /// Bytes posted there.
        theirs: u64,
    },
    /// A control message has arrived: these bytes of [`Events::control`].
    Control(Range<usize>),
}

/// What [`Link::progress`] tells, in buffers that the engine reuses.
#[derive(Default, Debug)]
pub struct Events {
    /// What happened, in order.
    pub list: Vec<LinkEvent>,
    /// The bytes of control messages.
    pub control: Vec<u8>,
}

impl Events {
    /// Empties both buffers and keeps their capacity.
    pub fn clear(&mut self) {
        self.list.clear();
        self.control.clear();
    }
}

/// A connection to one peer, as the engine uses it.
pub trait Link: Send {
    /// The peer.
    fn peer(&self) -> Rank;
    /// The transport that carries payload: shm, tcp, tls, mpi, sim.
    fn kind(&self) -> &'static str;
    /// Takes an order. Never blocks; how many orders are outstanding is bounded by the engine.
    fn post(&mut self, order: LinkOrder);
    /// Withdraws all orders of a run, and what has landed for it: its memory is not touched any more after
    /// this call. A message of it arrives whole and right, or never.
    fn withdraw(&mut self, run: crate::memory::RunId, memory: &Memory);
    /// Queues a control message. The queue is bounded by what the engine may have outstanding; control goes
    /// ahead of payload and never waits for credit.
    fn tell(&mut self, message: &[u8]);
    /// Moves bytes and appends what happened. Returns whether anything moved. `Err` means that the link is dead.
    fn progress(&mut self, memory: &Memory, now: Time, events: &mut Events) -> Result<bool, Cause>;
    /// When the peer was last heard of (any byte).
    fn heard(&self) -> Time;
    /// The peer's board, where it shares this host and has one.
    fn board(&self) -> Option<Arc<BoardMemory>> {
        None
    }
    /// Something was published to the peer beside the link, on a board: wakes it if it sleeps.
    fn nudge(&mut self) {}
    /// The owner is about to sleep: see [`Pipe::arm`].
    fn arm(&mut self) -> Result<bool, Cause>;
    /// The owner is awake again.
    fn disarm(&mut self);
    /// Calls `visit(descriptor, wants_write)` for each descriptor to watch.
    fn descriptors(&self, visit: &mut dyn FnMut(RawFd, bool));
    /// Whether nothing ends the owner's sleep when something comes: see [`Pipe::is_polled`].
    fn is_polled(&self) -> bool {
        false
    }
    /// Whether all that was told has been handed to the transport (so that a goodbye can be waited for).
    fn drained(&self) -> bool;
    /// Messages of those streams that have arrived whole before they were asked for, and were not received yet.
    fn landed(&self, of: fn(Stream) -> bool) -> u64;
    /// Whether such a message is there on a stream.
    fn holds(&self, stream: Stream) -> bool;
    /// Whether the peer is known to have sent the first message of a stream, which was not asked for yet: it is here, on
    /// its way, or announced.
    fn announces(&self, stream: Stream) -> bool;
    /// Ends the connection. What is left are those messages, if there are any.
    fn leave(self: Box<Self>, of: fn(Stream) -> bool) -> Option<flow::Leftovers>;
}

/// Supplies links. Connecting and proving who one is happens elsewhere (rendezvous, or the simulator); the
/// engine only asks and is told.
pub trait Fabric: Send {
    /// Asks for a link to `peer`; a no-op if it is there or under way.
    fn request(&mut self, peer: Rank);
    /// The next thing that happened.
    fn poll(&mut self) -> Option<FabricEvent>;
    /// This rank's own board, if it has one.
    fn board(&self) -> Option<Arc<BoardMemory>> {
        None
    }
}

/// What a fabric tells.
pub enum FabricEvent {
    /// A link is up and proven.
    Up(Box<dyn Link>),
    /// There will be no link to the peer.
    Failed {
        /// The peer.
        peer: Rank,
        /// Who is at fault: the peer, or this rank where it is this one that cannot be reached.
        culprit: Rank,
        /// What happened to the culprit.
        cause: Cause,
    },
}
