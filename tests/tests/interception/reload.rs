//! Tests of settings that change while the proxy runs: the rules are updated, open connections
//! continue, and invalid settings are ignored.

use std::fs;

use nix::sys::signal::Signal;
use underpass_tests::{APP, Family, Listener, Proxy, Scene, Settings, Suite, exchange};

use crate::{OSM, Profile, SIDECAR, plain};

const APPLIED: &[&str] = &["applied the changed settings to the rules"];
const NOTHING_EXCLUDED: &str = "interception: {outbound: {exclude_ports: []}}";
const SERVER: &str = "interception: {outbound: {exclude_cidrs: [10.1.0.2, 'fd00:1::2']}}";

pub(crate) fn add_tests(suite: &mut Suite) {
    for profile in [OSM, SIDECAR] {
        profile.test(suite, "exclusions follow the settings file", async move || {
            follows_the_file(profile).await;
        });
    }
    suite.test_with_users(
        "osm: SIGHUP reloads exclusions if the file cannot be watched",
        follows_the_signal,
    );
    suite.test("a change that needs a restart is logged", needs_a_restart);
}

/// Whether a new connection of the client is captured.
async fn is_captured(scene: &Scene, app: &Listener, proxy: &mut Proxy) -> bool {
    let mut captured = Vec::new();
    for family in Family::BOTH {
        let before = scene.client.counters();
        let (mut client, mut server, peer) = scene.client.meet(app, scene.app(family)).await;
        exchange(&mut client, &mut server).await;
        let is_direct = peer == client.local_addr().expect("an address");
        let matched = scene.client.connections_since(&before);
        // The proxy's self-test after a change of the rules is redirected too.
        let redirected = matched.iter().any(|(rule, _)| rule == "redirect-outbound");
        assert!(is_direct || redirected, "{matched:?}");
        captured.push(!is_direct);
    }
    let [v4, v6] = captured[..] else { unreachable!("two families") };
    assert_eq!(v4, v6, "{}", proxy.log());
    v4
}

fn settings(scene: &Scene, profile: Profile, section: &str) -> Settings {
    plain(scene, profile).section(section)
}

async fn follows_the_file(profile: Profile) {
    let scene = Scene::new().await;
    let mut proxy = scene.client.proxy(&settings(&scene, profile, NOTHING_EXCLUDED)).await;
    let app = scene.server.listen(APP);
    let (mut client, mut server, _) = scene.client.meet(&app, scene.app(Family::V4)).await;
    exchange(&mut client, &mut server).await;
    assert!(is_captured(&scene, &app, &mut proxy).await);

    let excluded = settings(&scene, profile, SERVER);
    excluded.write(&scene.client);
    proxy.more_than(0, APPLIED).await;
    assert!(!is_captured(&scene, &app, &mut proxy).await);
    scene.client.rules("verify", &excluded).await.ok();
    exchange(&mut client, &mut server).await;

    let file = excluded.file(&scene.client);
    fs::write(&file, "interception: {outbound: {exclude_cidrs: [nonsense]}}\n").expect("written");
    let line = proxy.line(&["ERROR", "cannot reload the settings"]).await;
    assert!(line.contains("the last valid ones stay"), "{line}");
    assert!(proxy.log().contains("nonsense"), "{}", proxy.log());
    assert!(!is_captured(&scene, &app, &mut proxy).await);
    exchange(&mut client, &mut server).await;

    settings(&scene, profile, NOTHING_EXCLUDED).write(&scene.client);
    proxy.more_than(1, APPLIED).await;
    assert!(is_captured(&scene, &app, &mut proxy).await);
    exchange(&mut client, &mut server).await;
    assert_eq!(proxy.count(APPLIED), 2, "{}", proxy.log());
    assert_eq!(proxy.count(&["another program had changed"]), 0, "{}", proxy.log());
}

/// The file changes through a hard link in another folder, so a watch of its folder gets no
/// notification.
async fn follows_the_signal() {
    let scene = Scene::new().await;
    let settings = settings(&scene, OSM, NOTHING_EXCLUDED);
    let mut proxy = scene.client.proxy(&settings).await;
    let app = scene.server.listen(APP);
    assert!(is_captured(&scene, &app, &mut proxy).await);
    let file = settings.file(&scene.client);
    let elsewhere = scene.world.folder().join("elsewhere");
    fs::create_dir(&elsewhere).expect("a folder");
    let other = elsewhere.join("settings.yaml");
    fs::hard_link(&file, &other).expect("a link");
    let text = fs::read_to_string(&file).expect("settings");
    fs::write(&other, text.replace(NOTHING_EXCLUDED, SERVER)).expect("written");
    proxy.signal(Signal::SIGHUP);
    proxy.more_than(0, APPLIED).await;
    assert!(!is_captured(&scene, &app, &mut proxy).await);
}

async fn needs_a_restart() {
    let scene = Scene::new().await;
    let before = scene.client_settings().section("proxy: {outbound_port: 15001}");
    let after = scene.client_settings().section("proxy: {outbound_port: 16001}");
    let mut proxy = scene.client.proxy(&before).await;
    after.write(&scene.client);
    proxy.line(&["WARN", "need a restart"]).await;
    scene.client.rules("verify", &after.set("proxy.outbound_port=15001")).await.ok();
}
