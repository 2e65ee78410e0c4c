//! The control plane: connects to it, and receives its first state.

use std::sync::Arc;

use futures_util::future::FutureExt as _;
use underpass_config::{Mesh, MeshSize, Settings, Workload};

use crate::cli::doctor::check::{Category, Check, Finding, Info, Outcome};
use crate::cli::doctor::subject::Subject;
use crate::error::ProxyError;
use crate::mesh::control_plane::local;
use crate::mesh::first_state::FirstState;

/// The maximum number of named resources.
const MAX_NAMED: usize = 10;

/// The first state of the control plane.
pub(super) struct State;

impl Check for State {
    fn info(&self) -> Info {
        Info::proxy("control-plane", Category::ControlPlane)
    }

    fn run<'a>(&'a self, subject: &'a Subject) -> Outcome<'a> {
        async move {
            Some(match subject.state().await? {
                Ok(state) => match in_other_network(&state.mesh, &subject.settings) {
                    Some(error) => Finding::of_error(&error),
                    None => received(state),
                },
                Err(error) => Finding::of_error(error),
            })
        }
        .boxed_local()
    }
}

fn received(FirstState { mesh, rejected }: &FirstState) -> Finding {
    let MeshSize { workloads, services, policies } = mesh.size();
    let message = format!(
        "the control plane sends its state; workloads: {workloads}, services: {services}, policies: {policies}"
    );
    if rejected.is_empty() {
        return Finding::ok(message);
    }
    Finding::warning(format!("{message}; rejected resources: {}", rejected.len()))
        .details(rejected.iter().take(MAX_NAMED).cloned())
        .hint(
            "a rejected policy denies its workloads' connections: correct it in the control plane",
        )
}

/// The error if the mesh has the workloads of this process only in another network than that of the
/// settings.
fn in_other_network(mesh: &Mesh, settings: &Settings) -> Option<ProxyError> {
    let (local, network) = (local(settings), settings.workload.network.clone());
    let mut own = mesh.workloads();
    own.retain(|workload| local.contains(workload));
    let is_here = |workload: &&Arc<Workload>| *workload.network == *network;
    let first = own.first().copied().cloned();
    let workload = first.filter(|_| !own.iter().any(is_here))?;
    Some(ProxyError::OtherNetwork { workload, network })
}

#[cfg(test)]
mod tests {
    use underpass_config::{Hint as _, Sources};

    use super::*;
    use crate::node::testing;

    #[test]
    fn other_network_of_own_workload_is_an_error() {
        let mesh = |text: &str| Mesh::from_text("mesh", text).unwrap();
        let far = "{name: server, uid: far, network: far, workloadIps: [10.0.0.3], node: here}";
        let (only_far, settings) = (mesh(&format!("workloads: [{far}]")), testing::settings(&[]));
        let error = in_other_network(&only_far, &settings).unwrap();
        assert_eq!(
            error.to_string(),
            r#"the mesh has default/server in the network "far", and this proxy is in """#
        );
        let hint = error.hint().unwrap();
        assert!(hint.contains(r#"set workload.network to "far"; otherwise"#), "{hint}");
        let of_node = |network: &str| {
            let text = "node.name=here node.pods.directory=/pods identity.local_ca=/ca";
            let flags = format!("{text} workload.network={network}");
            let flags = flags.split(' ').map(str::to_owned).collect();
            let sources = Sources { file: None, environment: Vec::new(), flags };
            in_other_network(&only_far, &sources.load().unwrap()).is_some()
        };
        assert_eq!(["near", "far"].map(of_node), [true, false]);
        let here = "{name: server, workloadIps: [10.0.0.1]}";
        let both = mesh(&format!("workloads: [{far}, {here}]"));
        let other = mesh("workloads: [{name: other, network: far, workloadIps: [10.0.0.4]}]");
        for mesh in [both, other] {
            assert!(in_other_network(&mesh, &settings).is_none());
        }
    }
}
