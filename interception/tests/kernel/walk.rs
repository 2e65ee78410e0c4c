//! The walk against the kernel: random settings, random packets, and what really became of them.
//!
//! Each packet opens a connection (or is a datagram) through installed rules. Compared are who got
//! it, what it says that its destination was, or that it was refused; and the counters of all nat
//! rules.
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
    Answer, End, Entered, Environment, Interception, NamespaceAccess, PROXY_MARK, Packet, Protocol,
    RulePlan, State, Table, Walk, Way,
};

use crate::Case;
use crate::pod::{DEADLINE, equal, inside, runtime, settings};
use network::{Arrival, Network, Outcome, Place};
use random::Random;

pub(crate) const CASES: &[Case] = &[
    ("the kernel does what the walk says (ambient)", || compare(Profile::Ambient, "walk-ambient")),
    ("the kernel does what the walk says (sidecar)", || compare(Profile::Sidecar, "walk-sidecar")),
    ("the kernel does what the walk says (osm)", || compare(Profile::Osm, "walk-osm")),
    ("what imitates a client and is redirected has no answer in IPv4", unanswered),
];

/// How many random settings each profile gets, and how many packets each of those.
const ROUNDS: usize = 12;
const PACKETS: usize = 12;
/// How long nothing must come of what is lost: less than the second after which the kernel sends a SYN
/// again. Nat would count that one too where a reset has ended the first one's entry.
const QUIET: Duration = Duration::from_millis(500);

/// A packet to send, and from where.
#[derive(Debug, Clone)]
pub(crate) struct Attempt {
    from: Place,
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
            let told = |error: Failed| {
                let message = error.message().unwrap_or_default().to_owned();
                let which = format!("UNDERPASS_WALK_SEED={seed}, round {round}");
                Failed::from(format!("{message}\n{which}\n{settings:#?}"))
            };
            let mut installed = Installed::new(&network, &settings).map_err(told)?;
            for _ in 0..PACKETS {
                let routes = installed.plan().routes();
                let attempt = random.attempt(&settings, &installed.environment, routes);
                installed.attempt(&network, &attempt, &mut arrivals).await.map_err(told)?;
            }
            installed.remove(&network).map_err(told)?;
        }
        Ok(())
    })
}

/// By Istio's TPROXY rules, what the proxy opens in a client's name is caught by DNS capture like any other
/// connection to port 53; of the two answers, the kernel sends the one from ::1 only.
fn unanswered() -> Result<(), Failed> {
    let network = Network::new("walk-answers")?;
    let settings = settings("profile=sidecar exact=true inbound.mode=tproxy dns=capture");
    runtime()?.block_on(async {
        let mut arrivals = network.listen()?;
        let mut installed = Installed::new(&network, &settings)?;
        let ends = network::POD.into_iter().zip(network::REMOTE).take(2);
        for (source_port, (pod, client)) in (20000..).zip(ends) {
            let way = Way::Out { interface: "lo".to_owned(), uid: 0, gid: 0 };
            let packet = Packet {
                protocol: Protocol::Tcp,
                source: SocketAddr::new(client, source_port),
                destination: SocketAddr::new(pod, 53),
                way,
                state: State::New,
                mark: PROXY_MARK,
                connection_mark: 0,
            };
            let walk = installed.plan().walk(&packet, &installed.environment);
            let answer = installed.plan().answer(&packet, &walk, &installed.environment);
            let expected = if pod.is_ipv4() { Answer::Unroutable } else { Answer::Returns };
            equal("the end", walk.end, End::Redirected(network::PORTS.dns))?;
            equal("the answer", answer, Some(expected))?;
            let attempt = Attempt { from: Place::Pod, packet };
            installed.attempt(&network, &attempt, &mut arrivals).await?;
        }
        installed.remove(&network)
    })
}

/// Rules that are installed, and their counters so far.
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

    /// Sends a packet, and compares what became of it.
    async fn attempt(
        &mut self,
        network: &Network,
        attempt: &Attempt,
        arrivals: &mut UnboundedReceiver<Arrival>,
    ) -> Result<(), Failed> {
        let patience = self.patience(&attempt.packet);
        let outcome = network.send(attempt, patience, arrivals).await?;
        self.check(network, attempt, &outcome).map_err(|error| {
            format!("{}\n{attempt:#?}", error.message().unwrap_or_default()).into()
        })
    }

    /// What the walk and its answer say.
    fn expected(&self, packet: &Packet) -> (Walk<'_>, Outcome) {
        let walk = self.plan().walk(packet, &self.environment);
        let answer = self.plan().answer(packet, &walk, &self.environment);
        let outcome = expected(packet, &walk, answer);
        (walk, outcome)
    }

    /// How long to wait for an outcome.
    fn patience(&self, packet: &Packet) -> Duration {
        if self.expected(packet).1 == Outcome::Lost { QUIET } else { DEADLINE }
    }

    /// The counters of nat's rules.
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
        let outcome = plain(outcome, &walk, &attempt.packet);
        equal("what became of it", outcome, expected)?;
        let moved = |(id, packets): (&String, &u64)| {
            let moved = packets - before.get(id).copied().unwrap_or_default();
            (moved > 0).then(|| (id.clone(), moved))
        };
        let moved: BTreeMap<_, _> = self.counted.iter().filter_map(moved).collect();
        equal("nat rules that matched", moved, met(&walk))
    }
}

/// How often each nat rule matched.
fn met(walk: &Walk<'_>) -> BTreeMap<String, u64> {
    let mut met = BTreeMap::new();
    for rule in walk.rules().filter(|rule| rule.chain.table == Table::Nat) {
        *met.entry(rule.id.clone()).or_default() += 1;
    }
    met
}

/// An outcome without the original destination of what was not caught: right if it is the packet's,
/// and no mistake if the kernel knows none, as where no rule of the family needs conntrack.
fn plain(outcome: &Outcome, walk: &Walk<'_>, packet: &Packet) -> Outcome {
    match outcome {
        Outcome::Arrived(arrival)
            if walk.end == End::Direct && arrival.original == Some(packet.destination) =>
        {
            Outcome::Arrived(Arrival { original: None, ..arrival.clone() })
        }
        outcome => outcome.clone(),
    }
}

fn expected(packet: &Packet, walk: &Walk<'_>, answer: Option<Answer>) -> Outcome {
    let arrived = |place, port, original| Outcome::Arrived(Arrival { place, port, original });
    // A datagram needs no answer to arrive.
    if packet.protocol == Protocol::Tcp
        && matches!(answer, Some(Answer::Astray | Answer::Unroutable))
    {
        return Outcome::Lost;
    }
    match walk.end {
        End::Direct => {
            let place = if walk.local { Place::Pod } else { place_of(packet.destination) };
            arrived(place, packet.destination.port(), None)
        }
        End::Redirected(port) | End::Tproxied(port) => {
            // Of datagrams the kernel does not tell.
            let tcp = packet.protocol == Protocol::Tcp;
            arrived(Place::Pod, port, tcp.then_some(packet.destination))
        }
        End::Rejected => Outcome::Refused,
        End::Dropped => Outcome::Lost,
    }
}

/// Who has an address that is not the pod's.
fn place_of(address: SocketAddr) -> Place {
    if network::VM.contains(&address.ip()) { Place::Vm } else { Place::Remote }
}

#[expect(clippy::disallowed_methods, reason = "a switch of this test alone, not a setting")]
fn seed() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    let given = std::env::var("UNDERPASS_WALK_SEED").ok();
    given.and_then(|seed| seed.parse().ok()).unwrap_or_else(|| RandomState::new().hash_one(0))
}
