//! The header `baggage`: the workload that sends a request, in Istio's format (W3C Baggage with
//! OpenTelemetry keys).
//!
//! Applications send their own baggage inside the tunnel. Unknown keys are ignored.

use std::fmt;
use std::str::FromStr;

use http::header::{HeaderMap, HeaderValue};
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};
use underpass_config::{Name, Workload, WorkloadType};

use super::{BAGGAGE, HeaderError, OPTIONAL_WHITESPACE, header};

/// The typical length of a header value.
const TYPICAL_LENGTH: usize = 256;
/// The maximum length of a header value: W3C Baggage, section "Limits", requires that so much is
/// propagated.
const MAX_BYTES: usize = 8192;
/// The maximum number of list members in the grammar (`baggage-string`). At least 64 must be
/// propagated.
const MAX_MEMBERS: usize = 180;

/// Characters that are percent-encoded: those that the grammar forbids (`baggage-octet`), `%`, and
/// `=`, at which ztunnel's parser splits.
const ESCAPED: &AsciiSet =
    &CONTROLS.add(b' ').add(b'"').add(b',').add(b';').add(b'\\').add(b'%').add(b'=');

/// The properties of a workload, for the metrics of its peers. Unknown values are empty. Those of a
/// peer are unverified claims.
///
/// Values with control characters are neither written nor read, to protect logs. Values are shared
/// with the [`Workload`], because every connection creates one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Baggage {
    /// The cluster (`k8s.cluster.name`).
    pub cluster: Name,
    /// The namespace (`k8s.namespace.name`).
    pub namespace: Name,
    /// The owner (`k8s.deployment.name` and others).
    pub workload: Option<(WorkloadType, Name)>,
    /// The main service (`service.name`).
    pub service: Name,
    /// The revision of the main service (`service.version`).
    pub version: Name,
    /// The region (`cloud.region`).
    pub region: Name,
    /// The zone (`cloud.availability_zone`).
    pub zone: Name,
}

impl Baggage {
    /// Parses all lines of the header. `None` if it is missing, too long, or has no known key.
    pub fn read(headers: &HeaderMap) -> Option<Self> {
        let lines = headers.get_all(BAGGAGE).iter();
        // ztunnel does not percent-encode values, so a line may contain non-ASCII bytes.
        let lines: Vec<_> = lines.map(|line| String::from_utf8_lossy(line.as_bytes())).collect();
        lines.join(",").parse().ok().filter(|baggage: &Self| !baggage.is_empty())
    }

    /// Returns true if all values are unknown.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Formats the header value. `None` if all values are unknown.
    pub fn to_header(&self) -> Option<HeaderValue> {
        header(self.to_text())
    }

    fn to_text(&self) -> String {
        let mut text = String::with_capacity(TYPICAL_LENGTH);
        for (key, value) in self.members() {
            let has_only_literals = !value.is_empty() && value.bytes().all(is_literal);
            if !has_only_literals && !is_allowed_value(value) {
                continue;
            }
            let length = text.len();
            let comma = if length == 0 { "" } else { "," };
            text.extend([comma, key, "="]);
            if has_only_literals {
                text.push_str(value);
            } else {
                text.extend(utf8_percent_encode(value, ESCAPED));
            }
            // A member that does not fit is omitted entirely.
            if text.len() > MAX_BYTES {
                text.truncate(length);
            }
        }
        text
    }

    /// The list members in ztunnel's order.
    fn members(&self) -> [(&'static str, &str); 7] {
        let (kind, workload) =
            self.workload.as_ref().map_or((WorkloadType::Pod, ""), |(kind, name)| (*kind, name));
        [
            ("k8s.cluster.name", &self.cluster),
            ("k8s.namespace.name", &self.namespace),
            (workload_key(kind), workload),
            ("service.name", &self.service),
            ("service.version", &self.version),
            ("cloud.region", &self.region),
            ("cloud.availability_zone", &self.zone),
        ]
    }

    /// Stores a member with a known key. If a key occurs several times, the first non-empty value
    /// counts.
    fn store(&mut self, key: &str, value: &str) {
        let field = match key {
            "k8s.cluster.name" => &mut self.cluster,
            "k8s.namespace.name" => &mut self.namespace,
            "service.name" => &mut self.service,
            "service.version" => &mut self.version,
            "cloud.region" => &mut self.region,
            "cloud.availability_zone" => &mut self.zone,
            key => {
                let kind = WorkloadType::ALL.into_iter().find(|kind| workload_key(*kind) == key);
                let workload = || Some((kind?, decode(value)?));
                self.workload = self.workload.take().or_else(workload);
                return;
            }
        };
        if field.is_empty() {
            *field = decode(value).unwrap_or_default();
        }
    }
}

impl From<&Workload> for Baggage {
    fn from(workload: &Workload) -> Self {
        let name = Some(&workload.workload_name).filter(|name| !name.is_empty());
        Self {
            cluster: workload.cluster_id.clone(),
            namespace: workload.namespace.clone(),
            workload: name.map(|name| (workload.workload_type, name.clone())),
            service: workload.canonical_name.clone(),
            version: workload.canonical_revision.clone(),
            region: workload.locality.region.clone(),
            zone: workload.locality.zone.clone(),
        }
    }
}

impl FromStr for Baggage {
    type Err = HeaderError;

    /// Ignores malformed members, properties (`;…`) and unknown keys.
    fn from_str(text: &str) -> Result<Self, HeaderError> {
        if text.len() > MAX_BYTES {
            return Err(HeaderError::TooLong { limit: MAX_BYTES });
        }
        if text.split(',').count() > MAX_MEMBERS {
            return Err(HeaderError::TooManyMembers { limit: MAX_MEMBERS });
        }
        let mut baggage = Self::default();
        for member in text.split(',') {
            let (pair, _properties) = member.split_once(';').unwrap_or((member, ""));
            if let Some((key, value)) = pair.split_once('=') {
                baggage.store(
                    key.trim_matches(OPTIONAL_WHITESPACE),
                    value.trim_matches(OPTIONAL_WHITESPACE),
                );
            }
        }
        Ok(baggage)
    }
}

impl TryFrom<&HeaderValue> for Baggage {
    type Error = HeaderError;

    fn try_from(value: &HeaderValue) -> Result<Self, HeaderError> {
        String::from_utf8_lossy(value.as_bytes()).parse()
    }
}

impl fmt::Display for Baggage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_text())
    }
}

fn workload_key(kind: WorkloadType) -> &'static str {
    match kind {
        WorkloadType::Deployment => "k8s.deployment.name",
        WorkloadType::CronJob => "k8s.cronjob.name",
        WorkloadType::Pod => "k8s.pod.name",
        WorkloadType::Job => "k8s.job.name",
    }
}

/// Decodes percent-encoding. Keeps a `%` without a valid escape, as ztunnel writes it. Invalid
/// UTF-8 becomes U+FFFD, as W3C Baggage requires.
fn decode(value: &str) -> Option<Name> {
    let value = percent_decode_str(value).decode_utf8_lossy();
    is_allowed_value(&value).then(|| value.into())
}

/// Returns true for a character that needs no check and no encoding. Other values are checked and
/// encoded character by character, which takes many times as long.
fn is_literal(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_' | b'/')
}

/// Returns true if a value may be written and read: it is not empty and has no control characters.
fn is_allowed_value(value: &str) -> bool {
    !value.is_empty() && !value.contains(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Baggage {
        Baggage {
            cluster: "Kubernetes".into(),
            namespace: "default".into(),
            workload: Some((WorkloadType::Deployment, "client".into())),
            service: "client".into(),
            version: "v1".into(),
            region: "eu".into(),
            zone: "eu-1".into(),
        }
    }

    fn read(text: &str) -> Baggage {
        text.parse().unwrap()
    }

    #[test]
    fn writes_format_of_ztunnel() {
        let text = "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,\
                    k8s.deployment.name=client,service.name=client,service.version=v1,\
                    cloud.region=eu,cloud.availability_zone=eu-1";
        assert_eq!(full().to_string(), text);
        assert_eq!(read(text), full());
        let nothing = Baggage::default();
        assert_eq!((nothing.to_string().as_str(), nothing.to_header()), ("", None));
        let some = Baggage { namespace: "a".into(), zone: "b".into(), ..nothing };
        assert_eq!(some.to_string(), "k8s.namespace.name=a,cloud.availability_zone=b");
    }

    #[test]
    fn workload_types_have_distinct_keys() {
        for kind in WorkloadType::ALL {
            let text = format!("k8s.{}.name=n", kind.as_str());
            let baggage = read(&text);
            assert_eq!(baggage.workload, Some((kind, "n".into())));
            assert_eq!(baggage.to_string(), text);
        }
        assert_eq!(read("k8s.replicaset.name=n,k8s..name=n"), Baggage::default());
    }

    #[test]
    fn encodes_characters_that_grammar_or_ztunnel_require() {
        let service: Name = "a,k8s.namespace.name=b;c \"d\\ 100%é".into();
        let baggage = Baggage { service, ..Baggage::default() };
        assert_eq!(
            baggage.to_string(),
            "service.name=a%2Ck8s.namespace.name%3Db%3Bc%20%22d%5C%20100%25%C3%A9"
        );
        assert_eq!(read(&baggage.to_string()), baggage);
    }

    #[test]
    fn reads_unencoded_values() {
        let service = |text: &str| read(&format!("service.name={text}")).service;
        assert_eq!(&*service("a b"), "a b");
        assert_eq!(&*service("100%"), "100%");
        assert_eq!(&*service("%zz%4"), "%zz%4");
        assert_eq!(&*service("a=b"), "a=b");
        assert_eq!(&*service("é"), "é");
        assert_eq!(&*service("%FF"), "\u{fffd}");
    }

    #[test]
    fn skips_spaces_properties_and_unknown_keys() {
        let text = "userId=alice, service.name = web ;ttl=1;x , broken,=,;,\tcloud.region=r\t,\
                    SERVICE.VERSION=v1";
        let expected = Baggage { service: "web".into(), region: "r".into(), ..Baggage::default() };
        assert_eq!(read(text), expected);
    }

    #[test]
    fn first_value_of_key_counts() {
        let text = "service.name=,service.name=%00,service.name=a,service.name=b,\
                    k8s.job.name=j,k8s.pod.name=p";
        let baggage = read(text);
        assert_eq!(&*baggage.service, "a");
        assert_eq!(baggage.workload, Some((WorkloadType::Job, "j".into())));
    }

    #[test]
    fn rejects_control_characters_in_both_directions() {
        for escape in ["%0A", "%00", "%7F", "%C2%85", "a\tb", "a\nb"] {
            assert!(read(&format!("service.name={escape}")).is_empty(), "{escape}");
        }
        let baggage = Baggage { service: "a\nb".into(), ..full() };
        assert_eq!(read(&baggage.to_string()), Baggage { service: Name::default(), ..full() });
    }

    #[test]
    fn enforces_limits_in_both_directions() {
        let most = vec!["service.name=a"; MAX_MEMBERS].join(",");
        assert_eq!(read(&most).service, "a".into());
        let error = (most + ",").parse::<Baggage>();
        assert_eq!(error, Err(HeaderError::TooManyMembers { limit: MAX_MEMBERS }));
        let long = "a".repeat(MAX_BYTES - "service.name=".len());
        assert_eq!(read(&format!("service.name={long}")).service, long.as_str().into());
        let error = format!("service.name={long}a").parse::<Baggage>();
        assert_eq!(error, Err(HeaderError::TooLong { limit: MAX_BYTES }));
        // The writer omits a value that is too long.
        let baggage = Baggage { service: long.into(), ..full() };
        assert_eq!(read(&baggage.to_string()), Baggage { service: Name::default(), ..full() });
    }

    #[test]
    fn joins_lines_of_header() {
        let mut headers = HeaderMap::new();
        assert_eq!(Baggage::read(&headers), None);
        headers.append(BAGGAGE, HeaderValue::from_static("userId=alice"));
        assert_eq!(Baggage::read(&headers), None);
        headers.append(BAGGAGE, HeaderValue::from_static("k8s.namespace.name=a"));
        headers.append(BAGGAGE, HeaderValue::from_bytes(b"service.name=\xff").unwrap());
        let baggage = Baggage::read(&headers).unwrap();
        assert_eq!((&*baggage.namespace, &*baggage.service), ("a", "\u{fffd}"));
    }
}
