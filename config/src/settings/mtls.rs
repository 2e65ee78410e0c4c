//! The setting that accepts or refuses inbound plaintext connections.
//!
//! Not here: authorization. In permissive mode, policies alone decide about plaintext connections.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use super::Word;

/// Whether plaintext is accepted, by workload and port.
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
    /// Accepted if policies allow them.
    Permissive,
    /// Refused.
    Strict,
}

/// The mode of a workload, of a port, or of a port of a workload: `shop/web=strict`,
/// `:9000=strict`, `shop/web:80=permissive`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MtlsOverride {
    /// Namespace and name of the workload; `None`: any, and then there is a port.
    pub workload: Option<(String, String)>,
    /// The destination port of the connection; `None`: any, and then there is a workload.
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
    /// The mode of this port of the workload `namespace`/`name`: the most specific override, or the
    /// default.
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

    /// Whether any workload or port accepts tunnels only.
    pub(crate) fn is_strict_somewhere(&self) -> bool {
        self.default == Mtls::Strict || self.overrides.iter().any(|one| one.mode == Mtls::Strict)
    }
}

impl MtlsOverride {
    /// Whether both apply to the same workload and port.
    pub(crate) fn is_of_same(&self, other: &Self) -> bool {
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

/// Whether a name contains no separator of overrides or lists.
fn is_name(text: &str) -> bool {
    let refused = |c: char| {
        c.is_whitespace()
            || c.is_control()
            || matches!(c, '/' | ':' | '=' | ',' | '\'' | '"' | '\\')
    };
    !text.is_empty() && !text.contains(refused)
}
