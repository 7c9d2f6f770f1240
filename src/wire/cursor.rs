//! Reading and writing of the few primitives that all messages are made of.
#![forbid(unsafe_code)]

use crate::error::Cause;
use crate::limits::RANKS_MAX;
use crate::types::Member;

/// Bytes that no correct peer sends; the words say what is wrong with them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Malformed(pub &'static str);

impl From<Malformed> for Cause {
    fn from(malformed: Malformed) -> Cause {
        Cause::Misbehaved(malformed.0.to_owned())
    }
}

/// Takes fields off the front of a slice.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads from the start of `bytes`.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { rest: bytes }
    }
    /// All that is left; afterwards nothing is.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }
    /// Bytes left.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }
    /// Fails unless all has been read.
    pub fn end(&self) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err(Malformed("bytes after the end of a message")) }
    }
    /// The next `n` bytes.
    pub fn bytes(&mut self, n: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or(Malformed("a message cut short"))?;
        self.rest = rest;
        Ok(taken)
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(Malformed("a message cut short"))?;
        self.rest = rest;
        Ok(*taken)
    }
    /// One byte.
    pub fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }
    /// Four bytes.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    /// Eight bytes.
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    /// A double, bit for bit.
    pub fn f64(&mut self) -> Result<f64, Malformed> {
        Ok(f64::from_bits(self.u64()?))
    }
    /// 0 or 1.
    pub fn bool(&mut self) -> Result<bool, Malformed> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed("a truth value that is neither 0 nor 1")),
        }
    }
    /// A varint in its shortest form.
    pub fn varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0u64;
        for position in 0..10 {
            let byte = self.u8()?;
            let part = u64::from(byte & 0x7f);
            if position == 9 && part > 1 {
                return Err(Malformed("a number above 64 bits"));
            }
            value |= part << (7 * position);
            if byte & 0x80 == 0 {
                if byte == 0 && position > 0 {
                    return Err(Malformed("a number not in its shortest form"));
                }
                return Ok(value);
            }
        }
        Err(Malformed("a number above 64 bits"))
    }
    /// A varint of at most `max`.
    pub fn varint_to(&mut self, max: u64, what: &'static str) -> Result<u64, Malformed> {
        let value = self.varint()?;
        if value > max { Err(Malformed(what)) } else { Ok(value) }
    }
    /// A varint that fits in 32 bits.
    pub fn varint_u32(&mut self) -> Result<u32, Malformed> {
        let value = self.varint()?;
        u32::try_from(value).map_err(|_| Malformed("a number above 32 bits"))
    }
    /// A count of things that take at least `each` bytes: above `max`, or more than can follow, is refused, so
    /// that a caller may reserve memory for it.
    pub fn count(&mut self, max: usize, each: usize, what: &'static str) -> Result<usize, Malformed> {
        let count = self.varint_to(max as u64, what)? as usize;
        if count.saturating_mul(each) > self.remaining() {
            return Err(Malformed("a count of more than what follows"));
        }
        Ok(count)
    }
    /// Text of at most `max` bytes, where it lies.
    pub fn text(&mut self, max: usize) -> Result<&'a str, Malformed> {
        let len = self.count(max, 1, "a text above its limit")?;
        std::str::from_utf8(self.bytes(len)?).map_err(|_| Malformed("a text that is not UTF-8"))
    }
    /// A member, or a rank.
    pub fn position(&mut self) -> Result<u32, Malformed> {
        Ok(self.varint_to(RANKS_MAX as u64 - 1, "a rank above RANKS_MAX")? as u32)
    }
    /// Members in ascending order: see [`put_members`].
    pub fn members(&mut self) -> Result<Members<'a>, Malformed> {
        let runs = self.count(RANKS_MAX, 2, "too many runs of members")?;
        let start = self.rest;
        let (mut next, mut count) = (0u64, 0u64);
        for run in 0..runs {
            let gap = self.varint_to(RANKS_MAX as u64, "a member above RANKS_MAX")?;
            let length = self.varint_to(RANKS_MAX as u64, "a member above RANKS_MAX")?;
            if length == 0 || (run > 0 && gap == 0) {
                return Err(Malformed("runs of members not in their shortest form"));
            }
            next += gap + length;
            count += length;
            if next > RANKS_MAX as u64 {
                return Err(Malformed("a member above RANKS_MAX"));
            }
        }
        let used = start.len() - self.rest.len();
        Ok(Members { runs: &start[..used], count: count as usize })
    }
}

/// Members in ascending order, as they lie in a message; already checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Members<'a> {
    runs: &'a [u8],
    count: usize,
}

impl<'a> Members<'a> {
    /// No members.
    pub const NONE: Members<'static> = Members { runs: &[], count: 0 };
    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }
    /// None?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
    /// Each, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Member> + 'a {
        let mut reader = Reader::new(self.runs);
        let (mut next, mut left) = (0u32, 0u32);
        std::iter::from_fn(move || {
            if left == 0 {
                // The runs were checked when the message was read, so an error can only be their end.
                next += reader.varint_u32().ok()?;
                left = reader.varint_u32().ok()?;
            }
            left -= 1;
            next += 1;
            Some(Member(next - 1))
        })
    }
}

/// Appends a varint.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends text, cut at a character to at most `max` bytes.
pub fn put_text(out: &mut Vec<u8>, text: &str, max: usize) {
    let text = cut_text(text, max);
    put_varint(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

/// The longest beginning of `text` that has at most `max` bytes.
#[must_use]
pub fn cut_text(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}

/// Appends members, which must ascend, as runs of neighbours: (gap, length) each. Ranks that join or lag do
/// so in neighbourhoods, and a list of all 65,536 is four bytes.
pub fn put_members(out: &mut Vec<u8>, members: &[Member]) {
    let mut runs = 0u64;
    for_each_run(members, |_, _| runs += 1);
    put_varint(out, runs);
    for_each_run(members, |gap, length| {
        put_varint(out, u64::from(gap));
        put_varint(out, u64::from(length));
    });
}

fn for_each_run(members: &[Member], mut visit: impl FnMut(u32, u32)) {
    let (mut end, mut i) = (0, 0);
    while i < members.len() {
        let first = members[i].0;
        assert!(first >= end, "members ascend");
        let mut length = 1;
        while i + (length as usize) < members.len() && members[i + length as usize].0 == first + length {
            length += 1;
        }
        visit(first - end, length);
        end = first + length;
        i += length as usize;
    }
}
