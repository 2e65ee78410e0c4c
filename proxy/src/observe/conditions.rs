//! Conditions of the host and of the program that disturb connections, and that no connection
//! reports. `underpass status` and the metrics show them, and a task logs their begin and end.

use std::mem::discriminant;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use underpass_config::{Ipv6, Profile, Settings};
use underpass_interception::{
    Usage, conntrack_usage, is_ipv6_disabled_on_loopback, is_own_program_replaced,
};

use crate::admin::api::states::Part;
use crate::observe::log_loss::{self, LogLoss};
use crate::version::VERSION;

/// The interval of [`watch`].
const INTERVAL: Duration = Duration::from_secs(5);
/// From this percentage on, the table of tracked connections is nearly full.
const NEARLY_FULL: u64 = 80;
/// From this percentage on, a burst of connections may fill the table, and the kernel drops new
/// ones.
const FULL: u64 = 95;
/// The time for which lost log lines are shown.
const LOSS_WINDOW: Duration = Duration::from_secs(300);

/// A condition that disturbs connections, or an operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Condition {
    /// The kernel drops new connections when the table of tracked connections is full.
    Conntrack(Usage),
    /// The program file was replaced, and this process still runs the old one.
    ProgramReplaced,
    /// IPv6 connections that the rules redirect fail.
    Ipv6Disabled,
    /// The reader of the log is stalled, or its disk is full.
    LogLinesLost(LogLoss),
}

impl Condition {
    /// The part that `underpass status` names.
    pub(crate) fn part(&self) -> Part {
        match self {
            Self::Conntrack(_) => Part::Conntrack,
            Self::ProgramReplaced => Part::Program,
            Self::Ipv6Disabled => Part::Ipv6,
            Self::LogLinesLost(_) => Part::Log,
        }
    }

    /// Whether connections fail now. Otherwise it is only worth knowing.
    pub(crate) fn is_problem(&self) -> bool {
        matches!(self, Self::Conntrack(usage) if usage.percent() >= FULL)
    }

    pub(crate) fn text(&self) -> String {
        match self {
            Self::Conntrack(Usage { used, limit }) => format!(
                "tracked connections: {used} of {limit}; the kernel drops new ones when the table is full"
            ),
            Self::ProgramReplaced => format!(
                "the program file was replaced after the start: this process still runs {VERSION}"
            ),
            Self::Ipv6Disabled => {
                "IPv6 is disabled on the loopback interface: captured IPv6 connections fail"
                    .to_owned()
            }
            Self::LogLinesLost(LogLoss { lines, ago }) => {
                format!("log lines were lost: {lines}, the last one {} s ago", ago.as_secs())
            }
        }
    }

    pub(crate) fn hint(&self) -> &'static str {
        match self {
            Self::Conntrack(_) => {
                "raise net.netfilter.nf_conntrack_max on the host, or find the program that opens so many connections"
            }
            Self::ProgramReplaced => {
                "restart the process, or let a new one take over (`--take-over`); if that failed, the log of the new process \
                 has the reason"
            }
            Self::Ipv6Disabled => {
                "enable it (sysctl -w net.ipv6.conf.lo.disable_ipv6=0), or set interception.ipv6: reject so that clients use \
                 IPv4 at once"
            }
            Self::LogLinesLost(_) => {
                "check the program that reads standard output, and the space on its disk"
            }
        }
    }

    /// The rules log that IPv6 is disabled, and no log line reports lost ones.
    fn is_logged(&self) -> bool {
        matches!(self, Self::Conntrack(_) | Self::ProgramReplaced)
    }
}

/// The conditions at this moment. Must be called in the network namespace of the process.
pub(crate) fn current(settings: &Settings) -> Vec<Condition> {
    let interception = &settings.interception;
    // The pods of a node have network namespaces of their own.
    let captures_ipv6 = settings.node.pods.is_none()
        && interception.profile != Profile::None
        && interception.ipv6 == Ipv6::Capture;
    let conntrack = conntrack_usage().filter(|usage| usage.percent() >= NEARLY_FULL);
    let lost = log_loss::loss().filter(|loss| loss.ago <= LOSS_WINDOW);
    let ipv6 = captures_ipv6 && is_ipv6_disabled_on_loopback();
    let mut all: Vec<_> = conntrack.map(Condition::Conntrack).into_iter().collect();
    all.extend(is_own_program_replaced().then_some(Condition::ProgramReplaced));
    all.extend(ipv6.then_some(Condition::Ipv6Disabled));
    all.extend(lost.map(Condition::LogLinesLost));
    all
}

/// Logs the conditions when they begin and when they end. Never returns.
pub(crate) async fn watch(settings: &Settings) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut known: Vec<Condition> = Vec::new();
    loop {
        ticks.tick().await;
        let now = current(settings).into_iter().filter(Condition::is_logged).collect::<Vec<_>>();
        let is_in = |list: &[Condition], one: &Condition| {
            list.iter().any(|other| discriminant(other) == discriminant(one))
        };
        for begun in now.iter().filter(|one| !is_in(&known, one)) {
            tracing::warn!(part = begun.part().text(), hint = begun.hint(), "{}", begun.text());
        }
        for ended in known.iter().filter(|one| !is_in(&now, one)) {
            tracing::info!(part = ended.part().text(), "the condition has ended: {}", ended.text());
        }
        known = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_full_table_is_a_problem() {
        let conntrack = |used| Condition::Conntrack(Usage { used, limit: 100 });
        assert!(!conntrack(94).is_problem() && conntrack(95).is_problem());
        let loss = LogLoss { lines: 2, ago: Duration::from_secs(3) };
        for notice in
            [Condition::ProgramReplaced, Condition::Ipv6Disabled, Condition::LogLinesLost(loss)]
        {
            assert!(!notice.is_problem() && !notice.hint().is_empty(), "{}", notice.text());
        }
    }
}
