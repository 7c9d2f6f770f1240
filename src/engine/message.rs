//! Tagged point-to-point messages: the n-th send with a tag meets the n-th receive with it.
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
    /// The other end.
    pub peer: Rank,
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
        match self.admit(m.set, m.op) {
            _ if self.broken.is_none() && self.has_departed(m.peer) => {
                return Err(Error::Shutdown(Some(m.peer)));
            }
            // A message needs its two ends and nobody else.
            Err(Error::Shutdown(Some(_))) if self.broken.is_none() => {}
            admitted => admitted?,
        }
        if m.peer == self.me || self.sets[&m.set].member_of(m.peer).is_none() {
            let what = if m.sends { "send to" } else { "receive from" };
            return Err(Error::usage(format!(
                "cannot {what} {}: choose another member of process set {} ({})",
                m.peer,
                m.set.0,
                super::sets::list(&self.sets[&m.set].ranks)
            )));
        }
        self.hang_together();
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
        let counter = self.messages.entry((m.set, m.peer, m.tag, m.sends)).or_insert(0);
        let stream = message_stream(m.set, m.tag, *counter);
        *counter += 1;
        let run = self.memory.register([m.memory]);
        // An empty message has no piece; the ends still meet, so that one of another length is found out.
        let list: Arc<[Piece]> = Arc::new([Piece { region: 0, offset: 0, len: m.memory.len() }]);
        let bytes = PieceRange { list, start: 0, end: u32::from(!m.memory.is_empty()) };
        let kind = if m.sends { OrderKind::Send { src: bytes } } else { OrderKind::Recv { dst: bytes } };
        self.place_flight(run, Flight::Message { op: m.op, run, peer: m.peer, set: m.set });
        self.links.post(m.peer, LinkOrder { token: Token { run, window: 0, step: 0 }, stream, kind });
        Ok(())
    }

    /// A message has arrived or left, or cannot.
    pub(super) fn finish_message(&mut self, run: RunId, error: Option<Error>) {
        let slot = &mut self.flights[run.slot as usize];
        if !matches!(slot, Some(Flight::Message { run: of, .. }) if *of == run) {
            return;
        }
        let Some(Flight::Message { op, .. }) = slot.take() else { return };
        self.flying -= 1;
        self.memory.forget(run);
        self.end(op, error.map_or(Ok(()), Err));
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

/// The name of a message. The top bit tells it from those of batches.
fn message_stream(set: SetId, tag: u32, counter: u64) -> Stream {
    Stream(1 << 127 | u128::from(set.0) << 96 | u128::from(tag) << 64 | u128::from(counter))
}
