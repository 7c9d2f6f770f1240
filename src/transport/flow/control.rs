//! The control pipe of a link: what waits to be written, and the frame that is being read.
#![forbid(unsafe_code)]

use super::checksum;
use super::frame::{FrameKind, HEADER_BYTES, Header, PAD_BYTES};
use crate::error::Cause;
use crate::transport::{Events, LinkEvent, Pipe, Stream};
use std::io::IoSlice;

/// Frames that wait to be written to the control pipe, in order.
pub struct Outbox {
    bytes: Vec<u8>,
    head: usize,
    checked: bool,
}

impl Outbox {
    pub fn new(checked: bool) -> Outbox {
        Outbox { bytes: Vec::new(), head: 0, checked }
    }
    pub fn is_empty(&self) -> bool {
        self.head == self.bytes.len()
    }
    /// Forgets what waits: nobody is there to read it.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.head = 0;
    }
    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.head
    }
    /// Queues a frame without payload.
    pub fn notice(&mut self, kind: FrameKind, stream: Stream, ordinal: u64, total: u64) {
        let header = Header::notice(kind, stream, ordinal, total);
        self.bytes.extend_from_slice(&header.encode(self.checked));
    }
    /// Queues a message of the engine.
    pub fn message(&mut self, message: &[u8]) {
        let mut header = Header::notice(FrameKind::Control, Stream(0), 0, 0);
        header.len = message.len() as u32;
        header.payload_sum = if self.checked { checksum::of(message) } else { 0 };
        self.bytes.extend_from_slice(&header.encode(self.checked));
        self.bytes.extend_from_slice(message);
        self.bytes.resize(self.bytes.len() + header.padding(), 0);
    }
    /// Writes what fits; says whether anything did.
    pub fn write(&mut self, pipe: &mut dyn Pipe) -> Result<bool, Cause> {
        let mut moved = false;
        while !self.is_empty() {
            let n = pipe.write(&[IoSlice::new(&self.bytes[self.head..])])?;
            if n == 0 {
                break;
            }
            self.head += n;
            moved = true;
        }
        if self.is_empty() {
            self.bytes.clear();
            self.head = 0;
        } else if self.head > self.bytes.len() / 2 {
            self.bytes.drain(..self.head);
            self.head = 0;
        }
        Ok(moved)
    }
}

/// The control frame that is being read.
pub struct Inbox {
    header: [u8; HEADER_BYTES],
    got: usize,
    /// The message of the engine that is being read, with its padding.
    message: Vec<u8>,
    /// Its header.
    begun: Option<Header>,
    checked: bool,
}

impl Inbox {
    pub fn new(checked: bool) -> Inbox {
        Inbox { header: [0; HEADER_BYTES], got: 0, message: Vec::new(), begun: None, checked }
    }

    /// Reads the next frame as far as it has arrived. A message of the engine goes to `events`; any other
    /// frame is returned. The flag says whether anything moved.
    pub fn read(
        &mut self,
        pipe: &mut dyn Pipe,
        events: &mut Events,
    ) -> Result<(bool, Option<Header>), Cause> {
        if let Some(header) = self.begun {
            return Ok((self.read_message(&header, pipe, events)?, None));
        }
        let n = pipe.read(&mut self.header[self.got..])?;
        self.got += n;
        if self.got < HEADER_BYTES {
            return Ok((n > 0, None));
        }
        self.got = 0;
        let header = Header::decode(&self.header, false, self.checked)?;
        if header.kind != FrameKind::Control {
            return Ok((true, Some(header)));
        }
        self.begun = Some(header);
        self.read_message(&header, pipe, events)?;
        Ok((true, None))
    }

    fn read_message(
        &mut self,
        header: &Header,
        pipe: &mut dyn Pipe,
        events: &mut Events,
    ) -> Result<bool, Cause> {
        let len = header.len as usize;
        let padded = len.next_multiple_of(PAD_BYTES);
        let mut moved = false;
        while self.message.len() < padded {
            let shown = pipe.peek()?;
            let n = shown.len().min(padded - self.message.len());
            if n == 0 {
                return Ok(moved);
            }
            // Grows with what has arrived, not with what the header promised.
            self.message.extend_from_slice(&shown[..n]);
            pipe.consume(n);
            moved = true;
        }
        if self.checked {
            header.check_payload(checksum::of(&self.message[..len]))?;
        }
        let start = events.control.len();
        events.control.extend_from_slice(&self.message[..len]);
        events.list.push(LinkEvent::Control(start..start + len));
        self.message.clear();
        self.begun = None;
        Ok(true)
    }
}
