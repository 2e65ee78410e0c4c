//! The plugin: performs the call that its environment and configuration describe.
//!
//! ADD, CHECK, STATUS and GC call the daemon; the plugin itself changes nothing in a pod. Standard
//! output has only the result or the error, which runtimes parse.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;

use serde_json::json;
use underpass_interception::Namespace;

use super::config::Config;
use super::daemon::Daemon;
use super::environment::{Environment, Operation};
use super::plugin_error::{PluginError, VERSIONS};
use super::previous_result;
use crate::error::chain;
use crate::pods::cni::attachment::{AttachedPod, Attachment, PodReference};
use crate::pods::cni::namespace_file::OpenNamespace;
use crate::pods::cni::protocol::{ATTACHMENTS_PER_LINE, Request};

/// The maximum length of a configuration in bytes: that of GC on a large node.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// The hint for a pod without a name.
const NAME_HINT: &str = "runtimes outside Kubernetes name no pod: set args.underpass.namespace and args.underpass.name in the \
     plugin's configuration, or CNI_ARGS=K8S_POD_NAMESPACE=…;K8S_POD_NAME=…";
const CONTAINER_HINT: &str = "the runtime called the plugin for a container that is not the pod's sandbox; the runtime tries again";

/// The text for standard output, and the error that it describes.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) text: String,
    pub(super) error: Option<PluginError>,
}

/// Performs a call. Its configuration is on standard input.
pub(super) async fn call(
    environment: &Environment,
    stdin: impl io::Read,
    open: OpenNamespace,
) -> Outcome {
    let mut config = Vec::new();
    let read = stdin.take(MAX_CONFIG_BYTES).read_to_end(&mut config);
    let result = match read {
        Ok(_) => perform(environment, &config, open).await,
        Err(error) => Err(PluginError::Input(error)),
    };
    match result {
        Ok(text) => Outcome { text, error: None },
        Err(error) => {
            let text = error.json(Config::version_of(&config)).to_string();
            Outcome { text, error: Some(error) }
        }
    }
}

async fn perform(
    environment: &Environment,
    config: &[u8],
    open: OpenNamespace,
) -> Result<String, PluginError> {
    match environment.operation()? {
        Operation::Version => Ok(versions(config)),
        Operation::Add => add(environment, &Config::parse(config)?, open).await,
        Operation::Check => check(environment, &Config::parse(config)?, open).await,
        Operation::Delete => delete(environment, config).await,
        Operation::Status => status(&Config::parse(config)?).await,
        Operation::Collect => collect(&Config::parse(config)?).await,
    }
}

/// The supported versions, as a result in the version of the request.
fn versions(config: &[u8]) -> String {
    let version = Config::version_of(config);
    json!({ "cniVersion": version, "supportedVersions": VERSIONS }).to_string()
}

/// Enrols the pod, and returns the previous result unchanged.
async fn add(
    environment: &Environment,
    config: &Config<'_>,
    open: OpenNamespace,
) -> Result<String, PluginError> {
    let request = Request::Add(Box::new(pod(environment, config)?));
    let namespace = open_namespace(environment, open)?;
    connect(config).await?.ask(&request, Some(namespace.as_fd())).await?;
    Ok(config.previous()?.get().to_owned())
}

/// Verifies the pod's listeners and rules.
async fn check(
    environment: &Environment,
    config: &Config<'_>,
    open: OpenNamespace,
) -> Result<String, PluginError> {
    config.require("0.4.0", "CHECK")?;
    let request = Request::Check(Box::new(pod(environment, config)?));
    let namespace = open_namespace(environment, open)?;
    connect(config).await?.ask(&request, Some(namespace.as_fd())).await?;
    Ok(String::new())
}

/// Removes the pod. Succeeds even if the daemon is down or the configuration is broken, so that the
/// runtime can remove the pod. The daemon removes pods whose namespace no longer exists.
async fn delete(environment: &Environment, config: &[u8]) -> Result<String, PluginError> {
    let attachment = environment.attachment()?;
    if let Err(error) = ask_to_delete(attachment, config).await {
        let error = chain(&error);
        // Standard error goes to the runtime's log.
        writeln!(io::stderr(), "underpass: cannot report the end of a pod to the daemon: {error}")
            .ok();
    }
    Ok(String::new())
}

async fn ask_to_delete(attachment: Attachment, config: &[u8]) -> Result<(), PluginError> {
    connect(&Config::parse(config)?).await?.ask(&Request::Delete(attachment), None).await
}

async fn connect(config: &Config<'_>) -> Result<Daemon, PluginError> {
    Daemon::connect(config.socket()?, config.timeout()?).await
}

/// Reports whether pods can be added.
async fn status(config: &Config<'_>) -> Result<String, PluginError> {
    config.require("1.1.0", "STATUS")?;
    match async { connect(config).await?.ask(&Request::Status, None).await }.await {
        Ok(()) => Ok(String::new()),
        Err(error) => {
            Err(PluginError::NotReady { message: chain(&error), hint: error.hint().to_owned() })
        }
    }
}

/// Removes the pods of this network that are not in the runtime's list.
async fn collect(config: &Config<'_>) -> Result<String, PluginError> {
    config.require("1.1.0", "GC")?;
    let (network, valid) = (config.network()?, config.valid_attachments()?);
    let daemon = connect(config).await?;
    let mut lines: Vec<&[Attachment]> = valid.chunks(ATTACHMENTS_PER_LINE).collect();
    if lines.is_empty() {
        lines.push(&[]);
    }
    let count = lines.len();
    for (index, line) in (1..).zip(lines) {
        let (network, valid) = (network.clone(), line.to_vec());
        daemon.ask(&Request::Collect { network, valid, last: index == count }, None).await?;
    }
    Ok(String::new())
}

/// The pod and its attachment.
fn pod(environment: &Environment, config: &Config<'_>) -> Result<AttachedPod, PluginError> {
    let attachment = environment.attachment()?;
    let previous = config.previous()?.get();
    Ok(AttachedPod {
        network: config.network()?,
        pod: pod_reference(environment, config, &attachment)?,
        addresses: previous_result::addresses(previous)?,
        dns: previous_result::dns(previous),
        namespace_path: environment.namespace()?.to_string_lossy().into_owned(),
        attachment,
    })
}

/// The pod's names from `CNI_ARGS`, or else from the configuration. Without a pod uid, the
/// container id is used.
fn pod_reference(
    environment: &Environment,
    config: &Config<'_>,
    attachment: &Attachment,
) -> Result<PodReference, PluginError> {
    let arguments = environment.arguments()?;
    let argument = |key: &str| arguments.get(key).copied().filter(|value| !value.is_empty());
    let container = attachment.container();
    if let Some(sandbox) = argument("K8S_POD_INFRA_CONTAINER_ID")
        && sandbox != container
    {
        let message = format!(
            "CNI_CONTAINERID is {container}, but the K8S_POD_INFRA_CONTAINER_ID of CNI_ARGS is {sandbox}"
        );
        return Err(PluginError::Fact { message, hint: CONTAINER_HINT });
    }
    let named = |variable: &str, key: &str| -> Result<String, PluginError> {
        let given = argument(variable).map(str::to_owned);
        let name = given.map_or_else(|| config.argument(key), |given| Ok(Some(given)))?;
        let message = || format!("the pod's {key} is unknown");
        name.ok_or_else(|| PluginError::Fact { message: message(), hint: NAME_HINT })
    };
    let namespace = named("K8S_POD_NAMESPACE", "namespace")?;
    let name = named("K8S_POD_NAME", "name")?;
    let uid = argument("K8S_POD_UID").unwrap_or(container);
    PodReference::new(&namespace, &name, uid)
        .map_err(|source| PluginError::Variable { variable: "CNI_ARGS", source })
}

/// Opens the pod's network namespace, which must not be the runtime's own.
fn open_namespace(
    environment: &Environment,
    open: OpenNamespace,
) -> Result<Namespace, PluginError> {
    let path = environment.namespace()?;
    let opened = open(&path).and_then(|opened| Ok((opened, Namespace::current()?)));
    let (namespace, own) =
        opened.map_err(|source| PluginError::OpenNamespace { path: path.clone(), source })?;
    if namespace.id() == own.id() {
        return Err(PluginError::HostNamespace { path });
    }
    Ok(namespace)
}

#[cfg(test)]
mod tests;
