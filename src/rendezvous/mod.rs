//! How ranks find, prove and reach each other.
//!
//! [`client::join`] finds the rendezvous service (the launcher's, or rank 0's own), registers this rank and gets
//! the [`card::Table`] of all; [`topology`] reads from it who shares a host; the [`porter`] then makes links to
//! peers when the engine asks. Every connection opens with the [`proof`] handshake.

pub mod approach;
pub mod card;
pub mod channel;
pub mod client;
pub mod codec;
mod found;
pub mod listen;
mod meet;
#[cfg(feature = "mpi")]
pub mod over_mpi;
pub mod past;
pub mod place;
pub mod pmi;
pub mod porter;
pub mod proof;
pub mod reactor;
pub mod reform;
pub mod secret;
pub mod server;
pub mod topology;
pub mod train_job;

use std::sync::Arc;

/// Where warnings go: the runtime's log, with its rank prefix and rate limit.
pub type Warn = Arc<dyn Fn(&str) + Send + Sync>;

/// This build, as peers see it in messages about versions.
#[must_use]
pub fn build() -> &'static str {
    concat!("carole ", env!("CARGO_PKG_VERSION"))
}
