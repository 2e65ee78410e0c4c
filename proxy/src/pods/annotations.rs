//! Istio's labels and annotations of a pod: whether the pod is enrolled, and its interception
//! settings.
//!
//! Annotations become values under `interception`, which the parser of the settings validates. So
//! it also rejects hostile values, such as an interface name with arguments of iptables
//! (CVE-2026-23766).

use std::fmt;

use underpass_config::{
    InterceptionOverlay, InterceptionSettings, IpNet, NodeSettings, PodSourceSettings,
};

use crate::pods::facts::{FactsError, PodFacts};

/// A label of a pod, or of its namespace.
pub(crate) const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
const SIDECAR_STATUS: &str = "sidecar.istio.io/status";
const BYPASS_INBOUND: &str = "ambient.istio.io/bypass-inbound-capture";
const DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";
const INCLUDE_RANGES: &str = "traffic.sidecar.istio.io/includeOutboundIPRanges";
const INCLUDE_PORTS: &str = "traffic.sidecar.istio.io/includeOutboundPorts";
const INCLUDE_CIDRS: &str = "outbound.include_cidrs";

/// Annotations, each with the settings that it sets.
const SETTINGS_BY_ANNOTATION: &[(&str, &[&str])] = &[
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

/// Annotations in which an empty value means nothing, and `*` means everything.
const INCLUSION_ANNOTATIONS: &[(&str, &str)] = &[
    (INCLUDE_RANGES, INCLUDE_CIDRS),
    ("traffic.sidecar.istio.io/includeInboundPorts", "inbound.include_ports"),
];

/// The reason for leaving a pod out of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExemptReason {
    /// Its namespace is in `node.exempt_namespaces`.
    ExemptNamespace,
    /// The label `istio.io/dataplane-mode: none` of the pod, or of its namespace.
    OptedOut,
    /// The annotation `sidecar.istio.io/status`.
    HasSidecar,
}

impl fmt::Display for ExemptReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ExemptNamespace => f.write_str("node.exempt_namespaces contains its namespace"),
            Self::OptedOut => {
                write!(f, "the label {DATAPLANE_MODE} of the pod or its namespace is none")
            }
            Self::HasSidecar => write!(f, "it has a sidecar (annotation {SIDECAR_STATUS})"),
        }
    }
}

/// The reason not to enrol the pod, from the node's settings and the pod's labels and annotations.
pub(crate) fn exemption(
    facts: &PodFacts,
    node: &NodeSettings,
) -> Result<Option<ExemptReason>, FactsError> {
    if let Some(PodSourceSettings::Zds(_)) = node.pods {
        // The node agent has already selected its pods and installed their rules.
        return Ok(None);
    }
    if node.exempt_namespaces.contains(&facts.namespace) {
        return Ok(Some(ExemptReason::ExemptNamespace));
    }
    let mode = facts.labels.get(DATAPLANE_MODE).or(facts.namespace_mode.as_ref());
    match mode.map(String::as_str) {
        Some("none") => Ok(Some(ExemptReason::OptedOut)),
        Some("ambient") | None => {
            Ok(facts.annotations.contains_key(SIDECAR_STATUS).then_some(ExemptReason::HasSidecar))
        }
        Some(other) => Err(FactsError::Metadata {
            kind: "label",
            key: DATAPLANE_MODE,
            value: other.to_owned(),
            expected: "must be ambient or none",
        }),
    }
}

/// The pod's interception settings: those of `node`, with the values of the annotations.
pub(crate) fn interception(
    facts: &PodFacts,
    node: &InterceptionSettings,
) -> Result<InterceptionOverlay, FactsError> {
    let annotation = |key: &str| facts.annotations.get(key).map(|value| value.trim());
    let mut overlay = InterceptionOverlay::empty();
    for (key, settings) in SETTINGS_BY_ANNOTATION {
        if let Some(value) = annotation(key) {
            settings.iter().for_each(|setting| overlay.set(setting, value, key));
        }
    }
    for (key, setting) in INCLUSION_ANNOTATIONS {
        if let Some(value) = annotation(key) {
            overlay.set(setting, if value.is_empty() { "none" } else { value }, key);
        }
    }
    if let Some(value) = annotation(DNS_CAPTURE) {
        overlay.set("dns", dns(value), DNS_CAPTURE);
        if normalized_bool(value) == "false" {
            // The node's list has a meaning with capture only.
            overlay.set("dns_servers", "", DNS_CAPTURE);
        }
    }
    if let Some(value) = annotation(BYPASS_INBOUND) {
        overlay.set("ingress", normalized_bool(value), BYPASS_INBOUND);
    }
    // In Istio included ports add to the included ranges; in these settings they would replace the
    // ranges.
    if annotation(INCLUDE_PORTS).is_some() && annotation(INCLUDE_RANGES).is_none() {
        overlay.set(
            INCLUDE_CIDRS,
            &included(node.outbound.include_cidrs.as_deref()),
            INCLUDE_PORTS,
        );
    }
    Ok(overlay)
}

/// The setting for Istio's boolean. The parser of the settings rejects other values.
fn dns(value: &str) -> &str {
    match normalized_bool(value) {
        "true" => "capture",
        "false" => "off",
        _ => "must be true or false",
    }
}

/// Istio parses booleans with Go's `strconv.ParseBool`.
fn normalized_bool(value: &str) -> &str {
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
