//! A scripted process that takes over from a running daemon, request by request.

use std::path::Path;

use tokio::net::UnixStream;
use underpass_interception::Handover;

use crate::or_fail::OrFail;
use crate::peers::within;

/// The longest message about a pod in bytes.
const LONGEST_LINE: usize = 1 << 20;

/// A connection to a running daemon. Dropping it ends the attempt.
#[derive(Debug)]
pub struct ScriptedSuccessor(Handover);

impl ScriptedSuccessor {
    /// Connects to the daemon at its socket for take-overs, and gets its listeners.
    pub async fn connect(socket: &Path) -> Self {
        // The refusal of an unknown role names the role of the daemon.
        let refusal = Self::open(socket).await.ask("who are you?").await;
        let role = refusal.split('"').nth(1).expect("a role").to_owned();
        let successor = Self::open(socket).await;
        let answer = successor.ask(&role).await;
        assert!(answer.starts_with("listeners "), "{answer}");
        successor
    }

    async fn open(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).await.or_fail("connect to the daemon");
        Self(Handover::new(stream).with_longest_line(LONGEST_LINE))
    }

    /// Sends a request, and returns the answer.
    pub async fn ask(&self, request: &str) -> String {
        self.send(request).await;
        let answer = within("an answer of the daemon", self.0.receive()).await;
        answer.or_fail("receive an answer").expect("the daemon ended the attempt").0
    }

    /// Sends a request without waiting for the answer.
    pub async fn send(&self, request: &str) {
        self.0.send(request, &[]).await.or_fail("send a request");
    }
}
