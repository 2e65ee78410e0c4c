//! Finds every problem of a certificate, its key and its roots at once, for checks before a start.
//!
//! A start stops at the first problem ([`crate::identity`]).

use std::path::Path;
use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use underpass_config::IdentityFiles;

use super::{Identity, Leaf, certified_key, read_leaf, verify_chain};
use crate::clock;
use crate::error::{CredentialProblem, HboneError};
use crate::identity::files::exposed_mode;
use crate::identity::pem;
use crate::trust::bundle::Bundle;

/// The result of an inspection.
#[derive(Debug, Default)]
pub struct Inspection {
    /// The identity, if there is no problem.
    pub identity: Option<Identity>,
    /// All problems, in the order certificate, key, roots.
    pub problems: Vec<HboneError>,
    /// The mode of the key file, if users other than its owner can read it.
    pub exposed_key: Option<u32>,
}

impl Inspection {
    /// Inspects the files of an identity.
    #[must_use]
    pub fn of_files(files: &IdentityFiles) -> Self {
        let mut problems = Problems::default();
        let IdentityFiles { certificate, key, roots } = files;
        let chain = problems.of_file(certificate, pem::certificates);
        let key_der = problems.of_file(key, pem::private_key);
        let bundle = problems.of_file(roots, Bundle::from_pem);
        let leaf = chain.as_ref().and_then(|chain| problems.keep(certificate, leaf(chain)));
        if let (Some(chain), Some(key_der)) = (&chain, key_der) {
            problems.keep(key, certified_key(chain.clone(), key_der));
        }
        if let (Some(chain), Some(leaf), Some(bundle)) = (&chain, &leaf, bundle) {
            let now = clock::now();
            problems.keep(certificate, validity(leaf, now));
            let verified = verify_chain(chain, bundle.anchors(), within_validity(leaf, now));
            problems.keep(certificate, verified);
        }
        let mut problems = problems.0;
        let mut identity = None;
        if problems.is_empty() {
            match Identity::from_files_silently(files) {
                Ok(read) => identity = Some(read),
                // The files have changed since they were inspected.
                Err(error) => problems.push(error),
            }
        }
        let exposed_key = exposed_mode(key).ok().flatten();
        Self { identity, problems, exposed_key }
    }
}

/// The problems found so far.
#[derive(Debug, Default)]
struct Problems(Vec<HboneError>);

impl Problems {
    fn keep<T>(&mut self, file: &Path, result: Result<T, CredentialProblem>) -> Option<T> {
        result.map_err(|what| self.0.push(HboneError::credential(file, what))).ok()
    }

    /// Reads and parses a file.
    fn of_file<T>(
        &mut self,
        file: &Path,
        parse: impl FnOnce(&Path, &[u8]) -> Result<T, HboneError>,
    ) -> Option<T> {
        let parsed = pem::read(file).and_then(|text| parse(file, &text));
        parsed.map_err(|error| self.0.push(error)).ok()
    }
}

fn leaf(chain: &[CertificateDer<'_>]) -> Result<Leaf, CredentialProblem> {
    read_leaf(chain.first().map(AsRef::as_ref).unwrap_or_default())
}

fn validity(leaf: &Leaf, now: SystemTime) -> Result<(), CredentialProblem> {
    if leaf.expires <= now {
        return Err(CredentialProblem::Expired(leaf.expires));
    }
    if leaf.not_before > now {
        return Err(CredentialProblem::NotYetValid(leaf.not_before));
    }
    Ok(())
}

/// A time at which the leaf is valid, so that its expiry does not hide a wrong issuer.
fn within_validity(leaf: &Leaf, now: SystemTime) -> SystemTime {
    const SECOND: Duration = Duration::from_secs(1);
    let last = leaf.expires.checked_sub(SECOND).unwrap_or(leaf.expires);
    now.min(last).max(leaf.not_before)
}

#[cfg(test)]
mod tests;
