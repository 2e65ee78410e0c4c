//! `/connections`: open and recent connections, one JSON value a line.
//!
//! The workers only pass references to their records. This thread renders them, a chunk at a time.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::Bytes;
use futures_util::stream::{self, Stream, StreamExt as _};
use http::HeaderValue;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::connection::Connection;
use super::filter::{Filter, Selection};
use crate::admin::answer::{self, Answer, Refusal};
use crate::admin::query::Query;
use crate::admin::state::Admin;
use crate::node::inspection::{Connecting, Connections, Inspection};
use crate::observe::record::recent::{ConnectionEvent, Subscriber};
use crate::observe::record::{EndedConnection, TrackedConnection};

const NDJSON: HeaderValue = HeaderValue::from_static("application/x-ndjson");
/// The number of connections that are rendered before other tasks run.
const CHUNK: usize = 64;
/// The number of events that wait for a client, for all workers together.
const MAX_WAITING: usize = 4096;

/// A line of the answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Line {
    /// The client was too slow for this number of connections.
    Missed {
        missed: u64,
    },
    Connection(Box<Connection>),
}

/// A connection that is not rendered yet.
#[derive(Debug)]
enum Listed {
    /// Boxed, because a list may have an entry for each of very many open connections.
    Connecting(Box<Connecting>),
    Open(Arc<TrackedConnection>),
    Ended(Arc<EndedConnection>),
}

/// Answers a request for connections: the newest ones in the order of their last event, and then,
/// with `follow`, each one that is opened or ends.
///
/// # Errors
///
/// A parameter is unknown or malformed.
pub(crate) async fn connections(admin: &Admin, query: Query) -> Result<Answer, Refusal> {
    let Selection { filter, last, follow } = Selection::take(query)?;
    let (events, receiver) = mpsc::channel(MAX_WAITING);
    let subscriber = Subscriber { events, missed: Arc::default() };
    let missed = subscriber.missed.clone();
    let listed = list(admin, follow.then_some(&subscriber)).await;
    // Without other owners the stream of events ends at once.
    drop(subscriber);
    let selected = select(listed, &filter, last).await;
    let chunks = stream::iter(selected).chunks(CHUNK);
    let listed = chunks.map(|chunk| render(chunk.iter().map(Listed::connection).map(line)));
    Ok(answer::stream(NDJSON, listed.chain(following(receiver, missed, filter))))
}

/// The connections of all workers, the newest first. A worker that does not answer has none here;
/// `/status` names it.
async fn list(admin: &Admin, subscriber: Option<&Subscriber>) -> Vec<Listed> {
    let inspection =
        |connections| Inspection::Connections { connections, subscriber: subscriber.cloned() };
    let answers = admin.inspect(inspection).await.into_iter().flatten();
    let mut listed: Vec<_> = answers.flat_map(merge).collect();
    listed.sort_by_key(|one| Reverse(one.at()));
    listed
}

/// The connections of one worker. One that ended while the worker listed the open ones is in both
/// of its lists.
fn merge(Connections { open, connecting, ended }: Connections) -> Vec<Listed> {
    let known: HashSet<_> = ended.iter().map(|ended| Arc::as_ptr(&ended.connection)).collect();
    let open = open.into_iter().filter(|open| !known.contains(&Arc::as_ptr(open)));
    let open: Vec<_> = open.map(Listed::Open).collect();
    let connecting = connecting.into_iter().map(|one| Listed::Connecting(Box::new(one)));
    ended.into_iter().map(Listed::Ended).chain(open).chain(connecting).collect()
}

/// The newest `last` ones that match, the oldest first.
async fn select(listed: Vec<Listed>, filter: &Filter, last: usize) -> Vec<Listed> {
    let mut selected = Vec::new();
    for (index, one) in listed.into_iter().enumerate() {
        if selected.len() >= last {
            break;
        }
        if one.matching(filter).is_some() {
            selected.push(one);
        }
        if index.is_multiple_of(CHUNK) {
            // Other tasks of the thread run in between.
            tokio::task::yield_now().await;
        }
    }
    selected.reverse();
    selected
}

/// The lines of later events, until the workers end. Ends at once without a subscription.
fn following(
    receiver: mpsc::Receiver<ConnectionEvent>,
    missed: Arc<AtomicU64>,
    filter: Filter,
) -> impl Stream<Item = Bytes> {
    stream::unfold((receiver, missed, filter), |(mut receiver, missed, filter)| async move {
        let lines = loop {
            let listed = match receiver.recv().await? {
                ConnectionEvent::Opened(open) => Listed::Open(open),
                ConnectionEvent::Ended(ended) => Listed::Ended(ended),
            };
            let lost = missed.swap(0, Relaxed);
            let lost = (lost > 0).then_some(Line::Missed { missed: lost });
            let matching = listed.matching(&filter).map(line);
            if lost.is_some() || matching.is_some() {
                break render(lost.into_iter().chain(matching));
            }
        };
        Some((lines, (receiver, missed, filter)))
    })
}

fn line(connection: Connection) -> Line {
    Line::Connection(Box::new(connection))
}

fn render(lines: impl Iterator<Item = Line>) -> Bytes {
    let mut text = Vec::new();
    for line in lines {
        // Cannot fail: the lines have strings as keys only.
        if serde_json::to_writer(&mut text, &line).is_ok() {
            text.push(b'\n');
        }
    }
    text.into()
}

impl Listed {
    /// The time of its last event. One that is being opened is the newest.
    fn at(&self) -> (bool, Option<Instant>) {
        match self {
            Self::Connecting(_) => (true, None),
            Self::Open(open) => (false, Some(open.accepted)),
            Self::Ended(ended) => (false, Some(ended.at)),
        }
    }

    fn connection(&self) -> Connection {
        match self {
            Self::Connecting(connecting) => Connection::connecting(connecting),
            Self::Open(open) => Connection::open(open),
            Self::Ended(ended) => Connection::ended(ended),
        }
    }

    /// The connection, if it matches the filter.
    fn matching(&self, filter: &Filter) -> Option<Connection> {
        let ended = match self {
            Self::Ended(ended) => Some(ended.at),
            Self::Connecting(_) | Self::Open(_) => None,
        };
        let recent = filter.is_recent(ended).then(|| self.connection());
        recent.filter(|connection| filter.matches(connection))
    }
}
