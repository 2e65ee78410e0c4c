//! Catches panics of tasks, and logs them with the name of the task.

use std::any::Any;
use std::fmt;
use std::panic::AssertUnwindSafe;

use futures_util::FutureExt as _;

/// The message of a caught panic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Panic(String);

impl Panic {
    /// Reads the message of a caught panic.
    #[must_use]
    pub fn of(payload: &(dyn Any + Send)) -> Self {
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        Self(text.unwrap_or("a value that is not text").to_owned())
    }
}

impl fmt::Display for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Runs `task` and catches its panic.
pub fn catch_panic<T>(task: impl Future<Output = T>) -> impl Future<Output = Result<T, Panic>> {
    AssertUnwindSafe(task).catch_unwind().map(|ended| ended.map_err(|panic| Panic::of(&*panic)))
}

/// Runs a task whose panic affects nothing else, such as one connection, and logs a panic with the
/// name of the task. Does not allocate.
pub fn log_panic<T>(name: &'static str, task: impl Future<Output = T>) -> impl Future<Output = ()> {
    AssertUnwindSafe(task).catch_unwind().map(move |ended| {
        if let Err(panic) = ended {
            tracing::error!(task = name, panic = %Panic::of(&*panic), "a task panicked");
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn panic_is_caught_with_its_message() {
        let text = catch_panic(async { panic!("of text") }).await;
        assert_eq!(text, Err::<(), _>(Panic("of text".to_owned())));
        let formatted = catch_panic(async { panic!("of number {}", 7) }).await;
        assert_eq!(formatted, Err::<(), _>(Panic("of number 7".to_owned())));
        assert_eq!(catch_panic(async { 7 }).await, Ok(7));
        tokio::spawn(log_panic("a connection", async { panic!("of a connection") })).await.unwrap();
    }
}
