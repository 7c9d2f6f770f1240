//! Meeting again after an epoch.
//!
//! The workers of an elastic job come back to the launcher's service. All others meet at the doors of one of them: the
//! lowest that lives, so nothing of the first rendezvous is needed, and no rank in particular. Everybody knocks at the
//! ranks below, from the lowest on. Closed doors tell of a death, silence lets the next one be tried; one that lives
//! and has not called for the new epoch yet is waited for; one that waits elsewhere itself says where. A rank
//! that finds nobody alive below itself opens the meeting at its own doors, and takes part like everybody else. There
//! [`super::server::assembly`] decides.
//!
//! Doors stay open from the first epoch to the last, so that closed ones mean what they mean, and so that one who was
//! stopped and resumes later finds the others, who tell it that they have gone on.
#![forbid(unsafe_code)]

use super::approach::{Caller, Ended, Reached, read_answer};
use super::card::{Answer, Card, Registration, Table, frame};
use super::channel::Channel;
use super::client::{Join, Joined, join_elastic};
pub use super::found::Veteran;
use super::found::{Found, over};
use super::place;
use super::porter::Porter;
use super::server::Server;
use crate::error::{Cause, Error, Result};
use crate::types::Rank;
use rustix::event::poll;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Between two knocks at a rank that is not there yet; doubled up to the longest.
const PAUSE: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// What the meeting's verdict may be later than its deadline.
const VERDICT: Duration = Duration::from_secs(5);

/// Comes together with the others of `last`, and waits for the epoch that follows. `porter` answers at this rank's
/// doors until it is clear where the meeting is; then it ends. Bounded by the elastic timeout.
pub fn reform(join: &Join, last: &Table, veteran: Veteran, porter: Porter) -> Result<Joined> {
    if let Some(worker) = place::worker(&join.environment)? {
        drop(porter);
        return join_elastic(join, worker, Some(veteran));
    }
    let silence = Duration::from_millis(join.silence_ms);
    let card = last.cards[veteran.past.rank.0 as usize].clone();
    let caller = Caller { card, epoch: veteran.past.epoch, secret: veteran.secret.clone(), silence };
    let patience = Duration::from_millis(join.elastic_timeout_ms);
    let past = &veteran.past;
    let known: [&[Rank]; 2] = [&past.dead, &past.silent];
    let mut seeker = Seeker {
        join,
        last,
        veteran: &veteran,
        caller,
        deadline: Instant::now() + patience + VERDICT,
        patience,
        given_up: known.concat().into_iter().collect(),
        porter: Some(porter),
        server: None,
    };
    let (found, server) = (seeker.seek()?, seeker.server.take());
    drop(seeker);
    Ok(Joined { server, ..found.joined(join, veteran.doors) })
}

struct Seeker<'a> {
    join: &'a Join,
    last: &'a Table,
    veteran: &'a Veteran,
    caller: Caller,
    deadline: Instant,
    patience: Duration,
    /// Ranks that have ended, or do not answer.
    given_up: BTreeSet<Rank>,
    porter: Option<Porter>,
    server: Option<Server>,
}

/// What came of one look.
enum Look {
    Found(Box<Found>),
    /// Look again, after a pause.
    Wait,
    /// Look again at once.
    Next,
}

impl Seeker<'_> {
    fn seek(&mut self) -> Result<Found> {
        let mut pause = PAUSE;
        while Instant::now() < self.deadline {
            match self.look()? {
                Look::Found(found) => return Ok(*found),
                Look::Next => pause = PAUSE,
                Look::Wait => {
                    let _ = poll(&mut [], Some(&super::reactor::timespec(pause)));
                    pause = (2 * pause).min(PAUSE_MAX);
                }
            }
        }
        Err(Error::usage(format!(
            "the ranks of epoch {} did not come together within {} s; CAROLE_ELASTIC_TIMEOUT_S allows more seconds",
            self.last.epoch.0,
            self.patience.as_secs()
        )))
    }

    /// Knocks at the lowest rank that may live, or opens the meeting.
    fn look(&mut self) -> Result<Look> {
        let me = self.veteran.past.rank;
        let lowest = (0..me.0).map(Rank).find(|rank| !self.given_up.contains(rank)).unwrap_or(me);
        let card = &self.last.cards[lowest.0 as usize];
        if lowest == me && self.server.is_none() {
            self.lead()?;
        }
        match self.caller.approach(card) {
            Reached::Meeting(channel) => {
                if let Some(porter) = &self.porter {
                    porter.follow(lowest);
                }
                self.attend(channel, card)
            }
            Reached::NotYet => Ok(Look::Wait),
            Reached::GoneOn(epoch) => Err(self.over(Cause::Excluded { epoch })),
            Reached::Elsewhere(rank) if rank < lowest => {
                self.given_up.remove(&rank);
                Ok(Look::Next)
            }
            Reached::Elsewhere(_) => Ok(Look::Wait),
            // Its own doors are open.
            Reached::Dead | Reached::Silent if lowest == me => Ok(Look::Wait),
            Reached::Dead | Reached::Silent => {
                self.given_up.insert(lowest);
                Ok(Look::Next)
            }
        }
    }

    fn lead(&mut self) -> Result<()> {
        // Two must not listen at one door.
        self.porter = None;
        let doors = self.veteran.doors.try_clone();
        let doors = doors
            .map_err(|e| Error::usage(format!("this rank's doors cannot be used for the meeting: {e}")))?;
        let (caller, warn) = (self.caller.clone(), self.join.warn.clone());
        self.server = Some(Server::start_at(doors, self.last, caller, self.patience, warn)?);
        Ok(())
    }

    /// Registers, and waits for the verdict.
    fn attend(&self, mut channel: Channel, at: &Card) -> Result<Look> {
        let card = &self.caller.card;
        let registration = Registration {
            card: Card { rank: self.veteran.past.rank, ..card.clone() },
            size: self.last.cards.len() as u32,
            knobs: self.join.knobs.clone(),
            past: Some(self.veteran.past.clone()),
        };
        channel.queue(&frame(&registration.encode()));
        match read_answer(&mut channel, self.deadline) {
            Ok(Some(Answer::Table(table))) => {
                let followed = table.epoch > self.last.epoch && table.job == self.last.job;
                let found = Found::of(table, card, &self.veteran.secret).map_err(Error::Usage)?;
                match followed {
                    true => Ok(Look::Found(Box::new(found))),
                    false => Err(Error::usage(format!("{} sent the table of another epoch", at.rank))),
                }
            }
            Ok(Some(Answer::Refused(why))) => Err(Error::usage(format!("no new epoch can be formed: {why}"))),
            Ok(Some(Answer::Excluded(epoch))) => Err(self.over(Cause::Excluded { epoch })),
            Ok(Some(Answer::Minority { here, of })) => Err(self.over(Cause::Minority { here, of })),
            // It died, or made room for another meeting.
            Ok(_) | Err(Ended) => Ok(Look::Wait),
        }
    }

    fn over(&self, cause: Cause) -> Error {
        over(Some(&self.veteran.past), cause)
    }
}
