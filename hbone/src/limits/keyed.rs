//! Budgets by key, such as a source address or an identity.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use foldhash::quality::RandomState;

use super::budget::{Budget, Exhausted, Share, Sharing};

/// The minimum number of entries before unused entries are removed.
const MIN_SWEEP_ENTRIES: usize = 64;

/// One value for each key, kept while it is in use. The map has at most `MIN_SWEEP_ENTRIES`
/// entries, or twice as many as were ever in use at the same time.
#[derive(Debug)]
pub struct ByKey<K, V>(Mutex<Entries<K, V>>);

#[derive(Debug)]
struct Entries<K, V> {
    values: HashMap<K, Arc<V>, RandomState>,
    /// The number of entries at which unused entries are removed.
    sweep_at: usize,
}

impl<K, V> Default for ByKey<K, V> {
    fn default() -> Self {
        Self(Mutex::new(Entries { values: HashMap::default(), sweep_at: MIN_SWEEP_ENTRIES }))
    }
}

impl<K: Eq + Hash, V> ByKey<K, V> {
    /// Returns the value of `key`, created by `make` if absent.
    pub fn get(&self, key: K, make: impl FnOnce() -> V) -> Arc<V> {
        // No code panics while it holds the lock.
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = entries.values.get(&key) {
            return value.clone();
        }
        if entries.values.len() >= entries.sweep_at {
            entries.values.retain(|_, value| Arc::strong_count(value) > 1);
            entries.sweep_at = MIN_SWEEP_ENTRIES.max(entries.values.len() * 2);
        }
        let value = Arc::new(make());
        entries.values.insert(key, value.clone());
        value
    }
}

/// Parts of a budget, one for each key, all with the same limit.
#[derive(Debug)]
pub struct KeyedBudget<K> {
    whole: Arc<Budget>,
    each: usize,
    sharing: Sharing,
    parts: ByKey<K, Budget>,
}

impl<K: Eq + Hash> KeyedBudget<K> {
    /// Creates a map of parts of `whole`. Each part may use at most `each` units.
    pub fn new(whole: Budget, each: usize, sharing: Sharing) -> Self {
        Self { whole: Arc::new(whole), each, sharing, parts: ByKey::default() }
    }

    /// Takes one unit for `key`.
    ///
    /// # Errors
    /// The exhausted limit.
    pub fn take(&self, key: K) -> Result<Share, Exhausted> {
        let part = self.parts.get(key, || Budget::part(&self.whole, self.each, self.sharing));
        Share::take(&part, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_limit_does_not_affect_other_keys() {
        let budget = KeyedBudget::new(Budget::new(3), 2, Sharing::Greedy);
        let first = budget.take("a").unwrap();
        let _second = budget.take("a").unwrap();
        assert_eq!(budget.take("a").err(), Some(Exhausted::Share));
        let _other = budget.take("b").unwrap();
        assert_eq!(budget.take("c").err(), Some(Exhausted::Whole));
        drop(first);
        drop(budget.take("c").unwrap());
    }

    #[test]
    fn unused_keys_are_removed() {
        let budget = KeyedBudget::new(Budget::new(usize::MAX), 1, Sharing::Greedy);
        let held = budget.take(0).unwrap();
        for key in 1..10_000 {
            drop(budget.take(key).unwrap());
        }
        assert!(budget.parts.0.lock().unwrap().values.len() <= MIN_SWEEP_ENTRIES);
        assert_eq!(budget.take(0).err(), Some(Exhausted::Share), "a sweep keeps what is in use");
        drop(held);
    }
}
