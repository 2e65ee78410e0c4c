//! The kernel: its version, and whether it accepts the rules.

use futures_util::future::FutureExt as _;
use underpass_config::{Backend, InterceptionSettings, PodSourceSettings};
use underpass_interception::{InterceptionError, Ports, RuleTrial, try_rules};

use crate::cli::doctor::check::{Category, Check, Finding, Info, Level, Outcome, at_once};
use crate::cli::doctor::subject::Subject;

/// The first kernel whose nftables family inet has chains for NAT.
const INET_NAT: (u32, u32) = (5, 2);
/// The first kernel with openat2(2), which opens the namespaces of pods by secure paths.
const OPENAT2: (u32, u32) = (5, 6);

/// The version of the kernel.
pub(super) struct KernelVersion;

impl Check for KernelVersion {
    fn info(&self) -> Info {
        Info::host("kernel-version", Category::Kernel)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        let opens_pods =
            matches!(&subject.settings.node.pods, Some(PodSourceSettings::Directory(_)));
        let facts = &subject.facts;
        at_once(version(&facts.release, facts.kernel, &subject.settings.interception, opens_pods))
    }
}

fn version(
    release: &str,
    kernel: Option<(u32, u32)>,
    interception: &InterceptionSettings,
    opens_pods: bool,
) -> Finding {
    let Some(kernel) = kernel else {
        return Finding::warning("the version of the kernel is unknown").command("uname -r");
    };
    let has_iptables = matches!(interception.backend, Backend::Iptables | Backend::IptablesLegacy);
    let (needed, why) = match opens_pods {
        true => (OPENAT2, "node.pods.directory needs openat2"),
        false => (INET_NAT, "nftables has no NAT in its family inet before it"),
    };
    if kernel < needed && (opens_pods || !has_iptables) {
        let (major, minor) = needed;
        let message = format!("Linux {release} is older than {major}.{minor}: {why}");
        return Finding::failure(message).hint("update the kernel of the host").command("uname -r");
    }
    Finding::ok(format!("Linux {release}"))
}

/// Whether the kernel accepts the rules, with the modules that it can load.
pub(super) struct KernelRules;

impl Check for KernelRules {
    fn info(&self) -> Info {
        Info::host("kernel-rules", Category::Kernel)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        let settings = &subject.settings;
        let ports = Ports::of(settings);
        async move { Some(trial(try_rules(&settings.interception, ports, &subject.thread).await)) }
            .boxed_local()
    }
}

fn trial(tried: Result<Option<RuleTrial>, InterceptionError>) -> Finding {
    match tried {
        Ok(None) => Finding::ok("interception.profile is none: there are no rules"),
        Ok(Some(RuleTrial { backend, rules, intact: true })) => Finding::ok(format!(
            "the kernel accepts all {rules} rules by {backend}, in a temporary network namespace"
        )),
        Ok(Some(RuleTrial { backend, .. })) => {
            let message = format!("the kernel lists other rules than {backend} has installed");
            Finding::failure(message).hint("update the kernel, or report this defect")
        }
        // Without SYS_ADMIN there is no other namespace to try the rules in.
        Err(
            error @ (InterceptionError::Namespace { .. } | InterceptionError::NotPermitted { .. }),
        ) => {
            let finding = Finding::of_error(&error).at(Level::Warning);
            let message =
                format!("not tried in a temporary network namespace: {}", finding.message);
            Finding { message, ..finding }.hint("run the doctor as root, with SYS_ADMIN")
        }
        Err(error) => {
            let finding = Finding::of_error(&error);
            let message = format!("the kernel rejects the rules: {}", finding.message);
            Finding { message, ..finding }.command(
                "modprobe -a nf_tables nft_chain_nat nft_redir nft_ct nft_tproxy nft_reject_inet",
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use underpass_config::Sources;

    use super::*;

    #[test]
    fn old_kernel_fails_unless_iptables_is_used() {
        let defaults = Sources::default().load().unwrap().interception;
        let settings = |backend| InterceptionSettings { backend, ..defaults.clone() };
        let level = |kernel, backend, opens_pods| {
            version("x", Some(kernel), &settings(backend), opens_pods).level
        };
        assert_eq!(level((5, 1), Backend::Auto, false), Level::Failure);
        assert_eq!(level((5, 1), Backend::IptablesLegacy, false), Level::Ok);
        assert_eq!(level((5, 2), Backend::Auto, false), Level::Ok);
        assert_eq!(level((5, 5), Backend::Iptables, true), Level::Failure);
        let unknown = version("", None, &settings(Backend::Auto), false);
        assert_eq!(unknown.level, Level::Warning);
    }

    #[test]
    fn missing_privilege_for_trial_is_a_warning_and_missing_module_a_failure() {
        let denied = InterceptionError::NotPermitted { operation: "x", capability: "NET_ADMIN" };
        assert_eq!(trial(Err(denied)).level, Level::Warning);
        let missing = InterceptionError::Unsupported {
            operation: "read the nftables ruleset",
            module: "nf_tables",
            source: std::io::ErrorKind::Unsupported.into(),
        };
        let finding = trial(Err(missing));
        assert_eq!(finding.level, Level::Failure);
        assert!(finding.hint.is_some_and(|hint| hint.contains("modprobe nf_tables")));
    }
}
