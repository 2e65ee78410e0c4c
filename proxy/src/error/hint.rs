//! The hints of connection errors: what the operator can check or change.

use std::borrow::Cow;

use underpass_config::Hint;

use super::ProxyError;
use crate::decide::authorization::Denial;
use crate::limits::Refusal;

impl Hint for ProxyError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::Route(error) => return error.hint(),
            Self::Resolve(error) => return error.hint(),
            Self::Tunnel(error) => return error.hint(),
            Self::NoLongerAllowed(error) => return error.hint(),
            Self::OtherNetwork { workload, .. } => {
                let hint = format!(
                    "if the pod is in that network, set workload.network to {:?}; otherwise wait until the \
                     control plane has the pod",
                    &*workload.network
                );
                return Some(hint.into());
            }
            Self::TooManyConnections(refusal) => refusal.hint(),
            Self::NotCaptured(_) => "connect to the workload's own port instead of the proxy's",
            Self::OwnListener(_) => "connect to a port of the workload",
            Self::NotLocal(_) | Self::ForeignSource(_) => {
                "add the interface of a virtual machine or container in the pod to interception.virtual_interfaces"
            }
            Self::NoIdentity(_) => "set a source of certificates (identity.*)",
            Self::CertificateAwaited { .. } => {
                "check that the CA answers, or raise timeouts.handshake"
            }
            Self::PodNotInMesh { .. } => "add the pod to the mesh, with its service account",
            Self::WorkloadNotSent { .. } => {
                "add the workload to the control plane's mesh (one of mesh.file is not enough), or correct \
                 workload.namespace and workload.name"
            }
            Self::Lookup(error) => error.hint(),
            Self::TooManyHandshakes(_) => {
                "check for a storm of connections or for a client that never finishes them, or raise \
                 limits.handshakes_per_source"
            }
            Self::HandshakeNotBegun { .. } => {
                "check for a storm of connections or for too few CPUs, or raise limits.handshakes and timeouts.handshake"
            }
            Self::OutOfDescriptors => "raise the limit of open files (ulimit -n, LimitNOFILE)",
            Self::Denied(Denial::By(_)) => "change the policy if the connection should be allowed",
            Self::Denied(Denial::NotAllowed) => {
                "add an ALLOW policy that matches the connection if it should be allowed"
            }
            Self::DeniedInPlain(_) => {
                "add the client to the mesh, or exempt a port for clients outside of it, such as a CA's, with \
                 interception.inbound.exclude_ports"
            }
            Self::PlaintextRefused(_) => {
                "add the client to the mesh, or allow plaintext with proxy.mtls_overrides"
            }
            Self::Egress(_) => "add the destination to the mesh, or to egress_exceptions",
            Self::PlaintextToHbone(_) => {
                "send the connection through the tunnel of the workload's proxy"
            }
            Self::OtherIdentity { .. } => "retry: the address was assigned to another workload",
            Self::ConnectTimeout { .. } => {
                "check that the host is up and that no firewall drops packets, or raise timeouts.connect"
            }
            Self::Connect { .. } => "check that the destination listens on this port",
            Self::IdleTimeout { .. } => {
                "raise timeouts.idle, or let the application send keepalives"
            }
            Self::HalfCloseTimeout { .. } => {
                "check for an application that never closes its connections, or raise timeouts.half_close"
            }
            Self::Drained => "raise timeouts.drain if connections should have more time to end",
            Self::Draining => "end the drain with `underpass admin undrain`",
            Self::DrainedByRequest => {
                "give the connections more time with `underpass admin drain --deadline`"
            }
            Self::LocalUnknown { .. }
            | Self::SourceUnknown { .. }
            | Self::Client(_)
            | Self::Upstream(_)
            | Self::Dropped => return None,
        };
        Some(fixed.into())
    }
}

impl Refusal {
    /// The setting or limit of the system to raise.
    pub(crate) fn hint(self) -> &'static str {
        match self {
            Self::Worker | Self::ConnectionShare(_) => "raise limits.connections_per_worker",
            Self::Source(_) => "raise limits.connections_per_source",
            Self::DescriptorShare(_) | Self::Descriptors => {
                "raise the limit of open files (ulimit -n, LimitNOFILE)"
            }
            Self::TunnelSource(_) => "raise limits.tunnels_per_source",
            Self::TunnelIdentity => "raise limits.tunnels_per_identity",
        }
    }
}
