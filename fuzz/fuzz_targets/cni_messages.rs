//! Decodes a line of the CNI plugin or of the daemon (`proxy/src/pods/cni/protocol.rs`).
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|line: &[u8]| underpass::fuzz::cni_messages(line));
