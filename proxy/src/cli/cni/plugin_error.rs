//! Errors of the plugin, with the codes of CNI's specification.

use std::io;
use std::path::PathBuf;

use serde_json::{Value, json};
use thiserror::Error;
use underpass_interception::InterceptionError;

use crate::error::chain;
use crate::pods::cni::attachment::InvalidName;
use crate::pods::cni::protocol::{Refusal, code};

/// The versions of the specification that the plugin implements, the latest one last.
pub(super) const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", LATEST];
pub(super) const LATEST: &str = "1.1.0";

/// Why a call of the plugin fails.
#[derive(Debug, Error)]
pub(crate) enum PluginError {
    #[error("the configuration has cniVersion {version:?}, which is not one of {}", VERSIONS.join(", "))]
    Version { version: String },
    #[error("version {version} of CNI has no command {command}")]
    CommandVersion { command: &'static str, version: String },
    #[error("{variable} is not set")]
    NoVariable { variable: &'static str },
    #[error("{variable} is invalid")]
    Variable { variable: &'static str, source: InvalidName },
    #[error("{variable} is invalid: {reason}")]
    Environment { variable: &'static str, reason: String },
    #[error("CNI_NETNS {path} cannot be opened", path = path.display())]
    OpenNamespace { path: PathBuf, source: InterceptionError },
    #[error("CNI_NETNS {path} is the host's own network namespace", path = path.display())]
    HostNamespace { path: PathBuf },
    #[error("the configuration cannot be read from standard input")]
    Input(#[source] io::Error),
    #[error("the configuration is not JSON")]
    Json(#[from] serde_json::Error),
    #[error("the configuration is invalid: {key}: {reason}")]
    Config { key: &'static str, reason: String },
    #[error("the name of the network is invalid")]
    Network(#[source] InvalidName),
    /// A fact about the pod is missing or contradicts another one.
    #[error("{message}")]
    Fact { message: String, hint: &'static str },
    #[error("the daemon cannot be reached at {socket}", socket = socket.display())]
    Unreachable { socket: PathBuf, source: io::Error },
    #[error("the daemon at {socket} runs as user {uid}, not as root", socket = socket.display())]
    Untrusted { socket: PathBuf, uid: u32 },
    #[error("the daemon at {socket} did not answer within {seconds} s", socket = socket.display())]
    Late { socket: PathBuf, seconds: u64 },
    #[error("the daemon at {socket} closed the connection without an answer", socket = socket.display())]
    Closed { socket: PathBuf },
    #[error("the daemon at {socket} sent a malformed answer: {reason}", socket = socket.display())]
    Answer { socket: PathBuf, reason: String },
    /// The names and addresses of the pod do not fit a message.
    #[error("the names and addresses of the pod are too long")]
    TooLong,
    #[error("{}", .0.message)]
    Refused(Refusal),
    /// `STATUS` while the daemon is not ready or cannot be reached.
    #[error("pods cannot be added: {message}")]
    NotReady { message: String, hint: String },
}

/// The hints.
mod hint {
    pub(super) const DAEMON: &str = "start `underpass node` on this node, or remove the plugin with \
         `underpass cni uninstall`; the runtime tries again";
    pub(super) const BUSY: &str = "on the node, `curl localhost:15021/healthz/pods` lists the pods and what they wait for; the runtime tries again";
    pub(super) const INSTALL: &str = "run `underpass cni install` again, so that the plugin and the daemon have the same version";
    pub(super) const RUNTIME: &str = "container runtimes call this plugin; `underpass cni install` puts it into their configuration";
    pub(super) const CONFIG: &str = "`underpass cni install --dry-run` prints a valid entry";
    pub(super) const SOCKET: &str =
        "only root may serve this socket: set `socket` of the plugin to the daemon's node.pods.cni";
}

impl PluginError {
    pub(super) fn config(key: &'static str, reason: impl Into<String>) -> Self {
        Self::Config { key, reason: reason.into() }
    }

    /// The error code of CNI.
    pub(super) fn code(&self) -> u32 {
        match self {
            Self::Version { .. } | Self::CommandVersion { .. } => 1,
            Self::NoVariable { .. }
            | Self::Variable { .. }
            | Self::Environment { .. }
            | Self::OpenNamespace { .. }
            | Self::TooLong => 4,
            Self::Input(_) => 5,
            Self::Json(_) => 6,
            Self::Config { .. } | Self::Network(_) => 7,
            Self::Fact { .. }
            | Self::Unreachable { .. }
            | Self::Untrusted { .. }
            | Self::Late { .. }
            | Self::Closed { .. }
            | Self::Answer { .. } => code::TRY_AGAIN,
            Self::HostNamespace { .. } => code::INVALID_NAMESPACE,
            Self::NotReady { .. } => code::NOT_READY,
            Self::Refused(refusal) => refusal.code,
        }
    }

    pub(super) fn hint(&self) -> &str {
        match self {
            Self::Version { .. } => "set a supported cniVersion in the network's configuration",
            Self::CommandVersion { .. } => "set a later cniVersion in the network's configuration",
            Self::NoVariable { .. } | Self::Variable { .. } | Self::Environment { .. } => {
                hint::RUNTIME
            }
            Self::OpenNamespace { .. } => {
                "the runtime must create the namespace before it calls the plugin"
            }
            Self::HostNamespace { .. } => {
                "pods with host networking get no CNI call: check the runtime's configuration"
            }
            Self::Input(_) => hint::RUNTIME,
            Self::Json(_) | Self::Config { .. } | Self::Network(_) => hint::CONFIG,
            Self::Fact { hint, .. } => hint,
            Self::Unreachable { .. } | Self::Closed { .. } => hint::DAEMON,
            Self::Untrusted { .. } => hint::SOCKET,
            Self::Late { .. } => hint::BUSY,
            Self::Answer { .. } => hint::INSTALL,
            Self::TooLong => "give the pod fewer addresses or a shorter name",
            Self::Refused(refusal) => &refusal.hint,
            Self::NotReady { hint, .. } => hint,
        }
    }

    /// The error as CNI's result, in the version of the configuration.
    pub(super) fn json(&self, version: &str) -> Value {
        json!({
            "cniVersion": version,
            "code": self.code(),
            "msg": format!("underpass: {}", chain(self)),
            "details": self.hint(),
        })
    }
}
