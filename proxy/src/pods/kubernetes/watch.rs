//! Follows the pods of this node and the namespaces, with reconnects.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use underpass_config::{Hint as _, Quoted};
use underpass_hbone::Dial;

use super::api::{Api, KubernetesError};
use super::reflector::{Change, Reflector, WATCH_SECONDS};
use super::view::{ClusterView, Kind};
use crate::backoff::Backoff;
use crate::observe::metrics;

/// The bounds of the back-off after failed requests.
const FIRST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// Timeout of a watch: the requested duration, and time for its end to arrive.
const WATCH: Duration = Duration::from_secs(WATCH_SECONDS + 10);

/// Follows the pods of the node `node` and the namespaces until the receivers are dropped. Requires
/// a tokio runtime.
pub(crate) fn follow<D: Dial>(
    api: Api<D>,
    node: &str,
) -> (watch::Receiver<ClusterView>, JoinSet<()>) {
    let view = Arc::new(watch::Sender::default());
    let (api, mut tasks) = (Arc::new(api), JoinSet::new());
    metrics::pods::kubernetes_connected(false);
    for kind in [Kind::Pods, Kind::Namespaces] {
        let follower = Follower {
            api: api.clone(),
            view: view.clone(),
            kind,
            reflector: Reflector::new(kind, node),
            backoff: Backoff::new(FIRST_WAIT, LONGEST_WAIT),
        };
        tasks.spawn(follower.run());
    }
    (view.subscribe(), tasks)
}

/// The end of a request.
enum Ended {
    /// The next request gets another page or watches.
    Page,
    Watch,
}

/// Follows one kind of objects.
struct Follower<D> {
    api: Arc<Api<D>>,
    view: Arc<watch::Sender<ClusterView>>,
    kind: Kind,
    reflector: Reflector,
    backoff: Backoff,
}

impl<D: Dial> Follower<D> {
    /// Never returns.
    async fn run(mut self) {
        loop {
            let outcome = match self.reflector.is_watching() {
                false => self.list().await,
                true => self.watch().await,
            };
            match outcome {
                Ok(Ended::Page) => continue,
                Ok(Ended::Watch) => {}
                Err(error) if error.is_gone() => self.reflector.expired(),
                Err(error) => self.failed(&error),
            }
            // Wait also after a watch, so that a server that ends each watch at once gets no flood
            // of requests.
            sleep(self.backoff.next()).await;
        }
    }

    /// Gets the next page of the list.
    async fn list(&mut self) -> Result<Ended, KubernetesError> {
        let page = self.api.get(&self.reflector.path()).await?;
        if let Some(change) = self.reflector.page(&page)? {
            self.apply(change);
        }
        Ok(Ended::Page)
    }

    /// Follows the changes until the server ends the watch.
    async fn watch(&mut self) -> Result<Ended, KubernetesError> {
        let (api, started) = (self.api.clone(), Instant::now());
        let mut events = api.watch(&self.reflector.path(), WATCH).await?;
        self.succeeded();
        while let Some(event) = events.next().await? {
            if let Some(change) = self.reflector.event(&event)? {
                self.apply(change);
            }
            // The server has forgotten the version: the next request is a new list.
            if !self.reflector.is_watching() {
                break;
            }
            self.backoff.reset();
        }
        if started.elapsed() > LONGEST_WAIT {
            self.backoff.reset();
        }
        Ok(Ended::Watch)
    }

    fn apply(&self, change: Change) {
        self.view.send_if_modified(|view| match change {
            Change::Replace(objects) => view.replace(self.kind, objects),
            Change::Apply(object) => view.apply(object),
            Change::Remove(object) => view.remove(&object),
        });
    }

    fn succeeded(&self) {
        if self.set_problem(None) {
            tracing::info!(server = self.api.server(), kind = ?self.kind, "watching the API server again");
        }
    }

    fn failed(&self, error: &KubernetesError) {
        let hint = error.hint();
        let error = Quoted::chain(error);
        if self.set_problem(Some(error.to_string())) {
            tracing::warn!(%error, hint = hint.as_deref(), kind = ?self.kind, "cannot watch the API server: the last facts stay in use");
        }
    }

    /// Sets the problem of this kind. Returns whether it is new.
    fn set_problem(&self, problem: Option<String>) -> bool {
        let is_new = self.view.send_if_modified(|view| view.set_problem(self.kind, problem));
        let view = self.view.borrow();
        metrics::pods::kubernetes_connected(view.is_complete() && view.problem().is_none());
        is_new
    }
}
