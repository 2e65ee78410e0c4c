//! When the rules may no longer be what they were: a wake-up for whoever verifies and repairs them.
//!
//! The kernel tells of every change of nftables (iptables' nft variant included) and of ip rules and
//! routes. Of iptables' legacy tables it tells nothing, so these are looked at in an interval.

use std::fmt;
use std::time::Duration;

use nlink::netlink::{Connection, Nftables, ProtocolState, Route, RtnetlinkGroup};
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::InterceptionError;
use crate::backend::Backend;
use crate::iptables::Variant;
use crate::netlink::failed;

const OPERATION: &str = "watch the rules";
/// How often legacy tables are looked at: a look takes a process for each family.
const LEGACY_INTERVAL: Duration = Duration::from_secs(2);
/// How many notifications are one change at most, lest whoever makes them without end is never
/// answered.
const BURST: usize = 1000;

/// Wake-ups after changes of netfilter's rules, ip rules, routes or addresses in the namespace of
/// the thread that subscribed, whoever made them.
pub struct Changes {
    /// `None` where the kernel tells nothing of the rules.
    nftables: Option<Connection<Nftables>>,
    routes: Connection<Route>,
    interval: Option<Interval>,
}

impl fmt::Debug for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Changes").field("interval", &self.interval).finish_non_exhaustive()
    }
}

impl Changes {
    pub(crate) fn subscribe(backend: Backend) -> Result<Self, InterceptionError> {
        let legacy = backend == Backend::Iptables(Variant::Legacy);
        let routes = Connection::<Route>::new().map_err(failed(OPERATION))?;
        let groups = [
            RtnetlinkGroup::Ipv4Rule,
            RtnetlinkGroup::Ipv6Rule,
            RtnetlinkGroup::Ipv4Route,
            RtnetlinkGroup::Ipv6Route,
            RtnetlinkGroup::Ipv6Addr,
        ];
        routes.subscribe(&groups).map_err(failed(OPERATION))?;
        let nftables = (!legacy).then(watch_nftables).transpose()?;
        let interval = legacy.then(|| {
            let mut interval = interval(LEGACY_INTERVAL);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        });
        Ok(Self { nftables, routes, interval })
    }

    /// Returns when something may have changed since the last call, or since the subscription. All
    /// that happened until it returns is one change. Cancel safe: nothing is lost when it is
    /// dropped.
    ///
    /// # Errors
    ///
    /// The kernel tells no more, as when the namespace is gone.
    pub async fn next(&mut self) -> Result<(), InterceptionError> {
        let Self { nftables, routes, interval } = self;
        let nftables = async {
            match nftables {
                Some(connection) => notified(connection).await,
                None => std::future::pending().await,
            }
        };
        let interval = async {
            match interval {
                Some(interval) => interval.tick().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            told = nftables => told,
            told = notified(routes) => told,
            _ = interval => Ok(()),
        }
    }
}

fn watch_nftables() -> Result<Connection<Nftables>, InterceptionError> {
    let connection = Connection::<Nftables>::new().map_err(failed(OPERATION))?;
    connection.subscribe_all().map_err(failed(OPERATION))?;
    Ok(connection)
}

/// Waits for a notification, and takes those that are there beside it.
async fn notified<P: ProtocolState>(connection: &Connection<P>) -> Result<(), InterceptionError> {
    let socket = connection.socket();
    // Notifications that were lost were some.
    let lost = |error: &nlink::Error| error.is_no_buffer_space();
    match socket.recv_msg().await {
        Err(error) if !lost(&error) => return Err(failed(OPERATION)(error)),
        _ => {}
    }
    for _ in 0..BURST {
        match socket.try_recv_msg() {
            Ok(None) => break,
            Err(error) if !lost(&error) => return Err(failed(OPERATION)(error)),
            _ => {}
        }
    }
    Ok(())
}
