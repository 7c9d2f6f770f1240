//! Tensors that lie in the arenas of their owners' boards: every member reads and writes them where they are.
//!
//! In the first tick of such a batch each member puts a *card* into its slot: how many regions its run has, and where
//! on its board each begins; or 0, where one of them lies elsewhere. When all have posted, all see the same cards, so
//! that either all members reduce in place, or all go the ordinary way.
#![forbid(unsafe_code)]

use super::Blame;
use super::exchange::Place;
use crate::error::Cause;
use crate::memory::Region;
use std::sync::atomic::Ordering;

/// Where the regions of a batch lie, of all members.
#[derive(Debug, Default)]
pub(super) struct Lent {
    /// Those of the first member, then those of the second, and so on; empty where not all have told.
    starts: Vec<*mut u8>,
    regions: usize,
}

impl Lent {
    pub(super) fn clear(&mut self) {
        self.starts.clear();
    }

    /// Whether all members have told where their tensors lie.
    pub(super) fn is_known(&self) -> bool {
        !self.starts.is_empty()
    }

    /// Writes this member's card.
    pub(super) fn tell(place: &Place, tick: u64, regions: &[Region]) {
        let word = |at: usize| place.slot_word(tick, at);
        let all = regions.iter().enumerate().all(|(r, region)| {
            let found = match region.is_empty() {
                true => Some(0),
                false => place.board().find(region.as_ptr(), region.len()),
            };
            let (Some(at), Some(word)) = (found, word(1 + r)) else { return false };
            word.store(at, Ordering::Relaxed);
            true
        });
        let count = if all { regions.len() as u64 } else { 0 };
        // All of it is published by the counter that follows.
        word(0).expect("a slot has a word").store(count, Ordering::Relaxed);
    }

    /// Reads all cards, which all members have posted.
    pub(super) fn learn(&mut self, places: &[Place], tick: u64, regions: &[Region]) -> Result<(), Blame> {
        self.clear();
        self.regions = regions.len();
        let count = |place: &Place| place.slot_word(tick, 0).map_or(0, |word| word.load(Ordering::Relaxed));
        if places.iter().any(|place| count(place) == 0) {
            return Ok(());
        }
        for (member, place) in places.iter().enumerate() {
            let told = count(place);
            for (r, region) in regions.iter().enumerate() {
                let at = place.slot_word(tick, 1 + r).map(|word| word.load(Ordering::Relaxed));
                let start = match (at, region.is_empty()) {
                    (Some(_), true) => Some(region.as_ptr()),
                    (Some(at), false) => place.board().lent_at(at, region.len()),
                    (None, _) => None,
                };
                match start {
                    Some(start) if told == regions.len() as u64 => self.starts.push(start),
                    _ => {
                        self.clear();
                        let words = format!("an impossible place of a tensor on its board ({told}: {at:?})");
                        return Err((member, Cause::Misbehaved(words)));
                    }
                }
            }
        }
        Ok(())
    }

    /// The address at which `member` has what lies at an address of a region of another member.
    pub(super) fn like(&self, (of, region, address): (usize, u32, *const u8), member: usize) -> *mut u8 {
        let start = |member: usize| self.starts[member * self.regions + region as usize];
        start(member).wrapping_add(address.addr() - start(of).addr())
    }
}
