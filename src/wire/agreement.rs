//! What coordinators of one process set say to each other: bodies of `Message::Coordination`.
//!
//! A body is a kind, flags, and a list of items up to its end. `Up` goes from a child to its parent; `Cut` is
//! a piece of the agreed log and goes unchanged from the root to all; `Nack`, `Query` and `Stalled` go from a
//! parent to a child. An item that does not fit one message is continued in the next (`MORE`); only `Up` and
//! `Cut` have such items.
#![forbid(unsafe_code)]

use super::cursor::{Malformed, Members, Reader, put_members, put_text, put_varint};
use super::signature::{put_signature, signature};
use crate::limits::{CACHE_KEYS_MAX, NAME_BYTES_MAX, REASON_BYTES_MAX, TENSOR_BYTES_MAX};
use crate::types::{Member, Signature, TensorKey};

/// Values in the call table of one operation: the splits of an alltoall among 8192 members (512 MiB).
pub const CALL_VALUES_MAX: usize = 1 << 26;
/// Bytes of one item that is continued over several messages: a full call table at four bytes a value.
pub const ITEM_BYTES_MAX: usize = 1 << 28;
/// Bytes of the words of a failure: two shapes of 64 dimensions, the name and a reason.
pub const FAILURE_BYTES_MAX: usize = NAME_BYTES_MAX + REASON_BYTES_MAX + 8192;

/// Kinds of bodies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Marks from a subtree.
    Up,
    /// A piece of the agreed log.
    Cut,
    /// These keys were evicted before your mark came; announce by name.
    Nack,
    /// Who in your subtree has not marked this name?
    Query,
    /// This name stalls; for the explanations that members give.
    Stalled,
}

/// The item in this body goes on in the next body of the same kind.
pub const MORE: u8 = 1;
/// Somebody waits: send on at once what you hold back.
pub const URGENT: u8 = 2;
/// Flag of `Up`: with this the sender has announced by name what a `Nack` had refused.
pub const RENAMED: u8 = 4;

/// Bytes before the items.
pub const HEADER_BYTES: usize = 2;

/// Appends the header of a body.
pub fn put_header(out: &mut Vec<u8>, kind: Kind, flags: u8) {
    let code = match kind {
        Kind::Up => 1,
        Kind::Cut => 2,
        Kind::Nack => 3,
        Kind::Query => 4,
        Kind::Stalled => 5,
    };
    out.extend_from_slice(&[code, flags]);
}

/// Reads the header of a body: kind and flags.
pub fn header(reader: &mut Reader<'_>) -> Result<(Kind, u8), Malformed> {
    let kind = match reader.u8()? {
        1 => Kind::Up,
        2 => Kind::Cut,
        3 => Kind::Nack,
        4 => Kind::Query,
        5 => Kind::Stalled,
        _ => return Err(Malformed("an agreement message of unknown kind")),
    };
    let flags = reader.u8()?;
    let allowed = match kind {
        Kind::Up => MORE | URGENT | RENAMED,
        Kind::Cut => MORE,
        _ => 0,
    };
    if flags & !allowed != 0 {
        return Err(Malformed("an agreement message with unknown flags"));
    }
    Ok((kind, flags))
}

/// The call data of some members, as they lie in a message; already checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows<'a> {
    /// Values per member; 0 where there is no call data.
    pub width: usize,
    count: usize,
    rows: &'a [u8],
}

impl Rows<'_> {
    /// No call data.
    pub const NONE: Rows<'static> = Rows { width: 0, count: 0, rows: &[] };
    /// How many members.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }
    /// No members?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
    /// Calls `visit` with each member, ascending, and each of its values in order: (member, index, value).
    pub fn for_each(&self, mut visit: impl FnMut(Member, usize, u64)) {
        let mut reader = Reader::new(self.rows);
        let mut next = 0;
        for _ in 0..self.count {
            // The rows were checked when the message was read, so these cannot fail.
            let Ok(gap) = reader.varint_u32() else { return };
            let member = next + gap;
            next = member + 1;
            for index in 0..self.width {
                let Ok(value) = reader.varint() else { return };
                visit(Member(member), index, value);
            }
        }
    }
}

/// Appends call data of `count` members: `member(i)`, which ascends, and `value(i, j)`, the j-th value of the
/// i-th of them.
pub fn put_rows(
    out: &mut Vec<u8>,
    width: usize,
    count: usize,
    member: impl Fn(usize) -> Member,
    value: impl Fn(usize, usize) -> u64,
) {
    put_varint(out, width as u64);
    if width == 0 {
        return;
    }
    put_varint(out, count as u64);
    let mut next = 0;
    for i in 0..count {
        let member = member(i).0;
        assert!(member >= next, "members ascend");
        put_varint(out, u64::from(member - next));
        next = member + 1;
        for j in 0..width {
            put_varint(out, value(i, j));
        }
    }
}

fn rows<'a>(reader: &mut Reader<'a>) -> Result<Rows<'a>, Malformed> {
    let width = reader.varint_to(CALL_VALUES_MAX as u64, "call data above CALL_VALUES_MAX")? as usize;
    if width == 0 {
        return Ok(Rows::NONE);
    }
    let count = reader.count(CALL_VALUES_MAX / width, width + 1, "call data above CALL_VALUES_MAX")?;
    let before = *reader;
    let mut next = 0;
    for _ in 0..count {
        next += u64::from(reader.position()?) + 1;
        if next > crate::limits::RANKS_MAX as u64 {
            return Err(Malformed("a member above RANKS_MAX"));
        }
        for _ in 0..width {
            reader.varint_to(TENSOR_BYTES_MAX, "a row count above TENSOR_BYTES_MAX")?;
        }
    }
    let used = before.remaining() - reader.remaining();
    let mut before = before;
    Ok(Rows { width, count, rows: before.bytes(used)? })
}

/// What one member said about a name. Of a subtree that differs in itself, two are passed up: the lowest
/// member's, and that of the lowest member that differs from it.
#[derive(Clone, Debug, PartialEq)]
pub struct Variant {
    /// Who.
    pub member: Member,
    /// What.
    pub signature: Signature,
    /// Values of call data that came with it.
    pub width: usize,
}

/// One item of an `Up`.
#[expect(clippy::large_enum_variant, reason = "it lives on the stack, one at a time")]
#[derive(Clone, Debug, PartialEq)]
pub enum UpItem<'a> {
    /// These consecutive keys are ready in the whole subtree, nobody absent, no call data.
    ReadyRange {
        /// The first key.
        first: TensorKey,
        /// How many; at least 1.
        count: u32,
    },
    /// This key is ready in the whole subtree.
    Ready {
        /// The key.
        key: TensorKey,
        /// Members of the subtree that have joined and did not submit it.
        absent: Members<'a>,
        /// Call data of all others.
        call: Rows<'a>,
    },
    /// This name is ready in the whole subtree; its key is not known or its members differ.
    Announce {
        /// The name.
        name: &'a str,
        /// The lowest member's word.
        first: Variant,
        /// The lowest member that differs.
        second: Option<Variant>,
        /// The lowest member that refused it, and why.
        refused: Option<(Member, &'a str)>,
        /// Members of the subtree that have joined and did not submit it.
        absent: Members<'a>,
        /// Call data of all others.
        call: Rows<'a>,
    },
    /// These members have joined.
    Joined {
        /// In the order of joining, as far as the subtree knows: one item each time.
        members: Members<'a>,
    },
    /// Somebody in the subtree has marked this name long ago, and somebody has not.
    Overdue {
        /// The name.
        name: &'a str,
        /// Nanoseconds since the first mark.
        age_ns: u64,
    },
    /// The answer to a `Query`.
    Report {
        /// The query's number.
        query: u32,
        /// Members of the subtree that have neither marked the name nor joined.
        missing: Members<'a>,
    },
}

const READY_RANGE: u8 = 1;
const READY: u8 = 2;
const ANNOUNCE: u8 = 3;
const JOINED: u8 = 4;
const OVERDUE: u8 = 5;
const REPORT: u8 = 6;

/// Appends [`UpItem::ReadyRange`]; the same bytes are [`CutItem::RunRange`].
pub fn put_range(out: &mut Vec<u8>, first: TensorKey, count: u32) {
    out.push(READY_RANGE);
    put_varint(out, u64::from(first.0));
    put_varint(out, u64::from(count));
}

fn range(reader: &mut Reader<'_>) -> Result<(TensorKey, u32), Malformed> {
    let first = reader.varint_u32()?;
    let count = reader.varint_to(CACHE_KEYS_MAX as u64, "a range of more keys than are cached")? as u32;
    if count == 0 || first.checked_add(count).is_none() {
        return Err(Malformed("an impossible range of keys"));
    }
    Ok((TensorKey(first), count))
}

/// Appends the head of [`UpItem::Ready`]; [`put_members`] and [`put_rows`] follow. The same bytes are
/// [`CutItem::Run`].
pub fn put_ready(out: &mut Vec<u8>, key: TensorKey) {
    out.push(READY);
    put_varint(out, u64::from(key.0));
}

/// Appends the head of [`UpItem::Announce`]: its variants (lent, not owned) and refusal; [`put_members`] and
/// [`put_rows`] follow.
pub fn put_announce(
    out: &mut Vec<u8>,
    name: &str,
    first: (Member, &Signature, usize),
    second: Option<(Member, &Signature, usize)>,
    refused: Option<(Member, &str)>,
) {
    out.push(ANNOUNCE);
    put_text(out, name, NAME_BYTES_MAX);
    out.push(u8::from(second.is_some()) | u8::from(refused.is_some()) << 1);
    for (member, signature, width) in [Some(first), second].into_iter().flatten() {
        put_varint(out, u64::from(member.0));
        put_varint(out, width as u64);
        put_signature(out, signature);
    }
    if let Some((member, reason)) = refused {
        put_varint(out, u64::from(member.0));
        put_text(out, reason, REASON_BYTES_MAX);
    }
}

/// Appends [`UpItem::Joined`].
pub fn put_joined(out: &mut Vec<u8>, members: &[Member]) {
    out.push(JOINED);
    put_members(out, members);
}

/// Appends [`UpItem::Overdue`].
pub fn put_overdue(out: &mut Vec<u8>, name: &str, age_ns: u64) {
    out.push(OVERDUE);
    put_text(out, name, NAME_BYTES_MAX);
    put_varint(out, age_ns);
}

/// Appends [`UpItem::Report`].
pub fn put_report(out: &mut Vec<u8>, query: u32, missing: &[Member]) {
    out.push(REPORT);
    put_varint(out, u64::from(query));
    put_members(out, missing);
}

fn variant(reader: &mut Reader<'_>) -> Result<Variant, Malformed> {
    let member = Member(reader.position()?);
    let width = reader.varint_to(CALL_VALUES_MAX as u64, "call data above CALL_VALUES_MAX")? as usize;
    Ok(Variant { member, signature: signature(reader)?, width })
}

/// The next item of an `Up`; `None` at its end.
pub fn up_item<'a>(reader: &mut Reader<'a>) -> Result<Option<UpItem<'a>>, Malformed> {
    if reader.remaining() == 0 {
        return Ok(None);
    }
    Ok(Some(match reader.u8()? {
        READY_RANGE => {
            let (first, count) = range(reader)?;
            UpItem::ReadyRange { first, count }
        }
        READY => UpItem::Ready {
            key: TensorKey(reader.varint_u32()?),
            absent: reader.members()?,
            call: rows(reader)?,
        },
        ANNOUNCE => {
            let name = reader.text(NAME_BYTES_MAX)?;
            let flags = reader.u8()?;
            if flags > 3 {
                return Err(Malformed("an announcement with unknown flags"));
            }
            let first = variant(reader)?;
            let second = if flags & 1 != 0 { Some(variant(reader)?) } else { None };
            let refused = if flags & 2 != 0 {
                Some((Member(reader.position()?), reader.text(REASON_BYTES_MAX)?))
            } else {
                None
            };
            UpItem::Announce { name, first, second, refused, absent: reader.members()?, call: rows(reader)? }
        }
        JOINED => UpItem::Joined { members: reader.members()? },
        OVERDUE => UpItem::Overdue { name: reader.text(NAME_BYTES_MAX)?, age_ns: reader.varint()? },
        REPORT => UpItem::Report { query: reader.varint_u32()?, missing: reader.members()? },
        _ => return Err(Malformed("a mark of unknown kind")),
    }))
}

/// One item of a `Cut`, after its sequence number.
#[derive(Clone, Debug, PartialEq)]
pub enum CutItem<'a> {
    /// Run these consecutive keys, nobody absent, no call data.
    RunRange {
        /// The first key.
        first: TensorKey,
        /// How many; at least 1.
        count: u32,
    },
    /// Run this key.
    Run {
        /// The key.
        key: TensorKey,
        /// Members that take part with identities.
        absent: Members<'a>,
        /// Call data of all others.
        call: Rows<'a>,
    },
    /// Run this; from now on it has the next free key.
    Define {
        /// Its name.
        name: &'a str,
        /// What was agreed.
        signature: Signature,
        /// Members that take part with identities.
        absent: Members<'a>,
        /// Call data of all others.
        call: Rows<'a>,
    },
    /// This name failed.
    Fail {
        /// Its name.
        name: &'a str,
        /// The words that every member reports.
        message: &'a str,
    },
    /// All members have joined.
    AllJoined {
        /// The last.
        last: Member,
    },
}

/// Appends the head of [`CutItem::Define`]; [`put_members`] and [`put_rows`] follow.
pub fn put_define(out: &mut Vec<u8>, name: &str, signature: &Signature) {
    out.push(ANNOUNCE);
    put_text(out, name, NAME_BYTES_MAX);
    put_signature(out, signature);
}

/// Appends [`CutItem::Fail`].
pub fn put_fail(out: &mut Vec<u8>, name: &str, message: &str) {
    out.push(OVERDUE);
    put_text(out, name, NAME_BYTES_MAX);
    put_text(out, message, FAILURE_BYTES_MAX);
}

/// Appends [`CutItem::AllJoined`].
pub fn put_all_joined(out: &mut Vec<u8>, last: Member) {
    out.push(JOINED);
    put_varint(out, u64::from(last.0));
}

/// The next item of a `Cut`; `None` at its end.
pub fn cut_item<'a>(reader: &mut Reader<'a>) -> Result<Option<CutItem<'a>>, Malformed> {
    if reader.remaining() == 0 {
        return Ok(None);
    }
    Ok(Some(match reader.u8()? {
        READY_RANGE => {
            let (first, count) = range(reader)?;
            CutItem::RunRange { first, count }
        }
        READY => CutItem::Run {
            key: TensorKey(reader.varint_u32()?),
            absent: reader.members()?,
            call: rows(reader)?,
        },
        ANNOUNCE => CutItem::Define {
            name: reader.text(NAME_BYTES_MAX)?,
            signature: signature(reader)?,
            absent: reader.members()?,
            call: rows(reader)?,
        },
        OVERDUE => {
            CutItem::Fail { name: reader.text(NAME_BYTES_MAX)?, message: reader.text(FAILURE_BYTES_MAX)? }
        }
        JOINED => CutItem::AllJoined { last: Member(reader.position()?) },
        _ => return Err(Malformed("an entry of unknown kind in the agreed log")),
    }))
}

/// Appends the payload of a `Query`.
pub fn put_query(out: &mut Vec<u8>, query: u32, name: &str) {
    put_varint(out, u64::from(query));
    put_text(out, name, NAME_BYTES_MAX);
}

/// Reads the payload of a `Query`: its number and the name.
pub fn query<'a>(reader: &mut Reader<'a>) -> Result<(u32, &'a str), Malformed> {
    let read = (reader.varint_u32()?, reader.text(NAME_BYTES_MAX)?);
    reader.end()?;
    Ok(read)
}

/// Appends the payload of a `Stalled`.
pub fn put_stalled(out: &mut Vec<u8>, name: &str, age_ns: u64, missing: &[Member]) {
    put_text(out, name, NAME_BYTES_MAX);
    put_varint(out, age_ns);
    put_members(out, missing);
}

/// Reads the payload of a `Stalled`: name, age in nanoseconds, members that have not submitted it.
pub fn stalled<'a>(reader: &mut Reader<'a>) -> Result<(&'a str, u64, Members<'a>), Malformed> {
    let read = (reader.text(NAME_BYTES_MAX)?, reader.varint()?, reader.members()?);
    reader.end()?;
    Ok(read)
}
