//! Closes netlink connections on a thread of its own.
//!
//! After any process has deleted a table, close(2) blocks for about ten milliseconds, until no CPU
//! can access the table (`nft_rcv_nl_event` flushes `nf_tables_trans_destroy_work`, which waits for
//! RCU, net/netfilter/nf_tables_api.c).

use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::NftablesConnection;
use crate::process::privileges::confine_auxiliary_thread;

/// The time without connections after which the thread ends. Starting a thread and dropping its
/// capabilities takes longer than most operations on rules.
const IDLE_TIME: Duration = Duration::from_secs(1);

/// The queue of the thread; `None` while there is no thread.
static QUEUE: Mutex<Option<Sender<NftablesConnection>>> = Mutex::new(None);

/// Closes the connection soon. If no thread can be started, blocks.
pub(super) fn close(kernel: NftablesConnection) {
    let mut queue = queue();
    if queue.is_none() {
        *queue = start();
    }
    // The thread ends only while it holds this lock, so it receives the connection.
    let rejected = match &*queue {
        Some(sender) => sender.send(kernel).err().map(|error| error.0),
        None => Some(kernel),
    };
    drop(queue);
    drop(rejected);
}

fn queue() -> MutexGuard<'static, Option<Sender<NftablesConnection>>> {
    // No code panics while it holds the lock.
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start() -> Option<Sender<NftablesConnection>> {
    let (sender, receiver) = mpsc::channel();
    let run = move || {
        // The thread only closes sockets, so a failure is harmless.
        confine_auxiliary_thread().ok();
        close_all(&receiver);
    };
    thread::Builder::new().name("close".to_owned()).spawn(run).ok().map(|_| sender)
}

/// Closes connections until none has arrived for [`IDLE_TIME`].
fn close_all(connections: &Receiver<NftablesConnection>) {
    loop {
        while let Ok(connection) = connections.recv_timeout(IDLE_TIME) {
            drop(connection);
        }
        let mut queue = queue();
        let Ok(late) = connections.try_recv() else {
            *queue = None;
            return;
        };
        drop(queue);
        drop(late);
    }
}
