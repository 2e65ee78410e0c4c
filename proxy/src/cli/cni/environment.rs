//! The environment variables of a call, which the runtime sets.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use super::plugin_error::PluginError;
use crate::pods::cni::attachment::{Attachment, InvalidName};

/// The variables that the plugin reads.
const VARIABLES: [&str; 5] =
    ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"];

/// A command of CNI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Add,
    Delete,
    Check,
    Status,
    Collect,
    Version,
}

impl Operation {
    const ALL: [(&str, Self); 6] = [
        ("ADD", Self::Add),
        ("DEL", Self::Delete),
        ("CHECK", Self::Check),
        ("STATUS", Self::Status),
        ("GC", Self::Collect),
        ("VERSION", Self::Version),
    ];
}

/// The variables of a call.
#[derive(Debug, Default)]
pub(crate) struct Environment {
    variables: BTreeMap<OsString, OsString>,
}

impl Environment {
    /// Reads the variables of this process.
    #[expect(
        clippy::disallowed_methods,
        reason = "the protocol of CNI is environment variables, not settings"
    )]
    pub(super) fn of_process() -> Self {
        let variable = |name: &&str| Some((OsString::from(name), std::env::var_os(name)?));
        VARIABLES.iter().filter_map(variable).collect()
    }

    pub(super) fn operation(&self) -> Result<Operation, PluginError> {
        let name = self.required("CNI_COMMAND")?;
        let found = Operation::ALL.into_iter().find(|(known, _)| *known == name);
        found.map(|(_, operation)| operation).ok_or_else(|| {
            let known = Operation::ALL.map(|(name, _)| name).join(", ");
            let reason = format!("{name:?} is not one of {known}");
            PluginError::Environment { variable: "CNI_COMMAND", reason }
        })
    }

    pub(super) fn attachment(&self) -> Result<Attachment, PluginError> {
        let container = self.required("CNI_CONTAINERID")?;
        let interface = self.required("CNI_IFNAME")?;
        Attachment::new(container, interface).map_err(|source| {
            let variable = match source {
                InvalidName::Interface(_) => "CNI_IFNAME",
                _ => "CNI_CONTAINERID",
            };
            PluginError::Variable { variable, source }
        })
    }

    /// The path of the pod's network namespace.
    pub(super) fn namespace(&self) -> Result<PathBuf, PluginError> {
        let path = PathBuf::from(self.required("CNI_NETNS")?);
        if !path.is_absolute() {
            let reason = format!("{path:?} is not an absolute path");
            return Err(PluginError::Environment { variable: "CNI_NETNS", reason });
        }
        Ok(path)
    }

    /// The pairs of `CNI_ARGS`.
    pub(super) fn arguments(&self) -> Result<BTreeMap<&str, &str>, PluginError> {
        let text = self.get("CNI_ARGS")?.unwrap_or_default();
        let pairs = text.split(';').filter(|pair| !pair.is_empty());
        let pairs = pairs.map(|pair| {
            pair.split_once('=').ok_or_else(|| {
                let reason = format!("{pair:?} is not KEY=VALUE");
                PluginError::Environment { variable: "CNI_ARGS", reason }
            })
        });
        pairs.collect()
    }

    fn required(&self, variable: &'static str) -> Result<&str, PluginError> {
        self.get(variable)?.ok_or(PluginError::NoVariable { variable })
    }

    /// The value of a variable; `None` if it is empty, as the specification says.
    fn get(&self, variable: &'static str) -> Result<Option<&str>, PluginError> {
        let Some(value) = self.variables.get(&OsString::from(variable)) else { return Ok(None) };
        let reason = || "it is not UTF-8".to_owned();
        let invalid = || PluginError::Environment { variable, reason: reason() };
        let text = value.to_str().ok_or_else(invalid)?;
        Ok(Some(text).filter(|text| !text.is_empty()))
    }
}

impl FromIterator<(OsString, OsString)> for Environment {
    fn from_iter<I: IntoIterator<Item = (OsString, OsString)>>(variables: I) -> Self {
        Self { variables: variables.into_iter().collect() }
    }
}
