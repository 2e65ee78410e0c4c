//! `underpass config`: the settings and the mesh file, without running anything.

use underpass_config::MeshSource;

use super::run::SettingsArguments;
use super::{CommandError, print};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Check the settings and the mesh file; every mistake is listed, and the exit code is 2 if there is one
    #[command(after_help = "Example:\n  underpass config check --config underpass.yaml")]
    Check(SettingsArguments),
    /// Print the settings in effect: file, environment, flags and defaults
    #[command(after_help = "Example:\n  underpass config show --config underpass.yaml")]
    Show(SettingsArguments),
}

pub(super) fn run(command: Command) -> Result<(), CommandError> {
    match command {
        Command::Check(arguments) => {
            let settings = arguments.load()?;
            let mesh = MeshSource::open(settings.mesh_file.as_deref())?;
            print(&format!("ok: {} workloads in the mesh\n", mesh.subscribe().borrow().len()))
        }
        Command::Show(arguments) => print(&arguments.load()?.to_string()),
    }
}
