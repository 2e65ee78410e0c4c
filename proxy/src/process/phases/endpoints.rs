//! The tasks that report on the process: readiness, metrics and the instance socket.

use underpass_interception::BoundListener;

use crate::admin::endpoints::{Endpoint, Readiness};
use crate::observe::metrics::Exporter;
use crate::process::instance::{Instance, Status};
use crate::process::pause_gate::PauseGate;
use crate::process::supervise::{Task, restarting};
use crate::traffic::listeners::{EndpointKind, Listeners};

/// The readiness of the process, and the tasks that serve it.
pub(in crate::process) struct Endpoints {
    pub(in crate::process) readiness: Readiness,
    serving: Vec<Task>,
}

impl Endpoints {
    pub(in crate::process) fn serve(
        listeners: Listeners<EndpointKind>,
        readiness: Readiness,
        exporter: &Exporter,
        gate: &PauseGate,
    ) -> Self {
        let serve = |(kind, listener)| match kind {
            EndpointKind::Readiness => {
                let endpoint = Endpoint::Readiness(readiness.clone());
                serve("readiness endpoint", endpoint, listener, gate.clone())
            }
            EndpointKind::Metrics => {
                let endpoint = Endpoint::Metrics(exporter.clone());
                serve("metrics endpoint", endpoint, listener, gate.clone())
            }
        };
        let serving = listeners.into_kinds().map(serve).collect();
        Self { readiness, serving }
    }

    /// Answers queries on the instance socket.
    pub(in crate::process) fn answer(&mut self, instance: Instance, status: Status) {
        let answering = move || instance.clone().serve(status.clone());
        self.serving.push(restarting("instance socket", answering));
    }

    /// Stops serving, so that only the process that has taken over accepts on the shared listeners.
    pub(in crate::process) fn close(&mut self) {
        self.serving.clear();
    }
}

fn serve(task: &'static str, endpoint: Endpoint, listener: BoundListener, gate: PauseGate) -> Task {
    restarting(task, move || {
        let (endpoint, gate, listener) = (endpoint.clone(), gate.clone(), listener.clone());
        async move {
            if let Err(error) = endpoint.serve(listener, gate).await {
                tracing::error!(task, %error, "cannot serve an endpoint");
            }
        }
    })
}
