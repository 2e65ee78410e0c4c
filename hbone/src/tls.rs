//! TLS 1.3 for HBONE: both sides authenticate by SPIFFE identities, the client sends no SNI, and
//! ALPN is `h2`.
//!
//! The caller passes the expected identities.

mod client;
mod record;
mod server;
mod sessions;
mod verify;

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::{AlertDescription, CertificateError, CommonState};

use crate::error::HboneError;

pub(crate) use self::client::ClientTls;
pub(crate) use self::record::TlsStream;
#[cfg(feature = "fuzz")]
pub(crate) use self::record::run_script;
pub(crate) use self::server::ServerTls;
pub use self::verify::PeerIdentity;
pub(crate) use self::verify::{Peer, RejectedPeer};

pub(crate) const ALPN: &[u8] = b"h2";

/// The cause of a connection's error, which h2 discards: the peer's alert, or the error of the
/// outer tunnel.
pub(crate) fn known_error(error: &io::Error) -> Option<HboneError> {
    match inner(error) {
        Some(rustls::Error::AlertReceived(alert)) => Some(error_of_alert(*alert, error)),
        Some(_) => None,
        None => HboneError::carried_by(error),
    }
}

fn handshake_error(error: io::Error) -> HboneError {
    let specific = match inner(&error) {
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(other))) => {
            other.0.downcast_ref::<HboneError>().cloned()
        }
        Some(rustls::Error::InvalidCertificate(CertificateError::ExpiredContext {
            not_after,
            ..
        })) => Some(HboneError::PeerCertificateExpired {
            expired: SystemTime::UNIX_EPOCH + Duration::from_secs(not_after.as_secs()),
        }),
        Some(rustls::Error::InvalidCertificate(CertificateError::NotValidYetContext {
            not_before,
            ..
        })) => Some(HboneError::PeerCertificateNotYetValid {
            begins: SystemTime::UNIX_EPOCH + Duration::from_secs(not_before.as_secs()),
        }),
        Some(rustls::Error::InvalidCertificate(CertificateError::Revoked)) => {
            Some(HboneError::Revoked)
        }
        Some(rustls::Error::NoCertificatesPresented) => Some(HboneError::NoPeerCertificate),
        Some(rustls::Error::AlertReceived(alert)) => Some(error_of_alert(*alert, &error)),
        Some(_) => None,
        None => HboneError::carried_by(&error),
    };
    specific.unwrap_or_else(|| HboneError::Tls { source: Arc::new(error) })
}

/// Converts an error that rustls returns after the handshake.
pub(crate) fn rejection(error: rustls::Error) -> HboneError {
    handshake_error(io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Converts our reason to reject the peer into the error that the peer reports, which receives only
/// an alert.
fn rejection_seen_by_peer(error: &rustls::Error) -> HboneError {
    let alert = match error {
        rustls::Error::InvalidCertificate(invalid) => invalid.clone().into(),
        _ => AlertDescription::CertificateUnknown,
    };
    let error = io::Error::new(io::ErrorKind::InvalidData, rustls::Error::AlertReceived(alert));
    error_of_alert(alert, &error)
}

fn inner(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

fn error_of_alert(alert: AlertDescription, error: &io::Error) -> HboneError {
    use AlertDescription as Alert;
    match alert {
        Alert::BadCertificate
        | Alert::UnsupportedCertificate
        | Alert::CertificateRevoked
        | Alert::CertificateExpired
        | Alert::CertificateUnknown
        | Alert::CertificateRequired
        | Alert::UnknownCA
        // Two meshes may both be called cluster.local: roots with the same name and different keys.
        | Alert::DecryptError
        | Alert::AccessDenied => HboneError::CertificateRefused {
            alert: format!("{alert:?}"),
        },
        other => {
            let source = io::Error::new(error.kind(), rustls::Error::AlertReceived(other));
            HboneError::Tls {
                source: Arc::new(source),
            }
        }
    }
}

/// RFC 7301 allows connections without ALPN. Reject them, because their client may send HTTP/1.
fn require_h2(connection: &CommonState) -> Result<(), HboneError> {
    match connection.alpn_protocol() {
        Some(ALPN) => Ok(()),
        _ => Err(tls_error(rustls::Error::NoApplicationProtocol)),
    }
}

fn tls_error(error: rustls::Error) -> HboneError {
    HboneError::Tls { source: Arc::new(io::Error::new(io::ErrorKind::InvalidData, error)) }
}

#[cfg(test)]
mod tests;
