//! The place of this process in an epoch: what it says of itself, how it finds itself in the table, and what it keeps
//! for the next one.
#![forbid(unsafe_code)]

use super::build;
use super::card::{Card, Table};
use super::channel::Channel;
use super::client::{Join, Joined};
use super::listen::{self, Doors};
use super::past::Past;
use super::place::Hints;
use super::proof::SERVICE;
use super::secret::Secret;
use super::topology::Topology;
use crate::error::{Broken, Cause, Error};
use crate::types::{Epoch, Rank};
use std::sync::Arc;

/// What a worker of an elastic job keeps from one epoch to the next.
pub struct Veteran {
    /// Its doors, which stay open: closed ones say that it has ended.
    pub doors: Doors,
    /// The job's secret.
    pub secret: Secret,
    /// The epoch that it comes from.
    pub past: Past,
}

/// An epoch in which this process has a place.
pub(super) struct Found {
    /// All ranks.
    pub(super) table: Table,
    /// This one.
    pub(super) rank: Rank,
    /// The job's secret.
    pub(super) secret: Secret,
    /// The connection on which more may come.
    pub(super) leash: Option<Channel>,
}

impl Found {
    /// Finds this process in the table.
    pub(super) fn of(table: Table, mine: &Card, secret: &Secret) -> std::result::Result<Found, String> {
        // Between epochs ranks change, and what was said of hosts is forgotten.
        let same = |card: &Card| {
            Card { rank: mine.rank, hints: mine.hints, ..card.clone() } == *mine && table.job == secret.job()
        };
        match table.cards.iter().position(same) {
            Some(rank) => Ok(Found { table, rank: Rank(rank as u32), secret: secret.clone(), leash: None }),
            None => Err("the rendezvous sent the table of another job".into()),
        }
    }

    pub(super) fn joined(self, config: &Join, doors: Doors) -> Joined {
        let Found { table, rank, secret, leash } = self;
        let topology = Topology::of(&table);
        if rank == Rank(0) {
            topology.contradictions.iter().for_each(|text| (config.warn)(text));
        }
        let (table, topology) = (Arc::new(table), Arc::new(topology));
        Joined { rank, table, topology, secret, doors, server: None, leash, warn: config.warn.clone() }
    }
}

/// What this process says of itself.
pub(super) fn card(config: &Join, rank: u32, hints: Hints, doors: &Doors) -> Card {
    let host_id = config.environment.get("CAROLE_HOST_ID").filter(|id| !id.is_empty());
    let bare = bare_card();
    Card {
        rank: Rank(rank),
        hints,
        host_id: host_id.cloned().unwrap_or(bare.host_id),
        simd: config.simd,
        addresses: doors.addresses.clone(),
        socket: doors.socket,
        ..bare
    }
}

/// A card of this process, which is no rank and has no doors.
pub(super) fn bare_card() -> Card {
    Card {
        rank: SERVICE,
        hints: Hints::default(),
        host_id: listen::host_id(),
        hostname: listen::hostname(),
        pid: std::process::id(),
        build: build().to_owned(),
        simd: 0,
        addresses: Vec::new(),
        socket: None,
    }
}

/// The end of what this process takes part in.
pub(super) fn over(past: Option<&Past>, cause: Cause) -> Error {
    let (epoch, culprit) = past.map_or((Epoch(0), None), |past| (past.epoch, Some(past.rank)));
    // A minority is nobody's fault.
    let culprit = culprit.filter(|_| matches!(cause, Cause::Excluded { .. }));
    Error::Broken(Arc::new(Broken { epoch, culprit, cause }))
}
