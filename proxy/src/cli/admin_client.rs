//! The options with which a command finds the running proxy, and the paths that it asks for.

use std::path::PathBuf;

use super::run::SettingsArguments;
use crate::admin::client::{AdminClient, AdminClientError};
use crate::process::command_error::CommandError;
use crate::process::take_over::control_socket::{self, ADMIN};

/// The options that select the running proxy.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct ProxyArguments {
    #[command(flatten)]
    settings: SettingsArguments,
    /// The Unix socket of the proxy (admin.socket); by default that of the current network
    /// namespace
    #[arg(long, value_name = "PATH", conflicts_with_all = ["config", "set"])]
    socket: Option<PathBuf>,
}

/// A path with one parameter.
pub(super) fn with_parameter(path: &str, name: &str, value: &str) -> String {
    with_parameters(path, &[(name, Some(value))])
}

/// A path with those parameters that have a value.
pub(super) fn with_parameters(path: &str, parameters: &[(&str, Option<&str>)]) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    for (name, value) in parameters {
        if let Some(value) = value {
            query.append_pair(name, value);
        }
    }
    let query = query.finish();
    if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") }
}

impl ProxyArguments {
    /// Connects to the proxy.
    ///
    /// # Errors
    ///
    /// The settings are wrong, no proxy listens, or the user of this process may not connect.
    pub(super) async fn connect(self) -> Result<AdminClient, CommandError> {
        Ok(AdminClient::connect(self.path()?).await?)
    }

    fn path(self) -> Result<PathBuf, CommandError> {
        if let Some(socket) = self.socket {
            return Ok(socket);
        }
        let settings = self.settings.load()?;
        let path = control_socket::path(&settings.admin.socket, ADMIN);
        Ok(path.map_err(AdminClientError::Namespace)?.ok_or(AdminClientError::Off)?)
    }
}
