//! The demonstration of `underpass node`: two nodes with two pods each, a policy, and a pod that is
//! added and removed.

pub(super) mod stage;

use tokio::time::Instant;

use super::DemoError;
use super::evidence::{Finding, counted, read_counters, wire};
use stage::{DemoPod, Stage};

pub(super) const TITLE: &str = "a daemon on each of two nodes\n\n  \
     node-a (client, web) ══ mutual TLS ══ node-b (store, guest)";

/// Sends requests between the pods, and verifies their properties.
pub(super) async fn verify(stage: &mut Stage) -> Result<Vec<Finding>, DemoError> {
    let same_node = check_delivered(stage, "same node", &stage.client, &stage.web);
    let mut capture = stage.capture_uplink()?;
    let other_node = check_delivered(stage, "other node", &stage.client, &stage.store);
    let frames = capture.drain().map_err(DemoError::io("read the capture"))?;
    let wire = wire(&frames, &stage.token);
    let identities = check_identities(stage);
    let plaintext = check_refused(stage, "plaintext", &stage.guest, &stage.web);
    let added = add_guest(stage).await?;
    let policy = check_refused(stage, "policy", &stage.guest, &stage.store);
    let removed = remove_guest(stage).await?;
    Ok(vec![same_node, other_node, wire, identities, plaintext, added, policy, removed])
}

/// Verifies that the request was answered, and that the server saw the client's own address.
fn check_delivered(stage: &Stage, subject: &'static str, from: &DemoPod, to: &DemoPod) -> Finding {
    let exchange = stage.exchange(from, to);
    let source = exchange.source().map(|source| source.ip());
    let seen = source.map_or_else(String::new, |source| format!(", from {source}"));
    Finding {
        subject,
        seen: format!("{} → {}: {}{seen}", from.name, to.name, exchange.summary()),
        holds: exchange.succeeded(&stage.token) && source == Some(from.http_address().ip()),
    }
}

/// Verifies that the request failed before it reached the server.
fn check_refused(stage: &Stage, subject: &'static str, from: &DemoPod, to: &DemoPod) -> Finding {
    let before = to.requests();
    let exchange = stage.exchange(from, to);
    let reached = to.requests() - before;
    Finding {
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

/// Verifies that the daemons have counted the connections between the authenticated identities.
fn check_identities(stage: &Stage) -> Finding {
    let Stage { a, b, client, web, store, .. } = stage;
    let pairs = [(&a.namespace, web), (&b.namespace, store)];
    let holds = pairs.iter().all(|(node, to)| {
        counted(&a.namespace, "source", &client.identity, &to.identity)
            && counted(node, "destination", &client.identity, &to.identity)
    });
    Finding {
        subject: "identities",
        seen: format!(
            "{} → {} and {}, counted by both daemons",
            client.identity, web.identity, store.identity
        ),
        holds,
    }
}

/// Adds the pod file of `guest`, and verifies that the pod is served.
async fn add_guest(stage: &mut Stage) -> Result<Finding, DemoError> {
    let began = Instant::now();
    stage.b.add(&stage.guest).await?;
    let elapsed_ms = began.elapsed().as_secs_f64() * 1e3;
    let Stage { a, guest, web, .. } = &*stage;
    let delivered = check_delivered(stage, "pod added", guest, web);
    let is_identified = counted(&a.namespace, "destination", &guest.identity, &web.identity);
    Ok(Finding {
        seen: format!(
            "guest is served {elapsed_ms:.0} ms after its file appeared; {}",
            delivered.seen
        ),
        holds: delivered.holds && is_identified,
        ..delivered
    })
}

/// Removes the pod file of `guest`, and verifies that its rules are removed and its plaintext is
/// refused.
async fn remove_guest(stage: &mut Stage) -> Result<Finding, DemoError> {
    let began = Instant::now();
    stage.b.remove(&stage.guest).await?;
    let elapsed_ms = began.elapsed().as_secs_f64() * 1e3;
    let rules = read_counters(&stage.guest.namespace).await?.len();
    let refused = check_refused(stage, "pod removed", &stage.guest, &stage.web);
    let others = check_delivered(stage, "pod removed", &stage.client, &stage.store);
    Ok(Finding {
        seen: format!(
            "guest has {rules} rules {elapsed_ms:.0} ms after its file was removed; {}; {}",
            refused.seen, others.seen
        ),
        holds: rules == 0 && refused.holds && others.holds,
        ..refused
    })
}
