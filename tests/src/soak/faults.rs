//! Injects faults into the soak test, and defines the streams that each fault may break.

use std::time::Duration;

use fastrand::Rng;
use nix::sys::signal::Signal;

use super::pause;
use super::scene::{Route, Side, SoakScene};
use crate::tools::tool;

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Drops the packets of a link for a while, in one or both directions.
    Drop,
    /// Changes a part of the mesh that is irrelevant for the pods.
    Mesh,
    /// Denies a port by a policy, then allows it again.
    Deny,
    /// Renews the certificate of a proxy.
    Certificate,
    /// Makes a proxy reload its settings.
    Reload,
    /// Kills a proxy and starts it again.
    Kill,
    /// Stops a proxy and starts it again.
    Stop,
    /// Starts a process that takes over from a proxy, which breaks no stream.
    TakeOver,
}

impl Fault {
    /// All kinds.
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

    /// The name on the command line and in the summary.
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

/// A planned fault.
#[derive(Debug, Clone, Copy)]
pub(super) struct Event {
    pub(super) fault: Fault,
    side: Side,
    wire: Wire,
    lasts: Duration,
}

/// The interface and direction of dropped packets.
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

    /// Whether the fault may break a stream on this route.
    pub(super) fn affects(&self, route: Route) -> bool {
        match self.fault {
            Fault::Mesh | Fault::Certificate | Fault::Reload | Fault::TakeOver => false,
            Fault::Deny => route.can_be_denied(),
            Fault::Drop => self.wire.between.iter().all(|side| route.ends().contains(side)),
            Fault::Kill | Fault::Stop => route.ends().contains(&self.side),
        }
    }

    /// Injects the fault, and ends it.
    pub(super) async fn inject(&self, scene: &mut SoakScene) {
        match self.fault {
            Fault::Drop => {
                let Wire { between: [_, at], incoming, outgoing } = self.wire;
                let interface = if self.wire.between.contains(&Side::Client) && at == Side::Server {
                    "eth0"
                } else {
                    "eth1"
                };
                let pod = scene.pods.pod(at);
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
            Fault::Mesh => scene.change_mesh(|state| state.others += 1).await,
            Fault::Deny => {
                scene.change_mesh(|state| state.denies = true).await;
                pause(self.lasts / 4).await;
                scene.change_mesh(|state| state.denies = false).await;
            }
            Fault::Certificate => scene.renew(self.side),
            Fault::Reload => scene.proxy(self.side).signal(Signal::SIGHUP),
            Fault::Kill => scene.restart(self.side, Signal::SIGKILL).await,
            Fault::Stop => scene.restart(self.side, Signal::SIGTERM).await,
            Fault::TakeOver => scene.take_over(self.side).await,
        }
    }
}
