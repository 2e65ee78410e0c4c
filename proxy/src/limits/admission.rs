//! Admits a connection or stream to all budgets at once, and counts it by one ticket.

use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use underpass_hbone::{Budget, ByKey, Exhausted, Sharing, SourceNetwork};

use super::Limits;
use super::balance::Load;
use super::buffers::Buffers;
use super::descriptors::{DESCRIPTORS_PER_CONNECTION, Directions, FdPermit};
use super::handshakes::{HandshakeTicket, SourceHandshakes};
use super::refusal::Refusal;

/// The kind of connection to admit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AdmissionKind {
    /// An outbound connection of the pod's applications.
    Outbound,
    /// An inbound connection in plaintext.
    Plaintext,
    /// A connection from a peer's proxy. Its streams are admitted one by one.
    Tunnel,
}

impl AdmissionKind {
    /// One accepted socket, and a dialled one unless it is a tunnel.
    fn descriptors(self) -> usize {
        match self {
            Self::Outbound | Self::Plaintext => DESCRIPTORS_PER_CONNECTION,
            Self::Tunnel => 1,
        }
    }

    fn direction(self) -> Direction {
        match self {
            Self::Outbound => Direction::Outbound,
            Self::Plaintext | Self::Tunnel => Direction::Inbound,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Direction {
    Outbound,
    Inbound,
}

/// The budgets of one pod. Clones share the counts.
#[derive(Debug, Clone)]
pub(crate) struct PodLimits(Arc<PodLimitsState>);

#[derive(Debug)]
struct PodLimitsState {
    node: Arc<Limits>,
    descriptors: Directions,
    buffers: Buffers,
    sources: ByKey<(Direction, SourceNetwork), SourceBudgets>,
}

/// The budgets of one source address, kept while it has connections.
#[derive(Debug)]
struct SourceBudgets {
    node: Arc<Limits>,
    address: IpAddr,
    connections: Budget,
    descriptors: Budget,
    tunnels: Budget,
    handshakes: OnceLock<SourceHandshakes>,
}

/// Counts one connection or stream in all of its budgets until it is dropped.
#[derive(Debug)]
pub(crate) struct Ticket {
    budgets: Arc<SourceBudgets>,
    load: Option<Load>,
    connections: usize,
    descriptors: usize,
    tunnels: usize,
}

impl Limits {
    /// Creates the budgets of a pod.
    pub(crate) fn pod(&self) -> PodLimits {
        PodLimits(Arc::new(PodLimitsState {
            descriptors: self.descriptors.of_pod(),
            buffers: self.buffers.of_pod(),
            sources: ByKey::default(),
            node: Arc::new(self.clone()),
        }))
    }
}

impl PodLimits {
    pub(crate) fn buffers(&self) -> &Buffers {
        &self.0.buffers
    }

    /// Whether descriptors are free for a connection of a new source.
    pub(crate) fn has_room(&self, kind: AdmissionKind) -> bool {
        self.descriptors(kind).free() >= DESCRIPTORS_PER_CONNECTION
    }

    /// Waits until descriptors are free for a connection of a new source.
    pub(crate) async fn wait_for_room(&self, kind: AdmissionKind) {
        self.0.node.descriptors.freed(|| self.has_room(kind)).await;
    }

    /// Counts the descriptor of the TCP connection below an outbound tunnel.
    pub(crate) fn hold_outbound(&self) -> FdPermit {
        self.0.node.descriptors.hold(&self.0.descriptors.outbound, 1)
    }

    /// Admits a connection from `source` to `peer`, and assigns it to the least loaded worker or to
    /// one with a tunnel to `peer`.
    ///
    /// # Errors
    /// The exceeded limit.
    pub(crate) fn admit(
        &self,
        kind: AdmissionKind,
        source: IpAddr,
        peer: Option<IpAddr>,
    ) -> Result<Ticket, Refusal> {
        let key = (kind.direction(), SourceNetwork::of(source));
        let mut ticket =
            Ticket::new(self.0.sources.get(key, || self.source_budgets(key.0, source)));
        ticket.take_connection()?;
        if kind == AdmissionKind::Tunnel {
            ticket.take_tunnel()?;
        }
        match ticket.take_descriptors(kind.descriptors()) {
            // Descriptors were free when the listener accepted, but another listener may have taken
            // them since.
            Err(Exhausted::Whole) => ticket.hold_descriptors(kind.descriptors()),
            Err(Exhausted::Share) => return Err(Refusal::DescriptorShare(source)),
            Ok(()) => {}
        }
        let load = self.0.node.balance.assign(peer);
        ticket.load = Some(load.ok_or(Refusal::Worker)?);
        Ok(ticket)
    }

    /// Admits a connection at `source` from another pod of the process. It is served by `worker`
    /// and counts like a stream of a tunnel.
    ///
    /// # Errors
    /// The exceeded limit.
    pub(crate) fn admit_delivery(&self, source: IpAddr, worker: usize) -> Result<Ticket, Refusal> {
        let key = (Direction::Inbound, SourceNetwork::of(source));
        Ticket::of_stream(self.0.sources.get(key, || self.source_budgets(key.0, source)), worker)
    }

    fn source_budgets(&self, direction: Direction, address: IpAddr) -> SourceBudgets {
        let node = &self.0.node;
        // All applications of the pod are one source, which the budget of the direction limits.
        let (descriptors, sharing) = match direction {
            Direction::Outbound => (&self.0.descriptors.outbound, Sharing::Greedy),
            Direction::Inbound => (&self.0.descriptors.inbound, Sharing::UnknownParts),
        };
        SourceBudgets {
            node: node.clone(),
            address,
            connections: Budget::part(&node.connections, node.connections_per_source, sharing),
            descriptors: Budget::part(descriptors, usize::MAX, sharing),
            tunnels: Budget::new(node.tunnels_per_source),
            handshakes: OnceLock::new(),
        }
    }

    fn descriptors(&self, kind: AdmissionKind) -> &Budget {
        match kind.direction() {
            Direction::Outbound => &self.0.descriptors.outbound,
            Direction::Inbound => &self.0.descriptors.inbound,
        }
    }
}

impl Ticket {
    fn new(budgets: Arc<SourceBudgets>) -> Self {
        Self { budgets, load: None, connections: 0, descriptors: 0, tunnels: 0 }
    }

    /// The source address of the connection.
    pub(crate) fn source(&self) -> IpAddr {
        self.budgets.address
    }

    /// The worker that serves the connection.
    pub(crate) fn worker(&self) -> usize {
        self.load.as_ref().map(Load::worker).unwrap_or_default()
    }

    /// Moves the connection to another worker than the assigned one.
    ///
    /// # Errors
    /// That worker is at its limit.
    pub(crate) fn move_to(&mut self, worker: usize) -> Result<(), Refusal> {
        let load = self.budgets.node.balance.load(worker);
        self.load = Some(load.ok_or(Refusal::Worker)?);
        Ok(())
    }

    /// Admits a stream of this ticket's tunnel, on the tunnel's worker.
    ///
    /// # Errors
    /// The exceeded limit.
    pub(crate) fn stream(&self) -> Result<Self, Refusal> {
        Self::of_stream(self.budgets.clone(), self.worker())
    }

    fn of_stream(budgets: Arc<SourceBudgets>, worker: usize) -> Result<Self, Refusal> {
        let mut stream = Self::new(budgets);
        stream.take_connection()?;
        stream.move_to(worker)?;
        stream.take_descriptors(1).map_err(|exhausted| match exhausted {
            Exhausted::Share => Refusal::DescriptorShare(stream.budgets.address),
            Exhausted::Whole => {
                stream.budgets.node.descriptors.record_refused_stream();
                Refusal::Descriptors
            }
        })?;
        Ok(stream)
    }

    /// Waits for the connection's turn to handshake. Calls `on_wait` if it has to wait. Returns
    /// `None` if its source has too many handshakes, including waiting ones.
    pub(crate) async fn handshake(&self, on_wait: impl FnOnce()) -> Option<HandshakeTicket> {
        let node = &self.budgets.node.handshakes;
        let of_source = self.budgets.handshakes.get_or_init(|| node.of_source());
        node.admit(self.budgets.address, of_source, on_wait).await
    }

    /// Records that the source was disconnected for exceeding a limit of its tunnel.
    pub(crate) fn penalize(&self) {
        self.budgets.node.handshakes.penalize(self.budgets.address);
    }

    /// Releases one descriptor.
    pub(crate) fn release_descriptor(&mut self) {
        if self.descriptors > 0 {
            self.descriptors -= 1;
            self.give_back_descriptors(1);
        }
    }

    fn take_connection(&mut self) -> Result<(), Refusal> {
        let SourceBudgets { address, connections, node, .. } = &*self.budgets;
        connections.take(1).map_err(|exhausted| match exhausted {
            Exhausted::Whole => Refusal::Worker,
            Exhausted::Share if connections.used() >= node.connections_per_source => {
                Refusal::Source(*address)
            }
            Exhausted::Share => Refusal::ConnectionShare(*address),
        })?;
        self.connections += 1;
        Ok(())
    }

    fn take_tunnel(&mut self) -> Result<(), Refusal> {
        let SourceBudgets { address, tunnels, .. } = &*self.budgets;
        tunnels.take(1).map_err(|_| Refusal::TunnelSource(*address))?;
        self.tunnels += 1;
        Ok(())
    }

    fn take_descriptors(&mut self, count: usize) -> Result<(), Exhausted> {
        self.budgets.descriptors.take(count)?;
        self.descriptors += count;
        Ok(())
    }

    fn hold_descriptors(&mut self, count: usize) {
        self.budgets.descriptors.take_beyond_limit(count);
        self.descriptors += count;
    }

    fn give_back_descriptors(&self, count: usize) {
        self.budgets.node.descriptors.give_back(&self.budgets.descriptors, count);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.budgets.connections.give_back(self.connections);
        if self.tunnels > 0 {
            self.budgets.tunnels.give_back(self.tunnels);
        }
        self.give_back_descriptors(self.descriptors);
    }
}

#[cfg(test)]
mod tests;
