//! Tests of valid and invalid settings of a node daemon.

use super::*;
use crate::settings::load::settings_of;

fn mistakes(text: &str) -> Vec<String> {
    let Err(errors) = settings_of(text) else {
        return Vec::new();
    };
    errors.problems.into_iter().map(|p| format!("{}: {}", p.key, p.reason)).collect()
}

/// Asserts that the settings of a node daemon with `more` have exactly one mistake, at `key`.
fn assert_refused(source: &str, more: &str, key: &str) {
    let text = format!("node: {{pods: {{{source}: /run/x}}}}\n{more}\n");
    let found = mistakes(&text);
    assert_eq!(found.len(), 1, "{text}: {found:?}");
    assert!(found[0].starts_with(&format!("{key}: ")), "{text}: {found:?}");
}

#[test]
fn parses_each_source_of_pods() {
    for (key, pods) in [
        ("zds", PodSourceSettings::Zds("/run/x".into())),
        ("cni", PodSourceSettings::Cni("/run/x".into())),
        ("directory", PodSourceSettings::Directory("/run/x".into())),
    ] {
        let settings = settings_of(&format!("node: {{pods: {{{key}: /run/x}}}}")).unwrap();
        assert_eq!(settings.interception.install, key != "zds", "{key}");
        assert_eq!(settings.node.pods, Some(pods));
        let exempt = if key == "zds" { &[][..] } else { &["kube-system", "istio-system"] };
        assert_eq!(settings.node.exempt_namespaces, exempt, "{key}");
    }
}

#[test]
fn rejects_exempt_namespaces_with_an_agent_that_selects_pods() {
    let node = |exempt: &str| format!("node: {{pods: {{zds: /x}}, exempt_namespaces: {exempt}}}");
    let found = mistakes(&node("[kube-system]"));
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("node.exempt_namespaces: must be empty"), "{found:?}");
    assert!(mistakes(&node("[]")).is_empty());
}

#[test]
fn settings_without_source_are_those_of_one_pod() {
    let settings = settings_of("node: {name: n1, exempt_namespaces: []}").unwrap();
    assert_eq!((settings.node.name.as_deref(), settings.node.pods), (Some("n1"), None));
    assert!(settings.node.exempt_namespaces.is_empty());
}

#[test]
fn plugin_installation_requires_both_folders() {
    let text = "node: {pods: {cni: /a}, cni_install: {net_dir: /n, bin_dir: /b}}";
    let install = settings_of(text).unwrap().node.cni_install.unwrap();
    assert_eq!((install.net_dir.to_str(), install.bin_dir.to_str()), (Some("/n"), Some("/b")));
    assert_eq!(
        mistakes("node: {pods: {cni: /a}, cni_install: {net_dir: /n}}"),
        ["node.cni_install: needs both net_dir and bin_dir"]
    );
    assert_eq!(
        mistakes("node: {pods: {directory: /a}, cni_install: {net_dir: /n, bin_dir: /b}}"),
        ["node.cni_install: has an effect only with node.pods.cni"]
    );
}

#[test]
fn rejects_several_sources() {
    let found = mistakes("node: {pods: {zds: /a, cni: /b}}");
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("node.pods: has more than one source"), "{found:?}");
}

#[test]
fn rejects_settings_of_one_pod() {
    for key in ["name", "namespace", "serviceAccount"] {
        assert_refused("cni", &format!("workload: {{{key}: web}}"), &format!("workload.{key}"));
    }
    assert_refused("zds", "interception: {allow_host: true}", "interception.allow_host");
    assert!(
        mistakes("node: {pods: {cni: /x}}\nworkload: {trustDomain: td, network: n}").is_empty()
    );
}

#[test]
fn node_daemon_rejects_rules_of_another_installer() {
    assert_refused("zds", "interception: {install: true}", "interception.install");
    for source in ["cni", "directory"] {
        assert_refused(source, "interception: {install: false}", "interception.install");
        assert_refused(source, "interception: {profile: none}", "interception.profile");
        assert_refused(source, "interception: {profile: sidecar}", "interception.profile");
    }
}

#[test]
fn rejects_identity_shared_by_all_pods() {
    let files = "identity: {certificate: c, key: k, roots: r}";
    assert_refused("cni", files, "identity");
    assert_refused("cni", "identity: {spire: {socket: /s}}", "identity.spire.socket");
    let istio = |more| {
        format!("identity: {{istio_ca: {{address: 'https://ca:1', roots: r, token: t{more}}}}}")
    };
    assert_refused("zds", &istio(""), "identity.istio_ca");
    assert!(
        mistakes(&format!("node: {{pods: {{zds: /x}}}}\n{}", istio(", impersonate: true")))
            .is_empty()
    );
    assert!(mistakes("node: {pods: {zds: /x}}\nidentity: {local_ca: /ca}").is_empty());
}

#[test]
fn kubeconfig_needs_the_plugin_and_the_name_of_the_node() {
    let node = |more: &str| format!("node: {{kubeconfig: /k, {more}}}");
    let settings = settings_of(&node("name: n1, pods: {cni: /run/x}")).unwrap().node;
    assert_eq!(settings.kubeconfig, Some("/k".into()));
    assert_eq!(settings.kubernetes, KubernetesWatch::Auto);
    for (more, mistake) in [
        ("name: n1, pods: {zds: /run/x}", "node.kubeconfig: has an effect only with node.pods.cni"),
        ("pods: {cni: /run/x}", "node.name: is missing: node.kubeconfig needs"),
        (
            "name: n1, pods: {cni: /run/x}, kubernetes: off",
            "node.kubeconfig: has no effect with node.kubernetes: off",
        ),
    ] {
        let found = mistakes(&node(more));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with(mistake), "{found:?}");
    }
}

#[test]
fn rejects_unusable_names() {
    assert_eq!(mistakes("node: {name: ''}").len(), 1);
    assert_eq!(mistakes("node: {name: 'a b'}").len(), 1);
    assert_eq!(mistakes("node: {exempt_namespaces: ['a/b']}").len(), 1);
}

#[test]
fn kubelet_probes_are_exempt_by_default_with_translation() {
    let probes = |more: &str| {
        let text = format!("node: {{probes: translate, pods: {{cni: /run/x}}}}\n{more}");
        settings_of(&text).unwrap().interception.kubelet_probes
    };
    assert_eq!(probes(""), KubeletProbes::On);
    assert_eq!(probes("interception: {kubelet_probes: off}"), KubeletProbes::Off);
    assert_eq!(settings_of("").unwrap().node.probes, NodeProbes::Off);
}

#[test]
fn rejects_probe_translation_with_agent_or_without_pods() {
    for pods in ["pods: {zds: /run/x}, ", ""] {
        let found = mistakes(&format!("node: {{{pods}probes: translate}}"));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("node.probes: "), "{found:?}");
    }
}
