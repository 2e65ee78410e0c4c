//! Manages the rules during the life of a proxy: checks, installs, tests, and keeps or removes
//! them.
//!
//! Not here: the contents of the rules and the kernel interfaces (the interception crate).

use std::time::Duration;

use underpass_config::{Dns, InterceptionSettings, OnExit, Profile, Settings};
use underpass_interception::{
    ForeignRule, Interception, InterceptionError, KUBELET_PROBE_IN, Kept, Namespace,
    NamespaceAccess, NamespaceThread, Ports, ProbeSockets, ProxyUser, ReturnPathProbe, RulePlan,
    Sockets, confine_thread, ipv6_available,
};

use crate::admin::endpoints::Readiness;
use crate::error::chain;
use crate::observe::metrics;
use crate::process::command_error::CommandError;
use crate::process::pause_gate::PauseGate;
use crate::process::reload::Reload;
use crate::rules::owner::{role, started};
use crate::rules::reconciler::{Event, RuleReconciler};
use crate::rules::self_test;
use crate::rules::self_test::{SelfTest, SelfTestError};

/// The deadline of each connection of the self-test at the start. It normally takes less than a
/// millisecond; a machine that is still booting takes longer.
const START_DEADLINE: Duration = Duration::from_secs(5);

/// The rules of one pod and the means to change them.
#[derive(Debug, Clone)]
pub(crate) struct Capture {
    /// Operations in the pod's network namespace.
    access: NamespaceAccess,
    /// The thread that performs privileged operations.
    thread: NamespaceThread,
    /// `None` if another program installs the rules (`interception.install: false`).
    interception: Option<Interception>,
    plan: RulePlan,
    ports: Ports,
    profile: Profile,
    /// The user that the process becomes after installing the rules.
    user: Option<ProxyUser>,
}

/// The sockets of the self-test, opened before the process became the proxy's user.
#[derive(Debug)]
pub(crate) struct Probes {
    caught: ProbeSockets,
    returned: Vec<ReturnPathProbe>,
}

/// Leaves the rules installed at the end of the proxy. With `repair`, reinstalls them if another
/// program has changed them.
async fn leave_closed(interception: &Interception, repair: bool) -> Result<(), CommandError> {
    let difference = match interception.verify().await {
        Ok(difference) => difference,
        Err(error) if repair => return Err(error.into()),
        Err(error) => {
            tracing::info!(error = chain(&error), "cannot verify the rules that stay installed");
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
    /// Checks the preconditions; changes nothing.
    pub(crate) async fn prepare(
        settings: &Settings,
        namespace: Namespace,
        thread: NamespaceThread,
    ) -> Result<Self, CommandError> {
        let ports = Ports::of(settings);
        let interception = &settings.interception;
        if interception.dns == Dns::Capture && interception.profile != Profile::None {
            return Err(CommandError::NoDnsProxy { port: ports.dns });
        }
        let access = NamespaceAccess::new(namespace, thread.clone());
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
        let plan = match &prepared {
            Some(prepared) => prepared.plan().clone(),
            None => RulePlan::new(interception, ports, ipv6_available()),
        };
        Ok(Self {
            access,
            thread,
            interception: prepared,
            plan,
            ports,
            profile: interception.profile,
            user,
        })
    }

    /// Operations in the pod's network namespace.
    pub(crate) fn access(&self) -> &NamespaceAccess {
        &self.access
    }

    pub(crate) async fn install(&self) -> Result<(), CommandError> {
        let Some(interception) = &self.interception else {
            tracing::info!(profile = %self.profile, "not installing rules: another program installs them");
            return Ok(());
        };
        if interception.ipv6_absent() {
            tracing::info!("the kernel has no IPv6: no IPv6 rules are needed");
        }
        if interception.ipv6_disabled().await? {
            tracing::info!(
                "IPv6 is disabled on the loopback interface (disable_ipv6): its rules are installed, but the \
                 workload has no IPv6 connectivity until it is enabled there"
            );
        }
        for leftover in interception.leftovers().await? {
            tracing::warn!("{leftover}");
        }
        let (backend, rules) = (interception.backend(), self.plan.rules().len());
        metrics::interception(self.profile, backend);
        if interception.verify().await?.is_none() {
            interception.mark_owner().await;
            interception.unblock().await?;
            tracing::info!(%backend, rules, "the rules are already installed");
            return Ok(());
        }
        interception.install().await?;
        tracing::info!(%backend, rules, "rules installed");
        Ok(())
    }

    /// Opens the sockets of the self-test.
    pub(crate) async fn probes(
        &self,
        settings: &InterceptionSettings,
    ) -> Result<Probes, CommandError> {
        let open = async || -> Result<Probes, InterceptionError> {
            let caught = self.access.open_probes().await?;
            let returned = self.access.open_return_path(settings, self.ports).await?;
            Ok(Probes { caught, returned })
        };
        open().await.map_err(SelfTestError::prepare).map_err(CommandError::self_test)
    }

    /// Whether the rules identify the proxy by its user.
    fn is_by_user(&self) -> bool {
        matches!(self.profile, Profile::Sidecar | Profile::Osm)
    }

    /// Becomes the user by which the rules identify the proxy, if they do. Drops all capabilities
    /// of
    /// the calling thread, which its later threads inherit. The namespaces thread keeps those that
    /// it
    /// needs.
    pub(crate) async fn confine(
        &self,
        settings: &InterceptionSettings,
    ) -> Result<(), CommandError> {
        let kept = self.kept(settings);
        if let Some(user) = self.user {
            self.thread.prepare_change_of_user(kept).await?;
            user.become_it()?;
            let ProxyUser { uid, gid } = user;
            tracing::info!(uid, gid, ?kept, "changed to the proxy's user");
        } else {
            confine_thread(Kept::Nothing).map_err(CommandError::Start)?;
        }
        Ok(self.thread.confine(kept).await?)
    }

    /// Warns of processes that can bypass the rules. Must be called before the process drops the
    /// privileges to inspect them.
    pub(crate) async fn warn_of_bypassing(&self) {
        let profile = self.profile;
        if profile == Profile::None {
            return;
        }
        let found = self.access.bypassing_processes(profile).await.unwrap_or_default();
        let Some(first) = found.first() else { return };
        tracing::warn!(
            processes = found.len(),
            first = %first,
            "processes of this network namespace can bypass the rules: drop these capabilities from the workload \
             (SECURITY.md)"
        );
    }

    /// The capabilities that the namespaces thread keeps, to repair or remove the rules and to open
    /// sockets.
    fn kept(&self, settings: &InterceptionSettings) -> Kept {
        let marks = Sockets::new(settings, ipv6_available()).need_net_admin();
        let changes_rules =
            self.interception.is_some() && (settings.repair || settings.on_exit == OnExit::Remove);
        match &self.interception {
            Some(rules) if rules.backend().runs_programs() && (changes_rules || marks) => {
                Kept::NetAdminForPrograms
            }
            _ if changes_rules || marks => Kept::NetAdmin,
            _ => Kept::Nothing,
        }
    }

    /// Tests that the rules of these settings catch connections, and that answers to imitated
    /// clients return to the proxy.
    pub(crate) async fn test(
        &self,
        self_test: &SelfTest,
        probes: &Probes,
        settings: &InterceptionSettings,
        deadline: Duration,
    ) -> Result<(), SelfTestError> {
        let prepare = SelfTestError::prepare;
        let plan = RulePlan::new(settings, self.ports, ipv6_available());
        let environment = self.access.environment().await.map_err(prepare)?;
        let caught = probes.caught.probes(&environment, &plan, settings, self.ports);
        let tested = self_test.run(caught.map_err(SelfTestError::Prepare)?, deadline).await?;
        if tested.is_empty() && self.profile != Profile::None {
            tracing::info!(
                "cannot test the rules: this process can make no connection that they would catch, or there is no route"
            );
        } else {
            tracing::debug!(?tested, "self-test: connections are caught");
        }
        let returned = if self.is_by_user() {
            // Only sockets opened before the change of user are treated like the workload's.
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
        tracing::debug!(?returned, "self-test: answers to imitated clients return");
        Ok(())
    }

    /// Runs [`test`](Self::test) at the start. A failure lists possible causes.
    pub(crate) async fn test_at_start(
        &self,
        self_test: &SelfTest,
        probes: &Probes,
        settings: &InterceptionSettings,
    ) -> Result<(), CommandError> {
        match self.test(self_test, probes, settings, START_DEADLINE).await {
            Ok(()) => Ok(()),
            Err(error) => Err(CommandError::SelfTest { error, suspects: self.suspects().await }),
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

    /// The reconciler of the rules; `None` if `interception.install` or `.repair` is off.
    pub(crate) async fn reconciler(
        &self,
        settings: &InterceptionSettings,
    ) -> Result<Option<RuleReconciler>, CommandError> {
        match self.interception.as_ref().filter(|_| settings.repair) {
            Some(rules) => Ok(Some(RuleReconciler::new(rules.clone()).await?)),
            None => Ok(None),
        }
    }

    /// The rules, if this proxy installs them and they exempt the kubelet's probes.
    pub(crate) fn exempting_probes(&self) -> Option<&Interception> {
        let exempts = self.plan.rules().iter().any(|rule| rule.id == KUBELET_PROBE_IN);
        self.interception.as_ref().filter(|_| exempts)
    }

    /// Keeps or removes the rules at the end, as `interception.on_exit` says.
    pub(crate) async fn leave(&self, settings: &InterceptionSettings) -> Result<(), CommandError> {
        let Some(interception) = &self.interception else {
            return Ok(());
        };
        match settings.on_exit {
            OnExit::Keep => leave_closed(interception, settings.repair).await?,
            OnExit::Remove => {
                interception.remove().await?;
                tracing::info!("rules removed: traffic is direct and in plaintext from now on");
            }
        }
        Ok(())
    }
}

/// Runs the reconciler and applies changed settings, for ever.
pub(crate) async fn reconcile(
    reconciler: Option<RuleReconciler>,
    mut reload: Reload,
    readiness: Readiness,
    gate: PauseGate,
) {
    let Some(mut reconciler) = reconciler else {
        return reload.refuse_changes().await;
    };
    let mut settings = reload.subscribe();
    tokio::spawn(async move { reload.follow().await });
    let access = reconciler.access();
    loop {
        // The gate waits for a started repair: until then no other process may change the rules.
        let event = gate.pass_until(reconciler.next(&mut settings), access.finish()).await;
        let Some(event) = event else {
            // The process that tried to take over may have changed the rules.
            reconciler.verify_now();
            continue;
        };
        report(&event);
        let intact = event.is_intact();
        metrics::rules_intact(intact);
        readiness.rules_intact(intact);
    }
}

/// Logs and counts an event.
fn report(event: &Event) {
    match event {
        Event::Repaired { difference, took, fight } => {
            let (missing, unexpected) = difference.counts();
            metrics::rules_repaired();
            if *fight {
                tracing::debug!(
                    missing,
                    unexpected,
                    ?took,
                    "repaired the rules, which another program had changed, in a fight"
                );
            } else {
                tracing::warn!(
                    missing,
                    unexpected,
                    ?took,
                    "repaired the rules, which another program had changed"
                );
            }
            tracing::debug!("the change was:\n{difference}");
        }
        Event::Followed { rules, .. } => {
            tracing::info!(rules, "applied the changed settings to the rules atomically");
        }
        Event::Intact => {
            tracing::info!(
                "the rules are intact again: the workload's traffic is no longer blocked"
            );
        }
        Event::Fight { difference } => {
            let (missing, unexpected) = difference.counts();
            tracing::error!(
                missing,
                unexpected,
                hint = "stop that program, or set interception.profile: none",
                "another program changes the rules repeatedly: the workload's traffic is blocked until it stops\n{difference}"
            );
        }
        Event::Failed { error, pause } => {
            let error = chain(error);
            tracing::error!(error, ?pause, "cannot watch or repair the rules: retrying");
        }
    }
}
