//! Gets the certificates of the served pods, and sends them to the proxy process.
//!
//! This process has the CA's key, or the connection to the SPIRE agent. It alone decides the
//! identity in a certificate: the proxy process requests none.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use underpass_config::{
    FileWatcher, IdentityFiles, IdentitySettings, Settings, SpiffeId, SpireSettings,
};
use underpass_hbone::{
    DelegatedIdentitySource, FileSource, HboneError, IdentityPem, LocalAuthority, LocalCaSource,
    PemSource,
};

use crate::broker::link::{LinkError, Sender};
use crate::broker::message::{Certificate, ToProxy};
use crate::node::certificates::{broker_issues, report_failure};
use crate::observe::metrics;
use crate::process::supervise::{Supervisor, Task};

/// The certificates of the served pods. The pods of one workload share one feed.
#[derive(Debug)]
pub(crate) struct IdentityFeeds {
    origin: Origin,
    sender: Sender<ToProxy>,
    supervisor: Supervisor,
    /// By identity. Entries without a pod stay until the next feed starts.
    feeds: Mutex<HashMap<SpiffeId, Weak<IdentityFeed>>>,
}

#[derive(Debug)]
enum Origin {
    Files(IdentityFiles, FileWatcher),
    LocalCa(Arc<LocalAuthority>),
    Spire(SpireSettings),
}

/// Sends each certificate of an identity. After the last pod with this identity, the proxy process
/// drops the certificate.
#[derive(Debug)]
pub(crate) struct IdentityFeed {
    id: SpiffeId,
    sender: Sender<ToProxy>,
    _task: Task,
}

impl IdentityFeeds {
    /// `None` if the proxy process gets the certificates itself. Call it while this process has its
    /// privileges.
    pub(crate) fn new(
        settings: &Settings,
        sender: &Sender<ToProxy>,
        watcher: &FileWatcher,
        supervisor: &Supervisor,
    ) -> Option<Self> {
        let identity = settings.identity.as_ref().filter(|identity| broker_issues(identity))?;
        let origin = match identity {
            IdentitySettings::Files(files) => Origin::Files(files.clone(), watcher.clone()),
            IdentitySettings::LocalCa(ca) => {
                Origin::LocalCa(Arc::new(LocalAuthority::new(ca.clone())))
            }
            IdentitySettings::Spire(spire) => Origin::Spire(spire.clone()),
            IdentitySettings::IstioCa(_) => return None,
        };
        let (sender, supervisor) = (sender.clone(), supervisor.clone());
        Some(Self { origin, sender, supervisor, feeds: Mutex::default() })
    }

    /// Returns the feed of an identity, and starts it if none runs.
    pub(crate) fn feed(&self, id: &SpiffeId) -> Arc<IdentityFeed> {
        // No code panics while it holds the lock.
        let mut feeds = self.feeds.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = feeds.get(id).and_then(Weak::upgrade) {
            return running;
        }
        feeds.retain(|_, feed| feed.strong_count() > 0);
        let (source, sender) = (self.source(id), self.sender.clone());
        let feed =
            Arc::new(IdentityFeed::start(id.clone(), source, None, sender, &self.supervisor));
        feeds.insert(id.clone(), Arc::downgrade(&feed));
        feed
    }

    /// Starts the feed of the only identity of `underpass run`, with its first certificate.
    ///
    /// # Errors
    ///
    /// The first attempt to get a certificate failed.
    pub(crate) async fn require(&self, id: &SpiffeId) -> Result<Arc<IdentityFeed>, HboneError> {
        let mut source = self.source(id);
        let first = Some(source.next_pem().await?);
        let (sender, supervisor) = (self.sender.clone(), &self.supervisor);
        let feed = Arc::new(IdentityFeed::start(id.clone(), source, first, sender, supervisor));
        // No code panics while it holds the lock.
        let mut feeds = self.feeds.lock().unwrap_or_else(PoisonError::into_inner);
        feeds.insert(id.clone(), Arc::downgrade(&feed));
        Ok(feed)
    }

    fn source(&self, id: &SpiffeId) -> Box<dyn PemSource> {
        match &self.origin {
            Origin::Files(files, watcher) => Box::new(FileSource::new(files.clone(), watcher)),
            Origin::LocalCa(authority) => {
                Box::new(LocalCaSource::new(authority.clone(), id.clone()))
            }
            Origin::Spire(spire) => {
                Box::new(DelegatedIdentitySource::new(spire.clone(), id.clone()))
            }
        }
    }
}

impl IdentityFeed {
    fn start(
        id: SpiffeId,
        source: Box<dyn PemSource>,
        first: Option<IdentityPem>,
        sender: Sender<ToProxy>,
        supervisor: &Supervisor,
    ) -> Self {
        let following = follow(source, first, id.clone(), sender.clone());
        let _task = supervisor.essential("certificates for the proxy process", following);
        Self { id, sender, _task }
    }
}

/// Sends the `first` certificate, if there is one, and those of the source until the proxy process
/// ends. Never returns.
async fn follow(
    mut source: Box<dyn PemSource>,
    mut first: Option<IdentityPem>,
    id: SpiffeId,
    sender: Sender<ToProxy>,
) {
    loop {
        let next = match first.take() {
            Some(first) => Ok(first),
            None => source.next_pem().await,
        };
        match next {
            Ok(identity) => send(identity, &id, &sender).await,
            Err(error) => report_failure(Some(&id), &error),
        }
    }
}

/// Sends a certificate. Never returns after the end of the proxy process.
async fn send(identity: IdentityPem, id: &SpiffeId, sender: &Sender<ToProxy>) {
    let message = ToProxy::Certificate(Certificate::new(id, identity));
    match sender.send(&message, Vec::new()).await {
        Ok(()) => {}
        // `ProxyProcess::ended` reports the reason.
        Err(LinkError::Closed) => std::future::pending().await,
        Err(error @ LinkError::TooLong) => {
            metrics::certificate_failed();
            tracing::error!(
                %error,
                workload = %id,
                hint = "federate the workload with fewer trust domains, or set privileges.broker: off",
                "cannot send a certificate and its roots to the proxy process"
            );
        }
    }
}

impl Drop for IdentityFeed {
    fn drop(&mut self) {
        let identity = self.id.to_string();
        // Fails if the proxy process has ended.
        self.sender.post(&ToProxy::DropCertificate { identity }).ok();
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};
    use std::time::Duration;

    use futures_util::FutureExt as _;
    use underpass_config::TrustDomain;
    use underpass_hbone::NextPem;
    use underpass_interception::SeqPacket;

    use super::*;
    use crate::broker::link;
    use crate::broker::message::MAX_MESSAGE;
    use crate::node::testing::metrics_after;

    /// Returns the certificates of a function.
    struct Source<F>(F);

    impl<F: FnMut() -> Option<IdentityPem> + Send> PemSource for Source<F> {
        fn next_pem(&mut self) -> NextPem<'_> {
            match (self.0)() {
                Some(pem) => Box::pin(ready(Ok(pem))),
                None => Box::pin(pending()),
            }
        }
    }

    fn id() -> SpiffeId {
        "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()
    }

    fn pem(roots: String) -> IdentityPem {
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        let (chain, key) = (String::new(), String::new());
        IdentityPem { chain, key, bundles: [(domain, roots)].into() }
    }

    #[tokio::test]
    async fn panic_of_feed_is_reported_as_failure_of_the_process() {
        let (ours, _theirs) = SeqPacket::pair().unwrap();
        let (sender, _, _writer) = link::open(ours).unwrap();
        let (supervisor, mut failures) = Supervisor::new();
        let source = Source(|| -> Option<IdentityPem> { panic!("a defect") });
        let _feed = IdentityFeed::start(id(), Box::new(source), None, sender, &supervisor);
        assert_eq!(
            failures.next().await.to_string(),
            "certificates for the proxy process panicked: a defect"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn closed_connection_is_no_failure_of_feed() {
        let (ours, _theirs) = SeqPacket::pair().unwrap();
        let (sender, _, writer) = link::open(ours).unwrap();
        drop(writer);
        let (supervisor, mut failures) = Supervisor::new();
        let source = Source(|| Some(pem(String::new())));
        let _feed = IdentityFeed::start(id(), Box::new(source), None, sender, &supervisor);
        let failed = tokio::time::timeout(Duration::from_secs(1), failures.next()).await;
        assert!(failed.is_err(), "{failed:?}");
    }

    #[tokio::test]
    async fn certificate_beyond_message_size_counts_as_failure() {
        let (ours, _theirs) = SeqPacket::pair().unwrap();
        let (sender, _, _writer) = link::open(ours).unwrap();
        let mut certificates = vec![pem("r".repeat(MAX_MESSAGE))];
        let source = Box::new(Source(move || certificates.pop()));
        let metrics = metrics_after(|| {
            assert_eq!(follow(source, None, id(), sender).now_or_never(), None);
        });
        assert!(metrics.contains("underpass_certificate_failures_total 1"), "{metrics}");
    }
}
