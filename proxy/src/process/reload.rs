//! Settings that change while the proxy runs: read again when their file changes or SIGHUP comes.
//!
//! Only what is caught can change (`interception.outbound` and its like); the rest waits for a restart, and that is said.
//! Settings that cannot be read are told, and the last good ones stay.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use underpass_config::{FileWatch, FileWatcher, InterceptionSettings, Settings, Sources};

use crate::process::command_error::CommandError;

/// Reads the settings again.
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

    /// What is caught, as it changes.
    pub(crate) fn subscribe(&self) -> watch::Receiver<InterceptionSettings> {
        self.interception.subscribe()
    }

    /// Publishes what changes, until the end.
    pub(crate) async fn follow(&mut self) {
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
                "some of the changed settings need a restart; only what is caught changes while the proxy runs"
            );
        }
        if followed.interception != self.current.interception {
            self.interception.send_replace(followed.interception.clone());
        }
        self.current = followed;
    }

    /// Says that nothing changes, when something would, until the end.
    pub(crate) async fn refuse_changes(&mut self) {
        loop {
            if self.load().is_some_and(|new| new != self.current) {
                tracing::warn!(
                    "the settings changed, and need a restart: this proxy does not keep the rules \
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
                    "the settings cannot be read again, the last good ones stay: {errors}"
                );
                None
            }
        }
    }
}

/// The current settings with what of the new ones can take effect now.
fn follow(current: &Settings, new: &Settings) -> Settings {
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
    // The inbound listener is made for one mode.
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
    fn exclusions_change_while_the_proxy_runs_and_ports_do_not() {
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
    fn the_way_of_inbound_connections_does_not_change() {
        let current = settings(&["interception.profile=sidecar"]);
        let new = settings(&["interception.profile=sidecar", "interception.inbound.mode=tproxy"]);
        assert_eq!(follow(&current, &new), current);
    }
}
