//! The network and the user namespace.

use underpass_config::Profile;
use underpass_interception::{HostNamespaces, InterceptionError, ProxyUser};

use crate::broker::separation::Separation;
use crate::cli::doctor::check::{Category, Check, Finding, Info, Outcome, at_once};
use crate::cli::doctor::subject::Subject;

/// The network namespace: that of a pod, with a working loopback interface.
pub(super) struct Network;

impl Check for Network {
    fn info(&self) -> Info {
        Info::host("namespace-network", Category::Namespaces)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        at_once(network(subject))
    }
}

fn network(subject: &Subject) -> Finding {
    let facts = &subject.facts;
    if !facts.interfaces.iter().any(|name| name == "lo") {
        return Finding::failure("the loopback interface is down").command("ip link set lo up");
    }
    if subject.is_node() {
        return match HostNamespaces::read() {
            Ok(_) => Finding::ok("the host's network namespace is known, and is no pod's"),
            Err(error) => Finding::of_error(&error)
                .hint("run the daemon in the PID namespace of the host (hostPID: true)"),
        };
    }
    let interception = &subject.settings.interception;
    match &facts.host_network {
        None => Finding::ok(format!(
            "a network namespace of a pod or container: {}",
            facts.interfaces.join(", ")
        )),
        Some(why) if subject.is_host_only => Finding::ok(format!(
            "the host's network namespace ({why}): `underpass node` runs here, `underpass run` in a pod"
        )),
        Some(_) if interception.profile == Profile::None => {
            Finding::ok("the host's network namespace, without rules of underpass")
        }
        Some(why) if interception.allow_host => Finding::warning(format!(
            "the host's network namespace ({why}): interception.allow_host captures the entire host"
        )),
        Some(why) => Finding::of_error(&InterceptionError::HostNamespace { why: why.clone() }),
    }
}

/// The users of the user namespace: that of the rules, and that of the proxy process of a node.
pub(super) struct Users;

impl Check for Users {
    fn info(&self) -> Info {
        Info::host("namespace-users", Category::Namespaces)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        at_once(users(subject))
    }
}

fn users(subject: &Subject) -> Option<Finding> {
    let settings = &subject.settings;
    let required = match ProxyUser::required(&settings.interception) {
        Ok(required) => required,
        Err(error) => return Some(Finding::of_error(&error)),
    };
    match Separation::of(settings) {
        Separation::Broker(user) => {
            return Some(Finding::ok(format!("the proxy process can run as user {}", user.uid)));
        }
        Separation::Impossible { reason, hint } => {
            let message = format!("one process has all privileges, without a broker: {reason}");
            return Some(Finding::warning(message).hint(hint));
        }
        Separation::Off if subject.is_node() => {
            return Some(Finding::ok("privileges.broker is off: one process serves the pods"));
        }
        Separation::Off => {}
    }
    let user = required?;
    Some(match user.check_separation() {
        Ok(()) => Finding::ok(format!("the proxy can run as user {}, which the rules match", user.uid)),
        Err(error) => Finding::failure(format!(
            "the proxy cannot run as user {}, which the rules match: {error}",
            user.uid
        ))
        .hint("choose a user of this user namespace (interception.proxy_uids, interception.proxy_gids)"),
    })
}
