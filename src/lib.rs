//! Carole: collective communication for distributed training. (This page is written at the end of construction.)

pub mod types;
pub mod limits;
pub mod error;
pub mod config;
pub mod log;
pub mod schedule;
pub mod algorithm;
pub mod cost;
pub mod select;
pub mod layout;
pub mod wire;
pub mod coordinator;
pub mod fusion;
pub mod membership;
pub mod run;
pub mod fork;
pub mod memory;
pub mod device;
pub mod transport;
pub mod rendezvous;
pub mod engine;
pub mod runtime;
pub mod launch;
pub mod perf;
