//! The agreed log: made at the root, applied on every member (the root included) by the same code.
#![forbid(unsafe_code)]

use super::marks::put_call;
use super::table::Passed;
use super::{Agreed, CallTable, Coordinator, Intent, PAYLOAD_BYTES_MAX, Submission, misbehaved, mismatch};
use crate::error::{Cause, Mismatch};
use crate::limits::TENSOR_BYTES_MAX;
use crate::types::{Member, SharedSignature, TensorKey, Time};
use crate::wire::Reader;
use crate::wire::agreement::{self as wire, CutItem, Kind, Rows};
use crate::wire::cursor::{Members, put_members};
use std::sync::Arc;

impl Coordinator {
    /// At the root: orders what is complete, sends it, applies it. Keys come before definitions, because a
    /// definition may evict a key.
    pub(super) fn cut(&mut self, now: Time) {
        let mut payload = std::mem::take(&mut self.spare.payload);
        let mut outbox = std::mem::take(&mut self.outbox);
        self.join.outbox.clear();
        payload.clear();
        payload.extend_from_slice(&self.sequence.to_le_bytes());
        self.take_plain(&mut outbox, &mut payload, false);
        outbox.sort_by_key(|&row| !self.runs_by_key(row));
        for &row in &outbox {
            let start = payload.len();
            self.put_entry(row, &mut payload);
            if payload.len() > PAYLOAD_BYTES_MAX && start > size_of::<u64>() {
                let item = payload.split_off(start);
                self.publish(&payload);
                payload.clear();
                payload.extend_from_slice(&self.sequence.to_le_bytes());
                payload.extend_from_slice(&item);
            }
        }
        if self.join.count.iter().sum::<usize>() == self.setup.ranks.len() {
            wire::put_all_joined(&mut payload, self.join.last);
        }
        if payload.len() > size_of::<u64>() {
            self.publish(&payload);
        }
        outbox.clear();
        // Operations held back may have been marked while the cut was applied.
        outbox.append(&mut self.outbox);
        self.outbox = outbox;
        self.spare.payload = payload;
        self.release_held(now);
    }

    fn runs_by_key(&self, row: u32) -> bool {
        let mark = &self.table.rows[row as usize].mark;
        mark.agrees() && mark.first.as_ref().is_some_and(|f| self.table.key_of(row, &f.signature).is_some())
    }

    fn put_entry(&mut self, row: u32, payload: &mut Vec<u8>) {
        if let Some(message) = self.failure_of(row) {
            wire::put_fail(payload, &self.table.rows[row as usize].name, &message);
            return;
        }
        let it = &self.table.rows[row as usize];
        let signature = &it.mark.first.as_ref().expect("a complete mark has a word").signature;
        match self.table.key_of(row, signature) {
            Some((key, _)) => wire::put_ready(payload, key),
            None => wire::put_define(payload, &it.name, signature),
        }
        put_members(payload, &it.mark.absent);
        put_call(&mut self.table.row(row).mark, payload);
    }

    /// Why a complete name cannot run, in the words that all will report.
    fn failure_of(&self, row: u32) -> Option<String> {
        let it = &self.table.rows[row as usize];
        let ranks = &self.setup.ranks;
        let first = it.mark.first.as_ref().expect("a complete mark has a word");
        if let Some((member, reason)) = &it.mark.refused {
            return Some(mismatch::refusal(&it.name, ranks[member.0 as usize], reason));
        }
        if let Some(second) = &it.mark.second {
            return Some(mismatch::difference(&it.name, ranks, first, second));
        }
        let signature = &*first.signature;
        if signature.collective.has_free_rows() {
            // Each value is bounded, and there are too few of them for their sum to overflow.
            let rows: u64 = it.mark.values.iter().sum();
            let row_bytes = |t: &crate::types::TensorSignature| t.row_elements() * t.dtype.size() as u64;
            let widest = signature.tensors.iter().map(row_bytes).max().unwrap_or(0);
            if rows.checked_mul(widest).is_none_or(|bytes| bytes > TENSOR_BYTES_MAX) {
                return Some(mismatch::too_large(&it.name, signature, rows));
            }
        }
        mismatch::impossible(&it.name, ranks, signature, &it.mark.absent, self.setup.rules.strict_join)
    }

    fn publish(&mut self, payload: &[u8]) {
        self.tell_children(Kind::Cut, 0, payload);
        if let Err(cause) = self.apply(payload) {
            // What the root has written is right, so this is the end of a resource: the keys.
            self.intents.push_back(Intent::Break(None, cause));
        }
    }

    /// Takes a cut from the parent.
    pub(super) fn take_cut(&mut self, payload: &[u8], now: Time) -> Result<(), Cause> {
        self.apply(payload)?;
        self.release_held(now);
        Ok(())
    }

    /// Applies a cut. This is the only place where keys are given and evicted and operations end.
    fn apply(&mut self, payload: &[u8]) -> Result<(), Cause> {
        let mut reader = Reader::new(payload);
        if reader.u64()? != self.sequence {
            return Err(misbehaved("a piece of the agreed log out of order"));
        }
        self.sequence += 1;
        let mut run = self.spare.cuts.pop().unwrap_or_default();
        while let Some(item) = wire::cut_item(&mut reader)? {
            match item {
                CutItem::RunRange { first, count } => {
                    for key in first.0..first.0 + count {
                        self.apply_key(TensorKey(key), Members::NONE, Rows::NONE, &mut run)?;
                    }
                }
                CutItem::Run { key, absent, call } => self.apply_key(key, absent, call, &mut run)?,
                CutItem::Define { name, signature, absent, call } => {
                    let row = self.table.open(name);
                    // Ours is the same, and shared already; a member that joined has none.
                    let first = self.table.rows[row as usize].mark.first.as_ref();
                    let ours =
                        first.map(|f| &f.signature).filter(|ours| super::table::same(ours, &signature));
                    let signature = ours.cloned().unwrap_or_else(|| Arc::new(signature));
                    let name = self.table.rows[row as usize].name.clone();
                    let Some(key) = self.table.define(row, signature.clone()) else {
                        return Err(Cause::System("all 2^32 tensor keys are used; start a new epoch".into()));
                    };
                    self.agree(row, name, key, signature, absent, call, &mut run)?;
                }
                CutItem::Fail { name, message } => self.apply_failure(name, message)?,
                CutItem::AllJoined { last } => {
                    self.emit_run(&mut run);
                    self.apply_all_joined(last)?;
                }
            }
        }
        self.emit_run(&mut run);
        self.spare.cuts.push(run);
        Ok(())
    }

    fn emit_run(&mut self, run: &mut Vec<Agreed>) {
        if !run.is_empty() {
            let next = self.spare.cuts.pop().unwrap_or_default();
            self.intents.push_back(Intent::Run(std::mem::replace(run, next)));
        }
    }

    fn apply_key(
        &mut self,
        key: TensorKey,
        absent: Members<'_>,
        call: Rows<'_>,
        run: &mut Vec<Agreed>,
    ) -> Result<(), Cause> {
        let Some((row, signature)) = self.table.of_key(key) else {
            return Err(misbehaved("a key in the agreed log that is not alive"));
        };
        let signature = signature.clone();
        let name = self.table.rows[row as usize].name.clone();
        self.table.touch(key);
        self.agree(row, name, key, signature, absent, call, run)
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of an Agreed, from two kinds of entries")]
    fn agree(
        &mut self,
        row: u32,
        name: Arc<str>,
        key: TensorKey,
        signature: SharedSignature,
        absent: Members<'_>,
        call: Rows<'_>,
        run: &mut Vec<Agreed>,
    ) -> Result<(), Cause> {
        let away = absent.iter().any(|member| member == self.setup.me);
        let op = self.end(row, Some(away))?;
        let absent = self.absent_list(absent)?;
        let call = self.call_table(call, &absent)?;
        run.push(Agreed { op, key, name, signature, absent, call });
        Ok(())
    }

    /// Ends the flight of a row here. `away`: what the log says of this member, where it says something.
    fn end(&mut self, row: u32, away: Option<bool>) -> Result<Option<super::OpId>, Cause> {
        let mark = &self.table.rows[row as usize].mark;
        let (op, marked) = (mark.op, mark.marked);
        if away.is_some_and(|away| away == op.is_some()) || (op.is_none() && self.join.op.is_none()) {
            return Err(misbehaved("an entry of the agreed log that this rank did not submit"));
        }
        if op.is_some() && !self.is_root() && mark.passed == Passed::No {
            return Err(misbehaved("an entry of the agreed log before it was ready here"));
        }
        if let Some(op) = op {
            self.ops.remove(&op);
        }
        for (source, count) in self.marked_by.iter_mut().enumerate() {
            *count -= (marked >> source & 1) as usize;
        }
        if !self.stall.queries.is_empty() {
            self.stall.forget(&self.table.rows[row as usize].name);
        }
        if !self.table.rows[row as usize].held.is_empty() {
            self.spare.rows.push(row);
        }
        self.table.finish(row);
        Ok(op)
    }

    fn absent_list(&mut self, absent: Members<'_>) -> Result<Arc<[Member]>, Cause> {
        if absent.is_empty() {
            return Ok(self.spare.nobody.clone());
        }
        if absent.len() != self.spare.absent.len() || !absent.iter().eq(self.spare.absent.iter().copied()) {
            self.spare.absent = absent.iter().collect();
        }
        if self.spare.absent.last().is_some_and(|last| last.0 as usize >= self.setup.ranks.len()) {
            return Err(misbehaved("a rank outside the process set"));
        }
        Ok(self.spare.absent.clone())
    }

    fn call_table(&mut self, call: Rows<'_>, absent: &[Member]) -> Result<Arc<CallTable>, Cause> {
        if call.width == 0 {
            return Ok(self.spare.no_call.clone());
        }
        let members = self.setup.ranks.len();
        if call.len() + absent.len() != members || call.width.saturating_mul(members) > wire::CALL_VALUES_MAX
        {
            return Err(misbehaved("call data of too few or too many ranks"));
        }
        let mut shared = self.spare.tables.pop().unwrap_or_default();
        let table = Arc::get_mut(&mut shared).expect("spare tables are not shared");
        table.width = call.width;
        table.values.clear();
        table.values.resize(call.width * members, 0);
        let mut stranger = false;
        call.for_each(|member, index, value| {
            match table.values.get_mut(member.0 as usize * call.width + index) {
                Some(place) => *place = value,
                None => stranger = true,
            }
            stranger |= index == 0 && absent.binary_search(&member).is_ok();
        });
        if stranger { Err(misbehaved("call data of a rank that did not send it")) } else { Ok(shared) }
    }

    fn apply_failure(&mut self, name: &str, message: &str) -> Result<(), Cause> {
        let row = self.table.open(name);
        if let Some(op) = self.end(row, None)? {
            let mismatch = Arc::new(Mismatch { tensor: name.to_owned(), message: message.to_owned() });
            self.intents.push_back(Intent::Failed { op, mismatch });
        }
        Ok(())
    }

    fn apply_all_joined(&mut self, last: Member) -> Result<(), Cause> {
        if self.join.behind_held || last.0 as usize >= self.setup.ranks.len() {
            return Err(misbehaved("the end of a join that has not begun"));
        }
        let Some(op) = self.join.op.take() else {
            return Err(misbehaved("the end of a join that has not begun"));
        };
        self.join.has.fill(false);
        self.join.count.fill(0);
        self.intents.push_back(Intent::Joined { op, last });
        Ok(())
    }

    /// Submits unnamed operations that waited for the former of their name, and the join behind them.
    fn release_held(&mut self, now: Time) {
        if self.spare.rows.is_empty() {
            return;
        }
        let mut rows = std::mem::take(&mut self.spare.rows);
        for row in rows.drain(..) {
            let held = self.table.row(row).held.pop_front().expect("only rows with such are noted");
            self.held -= 1;
            let name = self.table.rows[row as usize].name.clone();
            let submission = Submission {
                op: held.op,
                name: &name,
                hold_if_busy: true,
                signature: &held.signature,
                call: &held.call,
                refused: held.refused.as_deref(),
            };
            self.mark_own(row, &submission, now);
        }
        self.spare.rows = rows;
        if self.held == 0 && self.join.behind_held {
            self.join_now(now);
        } else {
            // They have waited for a whole agreement.
            self.flush(true, now);
        }
    }
}
