//! One end of the connection between the broker and the proxy process.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::marker::PhantomData;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout_at};
use underpass_interception::{Message as Received, SeqPacket};

use crate::broker::message::{MAX_MESSAGE, Message};

/// The number of queued messages from which [`Sender::send`] waits. [`Sender::post`] never waits.
const QUEUE: usize = 1024;
/// A process that has not read a message this long after it was queued counts as failed. So the
/// queue has no older message.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a message was not sent.
#[derive(Debug, Error)]
pub(crate) enum LinkError {
    #[error("the message is longer than {MAX_MESSAGE} bytes")]
    TooLong,
    #[error("the other process has ended, or reads too slowly")]
    Closed,
}

/// Sends messages of type `M`. Clones share the connection.
#[derive(Debug)]
pub(crate) struct Sender<M> {
    queue: mpsc::UnboundedSender<Outgoing>,
    /// One permit for each message of [`send`](Self::send).
    permits: Arc<Semaphore>,
    _messages: PhantomData<fn(M)>,
}

/// A message that waits for the other process to read.
#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    /// The time by which the other process must have read enough for this message.
    deadline: Instant,
    _permit: Option<OwnedSemaphorePermit>,
}

/// Receives the messages of the other process.
#[derive(Debug)]
pub(crate) struct Receiver(Arc<SeqPacket>);

/// Writes the messages that senders have queued.
#[derive(Debug)]
pub(crate) struct Writer {
    socket: Arc<SeqPacket>,
    queue: mpsc::UnboundedReceiver<Outgoing>,
}

/// Uses a connected, non-blocking socket.
pub(crate) fn open<M>(socket: OwnedFd) -> io::Result<(Sender<M>, Receiver, Writer)> {
    let socket = Arc::new(SeqPacket::new(socket)?.with_limit(MAX_MESSAGE));
    let (queue, queued) = mpsc::unbounded_channel();
    let sender = Sender { queue, permits: Arc::new(Semaphore::new(QUEUE)), _messages: PhantomData };
    Ok((sender, Receiver(socket.clone()), Writer { socket, queue: queued }))
}

impl<M> Clone for Sender<M> {
    fn clone(&self) -> Self {
        let (queue, permits) = (self.queue.clone(), self.permits.clone());
        Self { queue, permits, _messages: PhantomData }
    }
}

impl<M: Message> Sender<M> {
    /// Sends a message with these descriptors, which this process then closes. Waits while the
    /// queue is full.
    pub(crate) async fn send(
        &self,
        message: &M,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), LinkError> {
        let bytes = message.encode().ok_or(LinkError::TooLong)?;
        let permit = self.permits.clone().acquire_owned().await;
        let permit = permit.map_err(|_| LinkError::Closed)?;
        self.queue(bytes, descriptors, Some(permit))
    }

    /// Sends a message without waiting. The number of queued messages is not limited, but their
    /// age is: the writer ends the connection when it cannot write one within [`WRITE_TIMEOUT`].
    pub(crate) fn post(&self, message: &M) -> Result<(), LinkError> {
        let bytes = message.encode().ok_or(LinkError::TooLong)?;
        self.queue(bytes, Vec::new(), None)
    }

    fn queue(
        &self,
        bytes: Vec<u8>,
        descriptors: Vec<OwnedFd>,
        _permit: Option<OwnedSemaphorePermit>,
    ) -> Result<(), LinkError> {
        let deadline = Instant::now() + WRITE_TIMEOUT;
        let outgoing = Outgoing { bytes, descriptors, deadline, _permit };
        self.queue.send(outgoing).map_err(|_| LinkError::Closed)
    }
}

impl Receiver {
    /// The next message; `None` after the other process has ended. Descriptors are missing if this
    /// process has too few free ones.
    pub(crate) async fn next(&self) -> io::Result<Option<Received>> {
        or_end(self.0.receive_despite_lost_descriptors().await)
    }

    /// Like [`next`](Self::next), but fails with `InvalidData` if descriptors are missing. The
    /// connection remains.
    pub(crate) async fn next_complete(&self) -> io::Result<Option<Received>> {
        or_end(self.0.receive().await)
    }
}

/// The other process has ended without reading all messages if the connection was reset.
fn or_end(received: io::Result<Option<Received>>) -> io::Result<Option<Received>> {
    match received {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(None),
        received => received,
    }
}

impl Writer {
    /// Writes until the other process ends, or reads too slowly.
    pub(crate) async fn run(mut self) {
        while let Some(outgoing) = self.queue.recv().await {
            let Outgoing { bytes, descriptors, deadline, _permit } = outgoing;
            let attached: Vec<_> = descriptors.iter().map(|one| one.as_fd()).collect();
            match timeout_at(deadline, self.socket.send(&bytes, &attached)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    let ended = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
                    if !ended.contains(&error.kind()) {
                        tracing::error!(%error, "cannot send to the other process");
                    }
                    return;
                }
                Err(_) => {
                    tracing::error!(after = ?WRITE_TIMEOUT, "the other process reads too slowly");
                    return;
                }
            }
        }
    }
}

/// The answers that this process waits for.
#[derive(Debug)]
pub(crate) struct Pending<T> {
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<T>>>,
}

impl<T> Default for Pending<T> {
    fn default() -> Self {
        Self { next: AtomicU64::default(), waiting: Mutex::default() }
    }
}

impl<T> Pending<T> {
    /// The number of a new message, and its answer.
    pub(crate) fn register(&self) -> (u64, oneshot::Receiver<T>) {
        let number = self.next.fetch_add(1, Relaxed);
        let (sender, answer) = oneshot::channel();
        self.waiting().insert(number, sender);
        (number, answer)
    }

    /// Delivers an answer; `false` if none was awaited.
    pub(crate) fn answer(&self, number: u64, answer: T) -> bool {
        let waiting = self.waiting().remove(&number);
        // Fails if the caller has stopped waiting.
        waiting.map(|waiting| waiting.send(answer).ok()).is_some()
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<T>>> {
        // No code panics while it holds the lock.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::message::{PodKey, ToProxy};

    fn message(enrolment: u64) -> ToProxy {
        ToProxy::EndTest { pod: PodKey { uid: String::new(), enrolment } }
    }

    fn open_other_end(socket: OwnedFd) -> SeqPacket {
        let socket = std::os::unix::net::UnixStream::from(socket);
        socket.set_nonblocking(true).unwrap();
        SeqPacket::new(socket.into()).unwrap().with_limit(MAX_MESSAGE)
    }

    #[tokio::test]
    async fn posted_messages_are_sent_in_order_behind_a_full_queue() {
        let (ours, theirs) = SeqPacket::pair().unwrap();
        let (sender, _, writer) = open(ours).unwrap();
        let count = 2 * u64::try_from(QUEUE).unwrap();
        for enrolment in 0..count {
            sender.post(&message(enrolment)).unwrap();
        }
        sender.send(&message(count), Vec::new()).await.unwrap();
        drop(sender);
        tokio::spawn(writer.run());
        let theirs = open_other_end(theirs);
        for enrolment in 0..=count {
            let received = theirs.receive().await.unwrap().unwrap();
            assert_eq!(ToProxy::decode(&received.bytes), Some(message(enrolment)));
        }
    }

    #[tokio::test]
    async fn full_queue_delays_its_senders_until_the_connection_ends() {
        let (ours, _theirs) = SeqPacket::pair().unwrap();
        let (sender, _, writer) = open(ours).unwrap();
        for enrolment in 0..u64::try_from(QUEUE).unwrap() {
            sender.send(&message(enrolment), Vec::new()).await.unwrap();
        }
        let one_more = message(0);
        let sending = sender.send(&one_more, Vec::new());
        tokio::pin!(sending);
        assert!(futures_util::poll!(&mut sending).is_pending());
        drop(writer);
        assert!(matches!(sending.await, Err(LinkError::Closed)));
    }

    /// Each single write of this test succeeds within [`WRITE_TIMEOUT`].
    #[tokio::test(start_paused = true)]
    async fn writer_ends_while_other_process_reads_slowly() {
        let (ours, theirs) = SeqPacket::pair().unwrap();
        let (sender, _, writer) = open(ours).unwrap();
        let uid = "u".repeat(MAX_MESSAGE / 8);
        let long = ToProxy::EndTest { pod: PodKey { uid, enrolment: 0 } };
        for _ in 0..QUEUE {
            sender.post(&long).unwrap();
        }
        drop(sender);
        let (theirs, start) = (open_other_end(theirs), Instant::now());
        let read_slowly = async {
            loop {
                tokio::time::sleep(WRITE_TIMEOUT * 9 / 10).await;
                for _ in 0..QUEUE / 32 {
                    theirs.receive().await.unwrap();
                }
            }
        };
        tokio::select! {
            () = writer.run() => {}
            () = read_slowly => {}
        }
        assert_eq!(start.elapsed(), WRITE_TIMEOUT);
    }
}
