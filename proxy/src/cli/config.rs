//! `underpass config`: the settings and the mesh file, without running anything.

use underpass_config::Mesh;

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
            let mesh = settings.mesh_file.as_deref().map(Mesh::from_file).transpose()?;
            let mesh = mesh.unwrap_or_default();
            let (workloads, services) = (mesh.workloads().len(), mesh.services().len());
            let policies = mesh.policy_count();
            print(&format!(
                "ok; workloads: {workloads}, services: {services}, policies: {policies}\n"
            ))
        }
        Command::Show(arguments) => print(&arguments.load()?.to_string()),
    }
}
