//! The plugin's configuration, which the runtime writes to standard input.
//!
//! ```json
//! {
//!   "cniVersion": "1.1.0", "name": "pods", "type": "underpass-cni",
//!   "socket": "/run/underpass/cni.sock", "timeout": "30s",
//!   "args": {"underpass": {"namespace": "default", "name": "web"}},
//!   "prevResult": {…}
//! }
//! ```
//!
//! The runtime adds `name`, `cniVersion`, `prevResult`, and the attachments for GC. Other keys are
//! ignored, because runtimes may add more.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use serde_json::value::RawValue;
use underpass_config::parse_duration;

use super::plugin_error::{LATEST, PluginError, VERSIONS};
use crate::pods::cni::attachment::{Attachment, NetworkName};
use crate::pods::cni::install::DEFAULT_SOCKET;

/// The default timeout of a call, well below the kubelet's two minutes.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// The maximum timeout, which leaves the kubelet time to read the answer.
const MAX_TIMEOUT: Duration = Duration::from_secs(100);

/// The attachments that GC keeps.
const VALID_ATTACHMENTS: &str = "cni.dev/valid-attachments";

/// The keys of a configuration, each with its JSON text.
#[derive(Debug)]
pub(super) struct Config<'a> {
    keys: BTreeMap<String, &'a RawValue>,
    version: &'static str,
}

impl<'a> Config<'a> {
    /// Parses a configuration of a supported version.
    pub(super) fn parse(text: &'a [u8]) -> Result<Self, PluginError> {
        let keys: BTreeMap<String, &'a RawValue> = serde_json::from_slice(text)?;
        let mut config = Self { keys, version: LATEST };
        let version = config.text("cniVersion")?.unwrap_or_default();
        let found = VERSIONS.into_iter().find(|known| *known == version);
        config.version = found.ok_or(PluginError::Version { version })?;
        Ok(config)
    }

    /// The version of a configuration that may be invalid in other respects; the latest one if it
    /// has none.
    pub(super) fn version_of(text: &[u8]) -> &'static str {
        Config::parse(text).map_or(LATEST, |config| config.version)
    }

    /// Rejects a command that the configuration's version does not have.
    pub(super) fn require(
        &self,
        since: &'static str,
        command: &'static str,
    ) -> Result<(), PluginError> {
        let position = |version: &str| VERSIONS.iter().position(|known| *known == version);
        if position(self.version) < position(since) {
            return Err(PluginError::CommandVersion { command, version: self.version.to_owned() });
        }
        Ok(())
    }

    pub(super) fn network(&self) -> Result<NetworkName, PluginError> {
        let name = self.text("name")?.ok_or_else(|| PluginError::config("name", "is missing"))?;
        NetworkName::new(&name).map_err(PluginError::Network)
    }

    /// The daemon's socket.
    pub(super) fn socket(&self) -> Result<PathBuf, PluginError> {
        let path = self.text("socket")?.map_or_else(|| DEFAULT_SOCKET.into(), PathBuf::from);
        if !Path::new(&path).is_absolute() {
            return Err(PluginError::config("socket", "must be an absolute path"));
        }
        Ok(path)
    }

    /// The timeout of a call.
    pub(super) fn timeout(&self) -> Result<Duration, PluginError> {
        let Some(text) = self.text("timeout")? else { return Ok(DEFAULT_TIMEOUT) };
        let timeout = parse_duration(&text).filter(|timeout| *timeout <= MAX_TIMEOUT);
        timeout.ok_or_else(|| {
            let longest = MAX_TIMEOUT.as_secs();
            PluginError::config(
                "timeout",
                format!("must be a duration up to {longest}s, such as 30s"),
            )
        })
    }

    /// The JSON text of the previous plugin's result.
    pub(super) fn previous(&self) -> Result<&'a RawValue, PluginError> {
        let found = self.keys.get("prevResult").copied();
        found.filter(|value| value.get() != "null").ok_or_else(|| {
            let reason = "is missing: the plugin must follow one that makes the pod's interface";
            PluginError::config("prevResult", reason)
        })
    }

    /// A value of `args.underpass`, which names the pod if the runtime does not.
    pub(super) fn argument(&self, key: &str) -> Result<Option<String>, PluginError> {
        let Some(args) = self.keys.get("args") else { return Ok(None) };
        let args: Value = serde_json::from_str(args.get())?;
        match args.get("underpass").and_then(|own| own.get(key)) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(PluginError::config("args.underpass", "must be an object of strings")),
        }
    }

    /// The attachments of the network that GC keeps.
    pub(super) fn valid_attachments(&self) -> Result<Vec<Attachment>, PluginError> {
        let invalid = |reason: &str| PluginError::config(VALID_ATTACHMENTS, reason);
        let text = self.keys.get(VALID_ATTACHMENTS).ok_or_else(|| invalid("is missing"))?;
        let list: Vec<Value> = serde_json::from_str(text.get())
            .map_err(|_| invalid("must be a list of attachments"))?;
        let attachment = |value: &Value| {
            let name = |key| value.get(key).and_then(Value::as_str).unwrap_or_default();
            Attachment::new(name("containerID"), name("ifname"))
                .map_err(|error| invalid(&error.to_string()))
        };
        list.iter().map(attachment).collect()
    }

    fn text(&self, key: &'static str) -> Result<Option<String>, PluginError> {
        let text = self.keys.get(key).map(|value| serde_json::from_str(value.get()));
        text.transpose().map_err(|_| PluginError::config(key, "must be a string"))
    }
}
