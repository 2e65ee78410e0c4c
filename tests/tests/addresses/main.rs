//! End-to-end tests of addresses: connections to the proxy's own ports, connections of a pod to
//! itself, and the client address that an application sees.
//!
//! `flows` tests the deciding rules, `mesh` tests policies.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod own;
mod ports;
mod source;
mod tunnelled;

use std::process::ExitCode;

use underpass_tests::{Settings, Suite};

/// A profile with its mode of inbound capture.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Profile {
    name: &'static str,
    settings: &'static [&'static str],
    /// The source address of the proxy's connections to the application; `None` means the client's
    /// address.
    last_hop: Option<[&'static str; 2]>,
}

const AMBIENT: Profile =
    Profile { name: "ambient", settings: &["interception.profile=ambient"], last_hop: None };
const SIDECAR: Profile = Profile {
    name: "sidecar",
    settings: &["interception.profile=sidecar"],
    last_hop: Some(["127.0.0.6", "::6"]),
};
const TPROXY: Profile = Profile {
    name: "sidecar with TPROXY",
    settings: &["interception.profile=sidecar", "interception.inbound.mode=tproxy"],
    last_hop: None,
};
const OSM: Profile = Profile {
    name: "osm",
    settings: &["interception.profile=osm"],
    last_hop: Some(["127.0.0.1", "::1"]),
};
const PROFILES: [Profile; 4] = [AMBIENT, SIDECAR, TPROXY, OSM];

impl Profile {
    fn of(self, settings: Settings) -> Settings {
        self.settings.iter().fold(settings, |settings, assignment| settings.set(assignment))
    }

    /// Adds a trial of this profile. It is skipped if the proxy's user does not exist.
    fn test(self, suite: &mut Suite, name: &str, body: impl AsyncFnOnce() + Send + 'static) {
        let name = format!("{}: {name}", self.name);
        match self {
            AMBIENT => suite.test(&name, body),
            _ => suite.test_with_users(&name, body),
        }
    }
}

fn main() -> ExitCode {
    let mut suite = Suite::new();
    ports::add_tests(&mut suite);
    tunnelled::add_tests(&mut suite);
    own::add_tests(&mut suite);
    source::add_tests(&mut suite);
    suite.run()
}
