//! Ending with the parent: a process that was started for a test or a demonstration must not outlive whoever started it.
//!
//! The parent holds the write end of our standard input; however it ends, the kernel closes it.

use std::io::{self, Read};

use tokio::sync::oneshot;
use underpass_interception::confine_auxiliary_thread;

/// Learns of the end of standard input.
#[derive(Debug)]
pub(crate) struct ParentGone(Option<oneshot::Receiver<()>>);

impl ParentGone {
    pub(crate) fn watch() -> io::Result<Self> {
        let (gone, receiver) = oneshot::channel();
        std::thread::Builder::new().name("parent".into()).spawn(move || {
            // It stays, and only reads.
            if let Err(error) = confine_auxiliary_thread() {
                tracing::warn!(%error, "a thread keeps capabilities that it does not need");
            }
            let mut ignored = [0; 64];
            while matches!(io::stdin().read(&mut ignored), Ok(read) if read > 0) {}
            // Nobody waits any more if the process is ending already.
            gone.send(()).ok();
        })?;
        Ok(Self(Some(receiver)))
    }

    /// Ends once, when the parent does; waits for ever after that.
    pub(crate) async fn wait(&mut self) {
        if let Some(receiver) = &mut self.0 {
            receiver.await.ok();
            self.0 = None;
        } else {
            std::future::pending().await
        }
    }
}
