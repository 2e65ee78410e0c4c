//! `underpass doctor`: checks the host, the configuration, certificates and reachability. It
//! changes nothing, and needs no running proxy.
//!
//! `check` defines a check, `checks` has all of them, `subject` determines what they check, and
//! `report` prints their findings.

mod check;
mod checks;
mod report;
mod subject;

use std::io::{self, Write as _};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::timeout;

use self::check::{Check, Finding, Info, Level, Scope};
use self::report::Report;
use self::subject::Subject;
use super::rules::Output;
use super::run::SettingsArguments;
use super::style::Style;
use super::verbosity::Verbosity;
use super::{print, single_threaded_runtime};
use crate::error::chain;
use crate::process::command_error::CommandError;

/// Timeout for one check, longer than those of its steps.
const CHECK_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example: before the installation, on the host\n  underpass doctor --pre\n\nWith the settings of a proxy, in its network namespace:\n  ip netns exec pod-a underpass doctor --config underpass.yaml\n\nExit codes: 0 no failure, 1 a failure."
)]
pub(super) struct Arguments {
    #[command(flatten)]
    settings: SettingsArguments,
    /// Check only the host, before the installation; needs no settings
    #[arg(long)]
    pre: bool,
    /// The output format
    #[arg(long, short = 'o', visible_alias = "format", value_enum, default_value_t = Output::Text)]
    output: Output,
    #[command(flatten)]
    verbosity: Verbosity,
}

pub(super) fn run(arguments: Arguments) -> Result<(), CommandError> {
    let Arguments { settings, pre, output, verbosity } = arguments;
    let sources = settings.sources();
    let has_settings = sources.file.is_some() || !sources.flags.is_empty();
    let sources = Some(sources).filter(|_| has_settings);
    let report = single_threaded_runtime()?.block_on(async {
        let subject = Subject::new(sources, pre).await?;
        if subject.is_host_only && !pre {
            let proxy = match &subject.running {
                Ok(_) => "no `underpass run` in this network namespace".to_owned(),
                Err(error) => chain(error),
            };
            writeln!(
                io::stderr(),
                "warning: there are no settings (--config), and {proxy}: only the host is checked"
            )
            .ok();
        }
        Ok::<_, CommandError>(examine(&subject).await)
    })?;
    match output {
        Output::Text => print(&report.text(Style::of_stdout(), verbosity))?,
        Output::Json => print(&format!("{:#}\n", report.json()))?,
    }
    match report.count(Level::Failure) {
        0 => Ok(()),
        failures => Err(CommandError::ChecksFailed(failures)),
    }
}

/// Runs all checks that apply at the same time, and returns their findings in order.
async fn examine(subject: &Subject) -> Report {
    let has_settings = subject.configuration.settings.is_some();
    let applies = |check: &&&dyn Check| match check.info().scope {
        Scope::Host => true,
        Scope::Files => !subject.is_host_only,
        Scope::Proxy => !subject.is_host_only && has_settings,
    };
    let runs = checks::ALL.iter().filter(applies).map(|check| run_check(*check, subject));
    let findings = join_all(runs).await.into_iter().flatten();
    Report { findings: findings.collect() }
}

async fn run_check(check: &dyn Check, subject: &Subject) -> Option<(Info, Finding)> {
    let finding = match timeout(CHECK_TIMEOUT, check.run(subject)).await {
        Ok(finding) => finding?,
        Err(_) => {
            let seconds = CHECK_TIMEOUT.as_secs();
            Finding::failure(format!("the check did not end within {seconds} s"))
        }
    };
    Some((check.info(), finding))
}
