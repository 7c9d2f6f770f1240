//! The service's thread: doors, connections, and the rounds behind them.
#![forbid(unsafe_code)]

use super::assembly::Worker;
use super::book::Book;
use super::rounds::{Number, Verdict};
use super::{Arrivals, Door, Litter, ServerOptions};
use crate::limits::{HANDSHAKE_MS, SHUTDOWN_MS, UNAUTHENTICATED_MAX};
use crate::rendezvous::card::{Answer, LENGTH_BYTES, News, REGISTRATION_BYTES_MAX, Registration, frame};
use crate::rendezvous::channel::{Channel, Stream};
use crate::rendezvous::past::Past;
use crate::rendezvous::proof::{Accept, Handshake, Purpose, SERVICE};
use crate::rendezvous::reactor::Reactor;
use crate::transport::wake::Waker;
use crate::types::{Epoch, Rank};
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::time::{Duration, Instant};

/// The number of the stop signal in the reactor; doors follow, then connections.
const STOP: u64 = 0;
/// That of the bell: words of the launcher, or something was found out.
const BELL: u64 = (1 << 16) - 1;
const FIRST_CONNECTION: u64 = 1 << 16;
/// A door that could not be opened for want of descriptors is left alone this long.
const RELIEF_MS: u64 = 100;

pub struct Service {
    options: ServerOptions,
    reactor: Reactor,
    stop: Waker,
    bell: Waker,
    doors: Vec<Door>,
    /// Doors are not watched until then.
    relief: Option<Instant>,
    connections: HashMap<Number, Connection>,
    /// Connections that have a deadline: not proven, not registered, or being closed.
    timed: BTreeSet<Number>,
    next_number: Number,
    book: Book,
    /// Who has come, for whoever watches.
    arrivals: Arrivals,
    /// What the members of the epoch were told last.
    told: News,
    _litter: Litter,
}

struct Connection {
    channel: Channel,
    from: String,
    stage: Stage,
    deadline: Instant,
    watching_write: bool,
}

enum Stage {
    Proving(Box<Handshake>),
    Length {
        who: Proven,
    },
    Body {
        who: Proven,
        len: usize,
    },
    Registered {
        worker: Worker,
    },
    /// It has the table, and hears of changes for as long as it lives.
    Member {
        worker: Worker,
    },
    Closing,
}

/// What a connection has proven to be.
#[derive(Clone, Copy)]
struct Proven {
    rank: Rank,
    epoch: Epoch,
    regroups: bool,
}

impl Service {
    pub fn new(
        options: ServerOptions,
        doors: Vec<Door>,
        litter: Litter,
        [stop, bell]: [Waker; 2],
        book: Book,
        arrivals: Arrivals,
    ) -> io::Result<Service> {
        let reactor = Reactor::new()?;
        reactor.add(&stop, STOP, false)?;
        reactor.add(&bell, BELL, false)?;
        let service = Service {
            options,
            reactor,
            stop,
            bell,
            doors,
            relief: None,
            connections: HashMap::new(),
            timed: BTreeSet::new(),
            next_number: FIRST_CONNECTION,
            book,
            arrivals,
            told: News::default(),
            _litter: litter,
        };
        service.watch_doors(true)?;
        Ok(service)
    }

    /// Serves until told to stop, or until the only table has been sent.
    pub fn serve(&mut self) {
        let mut ready = Vec::new();
        let mut stopping: Option<Instant> = None;
        loop {
            if let Some(deadline) = stopping {
                let unsent = self.connections.values().any(|c| c.channel.wants_write());
                if !unsent || Instant::now() >= deadline {
                    return;
                }
            }
            if self.options.once && self.book.has_begun() && self.connections.is_empty() {
                return;
            }
            let deadline = [stopping, self.next_deadline()].into_iter().flatten().min();
            if let Err(e) = self.reactor.wait(deadline, &mut ready) {
                (self.options.warn)(&format!("the rendezvous service ends: epoll failed: {e}"));
                return;
            }
            for &number in &ready {
                match number {
                    STOP => {
                        self.stop.clear();
                        let _ = self.watch_doors(false);
                        stopping.get_or_insert(Instant::now() + Duration::from_millis(SHUTDOWN_MS));
                    }
                    BELL => {
                        self.bell.clear();
                        let verdicts = self.book.hear();
                        self.tell_all(verdicts);
                    }
                    door if door < FIRST_CONNECTION => self.accept(door as usize - 1),
                    number => self.advance(number),
                }
            }
            self.expire();
        }
    }

    fn watch_doors(&self, on: bool) -> io::Result<()> {
        for (i, door) in self.doors.iter().enumerate() {
            let number = 1 + i as u64;
            match (door, on) {
                (Door::Tcp(listener), true) => self.reactor.add(listener, number, false)?,
                (Door::Private(listener) | Door::Host(listener), true) => {
                    self.reactor.add(listener, number, false)?;
                }
                (Door::Tcp(listener), false) => self.reactor.remove(listener)?,
                (Door::Private(listener) | Door::Host(listener), false) => self.reactor.remove(listener)?,
            }
        }
        Ok(())
    }

    fn accept(&mut self, door: usize) {
        // A bounded number at a time, so that a flood at the door does not keep those inside waiting.
        for _ in 0..UNAUTHENTICATED_MAX {
            // The doors close with the last table; what had knocked before is not let in.
            let Some(door) = self.doors.get(door) else { return };
            let accepted = match door {
                Door::Tcp(listener) => {
                    listener.accept().map(|(s, from)| (Stream::Tcp(s), from.to_string(), false))
                }
                Door::Private(listener) | Door::Host(listener) => {
                    let private = matches!(door, Door::Private(_));
                    listener
                        .accept()
                        .map(|(s, _)| (Stream::Unix(s), "a process of this host".to_owned(), private))
                }
            };
            match accepted {
                Ok((stream, from, private)) => self.admit(stream, from, private),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock) => return,
                Err(e)
                    if matches!(
                        e.raw_os_error(),
                        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS)
                    ) =>
                {
                    (self.options.warn)(&format!("the rendezvous service cannot accept connections: {e}"));
                    if self.watch_doors(false).is_ok() {
                        self.relief = Some(Instant::now() + Duration::from_millis(RELIEF_MS));
                    }
                    return;
                }
                // The connection was gone before it was accepted.
                Err(_) => {}
            }
        }
    }

    fn admit(&mut self, stream: Stream, from: String, private: bool) {
        let proving = self.timed.iter().filter(|n| matches!(self.connections[n].stage, Stage::Proving(_)));
        if proving.count() >= UNAUTHENTICATED_MAX && !self.make_room() {
            return;
        }
        if let Stream::Unix(stream) = &stream
            && private
        {
            match rustix::net::sockopt::socket_peercred(stream) {
                Ok(peer) if peer.uid == rustix::process::geteuid() => {}
                _ => return,
            }
        }
        let Ok(mut channel) = Channel::new(stream) else { return };
        if private {
            channel.queue(self.options.secret.expose());
        }
        let accept = Accept {
            me: SERVICE,
            size: self.book.size(self.options.size),
            epoch: None,
            serves: self.book.serves(),
        };
        let handshake = Handshake::acceptor(&self.options.secret, accept);
        let number = self.next_number;
        self.next_number += 1;
        if self.reactor.add(&channel, number, false).is_err() {
            return;
        }
        let deadline = Instant::now() + Duration::from_millis(HANDSHAKE_MS);
        let stage = Stage::Proving(Box::new(handshake));
        self.connections.insert(number, Connection { channel, from, stage, deadline, watching_write: false });
        self.timed.insert(number);
        self.advance(number);
    }

    /// Closes the oldest connection that has not even greeted, if it had the time to.
    fn make_room(&mut self) -> bool {
        let grace = Duration::from_millis(HANDSHAKE_MS.saturating_sub(super::GREETING_MS));
        let silent = self.timed.iter().copied().find(|number| {
            let connection = &self.connections[number];
            matches!(&connection.stage, Stage::Proving(h) if !h.greeted())
                && connection.deadline <= Instant::now() + grace
        });
        silent.map(|number| self.close(number)).is_some()
    }

    fn advance(&mut self, number: Number) {
        let Some(connection) = self.connections.get_mut(&number) else { return };
        match connection.advance() {
            Ok(None) => self.watch_write(number),
            Ok(Some((epoch, registration))) => {
                self.timed.remove(&number);
                let connections = &self.connections;
                let alive = |n: Number| connections.get(&n).is_some_and(|c| !c.channel.is_closed());
                let rank = registration.card.rank.0;
                let verdicts = self.book.register(number, epoch, registration, alive);
                if verdicts.is_empty() {
                    self.arrivals.insert(rank);
                }
                self.tell_all(verdicts);
            }
            Err(why) => {
                if let Some(why) = why {
                    let what = format!("{}: {why}", connection.from);
                    self.book.note_failure(what);
                }
                self.close(number);
            }
        }
    }

    fn tell_all(&mut self, verdicts: Vec<Verdict>) {
        for verdict in verdicts {
            self.tell(verdict);
        }
    }

    fn tell(&mut self, verdict: Verdict) {
        let message = frame(&verdict.answer.encode());
        if matches!(verdict.answer, Answer::Table(_)) {
            self.arrivals.finish();
        }
        if let Answer::Table(_) = &verdict.answer
            && self.options.once
        {
            // The only epoch has begun: whoever comes now is late, and nothing is left lying about. Other copies of
            // the doors may live on, so that closing these would not end the watch.
            let _ = self.watch_doors(false);
            self.relief = None;
            self.doors.clear();
            self._litter = Litter(Vec::new());
        }
        let keeps = matches!(verdict.answer, Answer::Table(_)) && self.book.keeps();
        if keeps {
            self.told = News::default();
        }
        for number in verdict.to {
            let Some(connection) = self.connections.get_mut(&number) else { continue };
            connection.channel.queue(&message);
            match connection.stage {
                Stage::Registered { worker } if keeps => connection.stage = Stage::Member { worker },
                _ => {
                    connection.stage = Stage::Closing;
                    connection.deadline =
                        Instant::now() + Duration::from_millis(self.options.start_timeout_ms);
                    self.timed.insert(number);
                }
            }
            self.advance(number);
        }
    }

    /// Tells the members of the epoch when others begin to wait for the next one.
    fn spread_news(&mut self) {
        let news = self.book.news();
        if std::mem::replace(&mut self.told, news) == news || news == News::default() {
            return;
        }
        let message = frame(&Answer::News(news).encode());
        let members = self.connections.iter().filter(|(_, c)| matches!(c.stage, Stage::Member { .. }));
        let members: Vec<Number> = members.map(|(number, _)| *number).collect();
        for number in members {
            self.connections.get_mut(&number).expect("just found").channel.queue(&message);
            self.advance(number);
        }
    }

    fn watch_write(&mut self, number: Number) {
        let Some(connection) = self.connections.get_mut(&number) else { return };
        let wants = connection.channel.wants_write();
        if wants != connection.watching_write
            && self.reactor.change(&connection.channel, number, wants).is_ok()
        {
            connection.watching_write = wants;
        }
    }

    fn close(&mut self, number: Number) {
        self.timed.remove(&number);
        let Some(connection) = self.connections.remove(&number) else { return };
        self.arrivals.add(connection.channel.traffic());
        self.book.forget(number);
        self.arrivals.set(self.book.arrived());
        if let Stage::Member { worker } = connection.stage
            && !self.connections.values().any(|c| c.is_of(worker))
        {
            let verdicts = self.book.left(worker);
            self.tell_all(verdicts);
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let connections = self.timed.iter().map(|number| self.connections[number].deadline).min();
        [connections, self.book.deadline(), self.relief].into_iter().flatten().min()
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let late: Vec<Number> =
            self.timed.iter().copied().filter(|number| self.connections[number].deadline <= now).collect();
        for number in late {
            self.close(number);
        }
        let verdicts = self.book.expire(now);
        self.tell_all(verdicts);
        self.book.tend();
        self.spread_news();
        if self.relief.is_some_and(|relief| relief <= now) && self.watch_doors(true).is_ok() {
            self.relief = None;
        }
    }
}

impl Connection {
    fn is_of(&self, worker: Worker) -> bool {
        matches!(self.stage, Stage::Registered { worker: w } | Stage::Member { worker: w } if w == worker)
    }

    /// Goes as far as the bytes allow. A whole registration is given once; `Err` means that the connection is
    /// to be closed, with what the missing ranks' error should mention.
    fn advance(&mut self) -> Result<Option<(Epoch, Registration)>, Option<String>> {
        self.channel.flush().map_err(|_| None)?;
        loop {
            match &mut self.stage {
                Stage::Proving(handshake) => {
                    if !self
                        .channel
                        .prove(handshake)
                        .map_err(|e| handshake_note(handshake, &e.to_string()))?
                    {
                        return Ok(None);
                    }
                    let peer = handshake.proven().expect("just proven");
                    let regroups = peer.purpose == Purpose::Regroup;
                    self.stage =
                        Stage::Length { who: Proven { rank: peer.rank, epoch: peer.epoch, regroups } };
                    if regroups {
                        self.channel.queue(&frame(&Answer::Come.encode()));
                        self.channel.flush().map_err(|_| None)?;
                    }
                }
                Stage::Length { who } => {
                    let Some(bytes) = self.channel.fill(LENGTH_BYTES).map_err(|_| None)? else {
                        return Ok(None);
                    };
                    let len = u32::from_le_bytes(bytes.try_into().expect("four bytes")) as usize;
                    if len > REGISTRATION_BYTES_MAX {
                        return Err(Some(format!("{} sent a registration of {len} bytes", who.rank)));
                    }
                    let who = *who;
                    self.channel.taken();
                    self.stage = Stage::Body { who, len };
                }
                Stage::Body { who, len } => {
                    let Proven { rank, epoch, regroups } = *who;
                    let Some(bytes) = self.channel.fill(*len).map_err(|_| None)? else { return Ok(None) };
                    let registration = Registration::decode(bytes)
                        .map_err(|e| Some(format!("{rank} sent a malformed registration: {}", e.0)))?;
                    if registration.card.rank != rank {
                        return Err(Some(format!("{rank} sent the card of {}", registration.card.rank)));
                    }
                    // What it wants to go on from is bound to what it has proven.
                    let same = |past: &Past| past.epoch == epoch && past.rank == rank;
                    if regroups && !registration.past.as_ref().is_some_and(same) {
                        return Err(Some(format!("{rank} comes with the past of another")));
                    }
                    self.channel.taken();
                    self.stage = Stage::Registered { worker: registration.card.rank.0 };
                    return Ok(Some((epoch, registration)));
                }
                // Nothing more is expected of it: bytes or the end of the stream mean that it goes.
                Stage::Registered { .. } | Stage::Member { .. } => {
                    return match self.channel.fill(1) {
                        Ok(None) => Ok(None),
                        _ => Err(None),
                    };
                }
                // The rank closes when it has the answer, so that no byte of it is lost to a reset.
                Stage::Closing => {
                    return match self.channel.fill(1) {
                        Ok(None) => Ok(None),
                        _ => Err(None),
                    };
                }
            }
        }
    }
}

fn handshake_note(handshake: &Handshake, why: &str) -> Option<String> {
    // Port scans, which say nothing or nonsense, are not worth a word.
    handshake.heard_prefix().then(|| why.to_owned())
}
