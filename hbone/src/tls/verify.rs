//! Verifies the peer's identity inside the handshake: a wrong server never receives our
//! certificate, and no HTTP/2 is sent to a wrong peer.
//!
//! Not here: the rules of verification (`trust/authorities.rs`).

use std::sync::Arc;
use std::time::SystemTime;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::verify_tls13_signature;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CommonState, DigitallySignedStruct, DistinguishedName, Error, HandshakeKind, PeerIncompatible,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use underpass_config::{SpiffeId, TrustDomain};

use super::{rejection, rejection_seen_by_peer};
use crate::clock;
use crate::error::{ExpectedPeer, HboneError};
use crate::identity::svid::workload_id;
use crate::identity::system_time;
use crate::trust::Authorities;

/// A peer's identity, proven in a TLS handshake, or by a chain whose key is in this process. Cheap
/// to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerIdentity(Arc<VerifiedIdentity>);

#[derive(Debug, PartialEq, Eq, Hash)]
struct VerifiedIdentity {
    id: SpiffeId,
    aliases: Arc<[TrustDomain]>,
}

/// A peer and its certificate chain, which is verified again when trust changes. rustls limits the
/// chain to 64 KiB.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) identity: PeerIdentity,
    /// The expiry of its leaf.
    pub(crate) expires: SystemTime,
    /// Whether this handshake resumed an earlier session.
    pub(crate) resumed: bool,
    chain: Vec<CertificateDer<'static>>,
    expected: ExpectedPeer,
    proven: UnixTime,
}

/// The errors of both ends after one has rejected the chain of the other.
#[derive(Debug)]
pub(crate) struct RejectedPeer {
    pub(crate) reason: HboneError,
    pub(crate) seen_by_peer: HboneError,
}

/// Verifies the expected servers, or clients of known trust domains.
#[derive(Debug)]
pub(super) struct Verifier {
    pub(super) authorities: Arc<Authorities>,
    pub(super) expected: ExpectedPeer,
}

impl PeerIdentity {
    /// The SPIFFE ID in the peer's certificate, even if its trust domain is an alias of ours.
    pub fn spiffe_id(&self) -> &SpiffeId {
        &self.0.id
    }

    /// All names of the peer's trust domain if it is ours and has aliases. Policies may name the
    /// peer with each of them.
    pub fn aliases(&self) -> &Arc<[TrustDomain]> {
        &self.0.aliases
    }
}

impl Peer {
    /// The peer of a finished handshake. The chain of a resumed session is verified again, since
    /// time has passed.
    pub(super) fn of(connection: &CommonState, verifier: &Verifier) -> Result<Self, HboneError> {
        let chain = connection.peer_certificates().ok_or(HboneError::NoPeerCertificate)?;
        let (leaf, intermediates) = chain.split_first().ok_or(HboneError::NoPeerCertificate)?;
        let Verifier { authorities, expected } = verifier;
        let proven = clock::unix(clock::now());
        let resumed = connection.handshake_kind() == Some(HandshakeKind::Resumed);
        let id = if resumed {
            authorities.judge(leaf, intermediates, expected, proven).map_err(rejection)?
        } else {
            // The handshake has verified the chain already.
            workload_id(leaf).map_err(|problem| HboneError::NotSvid { problem })?
        };
        Ok(Self {
            identity: PeerIdentity(Arc::new(VerifiedIdentity {
                aliases: authorities.aliases(&id),
                id,
            })),
            expires: expiry(leaf),
            resumed,
            chain: chain.iter().map(|der| der.clone().into_owned()).collect(),
            expected: expected.clone(),
            proven,
        })
    }

    /// The peer that results from a handshake with another identity of this process, whose
    /// certificate is the first of `chain`.
    pub(crate) fn of_chain(
        chain: &[CertificateDer<'static>],
        authorities: &Authorities,
        expected: ExpectedPeer,
    ) -> Result<Self, Box<RejectedPeer>> {
        let rejected = |error: Error| {
            let seen_by_peer = rejection_seen_by_peer(&error);
            Box::new(RejectedPeer { reason: rejection(error), seen_by_peer })
        };
        let proven = clock::unix(clock::now());
        let (leaf, intermediates) =
            chain.split_first().ok_or_else(|| rejected(Error::NoCertificatesPresented))?;
        let id = authorities.judge(leaf, intermediates, &expected, proven).map_err(rejected)?;
        Ok(Self {
            identity: PeerIdentity(Arc::new(VerifiedIdentity {
                aliases: authorities.aliases(&id),
                id,
            })),
            expires: expiry(leaf),
            resumed: false,
            chain: chain.to_vec(),
            expected,
            proven,
        })
    }

    /// The error with which `authorities` would have rejected the peer at its handshake; `None` if
    /// they would not, or cannot tell. Later expiry is ignored: a tunnel may outlive its
    /// certificates.
    pub(crate) fn distrusted(&self, authorities: &Authorities) -> Option<HboneError> {
        let (leaf, intermediates) = self.chain.split_first()?;
        let judged = authorities.judge(leaf, intermediates, &self.expected, self.proven);
        match judged.map_err(rejection).err()? {
            // An error of the lists, not of the peer. New handshakes are refused for it.
            HboneError::RevocationUnknown { .. }
            | HboneError::RevocationListExpired { .. }
            | HboneError::RevocationListUntrusted { .. } => None,
            reason => Some(reason),
        }
    }
}

/// A malformed leaf is rejected elsewhere; here it counts as expired.
fn expiry(leaf: &CertificateDer<'_>) -> SystemTime {
    let parsed = x509_parser::parse_x509_certificate(leaf);
    parsed.map_or(SystemTime::UNIX_EPOCH, |(_, leaf)| system_time(leaf.validity().not_after))
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.authorities.judge(end_entity, intermediates, &self.expected, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, self.authorities.algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.authorities.algorithms().supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    /// None: a client has only one certificate, and our federated domains stay private.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.authorities.judge(end_entity, intermediates, &self.expected, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, self.authorities.algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.authorities.algorithms().supported_schemes()
    }
}
