//! The configured trust, read from watched files: aliases, roots of other trust domains, revocation
//! lists, and ciphers. It adds to the roots that come with our certificate.
//!
//! `trust::authorities` verifies peers; `identity::rotation` applies new trust.

mod authorities;
pub(crate) mod bundle;
pub(crate) mod mutual;
pub(crate) mod revocation;
mod revocations;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use tokio::sync::watch;
use underpass_config::{Cipher, FileWatcher, TrustDomain, TrustSettings};

use self::revocations::Revocations;
use crate::error::HboneError;
use crate::identity::files::WatchedFiles;
use crate::identity::pem;
use crate::trust::bundle::Bundle;

pub(crate) use self::authorities::Authorities;

/// The configured trust. Empty by default. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Trust(Arc<Parts>);

#[derive(Debug)]
struct Parts {
    aliases: BTreeSet<TrustDomain>,
    bundles: BTreeMap<TrustDomain, Bundle>,
    revocations: Revocations,
    ciphers: Vec<Cipher>,
}

impl Default for Parts {
    fn default() -> Self {
        let (aliases, bundles) = (BTreeSet::new(), BTreeMap::new());
        let (revocations, ciphers) = (Revocations::default(), Cipher::ALL.to_vec());
        Self { aliases, bundles, revocations, ciphers }
    }
}

/// Watches the files of [`TrustSettings`].
#[derive(Debug)]
pub struct TrustFiles {
    settings: TrustSettings,
    watched: WatchedFiles,
}

impl TrustFiles {
    /// Reads the files and starts to watch them.
    ///
    /// # Errors
    /// [`HboneError::Credential`] for a missing or malformed file, [`HboneError::Watch`] for a file
    /// that cannot be watched.
    pub fn open(
        settings: &TrustSettings,
        watcher: &FileWatcher,
    ) -> Result<(Self, Trust), HboneError> {
        let mut watched = WatchedFiles::none(watcher);
        watched.replace(files(settings))?;
        let trust = Trust::read(settings)?;
        Ok((Self { settings: settings.clone(), watched }, trust))
    }

    /// Publishes the trust after each change of a file, until there is no subscriber. After an
    /// error, calls `report` and keeps the last trust.
    pub async fn follow(mut self, trust: watch::Sender<Trust>, report: impl Fn(&HboneError)) {
        loop {
            tokio::select! {
                next = self.next() => match next {
                    Ok(new) => drop(trust.send_replace(new)),
                    Err(error) => report(&error),
                },
                () = trust.closed() => return,
            }
        }
    }

    /// Waits for a change, and reads all files again. Never returns if there are no files.
    /// Cancel-safe.
    ///
    /// # Errors
    /// Like [`TrustFiles::open`], once for each change. The last trust stays valid, so the caller
    /// may call again.
    async fn next(&mut self) -> Result<Trust, HboneError> {
        self.watched.changed().await;
        Trust::read(&self.settings)
    }
}

impl Trust {
    /// Reads the files. A missing or malformed file is an error: ignoring it would leave out roots
    /// or revocations.
    ///
    /// # Errors
    /// [`HboneError::Credential`] for a missing or malformed file.
    pub fn read(settings: &TrustSettings) -> Result<Self, HboneError> {
        let mut bundles = BTreeMap::new();
        for bundle in &settings.bundles {
            let roots = Bundle::from_pem(&bundle.file, &pem::read(&bundle.file)?)?;
            bundles.insert(bundle.trust_domain.clone(), roots);
        }
        Ok(Self(Arc::new(Parts {
            aliases: settings.aliases.iter().cloned().collect(),
            bundles,
            revocations: Revocations::read(&settings.crls)?,
            ciphers: settings.ciphers.clone(),
        })))
    }

    /// All problems of the files, each of which [`read`](Self::read) would refuse.
    #[must_use]
    pub fn problems(settings: &TrustSettings) -> Vec<HboneError> {
        let bundle = |file: &Path| Bundle::from_pem(file, &pem::read(file)?).map(drop);
        let bundles = settings.bundles.iter().map(|one| bundle(&one.file));
        let lists = settings
            .crls
            .iter()
            .map(|file| Revocations::read(std::slice::from_ref(file)).map(drop));
        bundles.chain(lists).filter_map(Result::err).collect()
    }

    /// Wraps a trust that never changes, for tests and the demonstration.
    pub fn fixed(self) -> watch::Receiver<Self> {
        watch::channel(self).1
    }

    pub(crate) fn is_alias(&self, trust_domain: &TrustDomain) -> bool {
        self.0.aliases.contains(trust_domain)
    }

    /// The trust domain `own` with its aliases. Empty if it has no aliases.
    pub(crate) fn with_aliases(&self, own: &TrustDomain) -> Arc<[TrustDomain]> {
        if self.0.aliases.is_empty() {
            return Arc::default();
        }
        let others = self.0.aliases.iter().filter(|alias| *alias != own);
        std::iter::once(own).chain(others).cloned().collect()
    }

    pub(crate) fn bundle(&self, trust_domain: &TrustDomain) -> Option<&Bundle> {
        self.0.bundles.get(trust_domain)
    }

    pub(crate) fn ciphers(&self) -> &[Cipher] {
        &self.0.ciphers
    }

    fn revocations(&self) -> &Revocations {
        &self.0.revocations
    }
}

/// Two values are equal if one is a clone of the other.
impl PartialEq for Trust {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Trust {}

fn files(settings: &TrustSettings) -> impl Iterator<Item = &Path> {
    let bundles = settings.bundles.iter().map(|bundle| bundle.file.as_path());
    bundles.chain(settings.crls.iter().map(AsRef::as_ref))
}

#[cfg(test)]
mod tests;
