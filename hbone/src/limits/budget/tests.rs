//! Tests of the units that a budget grants to one part and leaves to others.

use super::*;

fn root(limit: usize) -> Arc<Budget> {
    Arc::new(Budget::new(limit))
}

fn part(whole: &Arc<Budget>, sharing: Sharing) -> Arc<Budget> {
    Arc::new(Budget::part(whole, usize::MAX, sharing))
}

/// Takes single units until the budget refuses. Returns their number and the exhausted limit.
fn fill(budget: &Budget) -> (usize, Exhausted) {
    let mut taken = 0;
    loop {
        match budget.take(1) {
            Ok(()) => taken += 1,
            Err(exhausted) => return (taken, exhausted),
        }
    }
}

#[test]
fn budget_grants_up_to_its_limit_and_reuses_released_units() {
    let budget = root(3);
    assert_eq!(fill(&budget), (3, Exhausted::Whole));
    budget.give_back(2);
    assert_eq!(budget.take(3), Err(Exhausted::Whole));
    assert_eq!(budget.take(2), Ok(()));
    assert_eq!(root(usize::MAX).take(usize::MAX), Ok(()));
}

#[test]
fn part_counts_at_every_level() {
    let whole = root(10);
    let middle = part(&whole, Sharing::Greedy);
    let leaf = Budget::part(&middle, 4, Sharing::Greedy);
    assert_eq!(fill(&leaf), (4, Exhausted::Share));
    assert_eq!((whole.used(), middle.used(), leaf.used()), (4, 4, 4));
    let other = part(&middle, Sharing::Greedy);
    assert_eq!(fill(&other), (6, Exhausted::Whole));
    assert_eq!(leaf.take(1), Err(Exhausted::Whole));
    other.give_back(6);
    leaf.give_back(4);
    assert_eq!((whole.used(), middle.used(), leaf.used()), (0, 0, 0));
}

#[test]
fn refused_amount_is_not_counted() {
    let whole = root(2);
    let leaf = part(&whole, Sharing::Greedy);
    assert_eq!(leaf.take(3), Err(Exhausted::Whole));
    assert_eq!((whole.used(), leaf.used()), (0, 0));
}

#[test]
fn unknown_parts_leave_units_for_new_parts() {
    let whole = root(16_384);
    let mut parts = Vec::new();
    for _ in 0..17 {
        let stranger = part(&whole, Sharing::UnknownParts);
        assert_eq!(fill(&stranger).1, Exhausted::Share);
        parts.push(stranger);
    }
    assert!(parts[0].used() > 16_384 * 3 / 5 && parts[0].used() < 16_384 * 2 / 3);
    assert!(whole.free() > 16_384 / 60, "{}", whole.free());
}

#[test]
fn unknown_parts_converge_to_equal_use() {
    let whole = root(1000);
    let parts: Vec<_> = (0..4).map(|_| part(&whole, Sharing::UnknownParts)).collect();
    fill(&parts[0]);
    for _ in 0..20 {
        // Each part closes some connections, then opens as many as it can, one at a time.
        for part in &parts {
            part.give_back(part.used() / 4);
        }
        while parts.iter().filter(|part| part.take(1).is_ok()).count() > 0 {}
    }
    let used = || parts.iter().map(|part| part.used());
    let (least, most) = (used().min().unwrap(), used().max().unwrap());
    assert!(most <= least + 1, "{least} to {most}");
}

#[test]
fn small_budget_is_used_to_the_last_unit() {
    for limit in 1..=MIN_SHARE {
        let whole = root(limit);
        assert_eq!(fill(&part(&whole, Sharing::UnknownParts)), (limit, Exhausted::Whole));
    }
    let whole = root(10);
    whole.take(8).unwrap();
    assert_eq!(fill(&part(&whole, Sharing::UnknownParts)), (2, Exhausted::Whole));
}

#[test]
fn single_known_part_may_use_everything() {
    let whole = root(100);
    let first = part(&whole, Sharing::KnownParts);
    assert_eq!(fill(&first), (100, Exhausted::Whole));
    first.give_back(100);
    let second = part(&whole, Sharing::KnownParts);
    assert_eq!(fill(&first), (61, Exhausted::Share));
    drop(second);
    assert_eq!(fill(&first), (39, Exhausted::Whole));
}

#[test]
fn reserving_part_leaves_a_quarter_to_its_sibling() {
    let whole = root(100);
    let [first, second] = [(), ()].map(|()| part(&whole, Sharing::Reserving));
    assert_eq!(fill(&first), (75, Exhausted::Share));
    assert_eq!(fill(&second), (19, Exhausted::Share));
    first.give_back(75);
    assert_eq!(fill(&second).0 + 19, 75);
}

#[test]
fn share_is_given_back_when_dropped() {
    let whole = root(2);
    let share = Share::take(&whole, 2).unwrap();
    assert_eq!(Share::take(&whole, 1).err(), Some(Exhausted::Whole));
    let beyond = Share::take_beyond_limit(&whole, 1);
    assert_eq!((whole.used(), whole.free()), (3, 0));
    drop((share, beyond));
    assert_eq!((whole.used(), whole.free()), (0, 2));
}
