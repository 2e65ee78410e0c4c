//! Settings as the YAML that would say the same: what `underpass config show` prints.
//!
//! Paths of secrets are shown, their contents never: settings do not hold them.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use crate::settings::{
    Egress, EgressSettings, IdentitySettings, InterceptionSettings, KubeletProbes, LogFormat,
    Settings, TakeOver,
};

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let workload = &self.workload;
        writeln!(
            f,
            "workload: {{name: {}, namespace: {}, serviceAccount: {}, trustDomain: {}, network: {:?}}}",
            workload.name,
            workload.namespace,
            workload.service_account,
            workload.trust_domain,
            workload.network
        )?;
        if let Some(file) = &self.mesh_file {
            writeln!(f, "mesh: {{file: {}}}", path(file))?;
        }
        self.fmt_identity(f)?;
        self.fmt_trust(f)?;
        self.fmt_interception(f)?;
        self.fmt_proxy(f)?;
        self.fmt_egress(f)?;
        self.fmt_tunnels(f)?;
        self.fmt_limits(f)?;
        let (limit, idle) = (self.series.limit, Millis(self.series.idle));
        writeln!(
            f,
            "metrics: {{address: \"{}\", label_sets: {limit}, idle: {idle}}}",
            self.metrics
        )?;
        writeln!(f, "readiness: {{address: \"{}\"}}", self.readiness)?;
        let format = match self.logging.format {
            LogFormat::Plain => "plain",
            LogFormat::Json => "json",
        };
        writeln!(f, "logging: {{filter: {:?}, format: {format}}}", self.logging.filter.as_str())
    }
}

impl Settings {
    fn fmt_identity(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.identity {
            None => Ok(()),
            Some(IdentitySettings::Files(files)) => writeln!(
                f,
                "identity: {{certificate: {}, key: {}, roots: {}}}",
                path(&files.certificate),
                path(&files.key),
                path(&files.roots)
            ),
            Some(IdentitySettings::LocalCa(ca)) => {
                writeln!(f, "identity: {{local_ca: {}, ttl: {}}}", path(&ca.dir), Millis(ca.ttl))
            }
            Some(IdentitySettings::IstioCa(ca)) => {
                writeln!(f, "identity:\n  istio_ca:\n    address: {:?}", ca.address)?;
                if let Some(name) = &ca.server_name {
                    writeln!(f, "    server_name: {name:?}")?;
                }
                writeln!(f, "    roots: {}\n    token: {}", path(&ca.roots), path(&ca.token))?;
                writeln!(f, "    cluster_id: {:?}", ca.cluster_id)?;
                writeln!(f, "    impersonate: {}\n  ttl: {}", ca.impersonate, Millis(ca.ttl))
            }
            Some(IdentitySettings::Spire(spire)) => {
                writeln!(f, "identity: {{spire: {{socket: {}}}}}", path(&spire.socket))
            }
        }
    }

    fn fmt_trust(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let trust = &self.trust;
        let bundles = trust.bundles.iter();
        let bundles: Vec<String> = bundles
            .map(|bundle| {
                format!("{:?}", format!("{}={}", bundle.trust_domain, bundle.file.display()))
            })
            .collect();
        let crls: Vec<String> = trust.crls.iter().map(|file| path(file)).collect();
        writeln!(f, "trust:\n  aliases: {}", texts(&trust.aliases))?;
        writeln!(f, "  bundles: {}\n  crls: {}", bare(&bundles), bare(&crls))?;
        writeln!(f, "  ciphers: {}", bare(&trust.ciphers))
    }

    fn fmt_interception(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let settings = &self.interception;
        writeln!(f, "interception:")?;
        writeln!(f, "  profile: {}", settings.profile)?;
        writeln!(f, "  backend: {}", settings.backend)?;
        writeln!(f, "  exact: {}", settings.exact)?;
        writeln!(f, "  install: {}", settings.install)?;
        writeln!(f, "  repair: {}", settings.repair)?;
        writeln!(f, "  ipv6: {}", settings.ipv6)?;
        writeln!(f, "  on_exit: {}", settings.on_exit)?;
        writeln!(f, "  allow_host: {}", settings.allow_host)?;
        self.fmt_capture(f)?;
        writeln!(f, "  virtual_interfaces: {}", texts(&settings.virtual_interfaces))?;
        writeln!(f, "  proxy_uids: {}", bare(&settings.proxy_uids))?;
        writeln!(f, "  proxy_gids: {}", bare(&settings.proxy_gids))?;
        writeln!(f, "  dns: {}", settings.dns)?;
        writeln!(f, "  dns_servers: {}", texts(&settings.dns_servers))?;
        writeln!(f, "  drop_invalid: {}", settings.drop_invalid)?;
        writeln!(f, "  ingress: {}", settings.ingress)?;
        match &settings.kubelet_probes {
            KubeletProbes::Ports(ports) => writeln!(f, "  kubelet_probes: {}", bare(ports))?,
            word => writeln!(f, "  kubelet_probes: {word}")?,
        }
        writeln!(f, "  loopback_cidr: {}", settings.loopback_cidr)
    }

    fn fmt_capture(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let InterceptionSettings { outbound, inbound, .. } = &self.interception;
        writeln!(f, "  outbound:")?;
        writeln!(f, "    exclude_cidrs: {}", texts(&outbound.exclude_cidrs))?;
        writeln!(f, "    include_cidrs: {}", included(outbound.include_cidrs.as_deref(), texts))?;
        writeln!(f, "    exclude_ports: {}", bare(&outbound.exclude_ports))?;
        writeln!(f, "    include_ports: {}", bare(&outbound.include_ports))?;
        writeln!(f, "    exclude_interfaces: {}", texts(&outbound.exclude_interfaces))?;
        writeln!(f, "    exclude_uids: {}", bare(&outbound.exclude_uids))?;
        writeln!(f, "    exclude_gids: {}", bare(&outbound.exclude_gids))?;
        writeln!(f, "    include_gids: {}", bare(&outbound.include_gids))?;
        writeln!(f, "  inbound:")?;
        writeln!(f, "    mode: {}", inbound.mode)?;
        writeln!(f, "    include_ports: {}", included(inbound.include_ports.as_deref(), bare))?;
        writeln!(f, "    exclude_ports: {}", bare(&inbound.exclude_ports))?;
        writeln!(f, "    exclude_interfaces: {}", texts(&inbound.exclude_interfaces))
    }

    fn fmt_proxy(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let proxy = &self.proxy;
        let workers = proxy.workers.map_or_else(|| "auto".to_owned(), |n| n.to_string());
        writeln!(
            f,
            "proxy: {{outbound_port: {}, inbound_port: {}, hbone_port: {}, dns_port: {}, workers: {workers}, mtls: {}, mtls_overrides: {}}}",
            proxy.outbound_port,
            proxy.inbound_port,
            proxy.hbone_port,
            proxy.dns_port,
            proxy.mtls.default,
            texts(&proxy.mtls.overrides)
        )
    }

    fn fmt_egress(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let EgressSettings { mode, cidrs, ports } = &self.egress;
        let mode = match mode {
            Egress::Allow => "allow",
            Egress::MeshOnly => "mesh-only",
        };
        writeln!(f, "egress: {mode}")?;
        writeln!(f, "egress_exceptions: {{cidrs: {}, ports: {}}}", texts(cidrs), bare(ports))
    }

    fn fmt_tunnels(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tunnels = &self.tunnels;
        writeln!(
            f,
            "tunnels: {{max_age: {}, streams: {}, per_peer: {}}}",
            Millis(tunnels.max_age),
            tunnels.streams,
            tunnels.per_peer
        )
    }

    fn fmt_limits(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let l = &self.limits;
        writeln!(
            f,
            "limits:\n  connections_per_worker: {}\n  connections_per_source: {}\n  accepts_per_second: {}\n  \
             handshakes: {}\n  handshakes_per_source: {}\n  tunnels_per_source: {}\n  \
             tunnels_per_identity: {}\n  buffers: {}KiB",
            l.connections_per_worker,
            or_off(l.connections_per_source),
            or_off(l.accepts_per_second),
            l.handshakes,
            l.handshakes_per_source,
            or_off(l.tunnels_per_source),
            or_off(l.tunnels_per_identity),
            l.buffers >> 10
        )?;
        let t = &self.timeouts;
        writeln!(
            f,
            "timeouts: {{connect: {}, handshake: {}, frame: {}, reply: {}, idle: {}, half_close: {}, keepalive: {}, drain: {}, \
             handover_drain: {}, pool_idle: {}, tunnel_idle: {}, ejection: {}}}",
            Millis(t.connect),
            Millis(t.handshake),
            Millis(t.frame),
            Millis(t.reply),
            or_off(t.idle.map(Millis)),
            or_off(t.half_close.map(Millis)),
            Millis(t.keepalive),
            Millis(t.drain),
            Millis(t.handover_drain),
            Millis(t.pool_idle),
            Millis(t.tunnel_idle),
            Millis(t.ejection)
        )?;
        match &self.take_over {
            TakeOver::Auto => writeln!(f, "take_over: {{socket: auto}}"),
            TakeOver::At(socket) => writeln!(f, "take_over: {{socket: {}}}", path(socket)),
            TakeOver::Off => writeln!(f, "take_over: {{socket: off}}"),
        }
    }
}

/// A value that may be `off`.
fn or_off<T: fmt::Display>(value: Option<T>) -> String {
    value.map_or_else(|| "off".to_owned(), |value| value.to_string())
}

/// A path in quotes.
fn path(path: &Path) -> String {
    format!("{:?}", path.display().to_string())
}

/// A list whose items need quotes: YAML would read a colon or a word of its own into them.
fn texts<T: fmt::Display>(items: &[T]) -> String {
    // No item has a quote or a backslash in it: resolving refuses them.
    let items: Vec<String> = items.iter().map(|item| format!("\"{item}\"")).collect();
    format!("[{}]", items.join(", "))
}

/// A list whose items need no quotes, or have them.
fn bare<T: fmt::Display>(items: &[T]) -> String {
    let items: Vec<String> = items.iter().map(ToString::to_string).collect();
    format!("[{}]", items.join(", "))
}

/// A list that says everything when it is absent, and nothing in a word: `[]` would say everything too.
fn included<T>(items: Option<&[T]>, list: impl Fn(&[T]) -> String) -> String {
    match items {
        None => "\"*\"".to_owned(),
        Some([]) => "none".to_owned(),
        Some(items) => list(items),
    }
}

/// A duration in the largest unit that a setting can have and that loses nothing.
struct Millis(Duration);

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_millis() {
            millis if millis % 1000 == 0 => write!(f, "{}s", millis / 1000),
            millis => write!(f, "{millis}ms"),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::load::{read_text, settings_of};
    use crate::resolve::KEYS;

    const SIDECAR: &str = r#"
workload: {name: web-1, namespace: shop, serviceAccount: web, trustDomain: example.org, network: 'east: #1'}
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
proxy: {outbound_port: 1, inbound_port: 2, hbone_port: 3, dns_port: 4, workers: 3, mtls: strict, mtls_overrides: ["shop/web:80=permissive", ":9000=permissive", shop/db=strict]}
egress: mesh-only
egress_exceptions: {cidrs: [10.0.0.0/8, "fd00::1"], ports: [53, 8000-8100]}
timeouts: {connect: 250ms, handshake: 1s, frame: 7s, reply: 2s, idle: 8h, half_close: off, keepalive: 30s, drain: 3s, handover_drain: 12h, pool_idle: 2h, tunnel_idle: 3h, ejection: 4s}
take_over: {socket: /run/x.sock}
metrics: {address: "127.0.0.1:91", label_sets: 7, idle: 90s}
readiness: {address: "[::1]:92"}
logging: {filter: 'info,access=off', format: json}
trust: {aliases: [old.example.org, cluster.local], bundles: ["partner.org=/p, q.pem"], crls: ["/a.crl", "/b\"\\.crl"], ciphers: [aes-256-gcm]}
tunnels: {max_age: 90s, streams: 7, per_peer: 2}
limits: {connections_per_worker: 1, connections_per_source: 2, accepts_per_second: 3, handshakes: 4, handshakes_per_source: 9, tunnels_per_source: 5, tunnels_per_identity: 6, buffers: 2MiB}
"#;
    /// What does not go together with the above.
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

    #[test]
    fn what_is_shown_can_be_read_again_and_says_the_same() {
        for text in [SIDECAR, AMBIENT, OSM, SPIRE, ""] {
            let first = settings_of(text).unwrap();
            let shown = first.to_string();
            assert_eq!(first, settings_of(&shown).unwrap(), "{shown}");
        }
    }

    #[test]
    fn every_key_is_shown_and_tried() {
        let given = [SIDECAR, AMBIENT, OSM, SPIRE];
        let shown =
            given.map(|text| read_text("shown", &settings_of(text).unwrap().to_string()).unwrap());
        let given = given.map(|text| read_text("given", text).unwrap());
        for key in KEYS {
            let path: Vec<&str> = key.split('.').collect();
            assert!(shown.iter().any(|shown| shown.at(&path).is_some()), "{key} is not shown");
            assert!(given.iter().any(|given| given.at(&path).is_some()), "{key} is not tried");
        }
    }
}
