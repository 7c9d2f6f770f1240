//! Device memory: orders become launches of our own kernels (`kernels/`), which the driver translates from the
//! PTX that is embedded; no toolkit, no NCCL and nothing but the driver is needed.
//!
//! # What is where
//! * [`table`], [`launch`], [`lower`], [`source`] are pure and always here: which kernels there are, what they are
//!   told, which of them an order takes, and what their PTX is made from (`cargo run -p ci -- ptx`).
//! * `driver`, `memory`, `registered`, `device` and `ptx` come with the feature `cuda`: the driver's objects,
//!   device, pinned and peers' memory, and the implementation of [`crate::device::Device`].
//! * `home` and `carrier` bring users' tensors to pinned memory of the host and results back: an
//!   [`Accelerator`]. Small tensors, and all between hosts, go this way, over whatever links the ranks have.
//! * `peers` is memory that the ranks of a host open to each other by IPC, with a stream for the kernels that read it:
//!   [`super::accelerator::Peers`]. Large tensors go this way within a host.
//!
//! # What has been proven, and what has not
//! `tests/kernels.rs` compiles the kernels as host C++ and holds them, with the launches that [`lower`] makes,
//! against the host device to the bit: all operations, types, lengths around vectors and tiles, misalignments, in
//! place, and with threads in both orders; each access is checked against the memory that its order names. Two
//! instructions are not seen so: the conversions of f16, which a device does by itself. The PTX is assembled
//! without a device.
//!
//! On a GPU (one NVIDIA H200, driver 580.159.04, CUDA 13.0, 2026-11-26; `benches/README.md`): every reduction kernel
//! gives the host's bits (`tests/kernels.rs`, `on_a_device`), and `ci/gpu` runs collectives of CUDA tensors between
//! ranks that share it. What goes from device to device has run under the stand-in for the driver only
//! (`tests/cuda_direct.rs`), whose processes open each other's memory and run the kernels in their host form.
//!
//! # Rules
//! * No kernel waits for another process: the host launches when all inputs are marked ready. An allreduce in one
//!   shot is [`crate::device::DeviceOrder::ReduceMany`] over peers' memory; in two shots it is that for one part,
//!   and a copy of the others' parts after the host has seen the peers' marks.
//! * No context is made but on the device that the user's memory lies on, and there it is the primary one.
//! * An allocation is known by the driver's number for it, checked at each use, never by its address alone.

use super::accelerator::{Accelerator, Arrival};
use crate::error::Cause;
use std::sync::Arc;

pub mod launch;
pub mod lower;
pub mod source;
pub mod table;

#[cfg(feature = "cuda")]
pub mod carrier;
#[cfg(feature = "cuda")]
pub mod device;
#[cfg(feature = "cuda")]
pub mod driver;
#[cfg(feature = "cuda")]
pub mod home;
#[cfg(feature = "cuda")]
pub mod memory;
#[cfg(feature = "cuda")]
pub mod peers;
#[cfg(feature = "cuda")]
pub mod ptx;
#[cfg(feature = "cuda")]
pub mod registered;

/// Opens the device of a number for the runtime, which `wake` makes look again.
pub fn open(number: i32, wake: Arc<dyn Fn() + Send + Sync>) -> Result<Box<dyn Accelerator>, Cause> {
    #[cfg(feature = "cuda")]
    return Ok(Box::new(carrier::Carrier::new(home::Home::of_device(number)?, wake)?));
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (number, wake);
        Err(Cause::System(NOT_BUILT.to_owned()))
    }
}

/// The device that memory at `address` lies on, and the point up to which `stream` has been given work; none where it
/// is no device memory. An error without a driver.
///
/// # Safety
/// `stream` must be a live stream of that device, or 0, 1 or 2: its default streams.
pub unsafe fn arrival(address: u64, stream: u64) -> Result<Option<Arrival>, Cause> {
    #[cfg(feature = "cuda")]
    // SAFETY: the caller's promise.
    return unsafe { home::arrival(address, stream) };
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (address, stream);
        Err(Cause::System(NOT_BUILT.to_owned()))
    }
}

/// The point up to which a stream of the device of this number has been given work. An error without a driver.
///
/// # Safety
/// `stream` must be a live stream of that device, or 0, 1 or 2: its default streams.
pub unsafe fn arrival_on(number: i32, stream: u64) -> Result<Arrival, Cause> {
    #[cfg(feature = "cuda")]
    // SAFETY: the caller's promise.
    return unsafe { home::arrival_on(number, stream) };
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (number, stream);
        Err(Cause::System(NOT_BUILT.to_owned()))
    }
}

/// The number of the device that memory at `address` lies on; none where it is no device memory. An error without a
/// driver.
pub fn number_of(address: u64) -> Result<Option<i32>, Cause> {
    #[cfg(feature = "cuda")]
    return driver::Context::number_of(address);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = address;
        Err(Cause::System(NOT_BUILT.to_owned()))
    }
}

/// The number of the device that this thread works on, by the libraries that it has called; none where it has none. Makes
/// no context.
#[must_use]
pub fn current_number() -> Option<i32> {
    #[cfg(feature = "cuda")]
    return driver::Context::current_number();
    #[cfg(not(feature = "cuda"))]
    None
}

/// What a build without this feature says.
#[cfg(not(feature = "cuda"))]
const NOT_BUILT: &str = "CUDA is not built in (the cargo feature cuda)";

/// A sentence on what of this is here, for `--check-build`.
#[must_use]
pub fn describe() -> String {
    #[cfg(feature = "cuda")]
    match driver::version() {
        Ok(version) => format!(
            "CUDA: driver {}.{}; large CUDA tensors go from device to device within a host, others through the host's \
             memory.",
            version / 1000,
            version % 1000 / 10
        ),
        Err(why) => format!("CUDA: {why}."),
    }
    #[cfg(not(feature = "cuda"))]
    "CUDA: not built in (the cargo feature cuda).".to_owned()
}
