//! Carole: collective communication for distributed training. (This page is written at the end of construction.)

pub mod algorithm;
pub mod config;
pub mod coordinator;
pub mod cost;
pub mod device;
pub mod engine;
pub mod error;
pub mod fusion;
pub mod launch;
pub mod layout;
pub mod limits;
pub mod log;
pub mod membership;
pub mod memory;
pub mod rendezvous;
pub mod run;
pub mod runtime;
pub mod schedule;
pub mod select;
pub mod transport;
pub mod types;
pub mod wire;
