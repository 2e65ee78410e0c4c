//! Gets the certificates of the served pods, and sends them to the proxy process.
//!
//! This process has the CA's key, or the connection to the SPIRE agent. It alone decides the
//! identity in a certificate: the proxy process requests none.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio_util::task::AbortOnDropHandle;
use underpass_config::{IdentitySettings, Settings, SpiffeId, SpireSettings};
use underpass_hbone::{
    DelegatedIdentitySource, LocalAuthority, LocalCaSource, PemSource, log_panic,
};

use crate::broker::link::{LinkError, Sender};
use crate::broker::message::ToProxy;
use crate::node::certificates::report_failure;

/// The certificates of the served pods. The pods of one workload share one feed.
#[derive(Debug)]
pub(crate) struct IdentityFeeds {
    origin: Origin,
    sender: Sender<ToProxy>,
    /// By identity. Entries without a pod stay until the next feed starts.
    feeds: Mutex<HashMap<SpiffeId, Weak<IdentityFeed>>>,
}

#[derive(Debug)]
enum Origin {
    LocalCa(Arc<LocalAuthority>),
    Spire(SpireSettings),
}

/// Sends each certificate of an identity. After the last pod with this identity, the proxy process
/// drops the certificate.
#[derive(Debug)]
pub(crate) struct IdentityFeed {
    id: SpiffeId,
    sender: Sender<ToProxy>,
    _task: AbortOnDropHandle<()>,
}

impl IdentityFeeds {
    /// `None` if the proxy process gets the certificates itself. Call it while this process has its
    /// privileges.
    pub(crate) fn new(settings: &Settings, sender: &Sender<ToProxy>) -> Option<Self> {
        let origin = match &settings.identity {
            Some(IdentitySettings::LocalCa(ca)) => {
                Origin::LocalCa(Arc::new(LocalAuthority::new(ca.clone())))
            }
            Some(IdentitySettings::Spire(spire)) => Origin::Spire(spire.clone()),
            Some(IdentitySettings::IstioCa(_) | IdentitySettings::Files(_)) | None => return None,
        };
        Some(Self { origin, sender: sender.clone(), feeds: Mutex::default() })
    }

    /// Returns the feed of an identity, and starts it if none runs.
    pub(crate) fn feed(&self, id: &SpiffeId) -> Arc<IdentityFeed> {
        // No code panics while it holds the lock.
        let mut feeds = self.feeds.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = feeds.get(id).and_then(Weak::upgrade) {
            return running;
        }
        feeds.retain(|_, feed| feed.strong_count() > 0);
        let following = follow(self.source(id), id.clone(), self.sender.clone());
        let task = tokio::spawn(log_panic("certificates for the proxy process", following));
        let (id, sender, _task) = (id.clone(), self.sender.clone(), AbortOnDropHandle::new(task));
        let feed = Arc::new(IdentityFeed { id: id.clone(), sender, _task });
        feeds.insert(id, Arc::downgrade(&feed));
        feed
    }

    fn source(&self, id: &SpiffeId) -> Box<dyn PemSource> {
        match &self.origin {
            Origin::LocalCa(authority) => {
                Box::new(LocalCaSource::new(authority.clone(), id.clone()))
            }
            Origin::Spire(spire) => {
                Box::new(DelegatedIdentitySource::new(spire.clone(), id.clone()))
            }
        }
    }
}

/// Sends certificates until the proxy process ends.
async fn follow(mut source: Box<dyn PemSource>, id: SpiffeId, sender: Sender<ToProxy>) {
    loop {
        match source.next_pem().await {
            Ok(identity) => {
                let message = ToProxy::Certificate(identity.into());
                match sender.send(&message, Vec::new()).await {
                    Ok(()) => {}
                    Err(LinkError::Closed) => return,
                    Err(error @ LinkError::TooLong) => tracing::error!(
                        %error,
                        workload = %id,
                        hint = "federate the workload with fewer trust domains, or set privileges.broker: off",
                        "cannot send a certificate and its roots to the proxy process"
                    ),
                }
            }
            Err(error) => report_failure(Some(&id), &error),
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
