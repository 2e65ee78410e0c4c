//! Log lines: on standard output, written by a thread of their own so that a slow reader of them slows nobody down.

use std::io;

use tracing_appender::non_blocking::WorkerGuard;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::time::SystemTime;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use underpass_config::{ConfigErrors, LogFormat, Logging, Problem};

/// Starts logging; lines that are not written yet are written when the guard is dropped.
///
/// # Errors
/// The filter is not in tracing's syntax.
pub(crate) fn start(settings: &Logging) -> Result<WorkerGuard, ConfigErrors> {
    let filter: Targets = settings.filter.parse().map_err(|error| ConfigErrors {
        problems: vec![Problem {
            key: "logging.filter".to_owned(),
            value: Some(settings.filter.clone()),
            reason: format!("must be like info or info,access=off: {error}"),
            origin: None,
        }],
        more: 0,
    })?;
    // It warns of every answer that is no success, expected ones too; what matters comes to us as an error.
    let filter = if settings.filter.contains("nlink") {
        filter
    } else {
        filter.with_target("nlink", LevelFilter::ERROR)
    };
    let (writer, guard) = tracing_appender::non_blocking(io::stdout());
    let lines = tracing_subscriber::fmt::layer()
        .with_timer(SystemTime)
        .with_ansi(false)
        .with_writer(writer);
    let registry = tracing_subscriber::registry().with(filter);
    match settings.format {
        LogFormat::Plain => registry.with(lines).init(),
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).init(),
    }
    Ok(guard)
}
