//! Links between the ranks of one network, made when asked for.
#![forbid(unsafe_code)]

use super::{Network, SimPipe};
use crate::error::Cause;
use crate::transport::board::BoardMemory;
use crate::transport::flow::{FlowLink, FlowOptions};
use crate::transport::{self, FabricEvent, Pipe};
use crate::types::{Rank, Time};
use std::sync::Arc;

/// Pipes per simulated link that carry payload: two, so that frames overtake each other.
const LANES: usize = 2;

/// Ends of links that were made for a rank and that it has not picked up yet.
#[derive(Default)]
pub(super) struct Requests {
    ends: Vec<Waiting>,
    /// Pairs that have been linked, lower rank first.
    linked: Vec<(Rank, Rank)>,
}

impl Requests {
    /// Ranks with an end that gets ready at a time of this kind.
    pub(super) fn ready(&self, is_meant: impl Fn(&Time) -> bool) -> impl Iterator<Item = Rank> {
        self.ends.iter().filter(move |end| is_meant(&end.ready)).map(|end| end.at)
    }
}

struct Waiting {
    at: Rank,
    peer: Rank,
    ready: Time,
    pipes: Vec<SimPipe>,
    failed: Option<Cause>,
}

/// A rank's view of the network.
pub struct Fabric {
    network: Network,
    rank: Rank,
    options: FlowOptions,
}

impl Fabric {
    /// The fabric of `rank`.
    #[must_use]
    pub fn new(network: Network, rank: Rank, options: FlowOptions) -> Fabric {
        let mut state = network.lock();
        if state.options.boards {
            state.boards.entry(rank).or_insert_with(BoardMemory::within_process);
        }
        drop(state);
        Fabric { network, rank, options }
    }

    /// When [`transport::Fabric::poll`] next has something for this rank, if it is known.
    #[must_use]
    pub fn next_event(&self) -> Option<Time> {
        let state = self.network.lock();
        state.requests.ends.iter().filter(|w| w.at == self.rank).map(|w| w.ready).min()
    }
}

impl transport::Fabric for Fabric {
    fn request(&mut self, peer: Rank) {
        assert!(peer != self.rank, "a rank has no link to itself");
        let pair = (self.rank.min(peer), self.rank.max(peer));
        let mut state = self.network.lock();
        if state.requests.linked.contains(&pair) {
            return;
        }
        state.requests.linked.push(pair);
        let ready = state.now.after_ns(state.delay());
        if state.gone.contains(&peer) {
            let failed = Some(Cause::Exited);
            state.requests.ends.push(Waiting { at: self.rank, peer, ready, pipes: Vec::new(), failed });
            return;
        }
        let other = state.now.after_ns(state.delay());
        drop(state);
        let (mine, theirs) = (0..=LANES).map(|_| self.network.pipe(self.rank, peer)).unzip();
        let mut state = self.network.lock();
        let ends = &mut state.requests.ends;
        ends.push(Waiting { at: self.rank, peer, ready, pipes: mine, failed: None });
        ends.push(Waiting { at: peer, peer: self.rank, ready: other, pipes: theirs, failed: None });
    }

    fn poll(&mut self) -> Option<FabricEvent> {
        let mut state = self.network.lock();
        let (rank, now) = (self.rank, state.now);
        let at = state.requests.ends.iter().position(|w| w.at == rank && w.ready <= now)?;
        let Waiting { peer, pipes, failed, .. } = state.requests.ends.remove(at);
        drop(state);
        if let Some(cause) = failed {
            return Some(FabricEvent::Failed { peer, culprit: peer, cause });
        }
        let mut pipes = pipes.into_iter().map(|pipe| Box::new(pipe) as Box<dyn Pipe>);
        let control = pipes.next().expect("a link has a control pipe");
        let board = self.network.lock().boards.get(&peer).cloned();
        let link = FlowLink::new(peer, control, pipes.collect(), self.options).with_board(board);
        Some(FabricEvent::Up(Box::new(link)))
    }

    fn board(&self) -> Option<Arc<BoardMemory>> {
        self.network.lock().boards.get(&self.rank).cloned()
    }
}
