//! The way of tensors that links cannot reach, to the host and back.
#![forbid(unsafe_code)]

use super::operation::Outcome;
use crate::error::Cause;
use std::fmt::Debug;

/// Brings the inputs of an operation to where its submission says they are, before it begins, and its results to where
/// the caller wants them, when it has ended. Dropped earlier, it leaves the caller's memory alone.
pub trait Passage: Debug + Send {
    /// Whether the inputs have come. Asked again, whenever the driver's waker was called, until they have.
    fn has_come(&mut self) -> Result<bool, Cause>;
    /// Sends the results on their way back; the outcome then says when they will be there.
    fn go_back(&mut self, outcome: &mut Outcome) -> Result<(), Cause>;
}
