//! MPI between two ranks: byte streams made of messages, on a duplicate of `MPI_COMM_WORLD`.
//!
//! *A pipe* ([`MpiPipe`]) sends slots of at most [`LANE_SLOT_BYTES`] with nonblocking sends, and keeps as many receives
//! posted as the peer may have slots under way, so that nothing arrives unexpected and no count comes near the
//! 2^31 that an MPI count can say. What the receiver has taken it tells in small messages of their own.
//!
//! *Within a host* a lane's slots lie in memory that MPI lets its ranks share ([`window`]), and the messages only say
//! which of them are full. The sender decides it for each lane, and says so in the first message of the pipe.
//!
//! *Threads.* MPI is asked for `MPI_THREAD_MULTIPLE`. With that, whoever drives the engine calls it; with
//! `MPI_THREAD_SERIALIZED`, too, one at a time; with less (or [`Threads::One`]) all calls are made by one thread of
//! this module, which also initialises and finalises MPI in any case ([`world`]).
//!
//! *Progress.* Nothing wakes a process for a message of MPI. Pipes say so ([`Pipe::is_polled`]), and whoever drives
//! naps for a short time that grows to a millisecond, instead of sleeping until it is woken.
//!
//! *Failure.* MPI by itself does not tell that a peer has died. The connection on which the rendezvous has proven
//! the peer stays open and carries nothing: its end says so at once. Errors of MPI are returned, never fatal, and
//! end the link. Whether the survivors outlive the failure is up to MPI's launcher.
//!
//! *The end.* A pipe that is closed says so by an empty message. MPI is finalised when the process exits, if Carole
//! had initialised it and no epoch has broken: after a failure `MPI_Finalize` would wait for the dead.

mod pipe;
mod port;
mod service;
mod slot;
mod window;
mod world;

pub use pipe::{Address, MpiPipe, link};
pub use world::{Threads, World, broke, join, library};

use crate::error::Cause;
use crate::limits::FRAME_BYTES_MAX;

/// Bytes of one message of a lane: a frame with its header and a few small ones.
pub const LANE_SLOT_BYTES: usize = FRAME_BYTES_MAX + 4096;
/// Messages of a lane that may be under way.
pub const LANE_SLOTS: usize = 4;
/// Bytes of a slot of a lane within a host: few enough that the peer reads while the next one is written.
pub const WINDOW_SLOT_BYTES: usize = 64 << 10;
/// Such slots; together they stay in a core's cache.
pub const WINDOW_SLOTS: usize = 16;
/// Bytes of one message of a control pipe.
pub const CONTROL_SLOT_BYTES: usize = 4 << 10;
/// Messages of a control pipe that may be under way.
pub const CONTROL_SLOTS: usize = 16;

const _: () = {
    // A count of MPI is an int.
    assert!(LANE_SLOT_BYTES <= i32::MAX as usize);
    // Frames are padded, so that no element lies in two slots.
    assert!(LANE_SLOT_BYTES.is_multiple_of(64) && CONTROL_SLOT_BYTES.is_multiple_of(64));
    assert!(WINDOW_SLOT_BYTES.is_multiple_of(4096));
    assert!(LANE_SLOTS >= 2 && CONTROL_SLOTS >= 2 && WINDOW_SLOTS >= 4);
};

/// What MPI said, in our words.
fn cause_of(words: &str) -> Cause {
    // What ULFM says of a rank whose process has ended.
    if words.contains("PROC_FAILED") { Cause::Exited } else { Cause::System(format!("MPI: {words}")) }
}
