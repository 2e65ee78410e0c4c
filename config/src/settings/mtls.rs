//! The setting that accepts or refuses inbound plaintext connections.
//!
//! In permissive mode, only policies decide about plaintext connections.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use super::Word;

/// The inbound plaintext connections that are accepted, by workload and port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MtlsSettings {
    /// The mode of all workloads and ports without an override.
    pub default: Mtls,
    /// The overrides; each workload and port occurs once.
    pub overrides: Vec<MtlsOverride>,
}

/// Whether inbound plaintext connections are accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mtls {
    /// Plaintext is accepted if policies allow it.
    Permissive,
    /// Plaintext is refused.
    Strict,
}

/// The mode of a workload, of a port, or of a port of a workload: `shop/web=strict`,
/// `:9000=strict`, `shop/web:80=permissive`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MtlsOverride {
    /// The namespace and name of the workload. `None` means any workload; the port is then set.
    pub workload: Option<(String, String)>,
    /// The destination port of the connection. `None` means any port; the workload is then set.
    pub port: Option<u16>,
    /// The mode.
    pub mode: Mtls,
}

/// The reason why a text is not a [`MtlsOverride`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "must be NAMESPACE/NAME=MODE, NAMESPACE/NAME:PORT=MODE or :PORT=MODE, where MODE is permissive or strict, such as shop/web:80=permissive"
)]
pub struct MtlsOverrideError;

impl MtlsSettings {
    /// The mode for this port of the workload `namespace`/`name`: that of the most specific
    /// override, or the default.
    #[must_use]
    pub fn mode(&self, namespace: &str, name: &str, port: u16) -> Mtls {
        let applies = |one: &&MtlsOverride| {
            one.port.is_none_or(|only| only == port)
                && one.workload.as_ref().is_none_or(|(n, w)| n == namespace && w == name)
        };
        let applying = self.overrides.iter().filter(applies);
        // Two equally specific overrides never apply to the same workload and port.
        let specific = applying.max_by_key(|one| (one.workload.is_some(), one.port.is_some()));
        specific.map_or(self.default, |one| one.mode)
    }

    /// Whether some workload or port refuses plaintext.
    pub(crate) fn is_strict_somewhere(&self) -> bool {
        self.default == Mtls::Strict || self.overrides.iter().any(|one| one.mode == Mtls::Strict)
    }
}

impl MtlsOverride {
    /// Whether both overrides have the same workload and port.
    pub(crate) fn has_same_target(&self, other: &Self) -> bool {
        (&self.workload, self.port) == (&other.workload, other.port)
    }
}

impl Word for Mtls {
    const WORDS: &'static [(&'static str, Self)] =
        &[("permissive", Self::Permissive), ("strict", Self::Strict)];
}

impl fmt::Display for Mtls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl FromStr for MtlsOverride {
    type Err = MtlsOverrideError;

    fn from_str(text: &str) -> Result<Self, MtlsOverrideError> {
        let (key, mode) = text.rsplit_once('=').ok_or(MtlsOverrideError)?;
        let mode = Mtls::WORDS.iter().find(|(word, _)| *word == mode);
        let (_, mode) = *mode.ok_or(MtlsOverrideError)?;
        let (workload, port) = match key.split_once(':') {
            Some((workload, digits)) => (workload, Some(port(digits)?)),
            None => (key, None),
        };
        let workload = match workload.split_once('/') {
            Some((namespace, name)) if is_name(namespace) && is_name(name) => {
                Some((namespace.to_owned(), name.to_owned()))
            }
            None if workload.is_empty() && port.is_some() => None,
            _ => return Err(MtlsOverrideError),
        };
        Ok(Self { workload, port, mode })
    }
}

impl fmt::Display for MtlsOverride {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((namespace, name)) = &self.workload {
            write!(f, "{namespace}/{name}")?;
        }
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        write!(f, "={}", self.mode)
    }
}

fn port(digits: &str) -> Result<u16, MtlsOverrideError> {
    super::interception::port(digits).map_err(|_| MtlsOverrideError)
}

/// Whether the text is a name: it contains no separator of overrides or lists.
pub(super) fn is_name(text: &str) -> bool {
    let refused = |c: char| {
        c.is_whitespace()
            || c.is_control()
            || matches!(c, '/' | ':' | '=' | ',' | '\'' | '"' | '\\')
    };
    !text.is_empty() && !text.contains(refused)
}
