//! The properties that two processes must share so that one can take over from the other.

use std::fmt;
use std::io;

use underpass_config::{InboundMode, PodSourceSettings, Settings};

use super::VERSION;

/// The properties that both processes must share, so that the rules and listeners of the running
/// process are valid for the new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Role {
    version: u32,
    /// `run`, or `node` with its source of pods.
    command: String,
    namespace: u64,
    profile: String,
    tproxy: bool,
    ports: [u16; 3],
}

impl Role {
    pub(super) fn new(settings: &Settings) -> io::Result<Self> {
        let proxy = &settings.proxy;
        Ok(Self {
            version: VERSION,
            command: command(settings),
            namespace: super::namespace().map_err(io::Error::other)?,
            profile: settings.interception.profile.to_string(),
            tproxy: settings.interception.inbound.mode == InboundMode::Tproxy,
            ports: [proxy.outbound_port, proxy.inbound_port, proxy.hbone_port],
        })
    }

    /// Why a process of this role refuses a take-over by one with the role `other`.
    pub(super) fn refusal(&self, other: &str) -> Option<String> {
        (other != self.to_string()).then(|| {
            format!("the role differs: the running process is \"{self}\", the new one \"{other}\"")
        })
    }
}

fn command(settings: &Settings) -> String {
    let Some(pods) = &settings.node.pods else { return "run".to_owned() };
    let path = pods.path().display().to_string();
    let source = format!("node with {} {}", pods.name(), path.escape_debug());
    match pods {
        // The agent names each pod once. With other exempt namespaces the new process would miss
        // the pods that this one leaves alone.
        PodSourceSettings::Zds(_) => {
            let exempt = settings.node.exempt_namespaces.join(" ");
            format!("{source}, exempt namespaces {}", exempt.escape_debug())
        }
        PodSourceSettings::Cni(_) | PodSourceSettings::Directory(_) => source,
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { version, command, namespace, profile, tproxy, ports } = self;
        let [outbound, inbound, hbone] = ports;
        write!(
            f,
            "underpass take-over {version}: {command}, network namespace {namespace}, profile {profile}, tproxy {tproxy}, \
             ports {outbound} {inbound} {hbone}"
        )
    }
}
