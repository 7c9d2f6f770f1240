//! Frames: what flows through a pipe. A header of 64 bytes, then payload padded to a multiple of 32 bytes, so
//! that a ring (whose size is such a multiple) never splits an element. Between hosts the header ends with the
//! checksums of the payload (without padding) and of the header before it; within a host these bytes are 0.
#![forbid(unsafe_code)]

use super::checksum;
use crate::error::Cause;
use crate::limits::{CONTROL_BYTES_MAX, EAGER_BYTES_MAX, FRAME_BYTES_MAX, TENSOR_BYTES_MAX};
use crate::transport::Stream;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 64;
/// The bytes of a header that its own checksum covers.
const SUMMED_BYTES: usize = HEADER_BYTES - 4;
/// Payload is padded to a multiple of this.
pub const PAD_BYTES: usize = 32;
/// Stands in the upper half of the first word, so that a reader that has lost its place notices at once.
const MARK: u32 = 0xCA01_0000;

/// What a frame says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum FrameKind {
    /// A message of the engine (control pipe).
    Control = 1,
    /// A receive of `total` bytes is posted: send its payload (control pipe).
    Grant = 2,
    /// A send of `total` bytes is posted and waits for a grant (control pipe).
    Want = 3,
    /// `total` bytes of landing space are free again (control pipe).
    Credit = 4,
    /// To a sender: the matching receive has `total` bytes, nothing will be taken (control pipe).
    RefuseSend = 5,
    /// To a receiver: the matching send has `total` bytes, nothing will come (control pipe).
    RefuseRecv = 6,
    /// To a receiver: the stream has been idle after `ordinal` sends; may its count be forgotten? (control pipe)
    Retire = 7,
    /// The answer to [`FrameKind::Retire`]: the count is forgotten, both sides start at 0 again (control pipe).
    Retired = 8,
    /// The other answer: the stream is in use, the count stays (control pipe).
    Kept = 9,
    /// A whole small message that nobody asked for (lane).
    Eager = 16,
    /// A part of a granted message (lane).
    Data = 17,
}

impl FrameKind {
    fn from_code(code: u32) -> Option<FrameKind> {
        use FrameKind::*;
        [Control, Grant, Want, Credit, RefuseSend, RefuseRecv, Retire, Retired, Kept, Eager, Data]
            .into_iter()
            .find(|kind| *kind as u32 == code)
    }
    fn is_payload(self) -> bool {
        matches!(self, FrameKind::Eager | FrameKind::Data)
    }
}

/// The header of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What it says.
    pub kind: FrameKind,
    /// Bytes that follow, without padding.
    pub len: u32,
    /// The stream.
    pub stream: Stream,
    /// Which message of the stream.
    pub ordinal: u64,
    /// Where in the message these bytes belong.
    pub offset: u64,
    /// Bytes of the whole message.
    pub total: u64,
    /// The checksum of the bytes that follow; 0 where there are none, or no checksums.
    pub payload_sum: u32,
}

impl Header {
    /// A header without payload.
    #[must_use]
    pub fn notice(kind: FrameKind, stream: Stream, ordinal: u64, total: u64) -> Header {
        Header { kind, len: 0, stream, ordinal, offset: 0, total, payload_sum: 0 }
    }

    /// As bytes, with checksums if `checked`. The eight bytes before them are reserved and 0.
    #[must_use]
    pub fn encode(&self, checked: bool) -> [u8; HEADER_BYTES] {
        let mut bytes = [0u8; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&(MARK | self.kind as u32).to_le_bytes());
        bytes[4..8].copy_from_slice(&self.len.to_le_bytes());
        bytes[8..24].copy_from_slice(&self.stream.0.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.ordinal.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.offset.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.total.to_le_bytes());
        if checked {
            bytes[56..SUMMED_BYTES].copy_from_slice(&self.payload_sum.to_le_bytes());
            let sum = checksum::of(&bytes[..SUMMED_BYTES]);
            bytes[SUMMED_BYTES..].copy_from_slice(&sum.to_le_bytes());
        }
        bytes
    }

    /// Reads a header from the control pipe or a lane, and checks all that can be checked without state; first
    /// of all, if `checked`, that it is what was sent.
    pub fn decode(bytes: &[u8; HEADER_BYTES], on_lane: bool, checked: bool) -> Result<Header, Cause> {
        if checked {
            let sent = u32::from_le_bytes(array(&bytes[SUMMED_BYTES..]));
            checksum::check(|| "the header of a frame".into(), sent, checksum::of(&bytes[..SUMMED_BYTES]))?;
        }
        let word = u32::from_le_bytes(array(&bytes[0..4]));
        let kind = if word & 0xFFFF_0000 == MARK { FrameKind::from_code(word & 0xFFFF) } else { None };
        let Some(kind) = kind else {
            return Err(misbehaved(format!("a frame that begins with {word:#010x}")));
        };
        let reserved = if checked { &bytes[48..56] } else { &bytes[48..] };
        if reserved.iter().any(|b| *b != 0) {
            return Err(misbehaved(format!("a {kind:?} frame whose reserved bytes are not 0")));
        }
        let header = Header {
            kind,
            len: u32::from_le_bytes(array(&bytes[4..8])),
            stream: Stream(u128::from_le_bytes(array(&bytes[8..24]))),
            ordinal: u64::from_le_bytes(array(&bytes[24..32])),
            offset: u64::from_le_bytes(array(&bytes[32..40])),
            total: u64::from_le_bytes(array(&bytes[40..48])),
            payload_sum: if checked { u32::from_le_bytes(array(&bytes[56..SUMMED_BYTES])) } else { 0 },
        };
        if kind.is_payload() != on_lane {
            return Err(misbehaved(format!("a {kind:?} frame on the wrong pipe")));
        }
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), Cause> {
        let len = self.len as usize;
        let fits = match self.kind {
            FrameKind::Control => len <= CONTROL_BYTES_MAX && self.total == 0 && self.offset == 0,
            FrameKind::Grant | FrameKind::Want | FrameKind::RefuseSend | FrameKind::RefuseRecv => {
                len == 0 && self.offset == 0 && self.total <= TENSOR_BYTES_MAX
            }
            FrameKind::Credit | FrameKind::Retire | FrameKind::Retired | FrameKind::Kept => {
                len == 0 && self.offset == 0
            }
            FrameKind::Eager => {
                (1..=EAGER_BYTES_MAX).contains(&len) && self.offset == 0 && self.total == u64::from(self.len)
            }
            FrameKind::Data => {
                self.total <= TENSOR_BYTES_MAX
                    && self.offset.is_multiple_of(FRAME_BYTES_MAX as u64)
                    && self.offset < self.total
                    && u64::from(self.len) == (self.total - self.offset).min(FRAME_BYTES_MAX as u64)
            }
        };
        if fits {
            return Ok(());
        }
        Err(misbehaved(format!(
            "a {:?} frame with length {}, offset {} and total {}",
            self.kind, self.len, self.offset, self.total
        )))
    }

    /// Whether the payload is what was sent, by its checksum here.
    pub fn check_payload(&self, arrived: u32) -> Result<(), Cause> {
        let Header { kind, len, offset, total, .. } = *self;
        let words = || match kind {
            FrameKind::Control => format!("a control message of {len} bytes"),
            _ => format!("payload (bytes {offset} to {} of {total})", offset + u64::from(len)),
        };
        checksum::check(words, self.payload_sum, arrived)
    }

    /// Bytes of padding behind the payload.
    #[must_use]
    pub fn padding(&self) -> usize {
        (self.len as usize).next_multiple_of(PAD_BYTES) - self.len as usize
    }
}

/// The peer sent what no correct peer sends.
pub fn misbehaved(what: impl Into<String>) -> Cause {
    Cause::Misbehaved(what.into())
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(bytes);
    out
}

const _: () = {
    assert!(HEADER_BYTES.is_multiple_of(PAD_BYTES));
    assert!(FRAME_BYTES_MAX.is_multiple_of(PAD_BYTES));
};
