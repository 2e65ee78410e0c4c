//! The rules in the life of a proxy: checked, installed, tested, kept, and removed or left behind.
//!
//! Not here: the rules, and how they get into the kernel (the interception crate).

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
use crate::rules::guard::{Event, Guard};
use crate::rules::owner::{role, started};
use crate::rules::self_test;
use crate::rules::self_test::{SelfTest, SelfTestError};

/// For each connection of the self-test at the start: one within a namespace takes well under a
/// millisecond; a machine that is busy starting takes longer.
const START_DEADLINE: Duration = Duration::from_secs(5);

/// What catches the workload's traffic.
#[derive(Debug, Clone)]
pub(crate) struct Capture {
    /// Where the workload's traffic is caught.
    access: NamespaceAccess,
    /// Performs what takes privileges.
    thread: NamespaceThread,
    /// `None` if the rules are someone else's to install.
    interception: Option<Interception>,
    plan: RulePlan,
    ports: Ports,
    profile: Profile,
    /// Whom the process becomes once the rules stand.
    user: Option<ProxyUser>,
}

/// The sockets of the self-test, opened before the process became the proxy's user.
#[derive(Debug)]
pub(crate) struct Probes {
    caught: ProbeSockets,
    returned: Vec<ReturnPathProbe>,
}

/// Leaves the rules behind, as they should be: another program may have changed them, and repairing been given up or never wanted.
async fn leave_closed(interception: &Interception, repair: bool) -> Result<(), CommandError> {
    let difference = match interception.verify().await {
        Ok(difference) => difference,
        Err(error) if repair => return Err(error.into()),
        Err(error) => {
            tracing::info!(
                error = chain(&error),
                "the rules stay as they are, and cannot be looked at"
            );
            return Ok(());
        }
    };
    match difference {
        None => {
            interception.unblock().await?;
            tracing::info!(
                "the rules stay, so nothing leaves in plain; `underpass rules remove` removes them"
            );
        }
        Some(_) if repair => {
            interception.install().await?;
            tracing::warn!(
                "another program had changed the rules; they are put back and stay, so nothing leaves in plain"
            );
        }
        Some(difference) => tracing::error!(
            %difference,
            "another program has changed the rules, and interception.repair is off: traffic may leave in plain"
        ),
    }
    Ok(())
}

impl Capture {
    /// Checks all that can be checked before anything is changed.
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

    /// Where the workload's traffic is caught.
    pub(crate) fn access(&self) -> &NamespaceAccess {
        &self.access
    }

    pub(crate) async fn install(&self) -> Result<(), CommandError> {
        let Some(interception) = &self.interception else {
            tracing::info!(profile = %self.profile, "the rules are someone else's: none are installed");
            return Ok(());
        };
        if interception.ipv6_absent() {
            tracing::info!("the kernel has no IPv6: there is none to catch");
        }
        if interception.ipv6_disabled().await? {
            tracing::info!(
                "IPv6 is disabled on the loopback interface (disable_ipv6): its rules are installed, and the \
                 workload's IPv6 goes nowhere until it is enabled there"
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
            tracing::info!(%backend, rules, "the rules stand as they should");
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

    /// Whether the rules know the proxy by its user.
    fn is_by_user(&self) -> bool {
        matches!(self.profile, Profile::Sidecar | Profile::Osm)
    }

    /// Becomes the user by which the rules know the proxy, if they do. Leaves the calling thread no
    /// capability, and with it the threads that it makes from now on, and the namespaces thread
    /// those that it needs.
    pub(crate) async fn confine(
        &self,
        settings: &InterceptionSettings,
    ) -> Result<(), CommandError> {
        let kept = self.kept(settings);
        if let Some(user) = self.user {
            self.thread.prepare_change_of_user(kept).await?;
            user.become_it()?;
            let ProxyUser { uid, gid } = user;
            tracing::info!(uid, gid, ?kept, "runs as the user that the rules know");
        } else {
            confine_thread(Kept::Nothing).map_err(CommandError::Start)?;
        }
        Ok(self.thread.confine(kept).await?)
    }

    /// Warns of other processes that can bypass the rules, as far as they can be seen. For while
    /// the process still may look.
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

    /// What the namespaces thread needs to the end: to repair or remove the rules, and to open
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

    /// Tests that what should be caught with these settings is, and that what should come back
    /// does.
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
                "the rules could not be tested from here: no connection that this process can make would be caught, or has a route"
            );
        } else {
            tracing::debug!(?tested, "connections are caught");
        }
        let returned = if self.is_by_user() {
            // Only those that were opened by another user are like the workload's.
            let own = probes.returned.iter().map(|connection| connection.destination.ip());
            let usable = self.access.usable_addresses(own.collect()).await.map_err(prepare)?;
            let is_current =
                |connection: &&ReturnPathProbe| usable.contains(&connection.destination.ip());
            let current = probes.returned.iter().filter(is_current);
            self_test::run_way_back(current, deadline).await?
        } else {
            let opened = self.access.open_return_path(settings, self.ports).await;
            self_test::run_way_back(&opened.map_err(prepare)?, deadline).await?
        };
        tracing::debug!(?returned, "answers to imitated clients come back");
        Ok(())
    }

    /// The same at the start, where a failure names what may be its cause.
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

    /// Rules of other programs that act before ours; none where the rules are not ours to install.
    pub(crate) async fn foreign_rules(&self) -> Result<Vec<ForeignRule>, InterceptionError> {
        match &self.interception {
            Some(interception) => interception.foreign_rules().await,
            None => Ok(Vec::new()),
        }
    }

    /// What may be the cause of a failed self-test: leftovers of other meshes, and foreign rules.
    pub(crate) async fn suspects(&self) -> Vec<String> {
        let Some(interception) = &self.interception else { return Vec::new() };
        let leftovers = interception.leftovers().await.unwrap_or_default();
        let foreign = interception.foreign_rules().await.unwrap_or_default();
        let leftovers = leftovers.iter().map(ToString::to_string);
        leftovers.chain(foreign.iter().map(ToString::to_string)).collect()
    }

    /// Who keeps the rules from now on; `None` if nobody is to.
    pub(crate) async fn guard(
        &self,
        settings: &InterceptionSettings,
    ) -> Result<Option<Guard>, CommandError> {
        match self.interception.as_ref().filter(|_| settings.repair) {
            Some(kept) => Ok(Some(Guard::new(kept.clone()).await?)),
            None => Ok(None),
        }
    }

    /// The rules, if they are ours and exempt the kubelet's probes.
    pub(crate) fn exempting_probes(&self) -> Option<&Interception> {
        let exempts = self.plan.rules().iter().any(|rule| rule.id == KUBELET_PROBE_IN);
        self.interception.as_ref().filter(|_| exempts)
    }

    /// At the end: the rules stay or go, as the settings say.
    pub(crate) async fn leave(&self, settings: &InterceptionSettings) -> Result<(), CommandError> {
        let Some(interception) = &self.interception else {
            return Ok(());
        };
        match settings.on_exit {
            OnExit::Keep => leave_closed(interception, settings.repair).await?,
            OnExit::Remove => {
                interception.remove().await?;
                tracing::info!("rules removed: traffic is direct and plain from now on");
            }
        }
        Ok(())
    }
}

/// Keeps the rules, and follows the settings, until the end.
pub(crate) async fn keep(
    guard: Option<Guard>,
    mut reload: Reload,
    readiness: Readiness,
    gate: PauseGate,
) {
    let Some(mut guard) = guard else {
        return reload.refuse_changes().await;
    };
    let mut settings = reload.subscribe();
    tokio::spawn(async move { reload.follow().await });
    let access = guard.access();
    loop {
        // A repair goes on to its end: until then no other process may change the rules.
        let event = gate.pass_until(guard.next(&mut settings), access.finish()).await;
        let Some(event) = event else {
            // Another process may have changed them.
            guard.look_again();
            continue;
        };
        report(&event);
        let intact = event.is_intact();
        metrics::rules_intact(intact);
        readiness.rules_intact(intact);
    }
}

/// Logs and counts.
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
                    "another program had changed the rules; they are put back"
                );
            } else {
                tracing::warn!(
                    missing,
                    unexpected,
                    ?took,
                    "another program had changed the rules; they are as they should be again"
                );
            }
            tracing::debug!("what had been changed:\n{difference}");
        }
        Event::Followed { rules, .. } => {
            tracing::info!(rules, "the settings changed, and the rules with them, in one step");
        }
        Event::Intact => {
            tracing::info!(
                "the rules are as they should be again; the workload's traffic is no longer blocked"
            );
        }
        Event::Fight { difference } => {
            let (missing, unexpected) = difference.counts();
            tracing::error!(
                missing,
                unexpected,
                hint = "stop that program, or set interception.profile: none",
                "another program changes the rules again and again: the workload's traffic is blocked until they stay\n{difference}"
            );
        }
        Event::Failed { error, pause } => {
            let error = chain(error);
            tracing::error!(error, ?pause, "the rules cannot be watched or put back; trying again");
        }
    }
}
