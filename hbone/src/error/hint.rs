//! The hints of this crate's errors: actions for the operator.
//!
//! A failure with several possible causes has a hint for each, selected by the error of the kernel,
//! of rustls, or by the peer's alert.

use std::borrow::Cow;
use std::io;

use http::StatusCode;
use rustls::{CertificateError, Error};
use underpass_config::Hint;

use super::{CredentialProblem, HboneError, IssuerProblem, RequestProblem};

impl Hint for HboneError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::BackingOff { source, .. } | Self::BehindGateway { source, .. } => {
                return source.hint();
            }
            Self::Watch { source } | Self::Clients { source } => return source.hint(),
            Self::Credential { what, .. } => return what.hint(),
            Self::Issuer { what, .. } => return what.hint(),
            Self::RevocationUnknown { issuer } => {
                return Some(format!("add the revocation list of {issuer} to trust.crls").into());
            }
            Self::Dial { source, .. } => dial(source),
            Self::Tls { source } => tls(source),
            Self::CertificateRefused { alert } => refused(alert),
            Self::HandshakeTimeout { .. } => {
                "check whether the peer is overloaded, or raise timeouts.handshake"
            }
            Self::UnexpectedPeer { .. } => {
                "check serviceAccount and trustDomain of the peer in the mesh file"
            }
            Self::NotSvid { .. } | Self::InvalidCertificate { .. } => {
                "check the authority that issued the peer's certificate"
            }
            Self::PeerCertificateExpired { .. } => {
                "check that the peer's certificate is renewed and that both clocks are right"
            }
            Self::PeerCertificateNotYetValid { .. } => {
                "check the clocks of this host and of the issuer of the peer's certificate"
            }
            Self::UntrustedDomain { .. } => {
                "add its roots to trust.bundles, or its name to trust.aliases if it is another name of our own domain"
            }
            Self::Revoked => "issue a new certificate for the peer if it is still trusted",
            Self::RevocationListExpired { .. } => "replace the file by the issuer's current list",
            Self::RevocationListUntrusted { .. } => {
                "check that the peer's issuer signed the list in trust.crls, and that it may sign lists"
            }
            Self::NoPeerCertificate => "check that the peer is an HBONE client",
            Self::Refused { status } => refused_request(*status),
            Self::ReplyTimeout { .. } => {
                "check whether the peer can reach its workload, or raise timeouts.reply"
            }
            Self::RotationEnded => "restart the proxy and report this defect",
            Self::TunnelExpired { .. } => "check that certificates are renewed in time",
            Self::H2 { .. }
            | Self::Reset { .. }
            | Self::Lost { .. }
            | Self::Unresponsive { .. }
            | Self::PeerLimit { .. }
            | Self::InvalidAuthority { .. } => return None,
        };
        Some(fixed.into())
    }
}

impl Hint for CredentialProblem {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::Request(problem) => return problem.hint(),
            Self::NoRoots(domain) => {
                return Some(format!("add the roots of {domain} to the roots file").into());
            }
            Self::ForeignId { trust_domain, .. } => {
                return Some(format!("choose an identity in {trust_domain}").into());
            }
            Self::Io(_) => "check that the file exists and is readable",
            Self::Permission => {
                "give the user of this process access to the file; the capability DAC_OVERRIDE helps only at the start"
            }
            Self::Exists => "choose another directory",
            Self::Pem(_)
            | Self::Empty(_)
            | Self::Certificate(_)
            | Self::RevocationList(_)
            | Self::Key(_) => "check that this is the intended file, in PEM",
            Self::KeyMismatch => "use the key that belongs to the certificate",
            Self::UnknownIssuer(_) => {
                "use the roots of the authority that issued the certificate, and append its intermediate certificates"
            }
            Self::Svid(_) => "issue a certificate with one URI name, the workload's SPIFFE ID",
            Self::Authority(_) => {
                "use a CA certificate with one URI name, the SPIFFE ID of its trust domain"
            }
            Self::Expired(_) => "issue a new certificate",
            Self::NotYetValid(_) => "check the clocks of this host and of the issuer",
            Self::Token => "check that this is the intended file",
            Self::ServerName => "check the name",
            Self::ForeignIssuer => "use the authority that issued it",
            Self::Lifetime => "choose another lifetime",
            Self::Issue(_) => return None,
        };
        Some(fixed.into())
    }
}

impl Hint for RequestProblem {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::Malformed(_) => "send a certificate request in PEM",
            Self::Signature(_) => "sign the certificate request with its own key",
            Self::Key => "make the request with a key of another kind",
            Self::Names(_) => "make the request without other names",
        };
        Some(fixed.into())
    }
}

impl Hint for IssuerProblem {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::Address => "correct identity.istio_ca.address",
            Self::ServerName(_) => "correct identity.istio_ca.server_name",
            Self::ClusterId => "correct identity.istio_ca.cluster_id, which is sent in a header",
            Self::Connect => "check that the CA runs and that identity.istio_ca.address is right",
            Self::ConnectTimeout(_) => {
                "check identity.istio_ca.address, and that no firewall drops packets to it"
            }
            Self::Tls => {
                "check that identity.istio_ca.roots contains the root of the CA, and that its certificate names \
                 identity.istio_ca.server_name"
            }
            Self::HandshakeReset => {
                "check whether a proxy in the CA's pod refuses plaintext (mTLS strict, a policy); if so, add the CA's port \
                 to its interception.inbound.exclude_ports"
            }
            Self::Unauthenticated(_) => {
                "check that the token in identity.istio_ca.token is valid and made for this CA"
            }
            Self::Denied { .. } => {
                "check that the owner of the token may have this identity (identity.istio_ca.impersonate)"
            }
            Self::Unavailable(_) => "check that identity.istio_ca.address is the CA's",
            Self::Refused { .. } | Self::EmptyResponse(_) | Self::Answer(_) => "read the CA's log",
            Self::WrongIdentity { .. } => {
                "check whose token identity.istio_ca.token contains, or the SPIFFE ID of the registration entry in SPIRE"
            }
            Self::Agent => {
                "check that the SPIRE agent runs, and that identity.spire.socket is its socket, or identity.spire.admin_socket its \
                 admin socket"
            }
            Self::NotRegistered => {
                "add a registration entry whose selectors match this process, or with identity.spire.admin_socket the pod \
                 (k8s:ns:NAMESPACE and k8s:sa:ACCOUNT)"
            }
            Self::NotDelegate(_) => {
                "add a registration entry for this process, and its SPIFFE ID to authorized_delegates of the agent"
            }
            Self::Lost | Self::ReplyTimeout(_) | Self::AgentTimeout(_) | Self::AgentClosed => {
                return None;
            }
        };
        Some(fixed.into())
    }
}

/// The hint for a failed connect to a peer's HBONE port.
fn dial(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::TimedOut => {
            "check that the host is up and that no firewall drops packets to its HBONE port (timeouts.connect)"
        }
        io::ErrorKind::ConnectionRefused => {
            "check that the peer's proxy runs: the mesh says `protocol: HBONE`, so an HBONE proxy is expected there"
        }
        _ => "check that there is a route to the peer, and that no firewall rejects its HBONE port",
    }
}

/// The hint for a CONNECT request that the peer answered with `status`.
fn refused_request(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            "check the policies of the destination: the peer's log names the one that denies, or says that none allows"
        }
        StatusCode::BAD_REQUEST => {
            "check that the mesh gives the destination's address to the workload of that peer: its log contains the reason"
        }
        StatusCode::SERVICE_UNAVAILABLE => {
            "check that the destination listens on this port: the peer's log contains the reason"
        }
        _ => "read the peer's log, which contains the reason",
    }
}

/// The hint for a TLS handshake that failed on our side.
fn tls(error: &io::Error) -> &'static str {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(Error::InvalidMessage(_)) => {
            "HBONE (TLS 1.3 with h2) is expected at this port: check whether another program listens there, or remove \
             `protocol: HBONE` from the mesh if the peer has no HBONE proxy"
        }
        Some(Error::InvalidCertificate(
            CertificateError::UnknownIssuer
            | CertificateError::BadSignature
            | CertificateError::UnsupportedSignatureAlgorithmContext { .. },
        )) => {
            "compare our roots of the peer's trust domain (identity.roots, or trust.bundles for another domain) with the \
             issuer of its certificate"
        }
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            "check that an HBONE proxy listens there, and read its log"
        }
        _ => {
            "check that both sides speak TLS 1.3 with h2 and have roots of each other's trust domain"
        }
    }
}

/// The hint for a handshake that the peer refused with `alert`.
fn refused(alert: &str) -> &'static str {
    match alert {
        "UnknownCA" | "DecryptError" => {
            "compare the peer's roots of our trust domain (identity.roots there, or trust.bundles if the domain is not \
             its own) with the issuer of our certificate"
        }
        "CertificateExpired" => {
            "check that our certificate is renewed and that both clocks are right"
        }
        "CertificateRevoked" => {
            "issue a new certificate: a revocation list of the peer contains ours (trust.crls there)"
        }
        "CertificateRequired" => "set identity here: the peer requires a certificate",
        "CertificateUnknown" | "AccessDenied" => {
            "check that the peer has roots of our trust domain (trust.bundles, trust.aliases), and that its mesh file \
             gives our address this identity (serviceAccount, trustDomain)"
        }
        _ => "read the peer's log",
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use rustls::InvalidMessage;

    use super::*;
    use crate::error::Fault;

    fn rustls(error: Error) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, error)
    }

    #[test]
    fn hint_of_port_without_hbone_names_expected_protocol() {
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        assert!(dial(&refused).contains("an HBONE proxy is expected"));
        let garbage = rustls(Error::InvalidMessage(InvalidMessage::InvalidContentType));
        assert!(tls(&garbage).contains("HBONE (TLS 1.3 with h2) is expected at this port"));
    }

    #[test]
    fn hint_of_refused_request_follows_from_status() {
        let hint = |status| HboneError::Refused { status }.hint().unwrap_or_default();
        assert!(hint(StatusCode::UNAUTHORIZED).contains("policies"));
        assert!(hint(StatusCode::SERVICE_UNAVAILABLE).contains("listens on this port"));
        assert!(hint(StatusCode::IM_A_TEAPOT).contains("the peer's log"));
    }

    #[test]
    fn hint_of_unknown_issuer_names_roots_of_both_sides() {
        let unknown = rustls(Error::InvalidCertificate(CertificateError::UnknownIssuer));
        assert!(tls(&unknown).contains("(identity.roots"));
        assert!(refused("UnknownCA").contains("(identity.roots"));
    }

    #[test]
    fn wrapping_error_has_hint_of_its_cause() {
        let source = Arc::new(io::Error::from(io::ErrorKind::ConnectionRefused));
        let address = SocketAddr::from(([10, 0, 0, 1], 15008));
        let dial = HboneError::Dial { address, source };
        let hint = dial.hint();
        let outer = HboneError::BehindGateway { gateway: address, source: Arc::new(dial) };
        assert!(hint.is_some() && outer.hint() == hint);
    }

    #[test]
    fn every_error_of_configuration_has_a_hint() {
        let problems = [
            CredentialProblem::Permission,
            CredentialProblem::Exists,
            CredentialProblem::KeyMismatch,
            CredentialProblem::Token,
        ];
        let credentials =
            problems.into_iter().map(|problem| HboneError::credential("key.pem", problem));
        let issuers = [IssuerProblem::Address, IssuerProblem::ClusterId]
            .map(|what| HboneError::Issuer { issuer: "https://ca".to_owned(), what, source: None });
        let others = [
            HboneError::CertificateRefused { alert: "UnknownCA".to_owned() },
            HboneError::RevocationUnknown { issuer: "CN=ca".into() },
        ];
        for error in credentials.chain(issuers).chain(others) {
            assert_eq!(error.fault(), Fault::Configuration);
            let (message, hint) = (error.to_string(), error.hint().unwrap_or_default());
            assert!(!hint.is_empty() && !message.contains(&*hint), "{message}");
        }
    }
}
