//! The rules in the life of a pod, with the real binary: what each profile and backend catches, what the proxy still may do, what
//! becomes of rules that somebody changes, and what the `rules` commands leave behind.
//!
//! Not here: which rule decided about each flow of the ambient profile (`flows`), and what needs no binary (the interception
//! crate's own tests).
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
    flows::add(&mut suite);
    destinations::add(&mut suite);
    sources::add(&mut suite);
    privileges::add(&mut suite);
    tproxy::add(&mut suite);
    repair::add(&mut suite);
    fight::add(&mut suite);
    install::add(&mut suite);
    foreign::add(&mut suite);
    instances::add(&mut suite);
    reload::add(&mut suite);
    ipv6::add(&mut suite);
    start::add(&mut suite);
    commands::add(&mut suite);
    suite.run()
}

/// The status of readiness, and its reason.
async fn readiness(pod: &Pod) -> (u16, String) {
    http_get(pod, ([127, 0, 0, 1], 15021).into(), "/healthz/ready").await
}

/// A profile, and how it shows.
#[derive(Debug, Clone, Copy)]
struct Profile {
    name: &'static str,
    /// Whom the proxy becomes.
    user: Option<u32>,
    /// From where the proxy connects to the application; the client's own address if there is none.
    last_hop: Option<[&'static str; 2]>,
}

const AMBIENT: Profile = Profile { name: "ambient", user: None, last_hop: None };
const SIDECAR: Profile =
    Profile { name: "sidecar", user: Some(1337), last_hop: Some(["127.0.0.6", "::6"]) };
const OSM: Profile =
    Profile { name: "osm", user: Some(1500), last_hop: Some(["127.0.0.1", "::1"]) };
const PROFILES: [Profile; 3] = [AMBIENT, SIDECAR, OSM];

impl Profile {
    /// `settings` in this profile.
    fn of(self, settings: Settings) -> Settings {
        settings.set(&format!("interception.profile={}", self.name))
    }

    /// The rules alone, for a command that installs or compares them.
    fn rules(self) -> Settings {
        self.of(Settings::new(CLIENT))
    }

    /// Whom the application sees when `client` has connected.
    fn peer(self, family: Family, client: IpAddr) -> IpAddr {
        let Some([v4, v6]) = self.last_hop else { return client };
        let address = if family == Family::V4 { v4 } else { v6 };
        address.parse().expect("an address")
    }

    /// Adds a trial of this profile, which may need its user.
    fn test(self, suite: &mut Suite, name: &str, body: impl AsyncFnOnce() + Send + 'static) {
        let name = format!("{}: {name}", self.name);
        match self.user {
            None => suite.test(&name, body),
            Some(_) => suite.test_with_users(&name, body),
        }
    }
}

/// The scene with a proxy of this profile in each pod: client's, server's.
async fn with_proxies(profile: Profile) -> (Scene, Proxy, Proxy) {
    let scene = Scene::new().await;
    let (client, server) =
        (profile.of(scene.client_settings()), profile.of(scene.server_settings()));
    let (client, server) = tokio::join!(scene.client.proxy(&client), scene.server.proxy(&server));
    (scene, client, server)
}

/// The client's settings in a mesh without members.
fn plain(scene: &Scene, profile: Profile) -> Settings {
    let mesh = scene.empty_mesh();
    profile.of(scene.client_settings()).set(&format!("mesh.file={}", mesh.display()))
}
