//! The remedies of errors, separate from their messages.

use std::borrow::Cow;
use std::error::Error;

/// An error with a hint for the operator.
///
/// `Display` reports the failure. The hint says what to change or to check, without repeating the
/// failure. Logs print it as the field `hint`, and commands as a separate line. An error that wraps
/// another one returns the hint of the inner one.
///
/// Implementations match every variant, so that the author of a new variant decides about its hint.
pub trait Hint: Error {
    /// The hint in lower case, without a full stop; `None` if the operator cannot remedy the error.
    fn hint(&self) -> Option<Cow<'static, str>>;
}
