//! End-to-end tests of the rules: capture with each profile and backend, privileges, repair of
//! changes, and the `rules` commands.
//!
//! `flows` tests the deciding rules of the ambient profile. Kernel tests without the binary are in
//! the interception crate.
#![expect(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod commands;
mod destinations;
mod fight;
mod flows;
mod foreign;
mod install;
mod instances;
mod ipv6;
mod privileges;
mod reload;
mod repair;
mod sources;
mod start;
mod tproxy;

use std::net::IpAddr;
use std::process::ExitCode;

use underpass_tests::{CLIENT, Family, Pod, Proxy, Scene, Settings, Suite, http_get};

fn main() -> ExitCode {
    let mut suite = Suite::new();
    flows::add_tests(&mut suite);
    destinations::add_tests(&mut suite);
    sources::add_tests(&mut suite);
    privileges::add_tests(&mut suite);
    tproxy::add_tests(&mut suite);
    repair::add_tests(&mut suite);
    fight::add_tests(&mut suite);
    install::add_tests(&mut suite);
    foreign::add_tests(&mut suite);
    instances::add_tests(&mut suite);
    reload::add_tests(&mut suite);
    ipv6::add_tests(&mut suite);
    start::add_tests(&mut suite);
    commands::add_tests(&mut suite);
    suite.run()
}

/// The HTTP status and the text of the readiness endpoint.
async fn readiness(pod: &Pod) -> (u16, String) {
    http_get(pod, ([127, 0, 0, 1], 15021).into(), "/healthz/ready").await
}

/// A profile with its observable properties.
#[derive(Debug, Clone, Copy)]
struct Profile {
    name: &'static str,
    /// The user that the proxy switches to.
    user: Option<u32>,
    /// The source address of the proxy's connections to the application; `None` means the client's
    /// address.
    last_hop: Option<[&'static str; 2]>,
}

const AMBIENT: Profile = Profile { name: "ambient", user: None, last_hop: None };
const SIDECAR: Profile =
    Profile { name: "sidecar", user: Some(1337), last_hop: Some(["127.0.0.6", "::6"]) };
const OSM: Profile =
    Profile { name: "osm", user: Some(1500), last_hop: Some(["127.0.0.1", "::1"]) };
const PROFILES: [Profile; 3] = [AMBIENT, SIDECAR, OSM];

impl Profile {
    /// Adds the profile to `settings`.
    fn of(self, settings: Settings) -> Settings {
        settings.set(&format!("interception.profile={}", self.name))
    }

    /// Settings without a workload, for commands that install or compare rules.
    fn rules(self) -> Settings {
        self.of(Settings::new(CLIENT))
    }

    /// The client address that the application sees for `client`.
    fn peer(self, family: Family, client: IpAddr) -> IpAddr {
        let Some([v4, v6]) = self.last_hop else { return client };
        let address = if family == Family::V4 { v4 } else { v6 };
        address.parse().expect("an address")
    }

    /// Adds a trial of this profile. It is skipped if the proxy's user does not exist.
    fn test(self, suite: &mut Suite, name: &str, body: impl AsyncFnOnce() + Send + 'static) {
        let name = format!("{}: {name}", self.name);
        match self.user {
            None => suite.test(&name, body),
            Some(_) => suite.test_with_users(&name, body),
        }
    }
}

/// The scene with a proxy of this profile in each pod. Returns the client's and the server's proxy.
async fn with_proxies(profile: Profile) -> (Scene, Proxy, Proxy) {
    let scene = Scene::new().await;
    let (client, server) =
        (profile.of(scene.client_settings()), profile.of(scene.server_settings()));
    let (client, server) = tokio::join!(scene.client.proxy(&client), scene.server.proxy(&server));
    (scene, client, server)
}

/// The client's settings with an empty mesh.
fn plain(scene: &Scene, profile: Profile) -> Settings {
    let mesh = scene.empty_mesh();
    profile.of(scene.client_settings()).set(&format!("mesh.file={}", mesh.display()))
}
