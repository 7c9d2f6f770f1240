//! Envelopes: whatever decodes, encodes to the same bytes.
#![no_main]

#[path = "../targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::message(bytes));
