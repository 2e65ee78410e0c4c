//! The current filter of log events, which administration can change.
//!
//! tracing stores the decision for each place that logs, so that a place without interest costs one
//! load. A change of the filter makes it ask again.

use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use tracing::subscriber::Interest;
use tracing::{Metadata, Subscriber, callsite};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Context, Layer};
use underpass_config::{ConfigErrors, LogFilter};

use super::parse;

/// Global like the subscriber of the process. `None` before the log has started.
static CURRENT: RwLock<Option<Filter>> = RwLock::new(None);

#[derive(Debug)]
struct Filter {
    /// The filter of the settings.
    initial: LogFilter,
    current: LogFilter,
    targets: Targets,
}

/// The layer that filters log events.
pub(super) struct Levels;

fn read() -> RwLockReadGuard<'static, Option<Filter>> {
    // No code panics while it holds the lock.
    CURRENT.read().unwrap_or_else(PoisonError::into_inner)
}

/// Replaces the filter, and makes tracing decide again.
fn replace(initial: LogFilter, current: LogFilter) -> Result<(), ConfigErrors> {
    let targets = parse(&current)?;
    let filter = Filter { initial, current, targets };
    *CURRENT.write().unwrap_or_else(PoisonError::into_inner) = Some(filter);
    callsite::rebuild_interest_cache();
    Ok(())
}

/// Starts with the filter of the settings.
pub(super) fn start(filter: &LogFilter) -> Result<Levels, ConfigErrors> {
    replace(filter.clone(), filter.clone())?;
    Ok(Levels)
}

/// The current filter.
pub(crate) fn current() -> String {
    read().as_ref().map(|filter| filter.current.to_string()).unwrap_or_default()
}

/// Changes the filter.
///
/// # Errors
/// The filter is not in tracing's syntax.
pub(crate) fn set(filter: LogFilter) -> Result<(), ConfigErrors> {
    let initial = read().as_ref().map(|filter| filter.initial.clone()).unwrap_or_default();
    replace(initial, filter)
}

/// Applies the filter of changed settings. If it is unchanged, the current one stays.
///
/// # Errors
/// As [`set`].
pub(super) fn follow(filter: &LogFilter) -> Result<(), ConfigErrors> {
    if read().as_ref().is_some_and(|known| known.initial == *filter) {
        return Ok(());
    }
    replace(filter.clone(), filter.clone())
}

/// Restores the filter of the settings.
///
/// # Errors
/// As [`set`].
pub(crate) fn reset() -> Result<(), ConfigErrors> {
    let initial = read().as_ref().map(|filter| filter.initial.clone());
    set(initial.unwrap_or_default())
}

impl<S: Subscriber> Layer<S> for Levels {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        match &*read() {
            Some(filter) => Layer::<S>::register_callsite(&filter.targets, metadata),
            None => Interest::always(),
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>, context: Context<'_, S>) -> bool {
        read().as_ref().is_none_or(|filter| filter.targets.enabled(metadata, context))
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Layer::<S>::max_level_hint(&read().as_ref()?.targets)
    }
}
