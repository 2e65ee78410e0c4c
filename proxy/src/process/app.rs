//! `underpass run`: runs the proxy of the current network namespace, from its start to its end.

use underpass_config::{Settings, Sources};
use underpass_interception::raise_open_files;

use crate::process::command_error::CommandError;
use crate::process::phases::Bound;
use crate::process::stop_signal::StopSignal;
use crate::process::supervise::Supervisor;

/// How `underpass run` was started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    /// Whether to stop when the parent ends.
    pub(crate) until_eof: bool,
    /// Whether to take over from the running process.
    pub(crate) take_over: bool,
}

/// Runs until a stop signal, or until another process has taken over. Reloads the settings from
/// `sources` when they change.
///
/// # Errors
///
/// A failure before the rules are installed leaves none behind. The failure of an essential task
/// ends the process at once and leaves the rules: no traffic leaves in plaintext.
pub(crate) async fn run(
    settings: Settings,
    sources: Sources,
    start: Start,
) -> Result<(), CommandError> {
    let (supervisor, mut failures) = Supervisor::new();
    tokio::select! {
        outcome = Box::pin(live(settings, sources, start, supervisor)) => outcome,
        failure = failures.next() => Err(CommandError::Task(failure)),
    }
}

async fn live(
    settings: Settings,
    sources: Sources,
    start: Start,
    supervisor: Supervisor,
) -> Result<(), CommandError> {
    let mut stop = StopSignal::new(start.until_eof)?;
    raise_open_files().map_err(CommandError::Start)?;
    let bound = Bound::bind(settings, sources, start.take_over, supervisor).await?;
    let guarded = bound.guard().await?;
    let Some(serving) = guarded.serve(&mut stop).await? else { return Ok(()) };
    let draining = serving.until_end(&mut stop).await;
    draining.finish(&mut stop).await
}
