//! A connection as text, within 80 columns.

use std::fmt::Write as _;

use crate::admin::api::connection::{Connection, End, State, Verdict};
use crate::cli::layout::{bytes, hint_lines, indented, milliseconds};
use crate::cli::style::{Colour, Style};

/// The columns before the lines that follow the first one.
const INDENT: usize = 9;

/// One connection, on two or more lines.
pub(in crate::cli) fn entry(connection: &Connection, style: Style) -> String {
    let Connection { verdict, direction, protocol, .. } = connection;
    let colour = match verdict {
        Verdict::Allowed => Colour::Green,
        Verdict::Denied => Colour::Red,
        Verdict::Failed => Colour::Yellow,
    };
    let word = style.paint(colour, &format!("{:7}", verdict.as_str()));
    let parties = parties(connection);
    let mut text = format!("{:8} {word} {direction:8} {protocol:5} {parties}\n", time(connection));
    text += &indented(INDENT, &details(connection));
    if let Some(reason) = &connection.reason {
        let error = connection.error.as_deref().unwrap_or_default();
        text += &indented(INDENT, &format!("{reason}: {error}"));
    }
    text + &hint_lines(INDENT, connection.hint.as_deref())
}

/// The client and the destination, such as `default/client -> default/server:8080`.
pub(in crate::cli) fn parties(connection: &Connection) -> String {
    let Connection { source, destination, .. } = connection;
    let client = name(source).or_else(|| Some(source.address?.to_string()));
    let server = match (name(destination), destination.address) {
        (Some(name), Some(address)) => Some(format!("{name}:{}", address.port())),
        (None, Some(address)) => Some(address.to_string()),
        (name, None) => name,
    };
    let unknown = || "unknown".to_owned();
    format!("{} -> {}", client.unwrap_or_else(unknown), server.unwrap_or_else(unknown))
}

/// The workload of one end. One that is only claimed is marked.
fn name(end: &End) -> Option<String> {
    let (namespace, workload) = (end.namespace.as_deref(), end.workload.as_deref());
    let name = match (namespace, workload) {
        (Some(namespace), Some(workload)) => format!("{namespace}/{workload}"),
        (Some(namespace), None) => format!("{namespace}/"),
        (None, workload) => workload?.to_owned(),
    };
    Some(if end.is_claimed { format!("{name} (unproven)") } else { name })
}

/// The time of day in UTC of the last event.
pub(in crate::cli) fn time(connection: &Connection) -> &str {
    let time = connection.ended.as_deref().unwrap_or(&connection.started);
    time.get(11..19).unwrap_or("now")
}

fn details(connection: &Connection) -> String {
    let Connection { state, bytes_sent, bytes_received, .. } = connection;
    let mut text = state.as_str().to_owned();
    if let Some(duration) = connection.duration_ms {
        let word = if *state == State::Open { "for" } else { "after" };
        write!(text, " {word} {}", milliseconds(duration)).ok();
    }
    if let Some(first_byte) = connection.first_byte_ms {
        write!(text, ", first byte after {}", milliseconds(first_byte)).ok();
    }
    if let State::Open | State::Closed = state {
        let (sent, received) = (bytes(*bytes_sent), bytes(*bytes_received));
        write!(text, ", {received} from the client, {sent} to it").ok();
    }
    if let Some(service) = &connection.service {
        write!(text, ", service {service}").ok();
    }
    if let Some(policy) = &connection.policy {
        write!(text, ", policy {policy}").ok();
    }
    if let Some(address) = connection.hbone_address {
        write!(text, ", tunnel at {address}").ok();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::layout::WIDTH;

    fn end(address: &str, workload: Option<&str>) -> End {
        End {
            address: Some(address.parse().unwrap()),
            workload: workload.map(str::to_owned),
            namespace: workload.map(|_| "default".to_owned()),
            ..End::default()
        }
    }

    fn denied() -> Connection {
        Connection {
            state: State::Failed,
            started: "2026-11-30T18:40:00Z".to_owned(),
            ended: Some("2026-11-30T18:40:01Z".to_owned()),
            direction: "inbound".to_owned(),
            protocol: "hbone".to_owned(),
            verdict: Verdict::Denied,
            policy: Some("default/deny-client".to_owned()),
            reason: Some("policy_denied".to_owned()),
            error: Some("explicitly denied by: default/deny-client".to_owned()),
            hint: Some("change the policy if the connection should be allowed".to_owned()),
            source: end("10.0.0.1:40000", Some("client")),
            destination: end("10.0.0.2:8080", Some("server")),
            duration_ms: Some(1.25),
            ..Connection::default()
        }
    }

    #[test]
    fn denied_connection_is_shown_with_policy_reason_and_hint() {
        assert_eq!(
            entry(&denied(), Style::plain()),
            "18:40:01 denied  inbound  hbone default/client -> default/server:8080
         failed after 1.2 ms, policy default/deny-client
         policy_denied: explicitly denied by: default/deny-client
         hint: change the policy if the connection should be allowed
"
        );
    }

    #[test]
    fn open_connection_is_shown_with_bytes_and_times() {
        let open = Connection {
            state: State::Open,
            verdict: Verdict::Allowed,
            direction: "outbound".to_owned(),
            ended: None,
            policy: None,
            reason: None,
            error: None,
            hint: None,
            source: End { is_claimed: true, ..end("10.0.0.1:40000", Some("client")) },
            destination: end("[fd00::2]:8080", None),
            bytes_sent: 1500,
            bytes_received: 7,
            first_byte_ms: Some(12.0),
            duration_ms: Some(65_000.0),
            service: Some("api.default.svc.cluster.local".to_owned()),
            hbone_address: Some("10.0.0.2:15008".parse().unwrap()),
            ..denied()
        };
        assert_eq!(
            entry(&open, Style::plain()),
            "18:40:00 allowed outbound hbone default/client (unproven) -> [fd00::2]:8080
         open for 1 min, first byte after 12 ms, 7 B from the client, 1.5 kB to
         it, service api.default.svc.cluster.local, tunnel at 10.0.0.2:15008
"
        );
    }

    #[test]
    fn lines_of_an_entry_fit_the_width() {
        let long = Connection { error: Some("cause: ".repeat(40)), ..denied() };
        let text = entry(&long, Style::plain());
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
    }
}
