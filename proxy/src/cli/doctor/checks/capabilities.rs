//! The capabilities that a start needs, and processes that can bypass the rules.

use futures_util::future::FutureExt as _;
use underpass_config::{Backend, Profile, Settings};
use underpass_interception::{HostFacts, ProxyUser};

use crate::cli::doctor::check::{Category, Check, Finding, Info, Outcome, at_once, not_applicable};
use crate::cli::doctor::subject::Subject;
use crate::node::pod::pod_sockets;

/// The maximum number of named processes.
const MAX_NAMED: usize = 10;

/// The capabilities of a start with these settings by the user of the doctor.
pub(super) struct Required;

impl Check for Required {
    fn info(&self) -> Info {
        Info::host("capabilities-start", Category::Capabilities)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        let settings = &subject.settings;
        let changes_user =
            matches!(ProxyUser::required(&settings.interception), Err(_) | Ok(Some(_)));
        at_once(required(settings, &subject.facts, changes_user))
    }
}

fn required(settings: &Settings, facts: &HostFacts, changes_user: bool) -> Finding {
    let needed = needed(settings, changes_user);
    let missing: Vec<_> = needed.iter().copied().filter(|one| !facts.has(one)).collect();
    if missing.is_empty() {
        let list = if needed.is_empty() { "none".to_owned() } else { needed.join(", ") };
        return Finding::ok(format!("this user has the capabilities of a start: {list}"));
    }
    let missing = missing.join(", ");
    Finding::failure(format!("this user lacks capabilities of a start: {missing}"))
        .hint(format!(
            "start the proxy as root, or grant them: `--cap-add`, `securityContext.capabilities.add: [{missing}]`, or \
             AmbientCapabilities of a systemd service"
        ))
        .command("grep Cap /proc/self/status")
}

/// The capabilities that docs/operations.md lists. A node daemon also starts without SETUID and
/// SETGID, as one process: `namespace-users` reports that.
fn needed(settings: &Settings, changes_user: bool) -> Vec<&'static str> {
    let interception = &settings.interception;
    let mut needed = Vec::new();
    if settings.node.pods.is_some() {
        needed.extend(["SYS_ADMIN", "NET_ADMIN"]);
    } else if interception.profile != Profile::None {
        // With the rules of an init container, only marks and the addresses of clients need it.
        if interception.install || pod_sockets(settings).need_net_admin() {
            needed.push("NET_ADMIN");
        }
        if changes_user {
            needed.extend(["SETUID", "SETGID"]);
        }
    }
    if interception.backend == Backend::IptablesLegacy {
        needed.push("NET_RAW");
    }
    let ports = [
        settings.proxy.outbound_port,
        settings.proxy.inbound_port,
        settings.proxy.hbone_port,
        settings.metrics.port(),
        settings.readiness.port(),
    ];
    if ports.iter().any(|port| (1..1024).contains(port)) {
        needed.push("NET_BIND_SERVICE");
    }
    needed
}

/// Processes that can bypass the rules.
pub(super) struct Bypass;

impl Check for Bypass {
    fn info(&self) -> Info {
        Info::proxy("capabilities-bypass", Category::Capabilities)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        let profile = subject.settings.interception.profile;
        // A node daemon is in the host's namespace, whose processes are not captured.
        let is_host = subject.is_node() || subject.facts.host_network.is_some();
        if is_host || profile == Profile::None {
            return not_applicable();
        }
        async move {
            let found = match subject.access.bypassing_processes(profile).await {
                Ok(found) => found,
                Err(error) => return Some(Finding::of_error(&error)),
            };
            if found.is_empty() {
                return Some(Finding::ok("no visible process here can bypass the rules"));
            }
            let count = found.len();
            let named = found.iter().take(MAX_NAMED).map(ToString::to_string);
            Some(
                Finding::warning(format!(
                    "processes of this network namespace that can bypass the rules: {count}"
                ))
                .details(named)
                .hint("drop these capabilities from the containers of the workload"),
            )
        }
        .boxed_local()
    }
}

#[cfg(test)]
mod tests {
    use underpass_config::Sources;

    use super::*;
    use crate::cli::doctor::check::Level;

    fn settings(flags: &[&str]) -> Settings {
        let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
        Sources { flags, ..Sources::default() }.load().unwrap()
    }

    #[test]
    fn needed_capabilities_follow_from_profile_and_ports() {
        let of = |flags: &[&str], changes_user| needed(&settings(flags), changes_user).join(" ");
        assert_eq!(of(&[], false), "NET_ADMIN");
        let sidecar = ["interception.profile=sidecar"];
        assert_eq!(of(&sidecar, true), "NET_ADMIN SETUID SETGID");
        let installed = "interception.install=false";
        assert_eq!(of(&["interception.profile=sidecar", installed], true), "SETUID SETGID");
        assert_eq!(of(&[installed], false), "NET_ADMIN");
        assert_eq!(of(&["interception.profile=none"], false), "");
        let low = ["interception.profile=none", "metrics.address=127.0.0.1:900"];
        assert_eq!(of(&low, false), "NET_BIND_SERVICE");
        let node = ["node.pods.directory=/pods"];
        assert_eq!(of(&node, false), "SYS_ADMIN NET_ADMIN");
    }

    #[test]
    fn missing_capability_is_a_failure_with_its_name() {
        let facts = HostFacts::default();
        let finding = required(&settings(&[]), &facts, false);
        assert!(finding.level == Level::Failure && finding.message.ends_with(": NET_ADMIN"));
        let facts = HostFacts { capabilities: vec!["NET_ADMIN".to_owned()], ..facts };
        assert_eq!(required(&settings(&[]), &facts, false).level, Level::Ok);
    }
}
