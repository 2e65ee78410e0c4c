//! Limits the use of one resource, in total and for each part, such as a pod or a source.
//!
//! Budgets form a tree: for example node, pod, direction, source. Units taken from a part count at
//! every level above it.
//!
//! A fair part may hold at most 4 · free² / total units, which shrinks with the free units. A
//! single part gets three fifths of the total, and a second one half of the rest. After seventeen
//! parts have taken all they can, a sixtieth is left. A new part therefore gets some units, and
//! busy parts converge to equal use. This needs no list of the parts and revokes no unit.
//!
//! Taking and returning units costs a few atomic operations and no lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// A reserving part leaves 1/`RESERVED` of the units that the other parts do not use.
const RESERVED: usize = 4;
/// The limit of a fair part while no unit is in use, as a multiple of the total.
const MAX_MULTIPLE: usize = 4;
/// The minimum limit of a fair part while units are free: the two sockets of a connection.
const MIN_SHARE: usize = 2;

/// A limit on the units of a resource, and the number in use.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    used: AtomicUsize,
    whole: Option<(Arc<Self>, Sharing)>,
    /// The number of parts that are [`Sharing::KnownParts`].
    known_parts: AtomicUsize,
}

/// The rule by which a part shares units with the other parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// The part may take every free unit.
    Greedy,
    /// The part leaves a quarter of the free units to others: for two or three permanent parts.
    Reserving,
    /// All parts are known: a single part may use everything, several parts share fairly.
    KnownParts,
    /// New parts may appear at any time: the part shares fairly even while it is alone.
    UnknownParts,
}

/// The limit that prevents taking units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exhausted {
    /// The part has used its share; other parts may still get units.
    Share,
    /// No unit is free.
    Whole,
}

impl Budget {
    /// Creates a budget of `limit` units.
    pub fn new(limit: usize) -> Self {
        Self { limit, used: AtomicUsize::new(0), whole: None, known_parts: 0.into() }
    }

    /// Creates a part of `whole` that may use at most `limit` units.
    pub fn part(whole: &Arc<Self>, limit: usize, sharing: Sharing) -> Self {
        if sharing == Sharing::KnownParts {
            whole.known_parts.fetch_add(1, SeqCst);
        }
        let whole = Some((whole.clone(), sharing));
        Self { limit, used: AtomicUsize::new(0), whole, known_parts: 0.into() }
    }

    /// The number of units.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// The number of units in use.
    pub fn used(&self) -> usize {
        self.used.load(SeqCst)
    }

    /// The number of units that can be taken now.
    pub fn free(&self) -> usize {
        self.bounds().share.saturating_sub(self.used())
    }

    /// Takes `amount` units at every level, or none.
    ///
    /// # Errors
    /// The exhausted limit.
    pub fn take(&self, amount: usize) -> Result<(), Exhausted> {
        let Bounds { left, share } = self.bounds();
        let before = self.used.fetch_add(amount, SeqCst);
        let fits = |most: usize| before.checked_add(amount).is_some_and(|sum| sum <= most);
        if !fits(share) {
            self.used.fetch_sub(amount, SeqCst);
            return Err(if fits(left) { Exhausted::Share } else { Exhausted::Whole });
        }
        // Other threads may change a level between two reads. Only the root's limit is exact.
        let Some((whole, _)) = &self.whole else { return Ok(()) };
        whole.take_within_limit(amount).inspect_err(|_| {
            self.used.fetch_sub(amount, SeqCst);
        })
    }

    fn take_within_limit(&self, amount: usize) -> Result<(), Exhausted> {
        let before = self.used.fetch_add(amount, SeqCst);
        let taken = match &self.whole {
            Some((whole, _)) => whole.take_within_limit(amount),
            None if before.saturating_add(amount) > self.limit => Err(Exhausted::Whole),
            None => Ok(()),
        };
        if taken.is_err() {
            self.used.fetch_sub(amount, SeqCst);
        }
        taken
    }

    /// Takes `amount` units even above the limits: for resources that exist already.
    pub fn take_beyond_limit(&self, amount: usize) {
        self.used.fetch_add(amount, SeqCst);
        if let Some((whole, _)) = &self.whole {
            whole.take_beyond_limit(amount);
        }
    }

    /// Returns `amount` units.
    pub fn give_back(&self, amount: usize) {
        self.used.fetch_sub(amount, SeqCst);
        if let Some((whole, _)) = &self.whole {
            whole.give_back(amount);
        }
    }

    fn bounds(&self) -> Bounds {
        let Some((whole, sharing)) = &self.whole else {
            return Bounds { left: self.limit, share: self.limit };
        };
        // Another thread may change the use between two reads: a share is approximate, the root's
        // limit exact.
        let (all, used) = (whole.bounds().share, self.used());
        let siblings = whole.used().saturating_sub(used);
        let left = all.saturating_sub(siblings);
        let fair = || fair_share(left.saturating_sub(used), all);
        let share = match sharing {
            Sharing::Greedy => left,
            Sharing::Reserving => left - left / RESERVED,
            Sharing::KnownParts if whole.known_parts.load(SeqCst) < 2 => left,
            Sharing::KnownParts | Sharing::UnknownParts => fair(),
        };
        Bounds { left, share: share.min(left).min(self.limit) }
    }
}

/// The limit of a fair part of `whole` while `free` units are free.
fn fair_share(free: usize, whole: usize) -> usize {
    if whole == usize::MAX {
        return whole;
    }
    let scaled = free.saturating_mul(free).saturating_mul(MAX_MULTIPLE);
    (scaled / whole.max(1)).max(MIN_SHARE)
}

impl Drop for Budget {
    fn drop(&mut self) {
        if let Some((whole, Sharing::KnownParts)) = &self.whole {
            whole.known_parts.fetch_sub(1, SeqCst);
        }
    }
}

/// The limits of a part at this moment.
struct Bounds {
    /// The number of units that the other parts leave.
    left: usize,
    /// The number of those units that the part may use.
    share: usize,
}

/// Units taken from a budget, returned when dropped.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
    amount: usize,
}

impl Share {
    /// Takes `amount` units of `budget`.
    ///
    /// # Errors
    /// The exhausted limit.
    pub fn take(budget: &Arc<Budget>, amount: usize) -> Result<Self, Exhausted> {
        budget.take(amount)?;
        Ok(Self { budget: budget.clone(), amount })
    }

    /// Takes `amount` units of `budget` even above the limits.
    pub fn take_beyond_limit(budget: &Arc<Budget>, amount: usize) -> Self {
        budget.take_beyond_limit(amount);
        Self { budget: budget.clone(), amount }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.give_back(self.amount);
    }
}

#[cfg(test)]
mod tests;
