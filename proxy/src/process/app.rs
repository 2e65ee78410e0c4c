//! `underpass run`: runs the proxy of the current network namespace, from its start to its end.

use std::sync::Arc;

use underpass_config::{Broker, FileWatcher, Hint as _, PrivilegesSettings, Settings, Sources};
use underpass_hbone::catch_panic;
use underpass_interception::{BoundListener, Inotify, raise_open_files};

use crate::broker::separation::Separation;
use crate::error::chain;
use crate::process::background;
use crate::process::command_error::CommandError;
use crate::process::passed_sockets::PassedSockets;
use crate::process::phases::Bound;
use crate::process::reload::Reload;
use crate::process::stop_signal::StopSignal;
use crate::process::supervise::{Failures, Supervisor, TaskFailure};

/// How `underpass run` and `underpass node` start, apart from the settings.
#[derive(Debug)]
pub(crate) struct Start {
    /// Whether to stop when the parent process ends.
    pub(crate) until_eof: bool,
    /// Whether to take over from the running process.
    pub(crate) take_over: bool,
    /// Whether to report to the process that started this one in the background.
    pub(crate) report_ready: bool,
    /// The listeners that the supervisor has passed, with their names in its store.
    pub(crate) inherited: Vec<(String, BoundListener)>,
}

/// Serves as one or two processes until a stop signal, or until another process has taken over.
/// Reloads the settings from `sources` when they change.
///
/// # Errors
///
/// A failure before the rules are installed leaves no rules. The failure of an essential task ends
/// the process at once and leaves the rules, so that no traffic leaves in plaintext.
pub(crate) async fn run(
    settings: Settings,
    sources: Sources,
    start: Start,
    separation: Separation,
) -> Result<(), CommandError> {
    let (supervisor, failures) = Supervisor::new();
    let life = Box::pin(run_phases(settings, sources, start, separation, supervisor));
    run_until_failure(life, failures).await
}

/// Runs `life` until it ends or the first essential task fails. Returns the outcome or the failure.
pub(crate) async fn run_until_failure(
    life: impl Future<Output = Result<(), CommandError>>,
    mut failures: Failures,
) -> Result<(), CommandError> {
    tokio::select! {
        outcome = catch_panic(life) => outcome.unwrap_or_else(|panic| {
            Err(failed(TaskFailure::Panicked { task: "the control thread".into(), panic }))
        }),
        failure = failures.next() => Err(failed(failure)),
    }
}

fn failed(failure: TaskFailure) -> CommandError {
    let error = CommandError::Task(failure);
    let hint = error.hint();
    tracing::error!(error = chain(&error), hint = hint.as_deref(), "an essential task failed");
    error
}

async fn run_phases(
    settings: Settings,
    sources: Sources,
    start: Start,
    separation: Separation,
    supervisor: Supervisor,
) -> Result<(), CommandError> {
    let mut stop = StopSignal::new(start.until_eof)?;
    raise_open_files().map_err(CommandError::Start)?;
    separation.log();
    let watcher = FileWatcher::new(Inotify::open);
    let reload = Reload::watch(&settings, sources, &watcher)?;
    let (settings, user) = (Arc::new(effective(settings, &separation)), separation.user());
    let passed = PassedSockets::receive(&settings, start.take_over, start.inherited).await?;
    let reload = (reload, watcher);
    let bound = Bound::bind(settings, user, reload, passed, supervisor).await?;
    let guarded = bound.guard().await?;
    let serving = Box::pin(guarded.serve(&mut stop)).await?;
    let Some(serving) = serving else { return Ok(()) };
    if start.report_ready {
        background::report_ready();
    }
    let draining = serving.until_end(&mut stop).await?;
    draining.finish(&mut stop).await
}

/// These settings, with a broker only if there is one.
fn effective(settings: Settings, separation: &Separation) -> Settings {
    let broker = match separation {
        Separation::Broker(_) => Broker::Auto,
        Separation::Off | Separation::Impossible { .. } => Broker::Off,
    };
    let privileges = PrivilegesSettings { broker, ..settings.privileges };
    Settings { privileges, ..settings }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::process::ExitCode;

    use super::*;

    #[tokio::test]
    async fn panic_of_essential_task_ends_the_process_with_exit_code_1() {
        let (supervisor, failures) = Supervisor::new();
        let _task = supervisor.essential("a task", async { panic!("of a task") });
        let error = run_until_failure(pending(), failures).await.unwrap_err();
        let text = "an internal error stops the proxy: a task panicked: of a task";
        assert_eq!(chain(&error), text);
        assert_eq!(format!("{:?}", error.exit_code()), format!("{:?}", ExitCode::from(1)));
    }

    #[tokio::test]
    async fn panic_of_control_thread_is_an_error() {
        let (_supervisor, failures) = Supervisor::new();
        let error = run_until_failure(async { panic!("of a phase") }, failures).await.unwrap_err();
        let text = "an internal error stops the proxy: the control thread panicked: of a phase";
        assert_eq!(chain(&error), text);
    }
}
