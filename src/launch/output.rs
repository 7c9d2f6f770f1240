//! What ranks write: cut into lines, prefixed, passed on without blocking and without growing without bound.
#![forbid(unsafe_code)]

use crate::error::named_culprit;
use crate::types::Rank;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A line longer than this is broken, so that a rank that never ends a line cannot fill our memory.
pub const LINE_BYTES_MAX: usize = 64 << 10;
/// While this much waits to be written, nothing more is read from ranks, and they wait (back-pressure).
const QUEUE_BYTES_MAX: usize = 256 << 10;
/// A pipe that can be written to takes at least this much without blocking (PIPE_BUF on Linux).
const WRITE_BYTES: usize = 4096;
/// How much of a rank's last line of standard error is kept for the report of its failure.
const LAST_LINE_BYTES_MAX: usize = 500;

/// Cuts a stream of bytes into lines. A lone carriage return ends a line too: progress bars are made so.
#[derive(Default)]
pub struct Splitter {
    partial: Vec<u8>,
}

impl Splitter {
    /// Takes bytes and gives each whole line, its end included, to `emit`.
    pub fn feed(&mut self, bytes: &[u8], mut emit: impl FnMut(&[u8])) {
        for &byte in bytes {
            if self.partial.last() == Some(&b'\r') && byte != b'\n' {
                emit(&self.partial);
                self.partial.clear();
            }
            self.partial.push(byte);
            if byte == b'\n' {
                emit(&self.partial);
                self.partial.clear();
            } else if self.partial.len() >= LINE_BYTES_MAX {
                self.partial.push(b'\n');
                emit(&self.partial);
                self.partial.clear();
            }
        }
    }

    /// Gives what is left without an end of line, with one.
    pub fn finish(&mut self, mut emit: impl FnMut(&[u8])) {
        if !self.partial.is_empty() {
            self.partial.push(b'\n');
            emit(&self.partial);
            self.partial.clear();
        }
    }
}

/// The launcher's own standard output or standard error.
pub struct Sink {
    fd: OwnedFd,
    queue: Vec<u8>,
    written: usize,
    closed: bool,
}

impl Sink {
    /// A sink that writes to this descriptor.
    pub fn new(fd: OwnedFd) -> Sink {
        Sink { fd, queue: Vec::new(), written: 0, closed: false }
    }

    /// Whether nothing waits to be written.
    pub fn is_empty(&self) -> bool {
        self.written == self.queue.len()
    }

    /// Whether so much waits that ranks must wait too.
    pub fn is_full(&self) -> bool {
        self.queue.len() - self.written >= QUEUE_BYTES_MAX
    }

    /// Whether its reader has gone.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// The descriptor, to wait until it can be written to.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Appends to what waits.
    pub fn push(&mut self, parts: &[&[u8]]) {
        if self.closed {
            return;
        }
        for part in parts {
            self.queue.extend_from_slice(part);
        }
    }

    /// Drops what waits to be written.
    pub fn give_up(&mut self) {
        self.queue.clear();
        self.written = 0;
    }

    /// Writes a little: call it when the descriptor can be written to. The descriptor is shared with other
    /// processes, so it cannot be made non-blocking; a write of this size to a writable pipe does not block.
    pub fn write_some(&mut self) {
        let end = self.queue.len().min(self.written + WRITE_BYTES);
        match rustix::io::write(&self.fd, &self.queue[self.written..end]) {
            Ok(n) => self.written += n,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) => {
                self.closed = true;
                self.written = self.queue.len();
            }
        }
        if self.is_empty() {
            self.queue.clear();
            self.written = 0;
        } else if self.written > QUEUE_BYTES_MAX {
            self.queue.drain(..self.written);
            self.written = 0;
        }
    }
}

/// One of the two streams of a rank.
pub struct Stream {
    pipe: Option<File>,
    /// Whether more may come.
    open: bool,
    splitter: Splitter,
    prefix: String,
    timestamps: bool,
    file: Option<(File, PathBuf)>,
    /// The beginning of the last line that is not blank.
    last_line: Vec<u8>,
    /// The rank at fault, by the last error of the runtime that was written.
    culprit: Option<Rank>,
}

impl Stream {
    /// Reads from `pipe`, which must not block. Each line is passed on after `prefix`.
    pub fn new(pipe: OwnedFd, prefix: String, timestamps: bool) -> Stream {
        Stream { pipe: Some(File::from(pipe)), ..Stream::remote(prefix, timestamps) }
    }

    /// A stream of a rank on another host, which is given its bytes by [`Stream::take`].
    pub fn remote(prefix: String, timestamps: bool) -> Stream {
        Stream {
            pipe: None,
            open: true,
            splitter: Splitter::default(),
            prefix,
            timestamps,
            file: None,
            last_line: Vec::new(),
            culprit: None,
        }
    }

    /// What is read from now on is passed on after this prefix, unless there is none at all.
    pub fn rename(&mut self, prefix: &str) {
        if !self.prefix.is_empty() {
            prefix.clone_into(&mut self.prefix);
        }
    }

    /// Writes everything to this file too, as it came.
    pub fn copy_to(&mut self, path: &Path) -> std::io::Result<()> {
        self.file = Some((File::create(path)?, path.to_path_buf()));
        Ok(())
    }

    /// The pipe, unless its end has been reached.
    pub fn pipe(&self) -> Option<&File> {
        self.pipe.as_ref()
    }

    /// Whether more may come.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// Passes on what came from another host.
    pub fn take(&mut self, bytes: &[u8], sink: &mut Sink, complaints: &mut Vec<String>) {
        if self.open {
            self.copy(bytes, complaints);
            self.pass(bytes, sink);
        }
    }

    /// The last line that is not blank.
    pub fn last_line(&self) -> String {
        String::from_utf8_lossy(&self.last_line).trim().to_string()
    }

    /// The rank at fault, by the last error of the runtime that was written.
    pub fn culprit(&self) -> Option<Rank> {
        self.culprit
    }

    /// Reads once and passes on whole lines; `false` when there was nothing to read. A file that cannot be
    /// written is given up, with words in `complaints`.
    pub fn read(&mut self, sink: &mut Sink, complaints: &mut Vec<String>) -> bool {
        let Some(pipe) = &mut self.pipe else { return false };
        let mut chunk = [0; 16 << 10];
        match pipe.read(&mut chunk) {
            Ok(0) => self.close(sink),
            Ok(n) => {
                self.copy(&chunk[..n], complaints);
                self.pass(&chunk[..n], sink);
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => return false,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => self.close(sink),
        }
        true
    }

    /// Stops reading and passes on what is left of a line.
    pub fn close(&mut self, sink: &mut Sink) {
        self.pipe = None;
        self.open = false;
        self.pass(&[], sink);
    }

    fn copy(&mut self, bytes: &[u8], complaints: &mut Vec<String>) {
        let Some((file, path)) = &mut self.file else { return };
        if let Err(error) = file.write_all(bytes) {
            complaints.push(format!("'{}' cannot be written and ends here: {error}", path.display()));
            self.file = None;
        }
    }

    fn pass(&mut self, bytes: &[u8], sink: &mut Sink) {
        let time = if self.timestamps { crate::log::utc(SystemTime::now()) } else { String::new() };
        let (prefix, last_line, culprit) = (&self.prefix, &mut self.last_line, &mut self.culprit);
        let emit = |line: &[u8]| {
            sink.push(&[time.as_bytes(), prefix.as_bytes(), line]);
            if !line.trim_ascii().is_empty() {
                last_line.clear();
                last_line.extend_from_slice(&line[..line.len().min(LAST_LINE_BYTES_MAX)]);
                *culprit = std::str::from_utf8(line).ok().and_then(named_culprit).or(*culprit);
            }
        };
        if self.open {
            self.splitter.feed(bytes, emit);
        } else {
            self.splitter.finish(emit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(chunks: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut splitter = Splitter::default();
        let mut lines = Vec::new();
        for chunk in chunks {
            splitter.feed(chunk, |line| lines.push(line.to_vec()));
        }
        splitter.finish(|line| lines.push(line.to_vec()));
        lines
    }

    #[test]
    fn lines_are_the_same_however_the_bytes_are_cut() {
        let text = b"one\n\ntwo\r\nbar 1\rbar 2\r\xff\x00end";
        let expected: Vec<Vec<u8>> =
            [&b"one\n"[..], b"\n", b"two\r\n", b"bar 1\r", b"bar 2\r", b"\xff\x00end\n"]
                .map(<[u8]>::to_vec)
                .into();
        for cut in 0..text.len() {
            assert_eq!(split(&[&text[..cut], &text[cut..]]), expected, "cut at {cut}");
        }
        let bytes: Vec<&[u8]> = text.chunks(1).collect();
        assert_eq!(split(&bytes), expected);
    }

    #[test]
    fn a_line_without_end_is_broken() {
        let lines = split(&[&vec![b'x'; LINE_BYTES_MAX * 2 + 5]]);
        let lengths: Vec<usize> = lines.iter().map(Vec::len).collect();
        assert_eq!(lengths, [LINE_BYTES_MAX + 1, LINE_BYTES_MAX + 1, 6]);
    }

    #[test]
    fn a_sink_without_reader_is_closed_and_takes_nothing() {
        // Not inherited by what other tests start meanwhile.
        let (reader, writer) = crate::launch::open_pipe().unwrap();
        let mut sink = Sink::new(writer);
        sink.push(&[&vec![b'x'; QUEUE_BYTES_MAX]]);
        assert!(sink.is_full());
        drop(reader);
        sink.write_some();
        assert!(sink.is_closed() && sink.is_empty());
        sink.push(&[b"more"]);
        assert!(sink.is_empty());
    }
}
