//! `underpass proxy-process`, which `underpass node` and `underpass run` start.

use underpass_interception::ProxyUser;

use super::run::on_control_thread;
use crate::broker::proxy_process::{self, Start};
use crate::process::command_error::CommandError;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The user of the process
    #[arg(long)]
    user: u32,
    /// The group of the process
    #[arg(long)]
    group: u32,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), CommandError> {
    let user = ProxyUser { uid: arguments.user, gid: arguments.group };
    let start = Start::receive(user)?;
    let logging = start.settings.logging.clone();
    on_control_thread(&logging, &[], proxy_process::run(start))
}
