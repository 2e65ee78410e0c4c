//! `underpass run`.

use std::path::PathBuf;

use underpass_config::{Settings, Sources};

use super::{CommandError, single_threaded_runtime};
use crate::{app, logging};

/// Where settings come from.
#[derive(Debug, clap::Args)]
pub(super) struct SettingsArguments {
    /// The settings file (YAML)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set one key over the file and the environment, such as proxy.workers=2; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl SettingsArguments {
    pub(super) fn load(self) -> Result<Settings, CommandError> {
        Ok(Sources::of_process(self.config, self.set).load()?)
    }
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  underpass run --config underpass.yaml --set logging.format=json"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    settings: SettingsArguments,
    /// Stop when standard input ends: a child of a test must not outlive it
    #[arg(long)]
    until_eof: bool,
}

pub(super) fn run(arguments: Arguments) -> Result<(), CommandError> {
    let settings = arguments.settings.load()?;
    let _logs = logging::start(&settings.logging)?;
    let runtime = single_threaded_runtime()?;
    let outcome = runtime.block_on(app::run(settings, arguments.until_eof));
    // Dropping it would wait for the thread that still waits for a worker which does not end.
    runtime.shutdown_background();
    outcome
}
