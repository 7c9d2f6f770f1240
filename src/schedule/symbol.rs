//! Symbolic values: what a chunk holds, as an expression over the members' inputs. Equal expressions have
//! equal numbers, so comparing a result with the canonical tree is comparing two numbers.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fmt::Write;

/// The number of an expression.
pub(super) type Value = u32;
/// What unwritten memory holds.
pub(super) const POISON: Value = 0;

#[derive(Clone, PartialEq, Eq, Hash)]
enum Kind {
    Poison,
    Leaf { member: u32, chunk: u32 },
    Prepared(Value),
    Reduced(Value, Value),
    Combined(Value, Value),
    Many(Box<[Value]>),
    Finished(Value),
}

struct Facts {
    kind: Kind,
    chunk: u32,
    /// Which members' inputs are in it.
    members: Box<[u64]>,
    repeated: bool,
    prepared: bool,
    finished: bool,
}

/// All expressions of one verification.
pub(super) struct Symbols {
    words: usize,
    facts: Vec<Facts>,
    known: HashMap<Kind, Value>,
}

/// Why a step makes no sense, whatever the schedule wants.
pub(super) type Nonsense = &'static str;

impl Symbols {
    pub(super) fn new(size: u32) -> Symbols {
        let words = (size as usize).div_ceil(64);
        let mut symbols = Symbols { words, facts: vec![], known: HashMap::new() };
        let poison = symbols.blank(Kind::Poison, u32::MAX);
        symbols.facts.push(poison);
        symbols
    }

    pub(super) fn chunk(&self, value: Value) -> u32 {
        self.facts[value as usize].chunk
    }
    pub(super) fn leaf(&mut self, member: u32, chunk: u32) -> Value {
        let mut facts = self.blank(Kind::Leaf { member, chunk }, chunk);
        facts.members[member as usize / 64] |= 1 << (member % 64);
        self.intern(facts)
    }
    pub(super) fn prepared(&mut self, value: Value) -> Result<Value, Nonsense> {
        if !matches!(self.facts[value as usize].kind, Kind::Leaf { .. }) {
            return Err("only an input as it was given can be prescaled");
        }
        let mut facts = self.join(Kind::Prepared(value), &[value]);
        facts.prepared = true;
        Ok(self.intern(facts))
    }
    pub(super) fn finished(&mut self, value: Value) -> Result<Value, Nonsense> {
        let mut facts = self.join(Kind::Finished(value), &[value]);
        if facts.finished {
            return Err("the final scale is applied twice");
        }
        facts.finished = true;
        Ok(self.intern(facts))
    }
    pub(super) fn reduced(&mut self, a: Value, b: Value) -> Result<Value, Nonsense> {
        self.compatible(a, b)?;
        let facts = self.join(Kind::Reduced(a, b), &[a, b]);
        Ok(self.intern(facts))
    }
    pub(super) fn combined(&mut self, a: Value, b: Value) -> Result<Value, Nonsense> {
        self.compatible(a, b)?;
        let facts = self.join(Kind::Combined(a, b), &[a, b]);
        Ok(self.intern(facts))
    }
    /// ReduceMany: prescale, canonical tree and final scale in one, so its operands must be bare inputs.
    pub(super) fn many(&mut self, operands: &[Value]) -> Result<Value, Nonsense> {
        if operands.iter().any(|&v| !matches!(self.facts[v as usize].kind, Kind::Leaf { .. })) {
            return Err("an operand of ReduceMany is not an input as it was given");
        }
        if operands.iter().any(|&v| self.chunk(v) != self.chunk(operands[0])) {
            return Err("two different chunks are reduced into one");
        }
        let mut facts = self.join(Kind::Many(operands.into()), operands);
        (facts.prepared, facts.finished) = (true, true);
        Ok(self.intern(facts))
    }

    /// Whether every member's input is in it; exactly once, unless repetition does no harm.
    pub(super) fn is_whole(&self, value: Value, size: u32, may_repeat: bool) -> bool {
        let facts = &self.facts[value as usize];
        let count: u32 = facts.members.iter().map(|word| word.count_ones()).sum();
        count == size && (may_repeat || !facts.repeated)
    }
    pub(super) fn is_finished(&self, value: Value) -> bool {
        self.facts[value as usize].finished
    }
    /// Whether each input in it was prescaled just as it should be. (ReduceMany sees to that itself.)
    pub(super) fn is_prescaled_as(&self, value: Value, wanted: bool) -> bool {
        let facts = &self.facts[value as usize];
        matches!(facts.kind, Kind::Many(_)) || facts.prepared == wanted
    }
    /// ReduceMany over all members in order: canonical, and rounded once.
    pub(super) fn many_of_all(&mut self, chunk: u32, size: u32) -> Value {
        let leaves: Vec<Value> = (0..size).map(|m| self.leaf(m, chunk)).collect();
        self.many(&leaves).expect("these are inputs of one chunk")
    }
    /// The balanced binary tree over all members, split at the largest power of two below the size.
    pub(super) fn canonical(&mut self, chunk: u32, size: u32, prepared: bool, adasum: bool) -> Value {
        let leaf = |symbols: &mut Symbols, m| {
            let leaf = symbols.leaf(m, chunk);
            if prepared { symbols.prepared(leaf).expect("it is an input") } else { leaf }
        };
        let tree = self.tree(0, size, &leaf, adasum);
        self.finished(tree).expect("it was not yet")
    }
    fn tree(
        &mut self,
        first: u32,
        count: u32,
        leaf: &dyn Fn(&mut Symbols, u32) -> Value,
        adasum: bool,
    ) -> Value {
        if count == 1 {
            return leaf(self, first);
        }
        let left = count.next_power_of_two() / 2;
        let a = self.tree(first, left, leaf, adasum);
        let b = self.tree(first + left, count - left, leaf, adasum);
        let joined = if adasum { self.combined(a, b) } else { self.reduced(a, b) };
        joined.expect("both sides are alike")
    }

    pub(super) fn show(&self, value: Value) -> String {
        let mut text = String::new();
        self.write(value, &mut text);
        text
    }
    fn write(&self, value: Value, out: &mut String) {
        let mut list = |open: &str, parts: &[Value]| {
            out.push_str(open);
            for (i, &part) in parts.iter().enumerate() {
                if i > 0 {
                    out.push(' ');
                }
                self.write(part, out);
            }
            out.push(')');
        };
        match &self.facts[value as usize].kind {
            Kind::Poison => out.push_str("garbage"),
            Kind::Leaf { member, chunk } => write!(out, "{member}.{chunk}").expect("strings take all"),
            Kind::Prepared(v) => list("prepared(", &[*v]),
            Kind::Reduced(a, b) => list("(", &[*a, *b]),
            Kind::Combined(a, b) => list("adasum(", &[*a, *b]),
            Kind::Many(vs) => list("many(", vs),
            Kind::Finished(v) => list("finished(", &[*v]),
        }
    }

    fn compatible(&self, a: Value, b: Value) -> Result<(), Nonsense> {
        let (a, b) = (&self.facts[a as usize], &self.facts[b as usize]);
        if a.chunk != b.chunk {
            return Err("two different chunks are reduced into one");
        }
        if a.finished || b.finished {
            return Err("a finished value is reduced further");
        }
        if a.prepared != b.prepared {
            return Err("a prescaled value meets one that is not");
        }
        Ok(())
    }
    fn blank(&self, kind: Kind, chunk: u32) -> Facts {
        let members = vec![0; self.words].into();
        Facts { kind, chunk, members, repeated: false, prepared: false, finished: false }
    }
    fn join(&self, kind: Kind, parts: &[Value]) -> Facts {
        let first = &self.facts[parts[0] as usize];
        let mut facts = self.blank(kind, first.chunk);
        (facts.prepared, facts.finished) = (first.prepared, first.finished);
        for &part in parts {
            let part = &self.facts[part as usize];
            facts.repeated |= part.repeated;
            for (mine, theirs) in facts.members.iter_mut().zip(&part.members) {
                facts.repeated |= *mine & theirs != 0;
                *mine |= theirs;
            }
        }
        facts
    }
    fn intern(&mut self, facts: Facts) -> Value {
        if let Some(&value) = self.known.get(&facts.kind) {
            return value;
        }
        let value = self.facts.len() as Value;
        self.known.insert(facts.kind.clone(), value);
        self.facts.push(facts);
        value
    }
}
