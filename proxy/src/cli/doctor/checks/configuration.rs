//! The settings and the mesh file.

use underpass_config::{MeshSize, Problem, SameNode};

use crate::cli::config::check::ConfigCheck;
use crate::cli::doctor::check::{Category, Check, Finding, Info, Outcome, at_once, not_applicable};
use crate::cli::doctor::subject::Subject;

/// The mistakes in the settings and in the mesh file.
pub(super) struct Mistakes;

impl Check for Mistakes {
    fn info(&self) -> Info {
        Info::files("configuration", Category::Configuration)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        at_once(mistakes(&subject.configuration))
    }
}

/// Whether another check reports problems of this key.
fn is_of_other_check(key: &str) -> bool {
    ["identity", "trust", "mesh.xds"].iter().any(|section| key.starts_with(section))
}

fn mistakes(check: &ConfigCheck) -> Finding {
    let problems = check.problems.iter().filter(|problem| {
        // A mistake in the value of a setting has a location; a problem of its file has none.
        let is_of_setting = problem.origin.is_some();
        // `control-plane` runs only if all settings are valid.
        let is_hidden = check.settings.is_none() && problem.key.starts_with("mesh.xds");
        is_of_setting || is_hidden || !is_of_other_check(&problem.key)
    });
    let problems: Vec<_> = problems.map(Problem::with_hint).collect();
    if !problems.is_empty() {
        let count = problems.len() + check.more;
        return Finding::failure(format!("mistakes in the configuration: {count}"))
            .details(problems)
            .command("underpass config check --config FILE");
    }
    let warnings = check.warnings.iter().filter(|warning| !is_of_other_check(warning.key));
    let warnings: Vec<_> = warnings.map(ToString::to_string).collect();
    if !warnings.is_empty() {
        return Finding::warning(format!("warnings about the configuration: {}", warnings.len()))
            .details(warnings)
            .command("underpass config check --config FILE");
    }
    let MeshSize { workloads, services, policies } = check.mesh.size();
    Finding::ok(format!(
        "settings and mesh file are valid; workloads: {workloads}, services: {services}, policies: {policies}"
    ))
    .details(check.checked.iter().map(|file| format!("checked {file}")))
}

/// Whether connections between two pods of the node bypass the CNI.
pub(super) struct SameNodeDirect;

impl Check for SameNodeDirect {
    fn info(&self) -> Info {
        Info::proxy("same-node-direct", Category::Configuration)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        if !subject.is_node() {
            return not_applicable();
        }
        at_once(same_node(subject.settings.proxy.same_node))
    }
}

fn same_node(same_node: SameNode) -> Finding {
    match same_node {
        SameNode::Tunnel => Finding::ok("connections between pods of this node pass the CNI"),
        SameNode::Direct => Finding::warning(
            "connections between pods of this node bypass the CNI: its NetworkPolicy and its flow logs do not see them",
        )
        .hint("set proxy.same_node: tunnel if a NetworkPolicy must apply; policies of the mesh apply in any case"),
    }
}

#[cfg(test)]
mod tests {
    use underpass_config::Sources;

    use super::*;
    use crate::cli::doctor::check::Level;

    fn check(flags: &[&str]) -> ConfigCheck {
        let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
        ConfigCheck::of(&Sources { flags, ..Sources::default() })
    }

    #[test]
    fn problems_of_certificates_belong_to_another_check() {
        let files = ["identity.certificate=/no/a", "identity.key=/no/b", "identity.roots=/no/c"];
        let broken = check(&files);
        assert_eq!(broken.problems.len(), 3, "{broken:?}");
        assert_eq!(mistakes(&broken).level, Level::Ok);
        let wrong = check(&["identity.certificate=/no/a", "proxy.workers=none"]);
        let finding = mistakes(&wrong);
        assert!(finding.level == Level::Failure && finding.details.len() == 3, "{finding:?}");
    }

    #[test]
    fn direct_delivery_is_a_warning() {
        assert_eq!(same_node(SameNode::Tunnel).level, Level::Ok);
        let finding = same_node(SameNode::Direct);
        assert!(finding.level == Level::Warning && finding.message.contains("NetworkPolicy"));
    }
}
