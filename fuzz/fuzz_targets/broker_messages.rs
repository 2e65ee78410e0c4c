//! Decodes the messages between the broker and the proxy process.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| underpass::fuzz::broker_messages(bytes));
