//! The C interface of Carole. `carole.h` is generated from these sources, so the comments here are written
//! for its readers: what a function does, what it takes, from which threads it may be called.
//!
//! The rules of the crossing, all in one place:
//! - every entry goes through [`status::enter`], which catches panics, so that nothing unwinds into C;
//! - enumerations cross as `uint32_t` and are checked ([`convert`]);
//! - structs of options begin with their size, so that old programs meet newer libraries ([`convert::options`]);
//! - handles are 64-bit numbers with a generation: a late use is an error, not undefined;
//! - outputs whose size is known only after agreement are handed over as a `carole_output`, to be freed by
//!   `carole_output_free`.
#![allow(non_camel_case_types, reason = "these are the names that C programs write")]

pub mod abi;
mod collectives;
mod convert;
mod handles;
mod messages;
mod output;
mod persistent;
mod sets;
mod shared;
mod status;
mod world;
