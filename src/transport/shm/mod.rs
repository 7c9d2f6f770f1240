//! Shared memory between two processes of one host: rings that a peer reads where they lie.

mod budget;
mod distance;
#[cfg(all(test, loom))]
mod loom;
mod ring;
pub mod sealed;
mod segment;
#[cfg(test)]
mod tests;

pub use budget::{Budget, Share};
pub use segment::{SEGMENT_BYTES, create_segment};

use crate::device::host::copy_streaming;
use crate::error::Cause;
use crate::transport::Pipe;
use crate::transport::wake::{self, Waker};
use distance::Distance;
use ring::{Consumer, Producer, WANTS_DATA, WANTS_ROOM, go_to_sleep, must_wake};
use rustix::net::RecvFlags;
use segment::{RingId, Segment};
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Bytes that are copied before the other side is shown them: small enough that both work at the same time.
const PUBLISH_BYTES: usize = 16 << 10;
/// What one core takes from another at once.
const CACHE_LINE_BYTES: usize = 64;
/// Looks at an empty ring between two looks at the socket, which costs a system call.
const LOOKS_PER_CHECK: u32 = 512;
/// Times that the owner wakes between two looks at the socket.
const WAKES_PER_CHECK: u32 = 8;

/// Who made the segment, and who was given it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// Made it.
    Creator,
    /// Was given it.
    Joiner,
}

/// What the pipes of one segment have in common.
struct Shared {
    segment: Segment,
    /// This side: 0 or 1.
    side: usize,
    /// Carries nothing. Its end of file says that the peer has exited.
    socket: OwnedFd,
    /// Kept alive: the peer writes to (its copy of) it.
    _waker: Waker,
    peer_waker: OwnedFd,
    /// What the segment takes of this process's budget.
    _share: Share,
    /// Whether the processor is one on which handing lines back pays.
    hands_back: bool,
}

/// One of a segment's two pipes: a ring in each direction.
pub struct ShmPipe {
    shared: Arc<Shared>,
    tx: RingId,
    rx: RingId,
    producer: Producer,
    consumer: Consumer,
    distance: Distance,
    /// Whether large parts have been written.
    carries_much: bool,
    /// What happened since the last flush that a sleeping peer may wait for.
    offers: u64,
    looks: u32,
    /// Between `arm` and `disarm`.
    armed: bool,
}

/// Opens a segment, after making sure that it is one: its control pipe and its data pipe. `socket` is a unix
/// stream to the peer on which nothing is sent any more; `waker` is this process's, `peer_waker` the peer's; `share`
/// is [`SEGMENT_BYTES`] of this process's budget.
pub fn open(
    segment: OwnedFd,
    side: Side,
    socket: OwnedFd,
    waker: Waker,
    peer_waker: OwnedFd,
    share: Share,
) -> Result<(ShmPipe, ShmPipe), Cause> {
    let segment = Segment::map(&segment)?;
    // A full counter must not block whoever wakes. The flag belongs to the file that both sides share.
    rustix::io::ioctl_fionbio(&peer_waker, true)
        .map_err(|e| Cause::System(format!("peer's eventfd: {e}")))?;
    let side = match side {
        Side::Creator => 0,
        Side::Joiner => 1,
    };
    let shared = Arc::new(Shared {
        segment,
        side,
        socket,
        _waker: waker,
        peer_waker,
        _share: share,
        hands_back: hands_back(),
    });
    Ok((ShmPipe::new(shared.clone(), false), ShmPipe::new(shared, true)))
}

impl ShmPipe {
    fn new(shared: Arc<Shared>, data: bool) -> ShmPipe {
        let tx = RingId { from: shared.side, data };
        let rx = RingId { from: 1 - shared.side, data };
        ShmPipe {
            tx,
            rx,
            producer: Producer::new(tx.size()),
            consumer: Consumer::new(rx.size()),
            distance: Distance::default(),
            carries_much: false,
            offers: 0,
            looks: 0,
            armed: false,
            shared,
        }
    }

    /// Copies what fits of `part` into the ring.
    fn write_part(&mut self, part: &[u8]) -> Result<usize, Cause> {
        let segment = &self.shared.segment;
        let (ring, size) = (segment.bytes(self.tx), self.tx.size());
        self.carries_much |= part.len() >= PUBLISH_BYTES;
        let mut done = 0;
        while done < part.len() {
            let wanted = (part.len() - done).min(PUBLISH_BYTES);
            let position = self.producer.position();
            let room = self.producer.room(segment.head(self.tx), wanted)?;
            let n = room.min(wanted).min(size - position);
            if n == 0 {
                break;
            }
            // SAFETY: position + n <= size, so the destination lies in the ring; the ring's index logic gives
            // these bytes to the producer alone; private memory and the mapping do not overlap.
            unsafe {
                let (src, dst) = (part[done..].as_ptr(), ring.add(position));
                if self.distance.is_far() {
                    copy_streaming(dst, src, n);
                } else {
                    std::ptr::copy_nonoverlapping(src, dst, n);
                }
            }
            self.producer.publish(segment.tail(self.tx), n);
            done += n;
        }
        Ok(done)
    }

    /// Whether the peer has exited, as its kernel tells.
    fn peer_is_gone(&self) -> Result<bool, Cause> {
        let mut byte = [0u8; 1];
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        match rustix::net::recv(&self.shared.socket, &mut byte, flags) {
            Ok((0, _)) => Ok(true),
            Ok(_) => Err(Cause::Misbehaved("bytes on the socket beside its shared memory".to_owned())),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(false),
            Err(rustix::io::Errno::CONNRESET | rustix::io::Errno::PIPE) => Ok(true),
            Err(e) => Err(Cause::System(format!("the socket beside shared memory: {e}"))),
        }
    }

    /// Makes the lines that are about to be released this core's own, by a store to each. A line that was only
    /// read stays shared, and the producer, to overwrite it, must ask every core that may hold it; to fetch a line
    /// that one core has changed is far quicker. Measured on AMD Zen 4: the producer copies 44 GB/s into a ring
    /// that is in cache instead of 9, and 17 instead of 2 where the two cores share no third-level cache.
    fn hand_back(&self, n: usize) {
        let (ring, position) = (self.shared.segment.bytes(self.rx), self.consumer.position());
        let end = position + n;
        assert!(end <= self.rx.size(), "what is released was shown in a row");
        let mut at = position;
        while at < end {
            // SAFETY: at < end <= size, so the byte lies in the ring, and it is the consumer's until it is
            // released. Its value is of no use to anybody. Volatile, or the store would be left out.
            unsafe { ring.add(at).write_volatile(0) };
            at = (at + CACHE_LINE_BYTES) & !(CACHE_LINE_BYTES - 1);
        }
    }

    /// Bytes that can be read in a row.
    fn readable(&mut self) -> Result<usize, Cause> {
        let segment = &self.shared.segment;
        // Where only small messages go it makes no difference, and the look is not free.
        if self.carries_much
            && let Some(known) = self.consumer.drained_at()
        {
            self.distance.look(segment.tail(self.rx), known);
        }
        // Asks for everything, so that what is shown never lags behind what is there.
        let mut there = self.consumer.available(segment.tail(self.rx), self.rx.size())?;
        if there == 0 {
            self.looks += 1;
            if self.looks >= LOOKS_PER_CHECK {
                self.looks = 0;
                let gone = self.peer_is_gone()?;
                // What it wrote before its end is there now, if it is not yet seen.
                there = self.consumer.available(self.shared.segment.tail(self.rx), self.rx.size())?;
                if gone && there == 0 {
                    return Err(Cause::Exited);
                }
            }
        }
        Ok(there.min(self.rx.size() - self.consumer.position()))
    }
}

/// Whether handing lines back pays on this processor: on AMD's. Others have not been measured, and may fetch a
/// changed line more slowly than they take over a shared one.
pub(in crate::transport) fn hands_back() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let leaf = std::arch::x86_64::__cpuid(0);
        let vendor = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
        [*b"AuthenticAMD", *b"HygonGenuine"].iter().any(|known| vendor.as_flattened() == known)
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

impl Pipe for ShmPipe {
    fn write(&mut self, parts: &[IoSlice<'_>]) -> Result<usize, Cause> {
        let mut done = 0;
        for part in parts {
            let n = self.write_part(part)?;
            done += n;
            if n < part.len() {
                break;
            }
        }
        if done > 0 {
            self.offers |= WANTS_DATA;
        }
        Ok(done)
    }

    fn peek(&mut self) -> Result<&[u8], Cause> {
        let n = self.readable()?;
        let position = self.consumer.position();
        // SAFETY: position + n <= size. The index logic gives these bytes to the consumer until they are
        // consumed. A peer that writes them meanwhile breaks the protocol and can only spoil the payload that
        // it sends anyway: they are bytes, of which every bit pattern is valid, and headers are copied out
        // (`read`) before they are believed.
        Ok(unsafe { std::slice::from_raw_parts(self.shared.segment.bytes(self.rx).add(position), n) })
    }

    fn consume(&mut self, n: usize) {
        if n > 0 {
            // A line that was streamed past the caches is nobody's, and best stays so.
            if self.shared.hands_back && !self.distance.is_far() {
                self.hand_back(n);
            }
            self.consumer.release(self.shared.segment.head(self.rx), n);
            self.offers |= WANTS_ROOM;
        }
    }

    fn read(&mut self, dst: &mut [u8]) -> Result<usize, Cause> {
        let mut done = 0;
        while done < dst.len() {
            let n = match self.readable() {
                // What has been moved is told first; the error comes again.
                Err(_) if done > 0 => break,
                there => there?.min(dst.len() - done).min(PUBLISH_BYTES),
            };
            if n == 0 {
                break;
            }
            let ring = self.shared.segment.bytes(self.rx);
            // SAFETY: position + n <= size and n <= what is left of `dst`; the mapping does not overlap it.
            unsafe {
                let src = ring.add(self.consumer.position());
                std::ptr::copy_nonoverlapping(src, dst[done..].as_mut_ptr(), n);
            }
            self.consume(n);
            done += n;
        }
        Ok(done)
    }

    fn flush(&mut self) -> Result<(), Cause> {
        let offers = std::mem::take(&mut self.offers);
        let shared = &self.shared;
        if offers != 0 && must_wake(shared.segment.asleep(1 - shared.side), offers) {
            wake::wake(shared.peer_waker.as_fd());
        }
        Ok(())
    }

    fn nudge(&mut self) -> Result<(), Cause> {
        self.offers |= WANTS_DATA;
        self.flush()
    }

    fn arm(&mut self, blocked: bool) -> Result<bool, Cause> {
        self.armed = true;
        let shared = &self.shared;
        let wants = if blocked { WANTS_DATA | WANTS_ROOM } else { WANTS_DATA };
        go_to_sleep(shared.segment.asleep(shared.side), wants);
        let bytes = self.consumer.is_news(shared.segment.tail(self.rx));
        let room = blocked && self.producer.is_news(shared.segment.head(self.tx));
        Ok(bytes || room)
    }

    fn disarm(&mut self) {
        if std::mem::take(&mut self.armed) {
            self.shared.segment.asleep(self.shared.side).store(0, Ordering::Relaxed);
        }
        // The socket may be what ended the sleep. Its end ends every further sleep at once, and an owner with
        // nothing to do looks in now and then, so it is found after a few of these calls; those for another
        // reason do not pay for a system call each.
        self.looks += LOOKS_PER_CHECK / WAKES_PER_CHECK;
    }

    fn descriptor(&self) -> Option<RawFd> {
        Some(self.shared.socket.as_raw_fd())
    }

    fn descriptor_tells_room(&self) -> bool {
        false
    }

    fn is_memory(&self) -> bool {
        true
    }

    fn kind(&self) -> &'static str {
        "shm"
    }
}
