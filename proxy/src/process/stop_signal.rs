//! The signals and conditions that stop the proxy.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::process::command_error::CommandError;
use crate::process::parent::ParentGone;

/// Waits for an event that stops the proxy: SIGTERM, SIGINT, or the end of the parent.
pub(crate) struct StopSignal {
    terminate: Signal,
    interrupt: Signal,
    parent: Option<ParentGone>,
}

impl StopSignal {
    pub(crate) fn new(until_eof: bool) -> Result<Self, CommandError> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(CommandError::Start)?,
            interrupt: signal(SignalKind::interrupt()).map_err(CommandError::Start)?,
            parent: until_eof.then(ParentGone::watch).transpose().map_err(CommandError::start)?,
        })
    }

    pub(crate) async fn wait(&mut self) -> &'static str {
        let parent = async {
            match &mut self.parent {
                Some(parent) => parent.wait().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            () = parent => "standard input ended",
        }
    }
}
