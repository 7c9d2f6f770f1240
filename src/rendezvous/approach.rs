//! Knocking at the doors of a rank of the last epoch: is the meeting there, does the rank live, has it gone on?
#![forbid(unsafe_code)]

use super::card::{Answer, Card, LENGTH_BYTES};
use super::channel::Channel;
use super::porter::Choice;
use super::porter::dial::{Aim, Target, targets};
use super::proof::{Handshake, Hello, ProofError, Purpose};
use super::secret::Secret;
use crate::limits::TABLE_BYTES_MAX;
use crate::types::{Epoch, Rank};
use std::time::{Duration, Instant};

/// The least that a connection to one of several addresses waits for an answer.
const SHARE_MS: u64 = 250;

/// Who knocks.
#[derive(Clone)]
pub struct Caller {
    /// Its card in the last epoch.
    pub card: Card,
    /// The last epoch.
    pub epoch: Epoch,
    /// The job's secret.
    pub secret: Secret,
    /// How long somebody who lives may take to answer.
    pub silence: Duration,
}

/// What was found behind a rank's doors.
pub enum Reached {
    /// The meeting is there; this connection is proven, and a registration is expected on it.
    Meeting(Channel),
    /// The rank lives and has not called for a new epoch yet (or is on its way from one to the next).
    NotYet,
    /// The rank lives, and has gone to this one to meet the others.
    Elsewhere(Rank),
    /// The rank has gone on in this epoch.
    GoneOn(Epoch),
    /// Its doors are closed, by the word of a kernel that must know: its process has ended.
    Dead,
    /// Nothing answers.
    Silent,
}

impl Caller {
    /// Knocks at `peer`'s doors, one after another. Bounded by the silence that is allowed.
    #[must_use]
    pub fn approach(&self, peer: &Card) -> Reached {
        let Ok(targets) = targets(&self.card, peer, Aim::Knock, Choice::Auto) else { return Reached::Silent };
        let share = (self.silence / targets.len() as u32).max(Duration::from_millis(SHARE_MS));
        let mut all_closed = true;
        for target in &targets {
            match self.knock(peer, target, Instant::now() + share) {
                Knocked::Answered(reached) => return reached,
                // On this host the kernel knows; far away it may be a firewall that refuses.
                Knocked::Refused => all_closed &= self.is_near(peer, target),
                Knocked::Silence => all_closed = false,
            }
        }
        if all_closed { Reached::Dead } else { Reached::Silent }
    }

    fn is_near(&self, peer: &Card, target: &Target) -> bool {
        self.card.host_id == peer.host_id
            || matches!(target, Target::Tcp(address) if address.ip().is_loopback())
    }

    fn knock(&self, peer: &Card, target: &Target, deadline: Instant) -> Knocked {
        let refused = |e: &std::io::Error| e.kind() == std::io::ErrorKind::ConnectionRefused;
        let mut channel = match target.connect() {
            Ok(channel) => channel,
            Err(e) if refused(&e) => return Knocked::Refused,
            Err(_) => return Knocked::Silence,
        };
        let ends = (self.card.rank, peer.rank);
        let Ok(hello) = Hello::new(&self.secret, self.epoch, ends, Purpose::Regroup, 0) else {
            return Knocked::Silence;
        };
        let mut handshake = Handshake::connector(&self.secret, hello);
        loop {
            match rustix::net::sockopt::socket_error(&channel) {
                Ok(Err(rustix::io::Errno::CONNREFUSED)) => return Knocked::Refused,
                Ok(Ok(())) => {}
                _ => return Knocked::Silence,
            }
            match channel.prove(&mut handshake) {
                Ok(true) => break,
                Ok(false) => {}
                // Somebody closed it, which one who is stopped does not do: its doors change hands, or it ends.
                Err(ProofError::Closed | ProofError::ClosedAtTls) => {
                    return Knocked::Answered(Reached::NotYet);
                }
                // Somebody else has come by the rank's address.
                Err(_) => return Knocked::Silence,
            }
            if !channel.wait(deadline).unwrap_or(false) {
                return Knocked::Silence;
            }
        }
        Knocked::Answered(match read_answer(&mut channel, deadline) {
            Ok(Some(Answer::Come)) => Reached::Meeting(channel),
            Ok(Some(Answer::Elsewhere(rank))) => Reached::Elsewhere(rank),
            Ok(Some(Answer::Excluded(epoch))) => Reached::GoneOn(epoch),
            Ok(Some(_)) | Err(Ended) => Reached::NotYet,
            Ok(None) => return Knocked::Silence,
        })
    }
}

enum Knocked {
    Answered(Reached),
    Refused,
    Silence,
}

/// A connection has ended, or what came on it is not an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ended;

/// The next answer of a service on a proven connection; `None` when the deadline has come.
pub fn read_answer(channel: &mut Channel, deadline: Instant) -> Result<Option<Answer>, Ended> {
    loop {
        channel.flush().map_err(|_| Ended)?;
        if let Some(answer) = poll_answer(channel)? {
            return Ok(Some(answer));
        }
        if !channel.wait(deadline).map_err(|_| Ended)? {
            return Ok(None);
        }
    }
}

/// The next answer, if all of it has come.
pub fn poll_answer(channel: &mut Channel) -> Result<Option<Answer>, Ended> {
    let Some(bytes) = channel.fill(LENGTH_BYTES).map_err(|_| Ended)? else { return Ok(None) };
    let len = u32::from_le_bytes(bytes[..LENGTH_BYTES].try_into().expect("four bytes")) as usize;
    if len > TABLE_BYTES_MAX {
        return Err(Ended);
    }
    let Some(bytes) = channel.fill(LENGTH_BYTES + len).map_err(|_| Ended)? else { return Ok(None) };
    let answer = Answer::decode(&bytes[LENGTH_BYTES..]).map_err(|_| Ended)?;
    channel.taken();
    Ok(Some(answer))
}
