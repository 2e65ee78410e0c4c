//! Hints for failures with several causes, derived from the error of the kernel, rustls or the
//! peer's alert.

use std::io;
use std::net::SocketAddr;

use rustls::{CertificateError, Error};

/// A hint for a failed connect to a peer's HBONE port.
pub(super) fn dial(address: SocketAddr, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::TimedOut => format!(
            "no answer from {address} (timeouts.connect): is the host up, and does no firewall drop packets to its HBONE port?"
        ),
        io::ErrorKind::ConnectionRefused => format!(
            "cannot connect to {address}: nothing listens there, and an HBONE proxy is expected, since the mesh says \
             `protocol: HBONE`: does the peer's proxy run?"
        ),
        _ => format!(
            "cannot connect to {address}: does the peer listen for HBONE, and is the port open on the way?"
        ),
    }
}

/// A hint for a TLS handshake that failed on our side.
pub(super) fn tls(error: &io::Error) -> &'static str {
    const NO_HBONE: &str = "the peer does not speak it: HBONE (TLS 1.3 with h2) is expected at this port; does another \
                            program listen there, or does the mesh say `protocol: HBONE` where there is none?";
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(Error::InvalidMessage(_)) => NO_HBONE,
        Some(Error::InvalidCertificate(
            CertificateError::UnknownIssuer
            | CertificateError::BadSignature
            | CertificateError::UnsupportedSignatureAlgorithmContext { .. },
        )) => {
            "none of our roots of the peer's trust domain has issued its certificate: compare them (identity.roots, or \
             trust.bundles for another domain) with the peer's issuer"
        }
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            "the peer closed the connection: is it an HBONE proxy, and what does its log say?"
        }
        _ => {
            "do both sides speak TLS 1.3 with h2, and have the same roots for the other's trust domain?"
        }
    }
}

/// A hint for a refusal by the peer. underpass and ztunnel send the alerts of rustls.
pub(super) fn refused(alert: &str) -> &'static str {
    match alert {
        "UnknownCA" | "DecryptError" => {
            "it has other roots for our trust domain: compare its roots (identity.roots, or trust.bundles if the domain is \
             not its own) with the issuer of our certificate"
        }
        "CertificateExpired" => {
            "it has expired by the peer's clock: is it renewed, and are both clocks right?"
        }
        "CertificateRevoked" => "a revocation list of the peer has it (trust.crls there)",
        "CertificateRequired" => "it wants one and got none: is identity set here?",
        "CertificateUnknown" | "AccessDenied" => {
            "it does not accept our name: has it roots of our trust domain (trust.bundles, trust.aliases), and does its mesh \
             file give our address this identity (serviceAccount, trustDomain)?"
        }
        _ => "see the peer's log",
    }
}

#[cfg(test)]
mod tests {
    use rustls::InvalidMessage;

    use super::*;

    fn rustls(error: Error) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, error)
    }

    #[test]
    fn names_what_is_expected_where_no_hbone_is_spoken() {
        let address = SocketAddr::from(([10, 0, 0, 1], 15008));
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        assert!(dial(address, &refused).contains("an HBONE proxy is expected"));
        let garbage = rustls(Error::InvalidMessage(InvalidMessage::InvalidContentType));
        assert!(tls(&garbage).contains("HBONE (TLS 1.3 with h2) is expected at this port"));
    }

    #[test]
    fn names_the_roots_on_both_sides_of_an_unknown_issuer() {
        let unknown = rustls(Error::InvalidCertificate(CertificateError::UnknownIssuer));
        assert!(tls(&unknown).contains("compare them (identity.roots"));
        assert!(refused("UnknownCA").contains("compare its roots (identity.roots"));
    }
}
