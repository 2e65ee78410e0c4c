//! A check of the doctor, and its finding.

use std::borrow::Cow;

use futures_util::future::{FutureExt as _, LocalBoxFuture};
use underpass_config::Hint;

use super::subject::Subject;
use crate::error::chain;

/// One check. It changes nothing.
pub(super) trait Check: Sync {
    /// The identification of the check.
    fn info(&self) -> Info;

    /// Runs the check; `None` if it does not apply to the subject.
    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a>;
}

/// The result of a check, perhaps after waiting for the network.
pub(super) type Outcome<'a> = LocalBoxFuture<'a, Option<Finding>>;

/// The result of a check that does not wait.
pub(super) fn at_once<'a>(finding: impl Into<Option<Finding>>) -> Outcome<'a> {
    std::future::ready(finding.into()).boxed_local()
}

/// The outcome of a check that does not apply.
pub(super) fn not_applicable<'a>() -> Outcome<'a> {
    at_once(Option::<Finding>::None)
}

/// The identification of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Info {
    /// A stable id, which is also the heading of its section in docs/troubleshooting.md.
    pub(super) id: &'static str,
    pub(super) category: Category,
    pub(super) scope: Scope,
}

impl Info {
    /// A check that needs no configuration.
    pub(super) const fn host(id: &'static str, category: Category) -> Self {
        Self { id, category, scope: Scope::Host }
    }

    /// A check of the settings and of the files that they name, which may have mistakes.
    pub(super) const fn files(id: &'static str, category: Category) -> Self {
        Self { id, category, scope: Scope::Files }
    }

    /// A check of a configured or running proxy.
    pub(super) const fn proxy(id: &'static str, category: Category) -> Self {
        Self { id, category, scope: Scope::Proxy }
    }
}

/// The subject of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// The host, also before the installation (`--pre`).
    Host,
    /// The settings and their files.
    Files,
    /// A configured or running proxy: the settings have no mistake.
    Proxy,
}

/// A group of checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Category {
    Kernel,
    Sysctls,
    Capabilities,
    Namespaces,
    Iptables,
    Conntrack,
    Clock,
    Disk,
    Limits,
    Configuration,
    Ports,
    Certificates,
    Rules,
    Dns,
    DnsNames,
    ControlPlane,
    Peers,
    Proxy,
}

impl Category {
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Sysctls => "sysctls",
            Self::Capabilities => "capabilities",
            Self::Namespaces => "namespaces",
            Self::Iptables => "iptables",
            Self::Conntrack => "conntrack",
            Self::Clock => "clock",
            Self::Disk => "disk",
            Self::Limits => "limits",
            Self::Configuration => "configuration",
            Self::Ports => "ports",
            Self::Certificates => "certificates",
            Self::Rules => "rules",
            Self::Dns => "DNS",
            Self::DnsNames => "DNS names",
            Self::ControlPlane => "control plane",
            Self::Peers => "peers",
            Self::Proxy => "running proxy",
        }
    }
}

/// How severe a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Ok,
    Warning,
    Failure,
}

impl Level {
    /// The level of a use in percent of its limit.
    pub(super) fn of_use(percent: u64, nearly_full: u64, full: u64) -> Self {
        if percent >= full {
            Self::Failure
        } else if percent >= nearly_full {
            Self::Warning
        } else {
            Self::Ok
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failure => "failure",
        }
    }
}

/// The finding of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) level: Level,
    pub(super) message: String,
    /// Further lines: the single items behind the message.
    pub(super) details: Vec<String>,
    pub(super) hint: Option<String>,
    /// A command that remedies the finding, or shows more of it.
    pub(super) command: Option<String>,
}

impl Finding {
    fn new(level: Level, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { level, message, details: Vec::new(), hint: None, command: None }
    }

    pub(super) fn ok(message: impl Into<String>) -> Self {
        Self::new(Level::Ok, message)
    }

    pub(super) fn warning(message: impl Into<String>) -> Self {
        Self::new(Level::Warning, message)
    }

    pub(super) fn failure(message: impl Into<String>) -> Self {
        Self::new(Level::Failure, message)
    }

    /// A failure with the message and the hint of an error.
    pub(super) fn of_error(error: &(impl Hint + 'static)) -> Self {
        let hint = error.hint().map(Cow::into_owned);
        Self { hint, ..Self::failure(chain(error)) }
    }

    pub(super) fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    pub(super) fn command(self, command: impl Into<String>) -> Self {
        Self { command: Some(command.into()), ..self }
    }

    pub(super) fn details(self, details: impl IntoIterator<Item = String>) -> Self {
        Self { details: details.into_iter().collect(), ..self }
    }

    pub(super) fn at(self, level: Level) -> Self {
        Self { level, ..self }
    }
}
