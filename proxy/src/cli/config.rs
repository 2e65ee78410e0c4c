//! `underpass config`: checks or shows the settings and the files that they name.

pub(super) mod check;

use std::io::{self, Write as _};

use serde_json::json;
use underpass_config::{ConfigErrors, MeshSize, Problem, Reference, reference};

use self::check::{ConfigCheck, time_left};
use super::layout::age;
use super::print;
use super::rules::Output;
use super::run::SettingsArguments;
use super::style::{Colour, Style};
use super::verbosity::Verbosity;
use crate::process::command_error::CommandError;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Check the settings, the mesh file and the certificates as `underpass run` would; list every
    /// mistake, and exit with code 2 if there is one
    #[command(after_help = "Example:\n  underpass config check --config underpass.yaml")]
    Check {
        #[command(flatten)]
        settings: SettingsArguments,
        /// The output format
        #[arg(long, short = 'o', visible_alias = "format", value_enum, default_value_t = Output::Text)]
        output: Output,
        #[command(flatten)]
        verbosity: Verbosity,
    },
    /// Print the settings in effect: file, environment, flags and defaults
    #[command(after_help = "Example:\n  underpass config show --config underpass.yaml")]
    Show(SettingsArguments),
    /// Print every setting with its type, its default and its meaning
    #[command(after_help = "Example:\n  underpass config keys | grep -A1 timeouts")]
    Keys {
        /// Print the table of docs/settings.md
        #[arg(long)]
        markdown: bool,
    },
}

pub(super) fn run(command: Command) -> Result<(), CommandError> {
    match command {
        Command::Check { settings, output, verbosity } => check(settings, output, verbosity),
        Command::Show(arguments) => print(&arguments.load()?.to_string()),
        Command::Keys { markdown: true } => print(&Reference::table(reference())),
        Command::Keys { markdown: false } => {
            print(&reference().map(|setting| setting.to_string()).collect::<String>())
        }
    }
}

fn check(
    arguments: SettingsArguments,
    output: Output,
    verbosity: Verbosity,
) -> Result<(), CommandError> {
    let check = ConfigCheck::of(&arguments.sources());
    match output {
        Output::Text => print_text(&check, verbosity)?,
        Output::Json => print(&format!("{}\n", json(&check)))?,
    }
    match (check.problems.is_empty(), output) {
        (true, _) => Ok(()),
        (false, Output::Text) => {
            Err(ConfigErrors { problems: check.problems, more: check.more }.into())
        }
        // The mistakes are already printed.
        (false, Output::Json) => Err(CommandError::Mistakes(check.problems.len() + check.more)),
    }
}

fn print_text(check: &ConfigCheck, verbosity: Verbosity) -> Result<(), CommandError> {
    let warning = Style::of_stderr().paint(Colour::Yellow, "warning:");
    for text in &check.warnings {
        // Ignored if standard error is closed; the exit code still reports the result.
        writeln!(io::stderr(), "{warning} {text}").ok();
    }
    if verbosity.verbose {
        let checked = check.checked.iter().map(|file| format!("checked {file}\n"));
        print(&checked.collect::<String>())?;
    }
    if !check.problems.is_empty() || verbosity.quiet {
        return Ok(());
    }
    let MeshSize { workloads, services, policies } = check.mesh.size();
    let ok = Style::of_stdout().paint(Colour::Green, "ok");
    print(&format!("{ok}; workloads: {workloads}, services: {services}, policies: {policies}\n"))?;
    let Some(identity) = &check.identity else { return Ok(()) };
    let (id, left) = (identity.spiffe_id(), age(time_left(identity).as_secs()));
    print(&format!("certificate: {id}, expires in {left}\n"))
}

fn json(check: &ConfigCheck) -> serde_json::Value {
    let problems: Vec<_> = check
        .problems
        .iter()
        .map(|Problem { key, value, reason, hint, origin }| {
            let origin = origin.as_ref().map(ToString::to_string);
            json!({"key": key, "value": value, "reason": reason, "hint": hint, "origin": origin})
        })
        .collect();
    let certificate = check.identity.as_ref().map(|identity| {
        json!({
            "spiffe_id": identity.spiffe_id().to_string(),
            "expires_in_seconds": time_left(identity).as_secs(),
        })
    });
    let size = check.mesh.size();
    json!({
        "ok": check.problems.is_empty(),
        "problems": problems,
        "more_problems": check.more,
        "warnings": check.warnings.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "checked": check.checked,
        "workloads": size.workloads,
        "services": size.services,
        "policies": size.policies,
        "certificate": certificate,
    })
}
