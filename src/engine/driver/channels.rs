//! Starts of planned collectives, and waits for them: the caller's thread does the work itself as long as it may spin,
//! and drives the engine, or sleeps while somebody else does, when that takes longer.
#![forbid(unsafe_code)]

use super::{Driver, Mail, NAP, Shared, lock};
use crate::engine::channel::{Channel, Turn};
use crate::error::Result;
use crate::types::{Rank, SetId};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Looks between two looks at the clock.
const LOOKS: u32 = 32;
/// For how long a caller looks for the end of a start that nobody else knows of yet.
const BRIEFLY: Duration = Duration::from_micros(20);

/// What a look has found.
pub(super) struct Spun {
    pub(super) over: bool,
    pub(super) moved: bool,
}

impl Driver {
    /// Starts a planned collective. Unless the caller waits at once, somebody is to drive it meanwhile.
    pub fn start_channel(&self, channel: &Channel, waits: bool) -> Result<()> {
        if let Some(error) = lock(&self.shared.failure).as_ref() {
            return Err(error.clone());
        }
        let turn = channel.start()?;
        self.shared.see_to(turn);
        if !waits && !turn.over {
            self.shared.wake_driver();
        }
        Ok(())
    }

    /// Moves what can be moved, and says whether it is over.
    pub fn test_channel(&self, channel: &Channel) -> bool {
        let turn = channel.turn();
        self.shared.see_to(turn);
        turn.over
    }

    /// Does what it takes for as long as a waiter may spin; whether it is over.
    pub fn spin_for_channel(&self, channel: &Channel) -> bool {
        self.shared.spin_for(channel)
    }

    /// Waits for a planned collective, until `until` at most. Whether it is over.
    pub fn wait_for_channel(&self, channel: &Channel, until: Option<Instant>) -> bool {
        let shared = &*self.shared;
        loop {
            if !channel.is_under_way() {
                return true;
            }
            if until.is_some_and(|at| Instant::now() >= at) {
                return false;
            }
            if !shared.stop.load(Ordering::SeqCst) && !shared.caller.swap(true, Ordering::SeqCst) {
                shared.drive_until(None, until, &|| !channel.is_under_way());
                continue;
            }
            shared.wake_driver();
            let left = until.map_or(NAP, |at| at.saturating_duration_since(Instant::now()).min(NAP));
            channel.sleep(left);
        }
    }

    /// Ends the epoch: members do not start a plan that this one waits for.
    pub fn fail_stalled(&self, name: &str, missing: Vec<Rank>) {
        self.shared.send(Mail::Stalled(name.to_owned(), missing));
        self.shared.wake_driver();
    }

    /// Gives up a plan.
    pub fn free_plan(&self, set: SetId, number: u64) {
        self.shared.send(Mail::Freed(set, number));
        self.shared.wake_driver();
    }
}

impl Shared {
    /// Looks again and again for a while; whether it is over.
    fn spin_for(&self, channel: &Channel) -> bool {
        self.spin(|| {
            let turn = channel.turn();
            self.see_to(turn);
            Spun { over: turn.over, moved: turn.moved }
        })
    }

    /// Looks again and again for as long as a waiter may, since something last moved; whether it is over.
    pub(super) fn spin(&self, mut look: impl FnMut() -> Spun) -> bool {
        let limit = Duration::from_nanos(self.patience.spin_ns);
        let mut since = None;
        loop {
            for _ in 0..LOOKS {
                let Spun { over, moved } = look();
                if over {
                    return true;
                }
                if moved {
                    since = Some(Instant::now());
                } else if self.patience.yields {
                    std::thread::yield_now();
                } else {
                    std::hint::spin_loop();
                }
            }
            // The clock is read only when it takes longer than to read it.
            if since.get_or_insert_with(Instant::now).elapsed() > limit {
                return false;
            }
        }
    }

    /// The same for a look that moves nothing, by a caller that holds locks (the interpreter's, the operation's): it is
    /// over before anybody who waits for those would notice, so it never gives its processor away.
    pub(super) fn spin_briefly(&self, is_over: &dyn Fn() -> bool) -> bool {
        if self.patience.yields {
            return is_over();
        }
        let limit = Duration::from_nanos(self.patience.spin_ns).min(BRIEFLY);
        let mut since = None;
        loop {
            for _ in 0..LOOKS {
                if is_over() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if since.get_or_insert_with(Instant::now).elapsed() > limit {
                return false;
            }
        }
    }

    /// Lets the engine look after its channels, if one calls for it: now, or when whoever drives comes to it.
    fn see_to(&self, turn: Turn) {
        if !turn.calls {
            return;
        }
        match self.engine.try_lock() {
            Ok(mut engine) => drop(engine.turn_channels()),
            Err(_) => self.wake_driver(),
        }
    }
}
