//! The use of the process' budgets, which a scrape reads.

use std::fmt;
use std::sync::OnceLock;

use super::exposition::{Kind, Page};

const USED: &str = "underpass_budget_used";
const LIMIT: &str = "underpass_budget_limit";

/// The use of one budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BudgetUse {
    pub(crate) budget: &'static str,
    pub(crate) used: usize,
    /// `usize::MAX` means no limit.
    pub(crate) limit: usize,
}

/// Reads the use of all budgets.
type Read = Box<dyn Fn() -> Vec<BudgetUse> + Send + Sync>;

/// The budgets of the process.
#[derive(Default)]
pub(crate) struct Budgets(OnceLock<Read>);

impl fmt::Debug for Budgets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Budgets")
    }
}

impl Budgets {
    /// Sets the function that reads the budgets. Only the first call has an effect.
    pub(crate) fn read_by(&self, read: impl Fn() -> Vec<BudgetUse> + Send + Sync + 'static) {
        self.0.set(Box::new(read)).ok();
    }

    pub(super) fn render(&self, page: &mut Page) {
        let Some(read) = self.0.get() else { return };
        let budgets = read();
        page.family(USED, Kind::Gauge, "Units of a budget of the process in use.");
        for BudgetUse { budget, used, .. } in &budgets {
            page.line(format_args!("{USED}{{budget=\"{budget}\"}} {used}"));
        }
        page.family(LIMIT, Kind::Gauge, "Units of a budget of the process, if it is limited.");
        for BudgetUse { budget, limit, .. } in budgets.iter().filter(|one| one.limit < usize::MAX) {
            page.line(format_args!("{LIMIT}{{budget=\"{budget}\"}} {limit}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::exposition::Format;
    use super::*;

    #[test]
    fn unlimited_budget_has_no_limit_series() {
        let budgets = Budgets::default();
        budgets.read_by(|| {
            let of = |budget, used, limit| BudgetUse { budget, used, limit };
            vec![of("buffers", 3, 10), of("connections", 7, usize::MAX)]
        });
        let mut page = Page::new(Format::Prometheus);
        budgets.render(&mut page);
        let text = page.into_text();
        let samples: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(
            samples,
            [
                "underpass_budget_used{budget=\"buffers\"} 3",
                "underpass_budget_used{budget=\"connections\"} 7",
                "underpass_budget_limit{budget=\"buffers\"} 10",
            ]
        );
    }
}
