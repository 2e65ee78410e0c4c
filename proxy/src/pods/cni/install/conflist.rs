//! Edits the text of a network configuration: adds and removes the plugin's entry.
//!
//! An edit changes only its part of the text, so that order, numbers and white space of the rest
//! stay. Removing the entry restores the original byte for byte.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use serde_json::value::RawValue;
use serde_json::{Value, json};
use thiserror::Error;
use underpass_config::Hint;

use super::{DEFAULT_SOCKET, PLUGIN_NAME};
use crate::pods::cni::attachment::{InvalidName, NetworkName};

/// CNI versions without `prevResult`. A configuration without a version means 0.1.0.
const UNSUPPORTED_VERSIONS: [&str; 4] = ["", "0.1.0", "0.2.0", "0.3.0"];

/// Why a network configuration cannot be edited.
#[derive(Debug, Error)]
pub(crate) enum ConflistError {
    #[error("it is not JSON")]
    Json(#[from] serde_json::Error),
    #[error("it has no `{0}`")]
    Missing(&'static str),
    #[error(transparent)]
    Name(#[from] InvalidName),
    #[error("its cniVersion {0:?} is too old for chained plugins")]
    Version(String),
    #[error("it has loadOnlyInlinedPlugins, so the runtime reads no drop-in")]
    InlinedOnly,
    #[error("it has no plugin that creates the interface, which ours must follow")]
    Alone,
}

impl Hint for ConflistError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::Version(_) => Some("set cniVersion to 0.3.1 or a later one".into()),
            Self::InlinedOnly => Some("install without --drop-in".into()),
            Self::Alone => Some("remove the file: the runtime needs a network plugin first".into()),
            Self::Json(_) | Self::Missing(_) | Self::Name(_) => None,
        }
    }
}

/// A list of plugins, and the positions of its parts in the text.
#[derive(Debug)]
pub(super) struct Conflist<'a> {
    text: &'a str,
    keys: BTreeMap<String, &'a RawValue>,
    plugins: Vec<Plugin<'a>>,
}

#[derive(Debug)]
struct Plugin<'a> {
    /// The position of the entry in the text.
    span: Range<usize>,
    text: &'a str,
    is_ours: bool,
}

/// The plugin's entry for the daemon that listens on `socket`.
pub(super) fn entry(socket: &Path) -> String {
    json!({ "type": PLUGIN_NAME, "socket": socket }).to_string()
}

/// Converts a configuration of a single plugin to a list, with our plugin at its end.
pub(super) fn list_of(single: &str, socket: &Path) -> Result<String, ConflistError> {
    let keys: BTreeMap<String, &RawValue> = serde_json::from_str(single)?;
    check_version(&keys)?;
    let of = |key| keys.get(key).map(|value| value.get()).ok_or(ConflistError::Missing(key));
    let (version, name) = (of("cniVersion")?, of("name")?);
    of("type")?;
    let (single, entry) = (single.trim(), entry(socket));
    Ok(format!(
        "{{\n  \"cniVersion\": {version},\n  \"name\": {name},\n  \"plugins\": [\n{single},\n{entry}\n  ]\n}}\n"
    ))
}

impl<'a> Conflist<'a> {
    pub(super) fn parse(text: &'a str) -> Result<Self, ConflistError> {
        let keys: BTreeMap<String, &RawValue> = serde_json::from_str(text)?;
        let plugins: Vec<&RawValue> = match keys.get("plugins") {
            Some(list) => serde_json::from_str(list.get())?,
            None => Vec::new(),
        };
        let plugins = plugins.into_iter().map(|plugin| Plugin::new(text, plugin.get()));
        Ok(Self { text, plugins: plugins.collect(), keys })
    }

    pub(super) fn name(&self) -> Result<NetworkName, ConflistError> {
        let name = self.keys.get("name").ok_or(ConflistError::Missing("name"))?;
        let name: String = serde_json::from_str(name.get())?;
        Ok(NetworkName::new(&name)?)
    }

    /// Fails if the runtime ignores drop-ins for this list.
    pub(super) fn check_drop_in(&self) -> Result<(), ConflistError> {
        let inlined_only = self.keys.get("loadOnlyInlinedPlugins").map(|value| value.get());
        match inlined_only.map(|value| value.trim_matches('"').to_ascii_lowercase()) {
            Some(value) if value == "true" => Err(ConflistError::InlinedOnly),
            _ => check_version(&self.keys),
        }
    }

    /// The text with exactly one entry, for a daemon on `socket`; `None` if it is unchanged. Other
    /// keys of the entry are kept unless its socket differs.
    pub(super) fn with_entry(&self, socket: &Path) -> Result<Option<String>, ConflistError> {
        check_version(&self.keys)?;
        let (Some(first), Some(last)) = (self.plugins.first(), self.plugins.last()) else {
            return Err(ConflistError::Missing("plugins"));
        };
        let mut ours = self.plugins.iter().filter(|plugin| plugin.is_ours);
        if let (Some(only), None) = (ours.next(), ours.next())
            && !first.is_ours
        {
            if only.has_socket(socket) {
                return Ok(None);
            }
            return Ok(Some(self.replaced(only.span.clone(), &entry(socket))));
        }
        if let Some(others) = self.without_entry()? {
            return Conflist::parse(&others)?.with_entry(socket);
        }
        let before_first = self.text.get(..first.span.start).unwrap_or_default();
        let indent = before_first.len() - before_first.trim_end().len();
        let indent = before_first.get(before_first.len() - indent..).unwrap_or_default();
        let end = last.span.end;
        Ok(Some(self.replaced(end..end, &format!(",{indent}{}", entry(socket)))))
    }

    /// The text without our entries; `None` if it has none.
    pub(super) fn without_entry(&self) -> Result<Option<String>, ConflistError> {
        let Some(index) = self.plugins.iter().position(|plugin| plugin.is_ours) else {
            return Ok(None);
        };
        let end_of = |index: usize| self.plugins.get(index).map(|plugin| plugin.span.end);
        let before = index.checked_sub(1).and_then(end_of);
        let after = self.plugins.get(index + 1).map(|plugin| plugin.span.start);
        let span = self.plugins.get(index).map(|plugin| plugin.span.clone()).unwrap_or_default();
        let text = match (before, after) {
            (Some(before), _) => self.replaced(before..span.end, ""),
            (None, Some(after)) => self.replaced(span.start..after, ""),
            (None, None) => return Err(ConflistError::Alone),
        };
        let rest = Conflist::parse(&text)?.without_entry()?;
        Ok(Some(rest.unwrap_or(text)))
    }

    fn replaced(&self, span: Range<usize>, new: &str) -> String {
        let mut text = self.text.to_owned();
        text.replace_range(span, new);
        text
    }
}

impl<'a> Plugin<'a> {
    /// Creates a plugin from a slice of `text`.
    fn new(text: &'a str, plugin: &'a str) -> Self {
        let start = plugin.as_ptr().addr() - text.as_ptr().addr();
        let value: Value = serde_json::from_str(plugin).unwrap_or_default();
        let is_ours = value.get("type").and_then(Value::as_str) == Some(PLUGIN_NAME);
        Self { span: start..start + plugin.len(), text: plugin, is_ours }
    }

    fn has_socket(&self, socket: &Path) -> bool {
        let value: Value = serde_json::from_str(self.text).unwrap_or_default();
        let found = value.get("socket").and_then(Value::as_str).unwrap_or(DEFAULT_SOCKET);
        Path::new(found) == socket
    }
}

/// Rejects versions without `prevResult`. From a list of versions the runtime selects the latest.
fn check_version(keys: &BTreeMap<String, &RawValue>) -> Result<(), ConflistError> {
    if keys.contains_key("cniVersions") {
        return Ok(());
    }
    let version = keys.get("cniVersion").map(|value| serde_json::from_str(value.get()));
    let version: String = version.transpose()?.unwrap_or_default();
    match UNSUPPORTED_VERSIONS.contains(&version.as_str()) {
        true => Err(ConflistError::Version(version)),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests;
