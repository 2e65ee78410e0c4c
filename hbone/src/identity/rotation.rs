//! Rotates the credentials of one workload: publishes every new identity and every new trust as a
//! new generation. The caller derives logs and metrics from the events.

use std::fmt;
use std::time::{Duration, SystemTime};

use tokio::select;
use tokio::sync::watch;

use crate::clock;
use crate::error::{CredentialProblem, Fault, HboneError};
use crate::identity::Identity;
use crate::identity::credentials::Credentials;
use crate::identity::renewal::reached;
use crate::identity::source::IdentitySource;
use crate::trust::Trust;

/// An event of credential rotation, for logs and metrics.
#[derive(Debug)]
pub enum CredentialsEvent<'a> {
    /// A new certificate is in use.
    Identity(&'a Credentials),
    /// The trust has changed.
    Trust(&'a Credentials),
    /// Obtaining a new identity or trust failed. The last one stays in use.
    Failed(&'a HboneError),
    /// The certificate expires soon and is not renewed yet.
    Expiring {
        /// The credentials with the expiring certificate.
        credentials: &'a Credentials,
        /// The remaining validity.
        left: Duration,
    },
    /// The certificate has expired and is not renewed yet, so every handshake fails.
    Expired(&'a HboneError),
}

/// The consequence of a failure to obtain the first identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstIdentity {
    /// The process cannot start without it: fail if only the operator can remedy the error.
    Required,
    /// One of several workloads waits for it: retry after every error.
    Awaited,
}

impl FirstIdentity {
    fn must_fail_on(self, error: &HboneError) -> bool {
        self == Self::Required && error.fault() == Fault::Configuration
    }
}

/// Publishes the credentials of one workload, and renews them.
pub struct CredentialRotator {
    source: Box<dyn IdentitySource>,
    trust: watch::Receiver<Trust>,
    credentials: watch::Sender<Credentials>,
    report: Box<dyn Fn(CredentialsEvent<'_>) + Send>,
}

impl CredentialRotator {
    /// Waits for the first identity. Reports each failure; the source decides when to retry.
    ///
    /// # Errors
    /// With [`FirstIdentity::Required`], errors that only the operator can remedy
    /// ([`Fault::Configuration`]).
    pub async fn start(
        mut source: Box<dyn IdentitySource>,
        mut trust: watch::Receiver<Trust>,
        first: FirstIdentity,
        report: impl Fn(CredentialsEvent<'_>) + Send + 'static,
    ) -> Result<(Self, watch::Receiver<Credentials>), HboneError> {
        let first = loop {
            let error = match source.next().await {
                Ok(identity) => {
                    match Credentials::new(identity, trust.borrow_and_update().clone()) {
                        Ok(credentials) => break credentials,
                        Err(error) if first == FirstIdentity::Required => return Err(error),
                        Err(error) => error,
                    }
                }
                Err(error) if first.must_fail_on(&error) => return Err(error),
                Err(error) => error,
            };
            report(CredentialsEvent::Failed(&error));
        };
        report(CredentialsEvent::Identity(&first));
        let (credentials, current) = watch::channel(first);
        Ok((Self { source, trust, credentials, report: Box::new(report) }, current))
    }

    /// Publishes new credentials until the future is dropped. After a failure the last credentials
    /// stay in use.
    pub async fn run(self) {
        let Self { mut source, mut trust, credentials, report } = self;
        let current = trust.borrow().clone();
        let mut published = Published { trust: current, credentials, report };
        let mut next = source.next();
        let mut warning = ExpiryWarning::of(&published.identity());
        loop {
            select! {
                identity = &mut next => {
                    drop(next);
                    next = source.next();
                    if published.set_identity(identity) {
                        warning = ExpiryWarning::of(&published.identity());
                    }
                }
                new = changed(&mut trust) => published.set_trust(new),
                () = warning.due() => warning = published.warn(warning),
            }
        }
    }
}

impl fmt::Debug for CredentialRotator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CredentialRotator")
            .field("credentials", &self.credentials)
            .finish_non_exhaustive()
    }
}

/// Waits for new trust. Never returns if the sender is dropped.
async fn changed(trust: &mut watch::Receiver<Trust>) -> Trust {
    if trust.changed().await.is_err() {
        return std::future::pending().await;
    }
    trust.borrow_and_update().clone()
}

/// The credentials in use, and the channel that publishes them.
struct Published {
    trust: Trust,
    credentials: watch::Sender<Credentials>,
    report: Box<dyn Fn(CredentialsEvent<'_>) + Send>,
}

impl Published {
    fn identity(&self) -> Identity {
        self.credentials.borrow().identity().clone()
    }

    /// Publishes credentials with a new identity. Returns false if `identity` is an error or
    /// unusable.
    fn set_identity(&self, identity: Result<Identity, HboneError>) -> bool {
        let new = identity.and_then(|identity| Credentials::new(identity, self.trust.clone()));
        match new {
            Ok(new) => {
                self.credentials.send_replace(new.clone());
                (self.report)(CredentialsEvent::Identity(&new));
                true
            }
            Err(error) => {
                self.failed(&error);
                false
            }
        }
    }

    fn set_trust(&mut self, trust: Trust) {
        // Keep the trust even if it does not fit the certificate: the next certificate may fit.
        self.trust = trust;
        match Credentials::new(self.identity(), self.trust.clone()) {
            Ok(new) => {
                self.credentials.send_replace(new.clone());
                (self.report)(CredentialsEvent::Trust(&new));
            }
            Err(error) => self.failed(&error),
        }
    }

    /// Reports that the certificate expires soon or has expired. Returns the next warning.
    fn warn(&self, warning: ExpiryWarning) -> ExpiryWarning {
        let credentials = self.credentials.borrow().clone();
        let expires = credentials.identity().expires();
        match warning {
            ExpiryWarning::Expiring(_) => {
                let left = expires.duration_since(clock::now()).unwrap_or_default();
                (self.report)(CredentialsEvent::Expiring { credentials: &credentials, left });
                ExpiryWarning::after(expires)
            }
            ExpiryWarning::Expired(_) | ExpiryWarning::None => {
                let name = credentials.identity().spiffe_id().to_string();
                let what = CredentialProblem::Expired(expires);
                (self.report)(CredentialsEvent::Expired(&HboneError::credential(name, what)));
                ExpiryWarning::None
            }
        }
    }

    fn failed(&self, error: &HboneError) {
        (self.report)(CredentialsEvent::Failed(error));
    }
}

/// The next expiry warning: at two thirds of the validity, then daily, and hourly on the last day.
#[derive(Debug, Clone, Copy)]
enum ExpiryWarning {
    Expiring(SystemTime),
    Expired(SystemTime),
    None,
}

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const HOUR: Duration = Duration::from_secs(60 * 60);

impl ExpiryWarning {
    /// The first warning for a certificate. It may be due now.
    fn of(identity: &Identity) -> Self {
        let life = identity.expires().duration_since(identity.not_before()).unwrap_or_default();
        Self::Expiring(identity.expires() - life / 3)
    }

    /// The warning that follows one that is due now.
    fn after(expires: SystemTime) -> Self {
        let now = clock::now();
        let left = expires.duration_since(now).unwrap_or_default();
        let pause = match left.checked_sub(DAY) {
            Some(until_last_day) if !until_last_day.is_zero() => DAY.min(until_last_day),
            _ => HOUR,
        };
        if pause < left { Self::Expiring(now + pause) } else { Self::Expired(expires) }
    }

    async fn due(self) {
        match self {
            Self::Expiring(time) | Self::Expired(time) => reached(time).await,
            Self::None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests;
