//! The tasks that report on the process and change it: readiness, metrics and administration.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::sync::Arc;

use tokio::net::UnixListener;
use underpass_config::Settings;
use underpass_interception::BoundListener;

use crate::admin::readiness::Readiness;
use crate::admin::routes::{Access, Routes};
use crate::admin::server::Server;
use crate::admin::state::Admin;
use crate::observe::metrics::Exporter;
use crate::process::command_error::CommandError;
use crate::process::pause_gate::PauseGate;
use crate::process::supervise::{Task, restarting};
use crate::process::take_over::control_socket::{ADMIN, ControlSocket};
use crate::traffic::listeners::{BoundEndpoints, EndpointKind};

/// The state that the endpoints report, and the tasks that serve it.
pub(in crate::process) struct Endpoints {
    pub(in crate::process) admin: Arc<Admin>,
    serving: Vec<Task>,
}

/// The state that the endpoints will report.
pub(in crate::process) struct Reports {
    pub(in crate::process) readiness: Readiness,
    pub(in crate::process) exporter: Exporter,
    pub(in crate::process) admin: Arc<Admin>,
}

/// Binds the Unix socket of administration, or takes the one that was `handed` over. Also returns a
/// descriptor of it, for the process that serves it.
///
/// # Errors
///
/// The socket cannot be created at the path from the settings, or the process has no descriptor for
/// it.
pub(in crate::process) async fn bind_admin_socket(
    settings: &Settings,
    handed: Option<ControlSocket>,
) -> Result<(Option<ControlSocket>, Option<OwnedFd>), CommandError> {
    let setting = &settings.admin.socket;
    let socket = ControlSocket::bind_configured(settings, setting, ADMIN, handed).await?;
    // Without a descriptor the socket would listen, and nothing would accept.
    let descriptor = socket.as_ref().map(ControlSocket::descriptor).transpose();
    Ok((socket, descriptor.map_err(CommandError::Start)?))
}

impl Endpoints {
    /// Serves the endpoints while the gate is open.
    ///
    /// # Errors
    ///
    /// The Unix socket cannot be registered.
    pub(in crate::process) fn serve(
        endpoints: BoundEndpoints,
        Reports { readiness, exporter, admin }: Reports,
        gate: &PauseGate,
    ) -> io::Result<Self> {
        let serve = |(kind, listener)| {
            let (task, routes) = match kind {
                EndpointKind::Readiness => {
                    let routes = Routes::Readiness(readiness.clone(), admin.liveness.clone());
                    ("readiness endpoint", routes)
                }
                EndpointKind::Metrics => ("metrics endpoint", Routes::Metrics(exporter.clone())),
                EndpointKind::Admin => {
                    ("admin endpoint", Routes::Admin(admin.clone(), Access::Read))
                }
            };
            serve(task, Server::new(routes), listener, gate.clone())
        };
        let mut serving: Vec<_> = endpoints.listeners.into_kinds().map(serve).collect();
        if let Some(socket) = endpoints.admin_socket {
            let server = Server::new(Routes::Admin(admin.clone(), Access::Change));
            serving.push(serve_socket(server, socket, gate.clone())?);
        }
        Ok(Self { admin, serving })
    }

    /// Stops serving, so that only the process that has taken over accepts on the shared listeners.
    pub(in crate::process) fn close(&mut self) {
        self.serving.clear();
    }
}

fn serve(task: &'static str, server: Server, listener: BoundListener, gate: PauseGate) -> Task {
    restarting(task, move || {
        let (server, gate, listener) = (server.clone(), gate.clone(), listener.clone());
        async move {
            if let Err(error) = server.serve(listener, gate).await {
                tracing::error!(task, %error, "cannot serve an endpoint");
            }
        }
    })
}

fn serve_socket(server: Server, socket: OwnedFd, gate: PauseGate) -> io::Result<Task> {
    let listener = StdUnixListener::from(socket);
    listener.set_nonblocking(true)?;
    let listener = Arc::new(UnixListener::from_std(listener)?);
    let serve = move || server.clone().serve_socket(listener.clone(), gate.clone());
    Ok(restarting("admin socket", serve))
}
