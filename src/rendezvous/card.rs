//! What each rank says of itself when it registers, and the table of all that it gets back.
#![forbid(unsafe_code)]

use super::codec::{Malformed, Reader, Writer};
use super::place::Hints;
use super::proof::BUILD_BYTES_MAX;
use super::secret::JobId;
use crate::limits::{RANKS_MAX, REASON_BYTES_MAX, TABLE_BYTES_MAX};
use crate::types::{Epoch, Rank};
use std::net::SocketAddr;

/// Bytes of one registration: a card and its knobs.
pub const REGISTRATION_BYTES_MAX: usize = 64 << 10;
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
}

/// What the service answers to a registration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// All ranks are there.
    Table(Table),
    /// This epoch cannot start, for this reason. Every rank gets the same words.
    Refused(String),
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
        writer.0
    }
    /// What these bytes say.
    pub fn decode(bytes: &[u8]) -> Result<Registration, Malformed> {
        let mut reader = Reader(bytes);
        let card = Card::decode(&mut reader)?;
        let size = reader.word()?;
        let knobs = decode_knobs(&mut reader)?;
        reader.end()?;
        Ok(Registration { card, size, knobs })
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
                Answer::Table(Table { epoch, job, cards, knobs, simd })
            }
            _ => return Err(Malformed("the answer is neither a table nor a refusal")),
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
