//! How bytes get into a ring: by plain stores, or by streaming stores that go past the caches.
//!
//! Where both processes share a cache, plain stores win: the peer finds the bytes in it. Where they do not (two
//! chiplets, two sockets), each plain store first has to take the line from the peer's cache, and streaming
//! is about twice as fast. Which of the two it is may change whenever the kernel moves a process, so the
//! producer measures its own copies, and now and then tries the other way.

/// Smaller copies are always plain: their time is not worth measuring.
const MEASURED_BYTES_MIN: usize = 8 << 10;
/// One measured copy in this many goes the other way.
const TRIAL_EVERY: u32 = 32;
/// Streaming must be this much faster for the producer, for the consumer then reads from memory.
const ADVANTAGE: f32 = 1.5;

/// What a producer knows about the two ways.
#[derive(Default)]
pub struct Ways {
    /// Nanoseconds per byte of either way: plain, streaming; 0 until it was tried.
    cost: [f32; 2],
    copies: u32,
    streams: bool,
}

impl Ways {
    /// Copies `n` bytes from `src` to `dst` and learns from how long that takes.
    ///
    /// # Safety
    /// `n` bytes may be read at `src` and written at `dst`, and the two do not overlap.
    pub unsafe fn copy(&mut self, src: *const u8, dst: *mut u8, n: usize) {
        if n < MEASURED_BYTES_MIN || !STREAMING {
            // SAFETY: the caller's promise.
            return unsafe { std::ptr::copy_nonoverlapping(src, dst, n) };
        }
        let streams = self.choose();
        let begin = std::time::Instant::now();
        // SAFETY: the caller's promise.
        unsafe {
            if streams {
                copy_streaming(src, dst, n);
            } else {
                std::ptr::copy_nonoverlapping(src, dst, n);
            }
        }
        self.learn(streams, begin.elapsed().as_nanos() as f32 / n as f32);
    }

    /// Whether the next copy streams.
    fn choose(&mut self) -> bool {
        self.copies = self.copies.wrapping_add(1);
        self.streams != self.copies.is_multiple_of(TRIAL_EVERY)
    }

    fn learn(&mut self, streams: bool, ns_per_byte: f32) {
        let known = &mut self.cost[usize::from(streams)];
        if *known == 0.0 {
            *known = ns_per_byte;
        } else {
            // An interruption by the kernel is no property of the way.
            *known += (ns_per_byte.min(4.0 * *known) - *known) / 8.0;
        }
        let [plain, streaming] = self.cost;
        // Between the two bounds nothing changes, so that noise does not toggle it.
        if self.streams {
            self.streams = streaming < plain;
        } else {
            self.streams = streaming > 0.0 && streaming * ADVANTAGE < plain;
        }
    }
}

#[cfg(target_arch = "x86_64")]
const STREAMING: bool = true;
#[cfg(not(target_arch = "x86_64"))]
const STREAMING: bool = false;

/// Copies past the caches; what is written is visible before whatever is stored next.
///
/// # Safety
/// As for [`Ways::copy`].
#[cfg(target_arch = "x86_64")]
unsafe fn copy_streaming(src: *const u8, dst: *mut u8, n: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    let head = dst.align_offset(64).min(n);
    let lines = (n - head) / 64;
    // SAFETY: head + 64 * lines <= n, and dst + head is a multiple of 64; the rest is the caller's promise.
    unsafe {
        std::ptr::copy_nonoverlapping(src, dst, head);
        let (mut from, mut to) = (src.add(head).cast::<__m128i>(), dst.add(head).cast::<__m128i>());
        for _ in 0..lines {
            let line = [0, 1, 2, 3].map(|i| _mm_loadu_si128(from.add(i)));
            for (i, part) in line.into_iter().enumerate() {
                _mm_stream_si128(to.add(i), part);
            }
            (from, to) = (from.add(4), to.add(4));
        }
        std::ptr::copy_nonoverlapping(from.cast::<u8>(), to.cast::<u8>(), n - head - 64 * lines);
        // Streaming stores are not ordered by the release store that publishes the bytes.
        _mm_sfence();
    }
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn copy_streaming(src: *const u8, dst: *mut u8, n: usize) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(src, dst, n) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_every_byte_at_every_alignment() {
        let src: Vec<u8> = (0..1000u32).map(|i| (i * 7 + i / 251) as u8).collect();
        for from in [0, 1, 17, 63] {
            for to in [0, 1, 15, 33, 64, 127] {
                for n in [0, 1, 63, 64, 65, 128, 500, 800] {
                    let mut dst = vec![0xEEu8; 1000];
                    // SAFETY: from + n and to + n are at most 1000.
                    unsafe { copy_streaming(src[from..].as_ptr(), dst[to..].as_mut_ptr(), n) };
                    assert_eq!(dst[to..to + n], src[from..from + n], "{from} {to} {n}");
                    assert!(dst[..to].iter().chain(&dst[to + n..]).all(|&b| b == 0xEE), "{from} {to} {n}");
                }
            }
        }
    }

    fn streamed(ways: &mut Ways, plain: f32, streaming: f32) -> usize {
        (0..320)
            .filter(|_| {
                let streams = ways.choose();
                ways.learn(streams, if streams { streaming } else { plain });
                streams
            })
            .count()
    }

    #[test]
    fn takes_the_faster_way_and_changes_with_it() {
        let mut ways = Ways::default();
        assert_eq!(streamed(&mut ways, 0.05, 0.06), 10, "a cache in common");
        assert!(streamed(&mut ways, 0.3, 0.1) > 250, "none");
        streamed(&mut ways, 0.05, 0.1);
        assert_eq!(streamed(&mut ways, 0.05, 0.1), 10, "a cache in common again");
    }

    #[test]
    fn a_small_advantage_is_none() {
        let mut ways = Ways::default();
        assert_eq!(streamed(&mut ways, 0.12, 0.1), 10);
    }
}
