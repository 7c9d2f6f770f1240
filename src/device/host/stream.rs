//! Copies past the caches: for memory that another processor will read next, or that nobody will read soon.
//!
//! A line that another core still holds costs an ordinary store a round trip to that core, of which few are under
//! way at a time: measured 2 to 9 GB/s, whatever is prefetched. A streaming store does not ask; it writes whole
//! lines to memory, and throws the other core's copy away: 28 GB/s, wherever the two cores are.

/// A streaming store is worth its fence from here.
const STREAM_BYTES_MIN: usize = 2 << 10;
/// What a streaming store fills whole.
#[cfg(target_arch = "x86_64")]
const LINE_BYTES: usize = 64;

/// Copies `bytes` bytes, past the caches where they are many. They are visible to a processor that sees any
/// later store of this thread.
///
/// # Safety
/// `bytes` bytes must lie at both pointers, those at `dst` may be written, and the two do not overlap.
pub unsafe fn copy_streaming(dst: *mut u8, src: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    if bytes >= STREAM_BYTES_MIN {
        // SAFETY: the caller's promise; SSE2 and its fence are part of x86-64.
        unsafe {
            // Lines that are not written whole are slow to stream: the ends are copied plainly.
            let front = dst.align_offset(LINE_BYTES);
            let lines = (bytes - front) / LINE_BYTES * LINE_BYTES;
            src.copy_to_nonoverlapping(dst, front);
            if super::level() == super::Level::Avx512 {
                lines_avx512(dst.add(front), src.add(front), lines);
            } else {
                lines_sse2(dst.add(front), src.add(front), lines);
            }
            let end = front + lines;
            src.add(end).copy_to_nonoverlapping(dst.add(end), bytes - end);
            // Streaming stores are ordered by nothing else, not even by a release store behind them.
            std::arch::x86_64::_mm_sfence();
        }
        return;
    }
    // SAFETY: the caller's promise.
    unsafe { src.copy_to_nonoverlapping(dst, bytes) };
}

/// # Safety
/// As for [`copy_streaming`]; `dst` and `bytes` are multiples of [`LINE_BYTES`], and the processor has AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn lines_avx512(dst: *mut u8, src: *const u8, bytes: usize) {
    use std::arch::x86_64::{__m512i, _mm512_loadu_si512, _mm512_stream_si512};
    for at in (0..bytes).step_by(LINE_BYTES) {
        // SAFETY: the caller's promise.
        unsafe {
            let line = _mm512_loadu_si512(src.add(at).cast::<__m512i>());
            _mm512_stream_si512(dst.add(at).cast(), line);
        }
    }
}

/// # Safety
/// As for [`copy_streaming`]; `dst` and `bytes` are multiples of [`LINE_BYTES`].
#[cfg(target_arch = "x86_64")]
unsafe fn lines_sse2(dst: *mut u8, src: *const u8, bytes: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    for at in (0..bytes).step_by(LINE_BYTES) {
        for part in (at..at + LINE_BYTES).step_by(16) {
            // SAFETY: the caller's promise.
            unsafe {
                let quarter = _mm_loadu_si128(src.add(part).cast::<__m128i>());
                _mm_stream_si128(dst.add(part).cast(), quarter);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_copied_and_no_other_touched() {
        let from: Vec<u8> = (0..20_000u32).map(|i| (i * 7 + i / 251) as u8).collect();
        for level in super::super::Level::ALL.iter().filter(|level| level.is_available()) {
            super::super::set_level(*level).unwrap();
            for len in [0, 1, 63, 64, 2047, 2048, 2049, 4096, 4111, 16_384] {
                for (to, at) in [(0, 0), (1, 0), (0, 1), (31, 17), (64, 3), (63, 63)] {
                    let mut bytes = vec![0xA5u8; 20_000];
                    // SAFETY: `at + len` and `to + len` are below 20 000, and the two are different vectors.
                    unsafe { copy_streaming(bytes.as_mut_ptr().add(to), from.as_ptr().add(at), len) };
                    assert_eq!(bytes[to..to + len], from[at..at + len]);
                    assert!(bytes[..to].iter().chain(&bytes[to + len..]).all(|b| *b == 0xA5));
                }
            }
        }
    }
}
