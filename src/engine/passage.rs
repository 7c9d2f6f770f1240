//! The way of tensors that links cannot reach, to the host and back, and what lets them stay where they are.
#![forbid(unsafe_code)]

use super::operation::{Outcome, TensorMemory};
use crate::device::accelerator::{DeviceBuffer, Peers};
use crate::error::Cause;
use crate::types::SetId;
use std::fmt::Debug;
use std::sync::Arc;

/// Brings the inputs of an operation to where its submission says they are, before it begins, and its results to where
/// the caller wants them, when it has ended. Dropped earlier, it leaves the caller's memory alone.
pub trait Passage: Debug + Send {
    /// Whether the inputs have come. Asked again, whenever the driver's waker was called, until they have.
    fn has_come(&mut self) -> Result<bool, Cause>;
    /// Sends the results on their way back; the outcome then says when they will be there. What the devices have
    /// exchanged among themselves is there already.
    fn go_back(&mut self, outcome: &mut Outcome) -> Result<(), Cause>;
}

/// The device of an operation's tensors, where the engine may let the devices of a host exchange them among themselves.
pub trait Gate: Debug + Send + Sync {
    /// The device's number in this process.
    fn device(&self) -> i32;
    /// Memory of the device for the others to open.
    fn peers(&self, bytes: u64) -> Result<Box<dyn Peers>, Cause>;
    /// Memory of the device for what users get.
    fn buffer(&self, bytes: u64) -> Result<DeviceBuffer, Cause>;
    /// From now on the devices of this set's members exchange all that they can: large tensors need not come to the
    /// host any more.
    fn is_taken(&self, set: SetId);
}

/// Where the tensors of an operation lie on their device, however they were submitted.
#[derive(Clone, Debug)]
pub struct OnDevice {
    /// As the caller has them.
    pub tensors: Vec<TensorMemory>,
    /// Their device.
    pub gate: Arc<dyn Gate>,
}
