//! `underpass proxy-process`, which `underpass node` starts.

use underpass_interception::ProxyUser;

use super::run::on_control_thread;
use crate::broker::proxy_process::{self, Start};
use crate::process::command_error::CommandError;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The user and group of the process
    #[arg(long)]
    user: u32,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), CommandError> {
    let user = ProxyUser { uid: arguments.user, gid: arguments.user };
    let start = Start::receive(user)?;
    let logging = start.settings.logging.clone();
    on_control_thread(&logging, &[], proxy_process::run(start))
}
