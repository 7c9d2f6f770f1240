//! The face of MPI as a pipe.
#![forbid(unsafe_code)]

use super::port::{Port, Route};
use super::slot::Slot;
use super::world::World;
use super::{CONTROL_SLOT_BYTES, CONTROL_SLOTS, LANE_SLOT_BYTES, LANE_SLOTS};
use crate::error::Cause;
use crate::transport::Pipe;
use crate::transport::shm::hands_back;
use crate::transport::wake::Waker;
use crate::types::{Epoch, Rank};
use rustix::net::RecvFlags;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Looks at an empty pipe between two looks at the connection beside it, which costs a system call.
const LOOKS_PER_CHECK: u32 = 512;
/// Naps of the owner between two looks at the connection.
const NAPS_PER_CHECK: u32 = 8;
/// How long what a peer sent before its end may take after the end is known.
const LAST_MESSAGES: Duration = Duration::from_millis(50);
/// Tags of one epoch: two pipes, each with its messages and the word about them.
const TAGS_PER_EPOCH: i32 = 4;

/// Where the pipes of a link lead.
#[derive(Clone, Debug)]
pub struct Address {
    /// The peer, as MPI counts.
    pub peer: Rank,
    /// The first of four tags for what is sent, and for what is received.
    pub tags: (i32, i32),
}

impl Address {
    /// A rank, in an epoch: what is left over of an earlier one meets nobody.
    #[must_use]
    pub fn of(world: &World, peer: Rank, epoch: Epoch) -> Address {
        let epochs = (world.tag_max / TAGS_PER_EPOCH).max(1) as u32;
        let tag = (epoch.0 % epochs) as i32 * TAGS_PER_EPOCH;
        Address { peer, tags: (tag, tag) }
    }
}

/// The control pipe and the lane of a link. `watch` is a connection to the peer that carries nothing and whose end
/// says that the peer is gone; `waker` ends this process's sleep.
pub fn link(
    world: &'static World,
    address: &Address,
    watch: Option<OwnedFd>,
    waker: Option<Waker>,
) -> Result<(MpiPipe, MpiPipe), Cause> {
    let watch = watch.map(Arc::new);
    let peer = i32::try_from(address.peer.0).map_err(|_| Cause::System("no such rank of MPI".into()))?;
    let (sends, receives) = address.tags;
    let make = |shift: i32, messages, is_control: bool| {
        let route = Route { peer, sends: sends + shift, receives: receives + shift };
        let port = Port::new(world, route, messages, !is_control);
        MpiPipe::open(world, port, watch.clone(), is_control, waker.clone())
    };
    let control = make(0, (CONTROL_SLOTS, CONTROL_SLOT_BYTES), true)?;
    let lane = make(2, (LANE_SLOTS, LANE_SLOT_BYTES), false)?;
    Ok((control, lane))
}

/// A pipe of messages of MPI.
pub struct MpiPipe {
    world: &'static World,
    port: Arc<Mutex<Port>>,
    /// A slot that is being written, and how far.
    filling: Option<(Slot, usize)>,
    /// A slot that is being read: its length, and what was consumed of it.
    showing: Option<(Slot, usize, usize)>,
    watch: Option<Arc<OwnedFd>>,
    /// Whether this of the link's pipes shows the connection to its owner.
    shows_watch: bool,
    waker: Option<Waker>,
    /// Whether the processor is one on which handing lines back pays.
    hands_back: bool,
    looks: u32,
    gone_since: Option<Instant>,
    /// Slots were handed over or given back since the last flush.
    news: bool,
}

impl MpiPipe {
    fn open(
        world: &'static World,
        port: Port,
        watch: Option<Arc<OwnedFd>>,
        shows_watch: bool,
        waker: Option<Waker>,
    ) -> Result<MpiPipe, Cause> {
        let port = Arc::new(Mutex::new(port));
        world.adopt(&port)?;
        Ok(MpiPipe {
            world,
            port,
            filling: None,
            showing: None,
            watch,
            shows_watch,
            waker,
            hands_back: hands_back(),
            looks: 0,
            gone_since: None,
            news: false,
        })
    }

    fn port(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls MPI, where this thread may; else the thread that may does so soon.
    fn pump(&self, act: fn(&mut Port) -> bool) {
        if self.world.is_pinned() {
            return;
        }
        let _turn = self.world.turn();
        act(&mut self.port());
    }

    /// Hands a slot over.
    fn send(&mut self, slot: Slot, n: usize) {
        self.port().push(slot, n);
        self.news = true;
        self.pump(Port::pump_sends);
    }

    /// A slot to write to, if one is free.
    fn fill(&mut self) -> Option<Slot> {
        let free = self.port().take_free();
        if free.is_some() {
            return free;
        }
        self.pump(Port::pump_sends);
        self.port().take_free()
    }

    /// Makes sure that a slot is shown, if one has arrived.
    fn show(&mut self) -> Result<(), Cause> {
        if self.showing.is_some() {
            return Ok(());
        }
        let mut next = self.port().take_arrived();
        if next.is_none() {
            self.pump(Port::pump_due);
            next = self.port().take_arrived();
        }
        match next {
            Some((slot, n)) => {
                self.showing = Some((slot, n, 0));
                self.gone_since = None;
                Ok(())
            }
            None => self.check_end(),
        }
    }

    /// Nothing has arrived: perhaps nothing will.
    fn check_end(&mut self) -> Result<(), Cause> {
        {
            let port = self.port();
            if let Some(cause) = port.failure() {
                return Err(cause.clone());
            }
            if port.is_ended() {
                return Err(Cause::Exited);
            }
        }
        self.looks += 1;
        if self.looks < LOOKS_PER_CHECK && self.gone_since.is_none() {
            return Ok(());
        }
        self.looks = 0;
        if !self.peer_is_gone()? {
            return Ok(());
        }
        let since = *self.gone_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= LAST_MESSAGES { Err(Cause::Exited) } else { Ok(()) }
    }

    /// Whether the peer has exited, as its kernel tells.
    fn peer_is_gone(&self) -> Result<bool, Cause> {
        let Some(watch) = &self.watch else { return Ok(false) };
        let mut byte = [0u8; 1];
        match rustix::net::recv(watch, &mut byte, RecvFlags::DONTWAIT | RecvFlags::PEEK) {
            Ok((0, _)) => Ok(true),
            Ok(_) => Err(Cause::Misbehaved("bytes on the connection beside MPI".to_owned())),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(false),
            Err(rustix::io::Errno::CONNRESET | rustix::io::Errno::PIPE) => Ok(true),
            Err(e) => Err(Cause::Unreachable(format!("the connection beside MPI broke: {e}"))),
        }
    }
}

impl Pipe for MpiPipe {
    fn write(&mut self, parts: &[IoSlice<'_>]) -> Result<usize, Cause> {
        let mut done = 0;
        for part in parts {
            let mut rest: &[u8] = part;
            while !rest.is_empty() {
                let (mut slot, at) = match self.filling.take() {
                    Some(filling) => filling,
                    None => match self.fill() {
                        Some(slot) => (slot, 0),
                        // A failure is told to the reader, after what the peer said before it.
                        None => return Ok(done),
                    },
                };
                let bytes = slot.bytes_mut();
                let n = rest.len().min(bytes.len() - at);
                bytes[at..at + n].copy_from_slice(&rest[..n]);
                let full = at + n == bytes.len();
                rest = &rest[n..];
                done += n;
                if full {
                    self.send(slot, at + n);
                } else {
                    self.filling = Some((slot, at + n));
                }
            }
        }
        Ok(done)
    }

    fn peek(&mut self) -> Result<&[u8], Cause> {
        self.show()?;
        Ok(self.showing.as_ref().map_or(&[], |(slot, n, at)| &slot.bytes()[*at..*n]))
    }

    fn consume(&mut self, n: usize) {
        let Some((mut slot, len, at)) = self.showing.take() else {
            assert_eq!(n, 0, "only bytes that have been shown are consumed");
            return;
        };
        assert!(n <= len - at, "only bytes that have been shown are consumed");
        if self.hands_back && self.port().reads_window() {
            hand_back(&mut slot.bytes_mut()[at..at + n]);
        }
        if at + n < len {
            self.showing = Some((slot, len, at + n));
        } else {
            let tell = self.port().give_back(slot);
            self.news = true;
            if tell {
                self.pump(Port::pump_receives);
            }
        }
    }

    fn read(&mut self, dst: &mut [u8]) -> Result<usize, Cause> {
        let mut done = 0;
        while done < dst.len() {
            let n = match self.peek() {
                // What has been moved is told first; the error comes again.
                Err(_) if done > 0 => break,
                shown => {
                    let shown = shown?;
                    let n = shown.len().min(dst.len() - done);
                    dst[done..done + n].copy_from_slice(&shown[..n]);
                    n
                }
            };
            if n == 0 {
                break;
            }
            self.consume(n);
            done += n;
        }
        Ok(done)
    }

    fn flush(&mut self) -> Result<(), Cause> {
        if let Some((slot, n)) = self.filling.take() {
            self.send(slot, n);
        }
        if std::mem::take(&mut self.news) && self.world.is_pinned() {
            self.world.look();
        }
        Ok(())
    }

    fn arm(&mut self, blocked: bool) -> Result<bool, Cause> {
        self.pump(Port::pump);
        self.world.tend();
        let ended = self.gone_since.is_some();
        let mut port = self.port();
        let there = port.has_arrived() || port.is_ended() || port.failure().is_some() || ended;
        let ready = there || (blocked && port.has_free());
        if !ready && self.world.is_pinned() {
            port.sleeper = self.waker.clone();
        }
        Ok(ready)
    }

    fn disarm(&mut self) {
        // The connection may be what ended the nap.
        self.looks = self.looks.saturating_add(LOOKS_PER_CHECK / NAPS_PER_CHECK);
    }

    fn descriptor(&self) -> Option<RawFd> {
        self.watch.as_ref().filter(|_| self.shows_watch).map(|watch| watch.as_raw_fd())
    }

    fn descriptor_tells_room(&self) -> bool {
        false
    }

    fn is_polled(&self) -> bool {
        true
    }

    fn is_settled(&self) -> bool {
        self.pump(Port::pump_sends);
        self.filling.is_none() && self.port().is_settled()
    }

    fn kind(&self) -> &'static str {
        "mpi"
    }
}

/// Makes lines that were only read this core's own, so that the peer overwrites them faster: see the rings of shared
/// memory.
fn hand_back(read: &mut [u8]) {
    for line in read.chunks_mut(64) {
        // Or the store would be left out.
        line[0] = std::hint::black_box(0);
    }
}

impl Drop for MpiPipe {
    fn drop(&mut self) {
        let clean = self.gone_since.is_none() && self.port().failure().is_none();
        self.world.release(&self.port, clean);
    }
}
