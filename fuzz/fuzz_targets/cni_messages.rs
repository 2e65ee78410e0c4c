//! A line of a CNI plugin to the daemon, or of the daemon to the plugin
//! (`proxy/src/pods/cni/protocol.rs`).
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|line: &[u8]| underpass::fuzz::cni_messages(line));
