//! The hints of command errors: what the operator can check or change.

use std::borrow::Cow;

use underpass_config::Hint;

use super::CommandError;
use crate::demo::DemoError;
use crate::mesh::feed::MeshFeedError;

impl Hint for CommandError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        let fixed = match self {
            Self::Config(errors) => return errors.hint(),
            Self::Interception(error) => return error.hint(),
            Self::Hbone(error) => return error.hint(),
            Self::Mesh(MeshFeedError::File(errors)) => return errors.hint(),
            Self::Mesh(MeshFeedError::ControlPlane(error)) => return error.hint(),
            Self::Collector(error) => return error.hint(),
            Self::Pod(error) => return error.hint(),
            Self::TakeOver(error) => return error.hint(),
            Self::Socket(error) => return error.hint(),
            Self::Admin(error) => return error.hint(),
            Self::Adoption(error) => return error.hint(),
            Self::Instance(error) => return error.hint(),
            Self::Demo(error) => return error.hint(),
            Self::Install(error) => return error.hint(),
            Self::KeptByProxy(_) => "stop the proxy, or replace its rules with `--force`",
            Self::Task(_) => {
                "restart the proxy and report this defect; the rules stay, and connections are refused until it runs again"
            }
            Self::NoRules => "choose ambient, sidecar or osm (`--profile`)",
            Self::SettingsOfNode => "run `underpass node`, or remove node.pods",
            Self::NoNodeName => {
                "set node.name to the name of the Node, for example UNDERPASS_NODE_NAME from spec.nodeName, or node.kubernetes: off"
            }
            Self::NoPodSource => "set node.pods.zds, node.pods.cni or node.pods.directory",
            Self::Difference => "install the rules with `underpass rules install`",
            Self::Bypassed(_) => {
                "remove the other rules, or give their chains a later priority than those of underpass"
            }
            Self::Thread(_) => {
                "raise the limit of processes (`ulimit -u`, pids.max of the cgroup, TasksMax of the service)"
            }
            Self::Listen { .. } => "choose another address, or stop the process that listens there",
            Self::ProxyProcess { .. } => {
                "its log says why; its user (privileges.user) must be able to read the files of mesh, trust and identity; `privileges.broker: off` makes one process"
            }
            Self::NotServing { .. } => {
                "its log says why; a process that it should replace continues"
            }
            Self::InternalCommand(_) => "run `underpass run` or `underpass node`",
            Self::BrokerEnded | Self::Broker(_) => {
                "start the proxy again; the rules stay, and connections are refused until it runs again"
            }
            Self::DrainEnded(_) => "begin it again with `underpass admin drain`",
            Self::NoSuchCommand(_) => "`underpass --help` lists the commands",
            Self::Mistakes(_)
            | Self::Unhealthy { .. }
            | Self::ChecksFailed(_)
            | Self::PodSource(_)
            | Self::Plugin(_)
            | Self::Start(_)
            | Self::Metrics(_)
            | Self::Output(_) => return None,
        };
        Some(fixed.into())
    }
}

impl Hint for DemoError {
    fn hint(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::Sandbox(error) | Self::Namespace { source: error, .. } => error.hint(),
            Self::Certificates(error) => error.hint(),
            Self::Io { .. } | Self::Proxy { .. } | Self::Daemon { .. } | Self::Disproved => None,
        }
    }
}
