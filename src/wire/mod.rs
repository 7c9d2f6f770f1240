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
pub const PROTOCOL: u32 = 1;

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
    Goodbye(Rank),
    /// The epoch is broken, and why. Passed on by everyone who hears it first.
    Abort(Broken),
}

const COORDINATION: u8 = 1;
const HEARTBEAT: u8 = 2;
const GOODBYE: u8 = 3;
const ABORT: u8 = 4;

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
            Message::Goodbye(rank) => {
                out.push(GOODBYE);
                out.extend_from_slice(&rank.0.to_le_bytes());
            }
            Message::Abort(broken) => {
                out.push(ABORT);
                failure::put_broken(out, broken);
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
                let rank = Rank(reader.u32()?);
                reader.end().map(|()| Message::Goodbye(rank))
            }
            ABORT => {
                let broken = failure::broken(&mut reader)?;
                reader.end()?;
                Ok(Message::Abort(broken))
            }
            _ => Err(Malformed("a control message of unknown kind")),
        }
    }
}
