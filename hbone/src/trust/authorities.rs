//! Verifies a peer: the name in its leaf determines its trust domain, and only that domain's roots
//! can verify its chain.
//!
//! Not here: the handshake (`tls`), and authorization.

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

/// Everything that one generation of credentials trusts.
#[derive(Debug)]
pub(crate) struct Authorities {
    own: TrustDomain,
    /// Our own trust domain and its aliases; empty without aliases.
    aliases: Arc<[TrustDomain]>,
    /// The bundles that came with our certificate.
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

    /// All names of the trust domain of `id`; empty if it has only one.
    pub(crate) fn aliases(&self, id: &SpiffeId) -> Arc<[TrustDomain]> {
        if self.is_own(id.trust_domain()) { self.aliases.clone() } else { Arc::default() }
    }

    /// The expectation of a server: a client with an identity of any trust domain with known roots.
    pub(crate) fn any_member(&self) -> ExpectedPeer {
        ExpectedPeer::MemberOf(self.own.clone())
    }

    /// Whether `other` has the same trust, without comparing the contents of files.
    pub(crate) fn trust_as(&self, other: &Self) -> bool {
        (&self.own, &self.trust, &self.bundles) == (&other.own, &other.trust, &other.bundles)
    }

    /// Verifies a chain at the time `now` (roots, validity, purpose, revocation) and returns the
    /// identity that it proves.
    ///
    /// The name selects the roots, so it is read first. It is neither compared nor quoted in an
    /// error before the chain is verified.
    pub(crate) fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        expected: &ExpectedPeer,
        now: UnixTime,
    ) -> Result<SpiffeId, Error> {
        let id = workload_id(leaf).map_err(|problem| rejected(HboneError::NotSvid { problem }))?;
        let bundle = self.bundle(id.trust_domain()).map_err(rejected)?;
        self.verify(leaf, intermediates, bundle, usage(expected), now)
            .map_err(|error| self.explain(error, leaf, intermediates))?;
        if self.is_expected(&id, expected) {
            Ok(id)
        } else {
            let (expected, presented) = (expected.clone(), Quoted::new(id));
            Err(rejected(HboneError::UnexpectedPeer { expected, presented }))
        }
    }

    /// Whether a verified identity is an expected one. Any member whose trust domain has known
    /// roots is expected.
    fn is_expected(&self, id: &SpiffeId, expected: &ExpectedPeer) -> bool {
        match expected {
            ExpectedPeer::OneOf(expected) => expected.iter().any(|one| self.is_same(one, id)),
            ExpectedPeer::MemberOf(_) => true,
        }
    }

    /// The roots of a trust domain. Our own domain's never come from other sources.
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

    fn verify(
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

    /// Converts an error of webpki like rustls, so that the peer receives the right alert.
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

/// Wraps our own error for the handshake; `tls` unwraps it.
fn rejected(error: HboneError) -> Error {
    CertificateError::Other(OtherError(Arc::new(error))).into()
}

/// The required key usage: a server is expected by ID, a client by trust domain.
fn usage(expected: &ExpectedPeer) -> KeyUsage {
    match expected {
        ExpectedPeer::OneOf(_) => KeyUsage::server_auth(),
        ExpectedPeer::MemberOf(_) => KeyUsage::client_auth(),
    }
}

/// webpki's error with a bounded length: it quotes algorithm identifiers, whose length the peer
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
