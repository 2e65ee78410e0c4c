//! The demonstration of `underpass node`: two nodes with two pods each, a policy, and a pod that
//! comes and goes.

pub(super) mod stage;

use tokio::time::Instant;

use super::DemoError;
use super::evidence::{Point, counted, read_counters, wire};
use stage::{DemoPod, Stage};

pub(super) const TITLE: &str = "a daemon on each of two nodes\n\n  \
     node-a (client, web) ══ mutual TLS ══ node-b (store, guest)";

/// Sends requests between the pods, and verifies every property of them.
pub(super) async fn prove(stage: &mut Stage) -> Result<Vec<Point>, DemoError> {
    let same_node = delivered(stage, "same node", &stage.client, &stage.web);
    let mut capture = stage.capture_uplink()?;
    let other_node = delivered(stage, "other node", &stage.client, &stage.store);
    let frames = capture.drain().map_err(DemoError::io("read the capture"))?;
    let wire = wire(&frames, &stage.token);
    let identities = identities(stage);
    let plaintext = refused(stage, "plaintext", &stage.guest, &stage.web);
    let added = add_guest(stage).await?;
    let policy = refused(stage, "policy", &stage.guest, &stage.store);
    let removed = remove_guest(stage).await?;
    Ok(vec![same_node, other_node, wire, identities, plaintext, added, policy, removed])
}

/// The request must be answered, and the server must see the client's own address.
fn delivered(stage: &Stage, subject: &'static str, from: &DemoPod, to: &DemoPod) -> Point {
    let exchange = stage.exchange(from, to);
    let source = exchange.source().map(|source| source.ip());
    let seen = source.map_or_else(String::new, |source| format!(", from {source}"));
    Point {
        subject,
        seen: format!("{} → {}: {}{seen}", from.name, to.name, exchange.summary()),
        holds: exchange.succeeded(&stage.token) && source == Some(from.http_address().ip()),
    }
}

/// The request must fail before it reaches the server.
fn refused(stage: &Stage, subject: &'static str, from: &DemoPod, to: &DemoPod) -> Point {
    let before = to.requests();
    let exchange = stage.exchange(from, to);
    let reached = to.requests() - before;
    Point {
        subject,
        seen: format!(
            "{} → {}: {} ({reached} requests reached the server)",
            from.name,
            to.name,
            exchange.summary()
        ),
        holds: exchange.response.is_err() && reached == 0,
    }
}

/// The daemons must have counted the connections between the authenticated identities.
fn identities(stage: &Stage) -> Point {
    let Stage { a, b, client, web, store, .. } = stage;
    let pairs = [(&a.namespace, web), (&b.namespace, store)];
    let holds = pairs.iter().all(|(node, to)| {
        counted(&a.namespace, "source", &client.identity, &to.identity)
            && counted(node, "destination", &client.identity, &to.identity)
    });
    Point {
        subject: "identities",
        seen: format!(
            "{} → {} and {}, counted by both daemons",
            client.identity, web.identity, store.identity
        ),
        holds,
    }
}

/// The pod `guest` must be served once its file is in the daemon's folder.
async fn add_guest(stage: &mut Stage) -> Result<Point, DemoError> {
    let began = Instant::now();
    stage.b.add(&stage.guest).await?;
    let took = began.elapsed().as_secs_f64() * 1e3;
    let Stage { a, guest, web, .. } = &*stage;
    let delivered = delivered(stage, "pod added", guest, web);
    let is_identified = counted(&a.namespace, "destination", &guest.identity, &web.identity);
    Ok(Point {
        seen: format!("guest is served {took:.0} ms after its file appeared; {}", delivered.seen),
        holds: delivered.holds && is_identified,
        ..delivered
    })
}

/// The rules of `guest` must be gone, and its plaintext refused, once its file is removed.
async fn remove_guest(stage: &mut Stage) -> Result<Point, DemoError> {
    let began = Instant::now();
    stage.b.remove(&stage.guest).await?;
    let took = began.elapsed().as_secs_f64() * 1e3;
    let rules = read_counters(&stage.guest.namespace).await?.len();
    let refused = refused(stage, "pod removed", &stage.guest, &stage.web);
    let others = delivered(stage, "pod removed", &stage.client, &stage.store);
    Ok(Point {
        seen: format!(
            "guest has {rules} rules {took:.0} ms after its file was removed; {}; {}",
            refused.seen, others.seen
        ),
        holds: rules == 0 && refused.holds && others.holds,
        ..refused
    })
}
