//! Brings tensors between the device and pinned memory of the host, on a stream of its own.

use super::driver::{Stream, call};
use super::home::{Home, call_back};
use super::memory::{DeviceBytes, PinnedBytes};
use super::peers::CudaPeers;
use crate::device::accelerator::{Accelerator, DeviceBuffer, Direction, Mark, Peers, Staging, Transfer};
use crate::error::Cause;
use std::ffi::c_void;
use std::sync::Arc;

/// Blocks of staging memory are at least so large.
const BLOCK_BYTES_MIN: usize = 64 << 10;

/// Makes whoever drives the engine look again.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// Calls `wake` when the stream has come so far.
pub(super) fn wake_behind(home: &Home, stream: &Stream, wake: &Wake) -> Result<(), Cause> {
    unsafe extern "C" fn called(wake: *mut c_void) {
        // SAFETY: what was given away below, once.
        let wake = unsafe { Box::from_raw(wake.cast::<Wake>()) };
        wake();
    }
    let wake: *mut Wake = Box::into_raw(Box::new(Arc::clone(wake)));
    let _current = home.context.enter()?;
    Ok(call_back(stream, called, wake.cast(), |wake| {
        // SAFETY: given away just now, and not called.
        drop(unsafe { Box::from_raw(wake.cast::<Wake>()) });
    })?)
}

/// Copies of one device.
pub struct Carrier {
    stream: Stream,
    wake: Wake,
    home: Arc<Home>,
}

impl Carrier {
    /// A carrier that calls `wake` when the engine is to look at it.
    pub fn new(home: Arc<Home>, wake: Wake) -> Result<Carrier, Cause> {
        Ok(Carrier { stream: Stream::new(&home.context)?, wake, home })
    }
}

/// Staging memory that goes back to its list when nobody needs it any more.
struct Block {
    bytes: Option<PinnedBytes>,
    home: Arc<Home>,
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(bytes) = self.bytes.take() {
            self.home.give_back(bytes);
        }
    }
}

// SAFETY: the bytes are only ever reached through `&mut self`, in `drop`.
unsafe impl Sync for Block {}

impl Accelerator for Carrier {
    fn after(&mut self, mark: &Mark) -> Result<(), Cause> {
        // SAFETY: our own stream.
        unsafe { mark.0.hold(self.stream.raw as usize as u64) }
    }

    fn mark(&mut self) -> Result<Mark, Cause> {
        // SAFETY: our own stream.
        unsafe { self.home.mark(self.stream.raw) }
    }

    fn wake_when_over(&mut self) -> Result<(), Cause> {
        wake_behind(&self.home, &self.stream, &self.wake)
    }

    fn peers(&mut self, bytes: u64) -> Result<Box<dyn Peers>, Cause> {
        Ok(Box::new(CudaPeers::new(&self.home, bytes as usize, Arc::clone(&self.wake))?))
    }

    fn staging(&mut self, bytes: u64) -> Result<Staging, Cause> {
        let bytes = (bytes as usize).max(BLOCK_BYTES_MIN);
        let known = self.home.reuse(bytes);
        let block =
            known.map_or_else(|| PinnedBytes::new(&self.home.context, bytes.next_power_of_two()), Ok)?;
        let (host, len) = (block.host(), block.len() as u64);
        let owner = Box::new(Block { bytes: Some(block), home: Arc::clone(&self.home) });
        // SAFETY: the block is in nobody's list until its owner is dropped.
        Ok(unsafe { Staging::new(host, len, owner) })
    }

    fn buffer(&mut self, bytes: u64) -> Result<DeviceBuffer, Cause> {
        let block = DeviceBytes::new(&self.home.context, bytes as usize)?;
        let address = block.address();
        Ok(DeviceBuffer { address, len: bytes, device: self.home.number, owner: Box::new(block) })
    }

    unsafe fn transfer(&mut self, direction: Direction, transfers: &[Transfer]) -> Result<(), Cause> {
        let _current = self.home.context.enter()?;
        for &Transfer { host, device, bytes } in transfers {
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
}
