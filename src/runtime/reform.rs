//! From one epoch to the next.
#![forbid(unsafe_code)]

use super::live::{EPOCH, Live, how_to_join, lock};
use crate::engine::handles::Handles;
use crate::error::{Cause, Error, Result};
use crate::fork;
use crate::rendezvous::approach::{Ended, poll_answer};
use crate::rendezvous::card::{Answer, News};
use crate::rendezvous::channel::Channel;
use crate::rendezvous::client::Joined;
use crate::rendezvous::past::{Past, Sets};
use crate::rendezvous::reform::{Veteran, reform};
use crate::rendezvous::topology::Topology;
use crate::types::{Epoch, Rank};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The connection to the launcher, on which news come. Its end tells the launcher of this process's end, so no forked
/// child may hold it.
pub(super) struct Leash {
    channel: Channel,
    news: News,
    ended: bool,
}

impl Leash {
    pub(super) fn new(channel: Channel) -> Leash {
        fork::own(channel.as_fd().as_raw_fd());
        Leash { channel, news: News::default(), ended: false }
    }

    fn read(&mut self) -> News {
        while !self.ended {
            match poll_answer(&mut self.channel) {
                Ok(None) => break,
                Ok(Some(Answer::News(news))) => {
                    self.news.added |= news.added;
                    self.news.removed |= news.removed;
                }
                // The launcher has ended; it may come back with the next epoch.
                Ok(Some(_)) | Err(Ended) => self.ended = true,
            }
        }
        self.news
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        fork::disown(self.channel.as_fd().as_raw_fd());
    }
}

/// What has changed since the epoch began.
pub(super) fn news(live: &Live) -> News {
    lock(&live.leash).as_mut().map(Leash::read).unwrap_or_default()
}

/// Leaves `old` and begins the epoch that follows it.
pub(super) fn next(old: &Live, handles: Arc<Handles>) -> Result<Live> {
    let past = last_words(old);
    let porter = lock(&old.porter).take();
    let doors = lock(&old.doors).take();
    let (Some(porter), Some(doors)) = (porter, doors) else {
        return Err(Error::usage("Carole is being shut down by another thread"));
    };
    let how = how_to_join(&old.config, Epoch(EPOCH.load(Ordering::SeqCst)))?;
    let veteran = Veteran { doors, secret: old.secret.clone(), past };
    let joined = match old.world.size == 1 && old.config.worker.is_none() {
        true => alone(old, veteran, porter),
        false => reform(&how, &old.table, veteran, porter)?,
    };
    // Not sooner: whoever closes it without having come for the next epoch has ended.
    *lock(&old.leash) = None;
    Live::begin(&old.options, old.config.clone(), joined, handles)
}

/// What this rank knows at the end of an epoch. Stops its engine.
fn last_words(old: &Live) -> Past {
    let me = Rank(old.world.rank);
    let (broken, left, (list, next)) = old.driver.stop(|engine| {
        (engine.broken().cloned(), engine.departed().collect::<Vec<Rank>>(), engine.carried_sets())
    });
    let mut past =
        Past { epoch: old.table.epoch, rank: me, left, sets: Sets { list, next }, ..Past::default() };
    if let Some(Error::Broken(broken)) = broken
        && let Some(culprit) = broken.culprit.filter(|&culprit| culprit != me)
    {
        match broken.cause {
            Cause::Exited => past.dead.push(culprit),
            Cause::Silent { .. } => past.silent.push(culprit),
            // It may well come, too.
            _ => {}
        }
    }
    past
}

/// The next epoch of a job of one.
fn alone(old: &Live, veteran: Veteran, porter: crate::rendezvous::porter::Porter) -> Joined {
    drop(porter);
    let mut table = (*old.table).clone();
    table.epoch = Epoch(old.table.epoch.0 + 1);
    table.sets = veteran.past.sets;
    Joined {
        rank: Rank(0),
        topology: Arc::new(Topology::of(&table)),
        table: Arc::new(table),
        secret: veteran.secret,
        doors: veteran.doors,
        server: None,
        leash: None,
        warn: Arc::new(|words| crate::log::warn(format_args!("{words}"))),
    }
}
