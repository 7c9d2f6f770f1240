//! What has been registered once, and is used again while it is the same allocation.
#![forbid(unsafe_code)]

use std::collections::HashMap;

/// Entries by address, each for one allocation. An address that is freed and allocated again belongs to another
/// one, which is noticed at the next use: the driver numbers allocations and never uses a number again.
#[derive(Debug)]
pub struct Registered<V> {
    entries: HashMap<u64, Entry<V>>,
    most: usize,
    clock: u64,
}

#[derive(Debug)]
struct Entry<V> {
    allocation: u64,
    used: u64,
    value: V,
}

impl<V> Registered<V> {
    /// At most `most` entries; the one that was used the longest ago gives way.
    #[must_use]
    pub fn new(most: usize) -> Registered<V> {
        assert!(most > 0, "a cache holds something");
        Registered { entries: HashMap::new(), most, clock: 0 }
    }

    /// The entry of the allocation that `address` begins, made by `make` where there is none or another's.
    pub fn get<E>(
        &mut self,
        address: u64,
        allocation: u64,
        make: impl FnOnce() -> Result<V, E>,
    ) -> Result<&V, E> {
        self.clock += 1;
        let known = self.entries.get(&address).is_some_and(|entry| entry.allocation == allocation);
        if !known {
            // First, so that what is registered at this address can be registered again.
            self.entries.remove(&address);
            if self.entries.len() >= self.most {
                let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.used).map(|(at, _)| *at);
                self.entries.remove(&oldest.expect("a full cache has entries"));
            }
            let entry = Entry { allocation, used: self.clock, value: make()? };
            self.entries.insert(address, entry);
        }
        let entry = self.entries.get_mut(&address).expect("it was there or was inserted");
        entry.used = self.clock;
        Ok(&entry.value)
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.entries.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(cache: &mut Registered<u32>, address: u64, allocation: u64, value: u32) -> u32 {
        *cache.get(address, allocation, || Ok::<u32, ()>(value)).unwrap()
    }

    #[test]
    fn another_allocation_at_the_same_address_is_another_entry() {
        let mut cache = Registered::new(4);
        assert_eq!(get(&mut cache, 0x100, 1, 10), 10);
        assert_eq!(get(&mut cache, 0x100, 1, 11), 10);
        assert_eq!(get(&mut cache, 0x100, 2, 12), 12);
        assert_eq!(get(&mut cache, 0x100, 1, 13), 13);
        cache.clear();
        assert_eq!(get(&mut cache, 0x100, 1, 14), 14);
    }

    #[test]
    fn a_full_cache_drops_what_was_used_the_longest_ago() {
        let mut cache = Registered::new(2);
        get(&mut cache, 1, 1, 1);
        get(&mut cache, 2, 2, 2);
        get(&mut cache, 1, 1, 9);
        get(&mut cache, 3, 3, 3);
        assert_eq!(get(&mut cache, 1, 1, 9), 1);
        assert_eq!(get(&mut cache, 2, 2, 9), 9);
    }

    #[test]
    fn what_cannot_be_registered_leaves_nothing_behind() {
        let mut cache = Registered::new(2);
        get(&mut cache, 1, 1, 1);
        assert_eq!(cache.get(1, 2, || Err("no")), Err("no"));
        assert_eq!(get(&mut cache, 1, 1, 5), 5);
    }
}
