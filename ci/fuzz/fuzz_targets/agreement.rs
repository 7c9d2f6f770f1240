//! Items of agreement: whatever is accepted can be walked to its end.
#![no_main]

#[path = "../targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::agreement(bytes));
