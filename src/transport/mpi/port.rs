//! One pipe's requests: what is sent and received, and how much may be under way. All calls of MPI for a pipe are
//! made here, by whoever may make them.
//!
//! Where the bytes of a direction lie in a window, its messages are empty but for a number: how many bytes of the next
//! slot are full. Slots are filled and read in turn, and may be filled again when the peer has said that it has taken
//! them, which is its word about messages, too.
#![forbid(unsafe_code)]

use super::slot::{self, Slot};
use super::window::{Area, Place};
use super::world::World;
use crate::error::Cause;
use crate::transport::wake::Waker;
use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

/// Bytes of the message that says how many slots were taken.
const ACK_BYTES: usize = 8;
/// Bytes of the message that says that a slot of a window is full.
const NOTICE_BYTES: usize = 8;

/// Where the messages of a pipe go.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// The peer, as MPI counts.
    pub peer: i32,
    /// The tag of what is sent; what the peer says of it comes with the next one.
    pub sends: i32,
    /// The tag of what is received; the word about it goes with the next one.
    pub receives: i32,
}

pub struct Port {
    world: &'static World,
    route: Route,
    /// Messages that may be under way where they carry the bytes, and how long each may be.
    messages: (usize, usize),
    /// Slots that the peer may have to take.
    slots: u64,
    /// Where the slots lie in memory that the peer reads, if they do.
    area: Option<Area>,
    /// Such slots that the peer has not taken, and messages for more of them.
    lent: VecDeque<Slot>,
    notices: Vec<Slot>,
    /// Slots that are full and wait to be sent, with their lengths.
    outgoing: VecDeque<(Slot, usize)>,
    /// Sends under way, the oldest first.
    flying: VecDeque<Slot>,
    free: Vec<Slot>,
    /// Slots that were sent, and those of them that the peer has taken.
    sent: u64,
    taken: u64,
    ack_in: Slot,
    /// The peer has said where its slots lie.
    introduced: bool,
    /// The peer's slots in a window, if they lie there and were not shown: the next one to be filled first.
    views: VecDeque<Slot>,
    /// Whether its slots lie there.
    views_window: bool,
    /// Receives, in the order in which they were posted.
    posted: VecDeque<Slot>,
    arrived: VecDeque<(Slot, usize)>,
    /// Slots that can be received into again.
    idle: Vec<Slot>,
    /// Slots that were taken here, and how many of them the peer was told; it is told of so many at once.
    returned: u64,
    told: u64,
    told_together: u64,
    ack_out: Slot,
    /// The peer has said that nothing more comes.
    ended: bool,
    failed: Option<Cause>,
    /// Who sleeps until something arrives, where another thread makes the calls.
    pub sleeper: Option<Waker>,
    /// The pipe is gone, and the peer's word that it is, too, is awaited if this says so.
    pub closed: Option<bool>,
}

impl Port {
    /// A port with so many messages of so many bytes in each direction; or, if `shares` and both ranks are of one host,
    /// with slots that the peer reads where they lie. Makes no call yet.
    pub fn new(world: &'static World, route: Route, messages: (usize, usize), shares: bool) -> Port {
        let window = world.window().filter(|_| shares);
        let (area, free) = match window.and_then(|window| window.take(world.rank(), route.peer)) {
            Some((area, slots)) => (Some(area), slots),
            None => (None, slots_of(messages)),
        };
        let notices = if area.is_some() { slots_of((free.len(), NOTICE_BYTES)) } else { Vec::new() };
        Port {
            world,
            route,
            messages,
            slots: free.len() as u64,
            area,
            lent: VecDeque::with_capacity(free.len()),
            notices,
            outgoing: VecDeque::new(),
            flying: VecDeque::new(),
            // They are taken from the end.
            free: free.into_iter().rev().collect(),
            sent: 0,
            taken: 0,
            ack_in: Slot::new(ACK_BYTES),
            introduced: false,
            views: VecDeque::new(),
            views_window: false,
            posted: VecDeque::new(),
            arrived: VecDeque::new(),
            // As large as any message: a port that is closed before the peer's first word goes on receiving with it.
            // With one that was too small for what came then the heap was found corrupted, under Open MPI 4.1.4.
            idle: slots_of((1, messages.1)),
            returned: 0,
            told: 0,
            told_together: 1,
            ack_out: Slot::new(ACK_BYTES),
            ended: false,
            failed: None,
            sleeper: None,
            closed: None,
        }
    }

    /// Says where the slots lie, and posts the receive of the peer's word about its own.
    pub fn open(&mut self) -> Result<(), Cause> {
        self.ack_in.receive(self.world.comm(), self.route.peer, self.route.sends + 1)?;
        self.post()?;
        let place = self.area.as_ref().map_or(Place::default(), Area::place);
        let mut word = Slot::new(Place::BYTES);
        word.bytes_mut().copy_from_slice(&place.encode());
        word.send(self.world.comm(), Place::BYTES, self.route.peer, self.route.sends)?;
        // Whoever sweeps frees it when it has left.
        drop(word);
        Ok(())
    }

    /// An empty slot to write to.
    pub fn take_free(&mut self) -> Option<Slot> {
        self.free.pop()
    }

    pub fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// The first `n` bytes of a slot are to be sent.
    pub fn push(&mut self, slot: Slot, n: usize) {
        self.outgoing.push_back((slot, n));
    }

    /// What has arrived next.
    pub fn take_arrived(&mut self) -> Option<(Slot, usize)> {
        self.arrived.pop_front()
    }

    pub fn has_arrived(&self) -> bool {
        !self.arrived.is_empty()
    }

    /// A slot whose bytes were used. Whether the peer is to be told soon.
    pub fn give_back(&mut self, slot: Slot) -> bool {
        self.returned += 1;
        if self.views_window {
            self.views.push_back(slot);
        } else {
            self.idle.push(slot);
        }
        self.owes_word()
    }

    fn owes_word(&self) -> bool {
        self.returned - self.told >= self.told_together
    }

    /// Whether what arrives lies in a window.
    pub fn reads_window(&self) -> bool {
        self.views_window
    }

    /// Whether all that was written has left.
    pub fn is_settled(&self) -> bool {
        self.outgoing.is_empty() && self.flying.is_empty()
    }

    /// Whether nothing more comes.
    pub fn is_ended(&self) -> bool {
        self.ended && self.arrived.is_empty()
    }

    pub fn failure(&self) -> Option<&Cause> {
        self.failed.as_ref()
    }

    /// Moves everything. Says whether anything moved.
    pub fn pump(&mut self) -> bool {
        let moved = self.pump_sends() | self.pump_receives();
        if moved && let Some(waker) = self.sleeper.take() {
            waker.wake();
        }
        slot::sweep();
        moved
    }

    /// Takes in what has arrived, and sends what waits for the peer's word.
    pub fn pump_due(&mut self) -> bool {
        let sends = !self.outgoing.is_empty() && self.pump_sends();
        self.pump_receives() | sends
    }

    /// Takes back what was sent, and sends what may be sent.
    pub fn pump_sends(&mut self) -> bool {
        self.attempt(Port::move_sends)
    }

    /// Takes in what has arrived, and posts what can be received into.
    pub fn pump_receives(&mut self) -> bool {
        self.attempt(Port::move_receives)
    }

    fn attempt(&mut self, act: fn(&mut Port) -> Result<bool, Cause>) -> bool {
        if self.failed.is_some() {
            return false;
        }
        act(self).unwrap_or_else(|cause| {
            self.failed = Some(cause);
            true
        })
    }

    fn move_sends(&mut self) -> Result<bool, Cause> {
        let mut moved = false;
        while let Some(slot) = self.flying.front_mut() {
            if slot.test()?.is_none() {
                break;
            }
            let slot = self.flying.pop_front().expect("it was just tested");
            if self.area.is_some() {
                self.notices.push(slot)
            } else {
                self.free.push(slot)
            }
            moved = true;
        }
        if self.area.is_some() && self.free.is_empty() {
            moved |= self.hear_ack()?;
        }
        while let Some((_, n)) = self.outgoing.front() {
            let n = *n;
            if self.sent - self.taken == self.slots {
                if !self.hear_ack()? {
                    break;
                }
                continue;
            }
            let (slot, _) = self.outgoing.pop_front().expect("it is the front");
            let (mut message, n) = if self.area.is_some() { self.lend(slot, n) } else { (slot, n) };
            message.send(self.world.comm(), n, self.route.peer, self.route.sends)?;
            self.sent += 1;
            self.flying.push_back(message);
            moved = true;
        }
        Ok(moved)
    }

    /// Lets the peer have a slot of the window: the message that says so, and its length.
    fn lend(&mut self, slot: Slot, n: usize) -> (Slot, usize) {
        self.lent.push_back(slot);
        // There is one for each slot, but a message may be known to have arrived later than the peer's answer to it.
        let mut notice = self.notices.pop().unwrap_or_else(|| Slot::new(NOTICE_BYTES));
        notice.bytes_mut().copy_from_slice(&(n as u64).to_le_bytes());
        // What MPI does to send it is unknown here; the bytes must be there before.
        fence(Ordering::SeqCst);
        (notice, NOTICE_BYTES)
    }

    /// The peer may have said how many slots it has taken.
    fn hear_ack(&mut self) -> Result<bool, Cause> {
        let mut heard = false;
        while let Some(n) = self.ack_in.test()? {
            let word: [u8; ACK_BYTES] = self.ack_in.bytes().try_into().expect("that many");
            let taken = u64::from_le_bytes(word);
            if n != ACK_BYTES || taken < self.taken || taken > self.sent {
                return Err(Cause::Misbehaved(format!("it took {taken} of {} messages", self.sent)));
            }
            // The peer's reads are over before what is written next.
            fence(Ordering::SeqCst);
            let back = (taken - self.taken).min(self.lent.len() as u64) as usize;
            // They are taken from the end, in the order in which they were lent.
            self.free.splice(0..0, self.lent.drain(..back).rev());
            self.taken = taken;
            heard = true;
            self.ack_in.receive(self.world.comm(), self.route.peer, self.route.sends + 1)?;
        }
        Ok(heard)
    }

    fn move_receives(&mut self) -> Result<bool, Cause> {
        let mut moved = false;
        while let Some(slot) = self.posted.front_mut() {
            let Some(n) = slot.test()? else { break };
            let slot = self.posted.pop_front().expect("it was just tested");
            moved = true;
            if n == 0 {
                self.ended = true;
                break;
            }
            if self.ended {
                return Err(Cause::Misbehaved("bytes behind the end of its stream".into()));
            }
            if !self.introduced {
                self.hear_place(&slot, n)?;
                self.post()?;
            } else if self.views_window {
                self.hear_notice(slot, n)?;
            } else {
                self.arrived.push_back((slot, n));
            }
        }
        self.post()?;
        Ok(moved)
    }

    /// The first word of a peer: where its slots lie.
    fn hear_place(&mut self, slot: &Slot, n: usize) -> Result<(), Cause> {
        let word = slot.bytes().first_chunk().filter(|_| n == Place::BYTES);
        let place =
            Place::decode(word.ok_or_else(|| Cause::Misbehaved("a stream without a beginning".into()))?);
        self.introduced = true;
        if place == Place::default() {
            self.idle = slots_of(self.messages);
            self.told_together = self.idle.len() as u64 / 2;
            return Ok(());
        }
        let Some(window) = self.world.window() else {
            return Err(Cause::Misbehaved("it writes to memory that is not shared with it".into()));
        };
        self.views = window.slots(self.route.peer, place)?;
        self.views_window = true;
        self.idle = slots_of((self.views.len(), NOTICE_BYTES));
        self.told_together = self.views.len() as u64 / 4;
        Ok(())
    }

    /// A slot of the peer's is full.
    fn hear_notice(&mut self, notice: Slot, n: usize) -> Result<(), Cause> {
        fence(Ordering::SeqCst);
        let word = notice.bytes().first_chunk().filter(|_| n == NOTICE_BYTES);
        let full = word.map_or(0, |word| u64::from_le_bytes(*word));
        self.idle.push(notice);
        match self.views.pop_front() {
            Some(view) if (1..=view.bytes().len() as u64).contains(&full) => {
                self.arrived.push_back((view, full as usize));
                Ok(())
            }
            _ => Err(Cause::Misbehaved(format!("{full} bytes in a slot that it does not have"))),
        }
    }

    /// Posts receives, and then says that there is room: whatever comes for it is expected.
    fn post(&mut self) -> Result<(), Cause> {
        while let Some(mut slot) = self.idle.pop() {
            slot.receive(self.world.comm(), self.route.peer, self.route.receives)?;
            self.posted.push_back(slot);
        }
        // Now and then is enough, and a word that is still on its way is followed by one that says more.
        if self.owes_word() && self.ack_out.test()?.is_some() {
            fence(Ordering::SeqCst);
            self.ack_out.bytes_mut().copy_from_slice(&self.returned.to_le_bytes());
            self.ack_out.send(self.world.comm(), ACK_BYTES, self.route.peer, self.route.receives + 1)?;
            self.told = self.returned;
        }
        Ok(())
    }

    /// Says that nothing more comes, if all that was written has been handed to MPI, and lets go of what is not in use.
    pub fn close(&mut self) {
        if self.failed.is_none() && self.outgoing.is_empty() {
            let mut slot = Slot::new(0);
            // The peer learns of it by the end of the connection, too.
            let _ = slot.send(self.world.comm(), 0, self.route.peer, self.route.sends);
        }
        self.outgoing.clear();
        self.arrived.clear();
        self.idle.clear();
        self.free.clear();
        self.sleeper = None;
    }

    /// Takes in what the peer still says, of which nobody wants to know, so that nothing is left over in MPI. Whether
    /// it has said all.
    pub fn pump_closed(&mut self) -> bool {
        let over = self.discard().unwrap_or(true);
        slot::sweep();
        over
    }

    fn discard(&mut self) -> Result<bool, Cause> {
        while let Some(slot) = self.flying.front_mut() {
            if slot.test()?.is_none() {
                break;
            }
            self.flying.pop_front();
        }
        if self.posted.is_empty() && !self.ended {
            let mut slot = Slot::new(self.messages.1);
            slot.receive(self.world.comm(), self.route.peer, self.route.receives)?;
            self.posted.push_back(slot);
        }
        while let Some(slot) = self.posted.front_mut().filter(|_| !self.ended) {
            match slot.test()? {
                None => break,
                Some(0) => self.ended = true,
                Some(_) => {
                    let mut slot = self.posted.pop_front().expect("it was just tested");
                    slot.receive(self.world.comm(), self.route.peer, self.route.receives)?;
                    self.posted.push_back(slot);
                }
            }
        }
        self.hear_ack()?;
        Ok(self.ended && self.flying.is_empty())
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        // Else the peer may still read it.
        if let Some(area) = self.area.take().filter(|_| self.ended) {
            area.give_back();
        }
    }
}

fn slots_of((count, bytes): (usize, usize)) -> Vec<Slot> {
    (0..count).map(|_| Slot::new(bytes)).collect()
}
