//! Overlays the interception settings of one pod on those of its node.
//!
//! The node's settings are written as a document, the pod's values replace values of the document,
//! and the ordinary parser reads the result. So a pod's settings have the keys, checks and errors
//! of a settings file.

use std::fmt;
use std::path::Path;

use crate::error::ConfigErrors;
use crate::settings::Settings;
use crate::settings::declare::{Declared, Document, Files, Written};
use crate::settings::load::read_text;
use crate::settings::resolve::{declared, interception_settings};
use crate::settings::show::{Sections, write_flow, write_scalar};
use crate::yaml::document::{Node, Origin, Value};
use crate::yaml::read::{Cursor, Problems};

const SECTION: &str = "interception";

/// Interception settings of one pod, which override those of its node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterceptionOverlay(Node);

impl InterceptionOverlay {
    /// Creates an overlay from a section `interception`, which [`Settings::with_interception`]
    /// checks.
    pub(crate) fn new(section: Node) -> Self {
        Self(section)
    }

    /// Creates an overlay without values.
    pub fn empty() -> Self {
        Self(Node::empty(Origin::NodeSettings))
    }

    /// Parses what [`Display`](fmt::Display) wrote; errors call it `name`.
    ///
    /// # Errors
    /// The text is no YAML document.
    pub fn parse(name: &str, text: &str) -> Result<Self, ConfigErrors> {
        read_text(name, text).map(Self)
    }

    fn is_empty(&self) -> bool {
        match &self.0.value {
            Value::Null => true,
            Value::Mapping(entries) => entries.is_empty(),
            Value::Scalar(_) | Value::Sequence(_) => false,
        }
    }

    /// Sets a setting, such as `outbound.exclude_ports`, from the value of a pod's annotation.
    /// Errors contain the annotation.
    pub fn set(&mut self, key: &str, value: &str, annotation: &str) {
        let path: Vec<&str> = key.split('.').collect();
        let origin = Origin::Annotation(annotation.to_owned());
        self.0.set(&path, scalar(value.to_owned(), &origin));
    }
}

impl fmt::Display for InterceptionOverlay {
    /// Writes a document in YAML's flow style, on one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_node(f, &self.0)
    }
}

fn write_node(f: &mut fmt::Formatter<'_>, node: &Node) -> fmt::Result {
    match &node.value {
        Value::Null => f.write_str("null"),
        Value::Scalar(text) => write_scalar(f, text),
        Value::Sequence(items) => write_flow(f, ["[", "]"], items, write_node),
        Value::Mapping(entries) => write_flow(f, ["{", "}"], entries, write_entry),
    }
}

fn write_entry(f: &mut fmt::Formatter<'_>, (key, value): &(String, Node)) -> fmt::Result {
    write_scalar(f, key)?;
    f.write_str(": ")?;
    write_node(f, value)
}

impl Settings {
    /// These settings, overridden by the interception settings of a pod. Later overlays take
    /// precedence.
    ///
    /// # Errors
    /// All mistakes in the overlays, and contradictions between them and these settings.
    pub fn with_interception(
        &self,
        overlays: &[&InterceptionOverlay],
    ) -> Result<Self, ConfigErrors> {
        // Most pods have no settings of their own.
        if overlays.iter().all(|overlay| overlay.is_empty()) {
            return Ok(self.clone());
        }
        let mut root = self.interception_document();
        for InterceptionOverlay(section) in overlays {
            root.lay_over(&[SECTION], section);
        }
        self.read_interception(&root)
    }

    /// The interception settings as a settings file, for another process with these settings of
    /// the node.
    #[must_use]
    pub fn interception_text(&self) -> String {
        Sections { settings: self, prefix: "interception." }.to_string()
    }

    /// These settings with the interception settings of a text that
    /// [`Settings::interception_text`] wrote.
    ///
    /// # Errors
    /// All mistakes in the text, and contradictions between it and these settings.
    pub fn with_interception_text(&self, text: &str) -> Result<Self, ConfigErrors> {
        if text == self.interception_text() {
            return Ok(self.clone());
        }
        self.read_interception(&read_text("pod", text)?)
    }

    fn read_interception(&self, root: &Node) -> Result<Self, ConfigErrors> {
        let problems = Problems::default();
        let files = Files { folder: Path::new("") };
        let document = Document { root: Cursor::root(root, &problems), files };
        let interception = interception_settings(document, &self.node);
        let interception = problems.or_else(interception)?;
        Ok(Self { interception, ..self.clone() })
    }

    /// A document with these interception settings. It omits defaults that depend on other
    /// settings, so that they follow from the pod's settings.
    fn interception_document(&self) -> Node {
        let all = declared().filter(|setting| setting.key().split('.').next() == Some(SECTION));
        let (derived, fixed): (Vec<_>, Vec<_>) = all.partition(|setting| setting.is_derived());
        let mut root = Node::empty(Origin::NodeSettings);
        fixed.into_iter().for_each(|setting| add(&mut root, setting, self));
        let defaults = self.read_interception(&root).ok();
        for setting in derived {
            let default = defaults.as_ref().and_then(|defaults| setting.written(defaults));
            if default != setting.written(self) {
                add(&mut root, setting, self);
            }
        }
        root
    }
}

fn add(root: &mut Node, setting: &dyn Declared, settings: &Settings) {
    let path: Vec<&str> = setting.key().split('.').collect();
    let value = match setting.written(settings) {
        None => return,
        Some(Written::Scalar(text)) => scalar(text, &Origin::NodeSettings),
        Some(Written::List(items)) => {
            let items = items.into_iter().map(|item| scalar(item, &Origin::NodeSettings));
            let value = Value::Sequence(items.collect());
            Node { value, tag: None, origin: Origin::NodeSettings }
        }
    };
    root.set(&path, value);
}

fn scalar(text: String, origin: &Origin) -> Node {
    Node { value: Value::Scalar(text), tag: None, origin: origin.clone() }
}

#[cfg(test)]
mod tests {
    use crate::settings::load::settings_of;
    use crate::settings::{KubeletProbes, PortRange, Profile};

    use super::*;

    fn overlay(text: &str) -> InterceptionOverlay {
        InterceptionOverlay::new(read_text("pod.yaml", text).unwrap())
    }

    fn with_overlays(node: &str, overlays: &[&InterceptionOverlay]) -> Result<Settings, String> {
        let node = settings_of(node).unwrap();
        node.with_interception(overlays).map_err(|errors| errors.to_string())
    }

    #[test]
    fn settings_without_overlay_are_unchanged() {
        for node in [
            "",
            "interception: {exact: true}",
            "interception: {profile: sidecar, proxy_uids: [7], loopback_cidr: 127.0.0.0/8}",
            "interception: {profile: osm, outbound: {include_ports: [80]}}",
            "interception: {profile: none, dns: capture, dns_servers: [10.0.0.10]}",
            "interception: {kubelet_probes: [8080], inbound: {include_ports: none}}",
        ] {
            assert_eq!(with_overlays(node, &[]).unwrap(), settings_of(node).unwrap(), "{node}");
        }
    }

    #[test]
    fn overlay_replaces_values_and_keeps_the_others() {
        let node = "interception: {outbound: {exclude_ports: [22], exclude_cidrs: [10.0.0.0/8]}}";
        let pod = overlay("{outbound: {exclude_ports: [80, 443]}, kubelet_probes: on}");
        let settings = with_overlays(node, &[&pod]).unwrap().interception;
        assert_eq!(settings.outbound.exclude_ports, [80, 443].map(PortRange::from));
        assert_eq!(settings.outbound.exclude_cidrs.len(), 1);
        assert_eq!(settings.kubelet_probes, KubeletProbes::On);
    }

    #[test]
    fn written_overlay_parses_to_the_same_settings() {
        for text in [
            "{}",
            "outbound: {exclude_ports: [22, 80], exclude_cidrs: []}\nkubelet_probes: on",
            "virtual_interfaces: [\"a: b, {c}\", \"tab\\tquote\\\"\"]\n\"odd: key\": null",
        ] {
            let written = overlay(text).to_string();
            assert!(!written.contains('\n'), "{written}");
            let parsed = InterceptionOverlay::parse("again", &written).unwrap();
            assert_eq!(parsed.to_string(), written, "{text}");
            assert_eq!(
                with_overlays("", &[&parsed]).is_ok(),
                with_overlays("", &[&overlay(text)]).is_ok()
            );
        }
        let ports = overlay("outbound: {exclude_ports: [22]}").to_string();
        let parsed = InterceptionOverlay::parse("again", &ports).unwrap();
        let settings = with_overlays("", &[&parsed]).unwrap().interception;
        assert_eq!(settings.outbound.exclude_ports, [PortRange::from(22)]);
    }

    #[test]
    fn last_overlay_takes_precedence() {
        let [first, last] = ["{ingress: true, drop_invalid: true}", "{ingress: false}"];
        let settings = with_overlays("", &[&overlay(first), &overlay(last)]).unwrap().interception;
        assert!(!settings.ingress && settings.drop_invalid);
    }

    #[test]
    fn derived_defaults_follow_settings_of_the_pod() {
        let settings = with_overlays("", &[&overlay("profile: sidecar")]).unwrap().interception;
        assert_eq!((settings.profile, settings.proxy_uids), (Profile::Sidecar, vec![1337]));

        let only_ports = overlay("outbound: {include_ports: [443]}");
        let settings = with_overlays("", &[&only_ports]).unwrap().interception;
        assert_eq!(settings.outbound.include_cidrs, Some(Vec::new()));
    }

    #[test]
    fn reports_every_mistake_with_its_place() {
        let mut annotations = InterceptionOverlay::empty();
        annotations.set("virtual_interfaces", "eth0 -j ACCEPT", "istio.io/some-interfaces");
        let file = overlay("ipv6: maybe\nexclude: 1");
        let errors = with_overlays("", &[&annotations, &file]).unwrap_err();
        for part in [
            "3 mistakes",
            "annotation istio.io/some-interfaces: interception.virtual_interfaces[0]: \"eth0 -j ACCEPT\"",
            "pod.yaml:1:7: interception.ipv6: \"maybe\"",
            "pod.yaml:2:10: interception.exclude: \"1\": no such key",
        ] {
            assert!(errors.contains(part), "{part}\n{errors}");
        }
    }

    #[test]
    fn reports_contradictions_with_the_nodes_settings() {
        let node = "interception: {profile: sidecar, outbound: {exclude_gids: [5]}}";
        let errors = with_overlays(node, &[&overlay("outbound: {include_gids: [6]}")]).unwrap_err();
        assert!(
            errors.contains("the node's settings: interception.outbound.exclude_gids"),
            "{errors}"
        );
    }

    #[test]
    fn settings_of_a_nodes_pod_obey_the_restrictions_of_the_node() {
        let node = "node: {probes: translate, pods: {directory: /pods}}";
        let settings = with_overlays(node, &[]).unwrap();
        assert_eq!(settings.interception.kubelet_probes, KubeletProbes::On);
        let off = with_overlays(node, &[&overlay("kubelet_probes: off")]).unwrap();
        assert_eq!(off.interception.kubelet_probes, KubeletProbes::Off);
        for refused in ["profile: sidecar", "allow_host: true", "install: false"] {
            let errors = with_overlays(node, &[&overlay(refused)]).unwrap_err();
            assert!(errors.contains("with node.pods"), "{refused}: {errors}");
        }
    }

    #[test]
    fn interception_text_gives_another_process_the_same_settings() {
        let node = "node: {probes: translate, pods: {directory: /pods}}";
        for pod in [
            "{}",
            "{kubelet_probes: [8080], ingress: true, virtual_interfaces: [veth0]}",
            "{outbound: {include_ports: [443]}, inbound: {exclude_ports: [9000-9010]}, exact: true}",
            "{outbound: {include_cidrs: none, exclude_uids: [5]}, ipv6: reject, on_exit: remove}",
        ] {
            let settings = with_overlays(node, &[&overlay(pod)]).unwrap();
            let read = settings_of(node).unwrap();
            let read = read.with_interception_text(&settings.interception_text()).unwrap();
            assert_eq!(read, settings, "{pod}");
        }
    }

    #[test]
    fn rejects_section_that_is_not_a_mapping() {
        for text in ["ambient", "[1]"] {
            let errors = with_overlays("", &[&overlay(text)]).unwrap_err();
            assert!(errors.contains("must be a mapping"), "{errors}");
        }
    }
}
