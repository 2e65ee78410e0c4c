//! Prints settings as an equivalent settings file, for `underpass config show`.
//!
//! Settings contain paths of secrets, never secrets. The YAML consists of mappings of mappings,
//! scalars, and lists of scalars.

use std::fmt;

use crate::settings::Settings;
use crate::settings::declare::Written;
use crate::settings::resolve::declared;

impl Settings {
    /// Every setting that applies, with its value in the form of a settings file.
    pub fn values(&self) -> impl Iterator<Item = (&'static str, Written)> + '_ {
        declared().filter_map(|setting| Some((setting.key(), setting.written(self)?)))
    }
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Sections { settings: self, prefix: "" }.fmt(f)
    }
}

/// The settings whose keys begin with `prefix`.
pub(crate) struct Sections<'a> {
    pub(crate) settings: &'a Settings,
    pub(crate) prefix: &'a str,
}

impl fmt::Display for Sections<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut open: Vec<&str> = Vec::new();
        for setting in declared().filter(|setting| setting.key().starts_with(self.prefix)) {
            let Some(value) = setting.written(self.settings) else { continue };
            let mut sections: Vec<&str> = setting.key().split('.').collect();
            let Some(key) = sections.pop() else { continue };
            let shared = open.iter().zip(&sections).take_while(|(one, other)| one == other).count();
            for (depth, section) in sections.iter().enumerate().skip(shared) {
                writeln!(f, "{:1$}{section}:", "", depth * 2)?;
            }
            writeln!(f, "{:1$}{key}: {2}", "", sections.len() * 2, Yaml(&value))?;
            open = sections;
        }
        Ok(())
    }
}

/// A value in YAML's flow style.
struct Yaml<'a>(&'a Written);

impl fmt::Display for Yaml<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Written::Scalar(text) => write_scalar(f, text),
            Written::List(items) => {
                write_flow(f, ["[", "]"], items, |f, item: &String| write_scalar(f, item))
            }
        }
    }
}

/// Writes a collection in YAML's flow style, between these brackets.
pub(crate) fn write_flow<T>(
    f: &mut fmt::Formatter<'_>,
    [open, close]: [&str; 2],
    items: &[T],
    write: impl Fn(&mut fmt::Formatter<'_>, &T) -> fmt::Result,
) -> fmt::Result {
    f.write_str(open)?;
    for (index, item) in items.iter().enumerate() {
        f.write_str(if index == 0 { "" } else { ", " })?;
        write(f, item)?;
    }
    f.write_str(close)
}

/// Writes a plain scalar if it is unambiguous in every context, otherwise one in double quotes
/// (YAML 1.2 section 7.3.1).
pub(crate) fn write_scalar(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    if is_plain(text) {
        return f.write_str(text);
    }
    f.write_str("\"")?;
    for c in text.chars() {
        match c {
            '"' | '\\' => write!(f, "\\{c}")?,
            c if c.is_control() || matches!(c, '\u{feff}' | '\u{2028}' | '\u{2029}') => {
                write!(f, "\\u{:04x}", u32::from(c))?;
            }
            c => write!(f, "{c}")?,
        }
    }
    f.write_str("\"")
}

fn is_plain(text: &str) -> bool {
    let first = |c: u8| c.is_ascii_alphanumeric() || c == b'/';
    let others = |c: u8| c.is_ascii_alphanumeric() || b"/._-+=".contains(&c);
    let is_null = text.eq_ignore_ascii_case("null");
    text.bytes().next().is_some_and(first) && text.bytes().all(others) && !is_null
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::load::{read_text, settings_of};
    use crate::settings::resolve::keys;
    use crate::yaml::document::{Node, Value};

    const SIDECAR: &str = r#"
workload: {name: web-1, namespace: shop, serviceAccount: web, trustDomain: example.org, network: 'east: #1'}
node: {name: node-1, exempt_namespaces: [kube-system]}
mesh: {file: /etc/underpass/mesh file.yaml}
identity: {certificate: /c.pem, key: /c.key, roots: /r.pem}
interception:
  profile: sidecar
  backend: iptables-legacy
  exact: true
  install: false
  repair: false
  ipv6: reject
  on_exit: remove
  allow_host: true
  outbound:
    exclude_cidrs: ["10.0.0.0/8", "fd00::/8"]
    include_cidrs: ["0.0.0.0/0", "::/0"]
    exclude_ports: [22, 8000-8100]
    include_ports: [443]
    exclude_interfaces: [eth1, "true"]
    exclude_uids: [0, 5]
    include_gids: [6]
  inbound: {mode: tproxy, include_ports: [80, 9000-9100], exclude_interfaces: [eth2]}
  virtual_interfaces: [veth0]
  proxy_uids: [7, 8]
  proxy_gids: [9]
  dns: capture
  dns_servers: ["10.96.0.10", "::1"]
  drop_invalid: true
  loopback_cidr: 127.0.0.0/8
proxy: {outbound_port: 1, inbound_port: 2, hbone_port: 3, dns_port: 4, workers: 3, pacing: all, mtls: strict, same_node: direct, mtls_overrides: ["shop/web:80=permissive", ":9000=permissive", shop/db=strict]}
dns: {resolv_conf: /run/resolv.conf, domain: cluster.example, queries_per_second: 100, lookups_per_second: 200}
egress: mesh-only
egress_exceptions: {cidrs: [10.0.0.0/8, "fd00::1"], ports: [53, 8000-8100]}
timeouts: {connect: 250ms, handshake: 1s, frame: 7s, reply: 2s, idle: 8h, half_close: off, keepalive: 30s, drain: 3s, handover_drain: 12h, pool_idle: 2h, tunnel_idle: 3h, ejection: 4s}
take_over: {socket: /run/x.sock}
metrics: {address: "127.0.0.1:91", label_sets: 7, idle: 90s, omit_labels: [source_principal, destination_zone]}
readiness: {address: "[::1]:92"}
admin: {socket: /run/admin.sock, address: "127.0.0.1:93"}
logging: {filter: 'info,access=off', format: json, access: {connections: failures, sample_ratio: 0.25, namespaces: ["shop=all", kube-system=none]}}
tracing: {otlp: {endpoint: "https://otel:4318/x", headers: /otlp/headers, roots: /otlp/roots.pem, sample_ratio: 0.5, logs: true}}
trust: {aliases: [old.example.org, cluster.local], bundles: ["partner.org=/p, q.pem"], crls: ["/a.crl", "/b\"\\.crl"], ciphers: [aes-256-gcm]}
tunnels: {max_age: 90s, streams: 7, per_peer: 2}
limits: {connections_per_worker: 1, connections_per_source: 2, accepts_per_second: 3, handshakes: 4, handshakes_per_source: 9, tunnels_per_source: 5, tunnels_per_identity: 6, buffers: 2MiB}
"#;
    /// Settings that contradict the ones above.
    const AMBIENT: &str = r"
identity:
  istio_ca:
    address: https://istiod.istio-system.svc:15012
    server_name: istiod
    roots: /istio/root-cert.pem
    token: /var/run/secrets/tokens/istio-token
    cluster_id: 'east:#1'
    impersonate: true
  ttl: 12h
interception:
  ingress: true
  kubelet_probes: [8080, 9000-9010]
  outbound: {exclude_gids: [1], include_cidrs: none}
  inbound: {exclude_ports: [15020]}
";
    const OSM: &str = r"
identity: {local_ca: /ca}
interception: {profile: osm, outbound: {include_ports: [80]}, inbound: {include_ports: none}}
";
    const SPIRE: &str = "identity: {spire: {socket: /run/spire/agent.sock}}";
    const ZDS: &str = r"
node: {pods: {zds: /run/ztunnel.sock}}
identity: {spire: {admin_socket: /run/spire/admin.sock}}
";
    const CNI: &str = r"
node:
  name: node-1
  pods: {cni: /run/cni.sock}
  cni_install: {net_dir: /net.d, bin_dir: /bin}
  cni_results: /results
  kubernetes: auto
  kubeconfig: /kubeconfig
identity: {local_ca: /ca}
mesh:
  xds:
    address: https://istiod.istio-system.svc:15012
    server_name: istiod
    roots: /istio/root-cert.pem
    token: /var/run/secrets/tokens/istio-token
    certificate: /c.pem
    key: /c.key
    cluster_id: east
    headers: [x-revision=canary, 'a=b, c']
    on_demand: true
    unready_after: 10m
    name: underpass-x
    namespace: istio-system
";
    const DIRECTORY: &str = "node: {probes: translate, pods: {directory: /run/pods}, cluster_dns: [10.96.0.10]}\nworkload: {network: east}\nprivileges: {broker: off, user: 7}";
    const ALL: [&str; 7] = [SIDECAR, AMBIENT, OSM, SPIRE, ZDS, CNI, DIRECTORY];

    #[test]
    fn shown_settings_parse_to_the_same_settings() {
        for text in ALL.into_iter().chain([""]) {
            let first = settings_of(text).unwrap();
            let shown = first.to_string();
            assert_eq!(first, settings_of(&shown).unwrap(), "{shown}");
        }
    }

    #[test]
    fn shown_settings_cover_every_key() {
        let shown =
            ALL.map(|text| read_text("shown", &settings_of(text).unwrap().to_string()).unwrap());
        let given = ALL.map(|text| read_text("given", text).unwrap());
        for key in keys() {
            let path: Vec<&str> = key.split('.').collect();
            assert!(shown.iter().any(|shown| shown.at(&path).is_some()), "{key} is not shown");
            assert!(given.iter().any(|given| given.at(&path).is_some()), "{key} is not tried");
        }
    }

    #[test]
    fn show_nests_sections_and_quotes_ambiguous_scalars() {
        let text = settings_of(OSM).unwrap().to_string();
        let first = "workload:\n  name: default\n  namespace: default\n";
        assert!(text.starts_with(first), "{text}");
        for line in [
            "  network: \"\"\n",
            "identity:\n  local_ca: /ca\n  ttl: 24h\n",
            "  outbound:\n    exclude_cidrs: []\n",
            "    include_ports: [80]\n",
            "    include_ports: none\n",
            "proxy:\n  outbound_port: 15001\n",
            "  mtls_overrides: []\negress: allow\negress_exceptions:\n  cidrs: []\n",
            "  address: \"[::]:15020\"\n",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }

    #[test]
    fn quoted_scalars_parse_unchanged() {
        let hostile = [
            "",
            "~",
            "null",
            "Null",
            "*",
            "a: b",
            "#c",
            "-",
            "- x",
            "\"q\"",
            "back\\slash",
            "tab\t",
            "line\nfeed",
            "nul\0",
            "nel\u{85}",
            "\u{feff}bom",
            "\u{2028}",
            "\u{1f600}",
            "[x]",
            "{x}",
            "x, y",
            " lead",
            "trail ",
            "%x",
            "@x",
            "`x",
            "&x",
            "!x",
            "|",
            ">",
            "?",
            "'",
            "é",
        ];
        for text in hostile {
            let list = Written::List(vec![text.to_owned(), "next".to_owned()]);
            let yaml = format!("scalar: {}\nlist: {}\n", Yaml(&Written::scalar(text)), Yaml(&list));
            let root = read_text("hostile", &yaml).unwrap();
            let scalar = |node: &Node| match &node.value {
                Value::Scalar(text) => text.clone(),
                other => panic!("{other:?} in {yaml}"),
            };
            assert_eq!(scalar(root.at(&["scalar"]).unwrap()), text, "{yaml}");
            let Value::Sequence(items) = &root.at(&["list"]).unwrap().value else {
                panic!("{yaml}")
            };
            assert_eq!(items.iter().map(scalar).collect::<Vec<_>>(), [text, "next"]);
        }
    }
}
