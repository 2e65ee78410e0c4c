//! Clients that open connections in a loop while something else happens.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use tokio::task::JoinHandle;

use crate::or_fail::OrFail;
use crate::peers::until;

/// Opens connections in a loop until it is ended. Every one must succeed.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts `clients` clients. Each one opens one connection after the other with `connect`,
    /// which panics if that fails.
    pub fn start<C>(clients: usize, connect: impl Fn() -> C + Clone + Send + 'static) -> Self
    where
        C: Future<Output = ()> + Send + 'static,
    {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let client = |_| {
            let (connect, stop, done) = (connect.clone(), stop.clone(), done.clone());
            tokio::spawn(async move {
                while !stop.load(Relaxed) {
                    connect().await;
                    done.fetch_add(1, Relaxed);
                }
            })
        };
        let clients = (0..clients).map(client).collect();
        Self { stop, done, clients }
    }

    /// Waits until `more` further connections were served, or until one fails.
    pub async fn serve_more(&self, more: usize) {
        let goal = self.done.load(Relaxed) + more;
        until("connections are served", async || {
            self.done.load(Relaxed) >= goal
                || self.clients.iter().any(|client| client.is_finished())
        })
        .await;
    }

    /// Ends the clients.
    ///
    /// # Panics
    /// A connection failed.
    pub async fn end(self) {
        self.stop.store(true, Relaxed);
        for client in self.clients {
            client.await.or_fail("serve every connection");
        }
    }
}
