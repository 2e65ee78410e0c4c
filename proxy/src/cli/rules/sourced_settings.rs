//! Selects the settings of `rules verify` and `rules explain`: the given ones, or else those of the
//! running proxy.

use std::io::{self, Write as _};

use serde_json::{Value, json};
use underpass_config::Settings;

use super::options::RuleOptions;
use crate::process::command_error::CommandError;
use crate::process::instance;
use crate::process::instance::Running;

/// Settings and their source.
#[derive(Debug)]
pub(super) struct SourcedSettings {
    pub(super) settings: Settings,
    pub(super) source: Source,
}

/// The origin of the settings of a command.
#[derive(Debug)]
pub(super) enum Source {
    /// The command line.
    Given,
    /// The proxy that runs in this network namespace.
    Running(Box<Running>),
    /// The defaults: there are neither options nor a running proxy.
    Defaults,
}

impl SourcedSettings {
    /// Queries the running proxy if there are no options. Warns on standard error if defaults are
    /// used.
    pub(super) async fn select(options: RuleOptions) -> Result<Self, CommandError> {
        if !options.are_empty() {
            return Ok(Self { settings: options.load()?, source: Source::Given });
        }
        let why = match instance::running().await {
            Ok(Some(running)) => {
                let settings = running.settings.clone();
                return Ok(Self { settings, source: Source::Running(Box::new(running)) });
            }
            Ok(None) => "no running proxy was found in this network namespace".to_owned(),
            Err(error) => crate::error::chain(&error),
        };
        writeln!(
            io::stderr(),
            "warning: {why}: using the default settings and those of the environment (see --config)"
        )
        .ok();
        Ok(Self { settings: options.load()?, source: Source::Defaults })
    }

    /// Adds `"settings"`, and `"proxy"` if a proxy was queried.
    pub(super) fn with(&self, mut result: Value) -> Value {
        let (name, proxy) = match &self.source {
            Source::Given => ("given", Value::Null),
            Source::Defaults => ("defaults", Value::Null),
            Source::Running(running) => ("running proxy", running_json(running)),
        };
        if let Value::Object(members) = &mut result {
            members.insert("settings".to_owned(), name.into());
            members.insert("proxy".to_owned(), proxy);
        }
        result
    }
}

fn running_json(running: &Running) -> Value {
    let Settings { proxy, interception, .. } = &running.settings;
    json!({
        "pid": running.pid,
        "started": running.started,
        "profile": interception.profile.to_string(),
        "ports": [proxy.outbound_port, proxy.inbound_port, proxy.hbone_port],
        "readiness": running.readiness,
        "self_test_failed": running.self_test_failed,
    })
}
