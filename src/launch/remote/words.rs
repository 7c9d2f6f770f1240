//! How launcher and agents talk: lines of words, and blocks of what ranks write between them.
#![forbid(unsafe_code)]

use std::fmt::Write;
use std::fs::File;
use std::io::Read;

/// Raised whenever an older agent would not understand.
pub const PROTOCOL: u32 = 2;
/// The first word of an agent. Whatever a login shell prints before it is passed over.
pub const GREETING: &str = "carole-agent";
/// A longer line is nobody's who knows the protocol. A line holds at most one variable or one list of addresses.
const LINE_BYTES_MAX: usize = 4 << 20;
/// Bytes of one block.
pub const BLOCK_BYTES_MAX: usize = 64 << 10;
/// What a login shell may print before the agent speaks.
pub const NOISE_BYTES_MAX: usize = 64 << 10;

/// Any bytes as one word.
#[must_use]
pub fn escape(bytes: &[u8]) -> String {
    let mut word = String::with_capacity(bytes.len() + 1);
    for &byte in bytes {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' => word.push(byte as char),
            b'_' | b'.' | b'/' | b':' | b'=' | b',' | b'-' | b'[' | b']' | b'@' | b'+' => {
                word.push(byte as char)
            }
            // Writing to a String cannot fail.
            _ => drop(write!(word, "%{byte:02x}")),
        }
    }
    if word.is_empty() {
        // An empty word would vanish between two spaces.
        word.push('%');
    }
    word
}

/// The bytes of a word.
#[must_use]
pub fn unescape(word: &str) -> Option<Vec<u8>> {
    if word == "%" {
        return Some(Vec::new());
    }
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        if first != b'%' {
            bytes.push(first);
            rest = tail;
            continue;
        }
        let digit = |at: usize| (*tail.get(at)? as char).to_digit(16);
        bytes.push((digit(0)? * 16 + digit(1)?) as u8);
        rest = &tail[2..];
    }
    Some(bytes)
}

/// As [`unescape`], for what must be text.
#[must_use]
pub fn unescape_text(word: &str) -> Option<String> {
    String::from_utf8(unescape(word)?).ok()
}

/// A part of what an agent sends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Piece {
    /// A line, without its end.
    Line(String),
    /// What a rank (counted on its host) wrote to standard output (0) or standard error (1).
    Output {
        /// The rank, counted on its host.
        rank: usize,
        /// 0 or 1.
        stream: usize,
        /// What it wrote.
        bytes: Vec<u8>,
    },
}

/// The head of a block of output.
#[must_use]
pub fn block_head(rank: usize, stream: usize, len: usize) -> String {
    format!("output {rank} {stream} {len}\n")
}

/// Cuts a stream into pieces.
#[derive(Default)]
pub struct Reader {
    bytes: Vec<u8>,
    /// The block that is being read: rank, stream, length.
    block: Option<(usize, usize, usize)>,
}

impl Reader {
    /// Reads once; `None` at the end of the stream, and when what came cannot be meant.
    pub fn read(&mut self, mut from: &File) -> Option<Vec<Piece>> {
        let mut chunk = [0; 64 << 10];
        match from.read(&mut chunk) {
            Ok(0) => None,
            Ok(n) => self.feed(&chunk[..n]),
            Err(e)
                if matches!(e.kind(), std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock) =>
            {
                Some(Vec::new())
            }
            Err(_) => None,
        }
    }

    /// Takes bytes and gives the pieces that are whole.
    pub fn feed(&mut self, bytes: &[u8]) -> Option<Vec<Piece>> {
        self.bytes.extend_from_slice(bytes);
        let mut pieces = Vec::new();
        let mut at = 0;
        loop {
            let rest = &self.bytes[at..];
            if let Some((rank, stream, len)) = self.block {
                if rest.len() < len {
                    break;
                }
                pieces.push(Piece::Output { rank, stream, bytes: rest[..len].to_vec() });
                at += len;
                self.block = None;
                continue;
            }
            let Some(end) = rest.iter().position(|byte| *byte == b'\n') else {
                if rest.len() > LINE_BYTES_MAX {
                    return None;
                }
                break;
            };
            let line = String::from_utf8_lossy(&rest[..end]).into_owned();
            at += end + 1;
            match line.strip_prefix("output ") {
                None => pieces.push(Piece::Line(line)),
                Some(numbers) => self.block = Some(parse_head(numbers)?),
            }
        }
        self.bytes.drain(..at);
        Some(pieces)
    }
}

fn parse_head(numbers: &str) -> Option<(usize, usize, usize)> {
    let mut numbers = numbers.split(' ').map(|word| word.parse::<usize>().ok());
    let (rank, stream, len) = (numbers.next()??, numbers.next()??, numbers.next()??);
    (stream < 2 && len <= BLOCK_BYTES_MAX && numbers.next().is_none()).then_some((rank, stream, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_survive_as_a_word() {
        let all: Vec<u8> = (0..=255).collect();
        for bytes in [&b""[..], b"a b", b"%", b"A=b\nc", &all] {
            let word = escape(bytes);
            assert!(!word.contains([' ', '\n']) && !word.is_empty());
            assert_eq!(unescape(&word).as_deref(), Some(bytes));
        }
        for bad in ["%f", "%zz", "a%"] {
            assert_eq!(unescape(bad), None, "{bad}");
        }
    }

    #[test]
    fn pieces_are_the_same_however_the_bytes_are_cut() {
        let mut bytes = b"hello 1\n".to_vec();
        bytes.extend(block_head(3, 1, 5).bytes());
        bytes.extend(b"a\nb\n\xff");
        bytes.extend(b"exited 3 0\n");
        let expected = [
            Piece::Line("hello 1".into()),
            Piece::Output { rank: 3, stream: 1, bytes: b"a\nb\n\xff".to_vec() },
            Piece::Line("exited 3 0".into()),
        ];
        for cut in 0..bytes.len() {
            let mut reader = Reader::default();
            let mut pieces = reader.feed(&bytes[..cut]).unwrap();
            pieces.extend(reader.feed(&bytes[cut..]).unwrap());
            assert_eq!(pieces, expected, "cut at {cut}");
        }
    }

    #[test]
    fn what_cannot_be_meant_ends_the_stream() {
        for bad in
            ["output 1 2 3\n", "output 1 0 99999999\n", "output x 0 1\n", "output 1 0 1 1\n", "output \n"]
        {
            assert_eq!(Reader::default().feed(bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(Reader::default().feed(&vec![b'x'; LINE_BYTES_MAX + 1]), None);
    }
}
