//! The namespaces thread: the only thread that enters network namespaces.
//!
//! Operations run one after another, each to completion, and in their namespace even after an
//! await. An operation continues when its caller stops waiting, so that no repair is left
//! incomplete.
//!
//! Calls, such as opening a socket, never wait. They also run while an operation waits, so that
//! installing the rules of one pod does not delay connections of another pod.
//!
//! `privileged::operations` contains the operations and calls.

use std::io;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};

use futures_util::FutureExt as _;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use tokio::sync::{mpsc, oneshot};

use super::{Namespace, NamespaceId, failed};
use crate::error::InterceptionError;
use crate::process::privileges::{
    KeptCapabilities, ProxyUser, confine_thread, prepare_change_of_user,
};
use crate::process::user::own_files_as;

/// An operation. It receives an error if its namespace cannot be entered.
type AsyncOperation = Box<
    dyn FnOnce(Result<Entered, InterceptionError>) -> Pin<Box<dyn Future<Output = Reply>>> + Send,
>;
type SyncOperation = Box<dyn FnOnce(Result<Entered, InterceptionError>) -> Reply + Send>;

/// Sends the outcome to the caller, after the thread has left the namespace: a caller that has the
/// outcome knows that the thread no longer keeps the namespace alive.
type Reply = Box<dyn FnOnce()>;

/// A closure to run in a namespace.
struct Job<T> {
    namespace: Namespace,
    run: T,
}

/// Runs operations in network namespaces. Clones share the thread, which ends with the last clone.
///
/// Entering a namespace other than the thread's initial one requires CAP_SYS_ADMIN (setns(2)).
#[derive(Debug, Clone)]
pub struct NamespaceThread {
    operations: mpsc::UnboundedSender<Job<AsyncOperation>>,
    calls: mpsc::UnboundedSender<Job<SyncOperation>>,
}

/// Proof that the calling thread is in a certain network namespace. Cannot leave that thread.
#[derive(Debug)]
pub struct Entered {
    namespace: Namespace,
    /// Neither `Send` nor `Sync`, because each thread has its own namespace.
    _this_thread: PhantomData<*const ()>,
}

impl Entered {
    /// Proves the current namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`].
    pub fn current() -> Result<Self, InterceptionError> {
        Ok(Self::inside(Namespace::current()?))
    }

    /// The namespace that the calling thread is in.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    fn inside(namespace: Namespace) -> Self {
        Self { namespace, _this_thread: PhantomData }
    }
}

impl NamespaceThread {
    /// Starts the thread in the caller's namespace, with the caller's capabilities.
    ///
    /// # Errors
    ///
    /// The kernel cannot create the thread or its runtime.
    pub fn start() -> io::Result<Self> {
        let home = Namespace::current().map_err(io::Error::other)?;
        let (operations, operation_queue) = mpsc::unbounded_channel();
        let (calls, call_queue) = mpsc::unbounded_channel();
        let (ready, prepared) = std::sync::mpsc::sync_channel(1);
        let run = move || {
            // Create the runtime here: if the thread cannot start, the runtime is dropped, and the
            // caller may be inside another runtime.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let (runtime, outcome) = match runtime {
                Ok(runtime) => (Some(runtime), Ok(())),
                Err(error) => (None, Err(error)),
            };
            if ready.send(outcome).is_ok()
                && let Some(runtime) = runtime
            {
                runtime.block_on(serve(operation_queue, call_queue, home));
            }
        };
        let thread = std::thread::Builder::new().name("namespaces".to_owned()).spawn(run);
        let panicked = |_| Err(io::Error::other("it panicked"));
        thread.and_then(|_| prepared.recv().unwrap_or_else(panicked))?;
        Ok(Self { operations, calls })
    }

    /// Runs `operation` in `namespace` after all earlier operations. It runs to completion even if
    /// the caller stops waiting.
    ///
    /// # Errors
    ///
    /// [`InterceptionError::Namespace`] if the namespace cannot be entered, or the operation
    /// panicked.
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
        let run: AsyncOperation = Box::new(move |entered| {
            Box::pin(async move {
                let outcome = match entered {
                    Ok(entered) => {
                        let caught = AssertUnwindSafe(operation(&entered)).catch_unwind().await;
                        caught.map_err(|_| panicked(&target))
                    }
                    Err(error) => Err(error),
                };
                reply(answer, outcome)
            })
        });
        let ended = || ended(namespace);
        self.operations.send(Job { namespace: namespace.clone(), run }).map_err(|_| ended())?;
        answered.await.unwrap_or_else(|_| Err(ended()))
    }

    /// Runs `call`, which must not block, in `namespace` as soon as the current operation waits.
    /// Its result is dropped if the caller stops waiting.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub async fn call<T, F>(&self, namespace: &Namespace, call: F) -> Result<T, InterceptionError>
    where
        F: FnOnce(&Entered) -> T + Send + 'static,
        T: Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let target = namespace.clone();
        let run: SyncOperation = Box::new(move |entered| {
            let call = |entered: Entered| catch_unwind(AssertUnwindSafe(|| call(&entered)));
            let outcome = entered.and_then(|entered| call(entered).map_err(|_| panicked(&target)));
            reply(answer, outcome)
        });
        let ended = || ended(namespace);
        self.calls.send(Job { namespace: namespace.clone(), run }).map_err(|_| ended())?;
        answered.await.unwrap_or_else(|_| Err(ended()))
    }

    /// Waits until the thread ends. While this value lives, only a panic ends the thread.
    pub async fn ended(&self) {
        self.operations.closed().await;
    }

    /// Reduces the thread's capabilities, like [`confine_thread`].
    ///
    /// # Errors
    ///
    /// The kernel rejected the change.
    pub async fn confine(&self, kept: KeptCapabilities) -> Result<(), InterceptionError> {
        self.change_privileges(move || confine_thread(kept)).await
    }

    /// Preserves the thread's capabilities across a change of user, like
    /// [`prepare_change_of_user`].
    ///
    /// # Errors
    ///
    /// The kernel rejected the change.
    pub async fn prepare_change_of_user(
        &self,
        kept: KeptCapabilities,
    ) -> Result<(), InterceptionError> {
        self.change_privileges(move || prepare_change_of_user(kept)).await
    }

    /// Lets `user` own the sockets that the thread opens from now on, so that rules which match the
    /// proxy's user do not capture their connections. The thread keeps its capabilities for the
    /// network.
    ///
    /// # Errors
    ///
    /// The thread has ended.
    pub async fn open_files_as(&self, user: ProxyUser) -> Result<(), InterceptionError> {
        self.change_privileges(move || {
            own_files_as(user);
            Ok(())
        })
        .await
    }

    /// Changes the thread's capabilities. They do not belong to a namespace.
    async fn change_privileges(
        &self,
        change: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Result<(), InterceptionError> {
        let here = Namespace::current()?;
        let changed = self.call(&here, |_| change()).await?;
        changed.map_err(failed("change the privileges of the thread for", here.path()))
    }
}

fn reply<T: 'static>(answer: oneshot::Sender<T>, outcome: T) -> Reply {
    // Fails only if the caller has stopped waiting.
    Box::new(move || drop(answer.send(outcome)))
}

fn ended(namespace: &Namespace) -> InterceptionError {
    failed("run an operation in", namespace.path())(io::Error::other("its thread has ended"))
}

fn panicked(namespace: &Namespace) -> InterceptionError {
    failed("run an operation in", namespace.path())(io::Error::other("it panicked"))
}

/// The current and the initial namespace of the thread.
struct CurrentNamespace {
    home: Namespace,
    current: NamespaceId,
}

impl CurrentNamespace {
    fn enter(&mut self, namespace: &Namespace) -> Result<Entered, InterceptionError> {
        if namespace.id() != self.current {
            enter(namespace)?;
            self.current = namespace.id();
        }
        Ok(Entered::inside(namespace.clone()))
    }

    /// Returns to the initial namespace: a thread keeps its current namespace alive.
    fn leave(&mut self) {
        if let Err(error) = self.enter(&self.home.clone()) {
            // The next operation enters its own namespace first, so it is not affected.
            tracing::error!(%error, "cannot leave a network namespace");
        }
    }

    /// Runs an operation to completion, and calls while it waits. Returns no reply if the operation
    /// was aborted; its caller then receives an error.
    async fn operate(
        &mut self,
        Job { namespace, run }: Job<AsyncOperation>,
        calls: &mut mpsc::UnboundedReceiver<Job<SyncOperation>>,
    ) -> Option<Reply> {
        let mut running = pin!(run(self.enter(&namespace)));
        loop {
            tokio::select! {
                reply = &mut running => return Some(reply),
                Some(call) = calls.recv() => {
                    let reply = self.call(call);
                    let returned = self.enter(&namespace);
                    reply();
                    if let Err(error) = returned {
                        // The operation must not continue in another namespace.
                        tracing::error!(%error, "aborted an operation: cannot return to its network namespace");
                        return None;
                    }
                }
            }
        }
    }

    fn call(&mut self, Job { namespace, run }: Job<SyncOperation>) -> Reply {
        run(self.enter(&namespace))
    }
}

async fn serve(
    mut operations: mpsc::UnboundedReceiver<Job<AsyncOperation>>,
    mut calls: mpsc::UnboundedReceiver<Job<SyncOperation>>,
    home: Namespace,
) {
    let mut current_namespace = CurrentNamespace { current: home.id(), home };
    loop {
        let reply = tokio::select! {
            Some(call) = calls.recv() => Some(current_namespace.call(call)),
            Some(operation) = operations.recv() => current_namespace.operate(operation, &mut calls).await,
            else => return,
        };
        current_namespace.leave();
        if let Some(reply) = reply {
            reply();
        }
    }
}

/// Moves the calling thread to `namespace`.
pub(super) fn enter(namespace: &Namespace) -> Result<(), InterceptionError> {
    setns(namespace, CloneFlags::CLONE_NEWNET).map_err(|error| {
        let failed = failed("enter", namespace.path());
        match error {
            Errno::EINVAL => failed(io::Error::other("it is a namespace of another kind")),
            error => failed(error.into()),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread() -> NamespaceThread {
        NamespaceThread::start().expect("a thread")
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
        // Poll once, then cancel.
        assert!(operation.now_or_never().is_none());
        go.send(()).unwrap();
        finished.await.expect("the operation ran to its end");
    }

    #[tokio::test]
    async fn immediate_call_runs_while_operation_waits() {
        let (thread, here) = (thread(), Namespace::current().unwrap());
        let (go, wait) = oneshot::channel::<()>();
        let operation = thread.run(&here, async move |_| wait.await.is_ok());
        let call = async {
            let id = thread.call(&here, |entered| entered.namespace().id()).await.unwrap();
            assert_eq!(id, here.id());
            go.send(()).unwrap();
        };
        let (waited, ()) = tokio::join!(operation, call);
        assert!(waited.unwrap());
    }

    #[tokio::test]
    async fn survives_call_that_panics() {
        let (thread, here) = (thread(), Namespace::current().unwrap());
        let panicked = thread.call(&here, |_| panic!("on purpose")).await;
        assert!(panicked.is_err_and(|error| format!("{error:?}").contains("panicked")));
        assert_eq!(thread.call(&here, |_| 1).await.unwrap(), 1);
    }
}
