//! `/logging`: shows and changes the filter of the log.

use http::Uri;
use serde::{Deserialize, Serialize};
use underpass_config::LogFilterError;

use crate::admin::answer::Refusal;
use crate::admin::query::Query;
use crate::process::logging::levels;

/// The answer of `/logging`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Logging {
    /// The current filter, in the syntax of `logging.filter`.
    pub(crate) filter: String,
}

/// Whether a POST request for this changes nothing: `istioctl ztunnel-config log` asks so for the
/// current filter.
pub(crate) fn only_reads(uri: &Uri) -> bool {
    uri.path() == "/logging" && uri.query() == Some("level=")
}

/// The current filter.
pub(crate) fn show() -> Logging {
    Logging { filter: levels::current() }
}

/// Changes the filter: `?filter=info,access=off`, `?level=debug`, or `?reset` to the filter of the
/// settings.
pub(crate) fn change(mut query: Query) -> Result<Logging, Refusal> {
    // `level` is ztunnel's name.
    let given = [query.take("filter")?, query.take("level")?, query.take("reset")?];
    query.end("the parameters filter (or level) and reset")?;
    let changed = match given {
        [Some(filter), None, None] | [None, Some(filter), None] => {
            let filter = filter.parse().map_err(|error: LogFilterError| {
                Refusal::bad_request(format!(
                    "filter must be like info or info,access=off: {error}"
                ))
            })?;
            levels::set(filter)
        }
        [None, None, Some(_)] => levels::reset(),
        _ => {
            return Err(Refusal::bad_request(
                "one of the parameters filter and reset is needed, such as /logging?filter=debug",
            ));
        }
    };
    changed.map_err(|errors| Refusal::bad_request(errors.to_string()))?;
    let current = show();
    tracing::info!(filter = current.filter, "the filter of the log was changed");
    Ok(current)
}
