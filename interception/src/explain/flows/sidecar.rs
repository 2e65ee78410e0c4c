//! The six types of the sidecar article, and what it leaves out.

use std::net::SocketAddr;

use super::{Draft, dns, hbone, inbound, localhost, onwards, outbound, udp};
use crate::explain::scene::{Process, Scene};
use crate::explain::{Explanation, Flow, Party};
use crate::plan::Protocol;

/// The agent's merged metrics.
const METRICS: u16 = 15020;
/// Envoy's admin port.
const ADMIN: u16 = 15000;
/// Where istiod serves.
const ISTIOD: u16 = 15012;

pub(super) fn flows<'e>(explanation: &'e Explanation<'e>, scene: Scene<'e>) -> Vec<Flow<'e>> {
    let mut flows = vec![
        from_remote(explanation, scene),
        outbound(scene, "2", "The app connects to another pod", scene.app())
            .article("OUTPUT ▶ ISTIO_OUTPUT rule 9 ▶ ISTIO_REDIRECT ▶ 15001 ▶ OUTPUT ▶ ISTIO_OUTPUT rule 4")
            .flow(),
        metrics(scene),
        through_service(scene),
        to_own_address(scene),
        within_proxy(scene),
        agent(scene),
    ];
    flows.extend(agent_by_group(explanation, scene));
    flows.extend([
        hbone(explanation, scene, "HBONE")
            .note("The article is older than HBONE in sidecars.")
            .flow(),
        localhost(scene, "localhost").flow(),
        dns(explanation, scene, "DNS", Protocol::Udp),
        dns(explanation, scene, "DNS over TCP", Protocol::Tcp),
        udp(explanation, scene, "UDP").flow(),
    ]);
    flows
}

fn from_remote<'e>(explanation: &'e Explanation<'e>, scene: Scene<'e>) -> Flow<'e> {
    let draft = inbound(scene, "1", "Another pod connects to the app").article(
        "PREROUTING ▶ ISTIO_INBOUND ▶ ISTIO_IN_REDIRECT ▶ 15006 ▶ OUTPUT ▶ ISTIO_OUTPUT rule 1",
    );
    if explanation.settings.inbound.mode == underpass_config::InboundMode::Tproxy {
        return draft
            .note(
                "With TPROXY the app sees the client's own address; a mark brings its answers back to \
                 the proxy. The article is about REDIRECT.",
            )
            .answer(scene, scene.app())
            .flow();
    }
    draft
        .note(
            "The last hop comes from 127.0.0.6, by which rule 1 knows it. From any other address rule 2 \
             would lead it to the proxy again, without end.",
        )
        .flow()
}

fn metrics(scene: Scene<'_>) -> Flow<'_> {
    let to = SocketAddr::new(scene.pod(), METRICS);
    Draft::new("3", "Prometheus reads the proxy's metrics")
        .article("PREROUTING ▶ ISTIO_INBOUND (not redirected) ▶ INPUT ▶ OUTPUT ▶ ISTIO_OUTPUT rule 3")
        .note(
            "The article leads the answer through rule 3. It never gets there: nat is asked about the \
             packet that opens a connection, and that one arrived. Its ports (15002, 15090) are 15020, \
             15021 and 15090 today.",
        )
        .hop(scene.received(Party::Prometheus, scene.remote(), to, Party::Proxy))
        .answer(scene, scene.proxy())
        .flow()
}

fn through_service(scene: Scene<'_>) -> Flow<'_> {
    let service = scene.app_at_remote();
    Draft::new("4", "The app connects to a service, and the proxy chooses this very pod")
        .article(
            "OUTPUT ▶ ISTIO_OUTPUT rule 9 ▶ ISTIO_REDIRECT ▶ 15001 ▶ OUTPUT ▶ ISTIO_OUTPUT rule 2 ▶ \
             ISTIO_IN_REDIRECT ▶ 15006 ▶ OUTPUT ▶ ISTIO_OUTPUT rule 1",
        )
        .hop(scene.sent(scene.app(), service, Party::Remote))
        .hop(scene.sent(scene.proxy(), scene.app_at_pod(), Party::App))
        .hop(scene.last_hop(scene.pod()))
        .flow()
}

fn to_own_address(scene: Scene<'_>) -> Flow<'_> {
    Draft::new("4'", "The app connects to its own pod's address")
        .note("The article has only the way through a service. Without one the proxy sees nothing of it.")
        .hop(scene.sent(scene.app(), scene.app_at_pod(), Party::App))
        .flow()
}

fn within_proxy(scene: Scene<'_>) -> Flow<'_> {
    let to = SocketAddr::new(scene.localhost(), ADMIN);
    Draft::new("5", "The proxy connects to itself on localhost")
        .article("OUTPUT ▶ ISTIO_OUTPUT rule 8")
        .note(
            "The article names rule 8; rule 4 comes before it and takes all that the proxy's user sends. \
             With the default settings rules 5, 6 and 8 never match: what passes rules 3 and 4 is \
             neither on loopback nor the proxy's.",
        )
        .hop(scene.sent(scene.proxy(), to, Party::Proxy))
        .flow()
}

fn agent(scene: Scene<'_>) -> Flow<'_> {
    let agent = Process { party: Party::Agent, ..scene.proxy() };
    Draft::new("6", "The agent connects to istiod")
        .article("OUTPUT ▶ ISTIO_OUTPUT rule 9 ▶ 15001 ▶ OUTPUT ▶ ISTIO_OUTPUT rule 4")
        .note(
            "The article has it caught. It is not: the agent runs as the proxy's user, and rule 4 lets it go.",
        )
        .hop(scene.sent(agent, SocketAddr::new(scene.remote(), ISTIOD), Party::Istiod))
        .hop(onwards(scene, SocketAddr::new(scene.remote(), ISTIOD)))
        .flow()
}

fn agent_by_group<'e>(explanation: &'e Explanation<'e>, scene: Scene<'e>) -> Option<Flow<'e>> {
    let settings = explanation.settings;
    let gid = *settings.proxy_gids.first()?;
    let uid = if settings.proxy_uids.contains(&0) { scene.app().uid } else { 0 };
    let agent = Process { party: Party::Agent, uid, gid, mark: 0 };
    let to = SocketAddr::new(scene.remote(), ISTIOD);
    let title = format!("An agent of user {uid} and the proxy's group connects to istiod");
    let draft = Draft::new("6'", title).hop(scene.sent(agent, to, Party::Istiod));
    Some(draft.hop(onwards(scene, to)).flow())
}
