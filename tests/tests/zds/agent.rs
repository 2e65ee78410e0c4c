//! A node agent's side of ZDS. It encodes the messages by hand, so that a mistake in the product's
//! definition of them is detected.

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::timeout;
use underpass_interception::SeqPacket;
use underpass_interception::testing::SeqPacketListener;
use underpass_tests::{Pod, within};

/// The field numbers of `WorkloadRequest`.
const ADD: u8 = 1;
const DEL: u8 = 2;
const SNAPSHOT_SENT: u8 = 3;
const KEEP: u8 = 5;

/// The time in which nothing must arrive.
const QUIET: Duration = Duration::from_millis(300);

/// A listening agent.
pub(crate) struct Agent {
    listener: SeqPacketListener,
    path: PathBuf,
}

/// A connection of the proxy.
pub(crate) struct Connection(SeqPacket);

impl Agent {
    /// Listens at `path`, replacing an earlier agent.
    pub(crate) fn listen(path: &Path) -> Self {
        fs::remove_file(path).ok();
        let listener = SeqPacketListener::bind(path).expect("listens");
        Self { listener, path: path.to_owned() }
    }

    /// Accepts the proxy, and checks its first message: version 1.
    pub(crate) async fn accept(&self) -> Connection {
        let connection = within("the proxy connects", self.listener.accept()).await;
        let connection = Connection(connection.expect("accepted"));
        assert_eq!(connection.message().await, [0x08, 0x01]);
        connection
    }

    /// Asserts that the proxy has no other connection, and sends no unsolicited response.
    pub(crate) async fn assert_quiet(&self, connection: &Connection) {
        let second = timeout(QUIET, self.listener.accept()).await;
        assert!(second.is_err(), "a second connection");
        let message = timeout(QUIET, connection.0.receive()).await;
        assert!(message.is_err(), "a message that answers nothing: {message:?}");
    }

    /// Stops the agent and closes its connection.
    pub(crate) fn stop(self, connection: Connection) {
        drop((self.listener, connection));
        fs::remove_file(self.path).expect("removed");
    }
}

impl Connection {
    /// Passes a pod, whose name is also its uid and service account. Returns the reason of a
    /// rejection; empty after success.
    pub(crate) async fn add(&self, pod: &Pod) -> String {
        let namespace = pod.namespace().as_fd();
        let request = add(pod.name(), pod.name());
        self.0.send(&request, &[namespace]).await.expect("sent");
        self.response().await
    }

    /// Passes a pod with another descriptor than that of its namespace.
    pub(crate) async fn add_with(&self, pod: &Pod, descriptor: &File) -> String {
        let request = add(pod.name(), pod.name());
        self.0.send(&request, &[descriptor.as_fd()]).await.expect("sent");
        self.response().await
    }

    pub(crate) async fn keep(&self, pod: &Pod) -> String {
        self.request(&field(KEEP, &field(1, pod.name().as_bytes()))).await
    }

    pub(crate) async fn del(&self, pod: &Pod) -> String {
        self.request(&field(DEL, &field(2, pod.name().as_bytes()))).await
    }

    pub(crate) async fn snapshot_sent(&self) -> String {
        self.request(&field(SNAPSHOT_SENT, b"")).await
    }

    async fn request(&self, request: &[u8]) -> String {
        self.0.send(request, &[]).await.expect("sent");
        self.response().await
    }

    /// The reason in the next `WorkloadResponse { ack: Ack { error } }`.
    async fn response(&self) -> String {
        let message = self.message().await;
        let ack = content(&message);
        if ack.is_empty() { String::new() } else { lossy(content(ack)) }
    }

    async fn message(&self) -> Vec<u8> {
        let message = within("the proxy sends a message", self.0.receive()).await;
        let message = message.expect("received").expect("the proxy is connected");
        assert!(message.descriptors.is_empty());
        message.bytes
    }
}

fn add(uid: &str, name: &str) -> Vec<u8> {
    let texts = [(1, name), (2, "default"), (3, name)];
    let info: Vec<u8> = texts.iter().flat_map(|(tag, text)| field(*tag, text.as_bytes())).collect();
    field(ADD, &[field(1, uid.as_bytes()), field(2, &info)].concat())
}

/// A field with a length of at most 127.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let length = u8::try_from(content.len()).expect("short");
    assert!(length < 0x80, "a longer length has two octets");
    [&[number << 3 | 2, length], content].concat()
}

/// The content of the only field, which has the number 1.
fn content(message: &[u8]) -> &[u8] {
    let (length, content) = match message {
        [0x0a, low, high, content @ ..] if *low >= 0x80 => {
            (usize::from(*low & 0x7f) | usize::from(*high) << 7, content)
        }
        [0x0a, length, content @ ..] => (usize::from(*length), content),
        _ => panic!("{message:x?}"),
    };
    assert_eq!(content.len(), length, "{message:x?}");
    content
}

fn lossy(text: &[u8]) -> String {
    String::from_utf8_lossy(text).into_owned()
}
