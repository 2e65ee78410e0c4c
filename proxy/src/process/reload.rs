//! Reloads the settings when their file changes or on SIGHUP.
//!
//! Only the selection of intercepted traffic can change (`interception.outbound` and similar keys).
//! Other changes are logged and need a restart. Invalid settings are logged, and the last valid
//! ones stay in effect.

use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Mutex, watch};
use underpass_config::{
    FileWatch, FileWatcher, Hint as _, InterceptionSettings, Settings, Sources,
};

use crate::process::command_error::CommandError;
use crate::process::supervise::{Task, restarting};

/// Reloads the settings and publishes changes.
#[derive(Debug)]
pub(crate) struct Reload {
    current: Settings,
    sources: Sources,
    file: Option<FileWatch>,
    hangup: Signal,
    interception: watch::Sender<InterceptionSettings>,
}

impl Reload {
    pub(crate) fn watch(
        settings: &Settings,
        sources: Sources,
        watcher: &FileWatcher,
    ) -> Result<Self, CommandError> {
        let file = sources.file.as_deref().map(|file| watcher.watch(file)).transpose()?;
        Ok(Self {
            file,
            hangup: signal(SignalKind::hangup()).map_err(CommandError::Start)?,
            interception: watch::Sender::new(settings.interception.clone()),
            current: settings.clone(),
            sources,
        })
    }

    /// A receiver of the current interception settings.
    pub(crate) fn subscribe(&self) -> watch::Receiver<InterceptionSettings> {
        self.interception.subscribe()
    }

    /// Starts to publish changes. If no reconciler `repairs` the rules, changes are only logged.
    pub(crate) fn start(self, repairs: bool) -> Task {
        let reload = Arc::new(Mutex::new(self));
        restarting("reload of the settings", move || {
            let reload = reload.clone();
            async move {
                let mut reload = reload.lock().await;
                if repairs { reload.follow().await } else { reload.refuse_changes().await }
            }
        })
    }

    /// Publishes changes. Never returns.
    async fn follow(&mut self) {
        loop {
            if let Some(new) = self.load() {
                self.publish(new);
            }
            self.changed().await;
        }
    }

    fn publish(&mut self, new: Settings) {
        let followed = follow(&self.current, &new);
        if followed != new {
            tracing::warn!(
                "some of the changed settings need a restart: only the selection of intercepted traffic is reloaded"
            );
        }
        if followed.interception != self.current.interception {
            self.interception.send_replace(followed.interception.clone());
        }
        self.current = followed;
    }

    /// Logs that changes need a restart. Never returns.
    async fn refuse_changes(&mut self) {
        loop {
            if self.load().is_some_and(|new| new != self.current) {
                tracing::warn!(
                    "the changed settings need a restart: this proxy does not reconcile the rules \
                     (interception.install, interception.repair)"
                );
            }
            self.changed().await;
        }
    }

    async fn changed(&mut self) {
        let file = async {
            match &mut self.file {
                Some(file) => file.changed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = file => tracing::debug!("the settings file changed"),
            _ = self.hangup.recv() => tracing::debug!("SIGHUP"),
        }
    }

    fn load(&self) -> Option<Settings> {
        match self.sources.load() {
            Ok(settings) => Some(settings),
            Err(errors) => {
                tracing::error!(
                    hint = errors.hint().as_deref(),
                    "cannot reload the settings, the last valid ones stay in effect: {errors}"
                );
                None
            }
        }
    }
}

/// Returns `current` with those values of `new` that can take effect without a restart.
pub(crate) fn follow(current: &Settings, new: &Settings) -> Settings {
    let (old, new) = (&current.interception, &new.interception);
    let mut followed = current.clone();
    followed.interception = InterceptionSettings {
        outbound: new.outbound.clone(),
        virtual_interfaces: new.virtual_interfaces.clone(),
        dns_servers: new.dns_servers.clone(),
        drop_invalid: new.drop_invalid,
        ingress: new.ingress,
        inbound: new.inbound.clone(),
        ..old.clone()
    };
    // The mode cannot change: the inbound listener is opened for one mode.
    followed.interception.inbound.mode = old.inbound.mode;
    followed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(flags: &[&str]) -> Settings {
        let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
        Sources { file: None, environment: Vec::new(), flags }.load().expect("settings")
    }

    #[test]
    fn reload_changes_exclusions_but_not_ports() {
        let current = settings(&["interception.profile=osm"]);
        let new = settings(&[
            "interception.profile=osm",
            "interception.outbound.exclude_cidrs=192.0.2.0/24",
            "proxy.outbound_port=16001",
        ]);
        let followed = follow(&current, &new);
        assert_eq!(followed.interception, new.interception);
        assert_eq!(followed.proxy, current.proxy);
        assert_ne!(followed, new);
    }

    #[test]
    fn reload_does_not_change_inbound_mode() {
        let current = settings(&["interception.profile=sidecar"]);
        let new = settings(&["interception.profile=sidecar", "interception.inbound.mode=tproxy"]);
        assert_eq!(follow(&current, &new), current);
    }
}
