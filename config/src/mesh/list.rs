//! Indexes of a mesh: persistent maps, which share unchanged parts with earlier snapshots, and the
//! short lists of items that share a key.

use std::slice;
use std::sync::Arc;

use equivalent::Comparable;
use imbl::GenericOrdMap;
use imbl::shared_ptr::DefaultSharedPtr;

/// A persistent map: a clone takes constant time, and a change copies only the path to its entry.
/// With 100,000 entries a tree takes a third of the memory of imbl's hash map, whose nodes have
/// room for 16 entries and are mostly empty.
pub(crate) type SharedMap<K, V> = GenericOrdMap<K, V, DefaultSharedPtr>;

/// A list of items, oldest first.
pub(super) type List<T> = Arc<[Arc<T>]>;

/// The items of one key, oldest first. Nearly every key has one, which needs no list.
#[derive(Debug)]
pub(super) enum Items<T> {
    One(Arc<T>),
    Several(List<T>),
}

impl<T> Items<T> {
    pub(super) fn as_slice(&self) -> &[Arc<T>] {
        match self {
            Self::One(item) => slice::from_ref(item),
            Self::Several(list) => list,
        }
    }
}

impl<T> Clone for Items<T> {
    fn clone(&self) -> Self {
        match self {
            Self::One(item) => Self::One(item.clone()),
            Self::Several(list) => Self::Several(list.clone()),
        }
    }
}

/// The items of `key`.
pub(super) fn items<'a, K, Q, T>(map: &'a SharedMap<K, Items<T>>, key: &Q) -> &'a [Arc<T>]
where
    K: Ord,
    Q: Comparable<K> + ?Sized,
{
    map.get(key).map(Items::as_slice).unwrap_or_default()
}

/// Adds an item to those of `key`.
pub(super) fn add<K, T>(map: &mut SharedMap<K, Items<T>>, key: K, item: &Arc<T>)
where
    K: Ord + Clone,
{
    let items = match items(map, &key) {
        [] => Items::One(item.clone()),
        before => Items::Several(before.iter().chain([item]).cloned().collect()),
    };
    map.insert(key, items);
}

/// Removes an item, by its allocation, from those of `key`.
pub(super) fn remove<K, T>(map: &mut SharedMap<K, Items<T>>, key: &K, item: &Arc<T>)
where
    K: Ord + Clone,
{
    let before = items(map, key).iter();
    let rest: List<T> = before.filter(|one| !Arc::ptr_eq(one, item)).cloned().collect();
    match &*rest {
        [] => map.remove(key),
        [one] => map.insert(key.clone(), Items::One(one.clone())),
        _ => map.insert(key.clone(), Items::Several(rest)),
    };
}
