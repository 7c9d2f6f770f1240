//! What a peer had sent before it left: it can still be received when the connection is no more.
#![forbid(unsafe_code)]

use super::control::Outbox;
use super::pieces::Target;
use super::recv::Recvs;
use crate::memory::{Memory, RunId};
use crate::transport::{Events, LinkOrder, OrderKind, Stream};

/// Messages that had landed when a connection ended.
pub struct Leftovers {
    recvs: Recvs,
    of: fn(Stream) -> bool,
    /// What would be answered, if somebody were there.
    outbox: Outbox,
}

impl Leftovers {
    /// The messages of those streams, if there are any.
    pub(super) fn new(recvs: Recvs, of: fn(Stream) -> bool) -> Option<Leftovers> {
        let any = recvs.landed().any(of);
        any.then(|| Leftovers { recvs, of, outbox: Outbox::new(false) })
    }

    /// Whether the message of a stream is here.
    #[must_use]
    pub fn holds(&self, stream: Stream) -> bool {
        self.recvs.landed().any(|landed| landed == stream)
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.recvs.landed().any(self.of)
    }

    /// Receives a message that is here. Other orders are dropped: nothing else comes.
    pub fn post(&mut self, order: LinkOrder) {
        if let OrderKind::Recv { dst } = order.kind
            && self.holds(order.stream)
        {
            let target = Target { dst, combine: None };
            self.recvs.post(order.token, order.stream, target, &mut self.outbox);
        }
    }

    /// Copies out what was asked for. Returns whether anything was.
    pub fn settle(&mut self, memory: &Memory, events: &mut Events) -> bool {
        self.outbox.clear();
        self.recvs.settle(memory, &mut self.outbox, events)
    }

    /// Withdraws the orders of a run, and what they were for.
    pub fn withdraw(&mut self, run: RunId) {
        self.recvs.withdraw(run, std::iter::empty());
    }
}
