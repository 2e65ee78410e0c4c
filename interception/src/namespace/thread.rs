//! The namespaces thread: the one thread that enters network namespaces, one operation at a time.
//!
//! An operation runs from its start to its end before the next one begins, so that what it opens
//! after an await is still opened inside of its namespace. It also runs to its end when its caller
//! stops waiting: a repair is never left half done.
//!
//! Not here: what operations do.

use std::io;
use std::marker::PhantomData;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;

use futures_util::FutureExt as _;
use nix::sched::{CloneFlags, setns};
use tokio::sync::{mpsc, oneshot};

use super::{Namespace, failed};
use crate::InterceptionError;

type Job = Box<dyn FnOnce(&Namespace) -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// Runs operations inside of network namespaces. Cheap to clone; the thread ends with the last
/// clone.
///
/// A namespace other than the one in which the thread was started takes CAP_SYS_ADMIN to enter
/// (setns(2)); that one takes no privilege.
#[derive(Debug, Clone)]
pub struct NamespaceThread {
    jobs: mpsc::UnboundedSender<Job>,
}

/// Proof that the calling thread is in a certain network namespace. It stays on that thread.
#[derive(Debug)]
pub struct Entered {
    namespace: Namespace,
    /// Neither `Send` nor `Sync`: namespaces belong to threads.
    _this_thread: PhantomData<*const ()>,
}

impl Entered {
    /// The namespace in which the calling thread is already, as a worker is in the one it was
    /// started in.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`].
    pub fn current() -> Result<Self, InterceptionError> {
        Ok(Self { namespace: Namespace::current()?, _this_thread: PhantomData })
    }

    /// The namespace that the calling thread is in.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }
}

impl NamespaceThread {
    /// Starts the thread in the caller's namespace and with the caller's capabilities. `prepare`
    /// runs first on it: to give up capabilities that operations do not need.
    ///
    /// # Errors
    ///
    /// The kernel's: no thread, no runtime, or `prepare` failed.
    pub fn start(prepare: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<Self> {
        let home = Namespace::current().map_err(io::Error::other)?;
        let (jobs, queue) = mpsc::unbounded_channel();
        let (ready, prepared) = std::sync::mpsc::sync_channel(1);
        let run = move || {
            // Made here, since a runtime must not be dropped where the caller may be: inside of
            // another one.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = prepare().and(runtime);
            let (runtime, outcome) = match runtime {
                Ok(runtime) => (Some(runtime), Ok(())),
                Err(error) => (None, Err(error)),
            };
            if ready.send(outcome).is_ok()
                && let Some(runtime) = runtime
            {
                runtime.block_on(serve(queue, home));
            }
        };
        let thread = std::thread::Builder::new().name("namespaces".to_owned()).spawn(run);
        let panicked = |_| Err(io::Error::other("it panicked"));
        thread.and_then(|_| prepared.recv().unwrap_or_else(panicked))?;
        Ok(Self { jobs })
    }

    /// Runs `operation` inside of `namespace`, after those that were asked for before. If the
    /// caller stops waiting, the operation goes on to its end.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`]: it cannot be entered, or the operation panicked.
    pub async fn run<T, F>(
        &self,
        namespace: &Namespace,
        operation: F,
    ) -> Result<T, InterceptionError>
    where
        F: AsyncFnOnce(&Entered) -> T + Send + 'static,
        T: Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let target = namespace.clone();
        let job: Job = Box::new(move |home| {
            let home = home.clone();
            Box::pin(async move {
                // Fails only if the caller has stopped waiting.
                answer.send(inside(&target, &home, operation).await).ok();
            })
        });
        let gone = || {
            failed("run an operation in", namespace.path())(io::Error::other(
                "its thread has ended",
            ))
        };
        self.jobs.send(job).map_err(|_| gone())?;
        answered.await.unwrap_or_else(|_| Err(gone()))
    }
}

async fn serve(mut queue: mpsc::UnboundedReceiver<Job>, home: Namespace) {
    while let Some(job) = queue.recv().await {
        job(&home).await;
    }
}

async fn inside<T>(
    target: &Namespace,
    home: &Namespace,
    operation: impl AsyncFnOnce(&Entered) -> T,
) -> Result<T, InterceptionError> {
    let elsewhere = target.id() != home.id();
    if elsewhere {
        enter(target)?;
    }
    let entered = Entered { namespace: target.clone(), _this_thread: PhantomData };
    let outcome = AssertUnwindSafe(operation(&entered)).catch_unwind().await;
    if elsewhere && let Err(error) = enter(home) {
        // Harmless to the next operation, which enters its own; but it keeps this one alive.
        tracing::error!(%error, namespace = %target.id(), "a namespace cannot be left");
    }
    let panicked =
        |_| failed("run an operation in", target.path())(io::Error::other("it panicked"));
    outcome.map_err(panicked)
}

/// Moves the calling thread.
pub(super) fn enter(namespace: &Namespace) -> Result<(), InterceptionError> {
    setns(namespace, CloneFlags::CLONE_NEWNET).map_err(failed("enter", namespace.path()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread() -> NamespaceThread {
        NamespaceThread::start(|| Ok(())).expect("a thread")
    }

    #[tokio::test]
    async fn runs_operation_in_own_namespace_without_privileges() {
        let here = Namespace::current().unwrap();
        let id = thread().run(&here, async |entered| entered.namespace().id()).await.unwrap();
        assert_eq!(id, here.id());
    }

    #[tokio::test]
    async fn survives_operation_that_panics() {
        let (thread, here) = (thread(), Namespace::current().unwrap());
        let panicked = thread.run(&here, async |_| panic!("on purpose")).await;
        assert!(panicked.is_err_and(|error| format!("{error:?}").contains("panicked")));
        assert_eq!(thread.run(&here, async |_| 1).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn finishes_operation_whose_caller_stopped_waiting() {
        let (thread, here) = (thread(), Namespace::current().unwrap());
        let (go, wait) = oneshot::channel::<()>();
        let (done, finished) = oneshot::channel();
        let operation = thread.run(&here, async move |_| {
            wait.await.ok();
            done.send(()).ok();
        });
        // Polled once, and dropped.
        assert!(operation.now_or_never().is_none());
        go.send(()).unwrap();
        finished.await.expect("the operation ran to its end");
    }

    #[test]
    fn reports_failure_to_prepare_thread() {
        let failed = NamespaceThread::start(|| Err(io::Error::other("refused")));
        assert!(failed.is_err_and(|error| format!("{error:?}").contains("refused")));
    }
}
