//! Tensors on a CUDA device: copied to pinned memory of the host when they are submitted, and back when the operation
//! has ended. In between they are tensors of the host, over whatever links the ranks have.
//!
//! Where the devices of a set's ranks exchange tensors among themselves ([`Gate`]), large ones stay where they are, and
//! the operation begins when the caller's stream has made them. What is copied all the same, because it is small or
//! because the devices had not met yet, is only not used when its batch turns out to be theirs.
//!
//! The copies are on a stream of their own. It waits for what the caller's stream had been given before the call, so
//! that nobody waits for a producer; and whoever takes the outcome lets its stream wait for the copies back
//! ([`Outcome::arrives`]), or waits for them itself.

use super::live::lock;
use crate::device::accelerator::{
    Accelerator, Arrival, DeviceBuffer, Direction, Mark, Peers, Staging, Transfer,
};
use crate::device::cuda;
use crate::engine::handles::Submitted;
use crate::engine::passage::{Gate, OnDevice, Passage};
use crate::engine::{Outcome, TensorMemory, devices_serve};
use crate::error::Cause;
use crate::memory::Region;
use crate::types::{Collective, Place, SetId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex};

/// Tensors stand in staging memory at multiples of this.
const ALIGNMENT: u64 = 256;

/// The devices that tensors came from so far.
pub(super) struct Stages {
    wake: Arc<dyn Fn() + Send + Sync>,
    known: Mutex<BTreeMap<i32, Arc<Stage>>>,
    /// Tensors of so many bytes stay on their devices, where they can.
    direct_bytes: u64,
    /// The sets whose devices exchange tensors.
    taken: Arc<Mutex<BTreeSet<SetId>>>,
}

/// One device.
struct Stage {
    number: i32,
    inner: Mutex<Inner>,
    taken: Arc<Mutex<BTreeSet<SetId>>>,
}

struct Inner {
    accelerator: Box<dyn Accelerator>,
    /// Memory that the device still reads or writes, until it has come past the mark.
    parked: VecDeque<(Mark, Staging)>,
}

impl fmt::Debug for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a device")
    }
}

impl Inner {
    fn park(&mut self, mark: Mark, staging: Staging) {
        while self.parked.front().is_some_and(|(mark, _)| mark.0.is_over().unwrap_or(false)) {
            self.parked.pop_front();
        }
        self.parked.push_back((mark, staging));
    }

    /// Hands the staging memory back when the device has come past all that it was told so far.
    fn park_behind_all(&mut self, staging: Staging) {
        match self.accelerator.mark() {
            Ok(mark) => self.park(mark, staging),
            // A device that takes no marks may still copy: then the memory is given up.
            Err(_) => std::mem::forget(staging),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some((last, _)) = self.parked.back() {
            // An error says that nothing is copied any more.
            let _ = last.0.block(None);
        }
    }
}

impl Stages {
    /// No device is known yet; `wake` makes whoever drives look again.
    pub(super) fn new(wake: Arc<dyn Fn() + Send + Sync>, direct_bytes: u64) -> Stages {
        Stages { wake, known: Mutex::default(), direct_bytes, taken: Arc::default() }
    }

    /// Lets the tensors of a submission come to the host: from then on it names their places there. The error is the
    /// reason why that cannot be. `device` is the number that counts where no memory tells.
    ///
    /// # Safety
    /// The submission's memory must be device memory that stays valid until the operation has an outcome and its copies
    /// are over, and `stream` a live stream of that device or one of its default streams.
    pub(super) unsafe fn stage(
        &self,
        submitted: &mut Submitted,
        stream: u64,
        device: Option<i32>,
    ) -> Result<(), String> {
        submitted.signature.place = Place::Cuda;
        // SAFETY: the caller's promise.
        let arrival = unsafe { arrival(submitted, stream, device) }?;
        let Some(arrival) = arrival else { return Ok(()) };
        let stage = self.of_device(arrival.device).map_err(|cause| cause.to_string())?;
        let for_devices = submitted.message.is_none() && devices_serve(&submitted.signature);
        if for_devices {
            let tensors = submitted.tensors.iter().map(|&(input, output)| TensorMemory { input, output });
            submitted.on_device =
                Some(Arc::new(OnDevice { tensors: tensors.collect(), gate: stage.clone() }));
        }
        let stays = for_devices && lock(&self.taken).contains(&submitted.set);
        let direct_bytes = if stays { self.direct_bytes } else { u64::MAX };
        // SAFETY: the caller's promise.
        let passage = unsafe { Staged::begin(&stage, &arrival, submitted, direct_bytes) };
        submitted.passage = Some(passage.map_err(|cause| cause.to_string())?);
        Ok(())
    }

    fn of_device(&self, number: i32) -> Result<Arc<Stage>, Cause> {
        let mut known = lock(&self.known);
        if let Some(stage) = known.get(&number) {
            return Ok(Arc::clone(stage));
        }
        let accelerator = cuda::open(number, Arc::clone(&self.wake))?;
        let inner = Mutex::new(Inner { accelerator, parked: VecDeque::new() });
        let stage = Arc::new(Stage { number, inner, taken: Arc::clone(&self.taken) });
        known.insert(number, Arc::clone(&stage));
        Ok(stage)
    }
}

/// Where the tensors of a submission lie; none where nothing tells, since they are all empty.
///
/// # Safety
/// As [`Stages::stage`].
unsafe fn arrival(
    submitted: &Submitted,
    stream: u64,
    device: Option<i32>,
) -> Result<Option<Arrival>, String> {
    let regions = || submitted.tensors.iter().flat_map(|(input, output)| [Some(*input), *output]).flatten();
    let of = |region: Region| {
        // SAFETY: the caller's promise.
        unsafe { cuda::arrival(region.as_ptr() as u64, stream) }.map_err(|cause| cause.to_string())
    };
    if let Some(first) = regions().find(|region| !region.is_empty()) {
        let found = of(first)?;
        return found.map(Some).ok_or_else(|| {
            format!("the memory at {:p} lies on no CUDA device; call without a stream", first.as_ptr())
        });
    }
    // What is only to be received, as of a broadcast, tells where the result is wanted.
    for region in regions().filter(|region| !region.as_ptr().is_null()) {
        if let Some(found) = of(region)? {
            return Ok(Some(found));
        }
    }
    // SAFETY: the caller's promise.
    let told = device.map(|device| unsafe { cuda::arrival_on(device, stream) });
    told.transpose().map_err(|cause| cause.to_string())
}

impl Gate for Stage {
    fn device(&self) -> i32 {
        self.number
    }
    fn peers(&self, bytes: u64) -> Result<Box<dyn Peers>, Cause> {
        lock(&self.inner).accelerator.peers(bytes)
    }
    fn buffer(&self, bytes: u64) -> Result<DeviceBuffer, Cause> {
        lock(&self.inner).accelerator.buffer(bytes)
    }
    fn is_taken(&self, set: SetId) {
        lock(&self.taken).insert(set);
    }
}

/// Where a result goes from its place on the host.
#[derive(Clone, Copy, Debug)]
struct Landing {
    host: *mut u8,
    device: u64,
    bytes: u64,
}

/// One operation's tensors on their way.
#[derive(Debug)]
struct Staged {
    stage: Arc<Stage>,
    /// The inputs have come when the stream is past it.
    come: Mark,
    /// Whether the operation begins only then: a message that is only received is ready at once.
    waits: bool,
    staging: Option<Staging>,
    /// For each tensor, where the caller wants the result; none where the runtime allocates it.
    landings: Vec<Option<Landing>>,
}

// SAFETY: the addresses are of the operation's own staging memory.
unsafe impl Send for Staged {}

impl Staged {
    /// Starts the copies to the host. Tensors of `direct_bytes` stay where they are, and the host sees nothing of them.
    ///
    /// # Safety
    /// As [`Stages::stage`].
    unsafe fn begin(
        stage: &Arc<Stage>,
        arrival: &Arrival,
        submitted: &mut Submitted,
        direct_bytes: u64,
    ) -> Result<Box<Staged>, Cause> {
        let place = |bytes: u64| bytes.next_multiple_of(ALIGNMENT);
        // Where the result replaces the input byte for byte it is made in place, in half the memory.
        let in_place = submitted.message.is_some()
            || matches!(submitted.signature.collective, Collective::Allreduce | Collective::Broadcast);
        let stays = |input: &Region, output: &Option<Region>| {
            input.len().max(output.map_or(0, |output| output.len())) >= direct_bytes
        };
        let room = |input: &Region, output: &Option<Region>| match output {
            _ if stays(input, output) => 0,
            Some(output) if in_place => place(input.len().max(output.len())),
            output => place(input.len()) + output.map_or(0, |output| place(output.len())),
        };
        let bytes = submitted.tensors.iter().map(|(input, output)| room(input, output)).sum();
        let mut inner = lock(&stage.inner);
        let staging = match bytes {
            0 if !submitted.tensors.is_empty() && direct_bytes < u64::MAX => None,
            bytes => Some(inner.accelerator.staging(bytes)?),
        };
        let (mut transfers, mut landings) = (Vec::new(), Vec::new());
        let mut at = staging.as_ref().map_or(std::ptr::null_mut(), Staging::host);
        for (input, output) in &mut submitted.tensors {
            if stays(input, output) {
                // SAFETY: no bytes at all.
                (*input, *output) = (unsafe { Region::new(std::ptr::null_mut(), 0) }, None);
                landings.push(None);
                continue;
            }
            let room = room(input, output);
            let result = if in_place { at } else { at.wrapping_add(place(input.len()) as usize) };
            let reads = submitted.message.is_none_or(|message| message.sends) && !input.is_empty();
            if reads {
                let device = input.as_ptr() as u64;
                transfers.push(Transfer { host: at, device, bytes: input.len() });
            }
            let wanted = output.filter(|_| submitted.message.is_none_or(|message| !message.sends));
            landings.push(wanted.map(|output| Landing {
                host: result,
                device: output.as_ptr() as u64,
                bytes: output.len(),
            }));
            // SAFETY: both lie in the staging memory, which the passage keeps until the operation has ended.
            unsafe {
                *input = Region::new(at, input.len());
                *output = output.map(|output| Region::new(result, output.len()));
            }
            at = at.wrapping_add(room as usize);
        }
        let accelerator = &mut inner.accelerator;
        accelerator.after(&arrival.mark)?;
        // SAFETY: the caller's promise; the staging memory is parked where it is dropped too early.
        let copied = unsafe { accelerator.transfer(Direction::ToHost, &transfers) };
        let come = copied.and_then(|()| accelerator.mark());
        // Devices write results when the operation has begun: what the caller's stream had to do there is over then.
        let waits = !transfers.is_empty() || submitted.on_device.is_some();
        let come = come.and_then(|come| match waits {
            true => inner.accelerator.wake_when_over().map(|()| come),
            false => Ok(come),
        });
        match come {
            Ok(come) => {
                drop(inner);
                Ok(Box::new(Staged { stage: Arc::clone(stage), come, waits, staging, landings }))
            }
            Err(cause) => {
                if let Some(staging) = staging {
                    inner.park_behind_all(staging);
                }
                Err(cause)
            }
        }
    }
}

impl Passage for Staged {
    fn has_come(&mut self) -> Result<bool, Cause> {
        Ok(!self.waits || self.come.0.is_over()?)
    }

    fn go_back(&mut self, outcome: &mut Outcome) -> Result<(), Cause> {
        let mut inner = lock(&self.stage.inner);
        let mut transfers = Vec::new();
        let mut more = Vec::new();
        if !outcome.tensors.is_empty() && outcome.tensors.iter().all(|tensor| tensor.direct) {
            if let Some(staging) = self.staging.take() {
                inner.park(self.come.clone(), staging);
            }
            return Ok(());
        }
        for (tensor, landing) in outcome.tensors.iter_mut().zip(&self.landings) {
            if tensor.direct {
                continue;
            }
            if let Some(Landing { host, device, bytes }) = *landing {
                transfers.push(Transfer { host, device, bytes });
            } else if let Some(memory) = tensor.memory.take() {
                let bytes = memory.as_slice().len() as u64;
                let buffer = inner.accelerator.buffer(bytes)?;
                let staging = inner.accelerator.staging(bytes)?;
                // SAFETY: the staging memory has room for `bytes`, and is nobody else's.
                unsafe { staging.host().copy_from_nonoverlapping(memory.as_ptr(), bytes as usize) };
                transfers.push(Transfer { host: staging.host(), device: buffer.address, bytes });
                tensor.on_device = Some(buffer);
                more.push(staging);
            }
        }
        transfers.retain(|transfer| transfer.bytes > 0);
        if let Some(mark) = &outcome.arrives {
            // The end of these copies is the end of what the devices have exchanged, too.
            inner.accelerator.after(mark)?;
        }
        // SAFETY: the results' memory is the caller's to keep until the copies are over, as it promised; staging memory
        // is parked behind them.
        let sent = unsafe { inner.accelerator.transfer(Direction::ToDevice, &transfers) };
        let arrives = sent.and_then(|()| inner.accelerator.mark());
        for staging in self.staging.take().into_iter().chain(more) {
            match &arrives {
                Ok(mark) => inner.park(mark.clone(), staging),
                Err(_) => inner.park_behind_all(staging),
            }
        }
        outcome.arrives = Some(arrives?);
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(staging) = self.staging.take() {
            lock(&self.stage.inner).park(self.come.clone(), staging);
        }
    }
}
