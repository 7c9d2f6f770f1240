//! Operations on their way in: what is told, whether it is taken, and what is kept of it.
#![forbid(unsafe_code)]

use super::operation::TensorMemory;
use super::passage::OnDevice;
use super::sets::{ProcessSet, list};
use super::{Engine, inline};
use crate::coordinator::{self, OpId};
use crate::error::{Error, Result};
use crate::types::{SetId, Signature, Time};
use std::sync::Arc;

/// An operation, as the engine takes it.
#[derive(Clone, Copy, Debug)]
pub struct Submission<'a> {
    /// The caller's number for it, free until now.
    pub op: OpId,
    /// The process set.
    pub set: SetId,
    /// Its name.
    pub name: &'a str,
    /// Whether a busy name is waited for instead of refused.
    pub hold: bool,
    /// What must agree.
    pub signature: &'a Signature,
    /// Row counts or splits.
    pub call: &'a [u64],
    /// Memory of the tensors.
    pub tensors: &'a [TensorMemory],
    /// Why this rank cannot take part.
    pub refused: Option<&'a str>,
    /// Where the tensors are on a device, if they are: then the engine may leave them there.
    pub on_device: Option<&'a Arc<OnDevice>>,
}

impl Engine {
    /// Takes an operation. What goes wrong later is told through [`Engine::ended`].
    pub fn submit(&mut self, submission: &Submission<'_>, now: Time) -> Result<()> {
        self.quiet_until = None;
        self.admit(submission.set, submission.op)?;
        if !submission.name.starts_with(coordinator::PLAN_NAMES) {
            self.submit_now(submission, now)?;
        }
        let mut operation = self.spare_ops.pop().unwrap_or_default();
        operation.set = submission.set;
        operation.tensors.clear();
        operation.tensors.extend_from_slice(submission.tensors);
        operation.on_device = submission.on_device.cloned();
        operation.remaining = 0;
        operation.agreed = false;
        operation.place = None;
        operation.name.clear();
        operation.name.push_str(submission.name);
        self.ops.insert(submission.op, operation);
        self.hang_together();
        match submission.name.starts_with(coordinator::PLAN_NAMES) {
            true => self.submit_plan(submission, now),
            false => {
                self.seek_seat(submission.set);
                self.offer_to_lend(submission, now);
            }
        }
        Ok(())
    }

    /// Tells the coordinator of an operation.
    fn submit_now(&mut self, submission: &Submission<'_>, now: Time) -> Result<()> {
        let mut words = [0; inline::WORDS_MAX];
        let call = self.inline_values(submission, &mut words).unwrap_or(submission.call);
        let coordinator = self.coordinator_of(submission.set).expect("admitted sets have a coordinator");
        let accepted = coordinator.submit(
            coordinator::Submission {
                op: submission.op,
                name: submission.name,
                hold_if_busy: submission.hold,
                signature: submission.signature,
                call,
                refused: submission.refused,
            },
            now,
        );
        accepted.map_err(|error| Error::usage(format!("'{}' on {}: {error}", submission.name, self.me)))
    }

    /// Whether an operation may be submitted to a set now.
    pub(super) fn admit(&self, set: SetId, op: OpId) -> Result<()> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        if self.ops.contains_key(&op) {
            return Err(Error::usage("this operation's number is in use"));
        }
        match self.sets.get(&set) {
            None => Err(Error::usage(format!(
                "process set {} does not exist; add_process_set() makes one",
                set.0
            ))),
            Some(s) if s.member.is_none() => Err(Error::usage(format!(
                "{} is not a member of process set {} ({})",
                self.me,
                set.0,
                list(&s.ranks)
            ))),
            Some(ProcessSet { departed: Some(rank), .. }) => Err(Error::Shutdown(Some(*rank))),
            Some(_) => Ok(()),
        }
    }
}
