//! `underpass man`: renders manual pages from the definitions of the commands.

use std::path::PathBuf;

use clap::CommandFactory as _;

use super::{Cli, print};
use crate::process::command_error::CommandError;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  underpass man rules verify | man -l -\n  underpass man --dir /usr/share/man/man1"
)]
pub(super) struct Arguments {
    /// The command to describe, such as `rules verify`; by default underpass itself
    command: Vec<String>,
    /// Write the pages of all commands to this folder instead
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    dir: Option<PathBuf>,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), CommandError> {
    // `help` has no manual page, so pages must not refer to it.
    let mut root = Cli::command().disable_help_subcommand(true);
    if let Some(dir) = &arguments.dir {
        std::fs::create_dir_all(dir).map_err(CommandError::Output)?;
        return clap_mangen::generate_to(root, dir).map_err(CommandError::Output);
    }
    root.build();
    let mut command = &root;
    for name in &arguments.command {
        let Some(found) = command.find_subcommand(name) else {
            return Err(CommandError::NoSuchCommand(arguments.command.join(" ")));
        };
        command = found;
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page).map_err(CommandError::Output)?;
    print(&String::from_utf8_lossy(&page))
}
