//! Verifies the peer's identity during the handshake: a wrong server does not receive our
//! certificate, and a wrong peer receives no HTTP/2.
//!
//! `trust::authorities` has the rules.

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

/// The verified identity of a peer: proven in a handshake, or by a certificate whose key is in this
/// process. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerIdentity(Arc<VerifiedIdentity>);

#[derive(Debug, PartialEq, Eq, Hash)]
struct VerifiedIdentity {
    id: SpiffeId,
    aliases: Arc<[TrustDomain]>,
}

/// A peer with its certificate chain, which is verified again when trust changes. rustls limits the
/// chain to 64 KiB.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) identity: PeerIdentity,
    /// The expiry of the leaf certificate.
    pub(crate) expires: SystemTime,
    /// True if the handshake resumed a session.
    pub(crate) resumed: bool,
    chain: Vec<CertificateDer<'static>>,
    expected: ExpectedPeer,
    /// The time of the verification. Later verifications use it too, and so ignore expiry.
    verified_at: UnixTime,
}

/// The errors of both sides after one side rejected the other's certificate chain.
#[derive(Debug)]
pub(crate) struct RejectedPeer {
    pub(crate) reason: HboneError,
    pub(crate) seen_by_peer: HboneError,
}

/// Verifies a server against the expected identities, or a client against known trust domains.
#[derive(Debug)]
pub(super) struct Verifier {
    pub(super) authorities: Arc<Authorities>,
    pub(super) expected: ExpectedPeer,
}

impl PeerIdentity {
    /// The SPIFFE ID in the peer's certificate. An alias of our trust domain is not translated.
    pub fn spiffe_id(&self) -> &SpiffeId {
        &self.0.id
    }

    /// All names of the peer's trust domain, if it is ours and has aliases. A policy may use any of
    /// them.
    pub fn aliases(&self) -> &Arc<[TrustDomain]> {
        &self.0.aliases
    }
}

impl Peer {
    /// The peer of a finished handshake. Verifies the chain of a resumed session again, since time
    /// has passed.
    pub(super) fn of(connection: &CommonState, verifier: &Verifier) -> Result<Self, HboneError> {
        let chain = connection.peer_certificates().ok_or(HboneError::NoPeerCertificate)?;
        let (leaf, intermediates) = chain.split_first().ok_or(HboneError::NoPeerCertificate)?;
        let Verifier { authorities, expected } = verifier;
        let verified_at = clock::unix(clock::now());
        let resumed = connection.handshake_kind() == Some(HandshakeKind::Resumed);
        let id = if resumed {
            authorities
                .verify_peer(leaf, intermediates, expected, verified_at)
                .map_err(rejection)?
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
            verified_at,
        })
    }

    /// The peer for a connection to another identity of this process. `chain` starts with that
    /// identity's certificate.
    pub(crate) fn of_chain(
        chain: &[CertificateDer<'static>],
        authorities: &Authorities,
        expected: ExpectedPeer,
    ) -> Result<Self, Box<RejectedPeer>> {
        let rejected = |error: Error| {
            let seen_by_peer = rejection_seen_by_peer(&error);
            Box::new(RejectedPeer { reason: rejection(error), seen_by_peer })
        };
        let verified_at = clock::unix(clock::now());
        let (leaf, intermediates) =
            chain.split_first().ok_or_else(|| rejected(Error::NoCertificatesPresented))?;
        let id = authorities
            .verify_peer(leaf, intermediates, &expected, verified_at)
            .map_err(rejected)?;
        Ok(Self {
            identity: PeerIdentity(Arc::new(VerifiedIdentity {
                aliases: authorities.aliases(&id),
                id,
            })),
            expires: expiry(leaf),
            resumed: false,
            chain: chain.to_vec(),
            expected,
            verified_at,
        })
    }

    /// The error with which a handshake under `authorities` would reject this peer. `None` if it
    /// would accept the peer, or cannot decide. Ignores expiry: a tunnel may outlive its
    /// certificates.
    pub(crate) fn distrusted(&self, authorities: &Authorities) -> Option<HboneError> {
        let (leaf, intermediates) = self.chain.split_first()?;
        let judged = authorities.verify_peer(leaf, intermediates, &self.expected, self.verified_at);
        match judged.map_err(rejection).err()? {
            // The problem is in the lists, not in the peer: only new handshakes are refused.
            HboneError::RevocationUnknown { .. }
            | HboneError::RevocationListExpired { .. }
            | HboneError::RevocationListUntrusted { .. } => None,
            reason => Some(reason),
        }
    }
}

/// The expiry of a leaf certificate. A malformed one, which verification rejects, counts as
/// expired.
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
        self.authorities.verify_peer(end_entity, intermediates, &self.expected, now)?;
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
    /// Sends no names of roots: a client has only one certificate, and the names would disclose
    /// federated domains.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.authorities.verify_peer(end_entity, intermediates, &self.expected, now)?;
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
