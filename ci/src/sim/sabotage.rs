//! Bugs that are planted on purpose, so that tests can see that the simulator finds such bugs.
#![forbid(unsafe_code)]

use carole::error::Cause;
use carole::memory::{Memory, RunId};
use carole::transport::flow::Leftovers;
use carole::transport::{Events, Fabric, FabricEvent, Link, LinkEvent, LinkOrder, OrderKind, Stream};
use carole::types::{Rank, Time};
use carole::wire::Message;
use std::os::fd::RawFd;

/// A planted bug, on rank 1 or everywhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(not(test), expect(dead_code, reason = "only tests plant bugs"))]
pub enum Sabotage {
    /// Batches are started in another order than agreed: neighbours swap their places.
    BatchOrder,
    /// A completion is reported twice.
    EndsTwice,
    /// The completion of a message is lost now and then.
    DoneLost,
    /// The own contribution is left out of a reduction.
    NotReduced,
    /// The end of an epoch is not passed on.
    AbortNotFlooded,
    /// An agreement message is lost now and then.
    AgreementLost,
    /// A departure is not passed on.
    GoodbyeLost,
    /// A rank carries a process set into the next epoch without one of its members.
    SetsDiffer,
    /// A rank does without the first operation of an epoch that the others begin with (horovod#3494: the sync).
    SyncSkipped,
    /// A rank goes on under the number of the epoch before.
    StaleEpoch,
    /// Whoever tears down waits for all others to have done so first, however long it takes.
    UntimedTeardown,
    /// A rank says that it holds the results of operations that are under way.
    HeldTooSoon,
    /// The verdict of an epoch that broke is not passed on.
    VerdictLost,
    /// A rank joins without a word to those who go on with what stands.
    JoinUntold,
}

impl Sabotage {
    /// Whether links are made worse. Then there are no boards, or what is to go wrong would go over them.
    pub fn is_of_links(self) -> bool {
        self != Sabotage::JoinUntold
    }
    /// News that one rank does not pass on mostly come another way.
    pub fn is_everywhere(self) -> bool {
        matches!(
            self,
            Sabotage::AbortNotFlooded
                | Sabotage::GoodbyeLost
                | Sabotage::UntimedTeardown
                | Sabotage::VerdictLost
        )
    }
}

/// A fabric whose links have a bug.
pub struct Sabotaged<F> {
    pub fabric: F,
    pub bug: Sabotage,
}

impl<F: Fabric> Fabric for Sabotaged<F> {
    fn request(&mut self, peer: Rank) {
        self.fabric.request(peer);
    }
    fn poll(&mut self) -> Option<FabricEvent> {
        Some(match self.fabric.poll()? {
            FabricEvent::Up(link) => FabricEvent::Up(Box::new(BadLink { link, bug: self.bug, count: 0 })),
            failed => failed,
        })
    }
}

struct BadLink {
    link: Box<dyn Link>,
    bug: Sabotage,
    count: u64,
}

impl BadLink {
    /// Now and then.
    fn strikes(&mut self) -> bool {
        self.count += 1;
        self.count.is_multiple_of(5)
    }
}

impl Link for BadLink {
    fn peer(&self) -> Rank {
        self.link.peer()
    }
    fn kind(&self) -> &'static str {
        self.link.kind()
    }
    fn post(&mut self, mut order: LinkOrder) {
        match self.bug {
            // The number of the batch, as the engine lays it into a stream's name.
            Sabotage::BatchOrder => order.stream = Stream(order.stream.0 ^ 1 << 48),
            Sabotage::NotReduced => {
                if let OrderKind::RecvReduce { dst, .. } = order.kind {
                    order.kind = OrderKind::Recv { dst };
                }
            }
            _ => {}
        }
        self.link.post(order);
    }
    fn withdraw(&mut self, run: RunId, memory: &Memory) {
        self.link.withdraw(run, memory);
    }
    fn tell(&mut self, message: &[u8]) {
        let lost = match (Message::decode(message), self.bug) {
            (Ok(Message::Abort(_)), Sabotage::AbortNotFlooded) => true,
            (Ok(Message::Goodbye { .. } | Message::Closed { .. }), Sabotage::GoodbyeLost) => true,
            (Ok(Message::Coordination { .. }), Sabotage::AgreementLost) => self.strikes(),
            (Ok(Message::Ballot { .. }), Sabotage::VerdictLost) => true,
            (Ok(Message::Mark { set, mark }), Sabotage::HeldTooSoon) => {
                let mut more = Vec::new();
                Message::Mark { set, mark: mark + 1 }.encode(&mut more);
                return self.link.tell(&more);
            }
            _ => false,
        };
        if !lost {
            self.link.tell(message);
        }
    }
    fn progress(&mut self, memory: &Memory, now: Time, events: &mut Events) -> Result<bool, Cause> {
        let outcome = self.link.progress(memory, now, events);
        if self.bug == Sabotage::DoneLost {
            let mut list = std::mem::take(&mut events.list);
            list.retain(|event| !matches!(event, LinkEvent::Done(_)) || !self.strikes());
            events.list = list;
        }
        outcome
    }
    fn heard(&self) -> Time {
        self.link.heard()
    }
    fn arm(&mut self) -> Result<bool, Cause> {
        self.link.arm()
    }
    fn disarm(&mut self) {
        self.link.disarm();
    }
    fn descriptors(&self, visit: &mut dyn FnMut(RawFd, bool)) {
        self.link.descriptors(visit);
    }
    fn drained(&self) -> bool {
        self.link.drained()
    }
    fn landed(&self, of: fn(Stream) -> bool) -> u64 {
        self.link.landed(of)
    }
    fn holds(&self, stream: Stream) -> bool {
        self.link.holds(stream)
    }
    fn announces(&self, stream: Stream) -> bool {
        self.link.announces(stream)
    }
    fn leave(self: Box<Self>, of: fn(Stream) -> bool) -> Option<Leftovers> {
        self.link.leave(of)
    }
}
