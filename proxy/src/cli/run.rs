//! `underpass run`.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::runtime::Runtime;
use underpass_config::{Logging, Problem, Settings, Sources};
use underpass_interception::{
    ProxyUser, confine_auxiliary_thread, confine_process, inherited_listeners,
};

use crate::broker::separation::Separation;
use crate::process::app::Start;
use crate::process::background::{self, BACKGROUND, REPORT_READY};
use crate::process::command_error::CommandError;
use crate::process::{app, logging, supervise};
use crate::version::VERSION;

/// The sources of settings that the command line gives.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct SettingsArguments {
    /// The settings file (YAML); by default the one in UNDERPASS_CONFIG
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set one key, such as proxy.workers=2. Overrides the file and the environment; may be
    /// repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl SettingsArguments {
    pub(super) fn load(self) -> Result<Settings, CommandError> {
        Ok(self.sources().load()?)
    }

    pub(super) fn sources(self) -> Sources {
        Sources::of_process(self.config, self.set)
    }

    /// Whether the arguments name no file and no setting.
    pub(super) fn are_empty(&self) -> bool {
        self.config.is_none() && self.set.is_empty()
    }

    /// These arguments with more settings, which override the others.
    pub(super) fn with(mut self, assignments: impl IntoIterator<Item = String>) -> Self {
        self.set.extend(assignments);
        self
    }
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  underpass run --config underpass.yaml --set logging.format=json\n\nReplace the running proxy without failing a connection:\n  underpass run --config underpass.yaml --take-over\n\nServe connections in a second process, without privileges:\n  underpass run --config underpass.yaml --set privileges.broker=auto"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    settings: SettingsArguments,
    /// Stop when standard input ends, so that the process does not outlive its parent
    #[arg(long)]
    until_eof: bool,
    /// Take over from the running process without a failed connection; start normally if none runs
    #[arg(long)]
    take_over: bool,
    /// Start in the background, and exit once the new process serves; for the reload command of a
    /// supervisor
    #[arg(long = BACKGROUND, conflicts_with = "until_eof")]
    background: bool,
    /// Report on standard input, a socket, when this process serves: the option of the process that
    /// --background starts
    #[arg(long = REPORT_READY, hide = true)]
    report_ready: bool,
}

pub(super) fn run(arguments: Arguments) -> Result<(), CommandError> {
    if arguments.background {
        return background::start();
    }
    // Before another process or thread is started.
    let inherited = inherited_listeners();
    let Arguments { until_eof, take_over, report_ready, settings, .. } = arguments;
    let sources = settings.sources();
    let settings = sources.load()?;
    if settings.node.pods.is_some() {
        return Err(CommandError::SettingsOfNode);
    }
    let separation = Separation::of(&settings);
    // A user that cannot be determined is reported later, when the log has started.
    if separation.user().is_none()
        && let Ok(Some(user)) = ProxyUser::required(&settings.interception)
    {
        user.announce();
    }
    let (logging, warnings) = (settings.logging.clone(), sources.warnings());
    let start = Start { until_eof, take_over, report_ready, inherited };
    on_control_thread(&logging, &warnings, app::run(settings, sources, start, separation))
}

/// Confines the process, starts the log, and runs `work` on this thread.
pub(super) fn on_control_thread(
    logging: &Logging,
    warnings: &[Problem],
    work: impl Future<Output = Result<(), CommandError>>,
) -> Result<(), CommandError> {
    confine_process().map_err(CommandError::Start)?;
    let _logs = on_confined_thread(|| logging::start(logging))??;
    supervise::log_panics();
    tracing::info!(version = VERSION, pid = std::process::id(), "underpass is starting");
    for warning in warnings {
        tracing::warn!(hint = warning.hint, "{warning}");
    }
    let runtime = control_runtime()?;
    let outcome = runtime.block_on(work);
    // Dropping the runtime would wait for blocking threads, and so for a worker that does not stop.
    runtime.shutdown_background();
    outcome
}

/// Runs `start` on a thread without capabilities, so that the threads that it starts have none.
fn on_confined_thread<T: Send>(start: impl FnOnce() -> T + Send) -> Result<T, CommandError> {
    let confined = || -> io::Result<T> {
        confine_auxiliary_thread()?;
        Ok(start())
    };
    let lost = || io::Error::other("the thread that starts the log panicked");
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("start".to_owned());
        let thread = thread.spawn_scoped(scope, confined)?;
        thread.join().unwrap_or_else(|_| Err(lost()))
    })
    .map_err(CommandError::start)
}

/// Starts and ends a thread, so that a failure is returned before a library panics on it.
fn attempt_thread() -> io::Result<()> {
    std::thread::Builder::new().spawn(|| {})?.join().ok();
    Ok(())
}

/// The time for which an idle blocking thread is kept: practically forever. tokio panics if it
/// cannot start such a thread, so one always exists.
const KEEP_ALIVE: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// The maximum number of blocking threads, which resolve the hostnames of CAs and endpoints.
const BLOCKING_THREADS: usize = 16;

/// Creates the runtime of the calling thread, which may keep a capability. The blocking threads
/// drop all capabilities.
fn control_runtime() -> Result<Runtime, CommandError> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime
        .enable_all()
        .thread_keep_alive(KEEP_ALIVE)
        .max_blocking_threads(BLOCKING_THREADS)
        .on_thread_start(|| {
            if let Err(error) = confine_auxiliary_thread() {
                tracing::warn!(%error, "a thread keeps capabilities that it does not need");
            }
        });
    let runtime = runtime.build().map_err(CommandError::Start)?;
    attempt_thread().map_err(CommandError::start)?;
    drop(runtime.spawn_blocking(|| {}));
    Ok(runtime)
}
