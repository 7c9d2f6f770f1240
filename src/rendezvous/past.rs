//! What a rank brings to the meeting after an epoch: who it was, what it knows of the others, and the process sets
//! that it had.
#![forbid(unsafe_code)]

use super::codec::{Malformed, Reader, Writer};
use crate::limits::RANKS_MAX;
use crate::types::{Epoch, Rank, SetId};

/// Process sets of one rank that are carried from one epoch to the next.
pub const SETS_MAX: usize = 1 << 16;

/// Process sets, the global one left out, by their numbers.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sets {
    /// Each set's number and its ranks, ascending.
    pub list: Vec<(SetId, Vec<Rank>)>,
    /// The number that the next set gets; all lower ones were given.
    pub next: u32,
}

/// The epoch that a rank comes from.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Past {
    /// Its number.
    pub epoch: Epoch,
    /// The rank's number in it.
    pub rank: Rank,
    /// Ranks whose processes are known to have ended.
    pub dead: Vec<Rank>,
    /// Ranks that have said goodbye, perhaps in order to come to the same meeting.
    pub left: Vec<Rank>,
    /// Ranks that were silent for too long.
    pub silent: Vec<Rank>,
    /// The process sets.
    pub sets: Sets,
}

impl Sets {
    /// The bytes, appended.
    pub fn encode(&self, writer: &mut Writer) {
        writer.word(self.next).word(self.list.len() as u32);
        for (id, ranks) in &self.list {
            writer.word(id.0);
            encode_ranks(ranks, writer);
        }
    }

    /// What the bytes say.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Sets, Malformed> {
        let next = reader.word()?;
        let count = reader.count(SETS_MAX, 8)?;
        let list: Vec<(SetId, Vec<Rank>)> = (0..count)
            .map(|_| Ok((SetId(reader.word()?), decode_ranks(reader)?)))
            .collect::<Result<_, _>>()?;
        let ordered = list.windows(2).all(|pair| pair[0].0 < pair[1].0);
        let given = list.iter().all(|(id, _)| (1..next).contains(&id.0));
        match ordered && given {
            true => Ok(Sets { list, next }),
            false => Err(Malformed("process sets are out of order")),
        }
    }

    /// The sets of the next epoch: those of which nobody knows that they were removed, so that what any rank was
    /// told of a change of the sets counts for all. `renumber` gives a rank's next number; sets that have lost
    /// everybody are gone.
    #[must_use]
    pub fn settled<'a>(
        known: impl Iterator<Item = &'a Sets> + Clone,
        renumber: impl Fn(Rank) -> Option<Rank>,
    ) -> Sets {
        let next = known.clone().map(|sets| sets.next).max().unwrap_or(0).max(1);
        let mut all = std::collections::BTreeMap::new();
        for (id, ranks) in known.clone().flat_map(|sets| &sets.list) {
            all.entry(*id).or_insert(ranks);
        }
        let removed = |id: SetId| {
            known
                .clone()
                .any(|sets| id.0 < sets.next && sets.list.binary_search_by_key(&id, |s| s.0).is_err())
        };
        let kept = all.into_iter().filter(|(id, _)| !removed(*id)).filter_map(|(id, ranks)| {
            let mut ranks: Vec<Rank> = ranks.iter().filter_map(|&rank| renumber(rank)).collect();
            ranks.sort_unstable();
            (!ranks.is_empty()).then_some((id, ranks))
        });
        Sets { list: kept.collect(), next }
    }
}

impl Past {
    /// The bytes, appended.
    pub fn encode(&self, writer: &mut Writer) {
        writer.word(self.epoch.0).word(self.rank.0);
        for ranks in [&self.dead, &self.left, &self.silent] {
            encode_ranks(ranks, writer);
        }
        self.sets.encode(writer);
    }

    /// What the bytes say.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Past, Malformed> {
        Ok(Past {
            epoch: Epoch(reader.word()?),
            rank: Rank(reader.word()?),
            dead: decode_ranks(reader)?,
            left: decode_ranks(reader)?,
            silent: decode_ranks(reader)?,
            sets: Sets::decode(reader)?,
        })
    }
}

fn encode_ranks(ranks: &[Rank], writer: &mut Writer) {
    writer.word(ranks.len() as u32);
    for rank in ranks {
        writer.word(rank.0);
    }
}

fn decode_ranks(reader: &mut Reader<'_>) -> Result<Vec<Rank>, Malformed> {
    let count = reader.count(RANKS_MAX, 4)?;
    (0..count).map(|_| reader.word().map(Rank)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sets(next: u32, list: &[(u32, &[u32])]) -> Sets {
        let list = list.iter().map(|(id, ranks)| (SetId(*id), ranks.iter().copied().map(Rank).collect()));
        Sets { list: list.collect(), next }
    }

    #[test]
    fn what_is_sent_is_what_arrives() {
        let past = Past {
            epoch: Epoch(7),
            rank: Rank(2),
            dead: vec![Rank(1)],
            left: vec![],
            silent: vec![Rank(0), Rank(3)],
            sets: sets(4, &[(1, &[0, 2]), (3, &[1])]),
        };
        let mut writer = Writer::default();
        past.encode(&mut writer);
        let mut reader = Reader(&writer.0);
        assert_eq!(Past::decode(&mut reader), Ok(past));
        for end in 0..writer.0.len() {
            assert!(Past::decode(&mut Reader(&writer.0[..end])).is_err(), "cut at {end}");
        }
        for wrong in [sets(4, &[(3, &[0]), (1, &[0])]), sets(2, &[(2, &[0])]), sets(2, &[(0, &[0])])] {
            let mut writer = Writer::default();
            wrong.encode(&mut writer);
            assert!(Sets::decode(&mut Reader(&writer.0)).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_change_of_which_one_rank_was_told_counts_for_all() {
        // Rank 2 is gone; one rank has made set 3, and one has removed set 1.
        let known = [
            sets(3, &[(1, &[0, 1]), (2, &[1, 2, 3])]),
            sets(4, &[(1, &[0, 1]), (2, &[1, 2, 3]), (3, &[2])]),
            sets(3, &[(2, &[1, 2, 3])]),
        ];
        let renumber = |rank: Rank| [Some(Rank(0)), Some(Rank(1)), None, Some(Rank(2))][rank.0 as usize];
        assert_eq!(Sets::settled(known.iter(), renumber), sets(4, &[(2, &[1, 2])]));
        let known = [sets(2, &[(1, &[0, 3])]), sets(1, &[])];
        assert_eq!(Sets::settled(known.iter(), renumber), sets(2, &[(1, &[0, 2])]));
    }
}
