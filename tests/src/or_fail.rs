//! Unwraps results of the harness. The panic names the failed operation.

use std::fmt::Display;

/// Unwraps a result, or panics with the failed operation and the cause.
pub(crate) trait OrFail<T> {
    fn or_fail(self, what: impl Display) -> T;
}

impl<T, E: std::error::Error> OrFail<T> for Result<T, E> {
    #[track_caller]
    fn or_fail(self, what: impl Display) -> T {
        self.unwrap_or_else(|error| {
            let source = error.source().map(|source| format!(": {source}"));
            panic!("cannot {what}: {error}{}", source.unwrap_or_default())
        })
    }
}
