//! A nonblocking connection with what waits to be written and what has been read, encrypted where that is asked for, and
//! the handshake on it.
#![forbid(unsafe_code)]

use super::proof::{Handshake, ProofError};
use super::reactor::timespec;
use crate::transport::tls::{self, Tls};
use rustix::event::{PollFd, PollFlags, poll};
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// A stream of either family.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(TcpStream),
    /// A unix socket.
    Unix(UnixStream),
}

/// A connection, never blocking.
#[derive(Debug)]
pub struct Channel {
    stream: Stream,
    tls: Option<Box<Tls>>,
    /// Whether it is settled that the connection is encrypted or is not.
    begun: bool,
    output: Vec<u8>,
    sent: usize,
    input: Vec<u8>,
    got: usize,
    traffic: Traffic,
}

/// What has passed on a connection, in both directions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Traffic {
    /// Messages and parts of messages that were handed over or taken as a whole.
    pub parts: u64,
    /// Bytes.
    pub bytes: u64,
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Tcp(stream) => stream.as_fd(),
            Stream::Unix(stream) => stream.as_fd(),
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl From<Stream> for OwnedFd {
    fn from(stream: Stream) -> OwnedFd {
        match stream {
            Stream::Tcp(stream) => stream.into(),
            Stream::Unix(stream) => stream.into(),
        }
    }
}

impl Channel {
    /// Takes a stream over and makes it nonblocking.
    pub fn new(stream: Stream) -> io::Result<Channel> {
        // Within a host nobody listens who could not read the memory of the processes, too.
        let begun = match &stream {
            Stream::Tcp(stream) => {
                stream.set_nonblocking(true)?;
                stream.set_nodelay(true)?;
                false
            }
            Stream::Unix(stream) => {
                stream.set_nonblocking(true)?;
                true
            }
        };
        Ok(Channel {
            stream,
            tls: None,
            begun,
            output: Vec::new(),
            sent: 0,
            input: Vec::new(),
            got: 0,
            traffic: Traffic::default(),
        })
    }

    /// Gives the stream back, and what it is encrypted by. Nothing that was read is lost, because only what was wanted has
    /// been read, or lies in the session.
    #[must_use]
    pub fn into_parts(self) -> (Stream, Option<Box<Tls>>) {
        (self.stream, self.tls)
    }

    /// Queues bytes.
    pub fn queue(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
        self.count(bytes.len());
    }

    fn count(&mut self, bytes: usize) {
        if bytes > 0 {
            self.traffic.parts += 1;
            self.traffic.bytes += bytes as u64;
        }
    }

    /// What has passed so far.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// Whether bytes wait to be written.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        self.sent < self.output.len() || self.tls.as_ref().is_some_and(|tls| tls.wants_write())
    }

    /// Whether bytes have come that the stream does not show any more and nobody has taken.
    fn is_ahead(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.is_ahead())
    }

    /// Writes what fits.
    pub fn flush(&mut self) -> io::Result<()> {
        while self.sent < self.output.len() {
            let rest = &self.output[self.sent..];
            let result = match (&mut self.tls, &mut self.stream) {
                (Some(tls), stream) => match tls.write(stream, &[IoSlice::new(rest)]) {
                    Ok(0) => return Ok(()),
                    written => written,
                },
                (None, Stream::Tcp(stream)) => stream.write(rest),
                (None, Stream::Unix(stream)) => stream.write(rest),
            };
            match result {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.output.clear();
        self.sent = 0;
        self.tls.as_mut().map_or(Ok(()), |tls| tls.flush(&self.stream))
    }

    /// Reads up to `want` bytes and gives them when all are there. The end of the stream is `UnexpectedEof`.
    /// Memory grows with the bytes that have come, not with what a peer announced. Whoever waits for the stream to become
    /// readable must have been given `None` before: bytes that came encrypted together do not show in it any more.
    pub fn fill(&mut self, want: usize) -> io::Result<Option<&[u8]>> {
        const STEP: usize = 64 << 10;
        while self.got < want {
            let end = want.min(self.got + STEP);
            if self.input.len() < end {
                self.input.resize(end, 0);
            }
            let room = &mut self.input[self.got..end];
            let result = match (&mut self.tls, &mut self.stream) {
                (Some(tls), stream) => tls.read(stream, room),
                (None, Stream::Tcp(stream)) => stream.read(room),
                (None, Stream::Unix(stream)) => stream.read(room),
            };
            match result {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.got += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(Some(&self.input[..want]))
    }

    /// Forgets what [`Channel::fill`] gave.
    pub fn taken(&mut self) {
        self.count(self.got);
        self.got = 0;
        self.input.clear();
    }

    /// Goes on with the handshake; true when both sides are proven and nothing waits to be written.
    pub fn prove(&mut self, handshake: &mut Handshake) -> Result<bool, ProofError> {
        if !self.begun {
            self.begun = self.begin(handshake)?;
            if !self.begun {
                return Ok(false);
            }
        }
        loop {
            let output = handshake.take_output();
            self.queue(&output);
            self.flush().map_err(|e| self.proof_error(&e))?;
            let want = handshake.wants();
            if want == 0 {
                return Ok(handshake.proven().is_some() && !self.wants_write());
            }
            match self.fill(want) {
                Ok(None) => return Ok(false),
                Ok(Some(bytes)) => {
                    let result = handshake.feed(bytes);
                    self.taken();
                    if result.is_err() {
                        let hello = handshake.take_output();
                        self.queue(&hello);
                        // The other side may be gone already; ours is the error that counts.
                        let _ = self.flush();
                    }
                    result?;
                }
                Err(e) => return Err(self.proof_error(&e)),
            }
        }
    }

    /// Settles whether the connection is encrypted; false when too little has come to tell.
    fn begin(&mut self, handshake: &mut Handshake) -> Result<bool, ProofError> {
        let secret = handshake.secret();
        let encrypts = secret.encrypts();
        let made = if handshake.is_connector() {
            encrypts.then(|| Tls::connector(secret.tls_key()))
        } else {
            match self.peek() {
                Ok(None) => return Ok(false),
                // Where encryption is not asked for, nobody can make this side work for it.
                Ok(Some(tls::FIRST_BYTE)) if encrypts => Some(Tls::acceptor(secret.tls_key())),
                Ok(Some(_)) => {
                    if encrypts {
                        handshake.refuse_clear();
                    }
                    None
                }
                Err(_) => return Err(ProofError::Closed),
            }
        };
        self.tls = made.transpose().map_err(|_| ProofError::NotCarole)?.map(Box::new);
        Ok(true)
    }

    /// What an error of the stream says about the peer, which has not proven itself yet.
    fn proof_error(&self, error: &io::Error) -> ProofError {
        match error.kind() {
            io::ErrorKind::InvalidData if tls::is_other_key(error) => ProofError::OtherJob,
            io::ErrorKind::InvalidData => ProofError::NotCarole,
            _ if self.tls.as_ref().is_some_and(|tls| !tls.is_proven()) => ProofError::ClosedAtTls,
            _ => ProofError::Closed,
        }
    }

    /// The next byte of the stream, which stays there; the end of the stream is `UnexpectedEof`.
    fn peek(&self) -> io::Result<Option<u8>> {
        let mut byte = [0u8; 1];
        let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
        match rustix::net::recv(self, &mut byte, flags) {
            Ok((_, 0)) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => Ok(Some(byte[0])),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Waits until the stream is readable (or writable, if something waits) or the deadline has come; false
    /// when it has.
    pub fn wait(&self, deadline: Instant) -> io::Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        if self.is_ahead() {
            return Ok(true);
        }
        if left.is_zero() {
            return Ok(false);
        }
        let flags = if self.wants_write() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        match poll(&mut [PollFd::new(self, flags)], Some(&timespec(left))) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(true),
            Err(e) => Err(e.into()),
        }
    }

    /// Whether the other side has closed. Looks without taking.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.peek().is_err()
    }
}
