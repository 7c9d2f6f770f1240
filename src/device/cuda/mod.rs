//! Device memory: orders become launches of our own kernels (`kernels/`).
//!
//! [`table`], [`launch`], [`lower`] and [`source`] are pure and always here: which kernels there are, what they
//! are told, and which of them an order takes.
#![forbid(unsafe_code)]

pub mod launch;
pub mod lower;
pub mod source;
pub mod table;
