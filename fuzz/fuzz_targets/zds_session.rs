//! Runs a script of a node agent against the ZDS session (`proxy/src/pods/zds/session/script.rs`).
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|script: &[u8]| underpass::fuzz::zds_session(script));
