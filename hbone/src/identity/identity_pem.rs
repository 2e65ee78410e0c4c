//! The PEM form of an identity, in which one process gets it for another one.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use underpass_config::TrustDomain;

use crate::error::HboneError;
use crate::identity::{Identity, pem};
use crate::trust::bundle::Bundle;

/// A certificate with its key and roots in PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct IdentityPem {
    /// The certificate chain, leaf first.
    pub chain: String,
    /// The private key of the leaf, PKCS#8.
    pub key: String,
    /// The roots by trust domain.
    pub bundles: BTreeMap<TrustDomain, String>,
}

impl IdentityPem {
    /// The identity. Errors use `name` as the file.
    ///
    /// # Errors
    /// [`HboneError::Credential`] if a part is malformed, if the certificate is not valid now, or
    /// if its own roots do not verify it.
    pub fn identity(&self, name: &Path) -> Result<Identity, HboneError> {
        let chain = pem::certificates(name, self.chain.as_bytes())?;
        let key = pem::private_key(name, self.key.as_bytes())?;
        let bundle = |(domain, roots): (&TrustDomain, &String)| {
            Ok((domain.clone(), Bundle::from_pem(name, roots.as_bytes())?))
        };
        let bundles = self.bundles.iter().map(bundle).collect::<Result<_, HboneError>>()?;
        Identity::new(name, chain, key, bundles)?.valid_now(name)
    }
}

/// Without the key.
impl fmt::Debug for IdentityPem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdentityPem").field("chain", &self.chain).finish_non_exhaustive()
    }
}
