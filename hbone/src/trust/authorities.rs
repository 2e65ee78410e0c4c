//! Verifies a peer: the name in its certificate determines its trust domain, and only the roots of
//! that domain can verify its chain.
//!
//! `tls` performs the handshake; this is not authorization.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::{CertificateError, Error, ExtendedKeyPurpose, OtherError};
use rustls_pki_types::{CertificateDer, UnixTime};
use underpass_config::{Cipher, Quoted, SpiffeId, TrustDomain};
use webpki::{
    EndEntityCert, ExpirationPolicy, KeyUsage, RequiredEkuNotFoundContext, RevocationCheckDepth,
    RevocationOptionsBuilder, UnknownStatusPolicy,
};

use super::Trust;
use crate::crypto::provider;
use crate::error::{ExpectedPeer, HboneError};
use crate::identity::Identity;
use crate::identity::svid::workload_id;
use crate::trust::bundle::Bundle;

/// All roots and revocation lists of one generation of credentials.
#[derive(Debug)]
pub(crate) struct Authorities {
    own: TrustDomain,
    /// Our trust domain and its aliases. Empty if there are no aliases.
    aliases: Arc<[TrustDomain]>,
    /// The roots that came with our certificate.
    bundles: BTreeMap<TrustDomain, Bundle>,
    trust: Trust,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Authorities {
    pub(crate) fn new(identity: &Identity, trust: Trust) -> Self {
        let own = identity.spiffe_id().trust_domain().clone();
        Self {
            aliases: trust.with_aliases(&own),
            own,
            bundles: identity.bundles().clone(),
            trust,
            algorithms: provider(&Cipher::ALL).signature_verification_algorithms,
        }
    }

    pub(crate) fn algorithms(&self) -> &WebPkiSupportedAlgorithms {
        &self.algorithms
    }

    /// All names of the trust domain of `id`. Empty if it has only one name.
    pub(crate) fn aliases(&self, id: &SpiffeId) -> Arc<[TrustDomain]> {
        if self.is_own(id.trust_domain()) { self.aliases.clone() } else { Arc::default() }
    }

    /// The expectation of a server: a client of any trust domain with known roots.
    pub(crate) fn any_member(&self) -> ExpectedPeer {
        ExpectedPeer::MemberOf(self.own.clone())
    }

    /// Returns true if `other` contains the same roots and lists. Compares references, not file
    /// contents.
    pub(crate) fn trust_as(&self, other: &Self) -> bool {
        (&self.own, &self.trust, &self.bundles) == (&other.own, &other.trust, &other.bundles)
    }

    /// Verifies a certificate chain at the time `now`: roots, validity, purpose and revocation.
    /// Returns the identity that it proves.
    ///
    /// The identity selects the roots, so it is read first. It is not compared or quoted in an
    /// error before the chain is verified.
    pub(crate) fn verify_peer(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        expected: &ExpectedPeer,
        now: UnixTime,
    ) -> Result<SpiffeId, Error> {
        let id = workload_id(leaf).map_err(|problem| rejected(HboneError::NotSvid { problem }))?;
        let bundle = self.bundle(id.trust_domain()).map_err(rejected)?;
        self.verify_chain(leaf, intermediates, bundle, usage(expected), now)
            .map_err(|error| self.explain(error, leaf, intermediates))?;
        if self.is_expected(&id, expected) {
            Ok(id)
        } else {
            let (expected, presented) = (expected.clone(), Quoted::new(id));
            Err(rejected(HboneError::UnexpectedPeer { expected, presented }))
        }
    }

    /// Returns true if a verified identity matches the expectation.
    fn is_expected(&self, id: &SpiffeId, expected: &ExpectedPeer) -> bool {
        match expected {
            ExpectedPeer::OneOf(expected) => expected.iter().any(|one| self.is_same(one, id)),
            ExpectedPeer::MemberOf(_) => true,
        }
    }

    /// The roots of a trust domain. Those of our own domain come only with our certificate.
    fn bundle(&self, trust_domain: &TrustDomain) -> Result<&Bundle, HboneError> {
        let bundle = if self.is_own(trust_domain) {
            self.bundles.get(&self.own)
        } else {
            self.trust.bundle(trust_domain).or_else(|| self.bundles.get(trust_domain))
        };
        bundle.ok_or_else(|| HboneError::UntrustedDomain { trust_domain: trust_domain.clone() })
    }

    fn is_own(&self, trust_domain: &TrustDomain) -> bool {
        *trust_domain == self.own || self.trust.is_alias(trust_domain)
    }

    fn is_same(&self, one: &SpiffeId, other: &SpiffeId) -> bool {
        let both_own = self.is_own(one.trust_domain()) && self.is_own(other.trust_domain());
        one == other || (both_own && one.path() == other.path())
    }

    fn verify_chain(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        bundle: &Bundle,
        usage: KeyUsage,
        now: UnixTime,
    ) -> Result<(), webpki::Error> {
        let lists = self.trust.revocations().for_chain(leaf, intermediates);
        let revocation = RevocationOptionsBuilder::new(&lists).ok().map(|options| {
            options
                .with_depth(RevocationCheckDepth::Chain)
                .with_status_policy(UnknownStatusPolicy::Deny)
                .with_expiration_policy(ExpirationPolicy::Enforce)
                .build()
        });
        EndEntityCert::try_from(leaf)?.verify_for_usage(
            self.algorithms.all,
            bundle.anchors(),
            intermediates,
            now,
            usage,
            revocation,
            None,
        )?;
        Ok(())
    }

    /// Converts an error of webpki as rustls does, so that the peer receives the right alert.
    fn explain(
        &self,
        error: webpki::Error,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Error {
        use webpki::Error as Pki;
        let error = match error {
            Pki::BadDer | Pki::BadDerTime | Pki::TrailingData(_) => CertificateError::BadEncoding,
            Pki::CertExpired { time, not_after } => {
                CertificateError::ExpiredContext { time, not_after }
            }
            Pki::CertNotValidYet { time, not_before } => {
                CertificateError::NotValidYetContext { time, not_before }
            }
            Pki::UnknownIssuer => CertificateError::UnknownIssuer,
            Pki::InvalidSignatureForPublicKey => CertificateError::BadSignature,
            Pki::RequiredEkuNotFoundContext(purposes) => wrong_purpose(&purposes),
            Pki::CertRevoked => CertificateError::Revoked,
            other => match self.trust.revocations().explain(&other, leaf, intermediates) {
                Some(error) => return rejected(error),
                None => unspecific(&other),
            },
        };
        error.into()
    }
}

/// Wraps our error in one of rustls. `tls` unwraps it.
fn rejected(error: HboneError) -> Error {
    CertificateError::Other(OtherError(Arc::new(error))).into()
}

/// The required key usage: servers are expected by identity, clients by trust domain.
fn usage(expected: &ExpectedPeer) -> KeyUsage {
    match expected {
        ExpectedPeer::OneOf(_) => KeyUsage::server_auth(),
        ExpectedPeer::MemberOf(_) => KeyUsage::client_auth(),
    }
}

/// An error of webpki with a bounded length. It quotes algorithm identifiers, whose length the peer
/// chooses.
fn unspecific(error: &webpki::Error) -> CertificateError {
    let error = HboneError::InvalidCertificate { reason: Quoted::new(error) };
    CertificateError::Other(OtherError(Arc::new(error)))
}

/// The first purposes of a certificate that lacks the required one. The peer chooses their number
/// and length.
fn wrong_purpose(purposes: &RequiredEkuNotFoundContext) -> CertificateError {
    const PURPOSES: usize = 4;
    const COMPONENTS: usize = 16;
    let purpose = |oid: Vec<usize>| match oid.as_slice() {
        KeyUsage::SERVER_AUTH_REPR => ExtendedKeyPurpose::ServerAuth,
        KeyUsage::CLIENT_AUTH_REPR => ExtendedKeyPurpose::ClientAuth,
        _ => ExtendedKeyPurpose::Other(oid),
    };
    let first = |oid: &Vec<usize>| purpose(oid.iter().copied().take(COMPONENTS).collect());
    CertificateError::InvalidPurposeContext {
        required: purpose(purposes.required.oid_values().collect()),
        presented: purposes.present.iter().take(PURPOSES).map(first).collect(),
    }
}
