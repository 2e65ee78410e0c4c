//! Decides whether a command runs as two processes: a broker and its proxy process.

use underpass_config::{Broker, Profile, Settings};
use underpass_interception::{ProxyUser, SeparationError, may_signal_other_users};

use crate::error::chain;
use crate::node::certificates::proxy_files;
use crate::pods::kubernetes;

/// The processes of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Separation {
    /// A broker, and a proxy process of this user.
    Broker(ProxyUser),
    /// One process: `privileges.broker` is off.
    Off,
    /// One process, for this reason.
    Impossible { reason: String, hint: &'static str },
}

const GRANT: &str = "grant SETUID and SETGID";

impl Separation {
    /// The processes for these settings. Call it while this process has its privileges.
    pub(crate) fn of(settings: &Settings) -> Self {
        if settings.privileges.broker == Broker::Off {
            return Self::Off;
        }
        if settings.xds.is_some() && kubernetes::facts_are_in_mesh(settings) {
            // The broker must not get the facts about pods from the proxy process, and is no client
            // of a control plane.
            return Self::Impossible {
                reason: "the facts about pods are in the mesh of mesh.xds".to_owned(),
                hint: "set node.kubernetes, or use mesh.file instead of mesh.xds",
            };
        }
        let separated = user(settings).and_then(|user| {
            let checked = user.check_separation();
            let failed = |error: SeparationError| {
                let hint = match &error {
                    SeparationError::SameUser(_) => "start as another user, such as root",
                    SeparationError::Unmapped(..) => {
                        "choose a user of this user namespace (privileges.user)"
                    }
                    SeparationError::Capabilities(_)
                    | SeparationError::Groups
                    | SeparationError::Proc(..) => GRANT,
                };
                Self::Impossible { reason: chain(&error), hint }
            };
            checked.map_err(failed)?;
            if settings.node.pods.is_none() {
                check_files(user, settings)?;
            }
            Ok(user)
        });
        separated.map_or_else(|impossible| impossible, Self::Broker)
    }

    /// The user of the proxy process; `None` for one process.
    pub(crate) fn user(&self) -> Option<ProxyUser> {
        match self {
            Self::Broker(user) => Some(*user),
            Self::Off | Self::Impossible { .. } => None,
        }
    }

    /// Logs why there is no broker, or what its capabilities do not allow.
    pub(crate) fn log(&self) {
        match self {
            Self::Broker(_) if !may_signal_other_users() => tracing::warn!(
                hint = "grant KILL",
                "a proxy process that hangs outlives this process: it keeps the listeners of pods"
            ),
            Self::Impossible { reason, hint } => {
                tracing::warn!(reason, hint, "no broker: one process has all privileges");
            }
            Self::Broker(_) | Self::Off => {}
        }
    }
}

/// The user of the proxy process: that of the settings, or the one that the rules match.
fn user(settings: &Settings) -> Result<ProxyUser, Separation> {
    match settings.interception.profile {
        Profile::Ambient | Profile::None => {
            let id = settings.privileges.user;
            Ok(ProxyUser { uid: id, gid: id })
        }
        Profile::Sidecar | Profile::Osm => match ProxyUser::required(&settings.interception) {
            Ok(Some(user)) => Ok(user),
            Ok(None) => Err(Separation::Impossible {
                reason: "this process has the user that the rules match".to_owned(),
                hint: "start as root",
            }),
            Err(error) => Err(Separation::Impossible { reason: chain(&error), hint: GRANT }),
        },
    }
}

/// Fails unless the user is permitted to read the files of the proxy process.
fn check_files(user: ProxyUser, settings: &Settings) -> Result<(), Separation> {
    let mut files = proxy_files(settings);
    let of_collector = settings.otlp.iter().flat_map(|otlp| [&otlp.headers, &otlp.roots]);
    files.extend(of_collector.flatten().cloned());
    let impossible = |reason| Separation::Impossible {
        reason,
        hint: "let that user read the file, or choose another one (privileges.user)",
    };
    match user.first_unreadable(&files) {
        Ok(None) => Ok(()),
        Ok(Some(file)) => {
            Err(impossible(format!("user {} cannot read {}", user.uid, file.display())))
        }
        Err(error) => Err(impossible(chain(&error))),
    }
}
