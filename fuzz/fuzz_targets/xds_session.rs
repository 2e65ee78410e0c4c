//! Runs a script of a control plane against the client of delta xDS (`config/src/xds/script.rs`).
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|script: &[u8]| underpass_config::fuzz::xds_session(script));
