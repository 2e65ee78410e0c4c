//! The DNS proxy of a pod, and the client that it shares with `decide::resolve`.
//!
//! ```text
//! application ─ redirect → serve → service ┬ mesh  names of the mesh → addresses
//!                                          └ forward ┬ cache     stored responses, also stale
//!                                                    └ upstream  the pod's servers → exchange
//! ```
//!
//! The proxy forwards other queries and their responses unchanged, except for the id, the TTLs of
//! stored responses, and the length for clients that accept less.

pub(crate) mod cache;
pub(crate) mod exchange;
pub(crate) mod failed_names;
mod forward;
mod hosts;
pub(crate) mod lookup;
mod lookup_limit;
mod mesh;
pub(crate) mod message;
mod name;
pub(crate) mod probe;
pub(crate) mod receive;
mod report;
mod resolv_conf;
pub(crate) mod resolv_file;
mod resolver_settings;
mod response;
mod serve;
pub(crate) mod service;
pub(crate) mod upstream;

/// Reads a message as a query and as a response. Panics if a response of the proxy is malformed or
/// too long. For the fuzz target and the tests.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn check_bytes(bytes: &[u8]) {
    use message::{Layout, Query};
    use response::{Age, StoredResponse, Transport};

    let Ok(query) = Query::read(bytes) else { return };
    let assert_whole = |message: &[u8]| {
        let layout = Layout::read(message);
        assert!(layout.is_some_and(|layout| layout.end() == message.len()), "{message:?}");
    };
    let addresses: Vec<_> = (0..=255).map(|n| std::net::IpAddr::from([10, 0, 0, n])).collect();
    // The same bytes as a response to itself.
    let mut own = bytes.to_vec();
    message::set_flags(&mut own, message::flags(bytes) | message::QR);
    assert_eq!(query.is_answered_by(&own, query.id), Layout::read(&own).is_some());
    for transport in [Transport::Udp, Transport::Tcp] {
        for alias in [None, Some(query.name.labels()), Some(usize::MAX)] {
            let answer = response::of_addresses(&query, alias, &addresses, transport);
            assert_whole(&answer);
            assert!(answer.len() <= transport.limit(&query));
        }
        // The same bytes as a response of a server.
        let answer = response::truncate(bytes.to_vec(), &query, transport);
        assert!(answer.len() <= transport.limit(&query));
        if answer != bytes {
            assert_whole(&answer);
        }
        if let Some(stored) = StoredResponse::new(bytes.to_vec()) {
            let answer = stored.to(&query, Age::Stale, transport);
            assert_whole(&answer);
            assert!(answer.len() <= transport.limit(&query));
            stored.ttl(query.kind);
        }
    }
    if let Some(layout) = Layout::read(bytes) {
        layout.addresses(bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use proptest::collection::vec;
    use proptest::prelude::{any, proptest};

    use super::check_bytes;

    fn corpus() -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/dns_messages");
        let files = fs::read_dir(folder).unwrap();
        files.map(|file| fs::read(file.unwrap().path()).unwrap()).collect()
    }

    #[test]
    fn runs_the_corpus_of_the_fuzz_target() {
        assert!(corpus().len() > 5);
        corpus().iter().for_each(|message| check_bytes(message));
    }

    proptest! {
        #[test]
        fn responses_to_arbitrary_bytes_are_whole(bytes in vec(any::<u8>(), 0..600)) {
            check_bytes(&bytes);
        }

        #[test]
        fn responses_to_changed_messages_are_whole(
            changes in vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4),
            length in any::<proptest::sample::Index>(),
        ) {
            for mut message in corpus() {
                for (at, byte) in &changes {
                    let at = at.index(message.len());
                    message[at] = *byte;
                }
                check_bytes(&message);
                message.truncate(length.index(message.len()));
                check_bytes(&message);
            }
        }
    }
}
