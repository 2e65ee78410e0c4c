//! Wake-ups when rules may have changed, for the tasks that verify and repair them.
//!
//! The kernel notifies of every change to nftables (including iptables-nft), ip rules and routes.
//! It does not notify of changes to legacy iptables tables, so these are polled.

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
/// The polling interval of legacy tables. A check runs one process per family.
const LEGACY_INTERVAL: Duration = Duration::from_secs(2);
/// The polling interval of foreign rules in legacy tables.
const OTHERS_INTERVAL: Duration = Duration::from_secs(5);
/// The notifications about everything that own rules depend on besides nftables.
const OURS: [RtnetlinkGroup; 5] = [
    RtnetlinkGroup::Ipv4Rule,
    RtnetlinkGroup::Ipv6Rule,
    RtnetlinkGroup::Ipv4Route,
    RtnetlinkGroup::Ipv6Route,
    RtnetlinkGroup::Ipv6Addr,
];
/// Only ip rules: changes of routes and addresses let no traffic bypass the rules.
const RULES: [RtnetlinkGroup; 2] = [RtnetlinkGroup::Ipv4Rule, RtnetlinkGroup::Ipv6Rule];
/// The maximum number of notifications that are merged into one change, so that a constant stream
/// of changes does not block [`Changes::next`].
const BURST: usize = 1000;

/// Wake-ups after changes of netfilter rules, ip rules, routes or addresses in one namespace, by
/// any program.
pub struct Changes {
    access: NamespaceAccess,
    /// `None` if the kernel does not notify of nftables changes.
    nftables: Option<Connection<Nftables>>,
    routes: Connection<Route>,
    interval: Option<Interval>,
    /// Polling applies only while these legacy tables exist; `None` for always.
    if_legacy: Option<LegacyTables>,
    /// True if the interval elapsed and legacy tables were not checked since.
    ticked: bool,
}

/// The sockets of a subscription, opened within its namespace.
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
    /// Changes of the own rules and their dependencies. The caller's runtime polls the sockets.
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

    /// Changes of any program's rules and ip rules in a namespace. Without permission for nftables
    /// notifications (NET_ADMIN), nftables is polled too.
    ///
    /// # Errors
    ///
    /// The kernel rejected the subscription.
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

    /// Returns when rules may have changed since the last call or since the subscription. All
    /// changes until it returns count as one. Cancel safe.
    ///
    /// # Errors
    ///
    /// The subscription ended, for example because the namespace is gone.
    pub async fn next(&mut self) -> Result<(), InterceptionError> {
        let Self { access, nftables, routes, interval, if_legacy, ticked } = self;
        let nftables = async {
            match nftables {
                Some(connection) => wait_for_notification(connection).await,
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
            told = wait_for_notification(routes) => told,
            () = interval => Ok(()),
        }
    }
}

impl Sockets {
    /// Opens the sockets in the namespace, for the caller's runtime.
    async fn open(
        access: &NamespaceAccess,
        groups: &'static [RtnetlinkGroup],
    ) -> Result<Self, InterceptionError> {
        let runtime = Handle::current();
        let open = async move |entered: &Entered| {
            let _callers = runtime.enter();
            let (nftables, routes) = (subscribe_nftables(entered), subscribe(entered, groups)?);
            Ok(Self { nftables, routes, legacy: LegacyTables::open(entered) })
        };
        access.run(open).await?
    }
}

/// Returns true if legacy tables exist. Enters the namespace only after a kernel module was loaded.
async fn has_legacy_tables(access: &NamespaceAccess, tables: &mut LegacyTables) -> bool {
    if let Some(exist) = tables.exist() {
        return exist;
    }
    // If the namespace cannot be entered any more, the subscription itself fails.
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

fn subscribe(
    _: &Entered,
    groups: &[RtnetlinkGroup],
) -> Result<Connection<Route>, InterceptionError> {
    let routes = Connection::<Route>::new().map_err(failed(OPERATION))?;
    routes.subscribe(groups).map_err(failed(OPERATION))?;
    Ok(routes)
}

fn subscribe_nftables(_: &Entered) -> Result<Connection<Nftables>, InterceptionError> {
    let connection = Connection::<Nftables>::new().map_err(failed(OPERATION))?;
    connection.subscribe_all().map_err(failed(OPERATION))?;
    Ok(connection)
}

/// Waits for a notification and drains all that are queued.
async fn wait_for_notification<P: ProtocolState>(
    connection: &Connection<P>,
) -> Result<(), InterceptionError> {
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
