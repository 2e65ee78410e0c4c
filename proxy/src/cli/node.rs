//! `underpass node`.

use super::run::{SettingsArguments, on_control_thread};
use crate::process::command_error::CommandError;
use crate::process::daemon;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example: serve the pods that files in a folder name\n  underpass node --config node.yaml\n\nnode.yaml:\n  node: {pods: {directory: /run/underpass/pods}}\n  mesh: {file: /etc/underpass/mesh.yaml}\n  identity: {local_ca: /etc/underpass/ca}"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    settings: SettingsArguments,
    /// Stop when standard input ends, so that the process does not outlive its parent
    #[arg(long)]
    until_eof: bool,
}

pub(super) fn run(arguments: Arguments) -> Result<(), CommandError> {
    let sources = arguments.settings.sources();
    let settings = sources.load()?;
    if settings.node.pods.is_none() {
        return Err(CommandError::NoPodSource);
    }
    let (logging, warnings) = (settings.logging.clone(), sources.warnings());
    on_control_thread(&logging, &warnings, daemon::run(settings, arguments.until_eof))
}
