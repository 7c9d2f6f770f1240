//! Devices beside the host's processor: they have memory of their own, and work that the host starts and does not
//! wait for. What the runtime needs of one to bring tensors to the host and back; [`super::cuda`] is the only one so
//! far.
//!
//! What the ranks of one host need to reach each other's device memory are [`Peers`].
//!
//! Transfers run on the accelerator's own stream, one after another. A [`Mark`] is a point in the work of a stream:
//! producers give one with their tensors, operations end with one.

use super::Device;
use crate::error::Cause;
use crate::memory::Region;
use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Instant;

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

/// Memory on the device that the runtime allocated; what `owner` is gives it back when it is dropped.
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

/// Memory of the host that the device copies to and from without help: where tensors stand on their way.
pub struct Staging {
    host: *mut u8,
    len: u64,
    _owner: Box<dyn Any + Send + Sync>,
}

impl Staging {
    /// `len` bytes at `host`, which `owner` gives back when it is dropped.
    ///
    /// # Safety
    /// The bytes must be the value's alone for as long as `owner` lives.
    #[must_use]
    pub unsafe fn new(host: *mut u8, len: u64, owner: Box<dyn Any + Send + Sync>) -> Staging {
        Staging { host, len, _owner: owner }
    }
    /// The first byte.
    #[must_use]
    pub fn host(&self) -> *mut u8 {
        self.host
    }
    /// How many bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Debug for Staging {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes at {:p}", self.len, self.host)
    }
}

// SAFETY: the bytes belong to whoever holds the value.
unsafe impl Send for Staging {}

/// Which way bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From the device to the host's memory.
    ToHost,
    /// From the host's memory to the device.
    ToDevice,
}

/// One copy between staging memory and the device.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// In [`Staging::host`].
    pub host: *mut u8,
    /// The tensor's bytes.
    pub device: u64,
    /// How many.
    pub bytes: u64,
}

/// Words of an [`Offer`].
pub const OFFER_WORDS: usize = 12;

/// How another process of the host opens memory of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Offer(pub [u64; OFFER_WORDS]);

/// Memory of a device that other processes of the host read, theirs, and orders over both. The orders run one after
/// another on a stream of their own, and the waker is called when one is over. Dropped, it waits until none runs. The memory
/// stays allocated for the next who wants as much.
pub trait Peers: Device {
    /// How the others open this process's memory.
    fn offer(&self) -> Offer;
    /// This process's memory.
    fn own(&self) -> Region;
    /// Opens the memory that another process offers, as long as this one lives.
    fn open(&mut self, offer: &Offer) -> Result<Region, Cause>;
    /// The end of all orders so far.
    fn mark(&mut self) -> Result<Mark, Cause>;
    /// Others may read this process's memory even after the end: nobody gets it any more.
    fn retire(&mut self);
}

/// An accelerator of this process.
pub trait Accelerator: Send {
    /// Transfers from now on wait for the mark. The host does not.
    fn after(&mut self, mark: &Mark) -> Result<(), Cause>;
    /// The end of all transfers so far.
    fn mark(&mut self) -> Result<Mark, Cause>;
    /// Calls the waker that the accelerator was opened with when all transfers so far are over.
    fn wake_when_over(&mut self) -> Result<(), Cause>;
    /// Memory of the host for copies to and from the device.
    fn staging(&mut self, bytes: u64) -> Result<Staging, Cause>;
    /// Memory on the device for what users get.
    fn buffer(&mut self, bytes: u64) -> Result<DeviceBuffer, Cause>;
    /// `bytes` of memory that other processes of the host can open, and a stream for orders over it and theirs.
    fn peers(&mut self, bytes: u64) -> Result<Box<dyn Peers>, Cause>;
    /// Copies between staging memory and the device, in the order of the stream.
    ///
    /// # Safety
    /// The bytes must stay valid until the stream has come past the copies.
    unsafe fn transfer(&mut self, direction: Direction, transfers: &[Transfer]) -> Result<(), Cause>;
}
