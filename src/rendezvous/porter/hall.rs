//! The porter's thread: doors, connections in every stage of becoming a link, and timers.
#![forbid(unsafe_code)]

use super::dial::{Aim, Dial, Target, connects, targets};
use super::{Choice, NOBODY, PorterOptions, share};
use crate::error::Cause;
use crate::limits::{HANDSHAKE_MS, UNAUTHENTICATED_MAX};
use crate::rendezvous::channel::{Channel, Stream};
use crate::rendezvous::client::Joined;
use crate::rendezvous::proof::{Accept, Handshake, Hello, ProofError, Purpose};
use crate::rendezvous::reactor::Reactor;
use crate::rendezvous::server::GREETING_MS;
use crate::transport::board::BoardMemory;
use crate::transport::shm;
use crate::transport::wake::Waker;
use crate::transport::{FabricEvent, Pipe};
use crate::types::Rank;
use crossbeam::channel::{Receiver, Sender};
use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

mod flood;
mod knocks;
mod outgoing;
mod stages;

/// How long one TCP address may take to accept a connection before the next is tried.
const CONNECT_MS: u64 = 1500;
/// How long a link may take in all, from the request, when no door takes the connection.
const LINK_MS: u64 = 10_000;
/// Between two rounds over a peer's addresses.
const RETRY_MS: u64 = 100;
/// A peer that is on its way from one epoch to the next is tried again after this time.
const LAG_MS: u64 = 5;
/// A door that could not be opened for want of descriptors is left alone this long.
const RELIEF_MS: u64 = 100;

const BELL: u64 = 0;
const UNIX_DOOR: u64 = 1;
const TCP_DOORS: u64 = 2;
const FIRST_CONNECTION: u64 = 1 << 16;

/// What a connection is known by.
type Number = u64;

/// The thread's ends of its queues.
pub struct Ends {
    pub requests: Receiver<Rank>,
    pub events: Sender<FabricEvent>,
    pub stopped: Receiver<()>,
    pub bell: Waker,
    pub waker: Waker,
    /// To whom this rank has gone to regroup.
    pub follows: Arc<AtomicU32>,
    /// This rank's board, for peers on this host.
    pub board: Option<OwnedFd>,
}

pub struct Hall {
    joined: Joined,
    options: PorterOptions,
    ends: Ends,
    reactor: Reactor,
    /// The doors are left alone until then.
    relief: Option<Instant>,
    refusals: flood::Refusals,
    connections: HashMap<Number, Connection>,
    next_number: Number,
    /// The number of the last attempt, over all peers.
    last_attempt: u64,
    /// Peers that are being reached.
    dials: HashMap<Rank, Dial>,
    /// Lanes that wait for their link, on the accepting side.
    assemblies: HashMap<Rank, Assembly>,
    /// Links that are up.
    up: HashSet<Rank>,
    /// Peers that the engine has asked for and not been told about.
    wanted: HashSet<Rank>,
    /// Peers whose links the engine was told will not be, without its asking.
    missed: HashSet<Rank>,
    warned_shm: bool,
}

/// What a link by shared memory is made of.
struct Parts {
    control: Box<dyn Pipe>,
    lane: Box<dyn Pipe>,
    /// The peer's, if it has one and it could be mapped.
    board: Option<Arc<BoardMemory>>,
}

struct Connection {
    channel: Channel,
    deadline: Instant,
    stage: Stage,
    watching_write: bool,
}

enum Stage {
    /// We connect: the proof is under way (or TCP still connects).
    Dialing { peer: Rank, purpose: Purpose, attempt: u64, handshake: Handshake },
    /// We connect: proven, and waiting for the other lanes.
    Waiting { peer: Rank, purpose: Purpose, attempt: u64 },
    /// We connect: the segment is offered.
    Offered { peer: Rank, attempt: u64, segment: Option<(OwnedFd, shm::Share)>, refused: bool },
    /// We knocked: proven, and the peer is about to connect.
    Knocked { peer: Rank, attempt: u64 },
    /// The peer has knocked, and hears here how it goes.
    Knocking { peer: Rank },
    /// Somebody has come in.
    Accepting(Handshake),
    /// It is proven and will offer a segment.
    Joining { peer: Rank },
    /// The segment is open; the last word is awaited.
    Joined { peer: Rank, parts: Option<Parts> },
    /// The control connection of a link by TCP; the last word is awaited.
    Control { peer: Rank, attempt: u64 },
}

/// The lanes of the newest attempt of a peer.
struct Assembly {
    attempt: u64,
    control: Number,
    lanes: Vec<Option<Channel>>,
}

/// What becomes of a connection after a step.
enum Step {
    /// It waits for more bytes.
    Stay,
    /// It goes; the words are for whoever wanted it.
    Close(String),
    /// It has become part of something else, or was in order to close.
    Gone,
}

impl Hall {
    pub fn new(joined: Joined, options: PorterOptions, ends: Ends) -> io::Result<Hall> {
        let reactor = Reactor::new()?;
        reactor.add(&ends.bell, BELL, false)?;
        let hall = Hall {
            joined,
            options,
            ends,
            reactor,
            relief: None,
            refusals: flood::Refusals::default(),
            connections: HashMap::new(),
            next_number: FIRST_CONNECTION,
            last_attempt: 0,
            dials: HashMap::new(),
            assemblies: HashMap::new(),
            up: HashSet::new(),
            wanted: HashSet::new(),
            missed: HashSet::new(),
            warned_shm: false,
        };
        hall.watch_doors(true)?;
        Ok(hall)
    }

    /// Runs until told to stop.
    pub fn run(&mut self) {
        let mut ready = Vec::new();
        loop {
            if let Err(e) = self.reactor.wait(self.next_deadline(), &mut ready) {
                (self.joined.warn)(&format!("links can no longer be made: epoll failed: {e}"));
                return;
            }
            for &number in &ready {
                match number {
                    BELL => {
                        self.ends.bell.clear();
                        if self.ends.stopped.try_recv().is_ok() {
                            return;
                        }
                        while let Ok(peer) = self.ends.requests.try_recv() {
                            self.request(peer);
                        }
                    }
                    door if door < FIRST_CONNECTION => self.accept(door),
                    number => self.advance(number),
                }
            }
            self.expire();
        }
    }

    fn watch_doors(&self, on: bool) -> io::Result<()> {
        for (i, door) in self.joined.doors.tcp.iter().enumerate() {
            match on {
                true => self.reactor.add(door, TCP_DOORS + i as u64, false)?,
                false => self.reactor.remove(door)?,
            }
        }
        match (&self.joined.doors.unix, on) {
            (Some(door), true) => self.reactor.add(door, UNIX_DOOR, false),
            (Some(door), false) => self.reactor.remove(door),
            (None, _) => Ok(()),
        }
    }

    fn accept(&mut self, door: u64) {
        // A bounded number at a time, so that a flood at the door does not hold up the links under way.
        for _ in 0..UNAUTHENTICATED_MAX {
            let accepted = match door {
                UNIX_DOOR => {
                    self.joined.doors.unix.as_ref().expect("watched").accept().map(|(s, _)| Stream::Unix(s))
                }
                door => {
                    self.joined.doors.tcp[(door - TCP_DOORS) as usize].accept().map(|(s, _)| Stream::Tcp(s))
                }
            };
            match accepted {
                Ok(stream) => self.admit(stream),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e)
                    if matches!(
                        e.raw_os_error(),
                        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS)
                    ) =>
                {
                    (self.joined.warn)(&format!(
                        "connections cannot be accepted: {e}; raise the limit (ulimit -n)"
                    ));
                    self.rest(Duration::from_millis(RELIEF_MS));
                    return;
                }
                // The connection was gone before it was accepted.
                Err(_) => {}
            }
        }
    }

    /// Leaves the doors alone for a while.
    fn rest(&mut self, time: Duration) {
        if self.relief.is_none() && self.watch_doors(false).is_ok() {
            self.relief = Some(Instant::now() + time);
        }
    }

    fn admit(&mut self, stream: Stream) {
        let proving = self.connections.values().filter(|c| matches!(c.stage, Stage::Accepting(_))).count();
        if proving >= UNAUTHENTICATED_MAX && !self.make_room() {
            return;
        }
        let serves: fn(Purpose) -> bool = match (&stream, self.options.choice) {
            (Stream::Unix(_), Choice::Tcp | Choice::Mpi) => {
                |p| matches!(p, Purpose::Knock | Purpose::Regroup)
            }
            (Stream::Unix(_), _) => |p| matches!(p, Purpose::Knock | Purpose::Regroup | Purpose::Shm),
            (Stream::Tcp(_), Choice::Shm) => |p| matches!(p, Purpose::Knock | Purpose::Regroup),
            (Stream::Tcp(_), _) => |p| !matches!(p, Purpose::Register | Purpose::Shm),
        };
        let size = self.joined.table.cards.len() as u32;
        let accept = Accept { me: self.joined.rank, size, epoch: Some(self.joined.table.epoch), serves };
        let handshake = Handshake::acceptor(&self.joined.secret, accept);
        let Ok(channel) = Channel::new(stream) else { return };
        if let Some(number) = self.enter(channel, Stage::Accepting(handshake), HANDSHAKE_MS, false) {
            self.advance(number);
        }
    }

    /// Closes the oldest connection that has not even greeted, if it had the time to.
    fn make_room(&mut self) -> bool {
        let grace = Instant::now() + Duration::from_millis(HANDSHAKE_MS.saturating_sub(GREETING_MS));
        let silent =
            |c: &Connection| matches!(&c.stage, Stage::Accepting(h) if !h.greeted()) && c.deadline <= grace;
        let oldest = self.connections.iter().filter(|(_, c)| silent(c)).map(|(number, _)| *number).min();
        oldest.map(|number| self.connections.remove(&number)).is_some()
    }

    fn enter(&mut self, channel: Channel, stage: Stage, within_ms: u64, write: bool) -> Option<Number> {
        let number = self.next_number;
        self.next_number += 1;
        self.reactor.add(&channel, number, write).ok()?;
        let deadline = Instant::now() + Duration::from_millis(within_ms);
        self.connections.insert(number, Connection { channel, deadline, stage, watching_write: write });
        Some(number)
    }

    /// Takes a connection out of the reactor and of the porter's hands.
    fn leave(&mut self, number: Number) -> Option<Channel> {
        let connection = self.connections.remove(&number)?;
        // Its descriptor lives on, so that closing would not end the watch.
        let _ = self.reactor.remove(&connection.channel);
        Some(connection.channel)
    }

    fn advance(&mut self, number: Number) {
        match self.step(number) {
            Step::Stay => {
                let Some(connection) = self.connections.get_mut(&number) else { return };
                let wants = connection.channel.wants_write();
                if wants != connection.watching_write
                    && self.reactor.change(&connection.channel, number, wants).is_ok()
                {
                    connection.watching_write = wants;
                }
            }
            Step::Close(why) => {
                // It was closed, which somebody who is stopped does not do.
                self.heard(number, None);
                self.drop_connection(number, &why, false);
            }
            Step::Gone => drop(self.leave(number)),
        }
    }

    /// Closes a connection that failed, and goes on with whatever it was needed for.
    fn drop_connection(&mut self, number: Number, why: &str, refused: bool) {
        let Some(connection) = self.connections.remove(&number) else { return };
        // A descriptor of the same socket may live on in a pipe.
        let _ = self.reactor.remove(&connection.channel);
        match connection.stage {
            Stage::Dialing { peer, attempt, .. }
            | Stage::Waiting { peer, attempt, .. }
            | Stage::Knocked { peer, attempt }
            | Stage::Offered { peer, attempt, .. } => {
                drop(connection.channel);
                self.attempt_failed(peer, attempt, why, refused);
            }
            Stage::Control { peer, .. }
                if self.assemblies.get(&peer).is_some_and(|a| a.control == number) =>
            {
                self.assemblies.remove(&peer);
            }
            Stage::Accepting(_) if self.refusals.note(Instant::now()) => self.rest(flood::REST),
            _ => {}
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let connections = self.connections.values().map(|c| c.deadline);
        connections.chain(self.dials.values().map(Dial::deadline)).chain(self.relief).min()
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let late: Vec<Number> =
            self.connections.iter().filter(|(_, c)| c.deadline <= now).map(|(number, _)| *number).collect();
        for number in late {
            match self.connections.get(&number).map(|connection| &connection.stage) {
                Some(Stage::Knocking { .. }) => self.still_trying(number),
                _ => self.drop_connection(
                    number,
                    "no answer came in time (stopped, overrun or cut off)",
                    false,
                ),
            }
        }
        for peer in self.dials.keys().copied().collect::<Vec<Rank>>() {
            let Some(dial) = self.dials.get(&peer) else { continue };
            if dial.answer_by.is_some_and(|by| by <= now) {
                self.fail(peer, Cause::Silent { for_ms: self.options.silence_ms });
            } else if dial.limit <= now {
                let last = dial.last.clone();
                self.fail(peer, Cause::Unreachable(last));
            }
        }
        let retries: Vec<Rank> = self
            .dials
            .iter()
            .filter(|(_, d)| d.retry.is_some_and(|retry| retry <= now))
            .map(|(peer, _)| *peer)
            .collect();
        for peer in retries {
            self.try_target(peer);
        }
        if self.relief.is_some_and(|relief| relief <= now) && self.watch_doors(true).is_ok() {
            self.relief = None;
        }
    }

    /// There will be no link, which is the peer's fault.
    fn fail(&mut self, peer: Rank, cause: Cause) {
        self.fail_for(peer, peer, cause);
    }

    /// Tells the engine and the peer, if it has knocked, that there will be no link. If only the peer had asked,
    /// its call fails all the same, and with it the epoch; so the engine is told then, too, but once.
    fn fail_for(&mut self, peer: Rank, culprit: Rank, cause: Cause) {
        self.dials.remove(&peer);
        self.close_attempts(peer);
        self.answer_knocks(peer, culprit, &cause);
        if self.wanted.remove(&peer) || self.missed.insert(peer) {
            self.tell(FabricEvent::Failed { peer, culprit, cause });
        }
    }

    /// Closes the connections that this side had opened to a peer.
    fn close_attempts(&mut self, peer: Rank) {
        let reactor = &self.reactor;
        self.connections.retain(|_, connection| {
            let ours = match &connection.stage {
                Stage::Dialing { peer: p, .. }
                | Stage::Waiting { peer: p, .. }
                | Stage::Knocked { peer: p, .. }
                | Stage::Offered { peer: p, .. } => *p == peer,
                _ => false,
            };
            if ours {
                let _ = reactor.remove(&connection.channel);
            }
            !ours
        });
    }

    fn silence(&self) -> Duration {
        Duration::from_millis(self.options.silence_ms)
    }

    fn tell(&mut self, event: FabricEvent) {
        // The queue holds two events for each peer, more than there can be. When the engine has gone, the
        // event (and with it the link) is dropped.
        let _ = self.ends.events.try_send(event);
        self.ends.waker.wake();
    }
}
