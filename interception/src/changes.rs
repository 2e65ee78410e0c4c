//! When the rules may no longer be what they were: a wake-up for whoever verifies and repairs them.
//!
//! The kernel tells of every change of nftables (iptables' nft variant included) and of ip rules and
//! routes. Of iptables' legacy tables it tells nothing, so these are looked at in an interval.

use std::fmt;
use std::time::Duration;

use nlink::netlink::{Connection, Nftables, ProtocolState, Route, RtnetlinkGroup};
use tokio::runtime::Handle;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::backend::Backend;
use crate::iptables::Variant;
use crate::leftovers::LegacyTables;
use crate::netlink::failed;
use crate::{Entered, InterceptionError, NamespaceAccess};

const OPERATION: &str = "watch the rules";
/// How often legacy tables are looked at: a look takes a process for each family.
const LEGACY_INTERVAL: Duration = Duration::from_secs(2);
/// How often rules of others in legacy tables are assumed to have changed.
const OTHERS_INTERVAL: Duration = Duration::from_secs(5);
/// What our rules rely on besides nftables.
const OURS: [RtnetlinkGroup; 5] = [
    RtnetlinkGroup::Ipv4Rule,
    RtnetlinkGroup::Ipv6Rule,
    RtnetlinkGroup::Ipv4Route,
    RtnetlinkGroup::Ipv6Route,
    RtnetlinkGroup::Ipv6Addr,
];
/// Routes and addresses come and go, and let no traffic past the rules.
const RULES: [RtnetlinkGroup; 2] = [RtnetlinkGroup::Ipv4Rule, RtnetlinkGroup::Ipv6Rule];
/// How many notifications are one change at most, lest whoever makes them without end is never
/// answered.
const BURST: usize = 1000;

/// Wake-ups after changes of netfilter's rules, ip rules, routes or addresses in one namespace,
/// made by any program.
pub struct Changes {
    access: NamespaceAccess,
    /// `None` where the kernel tells nothing of the rules.
    nftables: Option<Connection<Nftables>>,
    routes: Connection<Route>,
    interval: Option<Interval>,
    /// The legacy tables without which the interval does not count; `None` if it always does.
    if_legacy: Option<LegacyTables>,
    /// Whether the interval has ticked and legacy tables were not looked for since.
    ticked: bool,
}

/// The sockets of a subscription, opened in its namespace.
struct Sockets {
    nftables: Result<Connection<Nftables>, InterceptionError>,
    routes: Connection<Route>,
    legacy: LegacyTables,
}

impl fmt::Debug for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Changes").field("interval", &self.interval).finish_non_exhaustive()
    }
}

impl Changes {
    /// Of what our own rules consist of and rely on. The caller's runtime waits for them.
    pub(crate) async fn of_rules(
        access: &NamespaceAccess,
        backend: Backend,
    ) -> Result<Self, InterceptionError> {
        let Sockets { nftables, routes, .. } = Sockets::open(access, &OURS).await?;
        let access = access.clone();
        let (nftables, interval) = match backend {
            Backend::Iptables(Variant::Legacy) => (None, Some(every(LEGACY_INTERVAL))),
            _ => (Some(nftables?), None),
        };
        Ok(Self { access, nftables, routes, interval, if_legacy: None, ticked: false })
    }

    /// Wake-ups after changes of any program's rules and ip rules in a namespace. Where the kernel
    /// does not let us listen for those of nftables, as without NET_ADMIN, they are looked at in an
    /// interval too.
    ///
    /// # Errors
    ///
    /// The kernel does not let us listen.
    pub async fn of_all_programs(access: &NamespaceAccess) -> Result<Self, InterceptionError> {
        let Sockets { nftables, routes, legacy } = Sockets::open(access, &RULES).await?;
        if let Err(error) = &nftables {
            tracing::debug!(%error, "nftables does not notify");
        }
        let if_legacy = nftables.is_ok().then_some(legacy);
        let interval = Some(every(OTHERS_INTERVAL));
        let access = access.clone();
        Ok(Self { access, nftables: nftables.ok(), routes, interval, if_legacy, ticked: false })
    }

    /// Returns when something may have changed since the last call, or since the subscription. All
    /// that happened until it returns is one change. Cancel safe: nothing is lost when it is
    /// dropped.
    ///
    /// # Errors
    ///
    /// The kernel tells no more, as when the namespace is gone.
    pub async fn next(&mut self) -> Result<(), InterceptionError> {
        let Self { access, nftables, routes, interval, if_legacy, ticked } = self;
        let nftables = async {
            match nftables {
                Some(connection) => notified(connection).await,
                None => std::future::pending().await,
            }
        };
        let interval = async {
            let Some(interval) = interval else { return std::future::pending().await };
            loop {
                if !*ticked {
                    interval.tick().await;
                    *ticked = true;
                }
                let counts = match if_legacy {
                    Some(tables) => has_legacy_tables(access, tables).await,
                    None => true,
                };
                *ticked = false;
                if counts {
                    return;
                }
            }
        };
        tokio::select! {
            told = nftables => told,
            told = notified(routes) => told,
            () = interval => Ok(()),
        }
    }
}

impl Sockets {
    /// Opens them in the namespace, for the runtime of the caller.
    async fn open(
        access: &NamespaceAccess,
        groups: &'static [RtnetlinkGroup],
    ) -> Result<Self, InterceptionError> {
        let runtime = Handle::current();
        let open = async move |entered: &Entered| {
            let _callers = runtime.enter();
            let (nftables, routes) = (watch_nftables(entered), watch(entered, groups)?);
            Ok(Self { nftables, routes, legacy: LegacyTables::open(entered) })
        };
        access.run(open).await?
    }
}

/// Takes no hop to the namespaces thread, except after a kernel module has been loaded.
async fn has_legacy_tables(access: &NamespaceAccess, tables: &mut LegacyTables) -> bool {
    if let Some(exist) = tables.exist() {
        return exist;
    }
    // The subscription itself fails if the namespace cannot be entered any more.
    if let Ok(opened) = access.run(async |entered| LegacyTables::open(entered)).await {
        *tables = opened;
    }
    tables.exist().unwrap_or_default()
}

fn every(period: Duration) -> Interval {
    let mut interval = interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

fn watch(_: &Entered, groups: &[RtnetlinkGroup]) -> Result<Connection<Route>, InterceptionError> {
    let routes = Connection::<Route>::new().map_err(failed(OPERATION))?;
    routes.subscribe(groups).map_err(failed(OPERATION))?;
    Ok(routes)
}

fn watch_nftables(_: &Entered) -> Result<Connection<Nftables>, InterceptionError> {
    let connection = Connection::<Nftables>::new().map_err(failed(OPERATION))?;
    connection.subscribe_all().map_err(failed(OPERATION))?;
    Ok(connection)
}

/// Waits for a notification, and takes those that are there beside it.
async fn notified<P: ProtocolState>(connection: &Connection<P>) -> Result<(), InterceptionError> {
    let socket = connection.socket();
    // ENOBUFS: a lost notification still means that something changed.
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
