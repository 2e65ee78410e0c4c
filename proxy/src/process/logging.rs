//! Writes log lines to standard output on a separate thread, so that a slow reader of the log
//! delays no connection.
//!
//! An overlong line is cut (`line.rs`). A line that does not fit the queue is lost and counted
//! (`queue.rs`); the count is logged when the output recovers.

pub(crate) mod levels;
mod line;
mod queue;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::Arc;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::time::SystemTime;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use underpass_config::{ConfigErrors, Hint as _, LogFilter, LogFormat, Logging, Problem};

use self::line::Lines;
use self::queue::{Queue, QueueGuard};
use crate::observe::access_log;
use crate::observe::otlp::logs::ExportLayer;
use crate::process::command_error::CommandError;

/// Starts logging. Dropping the guard writes the queued lines, for at most a second.
///
/// # Errors
/// The filter is not in tracing's syntax, or no thread can be started.
pub(crate) fn start(settings: &Logging) -> Result<QueueGuard, CommandError> {
    let filter = levels::start(&settings.filter)?;
    access_log::select(&settings.access);
    // Bypasses std's buffer, which would retain bytes that could not be written.
    let output = io::stdout().as_fd().try_clone_to_owned().map_err(CommandError::start)?;
    let lines = Lines::new(settings.format);
    let (queue, guard) = queue::start(File::from(output), lines).map_err(CommandError::start)?;
    let layer = tracing_subscriber::fmt::layer()
        .with_timer(SystemTime)
        .with_ansi(false)
        .with_writer(LineWriter { lines, queue });
    let registry = tracing_subscriber::registry().with(filter).with(ExportLayer);
    match settings.format {
        LogFormat::Plain => registry.with(layer).init(),
        LogFormat::Json => registry.with(layer.json().flatten_event(true)).init(),
    }
    Ok(guard)
}

/// Applies changed settings. The format stays.
pub(crate) fn apply(settings: &Logging) {
    access_log::select(&settings.access);
    if let Err(errors) = levels::follow(&settings.filter) {
        tracing::error!(
            hint = errors.hint().as_deref(),
            "cannot change the filter of the log, the last valid one stays in effect: {errors}"
        );
    }
}

/// Parses the filter of log events.
///
/// # Errors
/// The filter is not in tracing's syntax.
pub(crate) fn parse(filter: &LogFilter) -> Result<Targets, ConfigErrors> {
    let text = filter.as_str();
    let filter: Targets = text.parse().map_err(|error| ConfigErrors {
        problems: vec![Problem {
            key: "logging.filter".to_owned(),
            value: Some(text.to_owned()),
            reason: format!("must be like info or info,access=off: {error}"),
            hint: None,
            origin: None,
        }],
        more: 0,
    })?;
    // nlink warns of every netlink error, expected ones included. Callers log the relevant ones.
    Ok(if text.contains("nlink") {
        filter
    } else {
        filter.with_target("nlink", LevelFilter::ERROR)
    })
}

struct LineWriter {
    lines: Lines,
    queue: Arc<Queue>,
}

impl<'a> MakeWriter<'a> for LineWriter {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> &'a Self {
        self
    }
}

impl Write for &LineWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.queue.push(&self.lines.bounded(line));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
