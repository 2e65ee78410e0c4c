//! Reloads the settings when their file changes or on SIGHUP.
//!
//! Only the log (`logging.filter`, `logging.access`) can change, and the selection of intercepted
//! traffic (`interception.outbound` and similar keys) if the process repairs the rules. Other
//! changes are logged and need a restart. Invalid settings are logged, and the last valid ones stay
//! in effect.

use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Mutex, watch};
use underpass_config::{
    FileWatch, FileWatcher, Hint as _, InterceptionSettings, Logging, Settings, Sources,
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

    /// Starts to publish changes. Those of the log are passed to `log`. The interception settings
    /// change only if a reconciler `repairs` the rules.
    pub(crate) fn start(
        self,
        repairs: bool,
        log: impl Fn(&Settings) + Send + Sync + 'static,
    ) -> Task {
        let (reload, log) = (Arc::new(Mutex::new(self)), Arc::new(log));
        restarting("reload of the settings", move || {
            let (reload, log) = (reload.clone(), log.clone());
            async move { reload.lock().await.follow(repairs, &*log).await }
        })
    }

    /// Publishes changes. Never returns.
    async fn follow(&mut self, repairs: bool, log: impl Fn(&Settings)) {
        loop {
            if let Some(new) = self.load() {
                self.publish(new, repairs, &log);
            }
            self.changed().await;
        }
    }

    fn publish(&mut self, new: Settings, repairs: bool, log: impl Fn(&Settings)) {
        let followed = follow(&self.current, &new, repairs);
        if followed != new {
            tracing::warn!(
                "some of the changed settings need a restart: only logging is reloaded, and the \
                 selection of traffic if the proxy repairs its rules"
            );
        }
        if followed.logging != self.current.logging {
            log(&followed);
            tracing::info!("applied the changed settings of the log");
        }
        if followed.interception != self.current.interception {
            self.interception.send_replace(followed.interception.clone());
        }
        self.current = followed;
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
pub(crate) fn follow(current: &Settings, new: &Settings, repairs: bool) -> Settings {
    let mut followed = current.clone();
    followed.logging = Logging { format: current.logging.format, ..new.logging.clone() };
    if !repairs {
        return followed;
    }
    let (old, new) = (&current.interception, &new.interception);
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
        let followed = follow(&current, &new, true);
        assert_eq!(followed.interception, new.interception);
        assert_eq!(followed.proxy, current.proxy);
        assert_ne!(followed, new);
        assert_eq!(follow(&current, &new, false), current);
    }

    #[test]
    fn reload_changes_selection_of_log_lines_but_not_their_format() {
        let current = settings(&[]);
        let flags =
            ["logging.filter=debug", "logging.access.connections=failures", "logging.format=json"];
        let new = settings(&flags);
        for repairs in [false, true] {
            let followed = follow(&current, &new, repairs).logging;
            assert_eq!(
                (&followed.filter, &followed.access),
                (&new.logging.filter, &new.logging.access)
            );
            assert_eq!(followed.format, current.logging.format);
        }
    }

    #[test]
    fn reload_does_not_change_inbound_mode() {
        let current = settings(&["interception.profile=sidecar"]);
        let new = settings(&["interception.profile=sidecar", "interception.inbound.mode=tproxy"]);
        assert_eq!(follow(&current, &new, true), current);
    }
}
