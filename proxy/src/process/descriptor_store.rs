//! Keeps listeners in the supervisor's descriptor store (`FDSTORE` of `sd_notify(3)`): connections
//! wait in their accept queues while the supervisor starts a failed process again.
//!
//! A name in the store is `NAMESPACE PROFILE MODE LISTENER`. Only a process with the same network
//! namespace, profile and inbound mode can use the listener: its socket options depend on them.

use std::io;

use underpass_config::Settings;
use underpass_interception::{BoundListener, Namespace};

use crate::process::notify;
use crate::traffic::listeners::{NamedListeners, all_names};

/// The listeners of this process in the supervisor's store.
#[derive(Debug)]
pub(crate) struct DescriptorStore {
    /// The first part of the names.
    prefix: String,
    /// The names under which the supervisor has passed listeners to this process.
    inherited: Vec<String>,
}

impl DescriptorStore {
    /// Also returns those of the `inherited` listeners that these settings can use. The others
    /// stay in the store until [`keep`](Self::keep), or until the start fails.
    ///
    /// # Errors
    ///
    /// The network namespace of this process cannot be read from /proc.
    pub(crate) fn open(
        settings: &Settings,
        inherited: Vec<(String, BoundListener)>,
    ) -> io::Result<(Self, Vec<(String, BoundListener)>)> {
        let namespace = Namespace::current().map_err(io::Error::other)?.id().inode();
        let rules = &settings.interception;
        let prefix = format!("{namespace} {} {} ", rules.profile, rules.inbound.mode);
        let names = inherited.iter().map(|(name, _)| name.clone()).collect();
        let usable = inherited.into_iter().filter_map(|(name, listener)| {
            let name = name.strip_prefix(&prefix)?.to_owned();
            Some((name, listener))
        });
        let usable: Vec<_> = usable.collect();
        if !usable.is_empty() {
            let names: Vec<_> = usable.iter().map(|(name, _)| name.as_str()).collect();
            tracing::info!(
                listeners = names.join(" "),
                "the supervisor passed the listeners of the previous process"
            );
        }
        Ok((Self { prefix, inherited: names }, usable))
    }

    /// Stores these listeners instead of all others.
    pub(crate) fn keep(&mut self, listeners: &NamedListeners) {
        for name in self.inherited.drain(..) {
            notify::forget(&name);
        }
        self.clear();
        for (name, listener) in listeners {
            notify::store(&format!("{}{name}", self.prefix), listener);
        }
    }

    /// Removes the listeners of this process from the store, which closes them.
    pub(crate) fn clear(&self) {
        for name in all_names() {
            notify::forget(&format!("{}{name}", self.prefix));
        }
    }
}

impl Drop for DescriptorStore {
    /// After a start that failed, the next one binds its listeners itself: these may be the reason.
    fn drop(&mut self) {
        for name in self.inherited.drain(..) {
            notify::forget(&name);
        }
    }
}
