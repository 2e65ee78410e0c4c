//! Reports that rules may have changed, so that they can be verified and repaired.
//!
//! The kernel sends notifications about nftables (including iptables-nft), ip rules and routes. It
//! sends none about legacy iptables tables, so these are polled.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Interval;
use underpass_config::interval_at_multiples;

use crate::backend::Backend;
use crate::backend::iptables::Variant;
use crate::backend::leftovers::LegacyTables;
use crate::error::InterceptionError;
use crate::privileged::NamespaceAccess;
use crate::subscription::{OPERATION, RuleSubscription, WatchScope};

/// The polling interval of underpass's rules in legacy tables. A check runs one process per family.
const LEGACY_INTERVAL: Duration = Duration::from_secs(2);
/// The polling interval of other programs' rules in legacy tables.
const FOREIGN_INTERVAL: Duration = Duration::from_secs(5);
/// The maximum number of notifications that are merged into one, so that constant changes do not
/// block [`Changes::next`].
const MAX_MERGED_NOTIFICATIONS: usize = 1000;

/// Reports that any program may have changed netfilter rules, ip rules, routes or addresses in one
/// namespace.
pub struct Changes {
    access: NamespaceAccess,
    /// `None` if the kernel sends no notifications about nftables.
    nftables: Option<Notifications>,
    routes: Notifications,
    interval: Option<Interval>,
    /// Poll only while these legacy tables exist. `None`: always poll.
    if_legacy: Option<LegacyTables>,
    /// True while a poll of the legacy tables is due or unfinished. The first one is due at once.
    is_poll_due: bool,
}

/// A netlink socket that receives the kernel's notifications.
struct Notifications(AsyncFd<OwnedFd>);

impl fmt::Debug for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Changes").field("interval", &self.interval).finish_non_exhaustive()
    }
}

impl Changes {
    /// Reports changes of underpass's rules and of their dependencies. Registers the sockets with
    /// the current runtime.
    pub(crate) async fn of_rules(
        access: &NamespaceAccess,
        backend: Backend,
    ) -> Result<Self, InterceptionError> {
        let RuleSubscription { nftables, routes, .. } = access.watch(WatchScope::OwnRules).await?;
        let (access, routes) = (access.clone(), Notifications::new(routes)?);
        let (nftables, interval) = match backend {
            Backend::Iptables(Variant::Legacy) => {
                (None, Some(interval_at_multiples(LEGACY_INTERVAL)))
            }
            _ => (Some(Notifications::new(nftables?)?), None),
        };
        let is_poll_due = interval.is_some();
        Ok(Self { access, nftables, routes, interval, if_legacy: None, is_poll_due })
    }

    /// Reports changes of any program's rules and ip rules in a namespace. Polls nftables if
    /// NET_ADMIN, which notifications require, is missing.
    ///
    /// # Errors
    ///
    /// The kernel rejected the subscription.
    pub async fn of_all_programs(access: &NamespaceAccess) -> Result<Self, InterceptionError> {
        let RuleSubscription { nftables, routes, legacy } =
            access.watch(WatchScope::AllRules).await?;
        if let Err(error) = &nftables {
            tracing::debug!(%error, "cannot subscribe to changes of nftables rules: polling instead");
        }
        let if_legacy = nftables.is_ok().then_some(legacy);
        let interval = Some(interval_at_multiples(FOREIGN_INTERVAL));
        let (access, routes) = (access.clone(), Notifications::new(routes)?);
        let nftables = nftables.ok().map(Notifications::new).transpose()?;
        Ok(Self { access, nftables, routes, interval, if_legacy, is_poll_due: true })
    }

    /// Waits until rules may have changed since the last call or since the subscription. Merges all
    /// changes until it returns. Cancel-safe.
    ///
    /// # Errors
    ///
    /// The subscription ended, for example because the namespace no longer exists.
    pub async fn next(&mut self) -> Result<(), InterceptionError> {
        let Self { access, nftables, routes, interval, if_legacy, is_poll_due } = self;
        let nftables = async {
            match nftables {
                Some(notifications) => notifications.next().await,
                None => std::future::pending().await,
            }
        };
        let interval = async {
            let Some(interval) = interval else { return std::future::pending().await };
            loop {
                if !*is_poll_due {
                    interval.tick().await;
                    *is_poll_due = true;
                }
                let may_have_changed = match if_legacy {
                    Some(tables) => has_legacy_tables(access, tables).await,
                    None => true,
                };
                *is_poll_due = false;
                if may_have_changed {
                    return;
                }
            }
        };
        tokio::select! {
            changed = nftables => changed,
            changed = routes.next() => changed,
            () = interval => Ok(()),
        }
    }
}

/// Returns true if legacy tables exist. Enters the namespace only if a kernel module was loaded
/// since the last check.
async fn has_legacy_tables(access: &NamespaceAccess, tables: &mut LegacyTables) -> bool {
    if let Some(have_rules) = tables.exist() {
        return have_rules;
    }
    // Ignore an error: if the namespace cannot be entered any more, the subscription fails too.
    if let Ok(opened) = access.legacy_tables().await {
        *tables = opened;
    }
    tables.exist().unwrap_or_default()
}

impl Notifications {
    fn new(socket: OwnedFd) -> Result<Self, InterceptionError> {
        #[expect(
            deprecated,
            reason = "safe here: an OwnedFd's descriptor stays open and the same (tokio #8587)"
        )]
        let registered = AsyncFd::with_interest(socket, Interest::READABLE);
        registered.map(Self).map_err(failed)
    }

    /// Waits for a notification, and receives all that are queued.
    async fn next(&self) -> Result<(), InterceptionError> {
        self.0.async_io(Interest::READABLE, receive).await.map_err(failed)?;
        for _ in 0..MAX_MERGED_NOTIFICATIONS {
            match self.0.try_io(Interest::READABLE, receive) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(())
    }
}

/// Receives one notification. Ignores its content: the caller lists the rules.
fn receive(socket: &OwnedFd) -> io::Result<()> {
    match recv(socket, &mut [0; 16], RecvFlags::TRUNC) {
        // ENOBUFS: a lost notification still means that something changed.
        Ok(_) | Err(Errno::NOBUFS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn failed(source: io::Error) -> InterceptionError {
    InterceptionError::Netlink { operation: OPERATION, source }
}
