//! A map from address ranges to values, which finds the ranges that contain an address.

use std::net::IpAddr;

use ipnet::IpNet;

use super::list::SharedMap;

/// Values by range. A clone takes constant time, apart from the list of prefix lengths.
#[derive(Debug, Clone)]
pub(super) struct Ranges<T> {
    values: SharedMap<IpNet, T>,
    /// The prefix lengths of the ranges with the number of ranges, longest first. Only these are
    /// looked up.
    lengths: Vec<(u8, usize)>,
}

impl<T> Default for Ranges<T> {
    fn default() -> Self {
        Self { values: SharedMap::default(), lengths: Vec::new() }
    }
}

impl<T: Clone> Ranges<T> {
    /// The value of each range that contains `address`, longest prefix first.
    pub(super) fn around(&self, address: IpAddr) -> impl Iterator<Item = &T> {
        self.lengths.iter().filter_map(move |(length, _)| {
            let around = IpNet::new(address, *length).ok()?.trunc();
            self.values.get(&around)
        })
    }

    /// Changes the value of `range`: `None` means no value, before and after.
    pub(super) fn change(&mut self, range: IpNet, change: impl FnOnce(Option<&T>) -> Option<T>) {
        let before = self.values.get(&range);
        let (had_value, after) = (before.is_some(), change(before));
        match (had_value, after) {
            (had_value, Some(value)) => {
                self.values.insert(range, value);
                if !had_value {
                    self.count_length(range.prefix_len(), |ranges| ranges + 1);
                }
            }
            (true, None) => {
                self.values.remove(&range);
                self.count_length(range.prefix_len(), |ranges| ranges - 1);
            }
            (false, None) => {}
        }
    }

    fn count_length(&mut self, length: u8, change: impl FnOnce(usize) -> usize) {
        match self.lengths.binary_search_by(|(known, _)| length.cmp(known)) {
            Ok(at) => {
                if let Some((_, ranges)) = self.lengths.get_mut(at) {
                    *ranges = change(*ranges);
                }
                self.lengths.retain(|(_, ranges)| *ranges > 0);
            }
            Err(at) => self.lengths.insert(at, (length, change(0))),
        }
    }
}
