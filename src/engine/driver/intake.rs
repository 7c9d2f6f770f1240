//! What submitters have left, on its way to the engine: at once, or when its tensors have come to the host.
#![forbid(unsafe_code)]

use super::super::handles::Submitted;
use super::super::message::MessageSubmission;
use super::super::{Engine, Submission, TensorMemory};
use super::{Mail, Shared, lock};
use crate::coordinator::OpId;
use crate::error::{Cause, Error};
use crate::types::{Collective, Time};
use std::sync::atomic::Ordering;

/// A submission whose tensors are on their way to the host.
pub(super) struct Arriving {
    index: u32,
    submitted: Box<Submitted>,
    /// Somebody waits for the operation.
    awaited: bool,
}

impl Shared {
    /// After the goodbye: whatever was submitted too late ends with `Shutdown`.
    pub(super) fn refuse_mail(&self) {
        if lock(&self.failure).is_none() {
            return;
        }
        for letter in lock(&self.mail).drain(..) {
            if let Mail::Submitted(index) = letter {
                self.handles.recycle(self.handles.take_submitted(index));
                self.handles.complete(index, Err(Error::Shutdown(None)));
            }
        }
    }

    pub(super) fn read_mail(&self, engine: &mut Engine, now: Time) -> bool {
        // Looked at before it is taken: a waiter comes by often, and mail seldom.
        if !self.has_mail.load(Ordering::SeqCst) || !self.has_mail.swap(false, Ordering::SeqCst) {
            return false;
        }
        let mut mail = std::mem::take(&mut *lock(&self.mail));
        for letter in mail.drain(..) {
            match letter {
                Mail::Submitted(index) => {
                    let submitted = self.handles.take_submitted(index);
                    let waits = submitted.passage.is_some()
                        || self.has_arriving.load(Ordering::Relaxed)
                        || self.is_join_too_early(engine, &submitted);
                    match waits {
                        true => self.let_come(index, submitted),
                        false => self.accept(engine, index, submitted, now),
                    }
                }
                Mail::Waiting(index) => self.wait_for(engine, OpId(index), now),
                Mail::Stalled(tensor, missing) => {
                    engine.break_epoch_with(None, Cause::Stalled { tensor, missing });
                }
                Mail::Freed(set, number) => engine.free_plan(set, number, now),
            }
        }
        // The vector goes back for its capacity, unless somebody has written meanwhile.
        let mut slot = lock(&self.mail);
        if slot.is_empty() && slot.capacity() < mail.capacity() {
            *slot = mail;
        }
        true
    }

    fn let_come(&self, index: u32, submitted: Box<Submitted>) {
        lock(&self.arriving).push(Arriving { index, submitted, awaited: false });
        self.has_arriving.store(true, Ordering::Relaxed);
    }

    /// Somebody waits for an operation, which the engine may not have been told of yet.
    pub(super) fn wait_for(&self, engine: &mut Engine, op: OpId, now: Time) {
        if self.has_arriving.load(Ordering::Relaxed)
            && let Some(arriving) = lock(&self.arriving).iter_mut().find(|a| a.index == op.0)
        {
            arriving.awaited = true;
        } else {
            engine.wait_for(op, now);
        }
    }

    /// Tells the engine of operations whose tensors have come.
    pub(super) fn take_in(&self, engine: &mut Engine, now: Time) -> bool {
        if !self.has_arriving.load(Ordering::Relaxed) {
            return false;
        }
        let ended = engine.broken().cloned().or_else(|| lock(&self.failure).clone());
        let mut arriving = lock(&self.arriving);
        let mut place = 0;
        let mut moved = false;
        while place < arriving.len() {
            let (earlier, from_here) = arriving.split_at_mut(place);
            let one = &mut from_here[0];
            // Messages of one tag meet in the order in which they were submitted.
            let follows = one.submitted.message.is_some_and(|m| {
                earlier.iter().any(|e| e.submitted.message.is_some_and(|earlier| earlier.precedes(m)))
            });
            if ended.is_none() && (follows || !self.has_come(engine, &mut one.submitted)) {
                place += 1;
                continue;
            }
            moved = true;
            let Arriving { index, submitted, awaited } = arriving.remove(place);
            match &ended {
                Some(error) => self.handles.complete(index, Err(error.clone())),
                None => {
                    self.accept(engine, index, submitted, now);
                    if awaited {
                        engine.wait_for(OpId(index), now);
                    }
                }
            }
        }
        self.has_arriving.store(!arriving.is_empty(), Ordering::Relaxed);
        moved
    }

    fn accept(&self, engine: &mut Engine, index: u32, mut submitted: Box<Submitted>, now: Time) {
        if let Some(passage) = submitted.passage.take() {
            self.handles.keep_passage(index, passage);
        }
        let op = OpId(index);
        let accepted = match submitted.message {
            Some(_) if submitted.refused.is_some() => {
                Err(Error::usage(submitted.refused.take().unwrap_or_default()))
            }
            Some(message) => {
                let (input, output) = submitted.tensors[0];
                let memory = if message.sends { input } else { output.unwrap_or(input) };
                let tensor = &submitted.signature.tensors[0];
                let submission = MessageSubmission {
                    op,
                    set: submitted.set,
                    peer: message.peer,
                    tag: message.tag,
                    sends: message.sends,
                    memory,
                    dtype: tensor.dtype,
                };
                engine.submit_message(&submission, &tensor.shape)
            }
            None => {
                let mut tensors = engine.spare_tensors();
                tensors
                    .extend(submitted.tensors.iter().map(|&(input, output)| TensorMemory { input, output }));
                let outcome = engine.submit(
                    &Submission {
                        op,
                        set: submitted.set,
                        name: &submitted.name,
                        hold: submitted.hold,
                        signature: &submitted.signature,
                        call: &submitted.call,
                        tensors: &tensors,
                        refused: submitted.refused.as_deref(),
                        on_device: submitted.on_device.as_ref(),
                    },
                    now,
                );
                engine.return_tensors(tensors);
                outcome
            }
        };
        submitted.on_device = None;
        self.handles.recycle(submitted);
        if let Err(error) = accepted {
            self.handles.complete(index, Err(error));
        }
    }
}

impl Shared {
    fn is_join_too_early(&self, engine: &mut Engine, submitted: &Submitted) -> bool {
        submitted.signature.collective == Collective::Join && !engine.may_join(submitted.set, self.now())
    }

    /// Whether the tensors are on the host. Where they cannot come the other ranks are told instead.
    fn has_come(&self, engine: &mut Engine, submitted: &mut Submitted) -> bool {
        if self.is_join_too_early(engine, submitted) {
            return false;
        }
        let come = submitted.passage.as_mut().map_or(Ok(true), |passage| passage.has_come());
        come.unwrap_or_else(|cause| {
            submitted.refused = Some(format!("its tensors could not be brought to the host: {cause}"));
            true
        })
    }
}
