//! `underpass rules`: for the namespace that it is run in.

use underpass_interception::remove_everything;

use super::{CommandError, print, single_threaded_runtime};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Remove every rule, ip rule and route of underpass from this network namespace
    #[command(after_help = "Example:\n  ip netns exec pod-a underpass rules remove")]
    Remove,
}

pub(super) fn run(command: &Command) -> Result<(), CommandError> {
    match command {
        Command::Remove => {
            let removed = single_threaded_runtime()?.block_on(remove_everything())?;
            print(if removed { "removed\n" } else { "there was nothing to remove\n" })
        }
    }
}
