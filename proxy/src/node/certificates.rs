//! Selects the source of certificates from the settings, and logs and counts its events.
//!
//! The sources and the renewal are in the hbone crate.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use underpass_config::{
    FileWatcher, Hint as _, IdentityFiles, IdentitySettings, Quoted, Settings, SpiffeId, SpireApi,
    SpireSettings,
};
use underpass_hbone::{
    CredentialsEvent, DelegatedIdentitySource, FileSource, HboneError, Identity, IdentitySource,
    IstioCa, IstioCaSource, LocalAuthority, LocalCaSource, Priority, WorkloadApiSource,
};
use underpass_interception::{NamespaceAccess, Sockets};

use crate::admin::readiness::Readiness;
use crate::node::identities::{Identities, Issuer};
use crate::node::pod_error::PodError;
use crate::node::received_identities::ReceivedIdentities;
use crate::observe::metrics;
use crate::process::supervise::Supervisor;
use crate::traffic::dial::PlainDialer;

/// The configured source of certificates. Logs and counts its events, and makes the proxy unready
/// while it has no valid certificate.
#[derive(Debug)]
pub(crate) struct Certificates {
    issuer: Origin,
    /// The name of the issuer in the log.
    origin: String,
    watcher: FileWatcher,
    /// The readiness of a process with one certificate. A node daemon has none here: its pods have
    /// their own status.
    readiness: Option<Readiness>,
}

#[derive(Debug)]
enum Origin {
    Files(IdentityFiles),
    LocalCa(Arc<LocalAuthority>),
    /// A source that only another process can use ([`broker_issues`]).
    Received(Arc<ReceivedIdentities>),
    IstioCa(Arc<IstioCa<PlainDialer>>),
    Spire(SpireSettings),
}

impl Certificates {
    /// Starts the configured identities; `None` turns HBONE off. `received` replaces the sources
    /// that a broker uses.
    pub(crate) fn identities(
        settings: &Settings,
        access: &NamespaceAccess,
        sockets: &Sockets,
        received: Option<Arc<ReceivedIdentities>>,
        readiness: Option<&Readiness>,
        watcher: &FileWatcher,
        supervisor: &Supervisor,
    ) -> Result<Option<Identities>, PodError> {
        let Some(identity) = &settings.identity else {
            tracing::warn!("no certificate (identity.*): HBONE is off, inbound and outbound");
            return Ok(None);
        };
        let certificates = Self {
            issuer: issuer(identity, received, || PlainDialer {
                access: access.clone(),
                sockets: sockets.clone(),
            })
            .map_err(PodError::Identity)?,
            origin: origin(identity),
            watcher: watcher.clone(),
            readiness: readiness.cloned(),
        };
        let (issuer, supervisor) = (Arc::new(certificates), supervisor.clone());
        let identities = Identities::new(issuer, &settings.trust, watcher, supervisor);
        identities.map(Some).map_err(PodError::Identity)
    }
}

/// Whether certificates come from files or a local CA, so that a mistake can fail the start before
/// rules are installed.
pub(crate) fn is_local(settings: &Settings) -> bool {
    matches!(&settings.identity, Some(IdentitySettings::Files(_) | IdentitySettings::LocalCa(_)))
}

/// Gets one certificate for `id` from the source, as a start does.
///
/// # Errors
/// The source has issued no usable certificate.
pub(crate) async fn first_identity(
    source: &IdentitySettings,
    id: &SpiffeId,
    dialer: PlainDialer,
    watcher: &FileWatcher,
) -> Result<Identity, HboneError> {
    issuer(source, None, || dialer)?.source(id, watcher).next().await
}

/// Whether a broker gets the certificates: the proxy process must not have the key of a CA, nor the
/// connection to the admin socket of SPIRE, and it may not be permitted to read the files.
pub(crate) fn broker_issues(identity: &IdentitySettings) -> bool {
    match identity {
        IdentitySettings::Files(_) | IdentitySettings::LocalCa(_) => true,
        IdentitySettings::Spire(spire) => spire.api == SpireApi::DelegatedIdentity,
        IdentitySettings::IstioCa(_) => false,
    }
}

fn issuer(
    identity: &IdentitySettings,
    received: Option<Arc<ReceivedIdentities>>,
    dialer: impl FnOnce() -> PlainDialer,
) -> Result<Origin, HboneError> {
    if let Some(received) = received.filter(|_| broker_issues(identity)) {
        return Ok(Origin::Received(received));
    }
    Ok(match identity {
        IdentitySettings::Files(files) => Origin::Files(files.clone()),
        IdentitySettings::LocalCa(ca) => Origin::LocalCa(Arc::new(LocalAuthority::new(ca.clone()))),
        IdentitySettings::IstioCa(ca) => {
            Origin::IstioCa(Arc::new(IstioCa::new(ca.clone(), dialer())?))
        }
        IdentitySettings::Spire(spire) => Origin::Spire(spire.clone()),
    })
}

/// The name of the source of a certificate, in the log and in errors.
pub(crate) fn origin(identity: &IdentitySettings) -> String {
    match identity {
        IdentitySettings::Files(files) => files.certificate.display().to_string(),
        IdentitySettings::LocalCa(ca) => ca.dir.display().to_string(),
        IdentitySettings::IstioCa(ca) => ca.address.clone(),
        IdentitySettings::Spire(spire) => spire.socket.display().to_string(),
    }
}

impl Origin {
    fn source(&self, id: &SpiffeId, watcher: &FileWatcher) -> Box<dyn IdentitySource> {
        match self {
            Self::Files(files) => Box::new(FileSource::new(files.clone(), watcher)),
            Self::LocalCa(ca) => Box::new(LocalCaSource::new(ca.clone(), id.clone())),
            Self::Received(received) => received.source(id),
            Self::IstioCa(ca) => {
                Box::new(IstioCaSource::new(ca.clone(), id.clone(), Priority::RealTime))
            }
            Self::Spire(spire) => match spire.api {
                SpireApi::Workload => Box::new(WorkloadApiSource::new(spire.clone(), id.clone())),
                SpireApi::DelegatedIdentity => {
                    Box::new(DelegatedIdentitySource::new(spire.clone(), id.clone()))
                }
            },
        }
    }
}

impl Issuer for Certificates {
    fn source(&self, id: &SpiffeId) -> Box<dyn IdentitySource> {
        self.issuer.source(id, &self.watcher)
    }

    fn report(&self, id: &SpiffeId, event: &CredentialsEvent<'_>) {
        match event {
            CredentialsEvent::Identity(credentials) => {
                self.report_in_use(id, credentials.identity());
            }
            CredentialsEvent::Trust(_) => {
                tracing::info!("trust bundles and revocation lists reloaded");
            }
            CredentialsEvent::Failed(error) => report_failure(Some(id), error),
            CredentialsEvent::Expiring { credentials, left } => {
                tracing::warn!(
                    from = self.origin,
                    identity = %credentials.identity().spiffe_id(),
                    expires_in = ?whole_seconds(*left),
                    "the certificate expires soon and is not renewed yet"
                );
            }
            CredentialsEvent::Expired(error) => {
                self.set_expired(true);
                metrics::certificate_failed();
                tracing::error!(
                    from = self.origin,
                    workload = %id,
                    error = %Quoted::chain(*error),
                    hint = error.hint().as_deref(),
                    "the certificate has expired: every HBONE connection of its workload fails until it is renewed"
                );
            }
        }
    }

    fn ended(&self, id: &SpiffeId) {
        metrics::certificate_ended(id);
    }

    fn report_trust_failure(&self, error: &HboneError) {
        report_failure(None, error);
    }
}

impl Certificates {
    fn set_expired(&self, has_expired: bool) {
        if let Some(readiness) = &self.readiness {
            readiness.certificate_expired(has_expired);
        }
    }

    fn report_in_use(&self, workload: &SpiffeId, identity: &Identity) {
        self.set_expired(false);
        metrics::certificate_renewed(workload, identity.spiffe_id(), identity.expires());
        if identity.spiffe_id() != workload {
            tracing::warn!(
                certificate = %identity.spiffe_id(), %workload,
                "the certificate's identity differs from the workload in the settings: peers see the identity of the certificate"
            );
            return;
        }
        let left = identity.expires().duration_since(SystemTime::now()).unwrap_or_default();
        let expires_in = whole_seconds(left);
        tracing::info!(identity = %identity.spiffe_id(), ?expires_in, "certificate in use");
    }
}

pub(crate) fn report_failure(workload: Option<&SpiffeId>, error: &HboneError) {
    metrics::certificate_failed();
    tracing::error!(
        workload = workload.map(tracing::field::display),
        error = %Quoted::chain(error),
        hint = error.hint().as_deref(),
        "cannot get a certificate or the trust bundle: the current one, if any, stays in use"
    );
}

fn whole_seconds(duration: Duration) -> Duration {
    Duration::from_secs(duration.as_secs())
}

/// Warns of those files that this process cannot read again when they change. Called after it has
/// dropped its privileges.
pub(crate) fn warn_if_unreadable(settings: &Settings, files: &[PathBuf]) {
    let unreadable = |file: &&PathBuf| {
        File::open(file).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    };
    for file in files.iter().filter(unreadable) {
        let file = file.display();
        if matches!(&settings.identity, Some(IdentitySettings::LocalCa(_))) {
            tracing::warn!(
                %file,
                "the proxy's user cannot read this file: certificates are renewed, but a changed CA takes effect at the next start"
            );
        } else {
            tracing::warn!(
                %file,
                hint = "give the file to the proxy's user",
                "the proxy's user cannot read this file: a renewed certificate takes effect at the next start"
            );
        }
    }
}

/// The files from which a broker gets certificates, or a process without one. They are read again
/// when they change.
pub(crate) fn issuer_files(settings: &Settings) -> Vec<PathBuf> {
    match &settings.identity {
        Some(IdentitySettings::Files(files)) => {
            vec![files.certificate.clone(), files.key.clone(), files.roots.clone()]
        }
        Some(IdentitySettings::LocalCa(ca)) => {
            vec![ca.dir.join("ca.key"), ca.dir.join("ca.pem")]
        }
        Some(IdentitySettings::IstioCa(_) | IdentitySettings::Spire(_)) | None => Vec::new(),
    }
}

/// The other files that are read again when they change. With a broker only the proxy process reads
/// them.
pub(crate) fn proxy_files(settings: &Settings) -> Vec<PathBuf> {
    let mut files = Vec::new();
    if let Some(IdentitySettings::IstioCa(ca)) = &settings.identity {
        files.extend([ca.roots.clone(), ca.token.clone()]);
    }
    files.extend(settings.trust.bundles.iter().map(|bundle| bundle.file.clone()));
    files.extend(settings.trust.crls.iter().cloned());
    files.extend(settings.mesh_file.clone());
    if let Some(xds) = &settings.xds {
        files.push(xds.roots.clone());
        files.extend(xds.token.clone());
        files.extend(xds.client.iter().flat_map(|(certificate, key)| [certificate, key]).cloned());
    }
    files
}
