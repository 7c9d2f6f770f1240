//! Survivors of a fault come together and go on in a new epoch: who that is, with which process sets, and whether
//! everything works there.
#![forbid(unsafe_code)]

use super::cluster::Cluster;
use super::program::{Fault, Random};
use carole::engine::Engine;
use carole::error::{Cause, Error};
use carole::membership::regroup::{Authority, Decision, Regroup, Rules};
use carole::rendezvous::past::Sets;
use carole::types::{Rank, Time};

/// Far more than anybody takes to arrive.
const PATIENCE_NS: u64 = 600_000_000_000;
/// Survivors arrive within this time.
const ARRIVALS_NS: u64 = 2_000_000_000;

/// What one survivor brings.
struct Arrival {
    rank: Rank,
    at: Time,
    dead: Option<Rank>,
    silent: Option<Rank>,
    sets: Sets,
}

/// The next epoch of a cluster whose fault has happened: its size and the process sets that it has from the start; `None`
/// when those that are left must not go on. The error says what was found wrong.
pub fn regroup(cluster: &Cluster, random: &mut Random, now: Time) -> Result<Option<(u32, Sets)>, String> {
    let size = cluster.nodes.len() as u32;
    let mut arrivals: Vec<Arrival> = Vec::new();
    for node in cluster.nodes.iter().filter(|node| cluster.is_live(node)) {
        let engine = node.engine.as_ref().expect("live nodes have engines");
        arrivals.push(arrival(engine, node.rank, now.after_ns(random.below(ARRIVALS_NS))));
    }
    arrivals.sort_by_key(|arrival| (arrival.at, arrival.rank));
    let mut meeting = Regroup::new(size, Rules { authority: Authority::Majority, patience_ns: PATIENCE_NS });
    let mut decision = Decision::Wait;
    for (place, arrival) in arrivals.iter().enumerate() {
        meeting.arrived(arrival.rank, arrival.at);
        arrival.dead.into_iter().for_each(|rank| meeting.dead(rank));
        arrival.silent.into_iter().for_each(|rank| meeting.suspected(rank));
        if place == 0 {
            // A knock at its doors finds out what nobody was told.
            match cluster.injected() {
                Some(Fault::Kill(_) | Fault::KillHost(_)) => {
                    cluster.killed().into_iter().for_each(|rank| meeting.dead(rank));
                }
                Some(Fault::Stop(rank)) => meeting.suspected(rank),
                Some(Fault::Leave(rank)) => meeting.left(rank),
                _ => {}
            }
        }
        decision = meeting.decide(arrival.at);
        // Whoever two others hold to be gone may come all the same, and then late: that is a vote, and no mistake.
        let blamed = |rank| arrivals.iter().any(|a| a.dead == Some(rank) || a.silent == Some(rank));
        let awaited = arrivals[place + 1..].iter().any(|later| !blamed(later.rank));
        if awaited && decision != Decision::Wait {
            return Err(format!("{decision:?} though a rank that nobody misses is on its way"));
        }
        if let Decision::Form(_) = decision {
            break;
        }
    }
    let Decision::Form(ranks) = decision else {
        return match (decision, cluster.injected()) {
            // Of two ranks the higher one alone is a minority.
            (Decision::Minority { here, of }, Some(Fault::Stop(Rank(0)))) if 2 * here <= of => Ok(None),
            (Decision::Minority { .. }, Some(Fault::HalfOpen(..) | Fault::Flip(..))) => Ok(None),
            (other, fault) => Err(format!("no epoch follows {fault:?}: {other:?}")),
        };
    };
    let renumber = |rank| ranks.iter().position(|&r| r == rank).map(|place| Rank(place as u32));
    let there = arrivals.iter().filter(|arrival| ranks.contains(&arrival.rank));
    let sets = Sets::settled(there.map(|arrival| &arrival.sets), renumber);
    Ok(Some((ranks.len() as u32, sets)))
}

fn arrival(engine: &Engine, rank: Rank, at: Time) -> Arrival {
    let (list, next) = engine.carried_sets();
    let mut arrival = Arrival { rank, at, dead: None, silent: None, sets: Sets { list, next } };
    if let Some(Error::Broken(broken)) = engine.broken() {
        let culprit = broken.culprit.filter(|&culprit| culprit != rank);
        match broken.cause {
            Cause::Exited => arrival.dead = culprit,
            Cause::Silent { .. } => arrival.silent = culprit,
            _ => {}
        }
    }
    arrival
}
