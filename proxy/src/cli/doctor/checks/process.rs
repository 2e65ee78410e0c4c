//! The running proxy: its program, readiness, descriptors, and failed connections.

use futures_util::future::FutureExt as _;
use underpass_interception::Usage;

use super::rules::are_installed;
use crate::admin::api::status::{Failure, Failures, Problem, Status};
use crate::cli::doctor::check::{Category, Check, Finding, Info, Level, Outcome, at_once};
use crate::cli::doctor::subject::Subject;
use crate::version::VERSION;

/// The program of the running proxy.
pub(super) struct Version;

impl Check for Version {
    fn info(&self) -> Info {
        Info::proxy("version-running", Category::Proxy)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        let reported = subject.status().map(|status| status.version.as_str());
        let is_running = subject.running().is_some() || reported.is_some();
        let same = subject.process.and_then(|process| process.runs_same_program);
        at_once(is_running.then(|| {
            let mut finding = version(same, reported);
            if subject.is_node() && finding.command.is_some() {
                finding.command = Some("underpass node --config FILE --take-over".to_owned());
            }
            finding
        }))
    }
}

/// `same`: whether the running proxy has the program file of this process, if that is readable.
fn version(same: Option<bool>, reported: Option<&str>) -> Finding {
    let stale = |what: String| {
        Finding::warning(format!("{what}: it was not restarted after an update"))
            .hint("restart it, or let a new process take over; if that failed, the log of the new process has the reason")
            .command("underpass run --config FILE --take-over")
    };
    match (same, reported) {
        (Some(true), _) => Finding::ok("the running proxy runs this program"),
        (_, Some(other)) if other != VERSION => {
            stale(format!("the running proxy has the version {other}, and this program {VERSION}"))
        }
        (Some(false), _) => {
            stale("the running proxy runs another program than this one".to_owned())
        }
        (None, Some(_)) => Finding::ok(format!("the running proxy has the version {VERSION}")),
        (None, None) => Finding::warning("the program of the running proxy is not readable")
            .hint("run the doctor as root, in the PID namespace of the proxy"),
    }
}

/// The readiness of the running proxy.
pub(super) struct Ready;

impl Check for Ready {
    fn info(&self) -> Info {
        // A proxy that hangs does not send its settings.
        Info::host("proxy-ready", Category::Proxy)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        async move {
            if subject.is_host_only && subject.running.is_ok() {
                return None;
            }
            // The daemon of a node answers only on its socket of administration.
            if subject.is_node() {
                let status = subject.status()?;
                return Some(ready(status.pid, &status.readiness));
            }
            Some(match &subject.running {
                Ok(Some(running)) => ready(running.pid, &running.readiness),
                Ok(None) => match subject.status() {
                    // With the profile `none`, it answers only on its socket of administration.
                    Some(status) => ready(status.pid, &status.readiness),
                    None => absent(are_installed(subject).await),
                },
                Err(error) => Finding::of_error(error),
            })
        }
        .boxed_local()
    }
}

fn absent(has_rules: bool) -> Finding {
    let message = "no proxy runs in this network namespace";
    if !has_rules {
        return Finding::ok(message);
    }
    Finding::warning(format!("{message}, but its rules are installed: they refuse connections"))
        .hint("start the proxy; if it has ended, its log has the reason")
        .command("underpass run --config FILE")
}

fn ready(pid: u32, readiness: &str) -> Finding {
    let is_ready = format!("the running proxy (pid {pid}) is ready");
    // The lines after `ready` are notices of the source of pods.
    match readiness.split_once('\n') {
        None if readiness == "ready" => Finding::ok(is_ready),
        Some(("ready", notice)) => Finding::warning(format!("{is_ready}, with a notice: {notice}")),
        _ => {
            let reason = readiness.strip_prefix("not ready: ").unwrap_or(readiness);
            Finding::failure(format!("the running proxy (pid {pid}) is not ready: {reason}"))
                .hint("read its log, which has the reason and a hint")
        }
    }
}

/// The open files of the running proxy.
pub(super) struct DescriptorsInUse;

impl Check for DescriptorsInUse {
    fn info(&self) -> Info {
        Info::proxy("limits-in-use", Category::Proxy)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        at_once(subject.process.and_then(|process| process.open_files).map(descriptors))
    }
}

fn descriptors(usage: Usage) -> Finding {
    /// Outbound connections alone leave a quarter of the descriptors to inbound ones, and the other
    /// way round, so that new connections wait from there on.
    const FULL: u64 = 70;
    const NEARLY_FULL: u64 = 55;
    let Usage { used, limit } = usage;
    let message = format!("open files of the running proxy: {used} of {limit}");
    let level = Level::of_use(usage.percent(), NEARLY_FULL, FULL);
    if level == Level::Ok {
        return Finding::ok(message);
    }
    Finding::warning(message)
        .at(level)
        .hint("raise the limit of open files of the proxy (LimitNOFILE, `--ulimit nofile`), and restart it")
        .command("ss -tn state established | head")
}

/// The problems and notices that the running proxy reports.
pub(super) struct Reported;

impl Check for Reported {
    fn info(&self) -> Info {
        Info::proxy("proxy-problems", Category::Proxy)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        at_once(subject.status().map(reported))
    }
}

fn reported(Status { problems, notices, .. }: &Status) -> Finding {
    let Some(first) = problems.iter().chain(notices).next() else {
        return Finding::ok("the running proxy reports no problem");
    };
    let line = |problem: &Problem| {
        let Problem { part, pod, problem, .. } = problem;
        format!("{}: {problem}", pod.as_deref().unwrap_or_else(|| part.text()))
    };
    let counts = [("problems", problems.len()), ("notices", notices.len())];
    let counts = counts.into_iter().filter(|(_, count)| *count > 0);
    let counts: Vec<_> = counts.map(|(what, count)| format!("{what}: {count}")).collect();
    let message = format!("the running proxy reports {}; {}", counts.join(", "), line(first));
    let finding = match problems.is_empty() {
        true => Finding::warning(message),
        false => Finding::failure(message),
    };
    let others = problems.iter().chain(notices).skip(1).map(line);
    Finding { hint: first.hint.clone(), ..finding.details(others).command("underpass status") }
}

/// The failed connections of the running proxy.
pub(super) struct FailedConnections;

impl Check for FailedConnections {
    fn info(&self) -> Info {
        Info::proxy("proxy-failures", Category::Proxy)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        at_once(subject.status().map(|status| failures(&status.failures)))
    }
}

fn failures(Failures { minutes, connections, .. }: &Failures) -> Finding {
    let Some(first) = connections.first() else {
        return Finding::ok(format!("no connection has failed in the last {minutes} minutes"));
    };
    let total: u64 = connections.iter().map(|failure| failure.count).sum();
    let reasons = connections.iter().map(|failure| {
        let Failure { reason, count, last } = failure;
        let error = last.as_ref().and_then(|last| last.error.as_deref()).unwrap_or_default();
        format!("{reason}: {count}; the last one: {error}")
    });
    let hint = first.last.as_ref().and_then(|last| last.hint.clone());
    let finding = Finding::warning(format!(
        "connections that failed in the last {minutes} minutes: {total}, most of them by {}",
        first.reason
    ));
    Finding { hint, ..finding }
        .details(reasons)
        .command(format!("underpass connections --reason {}", first.reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::api::states::Part;

    #[test]
    fn other_program_or_version_is_a_warning() {
        let level = |same, reported| version(same, reported).level;
        assert_eq!(level(Some(true), None), Level::Ok);
        assert_eq!(level(None, Some(VERSION)), Level::Ok);
        for (same, reported) in [(Some(false), None), (Some(false), Some(VERSION)), (None, None)] {
            assert_eq!(level(same, reported), Level::Warning);
        }
        let other = version(Some(false), Some("9.9.9 (abc)"));
        assert!(other.level == Level::Warning && other.message.contains("9.9.9"), "{other:?}");
    }

    #[test]
    fn unready_proxy_is_a_failure_with_its_reason() {
        assert_eq!(ready(7, "ready").level, Level::Ok);
        assert_eq!(ready(7, "ready\nno connection").level, Level::Warning);
        let finding = ready(7, "not ready: out of file descriptors");
        assert_eq!(finding.level, Level::Failure);
        assert!(finding.message.ends_with("is not ready: out of file descriptors"));
    }

    #[test]
    fn reported_problem_is_a_failure_and_notice_a_warning() {
        let one = |text: &str| {
            vec![Problem { part: Part::Mesh, problem: text.to_owned(), ..Problem::default() }]
        };
        let level = |status: &Status| reported(status).level;
        assert_eq!(level(&Status::default()), Level::Ok);
        let notices = one("replaced");
        assert_eq!(
            level(&Status { notices: notices.clone(), ..Status::default() }),
            Level::Warning
        );
        let both = reported(&Status { problems: one("refused"), notices, ..Status::default() });
        assert_eq!(both.level, Level::Failure);
        assert!(both.message.ends_with("problems: 1, notices: 1; mesh: refused"), "{both:?}");
        assert_eq!(both.details, ["mesh: replaced"]);
    }

    #[test]
    fn rules_without_proxy_are_a_warning() {
        assert_eq!([absent(false).level, absent(true).level], [Level::Ok, Level::Warning]);
    }

    #[test]
    fn used_descriptors_are_compared_with_limit() {
        let level = |used| descriptors(Usage { used, limit: 100 }).level;
        assert_eq!([level(10), level(60), level(75)], [Level::Ok, Level::Warning, Level::Failure]);
    }

    #[test]
    fn failures_are_named_by_reason() {
        let none = failures(&Failures { minutes: 5, ..Failures::default() });
        assert_eq!(none.level, Level::Ok);
        let failure =
            |reason: &str, count| Failure { reason: reason.to_owned(), count, last: None };
        let connections = vec![failure("policy_denied", 3), failure("connect", 1)];
        let some = failures(&Failures { minutes: 5, connections, ..Failures::default() });
        assert!(
            some.level == Level::Warning
                && some.message.contains(": 4, most of them by policy_denied")
        );
        assert_eq!(some.details.len(), 2, "{some:?}");
    }
}
