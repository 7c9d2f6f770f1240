//! Names in flight and the response cache. The cache is a function of the agreed log alone, so it is the same
//! on every member at the same place of the log.
#![forbid(unsafe_code)]

use super::OpId;
use crate::hash::Map;
use crate::types::{Member, SharedSignature, Signature, TensorKey, Time};
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

/// Signatures cached under one name: a name used alternately for training and evaluation keeps both, a name
/// that changes its shape at each step does not fill the cache.
const VARIANTS_MAX: usize = 4;
const NONE: u32 = u32::MAX;

/// What members said about a name.
#[derive(Clone, Debug)]
pub struct Said {
    /// The lowest member that said so.
    pub member: Member,
    /// The signature.
    pub signature: SharedSignature,
    /// How many values of call data came with it.
    pub width: usize,
}

impl Said {
    fn same(&self, signature: &SharedSignature, width: usize) -> bool {
        self.width == width && (Arc::ptr_eq(&self.signature, signature) || same(&self.signature, signature))
    }
}

/// Equal signatures. Scales are compared by their bits, so that a NaN does not differ from itself.
#[must_use]
pub fn same(a: &Signature, b: &Signature) -> bool {
    a.collective == b.collective
        && a.op == b.op
        && a.scale.pre.to_bits() == b.scale.pre.to_bits()
        && a.scale.post.to_bits() == b.scale.post.to_bits()
        && a.root == b.root
        && a.place == b.place
        && a.join_average == b.join_average
        && a.tensors == b.tensors
        && a.ranks == b.ranks
}

/// How a mark was passed to the parent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Passed {
    /// It was not.
    #[default]
    No,
    /// By this key.
    Key(TensorKey),
    /// By name.
    Name,
}

/// The marks of one name between its first sight and its cut.
#[derive(Debug, Default)]
pub struct Mark {
    /// The operation submitted here.
    pub op: Option<OpId>,
    /// It was refused here: its caller has the error, waits for nothing, and may submit the name again.
    pub refused_here: bool,
    /// Sources that have marked it, as bits.
    pub marked: u32,
    /// Every source has marked it or joined.
    pub complete: bool,
    /// Whether and how it went up.
    pub passed: Passed,
    /// The lowest member's word.
    pub first: Option<Said>,
    /// The lowest member that differs from it.
    pub second: Option<Said>,
    /// The lowest member that refused, and its reason.
    pub refused: Option<(Member, String)>,
    /// Joined members that did not submit it.
    pub absent: Vec<Member>,
    /// Where the call data of each member starts in `values`.
    pub call: Vec<(Member, u32)>,
    /// Call data.
    pub values: Vec<u64>,
    /// The first mark.
    pub since: Time,
    /// When to look whether it stalls.
    pub check_at: Time,
    /// What the root told of a stall: since when, and who is missing.
    pub stall: Option<(Time, Vec<Member>)>,
}

impl Mark {
    /// Adds what `member` (the lowest of those for whom it speaks) said. Keeps the lowest member's word and
    /// that of the lowest member that differs from it, whatever the order of arrival.
    pub fn say(&mut self, member: Member, signature: &SharedSignature, width: usize) {
        let said = || Some(Said { member, signature: signature.clone(), width });
        let Some(first) = &mut self.first else {
            self.first = said();
            return;
        };
        if first.same(signature, width) {
            first.member = first.member.min(member);
        } else {
            match &mut self.second {
                Some(second) if second.same(signature, width) => second.member = second.member.min(member),
                Some(second) if second.member < member => {}
                second => *second = said(),
            }
        }
        if self.second.as_ref().is_some_and(|second| second.member < self.first.as_ref().unwrap().member) {
            std::mem::swap(&mut self.first, &mut self.second);
        }
    }
    /// Adds a refusal; the lowest member's is kept.
    pub fn refuse(&mut self, member: Member, reason: &str) {
        if self.refused.as_ref().is_none_or(|(other, _)| member < *other) {
            self.refused = Some((member, reason.to_owned()));
        }
    }
    /// Whether all members said the same and none refused.
    #[must_use]
    pub fn agrees(&self) -> bool {
        self.first.is_some() && self.second.is_none() && self.refused.is_none()
    }
    /// Values of call data per member.
    #[must_use]
    pub fn width(&self) -> usize {
        self.first.as_ref().map_or(0, |first| first.width)
    }
    fn clear(&mut self) {
        let (mut absent, mut call, mut values) = (
            std::mem::take(&mut self.absent),
            std::mem::take(&mut self.call),
            std::mem::take(&mut self.values),
        );
        absent.clear();
        call.clear();
        values.clear();
        *self = Mark { absent, call, values, ..Mark::default() };
    }
}

/// An operation that waits until the former of its name has completed: an unnamed one, or one submitted after
/// a call of the same name that was refused.
#[derive(Debug)]
pub struct Held {
    /// The operation.
    pub op: OpId,
    /// What it is.
    pub signature: Signature,
    /// Its call data.
    pub call: Vec<u64>,
    /// Why it was refused.
    pub refused: Option<String>,
}

/// A name, as long as it is cached or in flight.
#[derive(Debug)]
pub struct Row {
    /// The name.
    pub name: Arc<str>,
    /// Somebody in this subtree has marked it, and it has not been cut.
    pub in_flight: bool,
    /// The marks.
    pub mark: Mark,
    /// Operations behind it.
    pub held: VecDeque<Held>,
    keys: Vec<u32>,
}

impl Row {
    /// Whether all that is in flight here under the name was refused here.
    pub fn is_refused_here(&self) -> bool {
        self.mark.refused_here && self.held.iter().all(|held| held.refused.is_some())
    }
}

#[derive(Debug)]
struct Entry {
    key: TensorKey,
    row: u32,
    signature: SharedSignature,
    newer: u32,
    older: u32,
}

/// A hash for numbers that nobody chooses with malice: one multiplication.
#[derive(Default)]
pub struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u32(u32::from(byte));
        }
    }
    fn write_u32(&mut self, number: u32) {
        self.0 = (self.0.rotate_left(5) ^ u64::from(number)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 32;
    }
}

/// A map from numbers.
pub type NumberMap<K, V> = HashMap<K, V, BuildHasherDefault<NumberHasher>>;

/// Names and keys.
#[derive(Debug)]
pub struct Table {
    /// Names; those not `in_flight` are only cached (or free).
    pub rows: Vec<Row>,
    free_rows: Vec<u32>,
    by_name: Map<Arc<str>, u32>,
    entries: Vec<Entry>,
    free_entries: Vec<u32>,
    by_key: NumberMap<TensorKey, u32>,
    newest: u32,
    oldest: u32,
    capacity: usize,
    next_key: u32,
}

impl Table {
    /// An empty table with room for this many keys.
    #[must_use]
    pub fn new(capacity: usize) -> Table {
        Table {
            rows: Vec::new(),
            free_rows: Vec::new(),
            by_name: Map::default(),
            entries: Vec::new(),
            free_entries: Vec::new(),
            by_key: NumberMap::default(),
            newest: NONE,
            oldest: NONE,
            capacity,
            next_key: 0,
        }
    }
    /// The row of a name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<u32> {
        self.by_name.get(name).copied()
    }
    /// The row of a name, made if need be.
    pub fn open(&mut self, name: &str) -> u32 {
        if let Some(row) = self.find(name) {
            return row;
        }
        let name: Arc<str> = name.into();
        let row = self.free_rows.pop().unwrap_or_else(|| {
            self.rows.push(Row {
                name: name.clone(),
                in_flight: false,
                mark: Mark::default(),
                held: VecDeque::new(),
                keys: Vec::new(),
            });
            self.rows.len() as u32 - 1
        });
        self.row(row).name = name.clone();
        self.by_name.insert(name, row);
        row
    }
    /// A row.
    pub fn row(&mut self, row: u32) -> &mut Row {
        &mut self.rows[row as usize]
    }
    /// The row and signature of a live key.
    #[must_use]
    pub fn of_key(&self, key: TensorKey) -> Option<(u32, &SharedSignature)> {
        let entry = &self.entries[*self.by_key.get(&key)? as usize];
        Some((entry.row, &entry.signature))
    }
    /// Whether this key was ever given.
    #[must_use]
    pub fn was_given(&self, key: TensorKey) -> bool {
        key.0 < self.next_key
    }
    /// The key under which a row's name is cached with this signature.
    #[must_use]
    pub fn key_of(&self, row: u32, signature: &Signature) -> Option<(TensorKey, &SharedSignature)> {
        let entries = self.rows[row as usize].keys.iter().map(|&e| &self.entries[e as usize]);
        entries
            .filter(|entry| std::ptr::eq(&*entry.signature, signature) || same(&entry.signature, signature))
            .map(|entry| (entry.key, &entry.signature))
            .next()
    }
    /// Gives the next key to (name, signature), as the agreed log says; `None` when all 2^32 keys are used.
    pub fn define(&mut self, row: u32, signature: SharedSignature) -> Option<TensorKey> {
        let key = TensorKey(self.next_key);
        self.next_key = self.next_key.checked_add(1)?;
        if self.capacity == 0 {
            return Some(key);
        }
        let entry = Entry { key, row, signature, newer: NONE, older: NONE };
        let at = match self.free_entries.pop() {
            Some(at) => {
                self.entries[at as usize] = entry;
                at
            }
            None => {
                self.entries.push(entry);
                self.entries.len() as u32 - 1
            }
        };
        self.by_key.insert(key, at);
        self.link_newest(at);
        self.row(row).keys.push(at);
        if self.rows[row as usize].keys.len() > VARIANTS_MAX {
            // `keys` is in order of definition; which one goes only has to be the same on all members.
            let first = self.rows[row as usize].keys[0];
            self.evict(first);
        }
        while self.by_key.len() > self.capacity {
            self.evict(self.oldest);
        }
        Some(key)
    }
    /// Notes that the log has used a key.
    pub fn touch(&mut self, key: TensorKey) {
        let at = self.by_key[&key];
        if at != self.newest {
            self.unlink(at);
            self.link_newest(at);
        }
    }
    /// Ends the flight of a name.
    pub fn finish(&mut self, row: u32) {
        let it = self.row(row);
        it.in_flight = false;
        it.mark.clear();
        self.release(row);
    }
    /// Keys alive, for checks.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    fn release(&mut self, row: u32) {
        let it = &mut self.rows[row as usize];
        if it.keys.is_empty() && !it.in_flight && it.held.is_empty() {
            self.by_name.remove(&it.name);
            self.free_rows.push(row);
        }
    }
    fn evict(&mut self, at: u32) {
        self.unlink(at);
        let (key, row) = (self.entries[at as usize].key, self.entries[at as usize].row);
        self.by_key.remove(&key);
        self.free_entries.push(at);
        self.row(row).keys.retain(|&other| other != at);
        self.release(row);
    }
    fn link_newest(&mut self, at: u32) {
        let entry = &mut self.entries[at as usize];
        (entry.newer, entry.older) = (NONE, self.newest);
        match self.newest {
            NONE => self.oldest = at,
            newest => self.entries[newest as usize].newer = at,
        }
        self.newest = at;
    }
    fn unlink(&mut self, at: u32) {
        let (newer, older) = (self.entries[at as usize].newer, self.entries[at as usize].older);
        match newer {
            NONE => self.newest = older,
            newer => self.entries[newer as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => self.entries[older as usize].newer = newer,
        }
    }
}
