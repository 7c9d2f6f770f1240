//! A segment: the memory that two processes of one host share. For each direction a control ring and a data
//! ring; for each side a word that says that it sleeps.

use super::sealed;
use crate::error::Cause;
use crate::limits::{SHM_CONTROL_BYTES, SHM_RING_BYTES};
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

const MAGIC: u64 = u64::from_le_bytes(*b"carole\x00\x01");
/// The words in front of the rings.
const HEAD_BYTES: usize = 4096;
/// All of it: two rings for control, two for data.
pub const SEGMENT_BYTES: usize = HEAD_BYTES + 2 * SHM_CONTROL_BYTES + 2 * SHM_RING_BYTES;
/// Two cache lines: the hardware fetches them in pairs.
const LINE_BYTES: usize = 128;
const ASLEEP_AT: usize = LINE_BYTES;
const INDICES_AT: usize = 4 * LINE_BYTES;

const _: () = {
    assert!(INDICES_AT + 4 * 2 * LINE_BYTES <= HEAD_BYTES);
    assert!(SHM_CONTROL_BYTES.is_multiple_of(32) && SHM_RING_BYTES.is_multiple_of(32));
};

fn words() -> [u64; 3] {
    [MAGIC, SHM_CONTROL_BYTES as u64, SHM_RING_BYTES as u64]
}

/// Makes a segment.
pub fn create_segment() -> Result<OwnedFd, Cause> {
    sealed::create("carole-link", SEGMENT_BYTES, 0, &words())
}

/// A mapped segment.
pub struct Segment {
    base: NonNull<u8>,
}

// SAFETY: the mapping is owned; words in it are reached through atomics only, and the bytes of each ring
// through the one pipe that owns its end.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    /// Maps a segment, after making sure that it is one.
    pub fn map(fd: &OwnedFd) -> Result<Segment, Cause> {
        let (base, _) = sealed::map(fd, SEGMENT_BYTES, 0)?;
        let segment = Segment { base };
        for (at, expected) in words().into_iter().enumerate() {
            let found = segment.word(8 * at).load(std::sync::atomic::Ordering::Acquire);
            if found != expected {
                return Err(Cause::Misbehaved(format!(
                    "a shared memory segment that has {found:#x} where {expected:#x} belongs (another version?)"
                )));
            }
        }
        Ok(segment)
    }

    /// The shared word at this offset.
    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at < HEAD_BYTES, "words lie in the head of a segment");
        // SAFETY: inside the mapping, aligned, alive as long as `self`; never accessed but as an atomic.
        unsafe { &*self.base.as_ptr().add(at).cast::<AtomicU64>() }
    }

    /// What side 0 or 1 waits for while it sleeps.
    pub fn asleep(&self, side: usize) -> &AtomicU64 {
        assert!(side < 2, "a segment has two sides");
        self.word(ASLEEP_AT + side * LINE_BYTES)
    }

    /// The consumer's index of a ring.
    pub fn head(&self, ring: RingId) -> &AtomicU64 {
        self.word(INDICES_AT + 2 * ring.number() * LINE_BYTES)
    }

    /// The producer's index of a ring.
    pub fn tail(&self, ring: RingId) -> &AtomicU64 {
        self.word(INDICES_AT + (2 * ring.number() + 1) * LINE_BYTES)
    }

    /// The bytes of a ring.
    pub fn bytes(&self, ring: RingId) -> *mut u8 {
        let at = match ring.data {
            false => HEAD_BYTES + ring.from * SHM_CONTROL_BYTES,
            true => HEAD_BYTES + 2 * SHM_CONTROL_BYTES + ring.from * SHM_RING_BYTES,
        };
        assert!(at + ring.size() <= SEGMENT_BYTES, "rings lie inside their segment");
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.base.as_ptr().add(at) }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and all borrows of it have ended.
        unsafe { sealed::unmap(self.base, SEGMENT_BYTES) };
    }
}

/// One of the four rings: the side that writes it, and what it carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingId {
    pub from: usize,
    pub data: bool,
}

impl RingId {
    fn number(self) -> usize {
        assert!(self.from < 2, "a segment has two sides");
        2 * self.from + usize::from(self.data)
    }
    pub fn size(self) -> usize {
        if self.data { SHM_RING_BYTES } else { SHM_CONTROL_BYTES }
    }
}
