//! What we are and whom we trust, kept up to date: drives a source of identities and the files of the trust settings, and
//! publishes what they give as one.
//!
//! Not here: where an identity comes from (`source`), and logs and metrics, which whoever is told makes of it.

use std::fmt;
use std::time::{Duration, SystemTime};

use tokio::select;
use tokio::sync::watch;
use underpass_config::TrustSettings;

use crate::source::reached;
use crate::{
    CredentialProblem, Credentials, Fault, HboneError, Identity, IdentitySource, Trust, TrustFiles,
    clock,
};

/// What happened to our credentials.
#[derive(Debug)]
pub enum CredentialsEvent<'a> {
    /// There is a new certificate.
    Identity(&'a Credentials),
    /// Whom we trust has changed.
    Trust(&'a Credentials),
    /// Something new could not be had or used; what was there before stays.
    Failed(&'a HboneError),
    /// The certificate has little left of its life, and there is no new one yet.
    Expiring {
        /// The certificate.
        credentials: &'a Credentials,
        /// How long it is still valid.
        left: Duration,
    },
    /// The certificate has expired, and there is no new one: no handshake can succeed.
    Expired(&'a HboneError),
}

/// Keeps the credentials up to date.
pub struct Keeper {
    source: Box<dyn IdentitySource>,
    files: TrustFiles,
    trust: Trust,
    credentials: watch::Sender<Credentials>,
    told: Box<dyn Fn(CredentialsEvent<'_>) + Send>,
}

impl Keeper {
    /// Waits for the first identity. Whatever is not there yet is told and tried again.
    ///
    /// # Errors
    /// What only the operator can change ([`Fault::Configuration`]).
    pub async fn start(
        mut source: Box<dyn IdentitySource>,
        trust: TrustSettings,
        told: impl Fn(CredentialsEvent<'_>) + Send + 'static,
    ) -> Result<(Self, watch::Receiver<Credentials>), HboneError> {
        let (files, trust) = TrustFiles::open(&trust)?;
        let identity = loop {
            match source.next().await {
                Ok(identity) => break identity,
                Err(error) if error.fault() == Fault::Configuration => return Err(error),
                Err(error) => told(CredentialsEvent::Failed(&error)),
            }
        };
        let first = Credentials::new(identity, trust.clone())?;
        told(CredentialsEvent::Identity(&first));
        let (credentials, current) = watch::channel(first);
        Ok((Self { source, files, trust, credentials, told: Box::new(told) }, current))
    }

    /// Publishes what is new, for ever. After a failure the last credentials stay.
    pub async fn run(self) {
        let Self { mut source, mut files, trust, credentials, told } = self;
        let mut published = Published { trust, credentials, told };
        let mut next = source.next();
        let mut reminder = Reminder::of(&published.identity());
        loop {
            select! {
                identity = &mut next => {
                    drop(next);
                    next = source.next();
                    if published.set_identity(identity) {
                        reminder = Reminder::of(&published.identity());
                    }
                }
                trust = files.next() => published.set_trust(trust),
                () = reminder.due() => reminder = published.remind(reminder),
            }
        }
    }
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").field("credentials", &self.credentials).finish_non_exhaustive()
    }
}

/// What is in force, and who is told of it.
struct Published {
    trust: Trust,
    credentials: watch::Sender<Credentials>,
    told: Box<dyn Fn(CredentialsEvent<'_>) + Send>,
}

impl Published {
    fn identity(&self) -> Identity {
        self.credentials.borrow().identity().clone()
    }

    /// Whether it is in force now.
    fn set_identity(&self, identity: Result<Identity, HboneError>) -> bool {
        let new = identity.and_then(|identity| Credentials::new(identity, self.trust.clone()));
        match new {
            Ok(new) => {
                self.credentials.send_replace(new.clone());
                (self.told)(CredentialsEvent::Identity(&new));
                true
            }
            Err(error) => {
                self.failed(&error);
                false
            }
        }
    }

    fn set_trust(&mut self, trust: Result<Trust, HboneError>) {
        let new =
            trust.and_then(|trust| Ok((Credentials::new(self.identity(), trust.clone())?, trust)));
        match new {
            Ok((new, trust)) => {
                self.trust = trust;
                self.credentials.send_replace(new.clone());
                (self.told)(CredentialsEvent::Trust(&new));
            }
            Err(error) => self.failed(&error),
        }
    }

    /// Tells of the end of the certificate that comes or has come; the next reminder.
    fn remind(&self, reminder: Reminder) -> Reminder {
        let credentials = self.credentials.borrow().clone();
        let expires = credentials.identity().expires();
        match reminder {
            Reminder::Expiring(_) => {
                let left = expires.duration_since(clock::now()).unwrap_or_default();
                (self.told)(CredentialsEvent::Expiring { credentials: &credentials, left });
                Reminder::after(expires)
            }
            Reminder::Expired(_) | Reminder::None => {
                let name = credentials.identity().spiffe_id().to_string();
                let what = CredentialProblem::Expired(expires);
                (self.told)(CredentialsEvent::Expired(&HboneError::credential(name, what)));
                Reminder::None
            }
        }
    }

    fn failed(&self, error: &HboneError) {
        (self.told)(CredentialsEvent::Failed(error));
    }
}

/// When to tell next of the end of a certificate: at two thirds of its life, then daily, and hourly
/// in its last day.
#[derive(Debug, Clone, Copy)]
enum Reminder {
    Expiring(SystemTime),
    Expired(SystemTime),
    None,
}

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const HOUR: Duration = Duration::from_secs(60 * 60);

impl Reminder {
    /// The first one of a certificate, which may be due now.
    fn of(identity: &Identity) -> Self {
        let life = identity.expires().duration_since(identity.not_before()).unwrap_or_default();
        Self::Expiring(identity.expires() - life / 3)
    }

    /// The one after one that was due now.
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
