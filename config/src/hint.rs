//! The remedy of an error, separate from its message.

use std::borrow::Cow;
use std::error::Error;

/// An error that may come with advice for the operator.
///
/// `Display` says what failed. The hint says what to change or to check, without repeating that.
/// Logs print it as the field `hint`, and commands as a line of its own. An error that wraps
/// another one returns the hint of the inner one.
///
/// Implementations match every variant, so that the author of a new one decides about its hint.
pub trait Hint: Error {
    /// The advice in lower case, without a full stop; `None` if the operator can do nothing.
    fn hint(&self) -> Option<Cow<'static, str>>;
}
