//! Process sets made and removed while the job runs. A change is identified by its list of ranks, and a removal by the
//! set's number too (after a change of epochs several sets may have the same ranks), so that ranks may ask for their
//! changes in different orders, from several threads too.
//!
//! Callers wait, and two ranks that wait for different changes would wait for ever. So ranks meet in *rounds*: a
//! rank that wants a change gathers what every rank wants (an allgather over the global set, in which each rank takes
//! part when it next wants a change), and all carry out the same: what everybody wants, and additions that only some
//! want yet. The others *owe* these: when they come to ask for one, it is done already, and they get its number. A
//! removal that only some want waits for the others as long as anything else can be done, since they may use the set
//! until then.
//!
//! All ranks see the same sets after the same round, so what is refused for the sake of what is there (a set that
//! exists already, a set that does not) is refused on every rank alike, and nobody waits for a rank that was refused.
#![forbid(unsafe_code)]

use super::live::{Live, lock};
use super::{Request, SetInfo, TensorArg, request};
use crate::coordinator::rank_list;
use crate::engine::handles::Waited;
use crate::error::{Error, Mismatch, Result};
use crate::log;
use crate::types::{Collective, DType, GLOBAL_SET, Rank, SetId};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// A change that a rank asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Change {
    what: What,
    ranks: Vec<Rank>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Add,
    Remove(SetId),
}

impl What {
    fn collective(self) -> Collective {
        match self {
            What::Add => Collective::AddSet,
            What::Remove(_) => Collective::RemoveSet,
        }
    }
}

/// What was carried out before this rank had asked for it.
#[derive(Debug)]
struct Owed {
    change: Change,
    id: SetId,
}

/// What one rank brings to a round.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    rank: Rank,
    /// These are the sets given to init, which must be the same on all ranks.
    at_start: bool,
    changes: Vec<Change>,
}

/// More changes are not remembered for a rank that never asks for them.
const OWED_MAX: usize = 1024;

/// The changes of one job, as this rank sees them.
#[derive(Default)]
pub(super) struct Changes {
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Default)]
struct State {
    /// Whether a thread of this rank is in a round.
    in_round: bool,
    owed: VecDeque<Owed>,
}

impl State {
    fn pay(&mut self, holds: impl Fn(&Owed) -> bool) -> Option<SetId> {
        let place = self.owed.iter().position(holds)?;
        self.owed.remove(place).map(|owed| owed.id)
    }
}

impl Live {
    pub(super) fn add_process_set(&self, ranks: &[Rank]) -> Result<SetId> {
        let mut sorted = ranks.to_vec();
        sorted.sort_unstable();
        let change = Change { what: What::Add, ranks: sorted };
        let turn = match self.my_turn(|owed| owed.change == change) {
            MyTurn::Paid(id) => return Ok(id),
            MyTurn::Round(turn) => turn,
        };
        if let Err(reason) = self.check_new_set(&change.ranks) {
            return Err(self.refuse(reason));
        }
        turn.until_done(&change)
    }

    /// The sets given to init: all ranks give the same, in any order.
    pub(super) fn add_first_sets(&self, lists: &[Vec<Rank>]) -> Result<()> {
        if lists.is_empty() {
            return Ok(());
        }
        let MyTurn::Round(turn) = self.my_turn(|_| false) else { unreachable!("nothing is owed") };
        let mut changes = Vec::new();
        for list in lists {
            let mut ranks = list.clone();
            ranks.sort_unstable();
            let change = Change { what: What::Add, ranks };
            let checked = self.check_new_set(&change.ranks).and_then(|()| match changes.contains(&change) {
                true => {
                    Err(format!("the process set of {} is given to init twice", rank_list(&change.ranks)))
                }
                false => Ok(()),
            });
            if let Err(reason) = checked {
                return Err(self.refuse(reason));
            }
            changes.push(change);
        }
        self.round(&Asked { rank: Rank(self.world.rank), at_start: true, changes })?;
        drop(turn);
        Ok(())
    }

    pub(super) fn remove_process_set(&self, id: SetId) -> Result<bool> {
        let turn = match self.my_turn(|owed| owed.change.what == What::Remove(id)) {
            MyTurn::Paid(_) => return Ok(true),
            MyTurn::Round(turn) => turn,
        };
        match self.set(id) {
            Ok(info) if id != GLOBAL_SET => {
                turn.until_done(&Change { what: What::Remove(id), ranks: info.ranks.clone() })?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    fn check_new_set(&self, sorted: &[Rank]) -> std::result::Result<(), String> {
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("{} stands twice in the list of a process set", pair[0]));
        }
        if let Some(rank) = sorted.iter().find(|r| r.0 >= self.world.size) {
            return Err(format!("{rank} is not in this job of {} ranks", self.world.size));
        }
        if sorted.is_empty() {
            return Err("a process set needs at least one rank".to_owned());
        }
        match self.set_of(sorted) {
            None => Ok(()),
            Some(known) => Err(format!(
                "a process set of these ranks exists already (number {}); use that one",
                known.id.0
            )),
        }
    }

    fn set_of(&self, sorted: &[Rank]) -> Option<SetInfo> {
        self.all_sets().into_iter().find(|info| info.ranks == sorted)
    }

    /// Waits until no other thread of this rank is in a round, or until what is asked for turns out to be owed.
    fn my_turn(&self, holds: impl Fn(&Owed) -> bool) -> MyTurn<'_> {
        let mut state = lock(&self.changes.state);
        loop {
            if let Some(id) = state.pay(&holds) {
                return MyTurn::Paid(id);
            }
            if !state.in_round {
                state.in_round = true;
                return MyTurn::Round(Turn { live: self });
            }
            state = self.changes.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What this rank may not ask for is told to the others, so that they do not wait for it; nobody here waits.
    fn refuse(&self, reason: String) -> Error {
        match self.submit_round(&[], Some(&reason)) {
            Ok(handle) => {
                self.driver.abandon(handle);
                Error::Usage(reason)
            }
            Err(error) => error,
        }
    }

    /// One round: learns what every rank asks for, and does what all do. Returns what was done of the own.
    fn round(&self, mine: &Asked) -> Result<Vec<(Change, SetId)>> {
        let words = encode(mine);
        let handle = self.submit_round(&words, None)?;
        let Waited::Done(result, _) = self.driver.wait(handle, None)? else {
            unreachable!("a wait without limit ends with an outcome")
        };
        let outcome = result?;
        let memory = outcome.tensors.first().and_then(|tensor| tensor.memory.as_ref());
        let gathered: Vec<u32> = memory.map_or(Vec::new(), |bytes| {
            bytes
                .as_slice()
                .chunks_exact(4)
                .map(|c| u32::from_le_bytes(c.try_into().expect("4 bytes")))
                .collect()
        });
        let all = decode(&gathered, self.world.size).ok_or_else(|| {
            mismatch("a change of the process sets came in a form that this version does not know".to_owned())
        })?;
        let due = due(&all)?;
        // In the order of submission, which is that of agreement too: so the numbers of new sets follow it.
        let handles: Result<Vec<u64>> = due.iter().map(|change| self.submit_change(change)).collect();
        let mut done = Vec::new();
        for (change, handle) in due.into_iter().zip(handles?) {
            let Waited::Done(result, _) = self.driver.wait(handle, None)? else {
                unreachable!("a wait without limit ends with an outcome")
            };
            let Some(id) = result?.set else { continue };
            match change.what {
                What::Add => self.know_set(id, change.ranks.clone()),
                What::Remove(_) => self.forget_set(id),
            }
            if mine.changes.contains(&change) {
                done.push((change, id));
            } else {
                self.owe(change, id, &all);
            }
        }
        Ok(done)
    }

    fn owe(&self, change: Change, id: SetId, all: &[Asked]) {
        let mut state = lock(&self.changes.state);
        if !state.owed.is_empty() {
            let by = all.iter().find(|asked| asked.changes.contains(&change)).map_or(Rank(0), |a| a.rank);
            log::warn(format_args!(
                "{by} has {} the process set of {}, and this rank has not yet, nor {} other such calls; every rank \
                 adds and removes the same sets",
                if change.what == What::Add { "added" } else { "removed" },
                rank_list(&change.ranks),
                state.owed.len(),
            ));
        }
        if state.owed.len() == OWED_MAX {
            state.owed.pop_front();
        }
        state.owed.push_back(Owed { change, id });
        drop(state);
        self.changes.moved.notify_all();
    }

    /// Submits what this rank brings to the next round. The words must live until the outcome.
    fn submit_round(&self, words: &[u32], refused: Option<&str>) -> Result<u64> {
        let everybody = self.set(GLOBAL_SET)?;
        let shape = [words.len() as u64];
        let tensor = TensorArg {
            input: words.as_ptr().cast(),
            output: std::ptr::null_mut(),
            dtype: DType::U32,
            shape: &shape,
        };
        let request =
            Request { collective: Collective::Allgather, tensors: &[tensor], refused, ..Request::default() };
        let turn = self.next_round();
        self.driver.submit(None, refused.is_none(), |submitted| {
            submitted.refused = request::fill(&request, &everybody, submitted).err();
            submitted.name.clear();
            // For whoever reads that it stalls.
            submitted.name.push_str(&format!("add_process_set or remove_process_set (turn {turn})"));
        })
    }

    /// Submits a change that all ranks carry out. Its name is its list of ranks.
    fn submit_change(&self, change: &Change) -> Result<u64> {
        self.driver.submit(None, true, |submitted| {
            submitted.set = GLOBAL_SET;
            submitted.hold = true;
            submitted.refused = None;
            submitted.message = None;
            submitted.call.clear();
            submitted.tensors.clear();
            let signature = &mut submitted.signature;
            signature.collective = change.what.collective();
            signature.tensors.clear();
            signature.ranks.clear();
            signature.ranks.extend_from_slice(&change.ranks);
            signature.root = match change.what {
                What::Add => Rank(0),
                What::Remove(id) => Rank(id.0),
            };
            signature.scale = Default::default();
            signature.op = crate::types::ReduceOp::Sum;
            signature.join_average = Default::default();
            submitted.name.clear();
            push_name(change, &mut submitted.name);
        })
    }
}

enum MyTurn<'a> {
    /// What is asked for was carried out already.
    Paid(SetId),
    /// This thread may begin a round.
    Round(Turn<'a>),
}

/// The right of a thread to begin rounds.
struct Turn<'a> {
    live: &'a Live,
}

impl Turn<'_> {
    /// Takes part in rounds until this change is carried out.
    fn until_done(&self, change: &Change) -> Result<SetId> {
        let rank = Rank(self.live.world.rank);
        let asked = Asked { rank, at_start: false, changes: vec![change.clone()] };
        loop {
            let done = self.live.round(&asked)?;
            if let Some((_, id)) = done.into_iter().find(|(done, _)| done == change) {
                return Ok(id);
            }
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.live.changes.state).in_round = false;
        self.live.changes.moved.notify_all();
    }
}

/// What a round carries out, in order: the same on every rank.
fn due(all: &[Asked]) -> Result<Vec<Change>> {
    if all.iter().any(|asked| asked.at_start) {
        check_first_sets(all)?;
    }
    let mut changes: Vec<&Change> = Vec::new();
    for change in all.iter().flat_map(|asked| &asked.changes) {
        if !changes.contains(&change) {
            changes.push(change);
        }
    }
    for (place, a) in changes.iter().enumerate() {
        if let Some(b) = changes[place + 1..]
            .iter()
            .find(|b| b.ranks == a.ranks && (a.what == What::Add) != (b.what == What::Add))
        {
            return Err(contradiction(all, a, b));
        }
    }
    let by_all = |change: &Change| all.iter().all(|asked| asked.changes.contains(change));
    let ready: Vec<Change> = changes
        .iter()
        .filter(|change| change.what == What::Add || by_all(change))
        .map(|&change| change.clone())
        .collect();
    Ok(if ready.is_empty() { changes.into_iter().cloned().collect() } else { ready })
}

fn check_first_sets(all: &[Asked]) -> Result<()> {
    let Some((first, others)) = all.split_first() else { return Ok(()) };
    for other in others {
        let [here, there] = [first, other].map(|asked| {
            let mut lists: Vec<&[Rank]> = asked.changes.iter().map(|change| &change.ranks[..]).collect();
            lists.sort_unstable();
            lists
        });
        if (here == there) && first.at_start == other.at_start {
            continue;
        }
        let place = here.iter().zip(&there).position(|(a, b)| a != b).unwrap_or(here.len().min(there.len()));
        let said = |asked: &Asked, lists: &[&[Rank]]| match lists.get(place) {
            _ if !asked.at_start => format!("{} gave none and comes with a later change", asked.rank),
            Some(list) => format!("{} gave {} ({} in all)", asked.rank, rank_list(list), list.len()),
            None => format!("{} gave no more than {}", asked.rank, lists.len()),
        };
        return Err(mismatch(format!(
            "the process sets given to init do not match: {}, {}; every rank must give the same list of ranks",
            said(first, &here),
            said(other, &there)
        )));
    }
    Ok(())
}

/// One rank adds the set that another removes.
fn contradiction(all: &[Asked], a: &Change, b: &Change) -> Error {
    let by = |change: &Change| {
        let asked = all.iter().find(|asked| asked.changes.contains(change));
        asked.map_or(Rank(0), |asked| asked.rank)
    };
    mismatch(format!(
        "the change of the process set of {} does not match: {} submitted the collective {}, {} submitted the \
         collective {}; every rank must do the same",
        rank_list(&a.ranks),
        by(a),
        a.what.collective(),
        by(b),
        b.what.collective()
    ))
}

fn mismatch(message: String) -> Error {
    Error::Mismatch(Arc::new(Mismatch { tensor: "process sets".to_owned(), message }))
}

/// Three words of head, then for each change the number of the set to remove (0: a set is added), the length of its
/// list, and the list.
fn encode(asked: &Asked) -> Vec<u32> {
    let mut words = vec![asked.rank.0, u32::from(asked.at_start), asked.changes.len() as u32];
    for change in &asked.changes {
        let removed = match change.what {
            What::Add => GLOBAL_SET,
            What::Remove(id) => id,
        };
        words.extend([removed.0, change.ranks.len() as u32]);
        words.extend(change.ranks.iter().map(|rank| rank.0));
    }
    words
}

/// Reads what the ranks brought, in their order; ranks that have joined bring nothing.
fn decode(mut words: &[u32], size: u32) -> Option<Vec<Asked>> {
    let mut all: Vec<Asked> = Vec::new();
    while !words.is_empty() {
        let (&[rank, at_start, count], rest) = words.split_first_chunk::<3>()?;
        words = rest;
        if rank >= size || at_start > 1 || all.last().is_some_and(|last| last.rank.0 >= rank) {
            return None;
        }
        let mut changes = Vec::new();
        for _ in 0..count {
            let (&[removed, length], rest) = words.split_first_chunk::<2>()?;
            let (list, rest) = rest.split_at_checked(length as usize)?;
            words = rest;
            let ascends = list.windows(2).all(|pair| pair[0] < pair[1]);
            if !ascends || list.last().is_none_or(|&last| last >= size) {
                return None;
            }
            let what = if SetId(removed) == GLOBAL_SET { What::Add } else { What::Remove(SetId(removed)) };
            changes.push(Change { what, ranks: list.iter().map(|&rank| Rank(rank)).collect() });
        }
        all.push(Asked { rank: Rank(rank), at_start: at_start == 1, changes });
    }
    Some(all)
}

/// The name of a change: its ranks, as far as they are no more than a name may hold, and a number made of all; and which
/// set is removed.
fn push_name(change: &Change, into: &mut String) {
    let hash = change.ranks.iter().fold(0xCBF2_9CE4_8422_2325_u64, |hash, rank| {
        (hash ^ u64::from(rank.0)).wrapping_mul(0x0000_0100_0000_01B3)
    });
    into.push_str(&format!("process set of {} ({hash:016x})", rank_list(&change.ranks)));
    if let What::Remove(id) = change.what {
        into.push_str(&format!(" as number {}", id.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(ranks: &[u32]) -> Change {
        Change { what: What::Add, ranks: ranks.iter().map(|&rank| Rank(rank)).collect() }
    }

    fn remove(id: u32, ranks: &[u32]) -> Change {
        Change { what: What::Remove(SetId(id)), ..add(ranks) }
    }

    fn asked(rank: u32, changes: &[&Change]) -> Asked {
        Asked { rank: Rank(rank), at_start: false, changes: changes.iter().copied().cloned().collect() }
    }

    #[test]
    fn additions_are_carried_out_in_whatever_order_ranks_ask_for_them() {
        let (a, b) = (add(&[0, 1]), add(&[1, 2]));
        let all = [asked(0, &[&a]), asked(1, &[&b]), asked(2, &[&a])];
        assert_eq!(due(&all), Ok(vec![a, b]));
    }

    #[test]
    fn a_removal_waits_for_those_who_may_use_the_set_unless_all_wait() {
        let (gone, other, new) = (remove(1, &[0, 1]), remove(2, &[1, 2]), add(&[2]));
        let all = [asked(0, &[&gone]), asked(1, &[&new])];
        assert_eq!(due(&all), Ok(vec![new]));
        let all = [asked(0, &[&gone]), asked(1, &[&gone])];
        assert_eq!(due(&all), Ok(vec![gone.clone()]));
        let all = [asked(0, &[&gone]), asked(1, &[&other])];
        assert_eq!(due(&all), Ok(vec![gone, other]), "nobody would ever go on");
        let (first, twin) = (remove(1, &[0, 1]), remove(5, &[0, 1]));
        let all = [asked(0, &[&first, &twin]), asked(1, &[&twin, &first])];
        assert_eq!(due(&all), Ok(vec![first, twin]), "two sets of the same ranks are two sets");
    }

    #[test]
    fn what_contradicts_is_a_mismatch_that_names_both() {
        let all = [asked(0, &[&add(&[0, 1])]), asked(3, &[&remove(1, &[0, 1])])];
        let words = due(&all).unwrap_err().to_string();
        assert!(words.contains("rank 0 submitted the collective add_process_set"), "{words}");
        assert!(words.contains("rank 3 submitted the collective remove_process_set"), "{words}");
    }

    #[test]
    fn first_sets_are_the_same_in_any_order() {
        let first = |rank, lists: &[&[u32]]| {
            let changes = lists.iter().map(|ranks| add(ranks)).collect();
            Asked { rank: Rank(rank), at_start: true, changes }
        };
        assert_eq!(due(&[first(0, &[&[0], &[1]]), first(1, &[&[1], &[0]])]).unwrap().len(), 2);
        let words = due(&[first(0, &[&[0], &[1]]), first(1, &[&[0], &[0, 1]])]).unwrap_err().to_string();
        assert!(words.contains("rank 0 gave rank 1 (1 in all)"), "{words}");
        assert!(words.contains("rank 1 gave ranks 0, 1 (2 in all)"), "{words}");
        let words = due(&[first(0, &[&[0]]), first(1, &[&[0], &[1]])]).unwrap_err().to_string();
        assert!(words.contains("rank 0 gave no more than 1, rank 1 gave rank 1"), "{words}");
        let words = due(&[first(0, &[&[0]]), asked(1, &[&add(&[0])])]).unwrap_err().to_string();
        assert!(words.contains("rank 1 gave none"), "{words}");
    }

    #[test]
    fn what_ranks_bring_is_read_as_it_was_written_and_nothing_else() {
        let all = vec![asked(0, &[&add(&[0, 2]), &remove(7, &[1])]), asked(2, &[]), asked(3, &[])];
        let words: Vec<u32> = all.iter().flat_map(encode).collect();
        assert_eq!(decode(&words, 4), Some(all));
        assert_eq!(decode(&[], 4), Some(Vec::new()));
        for end in 1..words.len() {
            // Cut at the end of a rank's words it is what fewer ranks bring.
            let whole = [encode(&asked(0, &[])).len() + 7, words.len() - 3].contains(&end);
            assert_eq!(decode(&words[..end], 4).is_some(), whole, "cut at {end}");
        }
        assert_eq!(decode(&words, 3), None, "rank 3 of 3");
        assert_eq!(decode(&[0, 0, 1, 0, u32::MAX], 4), None, "a list longer than the message");
        assert_eq!(decode(&[0, 0, 1, 0, 2, 1, 1], 4), None, "a rank twice");
        assert_eq!(decode(&[1, 0, 0, 1, 0, 0], 4), None, "the same rank again");
    }

    #[test]
    fn the_name_of_a_change_is_its_list() {
        let name = |ranks: &[u32]| {
            let mut name = String::new();
            push_name(&add(ranks), &mut name);
            name
        };
        assert_eq!(name(&[0, 1]), name(&[0, 1]));
        assert_ne!(name(&[0, 1]), name(&[1, 2]));
        let many: Vec<u32> = (0..60_000).collect();
        assert!(name(&many).len() < crate::limits::NAME_BYTES_MAX);
        assert_ne!(name(&many), name(&many[..59_999]));
    }
}
