//! The status as text, within 80 columns. Long lists are cut.

use crate::admin::api::connection::Connection;
use crate::admin::api::status::{
    Connections, ControlPlane, DnsFailure, Failure, Identity, InboundTunnels, Mesh,
    OutboundTunnels, Pod, Problem, Rules, Status,
};
use crate::cli::connections::text::{parties, time};
use crate::cli::layout::{age, bytes, count, hint_lines, indented, milliseconds, wrapped};
use crate::cli::style::{Colour, Style};

/// The maximum number of entries of a list.
const MAX_ENTRIES: usize = 8;
/// The columns of the names of the parts.
const INDENT: usize = 14;

/// One screen.
pub(super) fn screen(status: &Status, style: Style) -> String {
    let mut text = head(status, style);
    text += &problems(&status.problems, '!', Colour::Red, style);
    text += &problems(&status.notices, '-', Colour::Yellow, style);
    text.push('\n');
    text += &status.identities.iter().take(MAX_ENTRIES).map(identity).collect::<String>();
    text += &more("Certificates", status.identities.len());
    text += &status.rules.as_ref().map(rules).unwrap_or_default();
    text += &mesh(&status.mesh);
    text += &connections(&status.connections);
    text += &part("Tunnels", &tunnels(status));
    let Status { tunnels, failures, pods, .. } = status;
    text += &list("Tunnels to peers", &tunnels.outbound, outbound);
    text += &list("Tunnels of peers", &tunnels.inbound, inbound);
    let heading = format!("Failures in the last {} minutes", failures.minutes);
    text += &list(&heading, &failures.connections, failure);
    text += &list("DNS names that failed", &failures.dns, dns);
    text += &list("Oldest connections", &status.connections.oldest, oldest);
    text += &pods_text(pods);
    text
}

fn head(status: &Status, style: Style) -> String {
    let Status { name, command, version, pid, uptime_seconds, problems, .. } = status;
    let verdict = match problems.len() {
        0 => style.paint(Colour::Green, "healthy"),
        number => style.paint(Colour::Red, &count(number, "problem")),
    };
    let name = if name.is_empty() { "node" } else { name };
    let uptime = age(*uptime_seconds);
    let head =
        format!("{name}: {verdict}\nunderpass {command} {version}, pid {pid}, up for {uptime}\n");
    if status.readiness == "ready" { head } else { head + &wrapped("", 2, &status.readiness) }
}

/// Problems or notices, with this mark.
fn problems(problems: &[Problem], mark: char, colour: Colour, style: Style) -> String {
    let mut text = String::new();
    for Problem { part, pod, problem, hint } in problems.iter().take(MAX_ENTRIES) {
        let about = pod.as_deref().unwrap_or_else(|| part.text());
        let mark = style.paint(colour, &mark.to_string());
        text += &wrapped(&format!("{mark} "), 2, &format!("{about}: {problem}"));
        text += &hint_lines(2, hint.as_deref());
    }
    let what = if mark == '!' { "problems" } else { "notices" };
    text + &more(what, problems.len())
}

/// A part with its name before it.
fn part(name: &str, text: &str) -> String {
    wrapped(&format!("{name:INDENT$}"), INDENT, text)
}

/// A heading and the entries of a list; nothing without entries.
fn list<T>(heading: &str, entries: &[T], entry: impl Fn(&T) -> String) -> String {
    if entries.is_empty() {
        return String::new();
    }
    let shown: String = entries.iter().take(MAX_ENTRIES).map(entry).collect();
    format!("\n{heading}\n{shown}{}", more("", entries.len()))
}

/// The number of entries that are left out.
fn more(what: &str, all: usize) -> String {
    match all.saturating_sub(MAX_ENTRIES) {
        0 => String::new(),
        left => format!("  ... and {left} more {what}").trim_end().to_owned() + "\n",
    }
}

fn identity(Identity { spiffe_id, state, expires_in_seconds, .. }: &Identity) -> String {
    let when = match expires_in_seconds {
        Some(left @ 0..) => format!(", expires in {}", age(left.unsigned_abs())),
        Some(passed) => format!(" {} ago", age(passed.unsigned_abs())),
        None => String::new(),
    };
    part("Certificate", &format!("{spiffe_id}: {state}{when}"))
}

fn rules(Rules { profile, state, self_test, foreign, repairs, .. }: &Rules) -> String {
    let foreign = match foreign {
        0 => String::new(),
        _ => format!(", {} of other programs before them", count(*foreign, "rule")),
    };
    let repairs = match repairs {
        0 => String::new(),
        _ => format!(", repairs: {repairs}"),
    };
    part("Rules", &format!("{profile}: {state}, self-test {self_test}{foreign}{repairs}"))
}

fn mesh(mesh: &Mesh) -> String {
    let Mesh { generation, workloads, services, policies, file, control_plane } = mesh;
    let policies = match policies {
        1 => "1 policy".to_owned(),
        policies => format!("{policies} policies"),
    };
    let (workloads, services) = (count(*workloads, "workload"), count(*services, "service"));
    let size = format!("generation {generation}: {workloads}, {services}, {policies}");
    let from = file.as_deref().map(|file| format!(", file {file}")).unwrap_or_default();
    let mut text = part("Mesh", &format!("{size}{from}"));
    if let Some(ControlPlane { address, connected, for_seconds, error }) = control_plane {
        let state = if *connected { "connected" } else { "not connected" };
        let error = error.as_deref().map(|error| format!(": {error}")).unwrap_or_default();
        let state = format!("{address}: {state} for {}{error}", age(*for_seconds));
        text += &part("Control plane", &state);
    }
    text
}

fn connections(connections: &Connections) -> String {
    let Connections { outbound_hbone, outbound_tcp, inbound_hbone, inbound_tcp, opening, .. } =
        connections;
    let text = format!(
        "outbound: {outbound_hbone} HBONE, {outbound_tcp} TCP; inbound: {inbound_hbone} HBONE, \
         {inbound_tcp} TCP; {opening} being opened"
    );
    part("Connections", &text)
}

fn tunnels(status: &Status) -> String {
    let outbound = &status.tunnels.outbound;
    let to: usize = outbound.iter().map(|peer| peer.tunnels).sum();
    let peers = outbound.iter().filter(|peer| peer.tunnels > 0).count();
    let of: usize = status.tunnels.inbound.iter().map(|peer| peer.tunnels).sum();
    let clients = count(status.tunnels.inbound.len(), "peer");
    format!("{to} to {}, {of} of {clients}", count(peers, "peer"))
}

fn outbound(peer: &OutboundTunnels) -> String {
    let OutboundTunnels { address, identities, tunnels, streams, dialing, error, hint, .. } = peer;
    let address = address.map(|address| address.to_string()).unwrap_or_default();
    let mut state = vec![count(*tunnels, "tunnel"), count(*streams, "stream")];
    if *dialing > 0 {
        state.push(format!("{dialing} being opened"));
    }
    let state = state.join(", ");
    let mut text = wrapped("  ", 4, &format!("{address}: {state}; {}", identities.join(" or ")));
    if let Some(error) = error {
        text += &indented(4, &format!("not attempted at present: {error}"));
    }
    text + &hint_lines(4, hint.as_deref())
}

fn inbound(peer: &InboundTunnels) -> String {
    let InboundTunnels { identity, addresses, tunnels, oldest_seconds, .. } = peer;
    let (tunnels, oldest) = (count(*tunnels, "tunnel"), age(*oldest_seconds));
    let mut from = addresses.iter().take(3).map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if addresses.len() > 3 {
        from.push_str(", ...");
    }
    wrapped("  ", 4, &format!("{identity}: {tunnels} from {from}, the oldest for {oldest}"))
}

fn failure(Failure { reason, count, last }: &Failure) -> String {
    let mut text = format!("  {count:6} {reason}\n");
    let Some(last) = last else { return text };
    let Connection { error, hint, .. } = &**last;
    text += &indented(9, &format!("last at {}: {}", time(last), parties(last)));
    if let Some(error) = error {
        text += &indented(9, error);
    }
    text + &hint_lines(9, hint.as_deref())
}

fn dns(failure: &DnsFailure) -> String {
    let DnsFailure { pod, name, kind, reason, count, last_seconds_ago, error, hint } = failure;
    let error = error.as_deref().map(|error| format!(": {error}")).unwrap_or_default();
    let ago = age(*last_seconds_ago);
    let head = format!("  {count:6} ");
    let text = wrapped(&head, 9, &format!("{name} {kind}, pod {pod}, {ago} ago, {reason}{error}"));
    text + &hint_lines(9, hint.as_deref())
}

fn oldest(connection: &Connection) -> String {
    let Connection { direction, protocol, duration_ms, bytes_sent, bytes_received, .. } =
        connection;
    let open = milliseconds(duration_ms.unwrap_or_default());
    let moved = bytes(bytes_sent.saturating_add(*bytes_received));
    let parties = parties(connection);
    wrapped("  ", 4, &format!("{open} {direction} {protocol} {parties}, {moved}"))
}

fn pods_text(pods: &[Pod]) -> String {
    if pods.is_empty() {
        return String::new();
    }
    let serving = pods.iter().filter(|pod| pod.is_serving()).count();
    let others: Vec<_> = pods.iter().filter(|pod| !pod.is_serving()).collect();
    let text = list("Pods that are not served, or have a problem", &others, |pod| {
        wrapped("  ", 4, &pod.to_string())
    });
    format!("\n{:INDENT$}{} served of {}\n{text}", "Pods", serving, pods.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::api::states::{Part, PodState};
    use crate::admin::api::status::{Failures, Tunnels};
    use crate::cli::layout::WIDTH;

    fn pod(name: &str, state: PodState, detail: Option<&str>) -> Pod {
        Pod {
            uid: "6f1b".to_owned(),
            pod: format!("shop/{name}"),
            state,
            for_seconds: (state == PodState::Pending).then_some(12),
            detail: detail.map(str::to_owned),
            ..Pod::default()
        }
    }

    fn status() -> Status {
        let problem = Problem {
            part: Part::ControlPlane,
            problem: "no stream to the control plane https://istiod:15012: ".to_owned()
                + &"cause: ".repeat(20),
            hint: Some("check that istiod answers".to_owned()),
            ..Problem::default()
        };
        let failure = Failure { reason: "connect".to_owned(), count: 3, last: None };
        let peer = OutboundTunnels {
            address: Some(([10, 0, 0, 2], 15008).into()),
            identities: vec!["spiffe://td/ns/shop/sa/api".to_owned()],
            tunnels: 1,
            streams: 2,
            ..OutboundTunnels::default()
        };
        Status {
            name: "node-a".to_owned(),
            command: "node".to_owned(),
            readiness: "ready".to_owned(),
            problems: vec![problem],
            pods: vec![
                pod("web", PodState::Serving, None),
                pod("api", PodState::Pending, Some("enrolling")),
            ],
            tunnels: Tunnels { outbound: vec![peer; 20], inbound: Vec::new() },
            failures: Failures { minutes: 5, connections: vec![failure], dns: Vec::new() },
            ..Status::default()
        }
    }

    #[test]
    fn screen_names_problems_first_and_cuts_long_lists() {
        let text = screen(&status(), Style::plain());
        assert!(text.starts_with("node-a: 1 problem\nunderpass node "), "{text}");
        assert!(text.contains("\n! control plane: no stream to the control plane"), "{text}");
        assert!(text.contains("\n  hint: check that istiod answers\n"), "{text}");
        assert!(text.contains("\n  ... and 12 more\n"), "{text}");
        assert!(text.contains("Failures in the last 5 minutes\n       3 connect\n"), "{text}");
        let pods = "Pods          1 served of 2\n\nPods that are not served, or have a problem\n  \
                    shop/api 6f1b pending for 12 s: enrolling\n";
        assert!(text.ends_with(pods), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
    }

    #[test]
    fn screen_of_healthy_proxy_is_short() {
        let healthy = Status { readiness: "ready".to_owned(), ..Status::default() };
        let text = screen(&healthy, Style::plain());
        assert!(text.starts_with("node: healthy\n") && text.lines().count() < 8, "{text}");
    }
}
