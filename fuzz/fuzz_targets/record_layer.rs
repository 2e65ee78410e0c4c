//! Runs a script of a TLS peer against the record layer (`hbone/src/tls/record/script.rs`).
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|script: &[u8]| underpass_hbone::fuzz::record_layer(script));
