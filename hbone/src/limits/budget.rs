//! A budget limits the use of one resource, by all users and by each part of them.
//!
//! Budgets form a tree, for example node, pod, direction, source. Units taken from a part count at
//! every level above it. A fair part may hold at most 4 · free² / whole, which shrinks with the
//! free amount. A single part gets three fifths, the second one half of the rest; seventeen parts
//! that take all they can leave a sixtieth. Newcomers therefore get some, and parts that release
//! and take again converge to equal use. This requires no list of siblings and evicts nothing.
//!
//! Taking and giving back cost a few atomic operations and no lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// A reserving part leaves one in this many parts of what its siblings do not use.
const RESERVED: usize = 4;
/// The limit of a fair part if everything is free, as a multiple of the whole.
const MAX_MULTIPLE: usize = 4;
/// Minimum limit of a fair part while anything is free: the two sockets of a connection.
const MIN_SHARE: usize = 2;

/// A limit on the use of a resource, and the current use.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    used: AtomicUsize,
    whole: Option<(Arc<Self>, Sharing)>,
    /// Number of its parts that are [`Sharing::Members`].
    members: AtomicUsize,
}

/// The way in which a part shares the whole with other parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// It may take everything that is free.
    Greedy,
    /// It leaves a quarter of what its siblings leave: for two or three permanent parts.
    Reserving,
    /// All parts are known: a single one may use everything, several share fairly.
    Members,
    /// New parts may appear at any time: it shares fairly even if it is the only one.
    Strangers,
}

/// The reason why a budget grants no units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exhausted {
    /// The part has used its share; others may still get some.
    Share,
    /// Nothing is left for any part.
    Whole,
}

impl Budget {
    /// A root budget of `limit`.
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

    /// The amount in use.
    pub fn used(&self) -> usize {
        self.used.load(SeqCst)
    }

    /// The amount that can be taken now.
    pub fn free(&self) -> usize {
        self.bounds().share.saturating_sub(self.used())
    }

    /// Takes `amount` at every level, or nothing.
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
        // Each level's bounds are read one after another; only the root's are exact.
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

    /// Takes `amount` even above the limits: for resources that exist already.
    pub fn take_beyond_limit(&self, amount: usize) {
        self.used.fetch_add(amount, SeqCst);
        if let Some((whole, _)) = &self.whole {
            whole.take_beyond_limit(amount);
        }
    }

    /// Gives back `amount`.
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
        // A change between two reads makes the share slightly inaccurate, but never the root's
        // limit.
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

/// The limit of a fair part of `whole`, of which `free` is free.
fn fair_share(free: usize, whole: usize) -> usize {
    if whole == usize::MAX {
        return whole;
    }
    let scaled = free.saturating_mul(free).saturating_mul(MAX_MULTIPLE);
    (scaled / whole.max(1)).max(MIN_SHARE)
}

impl Drop for Budget {
    fn drop(&mut self) {
        if let Some((whole, Sharing::Members)) = &self.whole {
            whole.members.fetch_sub(1, SeqCst);
        }
    }
}

/// The bounds of a budget's use.
struct Bounds {
    /// The amount that its siblings leave.
    left: usize,
    /// Its share of that amount.
    share: usize,
}

/// Units of a budget, given back when dropped.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
    amount: usize,
}

impl Share {
    /// Takes `amount` of `budget`.
    ///
    /// # Errors
    /// The exhausted limit.
    pub fn take(budget: &Arc<Budget>, amount: usize) -> Result<Self, Exhausted> {
        budget.take(amount)?;
        Ok(Self { budget: budget.clone(), amount })
    }

    /// Takes `amount` of `budget` even above the limits.
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
