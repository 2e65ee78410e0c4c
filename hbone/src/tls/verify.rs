//! Who may be at the other end: the chain as webpki checks it, then the SPIFFE names of the leaf.
//!
//! Not here: the handshake. Names are looked at inside it, so that a wrong server never gets our
//! certificate, and neither side sends a byte of HTTP/2 to a wrong peer.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    PeerIncompatible, RootCertStore, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use underpass_config::{SpiffeId, TrustDomain};
use x509_parser::extensions::GeneralName;

use crate::{ExpectedPeer, HboneError};

/// A peer's identity, proven in a TLS handshake: nothing else can make one. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerIdentity(Arc<SpiffeId>);

impl PeerIdentity {
    /// Who the peer is.
    pub fn spiffe_id(&self) -> &SpiffeId {
        &self.0
    }
}

/// The client's view of a server: our roots, serverAuth, and one of the expected names.
#[derive(Debug, Clone)]
pub(super) struct ServerVerifier {
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
    expected: Arc<[SpiffeId]>,
}

/// The server's view of a client: our roots, clientAuth, and a name of our trust domain.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    trust_domain: TrustDomain,
}

impl ServerVerifier {
    /// Expects nobody: see [`Self::expecting`].
    pub(super) fn new(roots: Arc<RootCertStore>, provider: &CryptoProvider) -> Self {
        let algorithms = provider.signature_verification_algorithms;
        Self { roots, algorithms, expected: Arc::new([]) }
    }

    pub(super) fn expecting(&self, expected: Arc<[SpiffeId]>) -> Self {
        Self { expected, ..self.clone() }
    }
}

impl ClientVerifier {
    pub(super) fn new(chain: Arc<dyn ClientCertVerifier>, trust_domain: TrustDomain) -> Self {
        Self { chain, trust_domain }
    }
}

/// The server's identity: the first of its names that was expected.
pub(super) fn server_identity(
    presented: Option<&[CertificateDer<'_>]>,
    expected: &Arc<[SpiffeId]>,
) -> Result<PeerIdentity, HboneError> {
    let expectation = || ExpectedPeer::OneOf(expected.clone());
    identity(presented, |id| expected.contains(id), expectation)
}

/// The client's identity: the first of its names that is of our trust domain.
pub(super) fn client_identity(
    presented: Option<&[CertificateDer<'_>]>,
    trust_domain: &TrustDomain,
) -> Result<PeerIdentity, HboneError> {
    let expectation = || ExpectedPeer::MemberOf(trust_domain.clone());
    identity(presented, |id| id.trust_domain() == trust_domain, expectation)
}

fn identity(
    presented: Option<&[CertificateDer<'_>]>,
    accept: impl Fn(&SpiffeId) -> bool,
    expected: impl Fn() -> ExpectedPeer,
) -> Result<PeerIdentity, HboneError> {
    let leaf = presented.and_then(<[_]>::first).ok_or(HboneError::NoPeerCertificate)?;
    // A certificate whose names cannot be read has none.
    let presented = uri_names(leaf).unwrap_or_default();
    let accepted = presented.iter().filter_map(|name| name.parse().ok()).find(accept);
    accepted
        .map(|id| PeerIdentity(Arc::new(id)))
        .ok_or_else(|| HboneError::UnexpectedPeer { expected: expected(), presented })
}

/// The URI names of a certificate; `None` when it, or its subjectAltName, does not parse.
pub(crate) fn uri_names(der: &[u8]) -> Option<Vec<String>> {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    let names = certificate.subject_alternative_name().ok()?;
    let names = names.map_or(&[][..], |extension| &extension.value.general_names);
    let uri = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    };
    Some(names.iter().filter_map(uri).collect())
}

/// rustls carries our own error through the handshake; `handshake_error` takes it out again.
fn rejected(error: HboneError) -> Error {
    CertificateError::Other(OtherError(Arc::new(error))).into()
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &certificate,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        server_identity(Some(std::slice::from_ref(end_entity)), &self.expected)
            .map_err(rejected)?;
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
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        client_identity(Some(std::slice::from_ref(end_entity)), &self.trust_domain)
            .map_err(rejected)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
