//! Tagged point-to-point messages: the n-th send with a tag meets the n-th receive with it. Receives from any rank are
//! in [`super::any_source`].
#![forbid(unsafe_code)]

use super::Engine;
use super::batch::Flight;
use super::operation::OutputTensor;
use crate::coordinator::OpId;
use crate::device::Token;
use crate::error::{Error, Mismatch, Result};
use crate::memory::{Piece, PieceRange, Region, RunId};
use crate::transport::{LinkOrder, OrderKind, Stream};
use crate::types::{DType, Rank, SetId};
use std::sync::Arc;

/// A message to send or to receive.
#[derive(Clone, Copy, Debug)]
pub struct MessageSubmission {
    /// The caller's number for it.
    pub op: OpId,
    /// The process set that the tag belongs to.
    pub set: SetId,
    /// The other end; `None` to receive from any member of the set.
    pub peer: Option<Rank>,
    /// The tag.
    pub tag: u32,
    /// Whether this end sends.
    pub sends: bool,
    /// The bytes.
    pub memory: Region,
    /// Element type, for the outcome.
    pub dtype: DType,
}

impl Engine {
    /// Takes a point-to-point message.
    pub fn submit_message(&mut self, m: &MessageSubmission, shape: &[u64]) -> Result<()> {
        self.quiet_until = None;
        // Messages of one tag meet receives in the order in which these were submitted.
        let waits = !m.sends && (m.peer.is_none() || self.unmatched.has(m.set, m.tag));
        match (self.admit(m.set, m.op), m.peer) {
            (_, Some(peer)) if !waits && self.broken.is_none() && self.cannot_reach(m, peer) => {
                return Err(Error::Shutdown(Some(peer)));
            }
            // A message needs its two ends and nobody else.
            (Err(Error::Shutdown(Some(_))), _) if self.broken.is_none() => {}
            (admitted, _) => admitted?,
        }
        self.check_peer(m)?;
        self.hang_together();
        self.open_message(m, shape);
        match m.peer {
            Some(peer) if !waits => self.exchange(m, peer),
            _ => self.wait_for_source(m),
        }
        Ok(())
    }

    /// Refuses what no member of the set can be the other end of.
    fn check_peer(&self, m: &MessageSubmission) -> Result<()> {
        let set = &self.sets[&m.set];
        let fits = match m.peer {
            Some(peer) => peer != self.me && set.member_of(peer).is_some(),
            None => !m.sends && set.size() > 1,
        };
        if fits {
            return Ok(());
        }
        let what = if m.sends { "send to" } else { "receive from" };
        let whom = m.peer.map_or_else(|| "any rank".to_owned(), |peer| peer.to_string());
        Err(Error::usage(format!(
            "cannot {what} {whom}: there must be another member in process set {} ({})",
            m.set.0,
            super::sets::list(&set.ranks)
        )))
    }

    fn open_message(&mut self, m: &MessageSubmission, shape: &[u64]) {
        let mut operation = self.spare_ops.pop().unwrap_or_default();
        operation.set = m.set;
        operation.remaining = 1;
        operation.agreed = true;
        operation.place = None;
        operation.tensors.clear();
        operation.outcome.tensors.clear();
        if !m.sends {
            operation.outcome.tensors.push(OutputTensor {
                dtype: m.dtype,
                shape: shape.to_vec(),
                memory: None,
                on_device: None,
                direct: false,
            });
        }
        self.ops.insert(m.op, operation);
    }

    /// Gives a message to the link to its other end.
    pub(super) fn exchange(&mut self, m: &MessageSubmission, peer: Rank) {
        let next = self.messages.entry((m.set, peer, m.tag, m.sends)).or_default();
        let stream = message_stream(m.set, m.tag, *next);
        *next += 1;
        if let Some(operation) = self.ops.get_mut(&m.op) {
            operation.outcome.source = (!m.sends).then_some(peer);
        }
        let run = self.memory.register([m.memory]);
        // An empty message has no piece; the ends still meet, so that one of another length is found out.
        let list: Arc<[Piece]> = Arc::new([Piece { region: 0, offset: 0, len: m.memory.len() }]);
        let bytes = PieceRange { list, start: 0, end: u32::from(!m.memory.is_empty()) };
        let kind = if m.sends { OrderKind::Send { src: bytes } } else { OrderKind::Recv { dst: bytes } };
        let (op, set, sends) = (m.op, m.set, m.sends);
        self.place_flight(run, Flight::Message { op, run, peer, set, stream, sends });
        self.links.post(peer, LinkOrder { token: Token { run, window: 0, step: 0 }, stream, kind });
    }

    /// The name of the next message of a tag, to or from a rank.
    pub(super) fn next_stream(&self, m: &MessageSubmission, peer: Rank) -> Stream {
        let next = self.messages.get(&(m.set, peer, m.tag, m.sends)).copied().unwrap_or_default();
        message_stream(m.set, m.tag, next)
    }

    /// A message has arrived or left, or cannot.
    pub(super) fn finish_message(&mut self, run: RunId, error: Option<Error>) {
        let slot = &mut self.flights[run.slot as usize];
        if !matches!(slot, Some(Flight::Message { run: of, .. }) if *of == run) {
            return;
        }
        let Some(Flight::Message { op, peer, sends, .. }) = slot.take() else { return };
        let (sent, received) = self.exchanged.entry(peer).or_default();
        *if sends { sent } else { received } += 1;
        self.flying -= 1;
        self.memory.forget(run);
        self.end(op, error.map_or(Ok(()), Err));
    }

    /// What a message waits for, in words; `None` if the operation is none.
    pub(super) fn explain_message(&self, op: OpId) -> Option<String> {
        if let Some(m) = self.unmatched.find(op) {
            let whom = m.peer.map_or_else(|| "any rank".to_owned(), |peer| peer.to_string());
            return Some(format!("waiting for a message from {whom} with tag {}", m.tag));
        }
        self.flights.iter().flatten().find_map(|flight| match flight {
            Flight::Message { op: of, peer, sends: true, .. } if *of == op => {
                Some(format!("waiting for {peer} to receive"))
            }
            Flight::Message { op: of, peer, .. } if *of == op => Some(format!("waiting for {peer} to send")),
            _ => None,
        })
    }

    /// Messages that a rank was sent from here.
    pub(super) fn sent_to(&self, peer: Rank) -> u64 {
        self.exchanged.get(&peer).map_or(0, |&(sent, _)| sent)
    }

    /// Whether all messages are here that a rank has sent that has left. It counts them in its goodbye; until that has
    /// come, nobody knows.
    pub(super) fn has_all_of(&self, who: Rank) -> bool {
        if !self.has_left_cleanly(who) || !self.links.is_up(who) {
            return true;
        }
        let received = self.exchanged.get(&who).map_or(0, |&(_, received)| received);
        self.farewells.get(&who).is_some_and(|&sent| received + self.links.landed(who) >= sent)
    }

    /// Whether the other end has left. What it had sent before can be received if it is here, or may be on its way.
    pub(super) fn cannot_reach(&self, m: &MessageSubmission, peer: Rank) -> bool {
        let may_come = || self.links.holds(peer, self.next_stream(m, peer)) || !self.has_all_of(peer);
        self.has_departed(peer) && (m.sends || !may_come())
    }

    /// All that a rank has sent is here, and it has left: ends the receives of what it has not sent.
    pub(super) fn end_unsent(&mut self, who: Rank) {
        for slot in 0..self.flights.len() {
            if let Some(Flight::Message { op, peer, stream, sends: false, .. }) = self.flights[slot]
                && peer == who
                && !self.links.holds(who, stream)
            {
                self.drop_flight(slot);
                self.end(op, Err(Error::Shutdown(Some(who))));
            }
        }
    }
}

/// The two ends of a message disagree about its length. The same words on both.
pub(super) fn length_mismatch(me: Rank, peer: Rank, ours: u64, theirs: u64) -> Error {
    let mut ends = [(me, ours), (peer, theirs)];
    ends.sort_unstable();
    let [(me, ours), (peer, theirs)] = ends;
    Error::Mismatch(Arc::new(Mismatch {
        tensor: "send/recv".into(),
        message: format!(
            "a message between {me} and {peer} has {ours} bytes on {me} and {theirs} bytes on {peer}; give both ends the same shape and type"
        ),
    }))
}

/// Whether a stream is that of a message.
pub(super) fn is_message(stream: Stream) -> bool {
    stream.0 & MESSAGE != 0
}

/// Tells the names of messages from those of batches.
const MESSAGE: u128 = 1 << 127;

/// The name of a message.
fn message_stream(set: SetId, tag: u32, counter: u64) -> Stream {
    Stream(MESSAGE | u128::from(set.0) << 96 | u128::from(tag) << 64 | u128::from(counter))
}
