//! What each rank says of itself when it registers, and the table of all that it gets back.
#![forbid(unsafe_code)]

use super::codec::{Malformed, Reader, Writer};
use super::past::{Past, Sets};
use super::place::Hints;
use super::proof::BUILD_BYTES_MAX;
use super::secret::JobId;
use crate::limits::{RANKS_MAX, REASON_BYTES_MAX, TABLE_BYTES_MAX};
use crate::types::{Epoch, Rank};
use std::net::SocketAddr;

/// Bytes of one registration: a card, its knobs, and the process sets of an epoch before.
pub const REGISTRATION_BYTES_MAX: usize = 1 << 20;
/// Addresses of one rank. A host rarely has more usable interfaces, and the table holds them for all ranks.
pub const ADDRESSES_MAX: usize = 16;
/// Knobs that must agree.
pub const KNOBS_MAX: usize = 256;
const HOST_BYTES_MAX: usize = 255;
const KNOB_NAME_BYTES_MAX: usize = 64;
const KNOB_VALUE_BYTES_MAX: usize = 512;
/// Bytes before the body of a message after the handshake: its length.
pub const LENGTH_BYTES: usize = 4;

/// A knob and its value, as text.
pub type Knob = (String, String);

/// One rank, as the others see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Card {
    /// Who it is.
    pub rank: Rank,
    /// What its variables say about hosts.
    pub hints: Hints,
    /// Ranks with the same text share memory.
    pub host_id: String,
    /// Its host's name, for messages.
    pub hostname: String,
    /// Its process number on that host, for messages.
    pub pid: u32,
    /// The build that it runs.
    pub build: String,
    /// The widest vector instructions that it has.
    pub simd: u8,
    /// Where it accepts TCP connections, best first.
    pub addresses: Vec<SocketAddr>,
    /// The name of its abstract unix socket, where it accepts shared-memory links.
    pub socket: Option<[u8; 16]>,
}

/// What a rank sends when it registers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Registration {
    /// Itself.
    pub card: Card,
    /// How many ranks it believes there are.
    pub size: u32,
    /// Knobs that must be the same on every rank.
    pub knobs: Vec<Knob>,
    /// Where it comes from, when the ranks of an epoch meet again.
    pub past: Option<Past>,
}

/// All ranks of an epoch, the same on each.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table {
    /// The epoch.
    pub epoch: Epoch,
    /// The job.
    pub job: JobId,
    /// Card `i` is rank `i`'s.
    pub cards: Vec<Card>,
    /// The knobs that all ranks have alike.
    pub knobs: Vec<Knob>,
    /// The widest vector instructions that all ranks have.
    pub simd: u8,
    /// The process sets that were carried over from the epoch before.
    pub sets: Sets,
}

/// What the service answers to a registration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// All ranks are there.
    Table(Table),
    /// This epoch cannot start, for this reason. Every rank gets the same words.
    Refused(String),
    /// The meeting is here: send a registration.
    Come,
    /// The rank asked lives, but has not come to the meeting yet.
    NotYet,
    /// The rank asked has gone to this rank of the last epoch to meet the others.
    Elsewhere(Rank),
    /// The others have gone on in this epoch without the rank that asks.
    Excluded(Epoch),
    /// Too few have come together to go on.
    Minority {
        /// Ranks that came.
        here: u32,
        /// Ranks that may be alive.
        of: u32,
    },
    /// After the table, as often as something changes: workers wait to be let in, or are to leave.
    News(News),
}

/// What has changed about the workers of an elastic job.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct News {
    /// New ones wait.
    pub added: bool,
    /// Some are to leave.
    pub removed: bool,
}

impl Card {
    /// The card's bytes, appended.
    fn encode(&self, writer: &mut Writer) {
        let hints = &self.hints;
        writer.word(self.rank.0);
        writer
            .option(hints.local_rank)
            .option(hints.local_size)
            .option(hints.cross_rank)
            .option(hints.cross_size);
        writer.text(&self.host_id, HOST_BYTES_MAX).text(&self.hostname, HOST_BYTES_MAX).word(self.pid);
        writer.text(&self.build, BUILD_BYTES_MAX).byte(self.simd);
        let addresses = &self.addresses[..self.addresses.len().min(ADDRESSES_MAX)];
        writer.word(addresses.len() as u32);
        for address in addresses {
            writer.address(address);
        }
        match &self.socket {
            Some(name) => writer.byte(1).raw(name),
            None => writer.byte(0),
        };
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Card, Malformed> {
        let rank = Rank(reader.word()?);
        let hints = Hints {
            local_rank: reader.option()?,
            local_size: reader.option()?,
            cross_rank: reader.option()?,
            cross_size: reader.option()?,
        };
        let host_id = reader.text(HOST_BYTES_MAX)?;
        let hostname = reader.text(HOST_BYTES_MAX)?;
        let pid = reader.word()?;
        let build = reader.text(BUILD_BYTES_MAX)?;
        let simd = reader.byte()?;
        let count = reader.count(ADDRESSES_MAX, 7)?;
        let addresses = (0..count).map(|_| reader.address()).collect::<Result<_, _>>()?;
        let socket = match reader.byte()? {
            0 => None,
            1 => Some(reader.array()?),
            _ => return Err(Malformed("a socket is neither there nor missing")),
        };
        Ok(Card { rank, hints, host_id, hostname, pid, build, simd, addresses, socket })
    }
}

/// The smallest card: what a count of cards is held against.
const CARD_BYTES_MIN: usize = 4 + 4 + 4 + 4 + 4 + 4 + 1 + 4 + 1;

fn encode_knobs(knobs: &[Knob], writer: &mut Writer) {
    assert!(knobs.len() <= KNOBS_MAX, "our own knobs are bounded");
    writer.word(knobs.len() as u32);
    for (name, value) in knobs {
        writer.text(name, KNOB_NAME_BYTES_MAX).text(value, KNOB_VALUE_BYTES_MAX);
    }
}

fn decode_knobs(reader: &mut Reader<'_>) -> Result<Vec<Knob>, Malformed> {
    let count = reader.count(KNOBS_MAX, 8)?;
    (0..count).map(|_| Ok((reader.text(KNOB_NAME_BYTES_MAX)?, reader.text(KNOB_VALUE_BYTES_MAX)?))).collect()
}

impl Registration {
    /// The bytes after the length.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        self.card.encode(&mut writer);
        writer.word(self.size);
        encode_knobs(&self.knobs, &mut writer);
        match &self.past {
            None => {
                writer.byte(0);
            }
            Some(past) => past.encode(writer.byte(1)),
        }
        writer.0
    }
    /// What these bytes say.
    pub fn decode(bytes: &[u8]) -> Result<Registration, Malformed> {
        let mut reader = Reader(bytes);
        let card = Card::decode(&mut reader)?;
        let size = reader.word()?;
        let knobs = decode_knobs(&mut reader)?;
        let past = match reader.byte()? {
            0 => None,
            1 => Some(Past::decode(&mut reader)?),
            _ => return Err(Malformed("a past is neither there nor missing")),
        };
        reader.end()?;
        Ok(Registration { card, size, knobs, past })
    }
}

impl Answer {
    /// The bytes after the length.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        match self {
            Answer::Refused(reason) => {
                writer.byte(0).text(reason, REASON_BYTES_MAX);
            }
            Answer::Table(table) => {
                writer.byte(1).word(table.epoch.0).raw(&table.job.0).byte(table.simd);
                encode_knobs(&table.knobs, &mut writer);
                writer.word(table.cards.len() as u32);
                for card in &table.cards {
                    card.encode(&mut writer);
                }
                table.sets.encode(&mut writer);
            }
            Answer::NotYet => {
                writer.byte(2);
            }
            Answer::Come => {
                writer.byte(6);
            }
            Answer::Elsewhere(rank) => {
                writer.byte(7).word(rank.0);
            }
            Answer::Excluded(epoch) => {
                writer.byte(3).word(epoch.0);
            }
            Answer::Minority { here, of } => {
                writer.byte(4).word(*here).word(*of);
            }
            Answer::News(news) => {
                writer.byte(5).byte(u8::from(news.added)).byte(u8::from(news.removed));
            }
        }
        writer.0
    }
    /// What these bytes say. A table has a card for each rank, in order.
    pub fn decode(bytes: &[u8]) -> Result<Answer, Malformed> {
        if bytes.len() > TABLE_BYTES_MAX {
            return Err(Malformed("a table is beyond its bound"));
        }
        let mut reader = Reader(bytes);
        let answer = match reader.byte()? {
            0 => Answer::Refused(reader.text(REASON_BYTES_MAX)?),
            1 => {
                let epoch = Epoch(reader.word()?);
                let job = JobId(reader.array()?);
                let simd = reader.byte()?;
                let knobs = decode_knobs(&mut reader)?;
                let count = reader.count(RANKS_MAX, CARD_BYTES_MIN)?;
                let mut cards = Vec::with_capacity(count);
                for rank in 0..count {
                    let card = Card::decode(&mut reader)?;
                    if card.rank != Rank(rank as u32) {
                        return Err(Malformed("the cards are out of order"));
                    }
                    cards.push(card);
                }
                let sets = Sets::decode(&mut reader)?;
                Answer::Table(Table { epoch, job, cards, knobs, simd, sets })
            }
            2 => Answer::NotYet,
            6 => Answer::Come,
            7 => Answer::Elsewhere(Rank(reader.word()?)),
            3 => Answer::Excluded(Epoch(reader.word()?)),
            4 => Answer::Minority { here: reader.word()?, of: reader.word()? },
            5 => Answer::News(News { added: reader.byte()? != 0, removed: reader.byte()? != 0 }),
            _ => return Err(Malformed("the answer is of no known kind")),
        };
        reader.end()?;
        Ok(answer)
    }
}

/// A body with its length before it.
#[must_use]
pub fn frame(body: &[u8]) -> Vec<u8> {
    assert!(body.len() <= TABLE_BYTES_MAX, "what we send is bounded");
    let mut message = Vec::with_capacity(LENGTH_BYTES + body.len());
    message.extend_from_slice(&(body.len() as u32).to_le_bytes());
    message.extend_from_slice(body);
    message
}

#[cfg(test)]
#[path = "card_tests.rs"]
pub(super) mod tests;
