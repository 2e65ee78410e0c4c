//! Follows a control plane: keeps a stream to it, applies its responses, and passes the mesh to the
//! publisher.
//!
//! ```text
//! connect ─▶ open ─▶ responses ─▶ ControlPlane (config) ─▶ snapshot ─▶ publisher
//!    ▲ back-off          └─ ACK or NACK ─▶
//!    └── lost: the last mesh stays
//! ```
//!
//! Policies and workloads of this process take effect at once, and so do removals of looked up
//! resources. Answers to lookups are collected for [`COLLECT_ANSWERS`], so that a burst of lookups
//! costs few snapshots. Other changes are collected for [`COALESCE`], so that frequent changes of
//! endpoints cost only a few snapshots a second. No mesh is passed on before the first state is
//! complete.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, Interval, sleep_until};
use underpass_config::{
    Applied, ControlPlane, DeltaResponse, Hint, LocalWorkloads, Lookup, Mesh, MeshSource, Metadata,
    MetadataValue, Node, Quoted, ResourceType, SessionError, Settings, Urgency, XdsSettings,
};
use underpass_hbone::{ControlPlaneClient, ControlPlaneError, ControlPlaneStream, Dial};
use underpass_interception::{run_in_background, run_on_thread};

use super::on_demand::Lookups;
use super::on_demand::schedule::{CHECK, Schedule, Unanswered};
use super::report::log_refused;
use crate::admin::readiness::Readiness;
use crate::backoff::Backoff;
use crate::error::{Described, chain};
use crate::observe::mesh_health::{MeshHealth, Rejected};
use crate::observe::metrics::mesh;
use crate::observe::metrics::mesh::StreamEndReason;

/// The bounds of the back-off before a new connection, as in ztunnel but with jitter.
const FIRST_WAIT: Duration = Duration::from_millis(10);
const LONGEST_WAIT: Duration = Duration::from_secs(15);
/// The time for which changes that are not urgent are collected.
const COALESCE: Duration = Duration::from_millis(100);
/// The time for which answers to lookups are collected: connections wait for them.
const COLLECT_ANSWERS: Duration = Duration::from_millis(1);
/// The maximum number of changes that are applied on this thread. A larger response is applied on
/// another thread, so that it delays no other task.
const MAX_INLINE: usize = 256;
/// The maximum number of rejected resources that the log names for each response.
const MAX_LOGGED: usize = 5;
/// The address in the node's id, which istiod requires and does not use; ztunnel's default.
const ADDRESS: &str = "1.1.1.1";

/// Follows one control plane, and the mesh file beside it.
#[derive(Debug)]
pub(crate) struct ControlPlaneFollower {
    address: String,
    plane: ControlPlane,
    file: MeshSource,
    /// The mesh of the file, if there is one.
    fallback: Option<Arc<Mesh>>,
    snapshots: watch::Sender<Option<Arc<Mesh>>>,
    /// The lookups of connections, and when each was sent.
    lookups: Lookups,
    schedule: Schedule,
    /// The time at which collected changes are passed on.
    due: Option<Instant>,
    health: MeshHealth,
}

/// The reason why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamEnd {
    #[error(transparent)]
    Stream(#[from] ControlPlaneError),
    #[error("the control plane violates the protocol: {0}")]
    Session(#[from] SessionError),
    #[error(transparent)]
    Unanswered(#[from] Unanswered),
}

impl Hint for StreamEnd {
    fn hint(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::Stream(error) => error.hint(),
            Self::Session(_) | Self::Unanswered(_) => None,
        }
    }
}

impl StreamEnd {
    /// The reason in metrics, for a stream that was open.
    fn reason(&self) -> StreamEndReason {
        match self {
            Self::Stream(ControlPlaneError::Closed) => StreamEndReason::Complete,
            Self::Stream(_) | Self::Session(_) | Self::Unanswered(_) => StreamEndReason::Error,
        }
    }
}

/// An event on an open stream.
enum Event {
    Response(DeltaResponse),
    /// Connections need these lookups.
    Asked(Vec<Lookup>),
    /// The time to check all lookups.
    Check,
}

impl ControlPlaneFollower {
    /// Creates a follower that passes snapshots to the returned receiver, answers `lookups`, and
    /// records the `health` of its sources.
    pub(crate) fn new(
        settings: &Settings,
        xds: &XdsSettings,
        file: MeshSource,
        fallback: Option<Arc<Mesh>>,
        lookups: Lookups,
        health: MeshHealth,
    ) -> (Self, watch::Receiver<Option<Arc<Mesh>>>) {
        let plane = ControlPlane::new(node(settings, xds), local(settings), xds.on_demand);
        let (snapshots, receiver) = watch::channel(None);
        let (address, schedule) = (xds.address.clone(), Schedule::default());
        let follower = Self {
            address,
            plane,
            file,
            fallback,
            snapshots,
            lookups,
            schedule,
            due: None,
            health,
        };
        (follower, receiver)
    }

    /// Follows the control plane. Never returns.
    pub(crate) async fn run<D: Dial>(
        mut self,
        client: ControlPlaneClient<D>,
        readiness: Readiness,
    ) {
        let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
        readiness.mesh_known(false);
        mesh::control_plane_followed();
        loop {
            let (first, is_changed) = self.schedule.open(&mut self.plane, &self.lookups);
            if is_changed {
                self.take_effect(Urgency::Low, &readiness);
            }
            let opened = self.or_file_changes(client.open(first)).await;
            let since = Instant::now();
            let (end, reason) = match opened {
                Ok(stream) => {
                    let end = self.follow(stream, &readiness).await;
                    let reason = end.reason();
                    (end, reason)
                }
                Err(error) => (StreamEnd::Stream(error), StreamEndReason::ConnectionError),
            };
            mesh::control_plane_connected(false);
            mesh::control_plane_lost(reason);
            // A control plane that closes every stream early is not asked again at once: each time
            // it would send its whole state.
            let (wait, address) = (backoff.next_after(since.elapsed()), &self.address);
            self.health.lost(Described::new(&end));
            let has_mesh = self.snapshots.borrow().is_some();
            log_end(address, &end, wait, has_mesh);
            self.or_file_changes(tokio::time::sleep(wait)).await;
        }
    }

    /// Applies the responses of one stream until it ends.
    async fn follow(&mut self, mut stream: ControlPlaneStream, readiness: &Readiness) -> StreamEnd {
        mesh::control_plane_connected(true);
        self.health.connected();
        tracing::info!(address = self.address, "connected to the control plane");
        let mut checks = tokio::time::interval(CHECK);
        loop {
            let Err(end) = self.step(&mut stream, &mut checks, readiness).await else { continue };
            return end;
        }
    }

    /// Waits for an event on the stream, and sends what follows from it.
    async fn step(
        &mut self,
        stream: &mut ControlPlaneStream,
        checks: &mut Interval,
        readiness: &Readiness,
    ) -> Result<(), StreamEnd> {
        let lookups = self.lookups.clone();
        let event = async {
            tokio::select! {
                response = stream.next() => response.map(Event::Response),
                asked = lookups.asked() => Ok(Event::Asked(asked)),
                _ = checks.tick(), if lookups.are_on_demand() => Ok(Event::Check),
            }
        };
        let requests = match self.or_file_changes(event).await? {
            Event::Response(response) => {
                let bytes = response.encoded_len();
                let applied = self.apply(response).await?;
                mesh::control_plane_message(applied.kind, bytes);
                report(&applied);
                self.health.set_rejected(first_rejected(&self.plane));
                self.take_effect(applied.urgency, readiness);
                applied.into_requests().collect()
            }
            Event::Asked(asked) => self.schedule.ask(&mut self.plane, asked),
            Event::Check => {
                let (requests, is_changed) = self.schedule.check(&mut self.plane, &self.lookups)?;
                if is_changed {
                    self.take_effect(Urgency::Low, readiness);
                }
                requests
            }
        };
        for request in requests {
            self.or_file_changes(stream.send(request)).await?;
        }
        Ok(())
    }

    /// Passes on the mesh after a response as soon as its urgency requires: at once if it completes
    /// the first state.
    fn take_effect(&mut self, urgency: Urgency, readiness: &Readiness) {
        if !self.plane.is_synced() {
            return;
        }
        readiness.mesh_known(true);
        let wait = match urgency {
            _ if self.snapshots.borrow().is_none() => return self.publish(),
            Urgency::Immediate => return self.publish(),
            Urgency::Awaited => COLLECT_ANSWERS,
            Urgency::Low => COALESCE,
        };
        let due = Instant::now() + wait;
        self.due = Some(self.due.map_or(due, |earlier| earlier.min(due)));
    }

    /// Applies a response; a large one on another thread.
    async fn apply(&mut self, response: DeltaResponse) -> Result<Applied, SessionError> {
        if self.plane.max_changes(&response) <= MAX_INLINE {
            return self.plane.receive(response);
        }
        let empty = self.plane.renewed();
        let mut plane = std::mem::replace(&mut self.plane, empty);
        let (finished, applied) = oneshot::channel();
        // Every connection waits for the first state, and some for answers to lookups.
        let is_awaited = !plane.is_synced() || self.lookups.are_on_demand();
        let run = if is_awaited { run_on_thread } else { run_in_background };
        run(Box::new(move || {
            let applied = plane.receive(response);
            plane.index();
            // Fails if the process is ending.
            finished.send((plane, applied)).ok();
        }));
        match applied.await {
            Ok((plane, applied)) => {
                self.plane = plane;
                applied
            }
            // No thread could be started, so the state is lost. The control plane sends it again on
            // a new stream; until then the last mesh stays.
            Err(_) => Err(SessionError::Lost),
        }
    }

    /// Publishes the mesh after all changes.
    fn publish(&mut self) {
        self.due = None;
        // Without a complete state the last mesh stays: an empty one has no policies.
        if !self.plane.is_synced() {
            return;
        }
        let mesh = self.plane.snapshot().with_fallback(self.fallback.clone());
        self.snapshots.send_replace(Some(Arc::new(mesh)));
    }

    /// Waits for `other`, and meanwhile publishes collected changes and those of the file.
    async fn or_file_changes<T>(&mut self, other: impl Future<Output = T>) -> T {
        tokio::pin!(other);
        loop {
            let due = self.due;
            let is_due = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = is_due => self.publish(),
                done = &mut other => return done,
                changed = self.file.changed() => {
                    self.health.file_read(changed.as_ref().err());
                    match changed {
                        Ok(mesh) => {
                            self.fallback = Some(mesh);
                            self.publish();
                        }
                        Err(errors) => log_refused(&errors),
                    }
                }
            }
        }
    }
}

/// The number of resources that cannot be used, and the first of them.
fn first_rejected(plane: &ControlPlane) -> Option<Rejected> {
    let mut rejected = plane.rejected();
    let count = rejected.len();
    let (kind, name, reason) = rejected.next()?;
    let first = format!("{} {}: {}", kind.name(), Quoted::new(name), Quoted::new(reason));
    Some(Rejected { count, first })
}

/// Logs and counts the changes of a response.
fn report(Applied { kind, set, removed, outdated, rejected, .. }: &Applied) {
    mesh::control_plane_resources(*kind, set - rejected.len(), *removed, rejected.len());
    mesh::control_plane_resources(ResourceType::Address, 0, *outdated, 0);
    let kind = kind.name();
    tracing::debug!(kind, set, removed, rejected = rejected.len(), "response of the control plane");
    for (name, reason) in rejected.iter().take(MAX_LOGGED) {
        tracing::error!(
            kind,
            name = %Quoted::new(name),
            reason = %Quoted::new(reason),
            hint = "correct it in the control plane: connections that it may forbid are refused until then",
            "cannot use a resource of the control plane"
        );
    }
    if let Some(more @ 1..) = rejected.len().checked_sub(MAX_LOGGED) {
        tracing::error!(kind, more, "cannot use more resources of the control plane");
    }
}

/// Logs the end of a stream: as a warning, unless the next attempt follows at once.
/// `has_mesh`: whether a first state was complete.
fn log_end(address: &str, end: &StreamEnd, retry_in: Duration, has_mesh: bool) {
    let (error, hint) = (chain(end), end.hint());
    if retry_in > Duration::from_secs(1) {
        tracing::warn!(
            address,
            ?retry_in,
            hint = hint.as_deref(),
            "no control plane, {}: {error}",
            if has_mesh { "keeping the last mesh" } else { "unready until its first state" }
        );
    } else {
        tracing::info!(address, ?retry_in, "the control plane's stream ended: {error}");
    }
}

/// The node of this client, in ztunnel's form.
pub(super) fn node(settings: &Settings, xds: &XdsSettings) -> Node {
    let XdsSettings { name, namespace, cluster_id, .. } = xds;
    let mut facts = vec![
        ("NAME", name.as_str()),
        ("NAMESPACE", namespace.as_str()),
        ("INSTANCE_IPS", ADDRESS),
        ("CLUSTER_ID", cluster_id.as_str()),
    ];
    facts.extend(settings.node.name.as_deref().map(|node| ("NODE_NAME", node)));
    let fields = facts
        .into_iter()
        .map(|(key, value)| (key.to_owned(), MetadataValue { text: Some(value.to_owned()) }));
    Node {
        id: format!("ztunnel~{ADDRESS}~{name}.{namespace}~{namespace}.svc.cluster.local"),
        metadata: Some(Metadata { fields: fields.collect() }),
    }
}

/// The workloads of this process.
pub(crate) fn local(settings: &Settings) -> LocalWorkloads {
    let own = &settings.workload;
    let is_node = settings.node.pods.is_some();
    let named = (!is_node).then(|| (own.namespace.clone(), own.name.clone()));
    LocalWorkloads { node: settings.node.name.clone().filter(|_| is_node), named }
}

#[cfg(test)]
mod tests;
