//! Connections that fail on the way to the peer, at its application, or by a decision.

use std::fs;

use underpass_config::ResourceType;
use underpass_tests::{
    CLIENT, Family, Mesh, SERVER, Scene, ScriptedControlPlane, Settings, hbone_workload, response,
    tool,
};

use crate::situation::{Doctor, ERRORS, Log, Metric, Situation, Status};
use crate::stage::{Broken, both, client_only, client_settings, connect, quick, server_settings};

pub(crate) const SITUATIONS: &[Situation] = &[
    Situation {
        name: "a peer whose proxy does not run is named",
        make: || Box::pin(peer_down()),
        status: Status::Failure("connect", "check that the peer's proxy runs"),
        doctor: Doctor("peers-connect", "failure", ": connect: "),
        log: Log::Line(&["reason=\"connect\"", "15008: Connection refused", "hint="]),
        metric: Metric::Rises(ERRORS, &[("direction", "outbound"), ("reason", "connect")]),
    },
    Situation {
        name: "a firewall that drops packets to 15008 is named",
        make: || Box::pin(firewall("drop")),
        status: Status::Failure("connect_timeout", "no firewall drops packets"),
        doctor: Doctor("peers-connect", "failure", ": connect_timeout: "),
        log: Log::Line(&["reason=\"connect_timeout\"", "15008", "hint="]),
        metric: Metric::Rises(ERRORS, &[("direction", "outbound"), ("reason", "connect_timeout")]),
    },
    Situation {
        name: "a firewall that rejects connections to 15008 is named",
        make: || Box::pin(firewall("reject with icmpx type admin-prohibited")),
        status: Status::Failure("connect", "no firewall rejects its HBONE port"),
        doctor: Doctor("peers-connect", "failure", "no firewall rejects its HBONE port"),
        log: Log::Line(&["reason=\"connect\"", "No route to host", "hint="]),
        metric: Metric::Rises(ERRORS, &[("direction", "outbound"), ("reason", "connect")]),
    },
    Situation {
        name: "a policy that denies is named at its workload",
        make: || Box::pin(denied(At::Workload)),
        status: Status::Failure("policy_denied", "change the policy"),
        doctor: Doctor("proxy-failures", "warning", "explicitly denied by: default/no-client"),
        log: Log::Line(&["reason=\"policy_denied\"", "default/no-client", "hint="]),
        metric: Metric::Rises(ERRORS, &[("direction", "inbound"), ("reason", "policy_denied")]),
    },
    Situation {
        name: "a policy that denies is named at the client",
        make: || Box::pin(denied(At::Client)),
        status: Status::Failure("refused", "check the policies of the destination"),
        doctor: Doctor("proxy-failures", "warning", "refused: 1"),
        log: Log::Line(&["reason=\"refused\"", "401", "check the policies of the destination"]),
        metric: Metric::Rises(ERRORS, &[("direction", "outbound"), ("reason", "refused")]),
    },
    Situation {
        name: "a plaintext client of a strict workload is named",
        make: || Box::pin(plaintext()),
        status: Status::Failure("plaintext_refused", "add the client to the mesh"),
        doctor: Doctor("proxy-failures", "warning", "plaintext_refused"),
        log: Log::Line(&["reason=\"plaintext_refused\"", "hint="]),
        metric: Metric::Rises(ERRORS, &[("direction", "inbound"), ("reason", "plaintext_refused")]),
    },
    Situation {
        name: "an application that does not listen is named at its workload",
        make: || Box::pin(no_application(At::Workload)),
        status: Status::Failure("connect", "check that the destination listens on this port"),
        doctor: Doctor("proxy-failures", "warning", "8080: Connection refused"),
        log: Log::Line(&["reason=\"connect\"", "8080: Connection refused", "hint="]),
        metric: Metric::Rises(ERRORS, &[("direction", "inbound"), ("reason", "connect")]),
    },
    Situation {
        name: "an application that does not listen is named at the client",
        make: || Box::pin(no_application(At::Client)),
        status: Status::Failure("refused", "check that the destination listens on this port"),
        doctor: Doctor("proxy-failures", "warning", "refused: 1"),
        log: Log::Line(&["reason=\"refused\"", "503", "hint="]),
        metric: Metric::Rises(ERRORS, &[("direction", "outbound"), ("reason", "refused")]),
    },
    Situation {
        name: "a destination that the mesh lacks is named with egress: mesh-only",
        make: || Box::pin(not_in_mesh()),
        status: Status::Failure("egress_denied", "add the destination to the mesh"),
        doctor: Doctor("proxy-failures", "warning", "egress_denied"),
        log: Log::Line(&["reason=\"egress_denied\"", "hint="]),
        metric: Metric::Rises(ERRORS, &[("direction", "outbound"), ("reason", "egress_denied")]),
    },
    Situation {
        name: "a pod that the control plane's mesh lacks is named",
        make: || Box::pin(pod_not_in_mesh()),
        status: Status::Failure("pod_not_in_mesh", "add the workload to the control plane's mesh"),
        doctor: Doctor("proxy-failures", "warning", "pod_not_in_mesh"),
        log: Log::Line(&["reason=\"pod_not_in_mesh\"", "hint="]),
        metric: Metric::Rises(ERRORS, &[("direction", "inbound"), ("reason", "pod_not_in_mesh")]),
    },
    Situation {
        name: "a hostname without an address is named",
        make: || Box::pin(unknown_hostname()),
        status: Status::Failure("resolve", "resolv"),
        doctor: Doctor("dns-names", "failure", "missing.example"),
        log: Log::Line(&["reason=\"resolve\"", "missing.example", "hint="]),
        metric: Metric::Rises(ERRORS, &[("direction", "outbound"), ("reason", "resolve")]),
    },
    Situation {
        name: "a DNS server that does not answer is named",
        make: || Box::pin(silent_name_server()),
        status: Status::Name("shop.example", "check the pod's DNS servers"),
        doctor: Doctor("dns-servers", "failure", "do not answer"),
        log: Log::Line(&["a DNS query failed", "shop.example", "hint="]),
        metric: Metric::Rises("istio_dns_upstream_failures_total", &[]),
    },
];

/// The side whose tools are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Client,
    Workload,
}

async fn peer_down() -> Broken {
    let (scene, proxy) = client_only().await;
    connect(&scene).await;
    Broken::client(scene, proxy)
}

async fn firewall(verdict: &str) -> Broken {
    let (scene, client, server) = both().await;
    let chain = "type filter hook input priority -400";
    let rules =
        format!("table inet wall {{\nchain in {{\n{chain}\ntcp dport 15008 {verdict}\n}}\n}}");
    tool(&scene.server, "nft", &[&rules]).await.ok();
    connect(&scene).await;
    Broken::client(scene, client).keep(server)
}

async fn denied(at: At) -> Broken {
    let scene = Scene::new().await;
    let id = scene.pki.id(CLIENT).to_string().replace("spiffe://", "");
    let rules = format!("[[[{{principals: [{{exact: {id}}}]}}]]]");
    let mesh = Mesh::default().hbone(&scene.client).hbone(&scene.server);
    scene.set_mesh(&mesh.policy("no-client", "Deny", &rules));
    refused(scene, at).await
}

async fn no_application(at: At) -> Broken {
    refused(Scene::new().await, at).await
}

/// A connection that the server's proxy refuses.
async fn refused(scene: Scene, at: At) -> Broken {
    let client = scene.client.proxy(&client_settings(&scene)).await;
    let server = scene.server.proxy(&server_settings(&scene)).await;
    connect(&scene).await;
    match at {
        At::Client => Broken::client(scene, client).keep(server),
        At::Workload => Broken::server(scene, server).keep(client),
    }
}

async fn plaintext() -> Broken {
    let scene = Scene::new().await;
    let server = scene.server.proxy(&server_settings(&scene).set("proxy.mtls=strict")).await;
    connect(&scene).await;
    Broken::server(scene, server)
}

async fn not_in_mesh() -> Broken {
    let scene = Scene::new().await;
    scene.set_mesh(&Mesh::default().hbone(&scene.client));
    let proxy = scene.client.proxy(&client_settings(&scene).set("egress=mesh-only")).await;
    connect(&scene).await;
    Broken::client(scene, proxy)
}

async fn pod_not_in_mesh() -> Broken {
    let scene = Scene::new().await;
    let plane = ScriptedControlPlane::start(&scene.client, 15012, &scene.pki);
    let addresses = response(ResourceType::Address, vec![hbone_workload(&scene.client)], &[]);
    plane.set_first(&[addresses, response(ResourceType::Authorization, Vec::new(), &[])]);
    let client = scene.client.proxy(&client_settings(&scene)).await;
    let settings = Settings::new(SERVER).identity(&scene.server_files).section(&plane.settings());
    let server = scene.server.proxy(&quick(&scene.server, settings)).await;
    connect(&scene).await;
    Broken::server(scene, server).keep((client, plane))
}

async fn unknown_hostname() -> Broken {
    let scene = Scene::new().await;
    let fields = ", hostname: missing.example, services: {default/out.example: {80: 8080}}";
    let service = "name: out, hostname: out.example, vips: [\"/10.96.0.9\"], ports: {80: 8080}";
    let mesh = Mesh::default().hbone(&scene.client).workload_with("outside", &[], "TCP", fields);
    scene.set_mesh(&mesh.service(service));
    let proxy = scene.client.proxy(&client_settings(&scene)).await;
    scene.client.dial_and_see_reset("10.96.0.9:80".parse().expect("an address")).await;
    Broken::client(scene, proxy)
}

async fn silent_name_server() -> Broken {
    let scene = Scene::new().await;
    let server = scene.server.ip(Family::V4);
    let file = scene.client.folder().join("silent.conf");
    let resolv_conf = format!("nameserver {server}\noptions timeout:1 attempts:1\n");
    fs::write(&file, resolv_conf).expect("written");
    let settings = client_settings(&scene).set("interception.dns=capture");
    let settings = settings.set(&format!("dns.resolv_conf={}", file.display()));
    let proxy = scene.client.proxy(&settings).await;
    // Nothing listens on port 53 of the server's pod.
    let at = format!("@{server}");
    tool(&scene.client, "dig", &[&at, "+tries=1", "+timeout=3", "shop.example"]).await;
    Broken::client(scene, proxy)
}
