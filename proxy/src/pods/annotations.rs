//! Istio's labels and annotations of a pod: whether it is enrolled, and its interception settings.
//!
//! A value is not interpreted here: the annotations become values of the settings under
//! `interception`, which the parser of the settings reads. So hostile values, such as an interface
//! name with arguments of iptables (CVE-2026-23766), are rejected like those of a settings file.

use std::fmt;

use underpass_config::{
    InterceptionOverlay, InterceptionSettings, IpNet, NodeSettings, PodSourceSettings,
};

use crate::pods::facts::{FactsError, PodFacts};

const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
const SIDECAR_STATUS: &str = "sidecar.istio.io/status";
const BYPASS_INBOUND: &str = "ambient.istio.io/bypass-inbound-capture";
const DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";
const INCLUDE_RANGES: &str = "traffic.sidecar.istio.io/includeOutboundIPRanges";
const INCLUDE_PORTS: &str = "traffic.sidecar.istio.io/includeOutboundPorts";
const INCLUDE_CIDRS: &str = "outbound.include_cidrs";

/// Annotations and the settings they are values of.
const SETTINGS: &[(&str, &[&str])] = &[
    ("istio.io/reroute-virtual-interfaces", &["virtual_interfaces"]),
    ("traffic.sidecar.istio.io/excludeOutboundIPRanges", &["outbound.exclude_cidrs"]),
    (INCLUDE_PORTS, &["outbound.include_ports"]),
    ("traffic.sidecar.istio.io/excludeOutboundPorts", &["outbound.exclude_ports"]),
    ("traffic.sidecar.istio.io/excludeInboundPorts", &["inbound.exclude_ports"]),
    (
        "traffic.sidecar.istio.io/excludeInterfaces",
        &["inbound.exclude_interfaces", "outbound.exclude_interfaces"],
    ),
];

/// Annotations whose empty value includes nothing, and whose `*` includes all.
const INCLUSIONS: &[(&str, &str)] = &[
    (INCLUDE_RANGES, INCLUDE_CIDRS),
    ("traffic.sidecar.istio.io/includeInboundPorts", "inbound.include_ports"),
];

/// The reason why a pod is not enrolled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotEnrolled {
    /// Its namespace is one of `node.exempt_namespaces`.
    ExemptNamespace,
    /// The label `istio.io/dataplane-mode: none`.
    OptedOut,
    /// The annotation `sidecar.istio.io/status`.
    HasSidecar,
}

impl fmt::Display for NotEnrolled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ExemptNamespace => f.write_str("node.exempt_namespaces contains its namespace"),
            Self::OptedOut => write!(f, "its label {DATAPLANE_MODE} is none"),
            Self::HasSidecar => write!(f, "it has a sidecar (annotation {SIDECAR_STATUS})"),
        }
    }
}

/// Whether the settings of the node, or labels and annotations, exclude the pod.
pub(crate) fn exclusion(
    facts: &PodFacts,
    node: &NodeSettings,
) -> Result<Option<NotEnrolled>, FactsError> {
    if let Some(PodSourceSettings::Zds(_)) = node.pods {
        // The agent has selected its pods, and their rules are installed.
        return Ok(None);
    }
    if node.exempt_namespaces.contains(&facts.namespace) {
        return Ok(Some(NotEnrolled::ExemptNamespace));
    }
    let mode = facts.labels.get(DATAPLANE_MODE);
    match mode.map(String::as_str) {
        Some("none") => Ok(Some(NotEnrolled::OptedOut)),
        Some("ambient") | None => {
            Ok(facts.annotations.contains_key(SIDECAR_STATUS).then_some(NotEnrolled::HasSidecar))
        }
        Some(other) => Err(FactsError::Metadata {
            kind: "label",
            key: DATAPLANE_MODE,
            value: other.to_owned(),
            expected: "must be ambient or none",
        }),
    }
}

/// The interception settings that the annotations contain. `node` are those of the node.
pub(crate) fn interception(
    facts: &PodFacts,
    node: &InterceptionSettings,
) -> Result<InterceptionOverlay, FactsError> {
    refuse_dns_capture(facts)?;
    let annotation = |key: &str| facts.annotations.get(key).map(|value| value.trim());
    let mut overlay = InterceptionOverlay::empty();
    for (key, settings) in SETTINGS {
        if let Some(value) = annotation(key) {
            settings.iter().for_each(|setting| overlay.set(setting, value, key));
        }
    }
    for (key, setting) in INCLUSIONS {
        if let Some(value) = annotation(key) {
            overlay.set(setting, if value.is_empty() { "none" } else { value }, key);
        }
    }
    if let Some(value) = annotation(BYPASS_INBOUND) {
        overlay.set("ingress", as_flag(value), BYPASS_INBOUND);
    }
    // Istio's included ports add to the included ranges; alone in our settings they replace them.
    if annotation(INCLUDE_PORTS).is_some() && annotation(INCLUDE_RANGES).is_none() {
        overlay.set(
            INCLUDE_CIDRS,
            &included(node.outbound.include_cidrs.as_deref()),
            INCLUDE_PORTS,
        );
    }
    Ok(overlay)
}

/// Without a DNS proxy, enrolling the pod would break its promise to capture queries.
fn refuse_dns_capture(facts: &PodFacts) -> Result<(), FactsError> {
    let Some(value) = facts.annotations.get(DNS_CAPTURE) else { return Ok(()) };
    if as_flag(value) == "false" {
        return Ok(());
    }
    Err(FactsError::Metadata {
        kind: "annotation",
        key: DNS_CAPTURE,
        value: value.clone(),
        expected: "must be false or absent: underpass has no DNS proxy yet",
    })
}

/// Istio parses booleans as Go's `strconv.ParseBool` does.
fn as_flag(value: &str) -> &str {
    match value.trim() {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => "true",
        "0" | "f" | "F" | "false" | "FALSE" | "False" => "false",
        other => other,
    }
}

fn included(cidrs: Option<&[IpNet]>) -> String {
    match cidrs {
        None => "*".to_owned(),
        Some([]) => "none".to_owned(),
        Some(cidrs) => cidrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
    }
}
