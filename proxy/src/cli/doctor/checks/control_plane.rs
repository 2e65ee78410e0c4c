//! The control plane: connects to it, and receives its first state.

use futures_util::future::FutureExt as _;
use underpass_config::MeshSize;

use crate::cli::doctor::check::{Category, Check, Finding, Info, Outcome};
use crate::cli::doctor::subject::Subject;
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
                Ok(state) => received(state),
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
