//! The links of this rank: asked for when traffic first needs them, and what waits until they are up.
#![forbid(unsafe_code)]

use crate::error::Cause;
use crate::fork;
use crate::memory::{Memory, RunId};
use crate::transport::board::BoardMemory;
use crate::transport::flow::Leftovers;
use crate::transport::{Events, Fabric, FabricEvent, Link, LinkOrder, Stream};
use crate::types::{Rank, Time};
use std::os::fd::RawFd;
use std::sync::Arc;

/// What is queued for a peer whose link is not up yet. Control messages lie one after another.
#[derive(Default)]
struct Waiting {
    orders: Vec<LinkOrder>,
    messages: Vec<Vec<u8>>,
}

#[derive(Default)]
enum Slot {
    /// Never asked for.
    #[default]
    None,
    /// Asked for.
    Requested(Waiting),
    /// Up.
    Up(Box<dyn Link>),
    /// The peer is gone, and some messages of it can still be received.
    Left(Box<Leftovers>),
    /// It was up, or could not come up; the peer is gone.
    Dead,
}

/// All links of this rank, by peer.
pub struct Links {
    fabric: Box<dyn Fabric>,
    slots: Vec<Slot>,
    /// Peers whose links are up.
    up: Vec<Rank>,
    /// Peers that are gone and have left messages.
    left: Vec<Rank>,
    /// The streams of those messages.
    lasting: fn(Stream) -> bool,
}

/// What happened to a link.
#[derive(Debug)]
pub enum LinkChange {
    /// It is up.
    Up(Rank),
    /// It was up and is dead.
    Down(Rank, Cause),
    /// It could not be made.
    Unreachable {
        /// The peer.
        peer: Rank,
        /// Who is at fault.
        culprit: Rank,
        /// What happened to the culprit.
        cause: Cause,
    },
}

impl Links {
    /// No links yet. What has landed of `lasting` streams outlives its link.
    #[must_use]
    pub fn new(fabric: Box<dyn Fabric>, size: u32, lasting: fn(Stream) -> bool) -> Links {
        let slots = (0..size).map(|_| Slot::None).collect();
        Links { fabric, slots, up: Vec::new(), left: Vec::new(), lasting }
    }

    /// Peers whose links are up.
    #[must_use]
    pub fn up(&self) -> &[Rank] {
        &self.up
    }

    /// The transport of the link to a peer, if it is up.
    #[must_use]
    pub fn kind(&self, peer: Rank) -> Option<&'static str> {
        match &self.slots[peer.0 as usize] {
            Slot::Up(link) => Some(link.kind()),
            _ => None,
        }
    }

    /// The board of a peer, if the link to it is up and it has one.
    #[must_use]
    pub fn board(&self, peer: Rank) -> Option<Arc<BoardMemory>> {
        match &self.slots[peer.0 as usize] {
            Slot::Up(link) => link.board(),
            _ => None,
        }
    }

    /// Something was published to a peer on a board: wakes it if it sleeps.
    pub fn nudge(&mut self, peer: Rank) {
        if let Slot::Up(link) = &mut self.slots[peer.0 as usize] {
            link.nudge();
        }
    }

    /// Whether the link to a peer was asked for and its fate is not known yet.
    #[must_use]
    pub fn is_awaited(&self, peer: Rank) -> bool {
        matches!(self.slots[peer.0 as usize], Slot::Requested(_))
    }

    /// Whether there is no link to a peer any more, or never will be.
    #[must_use]
    pub fn is_dead(&self, peer: Rank) -> bool {
        matches!(self.slots[peer.0 as usize], Slot::Left(_) | Slot::Dead)
    }

    /// Whether the link to a peer is up.
    #[must_use]
    pub fn is_up(&self, peer: Rank) -> bool {
        matches!(self.slots[peer.0 as usize], Slot::Up(_))
    }

    /// Lasting messages of a peer that have arrived whole and were not received yet.
    #[must_use]
    pub fn landed(&self, peer: Rank) -> u64 {
        match &self.slots[peer.0 as usize] {
            Slot::Up(link) => link.landed(self.lasting),
            _ => 0,
        }
    }

    /// Whether the message of a stream has arrived whole, and was not received yet.
    #[must_use]
    pub fn holds(&self, peer: Rank, stream: Stream) -> bool {
        match &self.slots[peer.0 as usize] {
            Slot::Up(link) => link.holds(stream),
            Slot::Left(leftovers) => leftovers.holds(stream),
            _ => false,
        }
    }

    /// Whether a message of a stream, which was not asked for yet, is known to have been sent: it is here, on its way,
    /// or announced.
    #[must_use]
    pub fn announces(&self, peer: Rank, stream: Stream) -> bool {
        match &self.slots[peer.0 as usize] {
            Slot::Up(link) => link.announces(stream),
            Slot::Left(leftovers) => leftovers.holds(stream),
            _ => false,
        }
    }

    /// Asks for a link without giving it anything to do.
    pub fn request(&mut self, peer: Rank) {
        let slot = &mut self.slots[peer.0 as usize];
        if matches!(slot, Slot::None) {
            *slot = Slot::Requested(Waiting::default());
            self.fabric.request(peer);
        }
    }

    /// Gives a link an order, now or when it is up. Orders for a dead link are dropped: its death has broken
    /// (or is about to break) whatever they belong to.
    pub fn post(&mut self, peer: Rank, order: LinkOrder) {
        self.request(peer);
        match &mut self.slots[peer.0 as usize] {
            Slot::Up(link) => link.post(order),
            Slot::Requested(waiting) => waiting.orders.push(order),
            Slot::Left(leftovers) => leftovers.post(order),
            Slot::None | Slot::Dead => {}
        }
    }

    /// Sends a control message, now or when the link is up.
    pub fn tell(&mut self, peer: Rank, message: &[u8]) {
        self.request(peer);
        self.tell_if_known(peer, message);
    }

    /// Sends a control message if the link is up or asked for.
    pub fn tell_if_known(&mut self, peer: Rank, message: &[u8]) {
        match &mut self.slots[peer.0 as usize] {
            Slot::Up(link) => link.tell(message),
            Slot::Requested(waiting) => waiting.messages.push(message.to_vec()),
            Slot::None | Slot::Left(_) | Slot::Dead => {}
        }
    }

    /// Takes in new links and failures to connect.
    pub fn poll_fabric(&mut self, changes: &mut Vec<LinkChange>) -> bool {
        let mut moved = false;
        while let Some(event) = self.fabric.poll() {
            moved = true;
            match event {
                FabricEvent::Up(link) => self.rise(link, changes),
                FabricEvent::Failed { peer, culprit, cause } => self.fall(peer, culprit, cause, changes),
            }
        }
        moved
    }

    fn rise(&mut self, mut link: Box<dyn Link>, changes: &mut Vec<LinkChange>) {
        let peer = link.peer();
        let slot = &mut self.slots[peer.0 as usize];
        match slot {
            Slot::Up(_) | Slot::Left(_) | Slot::Dead => return,
            Slot::Requested(waiting) => {
                for message in waiting.messages.drain(..) {
                    link.tell(&message);
                }
                for order in waiting.orders.drain(..) {
                    link.post(order);
                }
            }
            Slot::None => {}
        }
        link.descriptors(&mut |fd, _| fork::own(fd));
        *slot = Slot::Up(link);
        self.up.push(peer);
        changes.push(LinkChange::Up(peer));
    }

    fn fall(&mut self, peer: Rank, culprit: Rank, cause: Cause, changes: &mut Vec<LinkChange>) {
        match &self.slots[peer.0 as usize] {
            Slot::Dead | Slot::Left(_) => return,
            Slot::Up(_) => changes.push(LinkChange::Down(peer, cause)),
            Slot::None | Slot::Requested(_) => {
                changes.push(LinkChange::Unreachable { peer, culprit, cause });
            }
        }
        self.close(peer);
    }

    /// Moves bytes on one link (by its place in [`Links::up`]); what happened is appended to `events`.
    pub fn progress(
        &mut self,
        place: usize,
        memory: &Memory,
        now: Time,
        events: &mut Events,
        changes: &mut Vec<LinkChange>,
    ) -> bool {
        let peer = self.up[place];
        let Slot::Up(link) = &mut self.slots[peer.0 as usize] else {
            unreachable!("up lists links that are up")
        };
        match link.progress(memory, now, events) {
            Ok(moved) => moved,
            Err(cause) => {
                self.fall(peer, peer, cause, changes);
                true
            }
        }
    }

    /// Hands out messages of a peer that is gone (by its place in [`Links::left`]).
    pub fn settle_left(&mut self, place: usize, memory: &Memory, events: &mut Events) -> bool {
        let slot = &mut self.slots[self.left[place].0 as usize];
        let Slot::Left(leftovers) = slot else { unreachable!("left lists peers that have left messages") };
        let moved = leftovers.settle(memory, events);
        if leftovers.is_empty() {
            *slot = Slot::Dead;
            self.left.swap_remove(place);
        }
        moved
    }

    /// Peers that are gone and have left messages.
    #[must_use]
    pub fn left(&self) -> &[Rank] {
        &self.left
    }

    /// When a peer was last heard of.
    #[must_use]
    pub fn heard(&self, peer: Rank) -> Option<Time> {
        match &self.slots[peer.0 as usize] {
            Slot::Up(link) => Some(link.heard()),
            _ => None,
        }
    }

    /// Withdraws a run from every link.
    pub fn withdraw(&mut self, run: RunId, memory: &Memory) {
        for slot in &mut self.slots {
            match slot {
                Slot::Up(link) => link.withdraw(run, memory),
                Slot::Requested(waiting) => waiting.orders.retain(|order| order.token.run != run),
                Slot::Left(leftovers) => leftovers.withdraw(run),
                Slot::None | Slot::Dead => {}
            }
        }
    }

    /// Prepares to sleep; true if something is there already.
    pub fn arm(&mut self, changes: &mut Vec<LinkChange>) -> bool {
        let mut busy = false;
        let mut place = 0;
        while place < self.up.len() {
            let peer = self.up[place];
            let Slot::Up(link) = &mut self.slots[peer.0 as usize] else {
                unreachable!("up lists links that are up")
            };
            match link.arm() {
                Ok(there) => busy |= there,
                Err(cause) => {
                    self.fall(peer, peer, cause, changes);
                    busy = true;
                    continue;
                }
            }
            place += 1;
        }
        busy
    }

    /// Awake again.
    pub fn disarm(&mut self) {
        for slot in &mut self.slots {
            if let Slot::Up(link) = slot {
                link.disarm();
            }
        }
    }

    /// Descriptors to watch while asleep.
    pub fn descriptors(&self, visit: &mut dyn FnMut(RawFd, bool)) {
        for &peer in &self.up {
            if let Slot::Up(link) = &self.slots[peer.0 as usize] {
                link.descriptors(visit);
            }
        }
    }

    /// Whether some link does not end the sleep when something comes.
    #[must_use]
    pub fn is_polled(&self) -> bool {
        self.up.iter().any(|&peer| match &self.slots[peer.0 as usize] {
            Slot::Up(link) => link.is_polled(),
            _ => false,
        })
    }

    /// Whether every control message has left.
    #[must_use]
    pub fn drained(&self) -> bool {
        self.up.iter().all(|&peer| match &self.slots[peer.0 as usize] {
            Slot::Up(link) => link.drained(),
            _ => true,
        })
    }

    /// Forgets a peer that has said goodbye: the end of its connection is no failure. Lasting messages that are here
    /// stay.
    pub fn close(&mut self, peer: Rank) {
        let slot = &mut self.slots[peer.0 as usize];
        disown(slot);
        *slot = match std::mem::replace(slot, Slot::Dead) {
            Slot::Up(link) => link.leave(self.lasting).map_or(Slot::Dead, |left| Slot::Left(Box::new(left))),
            Slot::Left(leftovers) => Slot::Left(leftovers),
            Slot::None | Slot::Requested(_) | Slot::Dead => Slot::Dead,
        };
        self.up.retain(|&p| p != peer);
        if matches!(slot, Slot::Left(_)) && !self.left.contains(&peer) {
            self.left.push(peer);
        }
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.slots.iter().for_each(disown);
    }
}

/// Before the descriptors of a link are closed, forked children must forget their numbers.
fn disown(slot: &Slot) {
    if let Slot::Up(link) = slot {
        link.descriptors(&mut |fd, _| fork::disown(fd));
    }
}
