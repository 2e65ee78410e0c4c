//! The rules of the namespace: ours, and those of other programs.

use futures_util::future::FutureExt as _;
use underpass_config::{Backend, Profile};
use underpass_interception::{
    Difference, Effect, ForeignRule, Interception, InterceptionError, Leftover, LeftoverOwner,
    LineStatus,
};

use crate::cli::doctor::check::{Category, Check, Finding, Info, Level, Outcome, at_once};
use crate::cli::doctor::subject::Subject;

/// The maximum number of printed rules.
const MAX_LINES: usize = 12;

/// Tables of legacy iptables beside nftables.
pub(super) struct LegacyTables;

impl Check for LegacyTables {
    fn info(&self) -> Info {
        Info::host("iptables-variant", Category::Iptables)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        let backend = subject.settings.interception.backend;
        at_once(legacy_tables(&subject.facts.legacy_tables, backend))
    }
}

fn legacy_tables(tables: &[String], backend: Backend) -> Finding {
    if tables.is_empty() {
        return Finding::ok("there are no tables of legacy iptables");
    }
    let tables = tables.join(", ");
    if backend == Backend::IptablesLegacy {
        return Finding::ok(format!("legacy iptables has the tables {tables}"));
    }
    Finding::warning(format!(
        "legacy iptables has tables beside nftables: {tables}; rules of both apply, and iptables-nft lists only one"
    ))
    .hint("if another program captures traffic there, remove its rules, or let it use iptables-nft")
    .command("iptables-legacy-save")
}

/// Access to the rules of the subject; `None` if it has none here, or if another check reports why
/// there is no access.
async fn interception(subject: &Subject) -> Option<Result<&Interception, &InterceptionError>> {
    match subject.interception().await.as_ref() {
        // `namespace-network` and `capabilities-start` report these.
        Err(InterceptionError::HostNamespace { .. } | InterceptionError::NotPermitted { .. }) => {
            None
        }
        prepared => prepared.map(Option::as_ref).transpose(),
    }
}

/// Whether the rules of these settings are installed; false if they cannot be read.
pub(super) async fn are_installed(subject: &Subject) -> bool {
    match interception(subject).await {
        Some(Ok(interception)) => matches!(interception.verify().await, Ok(None)),
        Some(Err(_)) | None => false,
    }
}

/// The installed rules.
pub(super) struct Installed;

impl Check for Installed {
    fn info(&self) -> Info {
        Info::proxy("rules-installed", Category::Rules)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        async move {
            let interception = match interception(subject).await? {
                Ok(interception) => interception,
                Err(error) => return Some(Finding::of_error(error)),
            };
            let is_running = subject.running().is_some();
            let compared = compared(interception, is_running).await;
            Some(compared.unwrap_or_else(|error| Finding::of_error(&error)))
        }
        .boxed_local()
    }
}

async fn compared(
    interception: &Interception,
    is_running: bool,
) -> Result<Finding, InterceptionError> {
    if interception.is_blocked().await? {
        return Ok(Finding::failure(
            "ip rules block the workload's TCP: the rules are being repaired, or another program changes them again and again",
        )
        .hint("find the other program in the log of the proxy (`rules`), and stop it")
        .command("ip rule"));
    }
    let (backend, rules) = (interception.backend(), interception.plan().rules().len());
    Ok(match interception.verify().await? {
        None => Finding::ok(format!("all {rules} rules are installed by {backend}, and intact")),
        Some(difference) => differs(&difference, is_running),
    })
}

fn differs(difference: &Difference, is_running: bool) -> Finding {
    let lines: Vec<_> = difference.sections().iter().flat_map(|section| &section.lines).collect();
    let count = |status| lines.iter().filter(|line| line.status == status).count();
    let (missing, unexpected) = (count(LineStatus::Missing), count(LineStatus::Unexpected));
    let message = format!("missing rules: {missing}, unexpected rules: {unexpected}");
    let changed = lines.into_iter().filter(|line| line.status != LineStatus::Same);
    if is_running {
        Finding::failure(format!("the rules are not those of the running proxy; {message}"))
            .hint("with interception.repair: false, restart the proxy, which installs them; find the program that changed them")
            .details(changed.take(MAX_LINES).map(ToString::to_string))
            .command("underpass rules verify")
    } else {
        Finding::warning(format!("the rules are not installed, and no proxy runs here; {message}"))
            .hint("start the proxy, which installs them")
            .command("underpass rules verify --config FILE")
    }
}

/// The rules of other programs that act before ours.
pub(super) struct Foreign;

impl Check for Foreign {
    fn info(&self) -> Info {
        Info::proxy("rules-foreign", Category::Rules)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        async move {
            // `rules-installed` reports an error.
            let interception = interception(subject).await?.ok()?;
            let profile = subject.settings.interception.profile;
            let is_bypassed = subject.running().is_some_and(|running| running.self_test_failed);
            Some(match interception.foreign_rules().await {
                Ok(rules) => foreign(&rules, profile, is_bypassed),
                Err(error) => Finding::of_error(&error),
            })
        }
        .boxed_local()
    }
}

/// `is_bypassed`: whether the self-test of the running proxy failed.
fn foreign(rules: &[ForeignRule], profile: Profile, is_bypassed: bool) -> Finding {
    let severity = |rule: &ForeignRule| match rule.effect {
        _ if rule.exempts_from_capture(profile) => Level::Failure,
        Effect::Redirects | Effect::Untracks | Effect::Diverts | Effect::Accepts => Level::Warning,
        Effect::SetsProxyMark | Effect::Marks | Effect::Routes => Level::Ok,
    };
    let level = rules.iter().map(severity).max();
    let details = rules.iter().take(MAX_LINES).map(ToString::to_string);
    let count = rules.len();
    let finding = match level {
        None => return Finding::ok("no rules of other programs act before ours"),
        Some(_) if is_bypassed => Finding::failure(format!(
            "rules of other programs act before ours, and traffic bypasses the proxy: {count}"
        )),
        Some(Level::Failure) => Finding::failure(format!(
            "rules of other programs exempt traffic from capture: {count}"
        )),
        Some(Level::Warning) => Finding::warning(format!(
            "rules of other programs act before ours and can divert traffic: {count}"
        )),
        Some(Level::Ok) => {
            return Finding::ok(format!(
                "rules of other programs act before ours, and divert no traffic: {count}"
            ))
            .details(details);
        }
    };
    finding
        .details(details)
        .hint("remove them, or give their chains a later priority than those of underpass")
        .command("nft list ruleset")
}

/// Rules that capture the same traffic.
pub(super) struct Leftovers;

impl Check for Leftovers {
    fn info(&self) -> Info {
        Info::proxy("rules-leftovers", Category::Rules)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        async move {
            let interception = interception(subject).await?.ok()?;
            Some(match interception.leftovers().await {
                Ok(leftovers) => leftover(&leftovers),
                Err(error) => Finding::of_error(&error),
            })
        }
        .boxed_local()
    }
}

fn leftover(leftovers: &[Leftover]) -> Finding {
    if leftovers.is_empty() {
        return Finding::ok("no other rules capture the same traffic");
    }
    let count = leftovers.len();
    let finding = Finding::warning(format!(
        "rules of an earlier run or of another mesh capture the same traffic: {count}"
    ))
    .details(leftovers.iter().take(MAX_LINES).map(ToString::to_string));
    // `rules remove` also removes the rules of the running proxy.
    let is_own =
        |one: &Leftover| matches!(one.whose, LeftoverOwner::Underpass | LeftoverOwner::Shared);
    if leftovers.iter().any(is_own) {
        finding
            .hint(
                "stop the workload first: without any rules, its connections leave in plaintext until the proxy \
                 installs its rules again",
            )
            .command("underpass rules remove")
    } else {
        finding.hint("follow the remedy in each line").command("nft list ruleset")
    }
}

/// The self-test of the running proxy.
pub(super) struct SelfTest;

impl Check for SelfTest {
    fn info(&self) -> Info {
        Info::proxy("rules-self-test", Category::Rules)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        let failed = subject.running().map(|running| running.self_test_failed);
        at_once(failed.map(|failed| {
            match failed {
                false => Finding::ok("the running proxy has caught its test connections"),
                true => Finding::failure(
                    "the test connections of the running proxy are not caught: traffic bypasses it",
                )
                .hint("look for the cause at `rules-installed` and `rules-foreign`")
                .command("underpass rules explain"),
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(effect: Effect) -> ForeignRule {
        ForeignRule { location: "table ip x".to_owned(), rule: "y".to_owned(), effect }
    }

    #[test]
    fn foreign_rule_is_as_severe_as_its_effect() {
        use Profile::{Ambient, Sidecar};
        let level = |effect, profile| foreign(&[rule(effect)], profile, false).level;
        assert_eq!(level(Effect::SetsProxyMark, Ambient), Level::Failure);
        assert_eq!(level(Effect::SetsProxyMark, Sidecar), Level::Ok);
        assert_eq!(level(Effect::Redirects, Ambient), Level::Warning);
        assert_eq!(level(Effect::Marks, Ambient), Level::Ok);
        assert_eq!(foreign(&[rule(Effect::Marks)], Ambient, true).level, Level::Failure);
        assert_eq!(foreign(&[], Ambient, true).level, Level::Ok);
    }

    #[test]
    fn rules_are_removed_only_if_leftovers_are_ours() {
        let command = |whose| leftover(&[Leftover { what: "a table".to_owned(), whose }]).command;
        let ours = command(LeftoverOwner::Underpass);
        assert_eq!(ours.as_deref(), Some("underpass rules remove"));
        assert_eq!(command(LeftoverOwner::Istio).as_deref(), Some("nft list ruleset"));
        assert_eq!(leftover(&[]).level, Level::Ok);
    }

    #[test]
    fn legacy_tables_beside_nftables_are_a_warning() {
        let tables = ["nat".to_owned()];
        let level = |tables, backend| legacy_tables(tables, backend).level;
        assert_eq!(level(&tables, Backend::Auto), Level::Warning);
        assert_eq!(level(&tables, Backend::IptablesLegacy), Level::Ok);
        assert_eq!(level(&[], Backend::Auto), Level::Ok);
    }
}
