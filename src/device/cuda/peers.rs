//! The device as an accelerator of the engine: marks, staging, and what processes of one host know of each other.

use super::device::CudaDevice;
use super::driver::{Event, call};
use super::home::{Home, call_back};
use super::memory::{DeviceBytes, Exports, Imports, PinnedBytes, export_event, import_event};
use crate::device::accelerator::{
    Accelerator, DeviceBuffer, Direction, Exported, GREETING_BYTES, HANDLE_BYTES, Mark, SIGNALS, Staging,
    Transfer,
};
use crate::error::Cause;
use crate::types::Rank;
use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

/// Allocations that are remembered as exported, and for each peer as opened. torch takes memory from the driver in
/// segments of megabytes, so a process has hundreds.
const ALLOCATIONS_MAX: usize = 1024;
/// Blocks of staging memory and slabs are at least so large.
const BLOCK_BYTES_MIN: usize = 64 << 10;

/// Makes whoever drives the engine look again.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// This process's signals, and the peers whose greetings were heard.
pub(super) struct Peers {
    wake: Wake,
    signals: Vec<Event>,
    next: usize,
    exports: Exports,
    known: HashMap<Rank, Peer>,
    /// What peers try to open.
    sample: Option<DeviceBytes>,
}

struct Peer {
    imports: Imports,
    signals: Vec<Event>,
}

impl Peers {
    pub(super) fn new(wake: Wake) -> Peers {
        Peers {
            wake,
            signals: Vec::new(),
            next: 0,
            exports: Exports::new(ALLOCATIONS_MAX),
            known: HashMap::new(),
            sample: None,
        }
    }
}

impl fmt::Debug for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} peers", self.known.len())
    }
}

/// Memory that goes back to its list when nobody needs it any more.
struct Block<B: Send + 'static> {
    block: Option<B>,
    home: Arc<Home>,
    give_back: fn(&Home, B),
}

impl<B: Send + 'static> Drop for Block<B> {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            (self.give_back)(&self.home, block);
        }
    }
}

// SAFETY: the block is only ever reached through `&mut self`, in `drop`.
unsafe impl<B: Send> Sync for Block<B> {}

impl CudaDevice {
    fn peer(&mut self, peer: Rank) -> Result<&mut Peer, Cause> {
        self.peers
            .known
            .get_mut(&peer)
            .ok_or_else(|| Cause::Misbehaved(format!("CUDA memory of {peer}, which has not introduced itself")))
    }
}

impl Accelerator for CudaDevice {
    fn number(&self) -> i32 {
        self.home.number
    }

    fn after(&mut self, mark: &Mark) -> Result<(), Cause> {
        // SAFETY: our own stream.
        unsafe { mark.0.hold(self.stream.raw as usize as u64) }
    }

    fn mark(&mut self) -> Result<Mark, Cause> {
        // SAFETY: our own stream.
        unsafe { self.home.mark(self.stream.raw) }
    }

    fn wake_when_over(&mut self) -> Result<(), Cause> {
        unsafe extern "C" fn called(wake: *mut c_void) {
            // SAFETY: what was given away below, once.
            let wake = unsafe { Box::from_raw(wake.cast::<Wake>()) };
            wake();
        }
        let wake: *mut Wake = Box::into_raw(Box::new(Arc::clone(&self.peers.wake)));
        let _current = self.home.context.enter()?;
        Ok(call_back(&self.stream, called, wake.cast(), |wake| {
            // SAFETY: given away just now, and not called.
            drop(unsafe { Box::from_raw(wake.cast::<Wake>()) });
        })?)
    }

    fn staging(&mut self, bytes: u64) -> Result<Staging, Cause> {
        let bytes = (bytes as usize).max(BLOCK_BYTES_MIN);
        let home = &self.home;
        let known = Home::reuse(&home.pinned, bytes, PinnedBytes::len);
        let block = known.map_or_else(|| PinnedBytes::new(&home.context, bytes.next_power_of_two()), Ok)?;
        let (host, device, len) = (block.host(), block.device(), block.len() as u64);
        let give_back = |home: &Home, block| Home::give_back(&home.pinned, block);
        let owner = Box::new(Block { block: Some(block), home: Arc::clone(home), give_back });
        Ok(Staging { host, device, len, owner })
    }

    fn buffer(&mut self, bytes: u64) -> Result<DeviceBuffer, Cause> {
        let block = DeviceBytes::new(&self.home.context, bytes as usize)?;
        let address = block.address();
        Ok(DeviceBuffer { address, len: bytes, device: self.home.number, owner: Box::new(block) })
    }

    fn slab(&mut self, bytes: u64) -> Result<DeviceBuffer, Cause> {
        let bytes = (bytes as usize).max(BLOCK_BYTES_MIN);
        let home = &self.home;
        let known = Home::reuse(&home.slabs, bytes, DeviceBytes::len);
        let block = known.map_or_else(|| DeviceBytes::new(&home.context, bytes.next_power_of_two()), Ok)?;
        let (address, len) = (block.address(), block.len() as u64);
        let give_back = |home: &Home, block| Home::give_back(&home.slabs, block);
        let owner = Box::new(Block { block: Some(block), home: Arc::clone(home), give_back });
        Ok(DeviceBuffer { address, len, device: home.number, owner })
    }

    unsafe fn transfer(&mut self, direction: Direction, transfers: &[Transfer]) -> Result<(), Cause> {
        let _current = self.home.context.enter()?;
        for &Transfer { host, device, bytes, .. } in transfers {
            // SAFETY: the caller's promise.
            unsafe {
                match direction {
                    Direction::ToHost => {
                        call!(cuMemcpyDtoHAsync_v2(host.cast(), device, bytes as usize, self.stream.raw))?;
                    }
                    Direction::ToDevice => {
                        call!(cuMemcpyHtoDAsync_v2(device, host.cast(), bytes as usize, self.stream.raw))?;
                    }
                }
            }
        }
        Ok(())
    }

    fn greeting(&mut self) -> Result<Vec<u8>, Cause> {
        let context = &self.home.context;
        let peers = &mut self.peers;
        while peers.signals.len() < SIGNALS {
            peers.signals.push(Event::new(context, true)?);
        }
        if peers.sample.is_none() {
            peers.sample = Some(DeviceBytes::new(context, BLOCK_BYTES_MIN)?);
        }
        let sample = peers.sample.as_ref().expect("made just now").address();
        let mut greeting = Vec::with_capacity(GREETING_BYTES);
        greeting.extend(peers.exports.export(context, sample)?.encode());
        for signal in &peers.signals {
            greeting.extend(export_event(signal)?);
        }
        Ok(greeting)
    }

    fn meet(&mut self, peer: Rank, greeting: &[u8]) -> Result<(), Cause> {
        if self.peers.known.contains_key(&peer) {
            return Ok(());
        }
        let misbehaved = || Cause::Misbehaved("a greeting between devices that is too short".to_owned());
        let (sample, handles) = greeting.split_first_chunk().ok_or_else(misbehaved)?;
        if handles.len() != SIGNALS * HANDLE_BYTES {
            return Err(misbehaved());
        }
        let context = &self.home.context;
        let mut imports = Imports::new(context, ALLOCATIONS_MAX);
        imports.import(&Exported::decode(sample))?;
        let mut signals = Vec::with_capacity(SIGNALS);
        for handle in handles.as_chunks::<HANDLE_BYTES>().0 {
            signals.push(import_event(context, *handle)?);
        }
        self.peers.known.insert(peer, Peer { imports, signals });
        Ok(())
    }

    fn export(&mut self, address: u64) -> Result<Exported, Cause> {
        Ok(self.peers.exports.export(&self.home.context, address)?)
    }

    fn import(&mut self, peer: Rank, exported: &Exported) -> Result<u64, Cause> {
        Ok(self.peer(peer)?.imports.import(exported)?)
    }

    fn signal(&mut self) -> Result<u32, Cause> {
        let peers = &mut self.peers;
        let at = peers.next;
        peers.next = (at + 1) % SIGNALS;
        let signal = peers.signals.get(at).expect("signals are made with the greeting");
        // SAFETY: our own stream.
        unsafe { signal.record(self.stream.raw)? };
        Ok(at as u32)
    }

    fn await_signal(&mut self, peer: Rank, signal: u32) -> Result<(), Cause> {
        let known = self.peer(peer)?;
        let Some(event) = known.signals.get(signal as usize) else {
            return Err(Cause::Misbehaved(format!("{peer} tells of signal {signal}, of {SIGNALS}")));
        };
        let raw = event.raw;
        let _current = self.home.context.enter()?;
        // SAFETY: both are alive.
        unsafe { call!(cuStreamWaitEvent(self.stream.raw, raw, 0)) }
    }
}
