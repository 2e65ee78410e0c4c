//! Tests of rules that are installed before the proxy starts, and of interrupted installations.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use serde_json::Value;
use underpass::spawn::SpawnError;
use underpass_config::IdentityFiles;
use underpass_tests::{
    APP, Family, Listener, Pod, Proxy, Scene, Settings, Suite, binary, error_of, exchange, tool,
};

use crate::{AMBIENT, OSM, PROFILES, Profile, SIDECAR, plain};

/// Runs as the proxy's user without any capability, as in a container.
const AS_PROXY: &str = "exec setpriv --reuid 1337 --regid 1337 --clear-groups --inh-caps=-all --bounding-set=-all \
                        \"$UNDERPASS\" \"$@\"";

pub(crate) fn add_tests(suite: &mut Suite) {
    for profile in PROFILES {
        profile.test(suite, "`rules install` blocks a pod until its proxy runs", async move || {
            refuses_connections_until_run(profile).await;
        });
        suite.test(
            &format!(
                "{}: `rules remove` removes everything that `rules install` added",
                profile.name
            ),
            async move || removed(profile.rules()).await,
        );
    }
    suite.test("sidecar: `rules remove` removes everything of TPROXY mode", async || {
        removed(SIDECAR.rules().set("interception.inbound.mode=tproxy")).await;
    });
    suite.test("an installation removes the previous profile", profile_replaces_another);
    suite.test("ambient: leftovers of TPROXY mode misroute no connection", tproxy_leftovers);
    suite
        .test_with_users("an unprivileged proxy works with preinstalled rules", without_privileges);
    suite.test_with_users(
        "with install: false and without rules, the self-test keeps the proxy unready",
        missing_rules,
    );
    suite.test_with_users("a proxy that cannot switch to its user fails with an error", wrong_user);
    suite.test(
        "with install: false, rules are neither removed nor repaired",
        preinstalled_rules_stay,
    );
    suite.test(
        "a killed installation leaves the old or the new rules (without old rules)",
        async || {
            killed_installation(None).await;
        },
    );
    suite.test("a killed installation leaves the old or the new rules (from osm)", async || {
        killed_installation(Some(OSM)).await;
    });
}

async fn refuses_connections_until_run(profile: Profile) {
    let scene = Scene::new().await;
    let settings = plain(&scene, profile);
    let installed = scene.client.rules("install", &settings).await.ok();
    assert!(installed.starts_with("installed "), "{installed}");
    assert!(
        installed.contains(&format!(" rules of the {} profile with nftables", profile.name)),
        "{installed}"
    );
    let (app, own_app) = (scene.server.listen(APP), scene.client.listen(APP));
    for family in Family::BOTH {
        scene.client.dial_and_be_refused(scene.app(family)).await;
        scene.server.dial_and_be_refused(scene.client.at(family, APP)).await;
    }
    assert!(
        !app.is_reached() && !own_app.is_reached(),
        "an application was reached without a proxy"
    );
    let before = scene.client.traces().await;
    let _proxy = scene.client.proxy(&settings).await;
    assert_eq!(scene.client.traces().await, before, "every rule exists once");
    both_ways(&scene, &app, &own_app, profile).await;
}

/// Connects in both directions, and checks the client address that the applications see.
async fn both_ways(scene: &Scene, app: &Listener, own_app: &Listener, profile: Profile) {
    for family in Family::BOTH {
        let (mut client, mut server, _) = scene.client.meet(app, scene.app(family)).await;
        exchange(&mut client, &mut server).await;
        let own = scene.client.at(family, APP);
        let (mut client, mut server, peer) = scene.server.meet(own_app, own).await;
        exchange(&mut client, &mut server).await;
        assert_eq!(peer.ip(), profile.peer(family, scene.server.ip(family)));
    }
}

async fn removed(settings: Settings) {
    let scene = Scene::new().await;
    let before = scene.client.traces().await;
    scene.client.rules("install", &settings).await.ok();
    assert_ne!(scene.client.traces().await, before);
    assert_eq!(scene.client.underpass(&["rules", "remove"]).await.ok(), "removed\n");
    assert_eq!(scene.client.traces().await, before);
    let again = scene.client.underpass(&["rules", "remove", "-o", "json"]).await.ok();
    let again: Value = serde_json::from_str(&again).expect("JSON");
    assert_eq!(again["removed"], false);
}

/// Installs each profile after each other profile, as when settings change.
async fn profile_replaces_another() {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let tproxy = SIDECAR.rules().set("interception.inbound.mode=tproxy");
    let all = [AMBIENT.rules(), SIDECAR.rules(), tproxy, OSM.rules()];
    for settings in &all {
        pod.underpass(&["rules", "remove"]).await.ok();
        pod.rules("install", settings).await.ok();
        let alone = pod.traces().await;
        for other in &all {
            pod.rules("install", other).await.ok();
            pod.rules("install", settings).await.ok();
            assert_eq!(pod.traces().await, alone, "{settings:?} after {other:?}");
        }
    }
}

/// The marks of both profiles overlap: ambient's proxy uses the mark that TPROXY mode routes to
/// loopback.
async fn tproxy_leftovers() {
    let scene = Scene::new().await;
    let tproxy = SIDECAR.rules().set("interception.inbound.mode=tproxy");
    scene.client.rules("install", &tproxy).await.ok();
    let _proxy = scene.client.proxy(&plain(&scene, AMBIENT)).await;
    let app = scene.server.listen(APP);
    for family in Family::BOTH {
        let (mut client, mut server, peer) = scene.client.meet(&app, scene.app(family)).await;
        exchange(&mut client, &mut server).await;
        assert_eq!(peer.ip(), scene.client.ip(family));
    }
}

/// Makes a key readable for every user, like a volume for a container with another user.
fn readable(files: &IdentityFiles) {
    fs::set_permissions(&files.key, fs::Permissions::from_mode(0o644)).expect("the key is there");
}

async fn without_privileges() {
    let scene = Scene::new().await;
    readable(&scene.client_files);
    let settings = plain(&scene, SIDECAR);
    scene.client.rules("install", &settings).await.ok();
    let settings = settings.set("interception.install=false");
    let started = scene.client.try_proxy_through(AS_PROXY, &settings).await;
    let mut proxy = started.expect("the proxy gets ready");
    proxy.line(&["not installing rules: another program installs them"]).await;
    // The proxy's own connections are not captured, so the self-test is inconclusive.
    proxy.line(&["the self-test of the rules is skipped"]).await;
    let (app, own_app) = (scene.server.listen(APP), scene.client.listen(APP));
    both_ways(&scene, &app, &own_app, SIDECAR).await;
    proxy.access_lines(4).await;
    assert!(proxy.stop().await.success(), "{}", proxy.log());
}

async fn missing_rules() {
    let scene = Scene::new().await;
    // Without this address the self-test would run into its timeout.
    tool(&scene.server, "ip", &["address", "add", "192.0.2.2/32", "dev", "lo"]).await.ok();
    tool(&scene.server, "ip", &["address", "add", "2001:db8::2/128", "dev", "lo"]).await.ok();
    let settings = SIDECAR.of(scene.client_settings()).set("interception.install=false");
    let (code, error) = exit_and_error(scene.client.try_proxy(&settings).await);
    assert_eq!(code, Some(1), "{error}");
    for part in ["self-test", "a test connection to ", "underpass rules verify"] {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
}

/// The exit code and the error of a proxy that must exit.
fn exit_and_error(started: Result<Proxy, SpawnError>) -> (Option<i32>, String) {
    let Err(SpawnError::Ended { status, log }) = started else {
        unreachable!("the proxy did not exit: {started:?}")
    };
    assert!(!log.contains(" ready"), "{log}");
    (status.code(), error_of(&log))
}

async fn wrong_user() {
    let scene = Scene::new().await;
    readable(&scene.client_files);
    let settings = SIDECAR.of(scene.client_settings()).set("interception.install=false");
    let as_another = AS_PROXY.replace("1337", "1000");
    let started = scene.client.try_proxy_through(&as_another, &settings).await;
    let (code, error) = exit_and_error(started);
    assert_eq!(code, Some(1), "{error}");
    for part in ["1337", "1000", "runAsUser: 1337", "interception.proxy_uids"] {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
}

async fn preinstalled_rules_stay() {
    let scene = Scene::new().await;
    scene.client.rules("install", &AMBIENT.rules()).await.ok();
    let before = scene.client.traces().await;
    let settings = scene
        .client_settings()
        .set("interception.install=false")
        .set("interception.on_exit=remove");
    let mut proxy = scene.client.proxy(&settings).await;
    assert_eq!(scene.client.traces().await, before);
    assert!(proxy.stop().await.success(), "{}", proxy.log());
    assert_eq!(scene.client.traces().await, before);
}

/// Reproducible pauses by a linear congruential generator (Knuth's MMIX).
struct Jitter(u64);

impl Jitter {
    fn next(&mut self) -> Duration {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Duration::from_micros((self.0 >> 33) % 15_000)
    }
}

async fn killed_installation(old: Option<Profile>) {
    let scene = Scene::new().await;
    let pod = &scene.client;
    let (mut jitter, new) = (Jitter(7), AMBIENT.rules());
    let (mut killed, mut kept, mut replaced) = (0, 0, 0);
    for _ in 0..20 {
        pod.underpass(&["rules", "remove"]).await.ok();
        if let Some(old) = old {
            pod.rules("install", &old.rules()).await.ok();
        }
        let arguments = new.arguments(pod);
        let arguments: Vec<_> =
            ["rules", "install"].into_iter().chain(arguments.iter().map(String::as_str)).collect();
        let mut install = pod.background(binary(), &arguments);
        if !install.ends_within(jitter.next()).await {
            install.signal(nix::sys::signal::Signal::SIGKILL);
            killed += 1;
        }
        assert!(install.ends_within(underpass_tests::DEADLINE).await);
        if has_rules(pod, &new).await {
            replaced += 1;
        } else {
            kept += 1;
            match old {
                Some(old) => {
                    assert!(has_rules(pod, &old.rules()).await, "neither the old rules nor the new")
                }
                None => assert_eq!(tool(pod, "nft", &["list", "ruleset"]).await.ok(), ""),
            }
        }
        pod.rules("install", &new).await.ok();
        pod.rules("verify", &new).await.ok();
    }
    assert!(killed > 0, "no installation was killed: {kept} kept, {replaced} replaced");
}

/// Whether the rules equal those of the settings. Routes are ignored, because they are installed
/// first.
async fn has_rules(pod: &Pod, settings: &Settings) -> bool {
    let printed = pod.rules("verify -o json", settings).await;
    let found: Value = serde_json::from_str(&printed.out)
        .unwrap_or_else(|error| unreachable!("{error}: {}{}", printed.out, printed.err));
    let differences = found["differences"].as_array().expect("a list");
    differences.iter().all(|difference| difference["location"] == "ip rules, routes and addresses")
}
