//! Who has come: of a job of a fixed size, or of one whose ranks come and go.
#![forbid(unsafe_code)]

use super::assembly::{Assembly, Event, Worker};
use super::probes::Probes;
use super::rounds::{Number, Rounds, Verdict};
use super::{ServerOptions, Word};
use crate::rendezvous::card::{News, Registration};
use crate::rendezvous::proof::Purpose;
use crate::transport::wake::Waker;
use crate::types::Epoch;
use crossbeam::channel::{Receiver, Sender};
use std::time::{Duration, Instant};

/// Who has come.
pub enum Book {
    /// So many ranks, all of which must come.
    Fixed {
        /// Who has come for which epoch.
        rounds: Rounds,
        /// The first epoch.
        first: Epoch,
    },
    /// Whoever comes.
    Open(Box<Open>),
}

/// The parts of an open book.
pub struct Open {
    assembly: Assembly,
    probes: Probes,
    words: Option<Receiver<Word>>,
    events: Option<(Sender<Event>, Waker)>,
    first: Option<Epoch>,
}

impl Book {
    /// For a job of a fixed size.
    pub fn fixed(options: &ServerOptions) -> Book {
        let timeout = Duration::from_millis(options.start_timeout_ms);
        let rounds = Rounds::new(options.size, options.secret.job(), options.epoch, timeout);
        Book::Fixed { rounds, first: options.epoch }
    }

    /// For ranks that come and go.
    pub fn open(
        assembly: Assembly,
        probes: Probes,
        words: Option<Receiver<Word>>,
        events: Option<(Sender<Event>, Waker)>,
    ) -> Book {
        let first = assembly.epoch();
        Book::Open(Box::new(Open { assembly, probes, words, events, first }))
    }

    /// What connections may come for.
    pub fn serves(&self) -> fn(Purpose) -> bool {
        match self {
            Book::Open(open) if open.words.is_none() => |purpose| purpose == Purpose::Regroup,
            _ => |purpose| purpose == Purpose::Register,
        }
    }

    /// Numbers below this may come.
    pub fn size(&self, ranks: u32) -> u32 {
        match self {
            Book::Fixed { .. } => ranks,
            // Workers are numbered through the whole life of the job.
            Book::Open(_) => u32::MAX - 1,
        }
    }

    /// A connection failed before it was proven.
    pub fn note_failure(&mut self, what: String) {
        if let Book::Fixed { rounds, .. } = self {
            rounds.note_failure(what);
        }
    }

    /// Whether the first epoch of this book has begun.
    pub fn has_begun(&self) -> bool {
        match self {
            Book::Fixed { rounds, first } => rounds.has_begun(*first),
            Book::Open(open) => open.assembly.epoch() != open.first,
        }
    }

    /// A proven rank, or worker, registers.
    pub fn register(
        &mut self,
        number: Number,
        epoch: Epoch,
        registration: Registration,
        alive: impl Fn(Number) -> bool,
    ) -> Vec<Verdict> {
        let now = Instant::now();
        match self {
            Book::Fixed { rounds, .. } => {
                rounds.register(number, epoch, registration, now, alive).into_iter().collect()
            }
            Book::Open(open) => {
                let worker = registration.card.rank.0;
                open.assembly.register(number, worker, registration, now)
            }
        }
    }

    /// A connection is gone.
    pub fn forget(&mut self, number: Number) {
        match self {
            Book::Fixed { rounds, .. } => rounds.forget(number),
            Book::Open(open) => open.assembly.forget(number),
        }
    }

    /// The ranks of the newest epoch that is being waited for; of an open book, whose workers have no ranks yet, none.
    pub fn arrived(&self) -> Vec<u32> {
        match self {
            Book::Fixed { rounds, .. } => rounds.arrived(),
            Book::Open(_) => Vec::new(),
        }
    }

    /// The connection that a worker had kept since it got the table has ended, and with it most likely the worker.
    pub fn left(&mut self, worker: Worker) -> Vec<Verdict> {
        match self {
            Book::Open(open) if open.assembly.is_away(worker) => open.assembly.ended(worker, Instant::now()),
            _ => Vec::new(),
        }
    }

    /// Takes the launcher's words and what the probes have found; tells the launcher what has happened.
    pub fn hear(&mut self) -> Vec<Verdict> {
        let Book::Open(open) = self else { return Vec::new() };
        let now = Instant::now();
        let mut verdicts = Vec::new();
        while let Some(word) = open.words.as_ref().and_then(|words| words.try_recv().ok()) {
            match word {
                Word::Started(worker) => open.assembly.expect(worker),
                Word::Ended(worker) => verdicts.extend(open.assembly.ended(worker, now)),
                Word::Dismissed(worker) => open.assembly.dismiss(worker),
            }
        }
        while let Some((epoch, rank, found)) = open.probes.found(now) {
            verdicts.extend(open.assembly.found(epoch, rank, found, now));
        }
        verdicts
    }

    /// Looks for those who are waited for, and tells the launcher what has happened.
    pub fn tend(&mut self) {
        let Book::Open(open) = self else { return };
        let epoch = open.assembly.epoch().unwrap_or_default();
        open.probes.look(epoch, open.assembly.awaited(), Instant::now());
        while let Some(event) = open.assembly.event() {
            if let Some((events, waker)) = &open.events {
                // The launcher takes them as they come; one that does not any more needs none.
                let _ = events.try_send(event);
                waker.wake();
            }
        }
    }

    /// What the members of the present epoch should know, and whether a worker is one of them.
    pub fn news(&self) -> News {
        match self {
            Book::Fixed { .. } => News::default(),
            Book::Open(open) => open.assembly.news(),
        }
    }

    /// Whether connections are kept after the table, for news.
    pub fn keeps(&self) -> bool {
        matches!(self, Book::Open(open) if open.words.is_some())
    }

    /// When there is something to do.
    pub fn deadline(&self) -> Option<Instant> {
        match self {
            Book::Fixed { rounds, .. } => rounds.deadline(),
            Book::Open(open) => {
                [open.assembly.deadline(), open.probes.deadline()].into_iter().flatten().min()
            }
        }
    }

    /// Lets time pass.
    pub fn expire(&mut self, now: Instant) -> Vec<Verdict> {
        match self {
            Book::Fixed { rounds, .. } => rounds.expire(now),
            Book::Open(open) => open.assembly.expire(now),
        }
    }
}
