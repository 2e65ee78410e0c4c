//! The workload's certificate in a proxy's life: where it comes from, and what is told as it is renewed.
//!
//! Not here: how each source works, and how often it renews (the hbone crate).

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use underpass_config::{IdentitySettings, Quoted, Settings, SpiffeId, TrustSettings};
use underpass_hbone::{
    Credentials, CredentialsEvent, FileSource, Identity, IdentitySource, IstioCa, IstioCaSource,
    Keeper, LocalCaSource, Priority, SpireSource,
};
use underpass_interception::Sockets;

use crate::cli::CommandError;
use crate::dial::PlainDialer;
use crate::endpoints::Readiness;
use crate::metrics;

/// The certificate of this proxy, from its settings to the last renewal.
pub(crate) enum Certificate {
    /// None is configured: HBONE is off.
    Off,
    /// To be asked for.
    Wanted(Wanted),
    /// There, and kept up to date for as long as the keeper runs.
    Held(Keeper, watch::Receiver<Credentials>),
}

/// A certificate to be asked for.
pub(crate) struct Wanted {
    source: Box<dyn IdentitySource>,
    trust: TrustSettings,
    reporter: Reporter,
}

/// Logs and counts what happens to the certificate, and makes the proxy unready while it has none
/// that is valid.
struct Reporter {
    workload: SpiffeId,
    /// Where the certificate comes from, as the log names it.
    origin: String,
    readiness: Readiness,
}

impl Certificate {
    /// Takes what lies in files at once, so that a mistake in them ends the start before rules are installed. Who must be
    /// asked for one over the network is asked later, by [`Certificate::hold`]: when the proxy's connections are told from
    /// the workload's.
    pub(crate) async fn prepare(
        settings: &Settings,
        sockets: &Sockets,
        readiness: &Readiness,
    ) -> Result<Self, CommandError> {
        let Some(identity) = &settings.identity else {
            tracing::warn!("no certificate (identity.*): HBONE is off, inbound and outbound");
            return Ok(Self::Off);
        };
        let workload = settings.workload.spiffe_id.clone();
        let wanted = Wanted {
            source: source(identity, &workload, sockets)?,
            trust: settings.trust.clone(),
            reporter: Reporter { workload, origin: origin(identity), readiness: readiness.clone() },
        };
        match identity {
            IdentitySettings::Files(_) | IdentitySettings::LocalCa(_) => wanted.hold().await,
            IdentitySettings::IstioCa(_) | IdentitySettings::Spire(_) => Ok(Self::Wanted(wanted)),
        }
    }

    /// Waits until it is there; for ever, if who issues it is away.
    pub(crate) async fn hold(self) -> Result<Self, CommandError> {
        match self {
            Self::Wanted(wanted) => wanted.hold().await,
            held => Ok(held),
        }
    }
}

impl Wanted {
    async fn hold(self) -> Result<Certificate, CommandError> {
        let Self { source, trust, reporter } = self;
        let report = move |event: CredentialsEvent<'_>| reporter.report(&event);
        let (keeper, credentials) =
            Keeper::start(source, trust, report).await.map_err(CommandError::Identity)?;
        Ok(Certificate::Held(keeper, credentials))
    }
}

fn source(
    identity: &IdentitySettings,
    workload: &SpiffeId,
    sockets: &Sockets,
) -> Result<Box<dyn IdentitySource>, CommandError> {
    let failed = CommandError::Identity;
    Ok(match identity {
        IdentitySettings::Files(files) => Box::new(FileSource::new(files.clone())),
        IdentitySettings::LocalCa(ca) => Box::new(LocalCaSource::new(ca.clone(), workload.clone())),
        IdentitySettings::IstioCa(ca) => {
            let dialer = PlainDialer { sockets: sockets.clone() };
            let client = IstioCa::new(ca.clone(), dialer).map_err(failed)?;
            Box::new(IstioCaSource::new(Arc::new(client), workload.clone(), Priority::RealTime))
        }
        IdentitySettings::Spire(spire) => {
            Box::new(SpireSource::new(spire.clone(), workload.clone()))
        }
    })
}

/// Where a certificate comes from, as the log names it.
fn origin(identity: &IdentitySettings) -> String {
    match identity {
        IdentitySettings::Files(files) => files.certificate.display().to_string(),
        IdentitySettings::LocalCa(ca) => ca.dir.display().to_string(),
        IdentitySettings::IstioCa(ca) => ca.address.clone(),
        IdentitySettings::Spire(spire) => spire.socket.display().to_string(),
    }
}

impl Reporter {
    fn report(&self, event: &CredentialsEvent<'_>) {
        match event {
            CredentialsEvent::Identity(credentials) => self.in_use(credentials.identity()),
            CredentialsEvent::Trust(_) => {
                tracing::info!("trust bundles and revocation lists read again");
            }
            CredentialsEvent::Failed(error) => {
                metrics::certificate_failed();
                tracing::error!(
                    error = %Quoted::chain(*error),
                    "no new certificate or trust; what is there stays"
                );
            }
            CredentialsEvent::Expiring { credentials, left } => {
                tracing::warn!(
                    from = self.origin,
                    identity = %credentials.identity().spiffe_id(),
                    expires_in = ?whole_seconds(*left),
                    "the certificate expires soon, and there is no new one yet"
                );
            }
            CredentialsEvent::Expired(error) => {
                self.readiness.certificate_expired(true);
                metrics::certificate_failed();
                tracing::error!(
                    from = self.origin,
                    error = %Quoted::chain(*error),
                    "the certificate has expired: every HBONE connection fails until there is a new one"
                );
            }
        }
    }

    fn in_use(&self, identity: &Identity) {
        self.readiness.certificate_expired(false);
        metrics::certificate_renewed(identity.expires());
        if identity.spiffe_id() != &self.workload {
            tracing::warn!(
                certificate = %identity.spiffe_id(), workload = %self.workload,
                "the certificate is for another workload than the settings name; peers see the certificate"
            );
            return;
        }
        let left = identity.expires().duration_since(SystemTime::now()).unwrap_or_default();
        let expires_in = whole_seconds(left);
        tracing::info!(identity = %identity.spiffe_id(), ?expires_in, "certificate in use");
    }
}

fn whole_seconds(duration: Duration) -> Duration {
    Duration::from_secs(duration.as_secs())
}

/// Warns of files that are read again later, and that the proxy cannot read any more: for when it
/// has given up its privileges.
pub(crate) fn warn_if_unreadable(settings: &Settings) {
    let unreadable = |file: &PathBuf| {
        File::open(file).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    };
    for file in read_again(settings).iter().filter(|file| unreadable(file)) {
        let file = file.display();
        if matches!(&settings.identity, Some(IdentitySettings::LocalCa(_))) {
            tracing::warn!(
                %file,
                "the proxy's user cannot read this file: a changed CA takes effect at the next start; certificates are renewed"
            );
        } else {
            tracing::warn!(
                %file,
                "the proxy's user cannot read this file: when it is renewed the proxy will not see it; chown it"
            );
        }
    }
}

fn read_again(settings: &Settings) -> Vec<PathBuf> {
    let mut files = match &settings.identity {
        Some(IdentitySettings::Files(files)) => {
            vec![files.certificate.clone(), files.key.clone(), files.roots.clone()]
        }
        Some(IdentitySettings::LocalCa(ca)) => vec![ca.dir.join("ca.key"), ca.dir.join("ca.pem")],
        Some(IdentitySettings::IstioCa(ca)) => vec![ca.roots.clone(), ca.token.clone()],
        Some(IdentitySettings::Spire(_)) | None => Vec::new(),
    };
    files.extend(settings.trust.bundles.iter().map(|bundle| bundle.file.clone()));
    files.extend(settings.trust.crls.iter().cloned());
    files.extend(settings.mesh_file.clone());
    files
}
