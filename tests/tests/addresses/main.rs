//! Where connections come from and where they must not lead: calls of the proxy's own ports, by whom and how ever; calls of one's own
//! pod; and whom an application sees.
//!
//! Not here: which rule decided (`flows`), and who may connect by policy (`mesh`).
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod own;
mod ports;
mod source;
mod tunnelled;

use std::process::ExitCode;

use underpass_tests::{Settings, Suite};

/// A profile, and how inbound connections are caught in it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Profile {
    name: &'static str,
    settings: &'static [&'static str],
    /// From where the proxy connects to the application; the client's own address if there is none.
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

    /// Adds a trial of this profile, which may need its user.
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
    ports::add(&mut suite);
    tunnelled::add(&mut suite);
    own::add(&mut suite);
    source::add(&mut suite);
    suite.run()
}
