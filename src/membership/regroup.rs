//! Who goes on after an epoch: the ranks of the last one come together at one place, and there this machine says
//! when and with whom the next epoch begins. Without I/O; the time is an argument.
//!
//! * Whoever is *here* takes part. Whoever is known to be *dead* (its process was reaped, its kernel closed its
//!   socket or refuses a connection, the launcher says so) or has *left* is not waited for and has no vote.
//! * Whoever lives but is not here yet (busy in user code) is waited for, within reason.
//! * Whoever is *suspected* (silent, unreachable, not here in time) may live and may have come together with others
//!   elsewhere. So the ranks here go on only with the launcher's consent, or as a majority of those that may be
//!   alive (exactly half counts if it holds the lowest of them). Of two places that decide so at most one goes
//!   on: each counts all that live, so both cannot hold the greater part of them.
#![forbid(unsafe_code)]

use crate::types::{Rank, Time};

/// How long is waited for whom.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Who allows the ranks here to go on without ranks that may be alive.
    pub authority: Authority,
    /// How long a rank that may be alive is waited for.
    pub patience_ns: u64,
}

/// Who allows the ranks here to go on without ranks that may be alive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Authority {
    /// The launcher, which looks after all of them and is the only place where they can meet.
    Launcher,
    /// Their number.
    Majority,
}

/// What is known of a rank of the last epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Standing {
    /// Not here, and nothing bad is known of it.
    Awaited,
    /// Here.
    Here,
    /// Not here, and silent.
    Suspected,
    /// Its process has ended.
    Dead,
    /// It has said goodbye.
    Left,
}

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Wait for more to come, or for [`Regroup::deadline`].
    Wait,
    /// These go on, in their old order.
    Form(Vec<Rank>),
    /// So many are here, of so many that may be alive: too few.
    Minority {
        /// Ranks here.
        here: u32,
        /// Ranks that may be alive, those here included.
        of: u32,
    },
}

/// The meeting of one epoch's ranks.
#[derive(Debug)]
pub struct Regroup {
    standing: Vec<Standing>,
    rules: Rules,
    /// When the first came.
    opened: Option<Time>,
}

impl Regroup {
    /// Nobody of an epoch of `size` ranks is here.
    #[must_use]
    pub fn new(size: u32, rules: Rules) -> Regroup {
        Regroup { standing: vec![Standing::Awaited; size as usize], rules, opened: None }
    }

    fn place(&mut self, rank: Rank) -> Option<&mut Standing> {
        self.standing.get_mut(rank.0 as usize)
    }

    /// A rank has come. It is alive, whatever was believed of it.
    pub fn arrived(&mut self, rank: Rank, now: Time) {
        self.opened.get_or_insert(now);
        if let Some(place) = self.place(rank) {
            *place = Standing::Here;
        }
    }

    /// A rank that was here is not any more; whether its process has ended is not known.
    pub fn lost(&mut self, rank: Rank) {
        if let Some(place) = self.place(rank).filter(|place| **place == Standing::Here) {
            *place = Standing::Awaited;
        }
    }

    /// A rank's process has ended; somebody knows.
    pub fn dead(&mut self, rank: Rank) {
        if let Some(place) = self.place(rank).filter(|place| **place != Standing::Here) {
            *place = Standing::Dead;
        }
    }

    /// A rank has said goodbye.
    pub fn left(&mut self, rank: Rank) {
        if let Some(place) = self.place(rank).filter(|place| **place != Standing::Here) {
            *place = Standing::Left;
        }
    }

    /// A rank does not answer.
    pub fn suspected(&mut self, rank: Rank) {
        if let Some(place) = self.place(rank).filter(|place| **place == Standing::Awaited) {
            *place = Standing::Suspected;
        }
    }

    /// A rank that is not here answers all the same.
    pub fn alive(&mut self, rank: Rank) {
        if let Some(place) = self.place(rank).filter(|place| **place == Standing::Suspected) {
            *place = Standing::Awaited;
        }
    }

    /// Ranks that are waited for.
    pub fn awaited(&self) -> impl Iterator<Item = Rank> + '_ {
        self.with(Standing::Awaited)
    }

    fn with(&self, standing: Standing) -> impl Iterator<Item = Rank> + '_ {
        let all = self.standing.iter().enumerate();
        all.filter(move |(_, found)| **found == standing).map(|(rank, _)| Rank(rank as u32))
    }

    /// When [`Regroup::decide`] may say something else, though nothing has happened.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        self.opened.map(|opened| opened.after_ns(self.rules.patience_ns))
    }

    /// What is to be done now.
    #[must_use]
    pub fn decide(&self, now: Time) -> Decision {
        let here: Vec<Rank> = self.with(Standing::Here).collect();
        let patient = self.deadline().is_none_or(|at| now < at);
        if here.is_empty() || (patient && self.awaited().next().is_some()) {
            return Decision::Wait;
        }
        let voters = |standing: &&Standing| !matches!(standing, Standing::Dead | Standing::Left);
        let of = self.standing.iter().filter(voters).count();
        let lowest = self.standing.iter().find(voters);
        let most = 2 * here.len() > of || (2 * here.len() == of && lowest == Some(&Standing::Here));
        match self.rules.authority {
            Authority::Majority if !most => Decision::Minority { here: here.len() as u32, of: of as u32 },
            Authority::Majority | Authority::Launcher => Decision::Form(here),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: u64 = 1000;
    const T0: Time = Time(5);
    const LATE: Time = Time(5 + PATIENCE);

    fn meeting(size: u32, authority: Authority, here: &[u32]) -> Regroup {
        let mut meeting = Regroup::new(size, Rules { authority, patience_ns: PATIENCE });
        here.iter().for_each(|&rank| meeting.arrived(Rank(rank), T0));
        meeting
    }

    fn ranks(list: &[u32]) -> Decision {
        Decision::Form(list.iter().copied().map(Rank).collect())
    }

    #[test]
    fn the_dead_and_the_gone_are_not_waited_for() {
        let mut meeting = meeting(4, Authority::Majority, &[3, 1]);
        meeting.dead(Rank(0));
        assert_eq!(meeting.decide(T0), Decision::Wait);
        assert_eq!(meeting.awaited().collect::<Vec<_>>(), [Rank(2)]);
        meeting.left(Rank(2));
        assert_eq!(meeting.decide(T0), ranks(&[1, 3]));
    }

    #[test]
    fn one_that_lives_is_waited_for_and_one_that_is_silent_is_outvoted() {
        let mut meeting = meeting(4, Authority::Majority, &[0, 1, 2]);
        assert_eq!(meeting.decide(Time(PATIENCE)), Decision::Wait);
        meeting.suspected(Rank(3));
        assert_eq!(meeting.decide(T0), ranks(&[0, 1, 2]));
        meeting.alive(Rank(3));
        assert_eq!(meeting.decide(T0), Decision::Wait);
        assert_eq!(meeting.decide(LATE), ranks(&[0, 1, 2]), "not for ever");
        meeting.arrived(Rank(3), T0);
        assert_eq!(meeting.decide(T0), ranks(&[0, 1, 2, 3]));
    }

    #[test]
    fn a_minority_needs_the_launchers_consent() {
        for (size, here, wins) in [
            (2, &[0][..], true),
            (2, &[1], false),
            (4, &[0, 3], true),
            (4, &[1, 2], false),
            (5, &[0, 1], false),
        ] {
            let meeting = |authority| {
                let mut meeting = meeting(size, authority, here);
                (0..size).for_each(|rank| meeting.suspected(Rank(rank)));
                meeting.decide(T0)
            };
            let minority = Decision::Minority { here: here.len() as u32, of: size };
            assert_eq!(meeting(Authority::Majority), if wins { ranks(here) } else { minority });
            assert_eq!(meeting(Authority::Launcher), ranks(here));
        }
    }

    #[test]
    fn who_dies_while_waiting_is_not_taken_along() {
        let mut meeting = meeting(3, Authority::Majority, &[0, 1]);
        meeting.lost(Rank(1));
        meeting.dead(Rank(1));
        meeting.dead(Rank(2));
        assert_eq!(meeting.decide(T0), ranks(&[0]));
        meeting.dead(Rank(0));
        assert_eq!(meeting.decide(T0), ranks(&[0]), "whoever is here lives");
        meeting.dead(Rank(9));
    }

    /// However the ranks are cut into two parts, and whatever each part knows of those that are truly dead, at most
    /// one part goes on.
    #[test]
    fn of_two_parts_at_most_one_goes_on() {
        for size in 1..=5u32 {
            // Each rank: dead, in the first part, or in the second.
            for cut in 0..3u32.pow(size) {
                let part = |rank: u32| cut / 3u32.pow(rank) % 3;
                let dead: Vec<u32> = (0..size).filter(|&rank| part(rank) == 0).collect();
                let decide = |side: u32, knows: u32| {
                    let mut meeting = meeting(size, Authority::Majority, &[]);
                    (0..size).filter(|&r| part(r) == side).for_each(|r| meeting.arrived(Rank(r), T0));
                    let known = dead.iter().enumerate().filter(|(i, _)| knows >> i & 1 == 1);
                    known.for_each(|(_, &rank)| meeting.dead(Rank(rank)));
                    matches!(meeting.decide(LATE), Decision::Form(_))
                };
                for knows in 0..1u32 << (2 * dead.len()) {
                    let (first, second) = (decide(1, knows), decide(2, knows >> dead.len()));
                    assert!(!(first && second), "{size} ranks, cut {cut}, known deaths {knows:b}");
                }
            }
        }
    }
}
