//! SPIFFE identities, in the terms of the SPIFFE-ID standard. The hbone crate verifies them with
//! certificates.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

/// The maximum length of an identity (SPIFFE-ID section 2.3).
const MAX_ID_BYTES: usize = 2048;
/// The maximum length of a trust domain (SPIFFE-ID section 2.1).
const MAX_TRUST_DOMAIN_BYTES: usize = 255;
const SCHEME: &str = "spiffe://";

/// The reason why a text is not a SPIFFE identity or trust domain.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SpiffeError {
    /// The text does not begin with `spiffe://`.
    #[error("the identity does not start with spiffe://")]
    Scheme,
    /// The trust domain is empty, too long, or has a character outside `a-z 0-9 . - _`.
    #[error("the trust domain must be 1 to 255 characters of a-z, 0-9, '.', '-' and '_'")]
    TrustDomain,
    /// A path segment is empty, `.` or `..`, or has a character outside `a-z A-Z 0-9 . - _`.
    #[error(
        "each path segment must be one or more of a-z, A-Z, 0-9, '.', '-' and '_', and not '.' or '..'"
    )]
    Path,
    /// The path is missing, which the identity of a workload requires.
    #[error("the path is missing: the identity is a trust domain's, not a workload's")]
    NoPath,
    /// The identity is longer than 2048 bytes.
    #[error("the identity is longer than 2048 bytes")]
    TooLong,
}

/// A SPIFFE trust domain, such as `cluster.local`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(String);

impl TrustDomain {
    /// `cluster.local`, the default trust domain of Istio.
    pub(crate) fn cluster_local() -> Self {
        Self("cluster.local".to_owned())
    }

    /// The trust domain in the form used in identities.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        let allowed = |c: u8| matches!(c, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
        let fits = (1..=MAX_TRUST_DOMAIN_BYTES).contains(&text.len());
        if fits && text.bytes().all(allowed) {
            Ok(Self(text.to_owned()))
        } else {
            Err(SpiffeError::TrustDomain)
        }
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A SPIFFE identity: a trust domain and a path of any form.
///
/// ```
/// use underpass_config::SpiffeId;
/// let id: SpiffeId = "spiffe://cluster.local/ns/default/sa/client".parse().unwrap();
/// assert_eq!(id.trust_domain().as_str(), "cluster.local");
/// assert_eq!(id.namespace_and_service_account(), Some(("default", "client")));
/// ```
///
/// Cheap to clone: many connections and workloads share it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId(Arc<Parts>);

#[derive(Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Parts {
    trust_domain: TrustDomain,
    /// The identity without the scheme: trust domain, and path if present.
    text: String,
}

impl SpiffeId {
    /// The identity of a workload in Istio: `spiffe://TD/ns/NAMESPACE/sa/ACCOUNT`.
    ///
    /// # Errors
    /// [`SpiffeError::Path`] if a name contains a character that is not allowed in identities.
    pub fn istio(
        trust_domain: TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, SpiffeError> {
        // A '/' would make the identity ambiguous: namespace `a/sa/b`, or account `b` in namespace
        // `a`.
        if namespace.contains('/') || service_account.contains('/') {
            return Err(SpiffeError::Path);
        }
        format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}").parse()
    }

    /// The trust domain, whose authority issues this identity.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.0.trust_domain
    }

    /// The path: empty, or segments that each begin with `/`.
    pub fn path(&self) -> &str {
        self.0.text.get(self.0.trust_domain.0.len()..).unwrap_or_default()
    }

    /// Whether the identity is a workload's. An identity without a path identifies the trust
    /// domain, and only a CA certificate contains one (X509-SVID section 2).
    pub fn is_workload(&self) -> bool {
        !self.path().is_empty()
    }

    /// The identity without `spiffe://`, as in Istio's policies.
    pub fn principal(&self) -> &str {
        &self.0.text
    }

    /// Whether other references to the identity exist.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// The namespace and service account, if the path has Istio's form.
    pub fn namespace_and_service_account(&self) -> Option<(&str, &str)> {
        // Evaluated for every connection. A search for one byte is faster than for "/sa/".
        let (namespace, rest) = self.path().strip_prefix("/ns/")?.split_once('/')?;
        let account = rest.strip_prefix("sa/")?;
        (!account.contains('/')).then_some((namespace, account))
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        if text.len() > MAX_ID_BYTES {
            return Err(SpiffeError::TooLong);
        }
        let rest = text.strip_prefix(SCHEME).ok_or(SpiffeError::Scheme)?;
        let (domain, segments) = match rest.split_once('/') {
            Some((domain, path)) => (domain, Some(path)),
            None => (rest, None),
        };
        let trust_domain = domain.parse()?;
        if segments.is_some_and(|path| !path.split('/').all(is_segment)) {
            return Err(SpiffeError::Path);
        }
        Ok(Self(Arc::new(Parts { trust_domain, text: rest.to_owned() })))
    }
}

fn is_segment(segment: &str) -> bool {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-' | b'_');
    !matches!(segment, "" | "." | "..") && segment.bytes().all(allowed)
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.principal())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_prints_as_parsed() {
        for text in [
            "spiffe://cluster.local/ns/default/sa/client",
            "spiffe://td/any/path/at/all",
            "spiffe://td",
        ] {
            let id: SpiffeId = text.parse().unwrap();
            assert_eq!(id.to_string(), text);
            assert_eq!(format!("spiffe://{}{}", id.trust_domain(), id.path()), text);
        }
    }

    #[test]
    fn identity_without_path_is_not_workload() {
        let is_workload = |text: &str| text.parse::<SpiffeId>().unwrap().is_workload();
        assert!(is_workload("spiffe://td/a") && !is_workload("spiffe://td"));
    }

    #[test]
    fn only_istio_path_has_namespace_and_service_account() {
        let parts = |text: &str| {
            let id: SpiffeId = text.parse().unwrap();
            id.namespace_and_service_account().map(|(n, s)| format!("{n}/{s}"))
        };
        assert_eq!(parts("spiffe://td/ns/a/sa/b").as_deref(), Some("a/b"));
        for other in [
            "spiffe://td",
            "spiffe://td/ns/a",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://td/x/ns/a/sa/b",
        ] {
            assert_eq!(parts(other), None, "{other}");
        }
    }

    #[test]
    fn rejects_invalid_identity_with_reason() {
        for (text, reason) in [
            ("https://td/ns/a", SpiffeError::Scheme),
            ("spiffe://", SpiffeError::TrustDomain),
            ("spiffe://Upper/ns", SpiffeError::TrustDomain),
            ("spiffe://td/", SpiffeError::Path),
            ("spiffe://td/a//b", SpiffeError::Path),
            ("spiffe://td/../b", SpiffeError::Path),
            ("spiffe://td/a b", SpiffeError::Path),
            ("spiffe://td/a?b", SpiffeError::Path),
        ] {
            assert_eq!(text.parse::<SpiffeId>(), Err(reason), "{text}");
        }
        let long = format!("spiffe://td/{}", "a".repeat(2048));
        assert_eq!(long.parse::<SpiffeId>(), Err(SpiffeError::TooLong));
    }
}
