//! Manages the rules of a pod: checks, installs, tests, and keeps or removes them.
//!
//! The interception crate defines the rules and the kernel interfaces.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use underpass_config::{Hint as _, InterceptionSettings, OnExit, Profile, Settings};
use underpass_interception::{
    Difference, Explanation, ForeignRule, Interception, InterceptionError, KUBELET_PROBE_IN,
    KeptCapabilities, NamespaceAccess, Ports, ProbeSockets, ProxyUser, ReturnPathProbe, RulePlan,
    Sockets, ipv6_available,
};

use crate::error::chain;
use crate::node::pod_error::PodError;
use crate::observe::metrics;
use crate::rules::owner::{role, started};
use crate::rules::reconciler::RuleReconciler;
use crate::rules::self_test;
use crate::rules::self_test::{Arrivals, SelfTestError};

/// Timeout for each connection of the self-test at the start. It normally takes less than a
/// millisecond; a machine that is still booting takes longer.
const START_TEST_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause between attempts to install the rules while the loopback interface is down.
const LOOPBACK_INTERVAL: Duration = Duration::from_millis(20);

/// The rules of one pod, with the operations on them.
#[derive(Debug, Clone)]
pub(crate) struct Capture {
    access: NamespaceAccess,
    /// The settings at the start.
    settings: Arc<Settings>,
    /// The current interception settings; a reload changes them.
    current: watch::Receiver<InterceptionSettings>,
    /// `None` if another program installs the rules (`interception.install: false`).
    interception: Option<Interception>,
    ports: Ports,
    /// The user by which the rules identify the proxy's connections.
    user: Option<ProxyUser>,
}

/// The sockets of the self-test, opened before the change to the proxy's user.
#[derive(Debug)]
pub(crate) struct SelfTestSockets {
    caught: ProbeSockets,
    /// Empty unless the rules identify the proxy's connections by their user.
    returned: Vec<ReturnPathProbe>,
}

/// Keeps the rules at the end of the proxy. With `repair`, first reinstalls them if another program
/// has changed them.
async fn keep_rules(interception: &Interception, repair: bool) -> Result<(), PodError> {
    let difference = match interception.verify().await {
        Ok(difference) => difference,
        Err(error) if repair => return Err(error.into()),
        Err(error) => {
            tracing::info!(
                error = chain(&error),
                hint = error.hint().as_deref(),
                "cannot verify the rules that stay installed"
            );
            return Ok(());
        }
    };
    match difference {
        None => {
            interception.unblock().await?;
            tracing::info!(
                "the rules stay installed: no traffic leaves in plaintext (`underpass rules remove` removes them)"
            );
        }
        Some(_) if repair => {
            interception.install().await?;
            tracing::warn!(
                "another program had changed the rules: they are repaired and stay installed"
            );
        }
        Some(difference) => tracing::error!(
            %difference,
            "another program has changed the rules and interception.repair is off: traffic may leave in plaintext"
        ),
    }
    Ok(())
}

impl Capture {
    /// Checks the preconditions. Changes nothing.
    pub(crate) async fn prepare(
        settings: Arc<Settings>,
        current: watch::Receiver<InterceptionSettings>,
        access: NamespaceAccess,
    ) -> Result<Self, PodError> {
        let ports = Ports::of(&settings);
        let interception = &settings.interception;
        access.check_reverse_path(interception).await?;
        let user = ProxyUser::required(interception)?;
        let prepared = if interception.install {
            let prepared = Interception::prepare(&access, interception, ports).await?;
            let owner = format!("pid {} started {}", std::process::id(), started());
            let owner = format!("underpass {owner} {}", role(interception.profile, ports));
            prepared.map(|prepared| prepared.owned_by(owner))
        } else {
            None
        };
        Ok(Self { access, settings, current, interception: prepared, ports, user })
    }

    pub(crate) fn access(&self) -> &NamespaceAccess {
        &self.access
    }

    /// The user by which the rules identify the proxy's connections, if the profile has one.
    pub(crate) fn user(&self) -> Option<ProxyUser> {
        self.user
    }

    /// A receiver of the current interception settings.
    pub(crate) fn current_settings(&self) -> watch::Receiver<InterceptionSettings> {
        self.current.clone()
    }

    /// The rules for the current settings; `None` if another program installs them.
    pub(super) fn rules(&self) -> Option<Interception> {
        let rules = self.interception.as_ref()?;
        let current = self.current.borrow();
        Some(if *current == self.settings.interception {
            rules.clone()
        } else {
            rules.with_settings(&current)
        })
    }

    pub(super) fn profile(&self) -> Profile {
        self.settings.interception.profile
    }

    /// The rules, and the path of each kind of traffic through them.
    pub(super) async fn explain(&self) -> Result<Value, InterceptionError> {
        let environment = self.access.environment().await?;
        let settings = self.current.borrow().clone();
        let ipv6 = ipv6_available();
        Ok(Explanation::new(&settings, self.ports, ipv6, &environment, None).json())
    }

    /// Installs the rules, unless they are already installed or another program installs them.
    /// `loopback_timeout` is the time for the runtime to enable the loopback interface.
    pub(crate) async fn install(&self, loopback_timeout: Duration) -> Result<(), PodError> {
        let Some(interception) = self.rules() else {
            tracing::info!(profile = %self.profile(), "not installing rules: another program installs them");
            return Ok(());
        };
        if interception.ipv6_absent() {
            tracing::info!("the kernel has no IPv6: no IPv6 rules are needed");
        }
        if interception.ipv6_disabled().await? {
            tracing::info!(
                hint = "enable it, or set interception.ipv6: reject",
                "IPv6 is disabled on the loopback interface (disable_ipv6): its rules are installed, but the \
                 workload has no IPv6 connectivity until it is enabled there"
            );
        }
        for leftover in interception.leftovers().await? {
            tracing::warn!("{leftover}");
        }
        let (backend, rules) = (interception.backend(), interception.plan().rules().len());
        metrics::interception(self.profile(), backend);
        let began = Instant::now();
        let is_new = loop {
            match interception.install_if_different().await {
                Err(error) if error.is_loopback_down() && began.elapsed() < loopback_timeout => {
                    sleep(LOOPBACK_INTERVAL).await;
                }
                installed => break installed?,
            }
        };
        if is_new {
            tracing::info!(%backend, rules, "rules installed");
        } else {
            tracing::info!(%backend, rules, "the rules are already installed");
        }
        Ok(())
    }

    /// Opens the sockets of the self-test. Must be called before the change to the proxy's user,
    /// whose connections the rules do not catch.
    pub(crate) async fn probes(&self) -> Result<SelfTestSockets, PodError> {
        let open = async || -> Result<SelfTestSockets, InterceptionError> {
            let caught = self.access.open_probes().await?;
            let settings = &self.settings.interception;
            let returned = match self.is_by_user() {
                true => self.access.open_return_path(settings, self.ports).await?,
                false => Vec::new(),
            };
            Ok(SelfTestSockets { caught, returned })
        };
        open().await.map_err(SelfTestError::prepare).map_err(PodError::self_test)
    }

    /// Whether the rules identify the proxy's connections by their user.
    fn is_by_user(&self) -> bool {
        matches!(self.profile(), Profile::Sidecar | Profile::Osm)
    }

    /// Warns of processes that can bypass the rules. Must be called while the process still has the
    /// privileges to inspect them.
    pub(crate) async fn warn_of_bypassing(&self) {
        let profile = self.profile();
        if profile == Profile::None {
            return;
        }
        let found = self.access.bypassing_processes(profile).await.unwrap_or_default();
        let Some(first) = found.first() else { return };
        tracing::warn!(
            processes = found.len(),
            first = %first,
            hint = "drop these capabilities from the workload (SECURITY.md)",
            "processes of this network namespace can bypass the rules"
        );
    }

    /// The capabilities that the namespaces thread keeps: to repair or remove the rules and to open
    /// sockets.
    pub(crate) fn needed_capabilities(&self) -> KeptCapabilities {
        let settings = &self.settings.interception;
        let marks = Sockets::new(settings, ipv6_available()).need_net_admin();
        let removes = self.interception.is_some() && settings.on_exit == OnExit::Remove;
        let changes_rules = self.repairs() || removes;
        match &self.interception {
            Some(rules) if rules.backend().runs_programs() && (changes_rules || marks) => {
                KeptCapabilities::NetAdminForPrograms
            }
            _ if changes_rules || marks => KeptCapabilities::NetAdmin,
            _ => KeptCapabilities::Nothing,
        }
    }

    /// Tests whether the rules catch connections, and whether answers to imitated clients return to
    /// the proxy. Returns whether there was a connection that they would catch.
    pub(crate) async fn test(
        &self,
        arrivals: &dyn Arrivals,
        probes: &SelfTestSockets,
        deadline: Duration,
    ) -> Result<bool, SelfTestError> {
        let prepare = SelfTestError::prepare;
        let settings = &self.current.borrow().clone();
        let environment = self.access.environment().await.map_err(prepare)?;
        let caught = match self.rules() {
            Some(rules) => probes.caught.probes(&environment, rules.plan(), settings, self.ports),
            None => {
                let plan = RulePlan::new(settings, self.ports, ipv6_available());
                probes.caught.probes(&environment, &plan, settings, self.ports)
            }
        };
        let caught = caught.map_err(SelfTestError::Prepare)?;
        let tested = self_test::run_captured(arrivals, caught, deadline).await?;
        let is_tested = !tested.is_empty();
        if !is_tested && self.profile() != Profile::None {
            tracing::info!(
                "the self-test of the rules is skipped: this process can make no connection that they would catch, or there is no route"
            );
        } else {
            tracing::debug!(?tested, "the self-test passed: the rules catch connections");
        }
        let returned = if self.is_by_user() {
            // The rules treat only sockets from before the change of user like those of the
            // workload.
            let own = probes.returned.iter().map(|connection| connection.destination.ip());
            let usable = self.access.usable_addresses(own.collect()).await.map_err(prepare)?;
            let is_current =
                |connection: &&ReturnPathProbe| usable.contains(&connection.destination.ip());
            let current = probes.returned.iter().filter(is_current);
            self_test::run_return_path(current, deadline).await?
        } else {
            let opened = self.access.open_return_path(settings, self.ports).await;
            self_test::run_return_path(&opened.map_err(prepare)?, deadline).await?
        };
        tracing::debug!(?returned, "the self-test passed: answers to imitated clients return");
        Ok(is_tested)
    }

    /// Runs [`test`](Self::test) at the start. The error lists possible causes.
    pub(crate) async fn test_at_start(
        &self,
        arrivals: &dyn Arrivals,
        probes: &SelfTestSockets,
    ) -> Result<bool, PodError> {
        match self.test(arrivals, probes, START_TEST_TIMEOUT).await {
            Ok(is_tested) => Ok(is_tested),
            Err(error) => Err(PodError::SelfTest { error, suspects: self.suspects().await }),
        }
    }

    /// Fails if the installed rules differ from the current settings.
    pub(crate) async fn verify(&self) -> Result<(), PodError> {
        match self.difference().await? {
            None => Ok(()),
            Some(difference) => Err(PodError::Changed(difference)),
        }
    }

    /// The difference between the installed rules and the current settings; `None` without one, or
    /// if another program installs the rules.
    pub(super) async fn difference(&self) -> Result<Option<Difference>, InterceptionError> {
        match self.rules() {
            Some(rules) => rules.verify().await,
            None => Ok(None),
        }
    }

    /// Rules of other programs that act before those of this proxy; empty if it installs none.
    pub(crate) async fn foreign_rules(&self) -> Result<Vec<ForeignRule>, InterceptionError> {
        match &self.interception {
            Some(interception) => interception.foreign_rules().await,
            None => Ok(Vec::new()),
        }
    }

    /// Possible causes of a failed self-test: leftovers of other meshes, and foreign rules.
    pub(crate) async fn suspects(&self) -> Vec<String> {
        let Some(interception) = &self.interception else { return Vec::new() };
        let leftovers = interception.leftovers().await.unwrap_or_default();
        let foreign = interception.foreign_rules().await.unwrap_or_default();
        let leftovers = leftovers.iter().map(ToString::to_string);
        leftovers.chain(foreign.iter().map(ToString::to_string)).collect()
    }

    /// Whether a reconciler repairs the rules: `interception.install` and `.repair` are on.
    pub(crate) fn repairs(&self) -> bool {
        self.interception.is_some() && self.settings.interception.repair
    }

    /// The reconciler of the current rules; `None` if they are not repaired.
    pub(crate) async fn reconciler(&self) -> Result<Option<RuleReconciler>, PodError> {
        match self.rules().filter(|_| self.repairs()) {
            Some(rules) => Ok(Some(RuleReconciler::new(rules).await?)),
            None => Ok(None),
        }
    }

    /// The rules, if this proxy installs them and they exempt the kubelet's probes.
    pub(crate) fn exempting_probes(&self) -> Option<&Interception> {
        self.interception
            .as_ref()
            .filter(|rules| rules.plan().rules().iter().any(|rule| rule.id == KUBELET_PROBE_IN))
    }

    pub(crate) fn on_exit(&self) -> OnExit {
        self.settings.interception.on_exit
    }

    pub(crate) async fn leave(&self, on_exit: OnExit) -> Result<(), PodError> {
        let Some(interception) = self.rules() else { return Ok(()) };
        let repair = self.settings.interception.repair;
        match on_exit {
            OnExit::Keep => keep_rules(&interception, repair).await?,
            OnExit::Remove => {
                interception.remove().await?;
                tracing::info!("rules removed: traffic is direct and in plaintext from now on");
            }
        }
        Ok(())
    }
}
