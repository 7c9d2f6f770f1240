//! One pipe's requests: what is sent and received, and how much may be under way. All calls of MPI for a pipe are
//! made here, by whoever may make them.
#![forbid(unsafe_code)]

use super::slot::{self, Slot};
use super::world::World;
use crate::error::Cause;
use crate::transport::wake::Waker;
use std::collections::VecDeque;

/// Bytes of the message that says how many slots were taken.
const ACK_BYTES: usize = 8;

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
    slots: u64,
    /// Slots that are full and wait to be sent, with their lengths.
    outgoing: VecDeque<(Slot, usize)>,
    /// Sends under way, the oldest first.
    flying: VecDeque<Slot>,
    free: Vec<Slot>,
    /// Slots that were sent, and those of them that the peer has taken.
    sent: u64,
    taken: u64,
    ack_in: Slot,
    /// Receives, in the order in which they were posted.
    posted: VecDeque<Slot>,
    arrived: VecDeque<(Slot, usize)>,
    /// Slots that can be received into again.
    idle: Vec<Slot>,
    /// Slots that were taken here, and how many of them the peer was told.
    returned: u64,
    told: u64,
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
    /// A port with so many slots of so many bytes in each direction. Makes no call yet.
    pub fn new(world: &'static World, route: Route, slots: usize, slot_bytes: usize) -> Port {
        let make = || (0..slots).map(|_| Slot::new(slot_bytes)).collect::<Vec<_>>();
        Port {
            world,
            route,
            slots: slots as u64,
            outgoing: VecDeque::new(),
            flying: VecDeque::new(),
            free: make(),
            sent: 0,
            taken: 0,
            ack_in: Slot::new(ACK_BYTES),
            posted: VecDeque::new(),
            arrived: VecDeque::new(),
            idle: make(),
            returned: 0,
            told: 0,
            ack_out: Slot::new(ACK_BYTES),
            ended: false,
            failed: None,
            sleeper: None,
            closed: None,
        }
    }

    /// Posts the first receives.
    pub fn open(&mut self) -> Result<(), Cause> {
        self.ack_in.receive(self.world.comm(), self.route.peer, self.route.sends + 1)?;
        self.post()
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

    /// A slot whose bytes were used.
    pub fn give_back(&mut self, slot: Slot) {
        self.returned += 1;
        self.idle.push(slot);
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
            self.free.push(slot);
            moved = true;
        }
        while let Some((_, n)) = self.outgoing.front() {
            let n = *n;
            if self.sent - self.taken == self.slots {
                if !self.hear_ack()? {
                    break;
                }
                continue;
            }
            let (mut slot, _) = self.outgoing.pop_front().expect("it is the front");
            slot.send(self.world.comm(), n, self.route.peer, self.route.sends)?;
            self.sent += 1;
            self.flying.push_back(slot);
            moved = true;
        }
        Ok(moved)
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
            self.arrived.push_back((slot, n));
        }
        self.post()?;
        Ok(moved)
    }

    /// Posts receives, and then says that there is room: whatever comes for it is expected.
    fn post(&mut self) -> Result<(), Cause> {
        while let Some(mut slot) = self.idle.pop() {
            slot.receive(self.world.comm(), self.route.peer, self.route.receives)?;
            self.posted.push_back(slot);
        }
        // Now and then is enough, and a word that is still on its way is followed by one that says more.
        if self.returned - self.told >= self.slots / 2 && self.ack_out.test()?.is_some() {
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
            let mut slot = Slot::new(0);
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
