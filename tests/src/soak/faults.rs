//! What goes wrong during the soak, one after the other, and which streams it may break.
//!
//! Not here: what streams make of it (`soak.rs` judges that).

use std::time::Duration;

use fastrand::Rng;
use nix::sys::signal::Signal;

use super::pause;
use super::scene::{Side, Stage, Way};
use crate::tools::tool;

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Packets of one wire are dropped for a while, in both directions or in one.
    Drop,
    /// The mesh changes in what concerns nobody here.
    Mesh,
    /// A policy comes to forbid what it allowed, and allows it again.
    Deny,
    /// A proxy gets a new certificate.
    Certificate,
    /// A proxy is told to read its settings again.
    Reload,
    /// A proxy is killed and started again.
    Kill,
    /// A proxy is told to stop, and is started again.
    Stop,
    /// Another process takes over from a proxy, which breaks nothing.
    TakeOver,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Drop,
        Self::Mesh,
        Self::Deny,
        Self::Certificate,
        Self::Reload,
        Self::Kill,
        Self::Stop,
        Self::TakeOver,
    ];

    /// What it is called on the command line and in the summary.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Drop => "drop",
            Self::Mesh => "mesh",
            Self::Deny => "deny",
            Self::Certificate => "certificate",
            Self::Reload => "reload",
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::TakeOver => "take-over",
        }
    }
}

/// One fault that is to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Event {
    pub(super) fault: Fault,
    side: Side,
    wire: Wire,
    lasts: Duration,
}

/// Where packets are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wire {
    between: [Side; 2],
    incoming: bool,
    outgoing: bool,
}

impl Event {
    pub(super) fn new(rng: &mut Rng, faults: &[Fault]) -> Self {
        let fault = faults.get(rng.usize(0..faults.len())).copied().unwrap_or(Fault::Mesh);
        let side = if rng.bool() { Side::Client } else { Side::Server };
        let between = match rng.u32(0..3) {
            0 => [Side::Client, Side::Server],
            1 => [Side::Outside, Side::Server],
            _ => [Side::Client, Side::Outside],
        };
        let (incoming, outgoing) = match rng.u32(0..4) {
            0 => (true, false),
            1 => (false, true),
            _ => (true, true),
        };
        let lasts = Duration::from_millis(rng.u64(200..5000));
        Self { fault, side, wire: Wire { between, incoming, outgoing }, lasts }
    }

    /// Whether it may break a stream that goes this way.
    pub(super) fn touches(&self, way: Way) -> bool {
        match self.fault {
            Fault::Mesh | Fault::Certificate | Fault::Reload | Fault::TakeOver => false,
            Fault::Deny => way.can_be_denied(),
            Fault::Drop => self.wire.between.iter().all(|side| way.ends().contains(side)),
            Fault::Kill | Fault::Stop => way.ends().contains(&self.side),
        }
    }

    /// Makes it happen, and all well again.
    pub(super) async fn happen(&self, stage: &mut Stage) {
        match self.fault {
            Fault::Drop => {
                let Wire { between: [_, at], incoming, outgoing } = self.wire;
                let interface = if self.wire.between.contains(&Side::Client) && at == Side::Server {
                    "eth0"
                } else {
                    "eth1"
                };
                let pod = stage.pods.pod(at);
                let rule = |chain: &str, hook: &str, device: &str| {
                    format!(
                        "add chain inet soak {chain} {{ type filter hook {hook} priority -450; }}; \
                         add rule inet soak {chain} {device} {interface} drop; "
                    )
                };
                let mut rules = "add table inet soak; ".to_owned();
                if incoming {
                    rules += &rule("in", "prerouting", "iifname");
                }
                if outgoing {
                    rules += &rule("out", "output", "oifname");
                }
                tool(pod, "nft", &[&rules]).await.ok();
                pause(self.lasts).await;
                tool(pod, "nft", &["delete table inet soak"]).await.ok();
            }
            Fault::Mesh => stage.change_mesh(|state| state.others += 1).await,
            Fault::Deny => {
                stage.change_mesh(|state| state.denies = true).await;
                pause(self.lasts / 4).await;
                stage.change_mesh(|state| state.denies = false).await;
            }
            Fault::Certificate => stage.renew(self.side),
            Fault::Reload => stage.proxy(self.side).signal(Signal::SIGHUP),
            Fault::Kill => stage.restart(self.side, Signal::SIGKILL).await,
            Fault::Stop => stage.restart(self.side, Signal::SIGTERM).await,
            Fault::TakeOver => stage.take_over(self.side).await,
        }
    }
}
