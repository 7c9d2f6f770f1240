//! A coordinator that gets arbitrary bodies from its parent and children, between honest submissions: it
//! blames or obeys, and never panics.
#![no_main]

#[path = "../targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::coordinator(bytes));
