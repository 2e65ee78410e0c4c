//! The identities that another process has sent, by the SPIFFE ID of the workload.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use underpass_config::SpiffeId;
use underpass_hbone::{Identity, IdentitySource, NextIdentity};

/// The latest identities, for the sources that wait for them.
#[derive(Debug, Default)]
pub(crate) struct ReceivedIdentities(Mutex<HashMap<SpiffeId, watch::Sender<Option<Identity>>>>);

/// Returns the identities of one workload as they arrive.
#[derive(Debug)]
struct ReceivedSource(watch::Receiver<Option<Identity>>);

impl ReceivedIdentities {
    /// Replaces the identity of the workload `id`, which may differ from the one in a file. It may
    /// arrive before the source is made.
    pub(crate) fn receive(&self, id: SpiffeId, identity: Identity) {
        self.latest().entry(id).or_default().send_replace(Some(identity));
    }

    /// Drops the identity of a workload. Sources wait for the next one.
    pub(crate) fn forget(&self, id: &SpiffeId) {
        let mut latest = self.latest();
        if let Entry::Occupied(entry) = latest.entry(id.clone()) {
            entry.get().send_replace(None);
            if entry.get().is_closed() {
                entry.remove();
            }
        }
    }

    /// A source of the identities of `id`.
    pub(crate) fn source(&self, id: &SpiffeId) -> Box<dyn IdentitySource> {
        let mut latest = self.latest();
        latest.retain(|_, identity| identity.borrow().is_some() || !identity.is_closed());
        let mut receiver = latest.entry(id.clone()).or_default().subscribe();
        // The first identity may have arrived before.
        receiver.mark_changed();
        Box::new(ReceivedSource(receiver))
    }

    fn latest(&self) -> MutexGuard<'_, HashMap<SpiffeId, watch::Sender<Option<Identity>>>> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IdentitySource for ReceivedSource {
    fn next(&mut self) -> NextIdentity<'_> {
        Box::pin(async {
            loop {
                if self.0.changed().await.is_err() {
                    // The process ends.
                    std::future::pending::<()>().await;
                }
                if let Some(identity) = self.0.borrow_and_update().clone() {
                    return Ok(identity);
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::FutureExt as _;
    use underpass_hbone::CertificateAuthority;

    use super::*;

    fn id(account: &str) -> SpiffeId {
        format!("spiffe://cluster.local/ns/shop/sa/{account}").parse().unwrap()
    }

    fn identity(authority: &CertificateAuthority, account: &str) -> Identity {
        let issued = authority.issue(&id(account), Duration::from_secs(3600)).unwrap();
        let [chain, key] = [issued.chain_pem, issued.key_pem].map(String::into_bytes);
        Identity::from_pem(&chain, &key, authority.roots_pem().as_bytes()).unwrap()
    }

    fn expires(source: &mut Box<dyn IdentitySource>) -> Option<std::time::SystemTime> {
        Some(source.next().now_or_never()?.unwrap().expires())
    }

    #[test]
    fn source_returns_identities_of_its_workload_once() {
        let authority = CertificateAuthority::generate("cluster.local".parse().unwrap()).unwrap();
        let received = ReceivedIdentities::default();
        let first = identity(&authority, "web");
        received.receive(id("web"), first.clone());
        let mut source = received.source(&id("web"));
        assert_eq!(
            expires(&mut source),
            Some(first.expires()),
            "the certificate arrived before the source was created"
        );
        received.receive(id("other"), identity(&authority, "other"));
        assert_eq!(expires(&mut source), None);
        let second = identity(&authority, "web");
        received.receive(id("web"), second.clone());
        assert_eq!(expires(&mut source), Some(second.expires()));
        assert_eq!(expires(&mut source), None);
    }

    #[test]
    fn forgotten_identity_is_dropped_and_its_source_gets_the_next_one() {
        let authority = CertificateAuthority::generate("cluster.local".parse().unwrap()).unwrap();
        let received = ReceivedIdentities::default();
        received.receive(id("web"), identity(&authority, "web"));
        received.forget(&id("web"));
        assert!(received.latest().is_empty());
        let mut source = received.source(&id("web"));
        assert_eq!(expires(&mut source), None);
        received.receive(id("web"), identity(&authority, "web"));
        received.forget(&id("web"));
        assert_eq!(expires(&mut source), None, "the certificate is dropped");
        received.receive(id("web"), identity(&authority, "web"));
        assert!(expires(&mut source).is_some());
    }
}
