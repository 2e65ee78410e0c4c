//! Plans, and data derived from them, shared by all interceptions with equal inputs. The pods of a
//! node rarely have many different settings.

use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use underpass_config::InterceptionSettings;

use crate::backend::Backend;
use crate::backend::blackhole::Blackhole;
use crate::backend::verify::Listing;
use crate::plan::{Ports, RulePlan};

/// All plans in use.
static PLANS: Mutex<Vec<Weak<SharedPlan>>> = Mutex::new(Vec::new());

/// The inputs of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlanInputs {
    pub(crate) settings: InterceptionSettings,
    pub(crate) ports: Ports,
    pub(crate) backend: Backend,
    /// True if the kernel supports IPv6.
    pub(crate) ipv6: bool,
}

/// A plan and the data derived from it.
#[derive(Debug)]
pub(crate) struct SharedPlan {
    pub(crate) inputs: PlanInputs,
    pub(crate) plan: RulePlan,
    pub(crate) blackhole: Blackhole,
    expected: OnceLock<Listing>,
}

impl SharedPlan {
    /// Returns the plan for these inputs, which another interception may use already.
    pub(crate) fn of_inputs(inputs: PlanInputs) -> Arc<Self> {
        // No code panics while it holds the lock.
        let mut plans = PLANS.lock().unwrap_or_else(PoisonError::into_inner);
        plans.retain(|plan| plan.strong_count() > 0);
        let mut used = plans.iter().filter_map(Weak::upgrade);
        if let Some(planned) = used.find(|planned| planned.inputs == inputs) {
            return planned;
        }
        let PlanInputs { settings, ports, ipv6, .. } = &inputs;
        let plan = RulePlan::new(settings, *ports, *ipv6);
        let blackhole = Blackhole::new(settings, *ports, &plan);
        let planned = Arc::new(Self { inputs, plan, blackhole, expected: OnceLock::new() });
        plans.push(Arc::downgrade(&planned));
        planned
    }

    /// The listing that the backend returns if the rules are installed. Without the routes, which
    /// depend on the namespace.
    pub(crate) fn expected(&self) -> &Listing {
        self.expected.get_or_init(|| self.inputs.backend.expected(&self.plan))
    }
}

#[cfg(test)]
mod tests {
    use underpass_config::Sources;

    use super::*;

    fn inputs(assignment: &str) -> PlanInputs {
        let flags = vec![assignment.to_owned(), "workload.name=pod".to_owned()];
        let sources = Sources { file: None, environment: Vec::new(), flags };
        let settings = sources.load().unwrap();
        let ports = Ports::of(&settings);
        PlanInputs {
            settings: settings.interception,
            ports,
            backend: Backend::Nftables,
            ipv6: true,
        }
    }

    #[test]
    fn equal_settings_share_a_plan_and_a_listing() {
        let all =
            || (0..250).map(|_| SharedPlan::of_inputs(inputs("interception.profile=ambient")));
        let (first, pods) = (all().next().unwrap(), all().collect::<Vec<_>>());
        for pod in &pods {
            assert!(Arc::ptr_eq(pod, &first));
            assert!(std::ptr::eq(pod.expected(), first.expected()));
        }
    }

    #[test]
    fn different_inputs_have_different_plans() {
        let one = SharedPlan::of_inputs(inputs("interception.profile=ambient"));
        let excluding = inputs("interception.outbound.exclude_cidrs=192.0.2.0/24");
        let others = [
            excluding,
            PlanInputs { ipv6: false, ..one.inputs.clone() },
            PlanInputs { ports: Ports { hbone: 1, ..one.inputs.ports }, ..one.inputs.clone() },
        ];
        for other in others {
            assert!(!Arc::ptr_eq(&one, &SharedPlan::of_inputs(other)));
        }
    }

    #[test]
    fn plan_is_freed_with_the_last_interception_that_uses_it() {
        let unlike_others = || inputs("proxy.outbound_port=16001");
        let plan = SharedPlan::of_inputs(unlike_others());
        let freed = Arc::downgrade(&plan);
        drop(plan);
        assert!(freed.upgrade().is_none());
        assert_eq!(SharedPlan::of_inputs(unlike_others()).inputs, unlike_others());
    }
}
