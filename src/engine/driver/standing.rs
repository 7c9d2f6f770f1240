//! Starts of operations that stand ([`crate::engine::standing`]): posted by who submits, reduced by who waits; the engine
//! sees only to what somebody sleeps for, and to what a member has withdrawn from.
#![forbid(unsafe_code)]

use super::channels::Spun;
use super::{Driver, Mail, Shared};
use crate::coordinator::{OpId, stalled};
use crate::engine::handles::in_flight;
use crate::engine::operation::Outcome;
use crate::engine::standing::{Look, Posted, Repeat, Standing};
use crate::error::Result;
use crate::log;
use crate::types::SetId;
use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What has become of a start.
#[derive(Debug)]
pub enum Ran {
    /// It is over.
    Done(Outcome),
    /// It is under way, with this handle.
    Started(u64),
}

/// How often starts are looked at that nobody waits for.
const LOOK_AFTER: Duration = Duration::from_millis(50);

/// Since when starts are seen to be under way.
#[derive(Default)]
pub(super) struct Watched {
    looked: Option<Instant>,
    starts: Vec<(Arc<Standing>, u64, Instant, u64)>,
}

impl Driver {
    /// The operation of this name, if it stands.
    pub fn find_standing(&self, set: SetId, name: &str) -> Option<Arc<Standing>> {
        self.shared.standings.find(set, name)
    }

    /// Starts what stands once more, and takes what is to be kept alive for it, if it is not over at once; with `waits`
    /// it is looked at for a while. None where the call is an ordinary operation now.
    pub fn post(
        &self,
        standing: &Arc<Standing>,
        call: &Repeat<'_>,
        waits: bool,
        mut keep: impl FnMut() -> Option<Box<dyn Any + Send>>,
    ) -> Result<Option<Ran>> {
        let shared = &*self.shared;
        let index = shared.handles.reserve()?;
        let mut handle = None;
        let spin = |is_over: &dyn Fn() -> bool| waits && shared.spin_briefly(is_over);
        let posted = shared.standings.post(standing, call, spin, || {
            handle = Some(shared.handles.open_start(index, keep(), standing));
            OpId(index)
        });
        if handle.is_none() {
            shared.handles.release(index);
        }
        shared.see_to_standings();
        match posted {
            Posted::Done(outcome) => Ok(Some(Ran::Done(outcome))),
            Posted::Started => Ok(handle.map(Ran::Started)),
            Posted::Ordinary => Ok(None),
            Posted::Busy => Err(in_flight(standing.name())),
        }
    }

    /// Whether an operation has an outcome.
    pub fn poll(&self, handle: u64) -> Result<bool> {
        let shared = &*self.shared;
        if shared.handles.poll(handle)? {
            return Ok(true);
        }
        if let Some(standing) = shared.handles.standing(handle)? {
            shared.look(&standing);
        }
        shared.handles.poll(handle)
    }
}

impl Shared {
    /// Looks at a start; whether there is nothing to wait for in its niche any more.
    fn look(&self, standing: &Arc<Standing>) -> bool {
        match self.standings.look(standing) {
            Look::Waiting => return false,
            Look::Idle => {}
            Look::Done(op, outcome) => self.handles.complete(op.0, Ok(outcome)),
            Look::Fallen => self.see_to_standings(),
        }
        true
    }

    /// Looks again and again for as long as a waiter may; then whoever drives does.
    pub(super) fn spin_for_start(&self, standing: &Arc<Standing>) {
        if !self.spin(|| Spun { over: self.look(standing), moved: false }) {
            self.standings.watch(standing);
        }
    }

    /// Lets the engine see to what stands, if there is something: now, or when whoever drives comes to it.
    pub(super) fn see_to_standings(&self) {
        if !self.standings.calls() {
            return;
        }
        match self.engine.try_lock() {
            Ok(mut engine) => {
                engine.turn_standings(self.now());
                self.report(&mut engine);
                let busy = self.is_busy(&engine);
                drop(engine);
                if busy {
                    self.wake_driver();
                }
            }
            Err(_) => self.wake_driver(),
        }
    }

    /// Ends starts that nobody waits for, makes operations of those that a member has withdrawn from, and warns of
    /// those that take long.
    pub(super) fn look_after_standings(&self, watched: &mut Watched) {
        if !self.standings.is_any_under_way() {
            watched.starts.clear();
            return;
        }
        let now = Instant::now();
        if watched.looked.is_some_and(|at| now.duration_since(at) < LOOK_AFTER) {
            return;
        }
        watched.looked = Some(now);
        let mut done = Vec::new();
        self.standings.look_at_all(None, &mut done);
        for (op, outcome) in done {
            self.handles.complete(op.0, Ok(outcome));
        }
        self.see_to_standings();
        self.warn_of_starts(watched, now);
    }

    fn warn_of_starts(&self, watched: &mut Watched, now: Instant) {
        watched.starts.retain(|(standing, number, ..)| standing.number() == Some(*number));
        for standing in self.standings.under_way() {
            let Some(number) = standing.number() else { continue };
            let known = watched.starts.iter_mut().find(|(known, ..)| Arc::ptr_eq(known, &standing));
            let Some((_, _, since, warned)) = known else {
                watched.starts.push((standing, number, now, 0));
                continue;
            };
            let waited = now.duration_since(*since).as_nanos() as u64;
            let (warn, fail) = (self.patience.stall_warn_ns, self.patience.stall_fail_ns);
            if fail > 0 && waited >= fail {
                *since = now;
                let (name, missing) = (standing.name().to_owned(), standing.missing());
                self.send(Mail::Stalled(name, missing));
                self.wake_driver();
            } else if warn > 0 && waited / warn > *warned {
                *warned = waited / warn;
                log::warn(format_args!("{}", stalled(standing.name(), waited, &standing.missing())));
            }
        }
    }
}
