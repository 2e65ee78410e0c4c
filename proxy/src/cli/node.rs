//! `underpass node`.

use underpass_interception::inherited_listeners;

use super::run::{SettingsArguments, on_control_thread};
use crate::process::app::Start;
use crate::process::background::{self, BACKGROUND, REPORT_READY};
use crate::process::command_error::CommandError;
use crate::process::daemon;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example: serve the pods that files in a folder name\n  underpass node --config node.yaml\n\nnode.yaml:\n  node: {pods: {directory: /run/underpass/pods}}\n  mesh: {file: /etc/underpass/mesh.yaml}\n  identity: {local_ca: /etc/underpass/ca}\n\nReplace the running daemon without failing a connection:\n  underpass node --config node.yaml --take-over"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    settings: SettingsArguments,
    /// Stop when standard input ends, so that the process does not outlive its parent
    #[arg(long)]
    until_eof: bool,
    /// Take over the pods of the running daemon without a failed connection; start normally if none
    /// runs
    #[arg(long)]
    take_over: bool,
    /// Start in the background, and exit once the new process serves; for the reload command of a
    /// supervisor
    #[arg(long = BACKGROUND, conflicts_with = "until_eof")]
    background: bool,
    /// Report on standard input, a socket, when this process serves: the option of the process that
    /// --background starts
    #[arg(long = REPORT_READY, hide = true)]
    report_ready: bool,
}

pub(super) fn run(arguments: Arguments) -> Result<(), CommandError> {
    if arguments.background {
        return background::start();
    }
    // Before another process or thread is started.
    let inherited = inherited_listeners();
    let Arguments { until_eof, take_over, report_ready, settings, .. } = arguments;
    let sources = settings.sources();
    let settings = sources.load()?;
    if settings.node.pods.is_none() {
        return Err(CommandError::NoPodSource);
    }
    let (logging, warnings) = (settings.logging.clone(), sources.warnings());
    let start = Start { until_eof, take_over, report_ready, inherited };
    on_control_thread(&logging, &warnings, daemon::run(settings, sources, start))
}
