//! Devices beside the host's processor: they have memory of their own, and work that the host starts and does not
//! wait for. What the engine needs of one; [`super::cuda`] is the only one so far.
//!
//! Orders run on the accelerator's own stream, one after another. A [`Mark`] is a point in the work of a stream:
//! producers give one with their tensors, operations end with one. A *signal* is a mark that another process can
//! wait for: it is recorded first, then told through the host, and only then may the peer wait for it (a wait for
//! what was not recorded waits for nothing).

use super::Device;
use crate::error::Cause;
use crate::types::Rank;
use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Instant;

/// Bytes of the handle by which another process opens an allocation or an event.
pub const HANDLE_BYTES: usize = 64;
/// Signals of one process that may be told and not yet waited for.
pub const SIGNALS: usize = 64;
/// Bytes by which an accelerator introduces itself to a peer: an allocation to try, and all its signals.
pub const GREETING_BYTES: usize = Exported::BYTES + SIGNALS * HANDLE_BYTES;

/// A point in the work of a stream.
pub trait Point: Debug + Send + Sync {
    /// Whether the stream has come past it.
    fn is_over(&self) -> Result<bool, Cause>;
    /// Blocks the host until the stream has come past it, or until `until`. Whether it has.
    fn block(&self, until: Option<Instant>) -> Result<bool, Cause>;
    /// Lets another stream wait for it; the host does not.
    ///
    /// # Safety
    /// `stream` must be a live stream of the same device.
    unsafe fn hold(&self, stream: u64) -> Result<(), Cause>;
}

/// A point in the work of a stream, shared.
#[derive(Clone, Debug)]
pub struct Mark(pub Arc<dyn Point>);

/// Where a tensor of an accelerator comes from: the device, and the point up to which its producer must have come.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// The device's number in this process.
    pub device: i32,
    /// The producer's point.
    pub mark: Mark,
}

/// Memory on the device that the engine allocated; what `owner` is gives it back when it is dropped.
pub struct DeviceBuffer {
    /// Where it is.
    pub address: u64,
    /// How many bytes.
    pub len: u64,
    /// The device's number.
    pub device: i32,
    /// What gives it back.
    pub owner: Box<dyn Any + Send + Sync>,
}

impl Debug for DeviceBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes at {:#x} of device {}", self.len, self.address, self.device)
    }
}

/// Memory of the host that the device sees, for what links cannot take from the device.
pub struct Staging {
    /// Where the host sees it.
    pub host: *mut u8,
    /// Where the device sees it.
    pub device: u64,
    /// How many bytes.
    pub len: u64,
    /// What gives it back.
    pub owner: Box<dyn Any + Send + Sync>,
}

// SAFETY: the bytes belong to whoever holds the value.
unsafe impl Send for Staging {}

/// Memory as another process finds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exported {
    /// Opens the whole allocation.
    pub handle: [u8; HANDLE_BYTES],
    /// The owner's number of the allocation, which is never used again.
    pub allocation: u64,
    /// From the allocation's start.
    pub offset: u64,
}

impl Exported {
    /// Bytes of an encoded one.
    pub const BYTES: usize = HANDLE_BYTES + 16;

    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..HANDLE_BYTES].copy_from_slice(&self.handle);
        bytes[HANDLE_BYTES..HANDLE_BYTES + 8].copy_from_slice(&self.allocation.to_le_bytes());
        bytes[HANDLE_BYTES + 8..].copy_from_slice(&self.offset.to_le_bytes());
        bytes
    }

    /// From bytes.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Exported {
        let word = |at: usize| {
            let eight = bytes[HANDLE_BYTES + at..HANDLE_BYTES + at + 8].try_into();
            u64::from_le_bytes(eight.expect("eight bytes"))
        };
        let handle = bytes[..HANDLE_BYTES].try_into().expect("a handle's bytes");
        Exported { handle, allocation: word(0), offset: word(8) }
    }
}

/// Which way bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From the device to the host's memory.
    ToHost,
    /// From the host's memory to the device.
    ToDevice,
}

/// One copy between staging memory and the device: addresses as the host and the device see them.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// In [`Staging::host`].
    pub host: *mut u8,
    /// The same bytes as the device sees them.
    pub staged: u64,
    /// The tensor's bytes.
    pub device: u64,
    /// How many.
    pub bytes: u64,
}

/// An accelerator of this process.
pub trait Accelerator: Device {
    /// Its number in this process.
    fn number(&self) -> i32;
    /// Orders from now on wait for the mark. The host does not.
    fn after(&mut self, mark: &Mark) -> Result<(), Cause>;
    /// The end of all orders so far.
    fn mark(&mut self) -> Result<Mark, Cause>;
    /// Calls the waker that the accelerator was opened with when all orders so far are over.
    fn wake_when_over(&mut self) -> Result<(), Cause>;
    /// Memory of the host for copies to and from the device.
    fn staging(&mut self, bytes: u64) -> Result<Staging, Cause>;
    /// Memory on the device for what users get.
    fn buffer(&mut self, bytes: u64) -> Result<DeviceBuffer, Cause>;
    /// Memory on the device that peers can open, for what lies in memory that they cannot. Used again when it is
    /// dropped, by orders that follow.
    fn slab(&mut self, bytes: u64) -> Result<DeviceBuffer, Cause>;
    /// Copies between staging memory and the device, in the order of the stream.
    ///
    /// # Safety
    /// The bytes must stay valid until the stream has come past the copies.
    unsafe fn transfer(&mut self, direction: Direction, transfers: &[Transfer]) -> Result<(), Cause>;
    /// Who it is, for peers on this host; [`GREETING_BYTES`] long. An error where other processes cannot see this
    /// device's memory.
    fn greeting(&mut self) -> Result<Vec<u8>, Cause>;
    /// Gets to know a peer by its greeting, and tries whether its memory can be opened.
    fn meet(&mut self, peer: Rank, greeting: &[u8]) -> Result<(), Cause>;
    /// What a peer finds the memory at `address` by.
    fn export(&mut self, address: u64) -> Result<Exported, Cause>;
    /// Where a peer's memory is here.
    fn import(&mut self, peer: Rank, exported: &Exported) -> Result<u64, Cause>;
    /// Records a signal behind all orders so far, and says which.
    fn signal(&mut self) -> Result<u32, Cause>;
    /// Orders from now on wait for a peer's signal, which the peer has told of.
    fn await_signal(&mut self, peer: Rank, signal: u32) -> Result<(), Cause>;
}

/// Opens the accelerator of a number.
pub type Open = Box<dyn Fn(i32) -> Result<Box<dyn Accelerator>, Cause> + Send>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exports_travel_as_bytes() {
        let mut handle = [0; HANDLE_BYTES];
        (0..HANDLE_BYTES).for_each(|i| handle[i] = i as u8);
        let exported = Exported { handle, allocation: 0x0102_0304_0506_0708, offset: 99 };
        assert_eq!(Exported::decode(&exported.encode()), exported);
    }
}
