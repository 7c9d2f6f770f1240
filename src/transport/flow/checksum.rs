//! Checksums of frames: CRC-32C (Castagnoli), with the widest instructions that the processor has; found at run
//! time. TCP's own checksum is 16 bits wide and is made by the network card: a card, a switch or a driver that
//! changes bytes behind it goes unnoticed, and a wrong gradient is worse than a job that ends.
#![forbid(unsafe_code)]

use crate::error::Cause;
use crc_fast::{CrcAlgorithm, Digest};

/// A checksum in the making.
pub struct Checksum(Digest);

impl Checksum {
    pub fn new() -> Checksum {
        Checksum(Digest::new(CrcAlgorithm::Crc32Iscsi))
    }
    /// Forgets what it has seen.
    pub fn reset(&mut self) {
        self.0.reset();
    }
    /// Takes the next bytes in.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }
    /// Of all bytes since the beginning.
    pub fn value(&self) -> u32 {
        self.0.finalize() as u32
    }
}

/// Of these bytes.
pub fn of(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// What to say when bytes have not arrived as they were sent.
pub fn check(what: impl FnOnce() -> String, sent: u32, arrived: u32) -> Result<(), Cause> {
    if sent == arrived {
        return Ok(());
    }
    Err(Cause::Corrupted(format!(
        "{} was sent with checksum {sent:08x} and arrived with {arrived:08x}",
        what()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_crc_32c_however_it_is_cut() {
        assert_eq!(of(b"123456789"), 0xE306_9283, "the check value of the standard");
        let bytes: Vec<u8> = (0..10_000u32).map(|i| ((i * 31) >> 3) as u8).collect();
        let mut sum = Checksum::new();
        for cut in [0, 1, 63, 64, 4097, 9999, 10_000] {
            sum.reset();
            sum.update(&bytes[..cut]);
            sum.update(&bytes[cut..]);
            assert_eq!(sum.value(), of(&bytes), "cut at {cut}");
        }
    }

    #[test]
    fn every_bit_counts() {
        let mut bytes = [0x5Au8; 64];
        let whole = of(&bytes);
        for bit in 0..512 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(of(&bytes), whole, "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
