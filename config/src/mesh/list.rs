//! Indexes of a mesh: persistent maps, which share unchanged parts with earlier snapshots, and the
//! short lists of items that share a key.

use std::hash::Hash;
use std::sync::Arc;

use equivalent::Equivalent;
use foldhash::fast::RandomState;
use imbl::GenericHashMap;
use imbl::shared_ptr::DefaultSharedPtr;

/// A persistent map: a clone takes constant time, and a change copies only the path to its entry.
pub(crate) type SharedMap<K, V> = GenericHashMap<K, V, RandomState, DefaultSharedPtr>;

/// The items of one key, oldest first.
pub(super) type List<T> = Arc<[Arc<T>]>;

/// The items of `key`.
pub(super) fn items<'a, K, Q, T>(map: &'a SharedMap<K, List<T>>, key: &Q) -> &'a [Arc<T>]
where
    K: Hash + Eq,
    Q: Hash + Equivalent<K> + ?Sized,
{
    map.get(key).map(|list| &**list).unwrap_or_default()
}

/// Adds an item to the list of `key`.
pub(super) fn add<K, T>(map: &mut SharedMap<K, List<T>>, key: K, item: &Arc<T>)
where
    K: Hash + Eq + Clone,
{
    let before = items(map, &key);
    let list: List<T> = before.iter().chain([item]).cloned().collect();
    map.insert(key, list);
}

/// Removes an item, by its allocation, from the list of `key`.
pub(super) fn remove<K, T>(map: &mut SharedMap<K, List<T>>, key: &K, item: &Arc<T>)
where
    K: Hash + Eq + Clone,
{
    let before = items(map, key);
    let rest: List<T> = before.iter().filter(|one| !Arc::ptr_eq(one, item)).cloned().collect();
    if rest.is_empty() {
        map.remove(key);
    } else {
        map.insert(key.clone(), rest);
    }
}
