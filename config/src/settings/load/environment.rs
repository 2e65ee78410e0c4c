//! Environment variables: tells settings from variables that Kubernetes defines.

use std::ffi::OsString;

use crate::error::Problem;
use crate::settings::resolve::keys;
use crate::yaml::document::Origin;
use crate::yaml::read::closest;

const PREFIX: &str = "UNDERPASS_";
/// The variable that names the settings file if there is no `--config`.
pub(super) const CONFIG_FILE: &str = "UNDERPASS_CONFIG";

/// The variables of this process with our prefix. A value that is not UTF-8 is replaced by one that
/// no key accepts.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
pub(super) fn of_process() -> Vec<(String, String)> {
    let text = |(name, value): (OsString, OsString)| {
        let name = name.into_string().ok().filter(|name| name.starts_with(PREFIX))?;
        Some((name, value.to_string_lossy().into_owned()))
    };
    std::env::vars_os().filter_map(text).collect()
}

/// The meaning of a variable.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// The variable sets this key.
    Key(&'static str),
    /// The variable is not a setting: it belongs to another program, or Kubernetes defines it.
    Nothing,
    /// The variable has our prefix, but no known key.
    Unknown,
}

impl Meaning {
    pub(super) fn new(name: &str, value: &str) -> Self {
        if !name.starts_with(PREFIX) || name == CONFIG_FILE || is_service_url(name, value) {
            return Self::Nothing;
        }
        match keys().find(|key| variable(key) == name) {
            Some(key) => Self::Key(key),
            None if is_service_link(name) => Self::Nothing,
            None => Self::Unknown,
        }
    }
}

/// The warning about an unknown variable.
pub(super) fn unknown(name: &str, value: &str) -> Problem {
    let variables: Vec<String> = keys().map(variable).collect();
    let known: Vec<&str> = variables.iter().map(String::as_str).collect();
    Problem {
        key: String::new(),
        value: Some(value.to_owned()),
        reason: "no such setting, ignored".to_owned(),
        hint: closest(name, &known).map(|near| format!("did you mean {near}?")),
        origin: Some(Origin::Environment(name.to_owned())),
    }
}

/// The variable of a key: `UNDERPASS_PROXY_OUTBOUND_PORT` for `proxy.outbound_port`,
/// `UNDERPASS_WORKLOAD_SERVICE_ACCOUNT` for `workload.serviceAccount`.
pub(super) fn variable(key: &str) -> String {
    let mut name = PREFIX.to_owned();
    for c in key.chars() {
        match c {
            '.' => name.push('_'),
            c if c.is_ascii_uppercase() => name.extend(['_', c]),
            c => name.push(c.to_ascii_uppercase()),
        }
    }
    name
}

/// Whether the variable is a service link: Kubernetes adds such variables to every pod for each
/// Service of its namespace (`enableServiceLinks`). A Service called `underpass` must not make the
/// start fail.
fn is_service_link(name: &str) -> bool {
    name.ends_with("_SERVICE_HOST")
        || name.ends_with("_SERVICE_PORT")
        || name.contains("_SERVICE_PORT_")
        || name.rsplit_once("_PORT_").is_some_and(|(_, rest)| is_port_and_transport(rest))
        || name
            .strip_suffix("_PORT")
            .and_then(|name| name.rsplit_once("_PORT_"))
            .is_some_and(|(_, rest)| is_port_and_transport(rest))
}

/// Whether a variable with the name of a key is a service link, such as
/// `UNDERPASS_PROXY_OUTBOUND_PORT`. The value of a key is never a URL.
fn is_service_url(name: &str, value: &str) -> bool {
    let schemes = ["tcp://", "udp://", "sctp://"];
    name.ends_with("_PORT") && schemes.iter().any(|scheme| value.starts_with(scheme))
}

/// Whether the text has the form `80_TCP`, `80_TCP_ADDR`, `80_TCP_PORT` or `80_TCP_PROTO`.
fn is_port_and_transport(text: &str) -> bool {
    let mut words = text.split('_');
    let is_port = words.next().is_some_and(|word| word.parse::<u16>().is_ok());
    let is_transport = matches!(words.next(), Some("TCP" | "UDP" | "SCTP"));
    let is_part = matches!(words.next(), None | Some("ADDR" | "PORT" | "PROTO"));
    is_port && is_transport && is_part && words.next().is_none()
}
