//! A client's pod with a DNS proxy, and a pod with dnsmasq as its server.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use underpass_tests::{Background, Family, Mesh, Pod, Proxy, Scene, Settings, tool, until};

/// A service in the mesh, and its address.
pub(crate) const SERVICE: &str = "web.default.svc.cluster.local";
pub(crate) const VIP: &str = "10.99.0.1";

/// Pods with a server, and the settings of the client's proxy.
pub(crate) struct DnsScene {
    pub(crate) client: Pod,
    pub(crate) server: Pod,
    pub(crate) settings: Settings,
    _server: Background,
}

impl DnsScene {
    /// Starts the server and the client's proxy, whose mesh is a file.
    pub(crate) async fn start(profile: &str) -> (Self, Proxy) {
        let scene = Scene::new().await;
        let vips = format!("vips: [/{VIP}, '/fd99::1']");
        let mesh = Mesh::default().hbone(&scene.client);
        let mesh = mesh.service(&format!("name: web, hostname: {SERVICE}, {vips}"));
        scene.set_mesh(&mesh);
        let settings = scene.client_settings();
        Self::with(scene, settings.set(profile)).await
    }

    /// Starts the server and the client's proxy with these settings of its mesh.
    pub(crate) async fn with(scene: Scene, settings: Settings) -> (Self, Proxy) {
        let Scene { client, server, .. } = scene;
        let resolv_conf = resolv_conf(&client);
        let settings = settings
            .set("interception.dns=capture")
            .set(&format!("dns.resolv_conf={}", resolv_conf.display()));
        let _server = dnsmasq(&server, &hosts(&server)).await;
        let scene = Self { client, server, settings, _server };
        scene.write_resolv_conf(&scene.nameserver());
        let proxy = scene.client.proxy(&scene.settings).await;
        (scene, proxy)
    }

    /// The resolver settings of the client.
    pub(crate) fn nameserver(&self) -> String {
        let search = "search default.svc.cluster.local svc.cluster.local cluster.local";
        format!("nameserver {}\n{search}\noptions ndots:5\n", self.server.ip(Family::V4))
    }

    pub(crate) fn write_resolv_conf(&self, text: &str) {
        fs::write(resolv_conf(&self.client), text).expect("a file");
    }

    /// The output of dig, which asks the server's address.
    pub(crate) async fn dig(&self, family: Family, arguments: &[&str]) -> String {
        let server = format!("@{}", self.server.ip(family));
        let arguments = [&[&*server], arguments].concat();
        tool(&self.client, "dig", &arguments).await.ok()
    }

    /// Asks until the output contains `part`.
    pub(crate) async fn until_dig(&self, part: &str, arguments: &[&str]) -> String {
        let mut found = String::new();
        until(part, async || {
            found = self.dig(Family::V4, arguments).await;
            found.contains(part)
        })
        .await;
        found
    }

    /// The output of a program that uses the client's resolver settings.
    pub(crate) async fn with_resolv_conf(&self, command: &[&str]) -> String {
        let file = resolv_conf(&self.client);
        let script = "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"";
        let file = file.to_str().expect("a path");
        let shell = ["--mount", "sh", "-c", script, file];
        tool(&self.client, "unshare", &[&shell, command].concat()).await.ok()
    }

    /// Starts another dnsmasq.
    pub(crate) async fn dnsmasq_in(&self, pod: &Pod, arguments: &[&str]) -> Background {
        let arguments: Vec<_> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        dnsmasq(pod, &arguments).await
    }
}

fn resolv_conf(pod: &Pod) -> PathBuf {
    pod.folder().join("resolv.conf")
}

/// The names that the server knows.
fn hosts(pod: &Pod) -> Vec<String> {
    let mut hosts = String::from(
        "192.0.2.7 other.example\n2001:db8::7 other.example\n192.0.2.4 four.example\n",
    );
    for count in [10, 100, 3000] {
        for n in 0..count {
            let _written = writeln!(hosts, "10.8.{}.{} n{count}.example", n / 250, n % 250);
        }
    }
    let file = pod.folder().join("dnsmasq-hosts");
    fs::write(&file, hosts).expect("a file");
    vec![format!("--addn-hosts={}", file.display())]
}

/// Starts dnsmasq on port 53 and waits until it answers.
pub(crate) async fn dnsmasq(pod: &Pod, arguments: &[String]) -> Background {
    let common = ["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"];
    let quiet = [
        "--user=root",
        "--pid-file=",
        "--local-ttl=60",
        "--bind-interfaces",
        "--local=/missing.example/",
    ];
    let more: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let arguments = [&common[..], &quiet, &more].concat();
    let server = pod.background(Path::new("dnsmasq"), &arguments);
    until("dnsmasq answers", async || {
        let asked = ["@127.0.0.1", "+tries=1", "+timeout=1", "version.bind", "chaos", "txt"];
        tool(pod, "dig", &asked).await.status.success()
    })
    .await;
    server
}
