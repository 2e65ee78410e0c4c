//! The names of CNI: an attachment of a container to a network, and the pod of the attachment.
//!
//! Both the plugin and the daemon validate them, because they become file names and log lines.

use std::fmt;
use std::net::IpAddr;

use thiserror::Error;
use underpass_config::{PodDns, PodUid};

/// In bytes. Runtimes use 64.
pub(crate) const MAX_CONTAINER_ID_BYTES: usize = 200;
/// In bytes, as for a Kubernetes object name.
pub(crate) const MAX_NAME_BYTES: usize = 253;
/// In bytes: the kernel's `IFNAMSIZ` without the NUL.
const MAX_INTERFACE_BYTES: usize = 15;

/// One interface of one container: the key of every CNI operation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Attachment {
    container: Box<str>,
    interface: Box<str>,
}

/// A name that CNI does not allow.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum InvalidName {
    #[error(
        "{0:?} is not a container id: 1 to {MAX_CONTAINER_ID_BYTES} letters, digits, `_`, `.` and `-`, a letter or digit first"
    )]
    Container(String),
    #[error(
        "{0:?} is not an interface name: 1 to {MAX_INTERFACE_BYTES} characters without `/`, `:` and spaces, not `.` or `..`"
    )]
    Interface(String),
    #[error(
        "{0:?} is not a network name: 1 to {MAX_NAME_BYTES} letters, digits, `_`, `.` and `-`, a letter or digit first"
    )]
    Network(String),
    #[error(
        "{value:?} is not a {what} of a pod: 1 to {MAX_NAME_BYTES} visible ASCII characters without `/`"
    )]
    Pod { what: &'static str, value: String },
}

impl Attachment {
    pub(crate) fn new(container: &str, interface: &str) -> Result<Self, InvalidName> {
        if !is_identifier(container, MAX_CONTAINER_ID_BYTES) {
            return Err(InvalidName::Container(container.to_owned()));
        }
        let is_name = (1..=MAX_INTERFACE_BYTES).contains(&interface.len())
            && interface.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:".contains(&byte))
            && !matches!(interface, "." | "..");
        if !is_name {
            return Err(InvalidName::Interface(interface.to_owned()));
        }
        Ok(Self { container: container.into(), interface: interface.into() })
    }

    pub(crate) fn container(&self) -> &str {
        &self.container
    }

    pub(crate) fn interface(&self) -> &str {
        &self.interface
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.container, self.interface)
    }
}

/// The name of a CNI network, unique on a node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct NetworkName(Box<str>);

impl NetworkName {
    pub(crate) fn new(name: &str) -> Result<Self, InvalidName> {
        if !is_identifier(name, MAX_NAME_BYTES) {
            return Err(InvalidName::Network(name.to_owned()));
        }
        Ok(Self(name.into()))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// The pod of an attachment, according to the plugin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodReference {
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// The pod's uid, or the container id if the runtime passes no uid.
    pub(crate) uid: PodUid,
}

impl PodReference {
    pub(crate) fn new(namespace: &str, name: &str, uid: &str) -> Result<Self, InvalidName> {
        for (what, value) in [("namespace", namespace), ("name", name)] {
            let is_name = (1..=MAX_NAME_BYTES).contains(&value.len())
                && value.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
            if !is_name {
                return Err(InvalidName::Pod { what, value: value.to_owned() });
            }
        }
        let uid =
            uid.parse().map_err(|_| InvalidName::Pod { what: "uid", value: uid.to_owned() })?;
        Ok(Self { namespace: namespace.into(), name: name.into(), uid })
    }
}

/// An attachment with its pod, addresses and namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AttachedPod {
    pub(crate) attachment: Attachment,
    pub(crate) network: NetworkName,
    pub(crate) pod: PodReference,
    /// The pod's addresses on the interfaces inside its namespace.
    pub(crate) addresses: Vec<IpAddr>,
    /// The file of the pod's network namespace, through which a restarted daemon opens it again.
    pub(crate) namespace_path: String,
    /// The resolver settings in the result of the previous plugin, if it names servers.
    pub(crate) dns: Option<PodDns>,
}

/// Whether CNI allows the text as a container id or a network name.
fn is_identifier(text: &str, longest: usize) -> bool {
    (1..=longest).contains(&text.len())
        && text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attachment_accepts_names_of_runtimes() {
        let container = "9f".repeat(32);
        let attachment = Attachment::new(&container, "eth0").unwrap();
        assert_eq!((attachment.container(), attachment.interface()), (&*container, "eth0"));
        assert_eq!(attachment.to_string(), format!("{container}:eth0"));
        Attachment::new("cnitool-77383ca0a0715733ca6f", "net1").unwrap();
        Attachment::new(&"a".repeat(MAX_CONTAINER_ID_BYTES), "a23456789012345").unwrap();
    }

    #[test]
    fn attachment_rejects_names_that_cni_forbids() {
        let long = "a".repeat(MAX_CONTAINER_ID_BYTES + 1);
        for container in ["", ".", "..", "-a", "a/b", "a b", "a:b", "ä", "a\n", &*long] {
            let error = Attachment::new(container, "eth0").unwrap_err();
            assert_eq!(error, InvalidName::Container(container.to_owned()));
        }
        for interface in ["", ".", "..", "a/b", "a:b", "a b", "a\0", "a234567890123456", "ä"] {
            let error = Attachment::new("c", interface).unwrap_err();
            assert_eq!(error, InvalidName::Interface(interface.to_owned()));
        }
    }

    #[test]
    fn pod_reference_rejects_paths_and_control_characters() {
        PodReference::new("default", "web-0", "0c1f5f5e-1b5c-4c59-a8f0-6bd8f2b3a6c1").unwrap();
        for bad in ["", "a/b", "a b", "a\n", "ä", &"a".repeat(MAX_NAME_BYTES + 1)] {
            for values in [[bad, "n", "u"], ["s", bad, "u"], ["s", "n", bad]] {
                PodReference::new(values[0], values[1], values[2]).unwrap_err();
            }
        }
    }

    #[test]
    fn network_name_rejects_paths() {
        assert_eq!(NetworkName::new("k8s-pod-network").unwrap().as_str(), "k8s-pod-network");
        for bad in ["", "..", "a/b", "-a", &"a".repeat(MAX_NAME_BYTES + 1)] {
            NetworkName::new(bad).unwrap_err();
        }
    }
}
