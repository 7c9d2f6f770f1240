//! Control messages: encoding and decoding, by hand, little-endian, with limits. A decoder is total: whatever
//! the bytes, it returns a value or [`Malformed`], and allocates no more than the input and `limits.rs` allow.
//!
//! A message is one byte of kind, then its fields. Integers that are usually small are LEB128 varints in
//! their shortest form (so that a value has one encoding, and `encode(decode(bytes)) == bytes`).
#![forbid(unsafe_code)]

pub mod agreement;
pub mod cursor;
pub mod failure;
pub mod signature;

#[cfg(test)]
mod tests;

pub use cursor::{Malformed, Reader};

use crate::error::Broken;
use crate::limits::CONTROL_BYTES_MAX;
use crate::types::{Rank, SetId};

/// The version of everything in this module and of the frames of `transport`. The handshake compares it; a
/// change of any encoding increments it.
pub const PROTOCOL: u32 = 4;

/// Everything that one engine tells another over a link.
#[derive(Clone, Debug, PartialEq)]
pub enum Message<'a> {
    /// For the coordinator of this process set.
    Coordination {
        /// The set.
        set: SetId,
        /// What [`agreement`] encodes.
        body: &'a [u8],
    },
    /// I live.
    Heartbeat,
    /// This rank leaves in an orderly way; the end of its connections is no failure. Passed on by everyone who
    /// hears it first, since not everyone has a link to it.
    Goodbye {
        /// Who leaves.
        who: Rank,
        /// Whether it had nothing in flight, so that whatever it has agreed to can be finished without it.
        clean: bool,
        /// Tagged messages that it has sent to whom it says this itself; 0 where it is passed on.
        sent: u64,
    },
    /// A member of this set has left, and no agreement follows. Travels down the coordinator's tree behind the
    /// last agreement, so that what was agreed before is known to be.
    Closed {
        /// The set.
        set: SetId,
        /// Who has left.
        who: Rank,
    },
    /// The epoch is broken, and why. Passed on by everyone who hears it first.
    Abort(Broken),
    /// Uniform completion: of the agreed operations of this set, so many are held by the sender and those below it
    /// in the tree, or may be released.
    Mark {
        /// The set.
        set: SetId,
        /// How many.
        mark: u64,
    },
    /// Uniform completion, when the epoch is broken: up to where operations were released.
    Ballot {
        /// Whether this is what all together have found.
        verdict: bool,
        /// Why the epoch is over.
        broken: Broken,
        /// For each set, ascending, how many.
        marks: Vec<(SetId, u64)>,
    },
}

const COORDINATION: u8 = 1;
const HEARTBEAT: u8 = 2;
const GOODBYE: u8 = 3;
const ABORT: u8 = 4;
const CLOSED: u8 = 5;
const MARK: u8 = 6;
const BALLOT: u8 = 7;

/// Bytes that the envelope of [`Message::Coordination`] takes before its body.
pub const ENVELOPE_BYTES: usize = 5;

/// Starts a coordination message in `out`, which is cleared; the body is appended to it.
pub fn begin_coordination(out: &mut Vec<u8>, set: SetId) {
    out.clear();
    out.push(COORDINATION);
    out.extend_from_slice(&set.0.to_le_bytes());
}

impl<'a> Message<'a> {
    /// Writes this message to `out`, which is cleared first so that its memory is used again.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.clear();
        match self {
            Message::Coordination { set, body } => {
                begin_coordination(out, *set);
                out.extend_from_slice(body);
            }
            Message::Heartbeat => out.push(HEARTBEAT),
            Message::Goodbye { who, clean, sent } => {
                out.push(GOODBYE);
                out.extend_from_slice(&who.0.to_le_bytes());
                out.push(u8::from(*clean));
                out.extend_from_slice(&sent.to_le_bytes());
            }
            Message::Closed { set, who } => {
                out.push(CLOSED);
                out.extend_from_slice(&set.0.to_le_bytes());
                out.extend_from_slice(&who.0.to_le_bytes());
            }
            Message::Abort(broken) => {
                out.push(ABORT);
                failure::put_broken(out, broken);
            }
            Message::Mark { set, mark } => {
                out.push(MARK);
                out.extend_from_slice(&set.0.to_le_bytes());
                out.extend_from_slice(&mark.to_le_bytes());
            }
            Message::Ballot { verdict, broken, marks } => {
                out.extend_from_slice(&[BALLOT, u8::from(*verdict)]);
                failure::put_broken(out, broken);
                failure::put_marks(out, marks);
            }
        }
    }

    /// Reads a message.
    pub fn decode(bytes: &'a [u8]) -> Result<Message<'a>, Malformed> {
        if bytes.len() > CONTROL_BYTES_MAX {
            return Err(Malformed("a control message above CONTROL_BYTES_MAX"));
        }
        let mut reader = Reader::new(bytes);
        match reader.u8()? {
            COORDINATION => {
                let set = SetId(reader.u32()?);
                Ok(Message::Coordination { set, body: reader.rest() })
            }
            HEARTBEAT => reader.end().map(|()| Message::Heartbeat),
            GOODBYE => {
                let who = Rank(reader.u32()?);
                let clean = match reader.u8()? {
                    0 => false,
                    1 => true,
                    _ => return Err(Malformed("a goodbye that is neither clean nor not")),
                };
                let sent = reader.u64()?;
                reader.end().map(|()| Message::Goodbye { who, clean, sent })
            }
            CLOSED => {
                let (set, who) = (SetId(reader.u32()?), Rank(reader.u32()?));
                reader.end().map(|()| Message::Closed { set, who })
            }
            ABORT => {
                let broken = failure::broken(&mut reader)?;
                reader.end()?;
                Ok(Message::Abort(broken))
            }
            MARK => {
                let (set, mark) = (SetId(reader.u32()?), reader.u64()?);
                reader.end().map(|()| Message::Mark { set, mark })
            }
            BALLOT => {
                let verdict = reader.bool()?;
                let (broken, marks) = (failure::broken(&mut reader)?, failure::marks(&mut reader)?);
                reader.end().map(|()| Message::Ballot { verdict, broken, marks })
            }
            _ => Err(Malformed("a control message of unknown kind")),
        }
    }
}
