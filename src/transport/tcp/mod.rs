//! Stream sockets as pipes: TCP between hosts, encrypted or not, and unix sockets where they stand in for it.
#![forbid(unsafe_code)]

mod options;
#[cfg(test)]
mod tests;

pub use options::TcpOptions;

use crate::error::Cause;
use crate::transport::Pipe;
use crate::transport::tls::Tls;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags};
use std::io::{self, IoSlice, IoSliceMut};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// What is read ahead of a reduction, so that it reads from the cache. Allocated when first needed.
const STAGING_BYTES: usize = 256 << 10;
/// What is read ahead to find out what comes: several small frames, or a header and little of its payload, for the
/// rest then goes to its destination without a copy in between.
const AHEAD_BYTES: usize = 8 << 10;
/// From here on a read goes straight to its destination.
const DIRECT_BYTES: usize = 16 << 10;
/// As long as this many bytes are staged, nothing more is asked of the kernel: any caller can go on with them.
const ENOUGH_BYTES: usize = 64;
/// Slices that Linux takes at once are 1024; frames have fewer.
const SLICES_MAX: usize = 1024;

/// A pipe over a stream socket.
pub struct TcpPipe {
    socket: OwnedFd,
    /// What the bytes are encrypted by, if they are.
    tls: Option<Box<Tls>>,
    staging: Vec<u8>,
    /// The staged bytes that have not been consumed.
    start: usize,
    end: usize,
    /// Bytes consumed since the beginning: staged bytes keep their alignment relative to the stream.
    position: u64,
    /// The last read took all that had arrived: the next look at the socket is not worth a system call.
    dry: bool,
    /// Bytes were staged that nobody has seen yet.
    unseen: bool,
    /// Why the stream has ended; told when the staged bytes are used up.
    failed: Option<Cause>,
    kind: &'static str,
}

impl TcpPipe {
    /// A pipe over a connected TCP socket.
    pub fn new(stream: TcpStream, options: &TcpOptions) -> Result<TcpPipe, Cause> {
        options.apply(&stream)?;
        TcpPipe::over(stream.into(), None, "tcp")
    }

    /// A pipe over a connected TCP socket whose peer has proven itself to this session.
    pub fn encrypted(stream: TcpStream, tls: Box<Tls>, options: &TcpOptions) -> Result<TcpPipe, Cause> {
        options.apply(&stream)?;
        TcpPipe::over(stream.into(), Some(tls), "tls")
    }

    /// A pipe over any connected stream socket, as it is (a unix socket, say).
    pub fn from_socket(socket: OwnedFd) -> Result<TcpPipe, Cause> {
        TcpPipe::over(socket, None, "unix")
    }

    fn over(socket: OwnedFd, tls: Option<Box<Tls>>, kind: &'static str) -> Result<TcpPipe, Cause> {
        rustix::io::ioctl_fionbio(&socket, true)
            .map_err(|e| Cause::System(format!("making a socket nonblocking: {e}")))?;
        Ok(TcpPipe {
            socket,
            tls,
            staging: Vec::new(),
            start: 0,
            end: 0,
            position: 0,
            dry: false,
            unseen: false,
            failed: None,
            kind,
        })
    }

    /// Reads what has arrived, at most so much as fits into both parts; 0 when there is nothing.
    fn recv(&mut self, dst: &mut [u8], staging: std::ops::Range<usize>) -> Result<usize, Cause> {
        // Whoever reads goes on until there is nothing, so half of all reads would find nothing.
        if std::mem::take(&mut self.dry) {
            return Ok(0);
        }
        let room = dst.len() + staging.len();
        if let Some(tls) = &mut self.tls {
            let n = decrypt_both(tls, &self.socket, dst, &mut self.staging[staging])?;
            self.dry = n < room;
            return Ok(n);
        }
        let mut parts = [IoSliceMut::new(dst), IoSliceMut::new(&mut self.staging[staging])];
        let mut no_control = RecvAncillaryBuffer::default();
        loop {
            let read = rustix::net::recvmsg(&self.socket, &mut parts, &mut no_control, RecvFlags::DONTWAIT);
            return match read.map(|message| message.bytes) {
                Ok(0) => Err(Cause::Exited),
                Ok(n) => {
                    self.dry = n < room;
                    Ok(n)
                }
                Err(Errno::AGAIN) => Ok(0),
                Err(Errno::INTR) => continue,
                Err(error) => Err(cause_of(error)),
            };
        }
    }

    /// Makes room behind the staged bytes, of which there are few.
    fn make_room(&mut self, position: u64) {
        if self.staging.is_empty() {
            self.staging = vec![0; STAGING_BYTES];
        }
        let left = self.end - self.start;
        assert!(left < ENOUGH_BYTES, "reading ahead happens when little is left");
        // To the front, at the same place within a cache line as in the stream: elements stay aligned.
        let start = (position % ENOUGH_BYTES as u64) as usize;
        self.staging.copy_within(self.start..self.end, start);
        (self.start, self.end) = (start, start + left);
    }

    /// Reads ahead, at most `limit` bytes. Bytes that are staged already are kept.
    fn stage(&mut self, limit: usize) -> Result<(), Cause> {
        self.make_room(self.position);
        let room = self.end..STAGING_BYTES.min(self.end + limit);
        let n = self.recv(&mut [], room)?;
        self.end += n;
        self.unseen |= n > 0;
        Ok(())
    }

    /// Staged bytes are shown before the error that ends the stream.
    fn staged(&mut self, limit: usize) -> Result<usize, Cause> {
        if self.end - self.start < ENOUGH_BYTES
            && self.failed.is_none()
            && let Err(cause) = self.stage(limit)
        {
            self.failed = Some(cause);
        }
        match &self.failed {
            Some(cause) if self.start == self.end => Err(cause.clone()),
            _ => Ok(self.end - self.start),
        }
    }

    /// Reads to `dst`, and what comes behind it to the staging space: the next header costs no call of its own.
    fn read_straight(&mut self, dst: &mut [u8]) -> Result<usize, Cause> {
        let behind = self.position + dst.len() as u64;
        self.make_room(behind);
        let ahead = self.end..self.end + AHEAD_BYTES;
        let n = self.recv(dst, ahead).inspect_err(|cause| self.failed = Some(cause.clone()))?;
        let read = n.min(dst.len());
        self.position += read as u64;
        self.end += n - read;
        self.unseen |= n > read;
        Ok(read)
    }
}

/// Fills `dst`, and what is left over goes `behind` it. An error is told when there is nothing before it; it comes up
/// again with the next read.
fn decrypt_both(tls: &mut Tls, socket: &OwnedFd, dst: &mut [u8], behind: &mut [u8]) -> Result<usize, Cause> {
    let n = decrypt(tls, socket, dst)?;
    if n < dst.len() {
        return Ok(n);
    }
    match decrypt(tls, socket, behind) {
        Err(cause) if n == 0 => Err(cause),
        more => Ok(n + more.unwrap_or(0)),
    }
}

/// Fills `dst` as far as bytes have arrived. The end of the stream is told when there is nothing before it.
fn decrypt(tls: &mut Tls, socket: &OwnedFd, dst: &mut [u8]) -> Result<usize, Cause> {
    let mut n = 0;
    while n < dst.len() {
        match tls.read(socket, &mut dst[n..]) {
            Ok(0) if n == 0 => return Err(Cause::Exited),
            Ok(0) => break,
            Ok(more) => n += more,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(_) if n > 0 => break,
            Err(e) => return Err(cause_of_tls(&e)),
        }
    }
    Ok(n)
}

/// What became of a write. That the peer is gone the reading side tells, after what it said before has been heard.
fn unheard<T>(written: io::Result<T>, nothing: T) -> Result<T, Cause> {
    match written.map_err(|e| (Errno::from_io_error(&e), e)) {
        Ok(done) => Ok(done),
        Err((Some(Errno::AGAIN | Errno::NOBUFS | Errno::CONNRESET | Errno::PIPE), _)) => Ok(nothing),
        Err((_, error)) => Err(cause_of_tls(&error)),
    }
}

fn cause_of_tls(error: &io::Error) -> Cause {
    match Errno::from_io_error(error) {
        Some(error) => cause_of(error),
        // Not a bit has got through unseen.
        None => {
            Cause::Corrupted(format!("what came on its encrypted connection is not what was sent: {error}"))
        }
    }
}

/// What the end of a connection says about the peer.
fn cause_of(error: Errno) -> Cause {
    match error {
        Errno::CONNRESET | Errno::PIPE | Errno::CONNABORTED | Errno::NOTCONN => Cause::Exited,
        Errno::TIMEDOUT | Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::NETDOWN => {
            Cause::Unreachable(format!("the connection broke: {error}"))
        }
        error => Cause::System(format!("its connection: {error}")),
    }
}

impl Pipe for TcpPipe {
    fn write(&mut self, parts: &[IoSlice<'_>]) -> Result<usize, Cause> {
        let parts = &parts[..parts.len().min(SLICES_MAX)];
        if let Some(tls) = &mut self.tls {
            return unheard(tls.write(&self.socket, parts), 0);
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            let mut no_control = SendAncillaryBuffer::default();
            return match rustix::net::sendmsg(&self.socket, parts, &mut no_control, flags) {
                Ok(n) => Ok(n),
                Err(Errno::INTR) => continue,
                Err(error) => unheard(Err(error.into()), 0),
            };
        }
    }

    fn peek(&mut self) -> Result<&[u8], Cause> {
        self.staged(STAGING_BYTES)?;
        self.unseen = false;
        Ok(&self.staging[self.start..self.end])
    }

    fn consume(&mut self, n: usize) {
        assert!(n <= self.end - self.start, "only bytes that have been shown are consumed");
        self.start += n;
        self.position += n as u64;
    }

    fn read(&mut self, dst: &mut [u8]) -> Result<usize, Cause> {
        if self.start == self.end && self.failed.is_none() && dst.len() >= DIRECT_BYTES {
            return self.read_straight(dst);
        }
        if self.start == self.end {
            self.staged(AHEAD_BYTES)?;
        }
        self.unseen = false;
        let n = dst.len().min(self.end - self.start);
        dst[..n].copy_from_slice(&self.staging[self.start..self.start + n]);
        self.consume(n);
        Ok(n)
    }

    fn flush(&mut self) -> Result<(), Cause> {
        match &mut self.tls {
            Some(tls) => unheard(tls.flush(&self.socket), ()),
            None => Ok(()),
        }
    }

    fn arm(&mut self, _blocked: bool) -> Result<bool, Cause> {
        // What the kernel holds ends the sleep by itself; what is staged would not.
        let ahead = self.tls.as_ref().is_some_and(|tls| tls.is_ahead());
        Ok(self.unseen || ahead || self.failed.is_some())
    }

    fn disarm(&mut self) {}

    fn descriptor(&self) -> Option<RawFd> {
        Some(self.socket.as_raw_fd())
    }

    fn has_backlog(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.wants_write())
    }

    fn kind(&self) -> &'static str {
        self.kind
    }
}
