//! Who is in the epoch and how it ends: what connects [`crate::membership`] with links and operations.
#![forbid(unsafe_code)]

use super::Engine;
use crate::error::{Broken, Error};
use crate::membership::Intent;
use crate::transport::Events;
use crate::types::Time;
use crate::wire;

impl Engine {
    /// Tells the membership what it should know, and carries out what it intends.
    pub(super) fn turn_membership(&mut self, now: Time) -> bool {
        for place in 0..self.links.up().len() {
            let peer = self.links.up()[place];
            if let Some(heard) = self.links.heard(peer) {
                self.membership.heard(peer, heard);
            }
        }
        if self.membership.is_to_seal() {
            self.seal();
        }
        if self.membership.poll_timeout().is_some_and(|at| at <= now) {
            self.membership.handle_timeout(now);
        }
        let mut moved = false;
        let was_broken = self.broken.is_some();
        let mut departed = false;
        while let Some(intent) = self.membership.poll() {
            moved = true;
            departed |= matches!(intent, Intent::Departed { .. });
            self.carry_out_intent(intent, now);
        }
        if departed {
            // As below: whoever ends its process on the news must have passed it on.
            self.turn_links(now);
        }
        if self.broken.is_some() && !was_broken {
            // The news leaves before anybody here learns of it: a caller may end the process at once, and its
            // peers must not take it for the culprit.
            self.push_out(now);
        }
        moved
    }

    /// Writes what is queued for all links; what they tell meanwhile is of no use any more.
    fn push_out(&mut self, now: Time) {
        let mut events = Events::default();
        let mut changes = Vec::new();
        for place in (0..self.links.up().len()).rev() {
            self.links.progress(place, &self.memory, now, &mut events, &mut changes);
            events.clear();
        }
    }

    fn carry_out_intent(&mut self, intent: Intent, now: Time) {
        match intent {
            Intent::Heartbeat(to) => self.say(to, &wire::Message::Heartbeat),
            Intent::Goodbye { to, who, clean } => {
                self.say(to, &wire::Message::Goodbye { who, clean, sent: 0 });
            }
            Intent::Abort { to, broken } => self.say(to, &wire::Message::Abort(Broken::clone(&broken))),
            Intent::Seek(rank) => self.links.request(rank),
            Intent::Ballot { to, verdict, broken, marks } => {
                let (broken, marks) = (Broken::clone(&broken), marks.to_vec());
                wire::Message::Ballot { verdict, broken, marks }.encode(&mut self.encoded);
                self.links.tell(to, &self.encoded);
            }
            Intent::Broke(broken) => {
                let error = Error::Broken(broken);
                self.broken = Some(error.clone());
                self.commit();
                self.fail_all(&error);
            }
            Intent::Departed { who, clean } => self.depart(who, clean, now),
        }
    }
}
