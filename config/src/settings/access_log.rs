//! The settings of the access log: the connections that have a line.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use super::Word;
use super::mtls::is_name;
use super::ratio::Ratio;

/// The connections that have a line in the access log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessLogSettings {
    /// The connections of namespaces without an entry in `namespaces`.
    pub connections: LoggedConnections,
    /// The fraction of the connections without a failure.
    pub sample_ratio: Ratio,
    /// The connections of one namespace; each namespace occurs once.
    pub namespaces: Vec<NamespaceLog>,
}

/// A selection of connections by their outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LoggedConnections {
    /// All of them.
    All,
    /// Those that failed or could not be opened.
    Failures,
    /// None of them.
    Nothing,
}

/// The logged connections of one namespace: `kube-system=failures`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NamespaceLog {
    /// The namespace.
    pub namespace: String,
    /// Its connections.
    pub connections: LoggedConnections,
}

/// The reason why a text is not a [`NamespaceLog`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "must be NAMESPACE=all, NAMESPACE=failures or NAMESPACE=none, such as kube-system=failures"
)]
pub struct NamespaceLogError;

impl AccessLogSettings {
    /// Whether a connection between workloads of these namespaces has a line. The first entry for
    /// one of them decides. `random` are its bits for sampling.
    #[must_use]
    pub fn selects(
        &self,
        namespaces: [Option<&str>; 2],
        has_failed: bool,
        random: impl FnOnce() -> u64,
    ) -> bool {
        let is_of = |one: &&NamespaceLog| namespaces.contains(&Some(&*one.namespace));
        let entry = self.namespaces.iter().find(is_of);
        match entry.map_or(self.connections, |entry| entry.connections) {
            LoggedConnections::All => has_failed || self.sample_ratio.includes(random()),
            LoggedConnections::Failures => has_failed,
            LoggedConnections::Nothing => false,
        }
    }
}

impl Default for AccessLogSettings {
    fn default() -> Self {
        let connections = LoggedConnections::All;
        Self { connections, sample_ratio: Ratio::ALL, namespaces: Vec::new() }
    }
}

impl Word for LoggedConnections {
    const WORDS: &'static [(&'static str, Self)] =
        &[("all", Self::All), ("failures", Self::Failures), ("none", Self::Nothing)];
}

impl FromStr for NamespaceLog {
    type Err = NamespaceLogError;

    fn from_str(text: &str) -> Result<Self, NamespaceLogError> {
        let (namespace, word) = text.split_once('=').ok_or(NamespaceLogError)?;
        let named = LoggedConnections::WORDS.iter().find(|(known, _)| *known == word);
        let (_, connections) = *named.filter(|_| is_name(namespace)).ok_or(NamespaceLogError)?;
        Ok(Self { namespace: namespace.to_owned(), connections })
    }
}

impl fmt::Display for NamespaceLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.namespace, self.connections.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(connections: LoggedConnections, namespaces: &[&str]) -> AccessLogSettings {
        let namespaces = namespaces.iter().map(|one| one.parse().unwrap()).collect();
        AccessLogSettings { connections, namespaces, ..AccessLogSettings::default() }
    }

    #[test]
    fn first_entry_for_a_namespace_of_the_connection_decides() {
        let settings =
            settings(LoggedConnections::Failures, &["shop=all", "quiet=none", "probes=failures"]);
        let selects = |source, destination, has_failed| {
            settings.selects([source, destination], has_failed, || 0)
        };
        assert!(selects(Some("shop"), None, false));
        assert!(selects(Some("quiet"), Some("shop"), false));
        assert!(!selects(None, Some("quiet"), true));
        assert!(!selects(Some("probes"), Some("web"), false));
        assert!(selects(Some("probes"), Some("web"), true));
        assert!(!selects(None, None, false) && selects(None, None, true));
    }

    #[test]
    fn sampling_keeps_all_failures() {
        let sample_ratio = "0.5".parse().unwrap();
        let settings = AccessLogSettings { sample_ratio, ..AccessLogSettings::default() };
        assert!(settings.selects([None; 2], false, || 0));
        assert!(!settings.selects([None; 2], false, || u64::MAX));
        assert!(settings.selects([None; 2], true, || u64::MAX));
    }

    #[test]
    fn namespace_entry_prints_as_parsed() {
        for text in ["shop=all", "kube-system=failures", "a.b=none"] {
            assert_eq!(text.parse::<NamespaceLog>().unwrap().to_string(), text);
        }
        for text in ["", "shop", "shop=", "=all", "shop=off", "a,b=all", "a=b=all"] {
            assert_eq!(text.parse::<NamespaceLog>(), Err(NamespaceLogError), "{text}");
        }
    }
}
