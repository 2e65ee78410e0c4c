//! Compares the evaluation of plans with the kernel, for random settings and packets.
//!
//! Each packet opens a connection or is a datagram, and passes installed rules. The test compares
//! receiver, original destination or rejection, and the counters of all nat rules.
//!
//! A failure prints its seed; `UNDERPASS_WALK_SEED=N` repeats it.

mod network;
mod random;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use libtest_mimic::Failed;
use tokio::sync::mpsc::UnboundedReceiver;
use underpass_config::{InterceptionSettings, Profile};
use underpass_interception::{
    ConntrackState, Entered, Entry, Environment, Interception, NamespaceAccess, PROXY_MARK, Packet,
    Protocol, ReplyOutcome, RulePlan, Table, Verdict, Walk,
};

use crate::Case;
use crate::pod::{DEADLINE, equal, inside, runtime, settings};
use network::{Arrival, Network, Outcome, Position};
use random::Random;

pub(crate) const CASES: &[Case] = &[
    ("the kernel agrees with the evaluation (ambient)", || {
        compare(Profile::Ambient, "walk-ambient")
    }),
    ("the kernel agrees with the evaluation (sidecar)", || {
        compare(Profile::Sidecar, "walk-sidecar")
    }),
    ("the kernel agrees with the evaluation (osm)", || compare(Profile::Osm, "walk-osm")),
    (
        "a redirected connection from a client's address gets no reply over IPv4",
        reply_to_redirected_client_address_is_lost,
    ),
];

/// The number of random settings per profile.
const ROUNDS: usize = 12;
const PACKETS: usize = 12;
/// The time for which a dropped packet must have no effect. Less than a second, after which the
/// kernel retransmits the SYN. Nat would count that SYN too if a RST had removed the conntrack
/// entry of the first one.
const DROPPED_PACKET_WAIT: Duration = Duration::from_millis(500);

/// A packet and the namespace that sends it.
#[derive(Debug, Clone)]
pub(crate) struct Attempt {
    from: Position,
    packet: Packet,
}

fn compare(profile: Profile, name: &str) -> Result<(), Failed> {
    let seed = seed();
    let mut random = Random::new(seed, network::can_change_user());
    let network = Network::new(name)?;
    runtime()?.block_on(async {
        let mut arrivals = network.listen()?;
        for round in 0..ROUNDS {
            let settings = random.settings(profile);
            let failed = |error: Failed| {
                let message = error.message().unwrap_or_default().to_owned();
                let which = format!("UNDERPASS_WALK_SEED={seed}, round {round}");
                Failed::from(format!("{message}\n{which}\n{settings:#?}"))
            };
            let mut installed = Installed::new(&network, &settings).map_err(failed)?;
            for _ in 0..PACKETS {
                let routes = installed.plan().routes();
                let attempt = random.attempt(&settings, &installed.environment, routes);
                installed.attempt(&network, &attempt, &mut arrivals).await.map_err(failed)?;
            }
            installed.remove(&network).map_err(failed)?;
        }
        Ok(())
    })
}

/// With Istio's TPROXY rules, DNS capture also redirects the proxy's connection from a client's
/// address to port 53. The kernel can send its reply only over IPv6, from ::1.
fn reply_to_redirected_client_address_is_lost() -> Result<(), Failed> {
    let network = Network::new("walk-answers")?;
    let settings = settings("profile=sidecar exact=true inbound.mode=tproxy dns=capture");
    runtime()?.block_on(async {
        let mut arrivals = network.listen()?;
        let mut installed = Installed::new(&network, &settings)?;
        let ends = network::POD.into_iter().zip(network::REMOTE).take(2);
        for (source_port, (pod, client)) in (20000..).zip(ends) {
            let entry = Entry::Out { interface: "lo".to_owned(), uid: 0, gid: 0 };
            let packet = Packet {
                protocol: Protocol::Tcp,
                source: SocketAddr::new(client, source_port),
                destination: SocketAddr::new(pod, 53),
                entry,
                state: ConntrackState::New,
                mark: PROXY_MARK,
                connection_mark: 0,
            };
            let walk = installed.plan().walk(&packet, &installed.environment);
            let reply = installed.plan().reply(&packet, &walk, &installed.environment);
            let expected =
                if pod.is_ipv4() { ReplyOutcome::Unroutable } else { ReplyOutcome::Delivered };
            equal("the end", walk.end, Verdict::Redirected(network::PORTS.dns))?;
            equal("the reply", reply, Some(expected))?;
            let attempt = Attempt { from: Position::Pod, packet };
            installed.attempt(&network, &attempt, &mut arrivals).await?;
        }
        installed.remove(&network)
    })
}

/// Installed rules, and their counters so far.
struct Installed {
    interception: Interception,
    environment: Environment,
    counted: BTreeMap<String, u64>,
}

impl Installed {
    fn new(network: &Network, settings: &InterceptionSettings) -> Result<Self, Failed> {
        let interception = inside(&network.pod, async || {
            let prepared =
                Interception::prepare(&NamespaceAccess::current()?, settings, network::PORTS)
                    .await?;
            let interception = prepared.ok_or("the profile has rules")?;
            interception.install().await?;
            Ok(interception)
        })?;
        let environment =
            network.pod.run(|| Ok::<_, Failed>(Environment::of(&Entered::current()?)?))??;
        let counted = BTreeMap::new();
        let mut installed = Self { interception, environment, counted };
        installed.counted = installed.count(network)?;
        Ok(installed)
    }

    fn remove(self, network: &Network) -> Result<(), Failed> {
        inside(&network.pod, async || Ok(self.interception.remove().await?))
    }

    fn plan(&self) -> &RulePlan {
        self.interception.plan()
    }

    /// Sends a packet, and compares the outcome.
    async fn attempt(
        &mut self,
        network: &Network,
        attempt: &Attempt,
        arrivals: &mut UnboundedReceiver<Arrival>,
    ) -> Result<(), Failed> {
        let outcome_timeout = self.outcome_timeout(&attempt.packet);
        let outcome = network.send(attempt, outcome_timeout, arrivals).await?;
        self.check(network, attempt, &outcome).map_err(|error| {
            format!("{}\n{attempt:#?}", error.message().unwrap_or_default()).into()
        })
    }

    /// The expected outcome.
    fn expected(&self, packet: &Packet) -> (Walk<'_>, Outcome) {
        let walk = self.plan().walk(packet, &self.environment);
        let reply = self.plan().reply(packet, &walk, &self.environment);
        let outcome = expected(packet, &walk, reply);
        (walk, outcome)
    }

    /// The timeout for an outcome.
    fn outcome_timeout(&self, packet: &Packet) -> Duration {
        if self.expected(packet).1 == Outcome::Lost { DROPPED_PACKET_WAIT } else { DEADLINE }
    }

    /// Reads the counters of nat rules.
    fn count(&self, network: &Network) -> Result<BTreeMap<String, u64>, Failed> {
        let counters = inside(&network.pod, async || Ok(self.interception.counters().await?))?;
        let in_nat = |id: &str| {
            let mut rules = self.plan().rules().iter();
            rules.any(|rule| rule.id == id && rule.chain.table == Table::Nat)
        };
        let counters = counters.into_iter().filter(|counter| in_nat(&counter.id));
        Ok(counters.map(|counter| (counter.id, counter.packets)).collect())
    }

    fn check(
        &mut self,
        network: &Network,
        attempt: &Attempt,
        outcome: &Outcome,
    ) -> Result<(), Failed> {
        let after = self.count(network)?;
        let before = std::mem::replace(&mut self.counted, after);
        let (walk, expected) = self.expected(&attempt.packet);
        let outcome = without_original(outcome, &walk, &attempt.packet);
        equal("the outcome", outcome, expected)?;
        let matches = |(id, packets): (&String, &u64)| {
            let matches = packets - before.get(id).copied().unwrap_or_default();
            (matches > 0).then(|| (id.clone(), matches))
        };
        let matches: BTreeMap<_, _> = self.counted.iter().filter_map(matches).collect();
        equal("nat rules that matched", matches, matched_rules(&walk))
    }
}

/// The number of matches of each nat rule.
fn matched_rules(walk: &Walk<'_>) -> BTreeMap<String, u64> {
    let mut matched_rules = BTreeMap::new();
    for rule in walk.rules().filter(|rule| rule.chain.table == Table::Nat) {
        *matched_rules.entry(rule.id.clone()).or_default() += 1;
    }
    matched_rules
}

/// Removes the original destination from the outcome of a packet that is not captured. It may be
/// the packet's own destination, or unknown if no rule of the family uses conntrack.
fn without_original(outcome: &Outcome, walk: &Walk<'_>, packet: &Packet) -> Outcome {
    match outcome {
        Outcome::Arrived(arrival)
            if walk.end == Verdict::Direct && arrival.original == Some(packet.destination) =>
        {
            Outcome::Arrived(Arrival { original: None, ..arrival.clone() })
        }
        outcome => outcome.clone(),
    }
}

fn expected(packet: &Packet, walk: &Walk<'_>, reply: Option<ReplyOutcome>) -> Outcome {
    let arrived = |position, port, original| Outcome::Arrived(Arrival { position, port, original });
    // A datagram arrives even if its reply does not.
    if packet.protocol == Protocol::Tcp
        && matches!(reply, Some(ReplyOutcome::Misrouted | ReplyOutcome::Unroutable))
    {
        return Outcome::Lost;
    }
    match walk.end {
        Verdict::Direct => {
            let position = if walk.local { Position::Pod } else { position_of(packet.destination) };
            arrived(position, packet.destination.port(), None)
        }
        Verdict::Redirected(port) | Verdict::Tproxied(port) => {
            // The kernel reports no original destination for datagrams.
            let tcp = packet.protocol == Protocol::Tcp;
            arrived(Position::Pod, port, tcp.then_some(packet.destination))
        }
        Verdict::Rejected => Outcome::Refused,
        Verdict::Dropped => Outcome::Lost,
    }
}

/// The namespace that has an address outside of the pod.
fn position_of(address: SocketAddr) -> Position {
    if network::VM.contains(&address.ip()) { Position::Vm } else { Position::Remote }
}

#[expect(clippy::disallowed_methods, reason = "a switch of this test alone, not a setting")]
fn seed() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    let given = std::env::var("UNDERPASS_WALK_SEED").ok();
    given.and_then(|seed| seed.parse().ok()).unwrap_or_else(|| RandomState::new().hash_one(0))
}
