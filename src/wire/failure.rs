//! The end of an epoch on the wire.
#![forbid(unsafe_code)]

use super::cursor::{Malformed, Reader, put_text, put_varint};
use crate::error::{Broken, Cause};
use crate::limits::{BALLOT_SETS_MAX, NAME_BYTES_MAX, RANKS_MAX, REASON_BYTES_MAX};
use crate::types::{Epoch, Rank, SetId};

/// What an [`Broken`] becomes when it crosses the wire: texts cut to their limits. The one who notices applies
/// it too, so that all ranks have the same words.
#[must_use]
pub fn normalised(broken: &Broken) -> Broken {
    let mut bytes = Vec::new();
    put_broken(&mut bytes, broken);
    self::broken(&mut Reader::new(&bytes)).expect("what was encoded decodes")
}

/// Appends the end of an epoch.
pub fn put_broken(out: &mut Vec<u8>, broken: &Broken) {
    out.extend_from_slice(&broken.epoch.0.to_le_bytes());
    match broken.culprit {
        None => out.push(0),
        Some(rank) => {
            out.push(1);
            out.extend_from_slice(&rank.0.to_le_bytes());
        }
    }
    match &broken.cause {
        Cause::Exited => out.push(0),
        Cause::Silent { for_ms } => {
            out.push(1);
            put_varint(out, *for_ms);
        }
        Cause::Misbehaved(what) => put_reason(out, 2, what),
        Cause::Stalled { tensor, missing } => {
            out.push(3);
            put_text(out, tensor, NAME_BYTES_MAX);
            let missing = &missing[..missing.len().min(RANKS_MAX)];
            put_varint(out, missing.len() as u64);
            for rank in missing {
                put_varint(out, u64::from(rank.0));
            }
        }
        Cause::System(what) => put_reason(out, 4, what),
        Cause::Unreachable(what) => put_reason(out, 5, what),
        Cause::Aborted(what) => put_reason(out, 6, what),
        Cause::Corrupted(what) => put_reason(out, 7, what),
        Cause::Excluded { epoch } => {
            out.push(8);
            out.extend_from_slice(&epoch.0.to_le_bytes());
        }
        Cause::Minority { here, of } => {
            out.push(9);
            out.extend_from_slice(&here.to_le_bytes());
            out.extend_from_slice(&of.to_le_bytes());
        }
    }
}

fn put_reason(out: &mut Vec<u8>, kind: u8, what: &str) {
    out.push(kind);
    put_text(out, what, REASON_BYTES_MAX);
}

/// Reads the end of an epoch.
pub fn broken(reader: &mut Reader<'_>) -> Result<Broken, Malformed> {
    let epoch = Epoch(reader.u32()?);
    let culprit = if reader.bool()? { Some(Rank(reader.u32()?)) } else { None };
    let cause = match reader.u8()? {
        0 => Cause::Exited,
        1 => Cause::Silent { for_ms: reader.varint()? },
        2 => Cause::Misbehaved(reader.text(REASON_BYTES_MAX)?.to_owned()),
        3 => {
            let tensor = reader.text(NAME_BYTES_MAX)?.to_owned();
            let count = reader.count(RANKS_MAX, 1, "a list of ranks above RANKS_MAX")?;
            let mut missing = Vec::with_capacity(count);
            for _ in 0..count {
                missing.push(Rank(reader.varint_u32()?));
            }
            Cause::Stalled { tensor, missing }
        }
        4 => Cause::System(reader.text(REASON_BYTES_MAX)?.to_owned()),
        5 => Cause::Unreachable(reader.text(REASON_BYTES_MAX)?.to_owned()),
        6 => Cause::Aborted(reader.text(REASON_BYTES_MAX)?.to_owned()),
        7 => Cause::Corrupted(reader.text(REASON_BYTES_MAX)?.to_owned()),
        8 => Cause::Excluded { epoch: Epoch(reader.u32()?) },
        9 => Cause::Minority { here: reader.u32()?, of: reader.u32()? },
        _ => return Err(Malformed("a cause that does not exist")),
    };
    Ok(Broken { epoch, culprit, cause })
}

/// Appends marks of process sets, as many as a ballot carries: those of the lowest sets.
pub fn put_marks(out: &mut Vec<u8>, marks: &[(SetId, u64)]) {
    let marks = &marks[..marks.len().min(BALLOT_SETS_MAX)];
    put_varint(out, marks.len() as u64);
    for (set, mark) in marks {
        put_varint(out, u64::from(set.0));
        put_varint(out, *mark);
    }
}

/// Reads marks of process sets.
pub fn marks(reader: &mut Reader<'_>) -> Result<Vec<(SetId, u64)>, Malformed> {
    let count = reader.count(BALLOT_SETS_MAX, 2, "a ballot above BALLOT_SETS_MAX")?;
    let mut marks = Vec::with_capacity(count);
    for _ in 0..count {
        let (set, mark) = (SetId(reader.varint_u32()?), reader.varint()?);
        if marks.last().is_some_and(|&(last, _)| last >= set) {
            return Err(Malformed("the sets of a ballot are out of order"));
        }
        marks.push((set, mark));
    }
    Ok(marks)
}
