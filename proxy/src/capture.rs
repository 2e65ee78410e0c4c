//! The rules in the life of a proxy: checked, installed, tested, kept, and removed or left behind.
//!
//! Not here: the rules, and how they get into the kernel (the interception crate).

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use underpass_config::{Dns, InterceptionSettings, OnExit, Profile, Settings};
use underpass_interception::{
    Interception, KUBELET_PROBE_IN, Kept, Ports, Probe, ProxyUser, RulePlan, Sockets, WayBack,
    check_reverse_path, ipv6_available,
};

use crate::cli::CommandError;
use crate::endpoints::Readiness;
use crate::error::chain;
use crate::gate::Gate;
use crate::guard::{Event, Guard};
use crate::metrics;
use crate::reload::Reload;
use crate::self_test::{self, SelfTest, SelfTestError};

/// A process has one user.
static HAS_BECOME_PROXY: AtomicBool = AtomicBool::new(false);

/// Whether the process has become the user by which the rules know the proxy.
pub(crate) fn has_become_proxy() -> bool {
    HAS_BECOME_PROXY.load(Relaxed)
}

/// What catches the workload's traffic.
#[derive(Debug)]
pub(crate) struct Capture {
    /// `None` if the rules are someone else's to install.
    interception: Option<Interception>,
    plan: RulePlan,
    ports: Ports,
    profile: Profile,
    /// Whom the process becomes once the rules stand.
    user: Option<ProxyUser>,
}

/// The connections of the self-test, whose sockets are open.
#[derive(Debug)]
pub(crate) struct Probes {
    caught: Vec<Probe>,
    returned: Vec<WayBack>,
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
        None => tracing::info!(
            "the rules stay, so nothing leaves in plain; `underpass rules remove` removes them"
        ),
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
    pub(crate) async fn prepare(settings: &Settings) -> Result<Self, CommandError> {
        let ports = Ports::of(settings);
        let interception = &settings.interception;
        if interception.dns == Dns::Capture && interception.profile != Profile::None {
            return Err(CommandError::NoDnsProxy { port: ports.dns });
        }
        check_reverse_path(interception)?;
        let user = ProxyUser::required(interception)?;
        let prepared = if interception.install {
            Interception::prepare(interception, ports).await?
        } else {
            None
        };
        let plan = match &prepared {
            Some(prepared) => prepared.plan().clone(),
            None => RulePlan::new(interception, ports, ipv6_available()),
        };
        Ok(Self { interception: prepared, plan, ports, profile: interception.profile, user })
    }

    /// Whether the rules know the proxy by its user.
    pub(crate) fn is_by_user(&self) -> bool {
        matches!(self.profile, Profile::Sidecar | Profile::Osm)
    }

    pub(crate) async fn install(&self) -> Result<(), CommandError> {
        let Some(interception) = &self.interception else {
            tracing::info!(profile = %self.profile, "the rules are someone else's: none are installed");
            return Ok(());
        };
        if interception.ipv6_absent() {
            tracing::info!("the kernel has no IPv6: there is none to catch");
        }
        if interception.ipv6_disabled() {
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
            tracing::info!(%backend, rules, "the rules stand as they should");
            return Ok(());
        }
        interception.install().await?;
        tracing::info!(%backend, rules, "rules installed");
        Ok(())
    }

    /// Opens the sockets of the self-test.
    pub(crate) fn probes(&self, settings: &InterceptionSettings) -> Result<Probes, CommandError> {
        let sockets = Sockets::new(settings, ipv6_available());
        let prepare = || {
            let caught = Probe::prepare(&self.plan, settings, self.ports)?;
            let returned = WayBack::prepare(&self.plan, &sockets)?;
            Ok(Probes { caught, returned })
        };
        prepare().map_err(|error| CommandError::SelfTest(SelfTestError::Prepare(error)))
    }

    /// Becomes the user by which the rules know the proxy, and gives up what it no longer needs. Whether it is another user now.
    pub(crate) fn become_proxy(
        &self,
        settings: &InterceptionSettings,
    ) -> Result<bool, CommandError> {
        let Some(user) = self.user else {
            return Ok(false);
        };
        let sockets = Sockets::new(settings, ipv6_available());
        let changes_rules =
            self.interception.is_some() && (settings.repair || settings.on_exit == OnExit::Remove);
        let kept = match &self.interception {
            Some(interception) if changes_rules && interception.backend().runs_programs() => {
                Kept::NetAdminForPrograms
            }
            _ if changes_rules || sockets.need_net_admin() => Kept::NetAdmin,
            _ => Kept::Nothing,
        };
        user.become_it(kept)?;
        HAS_BECOME_PROXY.store(true, Relaxed);
        tracing::info!(
            uid = user.uid,
            gid = user.gid,
            ?kept,
            "runs as the user that the rules know"
        );
        Ok(true)
    }

    /// Tests that what should be caught is, and that what should come back does.
    pub(crate) async fn test(
        &self,
        self_test: &SelfTest,
        probes: Probes,
    ) -> Result<(), CommandError> {
        let tested = self_test.run(probes.caught).await.map_err(CommandError::SelfTest)?;
        if tested.is_empty() && self.profile != Profile::None {
            tracing::info!(
                "the rules could not be tested from here: no connection that this process can make would be caught, or has a route"
            );
        } else {
            tracing::debug!(?tested, "connections are caught");
        }
        let returned = self_test::run_way_back(probes.returned).await;
        let returned = returned.map_err(CommandError::SelfTest)?;
        tracing::debug!(?returned, "answers to imitated clients come back");
        Ok(())
    }

    /// Who keeps the rules from now on; `None` if nobody is to.
    pub(crate) fn guard(
        &self,
        settings: &InterceptionSettings,
    ) -> Result<Option<Guard>, CommandError> {
        let kept = self.interception.as_ref().filter(|_| settings.repair);
        Ok(kept.cloned().map(Guard::new).transpose()?)
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
    gate: Gate,
) {
    let Some(mut guard) = guard else {
        return reload.refuse_changes().await;
    };
    let mut settings = reload.subscribe();
    tokio::spawn(async move { reload.follow().await });
    loop {
        let Some(event) = gate.pass(guard.next(&mut settings)).await else {
            // Another process may have changed them.
            guard.look_again();
            continue;
        };
        let intact = tell(&event);
        metrics::rules_intact(intact);
        readiness.rules_intact(intact);
    }
}

/// Logs and counts; says whether the rules are as they should be.
fn tell(event: &Event) -> bool {
    match event {
        Event::Repaired { difference, took } => {
            let (missing, unexpected) = difference.counts();
            metrics::rules_repaired();
            tracing::warn!(
                missing,
                unexpected,
                ?took,
                "another program had changed the rules; they are as they should be again"
            );
            tracing::debug!("what had been changed:\n{difference}");
        }
        Event::Followed { rules } => {
            tracing::info!(rules, "the settings changed, and the rules with them, in one step");
        }
        Event::Intact => tracing::info!("the rules are as they should be again"),
        Event::GaveUp { difference, rest } => {
            let (missing, unexpected) = difference.counts();
            tracing::error!(
                missing,
                unexpected,
                ?rest,
                "another program changes the rules again and again: giving up for a while, traffic may go uncaught. \
                 Stop it, or set interception.profile: none\n{difference}"
            );
        }
        Event::Failed { error, rest } => {
            let error = chain(error);
            tracing::error!(error, ?rest, "the rules cannot be watched or put back; trying again");
        }
    }
    !matches!(event, Event::GaveUp { .. } | Event::Failed { .. })
}
