//! How keys are spread over the tables of the hot paths. Several look-ups are made for each operation and each message,
//! so the hash must cost less than they do; the standard one, which withstands anything, costs more than copying a
//! kilobyte.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

/// A map with this hash.
pub type Map<K, V> = HashMap<K, V, Seeded>;

/// Makes hashers that begin at a secret of this map, so that a peer cannot choose keys that collide by plan.
#[derive(Clone, Debug)]
pub struct Seeded(u64);

impl Default for Seeded {
    fn default() -> Seeded {
        Seeded(RandomState::new().hash_one(0u8))
    }
}

impl BuildHasher for Seeded {
    type Hasher = Folding;
    fn build_hasher(&self) -> Folding {
        Folding(self.0)
    }
}

/// Multiplies to twice the width and folds the halves, for each word.
pub struct Folding(u64);

impl Hasher for Folding {
    fn write_u64(&mut self, word: u64) {
        // The digits of pi: an odd number whose ones and zeros follow no pattern.
        let wide = u128::from(self.0 ^ word) * 0x243F_6A88_85A3_08D3_u128;
        self.0 = (wide as u64) ^ ((wide >> 64) as u64);
    }
    fn write_u128(&mut self, word: u128) {
        self.write_u64(word as u64);
        self.write_u64((word >> 64) as u64);
    }
    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }
    fn write(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            self.write_u64(u64::from_le_bytes(word));
        }
    }
    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn streams_that_differ_in_any_field_are_spread() {
        let seeded = Seeded::default();
        // Set, batch, window and ordinal, as the engine puts them into a stream.
        for shift in [0, 32, 48, 96] {
            let low: HashSet<u64> = (0..4096u128).map(|i| seeded.hash_one(i << shift) & 0xFFFF).collect();
            let high: HashSet<u64> = (0..4096u128).map(|i| seeded.hash_one(i << shift) >> 48).collect();
            // 4096 of 65536 places at random: about 3970 are hit.
            assert!(low.len() > 3700 && high.len() > 3700, "{shift}: {} {}", low.len(), high.len());
        }
    }
}
