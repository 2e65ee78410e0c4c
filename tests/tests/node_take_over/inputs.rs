//! Hot restarts with a mesh from a control plane, and with certificates from a SPIRE agent.

use std::sync::Arc;

use underpass_config::ResourceType;
use underpass_tests::{
    APP, Family, Proxy, ScriptedControlPlane, Server, Settings, SpireAgent, deny_port,
    hbone_workload, response,
};

use crate::load::start_load;
use crate::scene::{Mode, Scene};

/// istiod's port.
const PORT: u16 = 15012;

pub(crate) async fn control_plane(mode: Mode) {
    let scene = Arc::new(Scene::new().await);
    let plane = ScriptedControlPlane::start(&scene.node, PORT, &scene.pki);
    let (address, policy) = (ResourceType::Address, ResourceType::Authorization);
    let workloads = [&scene.a, &scene.b].map(hbone_workload).into();
    plane.set_first(&[response(address, workloads, &[]), response(policy, Vec::new(), &[])]);
    let settings = scene.settings_with(mode, &plane.settings(), &scene.identity_section());
    let mut daemon = restarted_twice(&scene, &settings).await;
    // The new process follows the control plane.
    plane.send(&response(policy, vec![deny_port("deny", APP)], &[]));
    daemon.line(&["the change of the mesh is in force"]).await;
    scene.a.dial_and_see_reset(scene.b.at(Family::V4, APP)).await;
    assert!(daemon.stop().await.success(), "{}", daemon.log());
}

/// A control plane that does not answer the new process leaves every pod to the old one.
pub(crate) async fn silent_control_plane() {
    let scene = Scene::new().await;
    let plane = ScriptedControlPlane::start(&scene.node, PORT, &scene.pki);
    let (address, policy) = (ResourceType::Address, ResourceType::Authorization);
    let workloads: Vec<_> = [&scene.a, &scene.b].map(hbone_workload).into();
    let first = [response(address, workloads, &[]), response(policy, Vec::new(), &[])];
    plane.set_first(&first);
    let settings = scene.settings_with(Mode::Broker, &plane.settings(), &scene.identity_section());
    let mut daemon = scene.daemon_with(&settings).await;
    let _echo = Server::echo(&scene.b, APP);
    plane.set_first(&[]);
    let successor = settings.clone().take_over();
    {
        let mut starting = std::pin::pin!(scene.node.try_proxy(&successor));
        tokio::select! {
            _ = &mut starting => panic!("it has no mesh"),
            line = daemon.line(&["another process is taking over"]) => drop(line),
        }
        scene.echoed().await;
        // Dropping it kills the new process.
    }
    daemon.line(&["take-over by another process failed"]).await;
    scene.serves(&["a", "b"]).await;
    scene.echoed().await;
    plane.set_first(&first);
    let _new = scene.start_successor_with(&mut daemon, settings).await;
    scene.serves(&["a", "b"]).await;
    scene.echoed().await;
}

pub(crate) async fn spire(mode: Mode) {
    let scene = Arc::new(Scene::new().await);
    let agent = SpireAgent::start(scene.world.folder());
    let settings = scene.settings_with(mode, &scene.mesh_section(), &agent.settings());
    let mut daemon = restarted_twice(&scene, &settings).await;
    assert_eq!(agent.subscriptions(), 6, "each process gets the certificates of both pods");
    assert!(daemon.stop().await.success(), "{}", daemon.log());
}

/// Restarts a daemon twice under load. Returns the last one.
async fn restarted_twice(scene: &Arc<Scene>, settings: &Settings) -> Proxy {
    let mut daemon = scene.daemon_with(settings).await;
    let _echo = Server::echo(&scene.b, APP);
    let load = start_load(scene, 2);
    for _ in 0..2 {
        load.serve_more(20).await;
        let new = scene.start_successor_with(&mut daemon, settings.clone()).await;
        let mut old = std::mem::replace(&mut daemon, new);
        load.serve_more(20).await;
        scene.serves(&["a", "b"]).await;
        assert_eq!(daemon.count(&["cannot enrol the pod"]), 0, "{}", daemon.log());
        assert!(old.ended().await.success(), "{}", old.log());
    }
    load.end().await;
    daemon
}
