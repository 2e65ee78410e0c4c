//! The filter of `/connections`, by the parameters of the request.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use tokio::time::Instant;
use underpass_config::{IpNet, Quoted, parse_duration};

use super::connection::{Connection, DIRECTIONS, End, PROTOCOLS, State, Verdict};
use crate::admin::answer::Refusal;
use crate::admin::query::Query;

/// The number of connections that are listed without the parameter `last`.
const DEFAULT_LAST: usize = 1000;
/// The parameters, for the refusal of others.
const PARAMETERS: &str = "the parameters pod, from, to, port, direction, protocol, state, \
                          verdict, reason, policy, since, last and follow";

/// Selects connections. A connection passes if it matches every given part.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    /// The pod whose proxy serves the connection.
    pod: Option<String>,
    from: Option<EndPattern>,
    to: Option<EndPattern>,
    /// Of the destination.
    port: Option<u16>,
    direction: Option<&'static str>,
    protocol: Option<&'static str>,
    state: Option<State>,
    verdict: Option<Verdict>,
    reason: Option<String>,
    policy: Option<String>,
    /// Connections that were open within this time.
    since: Option<Duration>,
}

/// The parts of a request.
#[derive(Debug)]
pub(crate) struct Selection {
    pub(crate) filter: Filter,
    /// The maximum number of listed connections, the newest ones.
    pub(crate) last: usize,
    /// Whether connections that are opened or end later follow.
    pub(crate) follow: bool,
}

/// Selects one end of connections.
#[derive(Debug, Clone, PartialEq, Eq)]
enum EndPattern {
    /// An address, or a range of addresses.
    Range(IpNet),
    Socket(SocketAddr),
    Identity(String),
    /// The workloads of a namespace, or one of them.
    InNamespace(String, Option<String>),
    /// The name of a workload, or the hostname of a service.
    Name(String),
}

impl Selection {
    /// Takes the parameters of a request.
    ///
    /// # Errors
    ///
    /// A parameter is unknown or malformed.
    pub(crate) fn take(mut query: Query) -> Result<Self, Refusal> {
        let filter = Filter::take(&mut query)?;
        let last = number(&mut query, "last")?.unwrap_or(DEFAULT_LAST);
        let follow = query.take("follow")?.is_some();
        query.end(PARAMETERS)?;
        Ok(Self { filter, last, follow })
    }
}

impl Filter {
    fn take(query: &mut Query) -> Result<Self, Refusal> {
        let end = |text: Option<String>| text.map(|text| EndPattern::read(&text));
        Ok(Self {
            pod: query.take("pod")?,
            from: end(query.take("from")?),
            to: end(query.take("to")?),
            port: number(query, "port")?,
            direction: one_of(query, "direction", &DIRECTIONS, |name| name)?,
            protocol: one_of(query, "protocol", &PROTOCOLS, |name| name)?,
            state: one_of(query, "state", &State::ALL, State::as_str)?,
            verdict: one_of(query, "verdict", &Verdict::ALL, Verdict::as_str)?,
            reason: query.take("reason")?,
            policy: query.take("policy")?,
            since: duration(query, "since")?,
        })
    }

    /// Whether a connection that ended at this time, or is open, was open recently enough.
    pub(crate) fn is_recent(&self, ended: Option<Instant>) -> bool {
        match (self.since, ended) {
            (Some(since), Some(ended)) => ended.elapsed() <= since,
            _ => true,
        }
    }

    /// Whether a connection matches every part but `since`.
    pub(crate) fn matches(&self, connection: &Connection) -> bool {
        let Connection { pod, source, destination, service, .. } = connection;
        let is = |wanted: Option<&str>, value: &str| wanted.is_none_or(|wanted| wanted == value);
        let has =
            |wanted: &Option<String>, value: &Option<String>| wanted.is_none() || wanted == value;
        self.pod.as_deref().is_none_or(|wanted| is_pod(wanted, pod))
            && self.from.as_ref().is_none_or(|from| from.matches(source, None))
            && self.to.as_ref().is_none_or(|to| to.matches(destination, service.as_deref()))
            && self.port.is_none_or(|port| destination.address.is_some_and(|at| at.port() == port))
            && is(self.direction, &connection.direction)
            && is(self.protocol, &connection.protocol)
            && self.state.is_none_or(|state| state == connection.state)
            && self.verdict.is_none_or(|verdict| verdict == connection.verdict)
            && has(&self.reason, &connection.reason)
            && has(&self.policy, &connection.policy)
    }
}

/// Whether `wanted` is the pod `NAMESPACE/NAME`, its name, or `NAMESPACE/`.
pub(crate) fn is_pod(wanted: &str, pod: &str) -> bool {
    let (namespace, name) = pod.split_once('/').unwrap_or(("", pod));
    match wanted.split_once('/') {
        Some((of, "")) => of == namespace,
        Some(_) => wanted == pod,
        None => wanted == name,
    }
}

impl EndPattern {
    fn read(text: &str) -> Self {
        if let Ok(socket) = text.parse() {
            return Self::Socket(socket);
        }
        let range = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        match (range, text.split_once('/')) {
            (Ok(range), _) => Self::Range(range),
            (Err(_), _) if text.starts_with("spiffe://") => Self::Identity(text.to_owned()),
            (Err(_), Some((namespace, ""))) => Self::InNamespace(namespace.to_owned(), None),
            (Err(_), Some((namespace, name))) => {
                Self::InNamespace(namespace.to_owned(), Some(name.to_owned()))
            }
            (Err(_), None) => Self::Name(text.to_owned()),
        }
    }

    fn matches(&self, end: &End, service: Option<&str>) -> bool {
        let (workload, namespace) = (end.workload.as_deref(), end.namespace.as_deref());
        match self {
            Self::Range(range) => end.address.is_some_and(|at| range.contains(&at.ip())),
            Self::Socket(socket) => end.address == Some(*socket),
            Self::Identity(id) => end.identity.as_ref() == Some(id),
            Self::InNamespace(of, None) => namespace == Some(of),
            Self::InNamespace(of, Some(name)) => namespace == Some(of) && workload == Some(name),
            Self::Name(name) => workload == Some(name) || service == Some(name),
        }
    }
}

fn number<T: FromStr>(query: &mut Query, name: &str) -> Result<Option<T>, Refusal> {
    let Some(text) = query.take(name)? else { return Ok(None) };
    let malformed = |_| refused(name, &text, "a number");
    text.parse().map(Some).map_err(malformed)
}

fn duration(query: &mut Query, name: &str) -> Result<Option<Duration>, Refusal> {
    let Some(text) = query.take(name)? else { return Ok(None) };
    parse_duration(&text).map(Some).ok_or_else(|| refused(name, &text, "a time such as 90s or 5m"))
}

fn one_of<T: Copy>(
    query: &mut Query,
    name: &str,
    all: &[T],
    as_str: impl Fn(T) -> &'static str,
) -> Result<Option<T>, Refusal> {
    let Some(text) = query.take(name)? else { return Ok(None) };
    let found = all.iter().copied().find(|one| as_str(*one) == text);
    let names = || all.iter().map(|one| as_str(*one)).collect::<Vec<_>>().join(" or ");
    found.map(Some).ok_or_else(|| refused(name, &text, &names()))
}

fn refused(name: &str, text: &str, expected: &str) -> Refusal {
    Refusal::bad_request(format!("{name} must be {expected}, not {:?}", Quoted::new(text).as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(parameters: &str) -> Filter {
        let uri = format!("/connections?{parameters}").parse().unwrap();
        Selection::take(Query::of(&uri)).unwrap().filter
    }

    fn refusal(parameters: &str) -> String {
        let uri = format!("/connections?{parameters}").parse().unwrap();
        Selection::take(Query::of(&uri)).unwrap_err().reason
    }

    fn end(address: &str, namespace: &str, workload: &str) -> End {
        End {
            address: Some(address.parse().unwrap()),
            namespace: Some(namespace.to_owned()),
            workload: Some(workload.to_owned()),
            identity: Some(format!("spiffe://td/ns/{namespace}/sa/{workload}")),
            is_claimed: false,
        }
    }

    fn denied() -> Connection {
        Connection {
            state: State::Failed,
            pod: "shop/web-1".to_owned(),
            direction: "outbound".to_owned(),
            protocol: "hbone".to_owned(),
            verdict: Verdict::Denied,
            policy: Some("shop/deny-web".to_owned()),
            reason: Some("policy_denied".to_owned()),
            source: end("10.0.0.1:40000", "shop", "web-1"),
            destination: end("10.0.0.2:8080", "bank", "api"),
            service: Some("api.bank.svc.cluster.local".to_owned()),
            ..Connection::default()
        }
    }

    #[test]
    fn every_part_of_a_filter_selects_and_excludes() {
        for (matching, other) in [
            ("pod=shop/web-1", "pod=shop/web-2"),
            ("pod=web-1", "pod=api"),
            ("pod=shop/", "pod=bank/"),
            ("from=shop/web-1", "from=bank/api"),
            ("from=shop/", "from=bank/"),
            ("from=web-1", "from=api"),
            ("from=10.0.0.1", "from=10.0.0.2"),
            ("from=10.0.0.0/31", "from=10.0.0.8/29"),
            ("to=10.0.0.2:8080", "to=10.0.0.2:8081"),
            ("to=spiffe://td/ns/bank/sa/api", "to=spiffe://td/ns/bank/sa/web"),
            ("to=api.bank.svc.cluster.local", "to=web.bank.svc.cluster.local"),
            ("port=8080", "port=80"),
            ("direction=outbound", "direction=inbound"),
            ("protocol=hbone", "protocol=tcp"),
            ("state=failed", "state=open"),
            ("verdict=denied", "verdict=allowed"),
            ("reason=policy_denied", "reason=connect"),
            ("policy=shop/deny-web", "policy=shop/other"),
            ("verdict=denied&port=8080", "verdict=denied&port=80"),
        ] {
            assert!(filter(matching).matches(&denied()), "{matching}");
            assert!(!filter(other).matches(&denied()), "{other}");
        }
        assert!(filter("").matches(&denied()));
    }

    #[test]
    fn malformed_parameter_is_refused_with_what_would_be_right() {
        assert_eq!(
            refusal("verdict=no"),
            "verdict must be allowed or denied or failed, not \"no\""
        );
        assert_eq!(refusal("port=http"), "port must be a number, not \"http\"");
        assert_eq!(refusal("since=5"), "since must be a time such as 90s or 5m, not \"5\"");
        assert!(refusal("podd=a").starts_with("unknown parameter \"podd\": this path has"));
    }

    #[tokio::test(start_paused = true)]
    async fn since_excludes_what_ended_before() {
        let filter = filter("since=1m");
        let ended = Instant::now();
        assert!(filter.is_recent(Some(ended)) && filter.is_recent(None));
        tokio::time::advance(Duration::from_secs(61)).await;
        assert!(!filter.is_recent(Some(ended)) && filter.is_recent(None));
    }
}
