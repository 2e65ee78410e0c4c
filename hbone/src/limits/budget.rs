//! A budget: how much of one resource is in use, and how much each part of it may take.
//!
//! Budgets form a tree, for example node, pod, direction, source. What a part takes counts at every
//! level above it. A part that shares fairly may hold the less, the less is free: at most 4 · free²
//! / whole. One alone gets three fifths, the second one half of the rest, and seventeen of them
//! that take all they get leave a sixtieth. So a newcomer gets some, and parts that release and
//! take again converge to equal use. This needs no list of the siblings and evicts nothing.
//!
//! Taking and giving back are a few atomic operations and no lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// A reserving part leaves one of so many parts of what its siblings do not use.
const RESERVED: usize = 4;
/// How much a fair part may hold when everything is free, in wholes.
const ALL_FREE: usize = 4;
/// What a fair part may hold as long as anything is free: the two sockets of a connection.
const LEAST_SHARE: usize = 2;

/// How much of a resource may be used at once, and how much is.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    used: AtomicUsize,
    whole: Option<(Arc<Self>, Sharing)>,
    /// How many of its parts share as members.
    members: AtomicUsize,
}

/// How a part shares the whole with the other parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// It may take all that is left.
    Greedy,
    /// It leaves a quarter of what its siblings leave: for two or three parts that always exist.
    Reserving,
    /// All parts are known: one alone may use everything, one of several shares fairly.
    Members,
    /// More parts may come at any time: it shares fairly even when it is alone.
    Strangers,
}

/// Why a budget does not give what was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exhausted {
    /// The part has its share. Others may still get some.
    Share,
    /// Nothing is left for any part.
    Whole,
}

impl Budget {
    /// A budget of `limit`, which is no part of another one.
    pub fn new(limit: usize) -> Self {
        Self { limit, used: AtomicUsize::new(0), whole: None, members: 0.into() }
    }

    /// A part of `whole` with a limit of its own.
    pub fn part(whole: &Arc<Self>, limit: usize, sharing: Sharing) -> Self {
        if sharing == Sharing::Members {
            whole.members.fetch_add(1, SeqCst);
        }
        let whole = Some((whole.clone(), sharing));
        Self { limit, used: AtomicUsize::new(0), whole, members: 0.into() }
    }

    /// How much is in use.
    pub fn used(&self) -> usize {
        self.used.load(SeqCst)
    }

    /// How much more can be taken now.
    pub fn free(&self) -> usize {
        self.bounds().share.saturating_sub(self.used())
    }

    /// Takes `amount`, at every level, or nothing.
    ///
    /// # Errors
    /// What is exhausted.
    pub fn take(&self, amount: usize) -> Result<(), Exhausted> {
        let Bounds { left, share } = self.bounds();
        let before = self.used.fetch_add(amount, SeqCst);
        let fits = |most: usize| before.checked_add(amount).is_some_and(|sum| sum <= most);
        if !fits(share) {
            self.used.fetch_sub(amount, SeqCst);
            return Err(if fits(left) { Exhausted::Share } else { Exhausted::Whole });
        }
        // The bounds are those of every level, read one after the other. At the root they are
        // exact.
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

    /// Takes `amount` even if that exceeds every limit: for what exists already.
    pub fn take_anyway(&self, amount: usize) {
        self.used.fetch_add(amount, SeqCst);
        if let Some((whole, _)) = &self.whole {
            whole.take_anyway(amount);
        }
    }

    /// Gives back what was taken.
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
        // A change between two reads makes the share a little wrong, not the limit of the root.
        let (all, used) = (whole.bounds().share, self.used());
        let siblings = whole.used().saturating_sub(used);
        let left = all.saturating_sub(siblings);
        let fair = || fair_share(left.saturating_sub(used), all);
        let share = match sharing {
            Sharing::Greedy => left,
            Sharing::Reserving => left - left / RESERVED,
            Sharing::Members if whole.members.load(SeqCst) < 2 => left,
            Sharing::Members | Sharing::Strangers => fair(),
        };
        Bounds { left, share: share.min(left).min(self.limit) }
    }
}

/// How much a fair part may hold of `whole`, of which so much is free.
fn fair_share(free: usize, whole: usize) -> usize {
    if whole == usize::MAX {
        return whole;
    }
    let scaled = free.saturating_mul(free).saturating_mul(ALL_FREE);
    (scaled / whole.max(1)).max(LEAST_SHARE)
}

impl Drop for Budget {
    fn drop(&mut self) {
        if let Some((whole, Sharing::Members)) = &self.whole {
            whole.members.fetch_sub(1, SeqCst);
        }
    }
}

/// How much a budget may use in all.
struct Bounds {
    /// What its siblings leave.
    left: usize,
    /// Its share of that.
    share: usize,
}

/// What was taken of a budget, for as long as it lives.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
    amount: usize,
}

impl Share {
    /// Takes `amount` of `budget`.
    ///
    /// # Errors
    /// What is exhausted.
    pub fn take(budget: &Arc<Budget>, amount: usize) -> Result<Self, Exhausted> {
        budget.take(amount)?;
        Ok(Self { budget: budget.clone(), amount })
    }

    /// Takes `amount` of `budget` even if that exceeds every limit.
    pub fn take_anyway(budget: &Arc<Budget>, amount: usize) -> Self {
        budget.take_anyway(amount);
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
