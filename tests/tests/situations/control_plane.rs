//! The sources of the mesh: a control plane that does not run, refuses, or sends what cannot be
//! used, and a broken mesh file.

use std::fs;

use underpass_config::{DeltaResponse, ResourceType};
use underpass_tests::{
    CLIENT, Family, Proxy, Scene, ScriptedControlPlane, Settings, hbone_workload, resource,
    response,
};

use crate::situation::{Doctor, Log, Metric, Situation, Status};
use crate::stage::{Broken, client_only, quick};

/// istiod's port.
const PORT: u16 = 15012;
/// The counter of ended streams and failed attempts.
const STREAMS_ENDED: &str = "underpass_control_plane_streams_ended_total";

pub(crate) const SITUATIONS: &[Situation] = &[
    Situation {
        name: "a control plane that does not run is named at the start",
        make: || Box::pin(absent()),
        status: Status::Problem("control_plane", "Connection refused"),
        doctor: Doctor("control-plane", "failure", "check that the control plane runs"),
        log: Log::Line(&["WARN", "no control plane, unready until its first state", "hint="]),
        metric: Metric::Rises(STREAMS_ENDED, &[]),
    },
    Situation {
        name: "a control plane that refuses the client is named",
        make: || Box::pin(refusing()),
        status: Status::Problem("control_plane", "it refused this client"),
        doctor: Doctor("control-plane", "failure", "it refused this client"),
        log: Log::Line(&["WARN", "no control plane", "it refused this client", "mesh.xds.token"]),
        metric: Metric::Rises(STREAMS_ENDED, &[]),
    },
    Situation {
        name: "a control plane with other roots is named",
        make: || Box::pin(untrusted()),
        status: Status::Problem("control_plane", "mesh.xds.roots contains the root"),
        doctor: Doctor("control-plane", "failure", "mesh.xds.roots contains the root"),
        log: Log::Line(&["WARN", "no control plane", "mesh.xds.roots contains the root"]),
        metric: Metric::Rises(STREAMS_ENDED, &[]),
    },
    Situation {
        name: "a control plane that is lost is named",
        make: || Box::pin(lost()),
        status: Status::Problem("control_plane", "no stream to the control plane"),
        doctor: Doctor("control-plane", "failure", "check that the control plane runs"),
        log: Log::Line(&["WARN", "no control plane, keeping the last mesh", "hint="]),
        metric: Metric::Is("underpass_control_plane_connected", &[], 0.0),
    },
    Situation {
        name: "a resource of the control plane that cannot be used is named",
        make: || Box::pin(rejected()),
        status: Status::Problem("mesh", "cannot be used: 1; authorization default/broken"),
        doctor: Doctor("control-plane", "warning", "rejected resources: 1"),
        log: Log::Line(&["ERROR", "cannot use a resource", "default/broken", "hint="]),
        metric: Metric::Rises("underpass_control_plane_rejections_total", &[]),
    },
    Situation {
        name: "a mesh file with mistakes is named",
        make: || Box::pin(broken_file()),
        status: Status::Problem("mesh", "workloads[0].workloadIps[0]"),
        doctor: Doctor("configuration", "failure", "workloads[0].workloadIps[0]"),
        log: Log::Line(&["ERROR", "cannot read the mesh", "workloads[0].workloadIps[0]", "hint="]),
        metric: Metric::Rises("underpass_mesh_updates_total", &[("result", "refused")]),
    },
];

/// The settings of the client's proxy with a control plane in the server's pod.
fn with_plane(scene: &Scene, plane: &str) -> Settings {
    quick(&scene.client, Settings::new(CLIENT).identity(&scene.client_files).section(plane))
}

async fn absent() -> Broken {
    let scene = Scene::new().await;
    let (address, roots) = (scene.server.at(Family::V4, PORT), scene.pki.roots());
    let plane = format!("mesh: {{xds: {{address: \"https://{address}\", roots: {roots:?}}}}}");
    let settings = with_plane(&scene, &plane);
    Broken::waiting(scene, settings)
}

async fn refusing() -> Broken {
    /// UNAUTHENTICATED of gRPC.
    const UNAUTHENTICATED: u32 = 16;
    let scene = Scene::new().await;
    let plane = ScriptedControlPlane::start(&scene.server, PORT, &scene.pki);
    plane.refuse(UNAUTHENTICATED);
    let settings = with_plane(&scene, &plane.settings());
    Broken::waiting(scene, settings).keep(plane)
}

async fn untrusted() -> Broken {
    let scene = Scene::new().await;
    let plane = ScriptedControlPlane::start(&scene.server, PORT, &scene.pki);
    let folder = scene.world.folder().join("other");
    fs::create_dir_all(&folder).expect("a folder");
    let other = underpass_tests::Pki::new(&folder);
    let roots = format!("mesh.xds.roots={}", other.roots().display());
    let settings = with_plane(&scene, &plane.settings()).set(&roots);
    Broken::waiting(scene, settings).keep(plane)
}

/// The workloads of the scene, with these policies.
fn state(scene: &Scene, policies: Vec<underpass_config::Resource>) -> [DeltaResponse; 2] {
    let workloads = [&scene.client, &scene.server].map(hbone_workload).into();
    [
        response(ResourceType::Address, workloads, &[]),
        response(ResourceType::Authorization, policies, &[]),
    ]
}

async fn connected(
    first: fn(&Scene) -> [DeltaResponse; 2],
) -> (Scene, ScriptedControlPlane, Proxy) {
    let scene = Scene::new().await;
    let plane = ScriptedControlPlane::start(&scene.server, PORT, &scene.pki);
    plane.set_first(&first(&scene));
    let proxy = scene.client.proxy(&with_plane(&scene, &plane.settings())).await;
    (scene, plane, proxy)
}

async fn lost() -> Broken {
    let (scene, plane, proxy) = connected(|scene| state(scene, Vec::new())).await;
    plane.end_stream();
    drop(plane);
    Broken::client(scene, proxy)
}

async fn rejected() -> Broken {
    let broken = |scene: &Scene| {
        let policy = resource(ResourceType::Authorization, "default/broken", vec![0xff]);
        state(scene, vec![policy])
    };
    let (scene, plane, proxy) = connected(broken).await;
    Broken::client(scene, proxy).keep(plane)
}

async fn broken_file() -> Broken {
    let (scene, proxy) = client_only().await;
    let new = scene.mesh.with_extension("new");
    fs::write(&new, "workloads: [{name: a, workloadIps: [nowhere]}]\n").expect("written");
    fs::rename(&new, &scene.mesh).expect("replaced");
    Broken::client(scene, proxy)
}
