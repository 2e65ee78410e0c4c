//! The notices of the proxy: what an operator should know, although no connection fails by it now.

use crate::admin::api::states::Part;
use crate::admin::api::status::{Problem, Status};
use crate::observe::conditions::Condition;

/// The time for which a repair of the rules is shown, in seconds.
const REPAIR_WINDOW: u64 = 300;

/// The notices of the proxy with this status.
pub(super) fn of(status: &Status, conditions: &[Condition]) -> Vec<Problem> {
    let mut notices: Vec<_> = repairs(status).into_iter().collect();
    notices.extend(conditions.iter().filter(|one| !one.is_problem()).map(Problem::from));
    notices
}

fn repairs(status: &Status) -> Option<Problem> {
    let rules = status.rules.as_ref()?;
    let ago = rules.last_repair_seconds_ago.filter(|ago| *ago <= REPAIR_WINDOW)?;
    let count = rules.repairs;
    Some(Problem {
        part: Part::Rules,
        pod: None,
        problem: format!(
            "another program has changed the rules; repairs: {count}, the last one {ago} s ago"
        ),
        hint: Some("find that program: the level debug logs what it changed".to_owned()),
    })
}

impl From<&Condition> for Problem {
    fn from(condition: &Condition) -> Self {
        Self {
            part: condition.part(),
            pod: None,
            problem: condition.text(),
            hint: Some(condition.hint().to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::api::status::Rules;

    #[test]
    fn only_recent_repairs_are_noticed() {
        let status = |ago| {
            let rules = Rules { repairs: 2, last_repair_seconds_ago: ago, ..Rules::default() };
            Status { rules: Some(rules), ..Status::default() }
        };
        assert!(of(&status(None), &[]).is_empty());
        assert!(of(&status(Some(REPAIR_WINDOW + 1)), &[]).is_empty());
        let notices = of(&status(Some(7)), &[Condition::ProgramReplaced]);
        let texts: Vec<_> = notices.iter().map(|notice| &*notice.problem).collect();
        assert!(texts[0].contains("repairs: 2, the last one 7 s ago"), "{texts:?}");
        assert!(texts[1].contains("the program file was replaced"), "{texts:?}");
    }
}
