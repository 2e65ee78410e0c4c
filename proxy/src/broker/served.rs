//! The pods that the proxy process serves by command of the broker.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use underpass_config::{Hint as _, InterceptionSettings, Settings, WorkloadSettings};
use underpass_hbone::log_panic;
use underpass_interception::{BoundListener, LocalAddresses, NamespaceAccess};

use crate::admin::api::status::Pod;
use crate::broker::message::{Command, Outcome, PodKey, PodToStart, SocketsOf, ToBroker};
use crate::broker::operations::{BrokerOperations, Requests};
use crate::error::chain;
use crate::node::data_plane::{DataPlane, PodToServe, ServedPod};
use crate::node::in_process::InProcess;
use crate::node::pod_error::PodError;
use crate::pods::enrolment::PodProblem;
use crate::pods::facts::wire::InvalidFact;
use crate::rules::self_test::Arrivals;
use crate::traffic::listeners::Listeners;

/// The pods of this process, by enrolment.
#[derive(Debug, Default)]
pub(super) struct ServedKeys(Mutex<HashMap<u64, Entry>>);

/// One pod.
#[derive(Debug)]
struct Entry {
    key: PodKey,
    interception: watch::Sender<InterceptionSettings>,
    /// `None` until it is served.
    served: Option<Served>,
}

/// A pod that is served.
#[derive(Debug, Clone)]
struct Served {
    pod: Arc<dyn ServedPod>,
    arrivals: Arc<dyn Arrivals>,
}

impl ServedKeys {
    /// The status of pods, completed by their drains and the states of their certificates.
    pub(super) fn complete(&self, pods: Vec<Pod>) -> Vec<Pod> {
        let entries = self.entries();
        let mut newest: HashMap<&str, &Entry> = HashMap::with_capacity(entries.len());
        for entry in entries.values() {
            let known = newest.entry(&entry.key.uid).or_insert(entry);
            if known.key.enrolment < entry.key.enrolment {
                *known = entry;
            }
        }
        let complete = |pod: Pod| {
            let entry = newest.get(pod.uid.as_str()).filter(|_| pod.is_serving());
            let served = entry.and_then(|entry| entry.served.as_ref());
            match served.and_then(|served| PodProblem::of_served(&*served.pod)) {
                Some(problem) => problem.of(pod),
                None => pod,
            }
        };
        pods.into_iter().map(complete).collect()
    }

    fn served(&self, key: &PodKey) -> Result<Served, String> {
        let entries = self.entries();
        let served = entries.get(&key.enrolment).and_then(|entry| entry.served.clone());
        served.ok_or_else(|| "no such pod is served".to_owned())
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<u64, Entry>> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Performs the commands of the broker. Clones share the pods.
#[derive(Debug, Clone)]
pub(super) struct CommandServer {
    pub(super) data_plane: InProcess,
    /// The settings of the node.
    pub(super) settings: Arc<Settings>,
    pub(super) requests: Requests,
    pub(super) pods: Arc<ServedKeys>,
}

impl CommandServer {
    /// Performs a command, and sends its outcome.
    pub(super) async fn perform(self, number: u64, command: Command, attached: Vec<OwnedFd>) {
        let outcome = match command {
            Command::Ping => self.ping().await,
            Command::Serve(pod) => self.serve(pod, attached).await,
            Command::FindOtherWorkload { namespace, name, addresses } => {
                self.find_other_workload(namespace, name, addresses).await
            }
            Command::Expect { pod, destination } => self.expect(pod, destination).await,
            Command::HasCertificate { pod } => self.has_certificate(&pod).await,
            Command::PauseAccepting { pod } => self.pause_accepting(&pod).await,
            Command::ResumeAccepting { pod } => self.resume_accepting(&pod),
            Command::PauseEndpoints => self.pause_endpoints().await,
            Command::ResumeEndpoints => self.resume_endpoints(),
            Command::StopAccepting { pod } => self.stop_accepting(&pod).await,
            Command::Drain { pod, deadline } => self.drain(&pod, deadline).await,
            Command::Close { pod } => self.close(&pod).await,
        };
        let done = ToBroker::Done { number, outcome };
        if let Err(error) = self.requests.sender().send(&done, Vec::new()).await {
            tracing::debug!(%error, "cannot send the outcome of a command");
        }
    }

    async fn ping(&self) -> Result<Outcome, String> {
        match self.data_plane.workers.ping().await {
            Ok(()) => Ok(Outcome::Done),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn serve(&self, pod: PodToStart, attached: Vec<OwnedFd>) -> Result<Outcome, String> {
        let PodToStart {
            pod: key,
            name,
            namespace,
            service_account,
            interception,
            dns: resolver,
            listeners,
            certificate_within,
        } = pod;
        let node = &self.settings;
        let settings = node.with_interception_text(&interception);
        let mut settings = settings.map_err(|errors| errors.to_string())?;
        settings.dns.pod = resolver.try_into().map_err(|error: InvalidFact| error.to_string())?;
        let workload = match node.node.pods {
            Some(_) => node.workload.of_pod(&name, &namespace, &service_account),
            None => Ok(node.workload.clone()),
        };
        let workload = workload.map_err(|error| error.to_string())?;
        let settings = Arc::new(Settings { workload, ..settings });
        let mut attached = attached.into_iter();
        let named = listeners.into_iter().zip(attached.by_ref()).map(named);
        let mut named = named.collect::<Result<Vec<_>, _>>()?;
        let missing = || "a descriptor is missing".to_owned();
        let listeners = Listeners::adopt(&settings, &mut named).ok_or_else(missing)?;
        let dns = Listeners::adopt(&settings, &mut named).ok_or_else(missing)?;
        let local = LocalAddresses::from(attached.next().ok_or_else(missing)?);
        let of = SocketsOf::Pod(key.clone());
        let operations = BrokerOperations::new(self.requests.clone(), of, Some(local));
        let access = NamespaceAccess::through(Arc::new(operations));
        let (sender, interception) = watch::channel(settings.interception.clone());
        let entry = Entry { key: key.clone(), interception: sender, served: None };
        // Before it is served: changed settings may arrive meanwhile.
        self.pods.entries().insert(key.enrolment, entry);
        let pod = PodToServe {
            uid: None,
            settings,
            interception,
            access,
            listeners,
            dns,
            certificate_within,
        };
        match self.data_plane.serve(pod).await {
            Ok(pod) => {
                let pod = Arc::<dyn ServedPod>::from(pod);
                let served = Served { arrivals: pod.arrivals(), pod };
                let mut entries = self.pods.entries();
                if let Some(entry) = entries.get_mut(&key.enrolment) {
                    entry.served = Some(served);
                }
                Ok(Outcome::Done)
            }
            Err(error) => {
                self.pods.entries().remove(&key.enrolment);
                match error {
                    PodError::CertificateLate(_) => Ok(Outcome::CertificateLate),
                    error => Err(chain(&error)),
                }
            }
        }
    }

    async fn find_other_workload(
        &self,
        namespace: String,
        name: String,
        addresses: Vec<IpAddr>,
    ) -> Result<Outcome, String> {
        let pod = WorkloadSettings { namespace, name, ..self.settings.workload.clone() };
        let found = self.data_plane.other_workload(&pod, addresses).await;
        found.map(Outcome::OtherWorkload).map_err(|error| chain(&error))
    }

    async fn expect(&self, pod: PodKey, destination: SocketAddr) -> Result<Outcome, String> {
        let mut arrived = self.pods.served(&pod)?.arrivals.expect(destination).await;
        let sender = self.requests.sender().clone();
        let report = async move {
            // Ends with the test, or with the next destination.
            while arrived.recv().await.is_some() {
                let arrived = ToBroker::Arrived { pod: pod.clone() };
                sender.send(&arrived, Vec::new()).await.ok();
            }
        };
        tokio::spawn(log_panic("report of test connections", report));
        Ok(Outcome::Done)
    }

    /// Ends a self-test.
    pub(super) fn end_test(&self, pod: &PodKey) {
        if let Ok(served) = self.pods.served(pod) {
            served.arrivals.end();
        }
    }

    async fn has_certificate(&self, pod: &PodKey) -> Result<Outcome, String> {
        Ok(Outcome::HasCertificate(self.pods.served(pod)?.pod.has_certificate().await))
    }

    async fn pause_accepting(&self, pod: &PodKey) -> Result<Outcome, String> {
        self.pods.served(pod)?.pod.pause_accepting().await;
        Ok(Outcome::Done)
    }

    fn resume_accepting(&self, pod: &PodKey) -> Result<Outcome, String> {
        self.pods.served(pod)?.pod.resume_accepting();
        Ok(Outcome::Done)
    }

    async fn pause_endpoints(&self) -> Result<Outcome, String> {
        self.data_plane.node.accepting.close().await;
        Ok(Outcome::Done)
    }

    fn resume_endpoints(&self) -> Result<Outcome, String> {
        self.data_plane.node.accepting.open();
        Ok(Outcome::Done)
    }

    async fn stop_accepting(&self, pod: &PodKey) -> Result<Outcome, String> {
        self.pods.served(pod)?.pod.stop_accepting().await;
        Ok(Outcome::Done)
    }

    async fn drain(&self, pod: &PodKey, deadline: Duration) -> Result<Outcome, String> {
        let terminated = self.pods.served(pod)?.pod.drain(deadline).await;
        Ok(Outcome::Terminated(terminated))
    }

    async fn close(&self, pod: &PodKey) -> Result<Outcome, String> {
        let closed = self.pods.entries().remove(&pod.enrolment);
        if let Some(Served { pod, .. }) = closed.and_then(|entry| entry.served) {
            pod.stop_accepting().await;
            pod.close().await;
        }
        Ok(Outcome::Done)
    }

    /// Applies changed interception settings.
    pub(super) fn follow(&self, pod: &PodKey, interception: &str) {
        let settings = match self.settings.with_interception_text(interception) {
            Ok(settings) => settings,
            Err(errors) => {
                let hint = errors.hint();
                let hint = hint.as_deref();
                return tracing::error!(uid = %pod, %errors, hint, "cannot apply changed settings");
            }
        };
        if let Some(entry) = self.pods.entries().get(&pod.enrolment) {
            entry.interception.send_replace(settings.interception);
        }
    }
}

fn named((name, listener): (String, OwnedFd)) -> Result<(String, BoundListener), String> {
    let listener = BoundListener::try_from(listener);
    listener.map(|listener| (name, listener)).map_err(|error| error.to_string())
}
