//! The performance goals of the proxy. A goal relative to ztunnel is evaluated only if ztunnel was
//! measured.
//!
//! One more goal is not among them: rules are installed within 3 ms. `--bench rules` measures it.

use std::fmt;

use serde_json::{Value, json};

use crate::options::PathName::{
    self, Hbone, Node, NodeOneProcess, Plain, RelaySplice, ZtunnelHbone, ZtunnelPlain,
};
use crate::workload::{
    AT_REST, BITS, CONNECTIONS, CPU_EACH, CPU_PER_BYTE, KIB_PER_IDLE_CONNECTION, MEDIAN, REQUESTS,
};

/// A goal for a figure of a workload on a path, absolute or relative to another path.
#[derive(Debug)]
pub(crate) struct Goal {
    pub(crate) workload: &'static str,
    /// The name of the figure, or the common prefix of several figures, of which the largest
    /// counts.
    pub(crate) figure: &'static str,
    pub(crate) path: PathName,
    pub(crate) against: Option<PathName>,
    bound: Bound,
}

#[derive(Debug, Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}
use Bound::{AtLeast, AtMost};

/// All goals in the order of the report.
#[rustfmt::skip]
pub(crate) const GOALS: &[Goal] = &[
    goal("bulk x1", BITS, Hbone, Some(ZtunnelHbone), AtLeast(1.4)),
    goal("bulk x1", CPU_PER_BYTE, Hbone, Some(ZtunnelHbone), AtMost(0.75)),
    goal("bulk x8", BITS, Hbone, Some(ZtunnelHbone), AtLeast(1.5)),
    goal("bulk reverse x1", BITS, Hbone, Some(ZtunnelHbone), AtLeast(1.45)),
    goal("bulk x1", BITS, Plain, Some(ZtunnelPlain), AtLeast(1.4)),
    goal("bulk x1", BITS, Plain, Some(RelaySplice), AtLeast(0.95)),
    goal("bulk x1", CPU_PER_BYTE, Plain, Some(ZtunnelPlain), AtMost(0.55)),
    goal("requests x1", MEDIAN, Hbone, None, AtMost(100.0)),
    goal("requests x1", MEDIAN, Hbone, Some(ZtunnelHbone), AtMost(0.8)),
    goal("requests x1", CPU_EACH, Hbone, Some(ZtunnelHbone), AtMost(0.7)),
    goal("requests x64", REQUESTS, Hbone, Some(ZtunnelHbone), AtLeast(1.5)),
    goal("requests x64", REQUESTS, Plain, Some(ZtunnelPlain), AtLeast(1.4)),
    goal("new connections x16", CONNECTIONS, Hbone, Some(ZtunnelHbone), AtLeast(1.6)),
    goal("new connections x16", CPU_EACH, Hbone, Some(ZtunnelHbone), AtMost(0.65)),
    goal("new connections x16", CONNECTIONS, Plain, Some(ZtunnelPlain), AtLeast(1.6)),
    goal("idle x2000", KIB_PER_IDLE_CONNECTION, Hbone, None, AtMost(4.0)),
    goal("idle x2000", KIB_PER_IDLE_CONNECTION, Plain, None, AtMost(4.0)),
    goal("idle x2000", AT_REST, Hbone, None, AtMost(8.0)),
    goal("idle x2000", AT_REST, Plain, None, AtMost(8.0)),
    goal("bulk x1", CPU_PER_BYTE, Node, Some(NodeOneProcess), AtMost(1.03)),
    goal("requests x64", CPU_EACH, Node, Some(NodeOneProcess), AtMost(1.03)),
    goal("new connections x16", CPU_EACH, Node, Some(NodeOneProcess), AtMost(1.03)),
];

const fn goal(
    workload: &'static str,
    figure: &'static str,
    path: PathName,
    against: Option<PathName>,
    bound: Bound,
) -> Goal {
    Goal { workload, figure, path, against, bound }
}

/// The evaluation of a goal.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Verdict {
    /// A required figure was not measured.
    Unknown,
    Met,
    /// The relative distance from the bound.
    MissedBy(f64),
}

impl Goal {
    /// Evaluates a measured figure or ratio.
    pub(crate) fn verdict(&self, measured: Option<f64>) -> Verdict {
        let missing = measured.map(|measured| match self.bound {
            AtLeast(bound) => 1.0 - measured / bound,
            AtMost(bound) => measured / bound - 1.0,
        });
        match missing {
            None => Verdict::Unknown,
            Some(missing) if missing <= 0.0 => Verdict::Met,
            Some(missing) => Verdict::MissedBy(missing),
        }
    }

    pub(crate) fn json(&self, measured: Option<f64>) -> Value {
        json!({ "goal": self.to_string(), "measured": measured, "verdict": self.verdict(measured).to_string() })
    }
}

/// For example `bulk x1, Gbit/s: hbone ≥ 1.45 × ztunnel-hbone`.
impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sign, bound) = match self.bound {
            AtLeast(bound) => ('≥', bound),
            AtMost(bound) => ('≤', bound),
        };
        write!(f, "{}, {}: {} {sign} {bound}", self.workload, self.figure, self.path)?;
        self.against.map_or(Ok(()), |against| write!(f, " × {against}"))
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("not measured"),
            Self::Met => f.write_str("met"),
            Self::MissedBy(share) => write!(f, "missed by {:.0} %", share * 100.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;
    use crate::options::WorkloadGroup;
    use crate::workload::Workload;

    #[test]
    fn goal_is_met_on_the_right_side_of_its_bound() {
        let least = goal("", "", Hbone, None, AtLeast(2.0));
        assert_eq!(least.verdict(Some(2.0)), Verdict::Met);
        assert_eq!(least.verdict(Some(1.0)), Verdict::MissedBy(0.5));
        let most = goal("", "", Hbone, None, AtMost(2.0));
        assert_eq!(most.verdict(Some(1.0)), Verdict::Met);
        assert_eq!(most.verdict(Some(3.0)), Verdict::MissedBy(0.5));
        assert_eq!(most.verdict(None), Verdict::Unknown);
    }

    #[test]
    fn goals_refer_to_existing_workloads() {
        let known: Vec<_> =
            WorkloadGroup::value_variants().iter().flat_map(|what| Workload::of(*what)).collect();
        let known: Vec<_> = known.iter().map(ToString::to_string).collect();
        for goal in GOALS {
            assert!(known.iter().any(|workload| workload == goal.workload), "{goal}");
        }
    }

    #[test]
    fn goal_prints_its_comparison() {
        let texts: Vec<_> = GOALS.iter().map(ToString::to_string).collect();
        assert_eq!(texts[0], "bulk x1, Gbit/s: hbone ≥ 1.4 × ztunnel-hbone");
        assert_eq!(texts[7], "requests x1, p50 µs: hbone ≤ 100");
    }
}
