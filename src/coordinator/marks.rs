//! Marks: taken from this member and from its children, merged, passed up.
#![forbid(unsafe_code)]

use super::stall::first_check;
use super::table::{Mark, Passed};
use super::{Coordinator, PAYLOAD_BYTES_MAX, Submission, misbehaved};
use crate::error::Cause;
use crate::limits::{CACHE_KEYS_MAX, IN_FLIGHT_MAX};
use crate::types::{Member, SharedSignature, Signature, TensorKey, Time};
use crate::wire::Reader;
use crate::wire::agreement::{self as wire, Kind, RENAMED, Rows, URGENT, UpItem};
use crate::wire::cursor::{Members, put_members, put_varint};
use crate::wire::signature::fits;
use std::sync::Arc;

impl Coordinator {
    /// Marks a name for an operation submitted here.
    pub(super) fn mark_own(&mut self, row: u32, submission: &Submission<'_>, now: Time) {
        let cached = self.table.key_of(row, submission.signature).map(|(_, signature)| signature.clone());
        let signature = cached.unwrap_or_else(|| {
            assert_eq!(
                fits(submission.signature),
                Ok(()),
                "the engine announces what does not fit as refused"
            );
            Arc::new(submission.signature.clone())
        });
        let me = self.setup.me;
        self.ops.insert(submission.op, row);
        self.begin(row, now);
        let mark = &mut self.table.row(row).mark;
        assert!(mark.op.is_none() && !mark.complete);
        mark.op = Some(submission.op);
        mark.marked |= 1;
        self.marked_by[0] += 1;
        mark.say(me, &signature, submission.call.len());
        if let Some(reason) = submission.refused {
            mark.refuse(me, reason);
            mark.refused_here = true;
        }
        if !submission.call.is_empty() {
            mark.call.push((me, mark.values.len() as u32));
            mark.values.extend_from_slice(submission.call);
        }
        self.evaluate(row, now);
    }

    /// This member joins.
    pub(super) fn join_now(&mut self, now: Time) {
        self.join.behind_held = false;
        self.note_join(self.setup.me);
        self.evaluate_all(now);
        self.flush(true, now);
    }

    fn note_join(&mut self, member: Member) {
        let source = self.tree.source_of(member).expect("checked by the caller");
        self.join.has[member.0 as usize] = true;
        self.join.count[source] += 1;
        self.join.last = member;
        self.join.outbox.push(member);
    }

    fn begin(&mut self, row: u32, now: Time) {
        let check_at = first_check(&self.setup.rules, now);
        let row = self.table.row(row);
        if !row.in_flight {
            row.in_flight = true;
            row.mark.since = now;
            if let Some(at) = check_at {
                row.mark.check_at = at;
                // It may be early by what has completed since; then the check finds nothing.
                self.stall.check_at = Some(self.stall.check_at.map_or(at, |other| other.min(at)));
            }
        }
    }

    /// Whether all members of a source have joined.
    pub(super) fn all_joined(&self, source: usize) -> bool {
        self.join.count[source] == self.tree.subtree[source].len()
    }

    /// Puts a name into the outbox if every source has marked it or joined.
    fn evaluate(&mut self, row: u32, now: Time) {
        let mark = &self.table.rows[row as usize].mark;
        let sources = self.tree.subtree.len();
        let all = u32::MAX >> (32 - sources as u32);
        if mark.complete || mark.marked == 0 {
            return;
        }
        if mark.marked != all {
            let waits = |source: &usize| mark.marked & 1 << source == 0 && !self.all_joined(*source);
            if (0..sources).any(|source| waits(&source)) {
                return;
            }
        }
        let tree = &self.tree;
        let mark = &mut self.table.rows[row as usize].mark;
        for source in (0..sources).filter(|source| mark.marked & 1 << source == 0) {
            mark.absent.extend_from_slice(&tree.subtree[source]);
        }
        mark.absent.sort_unstable();
        mark.complete = true;
        self.outbox_bytes = self.outbox_bytes.saturating_add(bytes_of(mark));
        self.outbox.push(row);
        if self.window_ends.is_none() {
            self.window_ends = Some(now.after_ns(self.setup.rules.window_ns));
        }
    }

    fn evaluate_all(&mut self, now: Time) {
        for row in 0..self.table.rows.len() as u32 {
            if self.table.rows[row as usize].in_flight {
                self.evaluate(row, now);
            }
        }
    }

    /// Takes marks from a child.
    pub(super) fn take_up(
        &mut self,
        source: usize,
        flags: u8,
        payload: &[u8],
        now: Time,
    ) -> Result<(), Cause> {
        let before = self.outbox.len();
        let joins = self.join.outbox.len();
        let mut evicted = std::mem::take(&mut self.spare.keys);
        evicted.clear();
        let mut reader = Reader::new(payload);
        while let Some(item) = wire::up_item(&mut reader)? {
            self.take_up_item(source, item, &mut evicted, now)?;
        }
        if !evicted.is_empty() {
            let mut nack = Vec::new();
            evicted.iter().for_each(|key| put_varint(&mut nack, u64::from(key.0)));
            self.join.nacked[source] += 1;
            self.tell(self.tree.children[source - 1], Kind::Nack, 0, &nack);
        }
        self.spare.keys = evicted;
        if flags & RENAMED != 0 {
            self.take_answer(source, now)?;
        }
        if self.outbox.len() > before || self.join.outbox.len() > joins || flags & URGENT != 0 {
            self.flush(flags & URGENT != 0, now);
        }
        Ok(())
    }

    fn take_up_item(
        &mut self,
        source: usize,
        item: UpItem<'_>,
        evicted: &mut Vec<TensorKey>,
        now: Time,
    ) -> Result<(), Cause> {
        match item {
            UpItem::ReadyRange { first, count } => {
                for key in first.0..first.0 + count {
                    self.take_ready(source, TensorKey(key), Members::NONE, Rows::NONE, evicted, now)?;
                }
                Ok(())
            }
            UpItem::Ready { key, absent, call } => self.take_ready(source, key, absent, call, evicted, now),
            UpItem::Announce { name, first, second, refused, absent, call } => {
                let agrees = second.is_none() && refused.is_none();
                if call.width != if agrees { first.width } else { 0 } {
                    return Err(misbehaved("call data of another width than announced"));
                }
                let row = self.table.open(name);
                self.begin(row, now);
                for said in [Some(first), second].into_iter().flatten() {
                    self.belongs(source, said.member)?;
                    let cached = self.table.key_of(row, &said.signature).map(|(_, s)| s.clone());
                    let signature = cached.unwrap_or_else(|| Arc::new(said.signature));
                    self.table.row(row).mark.say(said.member, &signature, said.width);
                }
                if let Some((member, reason)) = refused {
                    self.belongs(source, member)?;
                    self.table.row(row).mark.refuse(member, reason);
                }
                self.take_mark(source, row, absent, call, now)
            }
            UpItem::Joined { members } => {
                for member in members.iter() {
                    self.belongs(source, member)?;
                    if self.join.has[member.0 as usize] || self.join.behind_nacked.contains(&member) {
                        return Err(misbehaved("a second join of one rank"));
                    }
                    match self.join.nacked[source] == 0 && evicted.is_empty() {
                        true => self.note_join(member),
                        false => self.join.behind_nacked.push(member),
                    }
                }
                if self.all_joined(source) {
                    self.evaluate_all(now);
                }
                Ok(())
            }
            UpItem::Overdue { name, age_ns } => {
                self.take_overdue(name, age_ns, now);
                Ok(())
            }
            UpItem::Report { query, missing } => self.take_report(source, query, missing, now),
        }
    }

    /// A child has announced by name what had been refused: now it may have joined.
    fn take_answer(&mut self, source: usize, now: Time) -> Result<(), Cause> {
        if self.join.nacked[source] == 0 {
            return Err(misbehaved("an answer to nothing"));
        }
        self.join.nacked[source] -= 1;
        if self.join.nacked[source] > 0 || self.join.behind_nacked.is_empty() {
            return Ok(());
        }
        let waiting = std::mem::take(&mut self.join.behind_nacked);
        let (ready, rest) =
            waiting.into_iter().partition(|&member| self.tree.source_of(member) == Some(source));
        self.join.behind_nacked = rest;
        let ready: Vec<Member> = ready;
        ready.into_iter().for_each(|member| self.note_join(member));
        if self.all_joined(source) {
            self.evaluate_all(now);
        }
        Ok(())
    }

    fn take_ready(
        &mut self,
        source: usize,
        key: TensorKey,
        absent: Members<'_>,
        call: Rows<'_>,
        evicted: &mut Vec<TensorKey>,
        now: Time,
    ) -> Result<(), Cause> {
        let Some((row, signature)) = self.table.of_key(key) else {
            if !self.table.was_given(key) || evicted.len() >= CACHE_KEYS_MAX {
                return Err(misbehaved("a mark for a key that was never given"));
            }
            evicted.push(key);
            return Ok(());
        };
        // The lowest member that is not absent speaks; both lists ascend.
        let mut away = absent.iter().peekable();
        let speaker = self.tree.subtree[source].iter().find(|&&member| away.next_if_eq(&member).is_none());
        let Some(&speaker) = speaker else {
            return Err(misbehaved("a mark of nobody"));
        };
        // Mostly a lower member has said the same, and there is nothing to add.
        let known = self.table.rows[row as usize].mark.first.as_ref().is_some_and(|first| {
            first.member < speaker && first.width == call.width && Arc::ptr_eq(&first.signature, signature)
        });
        let signature: Option<SharedSignature> = (!known).then(|| signature.clone());
        self.begin(row, now);
        if let Some(signature) = signature {
            self.table.row(row).mark.say(speaker, &signature, call.width);
        }
        self.take_mark(source, row, absent, call, now)
    }

    fn take_mark(
        &mut self,
        source: usize,
        row: u32,
        absent: Members<'_>,
        call: Rows<'_>,
        now: Time,
    ) -> Result<(), Cause> {
        let members = self.tree.subtree[source].len();
        if self.table.rows[row as usize].mark.marked & 1 << source != 0 || self.all_joined(source) {
            return Err(misbehaved("a second mark of one operation"));
        }
        if self.marked_by[source] >= IN_FLIGHT_MAX {
            return Err(misbehaved("more than IN_FLIGHT_MAX operations in flight"));
        }
        for member in absent.iter() {
            self.belongs(source, member)?;
        }
        if call.width.saturating_mul(self.setup.ranks.len()) > wire::CALL_VALUES_MAX
            || (call.width > 0 && call.len() + absent.len() != members)
        {
            return Err(misbehaved("call data of too few or too many ranks"));
        }
        let (tree, mark) = (&self.tree, &mut self.table.rows[row as usize].mark);
        mark.absent.extend(absent.iter());
        let (mut stranger, start) = (false, mark.call.len());
        let (rows, values) = (&mut mark.call, &mut mark.values);
        call.for_each(|member, index, value| {
            if index == 0 {
                stranger |= tree.source_of(member) != Some(source);
                rows.push((member, values.len() as u32));
            }
            values.push(value);
        });
        if stranger || absent.iter().any(|a| rows[start..].binary_search_by_key(&a, |r| r.0).is_ok()) {
            return Err(misbehaved("call data of a rank that did not send it"));
        }
        mark.marked |= 1 << source;
        self.marked_by[source] += 1;
        self.evaluate(row, now);
        Ok(())
    }

    pub(super) fn belongs(&self, source: usize, member: Member) -> Result<(), Cause> {
        if self.tree.source_of(member) == Some(source) {
            Ok(())
        } else {
            Err(misbehaved("a word of a rank for which the sender does not speak"))
        }
    }

    /// The parent had evicted these keys: announce by name.
    pub(super) fn take_nack(&mut self, payload: &[u8], now: Time) -> Result<(), Cause> {
        let mut reader = Reader::new(payload);
        let mut keys = Vec::new();
        while reader.remaining() > 0 {
            keys.push(TensorKey(reader.varint_u32()?));
        }
        keys.sort_unstable();
        let mut found = 0;
        for (at, row) in self.table.rows.iter_mut().enumerate() {
            if let Passed::Key(key) = row.mark.passed
                && row.in_flight
                && keys.binary_search(&key).is_ok()
            {
                row.mark.passed = Passed::No;
                self.outbox.push(at as u32);
                found += 1;
            }
        }
        if found != keys.len() {
            return Err(misbehaved("a refusal of a key that was not sent"));
        }
        self.renames = true;
        self.flush(true, now);
        Ok(())
    }

    /// Passes on what is complete: up, or at the root into the log.
    pub(super) fn flush(&mut self, urgent: bool, now: Time) {
        self.window_ends = None;
        self.outbox_bytes = 0;
        if self.outbox.is_empty() && self.join.outbox.is_empty() {
            return;
        }
        match self.tree.parent {
            None => self.cut(now),
            Some(parent) => self.send_up(parent, urgent),
        }
    }

    fn send_up(&mut self, parent: Member, urgent: bool) {
        let flags = if urgent { URGENT } else { 0 };
        let mut payload = std::mem::take(&mut self.spare.payload);
        let mut outbox = std::mem::take(&mut self.outbox);
        payload.clear();
        self.take_plain(&mut outbox, &mut payload, true);
        for &row in &outbox {
            let start = payload.len();
            self.put_mark(row, &mut payload);
            if payload.len() > PAYLOAD_BYTES_MAX && start > 0 {
                self.tell(parent, Kind::Up, flags, &payload[..start]);
                payload.drain(..start);
            }
        }
        // After the marks: whoever has joined counts as absent for what has not been marked before.
        let joins = std::mem::take(&mut self.join.outbox);
        for member in &joins {
            wire::put_joined(&mut payload, std::slice::from_ref(member));
        }
        let answers = if std::mem::take(&mut self.renames) { RENAMED } else { 0 };
        self.tell(parent, Kind::Up, flags | answers, &payload);
        outbox.clear();
        self.outbox = outbox;
        self.join.outbox = joins;
        self.join.outbox.clear();
        self.spare.payload = payload;
    }

    /// Takes from `outbox` the names that are just keys, and writes them as ranges. In order of their keys:
    /// what is ready together runs together, and the same set of keys has the same order in each step.
    pub(super) fn take_plain(&mut self, outbox: &mut Vec<u32>, payload: &mut Vec<u8>, passed: bool) {
        let mut keys = std::mem::take(&mut self.spare.keys);
        keys.clear();
        let table = &mut self.table;
        outbox.retain(|&row| {
            let mark = &table.rows[row as usize].mark;
            if !mark.agrees() || !mark.absent.is_empty() || mark.width() > 0 {
                return true;
            }
            let first = mark.first.as_ref().expect("a mark that agrees has a word");
            let Some((key, _)) = table.key_of(row, &first.signature) else {
                return true;
            };
            if passed {
                table.row(row).mark.passed = Passed::Key(key);
            }
            keys.push(key);
            false
        });
        keys.sort_unstable();
        for run in keys.chunk_by(|a, b| a.0 + 1 == b.0) {
            wire::put_range(payload, run[0], run.len() as u32);
        }
        self.spare.keys = keys;
    }

    fn put_mark(&mut self, row: u32, payload: &mut Vec<u8>) {
        let it = &self.table.rows[row as usize];
        let first = it.mark.first.as_ref().expect("a complete mark has a word");
        let key =
            if it.mark.agrees() { self.table.key_of(row, &first.signature).map(|(k, _)| k) } else { None };
        match key {
            Some(key) => wire::put_ready(payload, key),
            None => {
                let second =
                    it.mark.second.as_ref().map(|s| (s.member, &*s.signature as &Signature, s.width));
                let refused = it.mark.refused.as_ref().map(|(member, reason)| (*member, reason.as_str()));
                wire::put_announce(
                    payload,
                    &it.name,
                    (first.member, &first.signature, first.width),
                    second,
                    refused,
                );
            }
        }
        let mark = &mut self.table.row(row).mark;
        mark.passed = key.map_or(Passed::Name, Passed::Key);
        put_members(payload, &mark.absent);
        put_call(mark, payload);
    }
}

/// Writes the call data of a mark. Where members differ or refuse, none: the operation will not run.
pub(super) fn put_call(mark: &mut Mark, payload: &mut Vec<u8>) {
    let width = if mark.agrees() { mark.width() } else { 0 };
    mark.call.sort_unstable();
    let (call, values) = (&mark.call, &mark.values);
    wire::put_rows(payload, width, call.len(), |i| call[i].0, |i, j| values[call[i].1 as usize + j]);
}

/// Bytes of the tensors of a mark, as far as this member knows them.
fn bytes_of(mark: &Mark) -> u64 {
    let Some(first) = &mark.first else { return 0 };
    first.signature.tensors.iter().enumerate().fold(0, |sum, (i, tensor)| {
        let elements = if first.signature.collective.has_free_rows() {
            let rows = mark.values.get(i).copied().unwrap_or(0);
            tensor.row_elements().saturating_mul(rows)
        } else {
            tensor.elements()
        };
        elements.saturating_mul(tensor.dtype.size() as u64).saturating_add(sum)
    })
}
