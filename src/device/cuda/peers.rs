//! Memory of a device that the ranks of a host open to each other by CUDA IPC, and the stream on which this rank's
//! kernels read it.

use super::carrier::{Wake, wake_behind};
use super::device::CudaDevice;
use super::driver::Stream;
use super::home::Home;
use super::memory::{DeviceBytes, Exported, Exports, HANDLE_BYTES, Imports};
use crate::device::accelerator::{Mark, OFFER_WORDS, Offer, Peers};
use crate::device::{Device, DeviceOrder, Token};
use crate::error::Cause;
use crate::memory::{Memory, Region};
use std::sync::Arc;

/// Words of a handle.
const HANDLE_WORDS: usize = HANDLE_BYTES / 8;
const _: () = assert!(HANDLE_WORDS + 3 <= OFFER_WORDS);

/// One device's. Fields are dropped in order: the device waits for its kernels, then what they read is closed.
pub struct CudaPeers {
    device: CudaDevice,
    /// The peers' memory, each opened once.
    opened: Vec<Imports>,
    own: Shared,
    offer: Offer,
    /// Waits for orders and then calls `wake`, so that the orders behind them do not wait for the call.
    bell: Stream,
    wake: Wake,
    home: Arc<Home>,
}

/// Memory that goes back to its list, and is never freed.
struct Shared {
    memory: Option<DeviceBytes>,
    retired: bool,
    home: Arc<Home>,
}

impl Shared {
    fn region(&self) -> Region {
        let memory = self.memory.as_ref().expect("there until it is dropped");
        // SAFETY: the memory stays allocated as long as the process lives; whoever makes it a run's ends the run's orders
        // before the owner is dropped.
        unsafe { Region::new(memory.address() as usize as *mut u8, memory.len() as u64) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        match self.memory.take() {
            // Somebody may still read it, and nobody knows until when.
            Some(memory) if self.retired => std::mem::forget(memory),
            Some(memory) => self.home.keep_shared(memory),
            None => {}
        }
    }
}

impl CudaPeers {
    /// `bytes` of the device's memory, made ready to be opened.
    pub fn new(home: &Arc<Home>, bytes: usize, wake: Wake) -> Result<CudaPeers, Cause> {
        let memory = home.share(bytes)?;
        let own = Shared { memory: Some(memory), retired: false, home: Arc::clone(home) };
        let exported = Exports::new(1).export(&home.context, own.region().as_ptr() as u64)?;
        Ok(CudaPeers {
            device: CudaDevice::new(Arc::clone(&home.context))?,
            opened: Vec::new(),
            own,
            offer: to_words(&exported, bytes as u64),
            bell: Stream::new(&home.context)?,
            wake,
            home: Arc::clone(home),
        })
    }
}

fn to_words(exported: &Exported, bytes: u64) -> Offer {
    let mut words = [0; OFFER_WORDS];
    for (word, part) in words.iter_mut().zip(exported.handle.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*part);
    }
    words[HANDLE_WORDS..HANDLE_WORDS + 3].copy_from_slice(&[exported.allocation, exported.offset, bytes]);
    Offer(words)
}

fn from_words(offer: &Offer) -> (Exported, u64) {
    let mut handle = [0; HANDLE_BYTES];
    for (part, word) in handle.as_chunks_mut::<8>().0.iter_mut().zip(&offer.0) {
        *part = word.to_le_bytes();
    }
    let [allocation, offset, bytes] = [0, 1, 2].map(|i| offer.0[HANDLE_WORDS + i]);
    (Exported { handle, allocation, offset }, bytes)
}

impl Device for CudaPeers {
    fn post(&mut self, token: Token, order: &DeviceOrder, memory: &Memory) -> Result<bool, Cause> {
        if self.device.post(token, order, memory)? {
            return Ok(true);
        }
        if let Some(event) = self.device.newest() {
            self.bell.wait(event)?;
            wake_behind(&self.home, &self.bell, &self.wake)?;
        }
        Ok(false)
    }

    fn progress(&mut self, done: &mut Vec<Token>) -> Result<(), Cause> {
        self.device.progress(done)
    }
}

impl Peers for CudaPeers {
    fn offer(&self) -> Offer {
        self.offer
    }

    fn own(&self) -> Region {
        self.own.region()
    }

    fn open(&mut self, offer: &Offer) -> Result<Region, Cause> {
        let (exported, bytes) = from_words(offer);
        let mut import = Imports::new(&self.home.context, 1);
        let address = import.import(&exported)?;
        self.opened.push(import);
        // SAFETY: open until `self` is dropped, which waits for its kernels first.
        Ok(unsafe { Region::new(address as usize as *mut u8, bytes) })
    }

    fn mark(&mut self) -> Result<Mark, Cause> {
        // SAFETY: our own stream.
        unsafe { self.home.mark(self.device.stream().raw) }
    }

    fn retire(&mut self) {
        self.own.retired = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offer_is_what_was_exported() {
        let exported =
            Exported { handle: std::array::from_fn(|i| i as u8 + 1), allocation: 77, offset: 1 << 40 };
        assert_eq!(from_words(&to_words(&exported, 4096)), (exported, 4096));
    }
}
