//! `/version`: which program runs, since when, and as what.

use serde::Serialize;

use crate::admin::api::time::rfc3339;
use crate::admin::state::Admin;
use crate::version::VERSION;

/// The answer of `/version`.
#[derive(Debug, Serialize)]
pub(crate) struct Version<'a> {
    version: &'static str,
    pid: u32,
    started: String,
    /// `run` or `node`.
    command: &'static str,
    /// The name of the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<&'a str>,
    profile: String,
    workers: usize,
}

pub(crate) fn version(admin: &Admin) -> Version<'_> {
    let settings = &admin.settings;
    Version {
        version: VERSION,
        pid: std::process::id(),
        started: rfc3339(admin.started),
        command: admin.command(),
        node: settings.node.name.as_deref(),
        profile: settings.interception.profile.to_string(),
        workers: admin.node.workers,
    }
}
