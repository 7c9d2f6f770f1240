//! Process sets whose devices exchange tensors among themselves (`transport::board::device`).
//!
//! Whether a set does is agreed as seats on boards are (`engine/boards.rs`), behind which it comes: with the first large
//! batch of device tensors each member offers memory of its device on its board, opens what the others offer, and then
//! submits a barrier of a name of the engine's own. A member that cannot open the others' memory never calls, and all
//! tensors of the set go through the host for ever.
//!
//! Behind the call in the agreed log every batch of at least [`Direct::bytes`] goes from device to device. So a tensor
//! of that size need not come to the host, once its rank has seen the call: it stands in such a batch on every rank.

use super::Engine;
use super::batch::{BatchFlight, Flight};
use super::boards::Seating;
use super::calls::Call;
use super::operation::Sizes;
use super::passage::Gate;
use super::rounds::serves;
use crate::coordinator::{Agreed, OpId};
use crate::device::accelerator::Mark;
use crate::error::Cause;
use crate::fusion::Part;
use crate::limits::DEVICE_SLOTS;
use crate::log;
use crate::memory::{Region, RunId};
use crate::transport::board::device::{DeviceSeat, Rounds};
use crate::types::{Place, SetId, Signature, Time};
use std::sync::Arc;

/// Which tensors stay on their devices; agreed when the epoch starts.
#[derive(Clone, Copy, Debug)]
pub struct Direct {
    /// Batches of at least so many bytes.
    pub bytes: u64,
    /// Bytes of a window, over all members.
    pub slot_bytes: u64,
}

/// A set's seat at its devices, and this rank's device.
#[derive(Debug)]
pub(super) struct Meeting {
    seat: DeviceSeat,
    gate: Arc<dyn Gate>,
}

/// How far a set is on its way.
#[derive(Debug)]
pub(super) enum AtDevices {
    /// No large batch of device tensors was seen.
    Unsought,
    /// Its tensors go through the host.
    Never,
    /// Memory is offered, and the others' is looked for.
    Seeking(Box<Meeting>),
    /// All was opened, and this member has called.
    Called(Box<Meeting>),
    /// The call was agreed while some had joined, who could not call: it is made again when all are back.
    Missed(Box<Meeting>),
    /// It was agreed.
    Taken(Box<Meeting>),
}

/// Sets that look for each other's devices, and those that have found them.
#[derive(Default)]
pub(super) struct Devices {
    seeking: Vec<SetId>,
    taken: Vec<SetId>,
    complete: Vec<(RunId, Mark)>,
}

impl Engine {
    /// Whether a batch is one that devices exchange among themselves, where they can: a function of what is agreed.
    fn is_for_devices(&self, id: SetId, signature: &Signature, total_bytes: u64) -> bool {
        signature.place == Place::Cuda
            && total_bytes >= self.setup.direct.bytes
            && serves(signature)
            && matches!(self.sets[&id].seating, Seating::Taken(_))
            && self.plans.forced().is_none_or(|name| name == "direct")
    }

    /// Whether a batch goes from device to device: a function of what is agreed. Where none has gone yet the devices are
    /// looked for.
    pub(super) fn goes_direct(&mut self, id: SetId, cut: &[Agreed], first: usize, total_bytes: u64) -> bool {
        if !self.is_for_devices(id, &cut[first].signature, total_bytes) {
            return false;
        }
        if matches!(self.sets[&id].at_devices, AtDevices::Unsought) {
            self.seek_devices(id, cut[first].op);
        }
        matches!(self.sets[&id].at_devices, AtDevices::Taken(_))
    }

    /// Offers memory of the device that an operation's tensors lie on.
    fn seek_devices(&mut self, id: SetId, op: Option<OpId>) {
        let gate =
            op.and_then(|op| self.ops.get(&op)?.on_device.as_ref()).map(|there| Arc::clone(&there.gate));
        // A rank that has joined looks for them when it is back.
        let Some(gate) = gate else { return };
        let slot_bytes = self.setup.direct.slot_bytes;
        let Some(set) = self.sets.get_mut(&id) else { return };
        let Seating::Taken(seat) = &set.seating else { return };
        set.at_devices = match gate.peers(slot_bytes * DEVICE_SLOTS as u64) {
            Ok(peers) => {
                let me = set.member.expect("only members run batches").0 as usize;
                let places = seat.places().to_vec();
                self.devices.seeking.push(id);
                let seat = DeviceSeat::new(me, places, slot_bytes, peers);
                AtDevices::Seeking(Box::new(Meeting { seat, gate }))
            }
            Err(cause) => {
                log::info(format_args!("tensors of process set {} go through the host: {cause}", id.0));
                AtDevices::Never
            }
        };
    }

    /// All who had joined are back: a call that they missed is made again.
    pub(super) fn call_to_devices_again(&mut self, id: SetId) {
        let missed = self.sets.get(&id).is_some_and(|set| matches!(set.at_devices, AtDevices::Missed(_)));
        if missed && !self.devices.seeking.contains(&id) {
            self.devices.seeking.push(id);
        }
    }

    /// Calls for the sets whose devices are all open.
    pub(super) fn take_device_seats(&mut self, now: Time) {
        for at in (0..self.devices.seeking.len()).rev() {
            let id = self.devices.seeking[at];
            if self.call_to_devices(id, now) {
                self.devices.seeking.swap_remove(at);
            }
        }
    }

    /// Calls, if all is open; whether there is nothing more to seek.
    fn call_to_devices(&mut self, id: SetId, now: Time) -> bool {
        let Some(set) = self.sets.get_mut(&id) else { return true };
        match &mut set.at_devices {
            AtDevices::Seeking(meeting) => match meeting.seat.open() {
                Ok(true) => {}
                Ok(false) => return false,
                Err(cause) => {
                    log::info(format_args!("tensors of process set {} go through the host: {cause}", id.0));
                    set.at_devices = AtDevices::Never;
                    return true;
                }
            },
            AtDevices::Missed(_) => {}
            _ => return true,
        }
        let Some(coordinator) = &mut set.coordinator else { return true };
        // A rank that has joined cannot call, and does so afterwards.
        let called = Call::Devices.make(coordinator, now);
        if called {
            set.at_devices = match std::mem::replace(&mut set.at_devices, AtDevices::Never) {
                AtDevices::Seeking(meeting) | AtDevices::Missed(meeting) => AtDevices::Called(meeting),
                other => other,
            };
        }
        called
    }

    /// The call stands in the agreed log: large batches behind it go from device to device.
    pub(super) fn sit_down_at_devices(&mut self, id: SetId, agreed: &Agreed) {
        // Where this rank had joined, the call was the others' alone; it makes its own, and may have already.
        let Some(set) = self.sets.get_mut(&id).filter(|_| agreed.op.is_some()) else { return };
        let all = agreed.absent.is_empty();
        set.at_devices = match std::mem::replace(&mut set.at_devices, AtDevices::Never) {
            AtDevices::Called(meeting) if !all => AtDevices::Missed(meeting),
            AtDevices::Called(meeting) => {
                self.devices.taken.push(id);
                meeting.gate.is_taken(id);
                log::info(format_args!("large tensors of process set {} go from device to device", id.0));
                AtDevices::Taken(meeting)
            }
            other => other,
        };
    }

    /// The set does not exchange any more. Waits until none of this rank's kernels runs for it.
    pub(super) fn leave_devices(&mut self, id: SetId) {
        self.devices.taken.retain(|taken| *taken != id);
        if let Some(set) = self.sets.get_mut(&id) {
            set.at_devices = AtDevices::Never;
        }
    }

    fn meeting(&mut self, id: SetId) -> &mut Meeting {
        match self.sets.get_mut(&id).map(|set| &mut set.at_devices) {
            Some(AtDevices::Taken(meeting)) => meeting,
            _ => panic!("a batch goes over devices where the set has found them"),
        }
    }

    /// Puts the device memory of a tensor's input and output into a batch's table.
    pub(super) fn take_device_tensor(
        &mut self,
        agreed: &Agreed,
        part: Part,
        sizes: Sizes,
        regions: &mut Vec<Region>,
    ) -> Result<(), Cause> {
        let t = part.tensor as usize;
        let Some(op) = agreed.op else {
            // A joined member has none.
            // SAFETY: no bytes at all.
            let nothing = unsafe { Region::new(std::ptr::null_mut(), 0) };
            regions.extend([nothing, nothing]);
            return Ok(());
        };
        let Some(operation) = self.ops.get(&op) else { panic!("an agreed operation is in flight here") };
        let (set, memory) = (operation.set, operation.tensors[t]);
        // Who has no byte here has said nothing of a device.
        let (memory, gate) = match &operation.on_device {
            Some(there) => (there.tensors[t], Arc::clone(&there.gate)),
            None => (memory, Arc::clone(&self.meeting(set).gate)),
        };
        let seated = self.meeting(set).gate.device();
        if seated != gate.device() {
            return Err(Cause::System(format!(
                "a tensor of process set {} lies on CUDA device {}, and the set's large tensors on this rank have been \
                 on device {seated}; use one device, or set CAROLE_DIRECT_BYTES above the size of any batch",
                set.0,
                gate.device()
            )));
        }
        let operation = self.ops.get_mut(&op).expect("it was just there");
        let output = &mut operation.outcome.tensors[t];
        let region = match memory.output {
            Some(region) => region,
            None => {
                let buffer = gate.buffer(sizes.output)?;
                // SAFETY: the outcome keeps the buffer.
                let region = unsafe { Region::new(buffer.address as usize as *mut u8, sizes.output) };
                output.on_device = Some(buffer);
                region
            }
        };
        output.direct = true;
        if let Some(shape) = sizes.shape {
            shape.write(&agreed.signature.tensors[t].shape, &mut output.shape);
        }
        regions.extend([memory.input, region]);
        Ok(())
    }

    /// Registers the memory of a batch and hands it to the devices.
    pub(super) fn launch_direct(&mut self, mut flight: Box<BatchFlight>, rounds: &Arc<Rounds>) {
        self.last_algorithm = Some("devices");
        let set = flight.set;
        let mut regions = std::mem::take(&mut flight.regions);
        self.meeting(set).seat.regions(
            |slots, offset, len| {
                let address = slots.as_ptr().wrapping_add(offset as usize);
                // SAFETY: part of the slots, which stay open until the seat is left, and with it this run.
                unsafe { Region::new(address, len) }
            },
            &mut regions,
        );
        flight.regions = regions;
        let id = self.register(&mut flight);
        self.place_flight(id, Flight::Batch(flight));
        if rounds.ticks.is_empty() {
            return self.finish_batch(id);
        }
        self.meeting(set).seat.push(id, rounds);
    }

    /// Gives the devices what orders can be given.
    pub(super) fn turn_devices(&mut self) -> bool {
        let mut moved = false;
        for at in 0..self.devices.taken.len() {
            let Some(&id) = self.devices.taken.get(at) else { break };
            let Some(set) = self.sets.get_mut(&id) else { continue };
            let AtDevices::Taken(meeting) = &mut set.at_devices else { continue };
            let seat = &mut meeting.seat;
            if seat.is_idle() {
                continue;
            }
            match seat.progress(&self.memory, &mut self.devices.complete) {
                Ok(any) => moved |= any,
                Err((member, cause)) => {
                    let culprit = set.ranks[member];
                    self.break_epoch_with(Some(culprit), cause);
                    return true;
                }
            }
            if seat.take_published() {
                for &peer in set.ranks.iter().filter(|rank| **rank != self.me) {
                    self.links.nudge(peer);
                }
            }
        }
        if moved {
            self.quiet_until = None;
            let mut complete = std::mem::take(&mut self.devices.complete);
            for (run, mark) in complete.drain(..) {
                self.finish_direct(run, &mark);
            }
            self.devices.complete = complete;
        }
        moved
    }

    /// The results of a batch are there when the device comes past the mark.
    fn finish_direct(&mut self, id: RunId, mark: &Mark) {
        if let Some(Flight::Batch(flight)) = &self.flights[id.slot as usize] {
            for op in flight.ops.iter().flatten() {
                if let Some(operation) = self.ops.get_mut(op)
                    && operation.outcome.tensors.iter().any(|tensor| tensor.direct)
                {
                    operation.outcome.arrives = Some(mark.clone());
                }
            }
        }
        self.finish_batch(id);
    }

    /// Whether a peer has published something that was not looked at.
    pub(super) fn devices_have_news(&self) -> bool {
        self.devices.taken.iter().any(|id| match self.sets.get(id).map(|set| &set.at_devices) {
            Some(AtDevices::Taken(meeting)) => meeting.seat.has_news(),
            _ => false,
        })
    }
}
