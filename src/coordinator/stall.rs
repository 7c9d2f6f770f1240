//! Stalls: an operation that some members have submitted and others have not.
//!
//! A mark rises only when its whole subtree has it, so the root may not know of a name that stalls. A node
//! whose subtree is incomplete for too long says `Overdue`; the root then asks every subtree without a mark
//! (`Query`), gathers who is missing (`Report`), warns or ends the epoch, and tells all (`Stalled`), so that
//! every member can explain what it waits for.
#![forbid(unsafe_code)]

use super::{Coordinator, Intent, OpId, Rules, misbehaved, mismatch, shown};
use crate::error::Cause;
use crate::limits::IN_FLIGHT_MAX;
use crate::types::{Member, Rank, Time};
use crate::wire::Reader;
use crate::wire::agreement::{self as wire, Kind};
use crate::wire::cursor::Members;

/// Names asked about (and warned of) at one time: when a rank is stuck, a thousand names say no more than these.
const QUERIES_MAX: usize = 16;
const SECOND_NS: u64 = 1_000_000_000;

/// What is known of stalls.
#[derive(Debug, Default)]
pub(super) struct Stall {
    /// When to look.
    pub check_at: Option<Time>,
    /// Questions under way.
    pub queries: Vec<Query>,
    next_query: u32,
    broken: bool,
}

#[derive(Debug)]
pub(super) struct Query {
    number: u32,
    name: String,
    awaiting: u32,
    missing: Vec<Member>,
}

impl Stall {
    /// The name has been cut: answers come too late.
    pub(super) fn forget(&mut self, name: &str) {
        self.queries.retain(|query| query.name != name);
    }
}

/// When a name first seen at `since` is to be looked at.
pub(super) fn first_check(rules: &Rules, since: Time) -> Option<Time> {
    let limits = [rules.stall_warn_ns, rules.stall_fail_ns];
    limits.into_iter().filter(|&ns| ns > 0).min().map(|ns| since.after_ns(ns))
}

fn next_check(rules: &Rules, since: Time, now: Time) -> Time {
    let period =
        [rules.stall_warn_ns, rules.stall_fail_ns].into_iter().find(|&ns| ns > 0).unwrap_or(SECOND_NS);
    let fail_at = since.after_ns(rules.stall_fail_ns);
    let next = now.after_ns(period);
    if rules.stall_fail_ns > 0 && fail_at > now { next.min(fail_at) } else { next }
}

impl Coordinator {
    /// Looks for names that wait too long.
    pub(super) fn check_stalls(&mut self, now: Time) {
        if self.stall.check_at.is_none_or(|at| at > now) {
            return;
        }
        self.stall.check_at = None;
        for row in 0..self.table.rows.len() as u32 {
            let it = &self.table.rows[row as usize];
            // Calls of the engine itself wait as long as they must.
            if !it.in_flight || it.mark.complete || it.name.starts_with(super::ENGINE_NAMES) {
                continue;
            }
            if it.mark.check_at <= now {
                let (name, since) = (it.name.clone(), it.mark.since);
                self.table.row(row).mark.check_at = next_check(&self.setup.rules, since, now);
                match self.tree.parent {
                    None => self.ask(&name, now),
                    Some(parent) => self.say_overdue(parent, &name, now.since(since)),
                }
            }
            let at = self.table.rows[row as usize].mark.check_at;
            self.stall.check_at = Some(self.stall.check_at.map_or(at, |other| other.min(at)));
        }
    }

    fn say_overdue(&mut self, parent: Member, name: &str, age_ns: u64) {
        let mut item = Vec::new();
        wire::put_overdue(&mut item, name, age_ns);
        self.tell(parent, Kind::Up, 0, &item);
    }

    pub(super) fn take_overdue(&mut self, name: &str, age_ns: u64, now: Time) {
        if let Some(parent) = self.tree.parent {
            self.say_overdue(parent, name, age_ns);
            return;
        }
        if self.table.find(name).is_none() && self.table.rows.len() >= 2 * IN_FLIGHT_MAX {
            return;
        }
        let row = self.table.open(name);
        let mark_since = Time(now.0.saturating_sub(age_ns));
        let row = self.table.row(row);
        if row.mark.complete {
            return;
        }
        if !row.in_flight {
            row.in_flight = true;
            row.mark.since = mark_since;
            row.mark.check_at = now;
        }
        if mark_since < row.mark.since {
            row.mark.since = mark_since;
            if let Some(first) = first_check(&self.setup.rules, mark_since) {
                row.mark.check_at = row.mark.check_at.min(first.max(now));
            }
        }
        let at = row.mark.check_at;
        self.stall.check_at = Some(self.stall.check_at.map_or(at, |other| other.min(at)));
        self.check_stalls(now);
    }

    /// At the root: begins to ask who is missing.
    fn ask(&mut self, name: &str, now: Time) {
        if self.stall.broken || self.stall.queries.len() >= QUERIES_MAX {
            return;
        }
        self.stall.forget(name);
        let number = self.stall.next_query;
        self.stall.next_query = number.wrapping_add(1);
        self.begin_query(number, name, now);
    }

    pub(super) fn take_query(&mut self, payload: &[u8], now: Time) -> Result<(), Cause> {
        let (number, name) = wire::query(&mut Reader::new(payload))?;
        if self.stall.queries.len() >= QUERIES_MAX {
            // The root asks again after each period; what is older than its last questions is void.
            self.stall.queries.remove(0);
        }
        self.stall.forget(name);
        self.begin_query(number, name, now);
        Ok(())
    }

    fn begin_query(&mut self, number: u32, name: &str, now: Time) {
        let row = self.table.find(name).map(|row| &self.table.rows[row as usize]);
        let marked = row.filter(|row| row.in_flight).map_or(0, |row| row.mark.marked);
        let mut query = Query { number, name: name.to_owned(), awaiting: 0, missing: Vec::new() };
        let mut question = Vec::new();
        wire::put_query(&mut question, number, name);
        for source in 0..self.tree.subtree.len() {
            if marked & 1 << source != 0 || self.all_joined(source) {
                continue;
            }
            if source == 0 {
                query.missing.push(self.setup.me);
            } else {
                query.awaiting |= 1 << source;
                self.tell(self.tree.children[source - 1], Kind::Query, 0, &question);
            }
        }
        self.stall.queries.push(query);
        self.settle(now);
    }

    pub(super) fn take_report(
        &mut self,
        source: usize,
        number: u32,
        missing: Members<'_>,
        now: Time,
    ) -> Result<(), Cause> {
        for member in missing.iter() {
            self.belongs(source, member)?;
        }
        let mut queries = self.stall.queries.iter_mut();
        // An answer to a question about a name that has been cut since is void.
        if let Some(query) = queries.find(|query| query.number == number && query.awaiting & 1 << source != 0)
        {
            query.awaiting &= !(1 << source);
            query.missing.extend(missing.iter());
            self.settle(now);
        }
        Ok(())
    }

    fn settle(&mut self, now: Time) {
        while let Some(at) = self.stall.queries.iter().position(|query| query.awaiting == 0) {
            let mut query = self.stall.queries.remove(at);
            query.missing.sort_unstable();
            match self.tree.parent {
                Some(parent) => {
                    let mut item = Vec::new();
                    wire::put_report(&mut item, query.number, &query.missing);
                    self.tell(parent, Kind::Up, 0, &item);
                }
                None => self.conclude(query, now),
            }
        }
    }

    fn conclude(&mut self, query: Query, now: Time) {
        let Some(row) = self.table.find(&query.name) else { return };
        let since = self.table.rows[row as usize].mark.since;
        let (age, rules) = (now.since(since), self.setup.rules);
        if query.missing.is_empty() {
            return;
        }
        let missing: Vec<Rank> = self.ranks_of(&query.missing);
        let passed = |limit: u64| limit > 0 && age >= limit;
        if passed(rules.stall_fail_ns) {
            self.stall.broken = true;
            self.intents.push_back(Intent::Break(
                None,
                Cause::Stalled { tensor: shown(&query.name).to_owned(), missing },
            ));
        } else if passed(rules.stall_warn_ns) {
            self.intents.push_back(Intent::Warn(stalled(shown(&query.name), age, &missing)));
            let mut notice = Vec::new();
            wire::put_stalled(&mut notice, &query.name, age, &query.missing);
            self.tell_children(Kind::Stalled, 0, &notice);
            self.table.row(row).mark.stall = Some((since, query.missing));
        }
    }

    pub(super) fn take_stalled(&mut self, payload: &[u8], now: Time) -> Result<(), Cause> {
        let (name, age_ns, missing) = wire::stalled(&mut Reader::new(payload))?;
        self.tell_children(Kind::Stalled, 0, payload);
        let missing: Vec<Member> = missing.iter().collect();
        if missing.last().is_some_and(|last| last.0 as usize >= self.setup.ranks.len()) {
            return Err(misbehaved("a rank outside the process set"));
        }
        if let Some(row) = self.table.find(name).filter(|&row| self.table.rows[row as usize].in_flight) {
            self.table.row(row).mark.stall = Some((Time(now.0.saturating_sub(age_ns)), missing));
        }
        Ok(())
    }

    /// What an operation waits for, in words.
    #[must_use]
    pub fn explain(&self, op: OpId, now: Time) -> String {
        if self.join.op == Some(op) {
            let joined: usize = self.join.count.iter().sum();
            let (known, all) =
                (self.tree.subtree.iter().map(Vec::len).sum::<usize>(), self.setup.ranks.len());
            return format!(
                "join waits for the other ranks: {joined} of the {known} known here, of {all}, have joined"
            );
        }
        let Some(row) = self.ops.get(&op).map(|&row| &self.table.rows[row as usize]) else {
            return "it is not in agreement: it has been agreed, or was never submitted".to_owned();
        };
        let (name, mark) = (shown(&row.name), &row.mark);
        if mark.op != Some(op) {
            return format!("held back until the former operation of the name '{name}' has completed");
        }
        if let Some((since, missing)) = &mark.stall {
            let ranks = mismatch::rank_list(&self.ranks_of(missing));
            return format!("waiting for {ranks} on {name} since {} s", now.since(*since) / SECOND_NS);
        }
        let seconds = now.since(mark.since) / SECOND_NS;
        if mark.complete {
            return match self.tree.parent {
                Some(parent) => format!(
                    "waiting for the agreement on {name} since {seconds} s; ready here and below, told or to be told to {}",
                    self.setup.ranks[parent.0 as usize]
                ),
                None => format!("{name} is ready on all ranks and goes with the next cut"),
            };
        }
        let silent: Vec<Member> = (0..self.tree.subtree.len())
            .filter(|source| mark.marked & 1 << source == 0 && !self.all_joined(*source))
            .flat_map(|source| self.tree.subtree[source].iter().copied())
            .collect();
        let ranks = mismatch::rank_list(&self.ranks_of(&silent));
        let some = if silent.len() > 1 { "some of " } else { "" };
        format!("waiting for {some}{ranks} on {name} since {seconds} s")
    }

    fn ranks_of(&self, members: &[Member]) -> Vec<Rank> {
        members.iter().map(|member| self.setup.ranks[member.0 as usize]).collect()
    }
}

/// The warning that an operation waits since `age_ns` for ranks that have not submitted it.
#[must_use]
pub fn stalled(name: &str, age_ns: u64, missing: &[Rank]) -> String {
    format!(
        "'{name}' waits since {} s for {}, which have not submitted it; look whether those ranks run the same program on \
         the same branch, or are stuck",
        age_ns / SECOND_NS,
        mismatch::rank_list(missing)
    )
}
