//! Detects the end of the parent process, so that a process started for a test does not outlive it.
//!
//! The parent holds the write end of this process's standard input; the kernel closes it when the
//! parent ends for whatever reason.

use std::io::{self, Read};

use tokio::sync::oneshot;
use underpass_interception::confine_auxiliary_thread;

/// Waits for the parent's end, which closes standard input.
#[derive(Debug)]
pub(crate) struct ParentGone(Option<oneshot::Receiver<()>>);

impl ParentGone {
    pub(crate) fn watch() -> io::Result<Self> {
        let (gone, receiver) = oneshot::channel();
        std::thread::Builder::new().name("parent".into()).spawn(move || {
            // The thread only reads, so it needs no capability.
            if let Err(error) = confine_auxiliary_thread() {
                tracing::warn!(%error, "a thread keeps capabilities that it does not need");
            }
            let mut ignored = [0; 64];
            while matches!(io::stdin().read(&mut ignored), Ok(read) if read > 0) {}
            // Fails if the process is already stopping.
            gone.send(()).ok();
        })?;
        Ok(Self(Some(receiver)))
    }

    /// Returns once, when the parent ends. Later calls never return.
    pub(crate) async fn wait(&mut self) {
        if let Some(receiver) = &mut self.0 {
            receiver.await.ok();
            self.0 = None;
        } else {
            std::future::pending().await
        }
    }
}
