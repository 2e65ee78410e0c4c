//! DNS messages as queries and as responses of servers.
#![no_main]

libfuzzer_sys::fuzz_target!(|message: &[u8]| underpass::fuzz::dns_messages(message));
