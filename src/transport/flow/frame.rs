//! Frames: what flows through a pipe. A header of 64 bytes, then payload padded to a multiple of 32 bytes, so
//! that a ring (whose size is such a multiple) never splits an element.
#![forbid(unsafe_code)]

use crate::error::Cause;
use crate::limits::{CONTROL_BYTES_MAX, EAGER_BYTES_MAX, FRAME_BYTES_MAX, TENSOR_BYTES_MAX};
use crate::transport::Stream;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 64;
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
}

impl Header {
    /// A header without payload.
    #[must_use]
    pub fn notice(kind: FrameKind, stream: Stream, ordinal: u64, total: u64) -> Header {
        Header { kind, len: 0, stream, ordinal, offset: 0, total }
    }

    /// As bytes. The last twelve are kept for a checksum and must be 0.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0u8; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&(MARK | self.kind as u32).to_le_bytes());
        bytes[4..8].copy_from_slice(&self.len.to_le_bytes());
        bytes[8..24].copy_from_slice(&self.stream.0.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.ordinal.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.offset.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.total.to_le_bytes());
        bytes
    }

    /// Reads a header from the control pipe or a lane, and checks all that can be checked without state.
    pub fn decode(bytes: &[u8; HEADER_BYTES], on_lane: bool) -> Result<Header, Cause> {
        let word = u32::from_le_bytes(array(&bytes[0..4]));
        let kind = if word & 0xFFFF_0000 == MARK { FrameKind::from_code(word & 0xFFFF) } else { None };
        let Some(kind) = kind else {
            return Err(misbehaved(format!("a frame that begins with {word:#010x}")));
        };
        if bytes[48..].iter().any(|b| *b != 0) {
            return Err(misbehaved(format!("a {kind:?} frame whose reserved bytes are not 0")));
        }
        let header = Header {
            kind,
            len: u32::from_le_bytes(array(&bytes[4..8])),
            stream: Stream(u128::from_le_bytes(array(&bytes[8..24]))),
            ordinal: u64::from_le_bytes(array(&bytes[24..32])),
            offset: u64::from_le_bytes(array(&bytes[32..40])),
            total: u64::from_le_bytes(array(&bytes[40..48])),
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
