//! The porter: one thread per process that owns this rank's doors, makes and takes connections, has them
//! proven, and hands finished links to the engine. A peer that is stopped or hostile keeps nobody waiting but
//! this thread's timers.
//!
//! Of two ranks **the higher one connects**, always and alone. A lower one that wants a link *knocks*: it proves
//! itself at the higher one's door, and the higher one then connects as if its own engine had asked. The
//! knock stays open until the link is there: on it the higher one says that it is still trying, or why there
//! will be no link, so that both fail alike and at one time (`hall/knocks.rs`). So there is one connector for each pair, which has at most one attempt under way and none after success:
//! however requests race, at most one link forms. An attempt has a number that its connections carry in
//! their proofs; the accepting side assembles the newest attempt only, and takes it as done at the
//! connector's last word (*go*), which is sent when everything else has been proven.
#![forbid(unsafe_code)]

pub(super) mod dial;
mod hall;
mod share;

use super::client::Joined;
use crate::error::Cause;
use crate::limits::{SILENCE_MS, TCP_LANES_MAX};
use crate::transport::board::{BOARD_BYTES, BoardMemory};
use crate::transport::shm::{Budget, SEGMENT_BYTES};
use crate::transport::tcp::TcpOptions;
use crate::transport::wake::Waker;
use crate::transport::{Fabric, FabricEvent};
use crate::types::Rank;
use crossbeam::channel::{Receiver, Sender, bounded};
use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

/// This rank follows nobody.
const NOBODY: u32 = u32::MAX;

/// Which transports links may use. Agreed between all ranks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Choice {
    /// Shared memory where a host is shared and it works, else TCP.
    #[default]
    Auto,
    /// Shared memory or nothing.
    Shm,
    /// TCP everywhere.
    Tcp,
    /// MPI everywhere. A connection by TCP proves the peer, and then only tells of its end.
    Mpi,
}

impl Choice {
    /// Whether ranks of one host may share memory.
    #[must_use]
    pub fn shares_memory(self) -> bool {
        matches!(self, Choice::Auto | Choice::Shm)
    }
}

/// How links are to be made.
#[derive(Clone, Debug)]
pub struct PorterOptions {
    /// Which transports.
    pub choice: Choice,
    /// TCP connections per link that carry payload, besides the control connection: 1 to [`TCP_LANES_MAX`], and none
    /// with MPI.
    pub tcp_lanes: usize,
    /// Whether the lanes of a link are spread over the peer's addresses, so that several networks are used together.
    pub spread: bool,
    /// Options of each TCP connection.
    pub tcp: TcpOptions,
    /// The shared memory that links may take.
    pub memory: Budget,
    /// A peer whose doors take connections and that does not answer for so long is held to be stopped. The same
    /// as for a link that is up, so that it makes no difference whether there is one already.
    pub silence_ms: u64,
}

impl Default for PorterOptions {
    fn default() -> Self {
        PorterOptions {
            choice: Choice::Auto,
            tcp_lanes: 1,
            spread: false,
            tcp: TcpOptions::default(),
            memory: Budget::new(u64::MAX),
            silence_ms: SILENCE_MS,
        }
    }
}

/// The running thread. It ends with [`Porter::shutdown`] or when dropped; links that it made live on.
pub struct Porter {
    follows: Arc<AtomicU32>,
    stop: Sender<()>,
    bell: Waker,
    thread: Option<JoinHandle<()>>,
}

/// The engine's end: asks for links and is told.
pub struct PorterFabric {
    asked: HashSet<Rank>,
    failed: Vec<Rank>,
    requests: Sender<Rank>,
    events: Receiver<FabricEvent>,
    bell: Waker,
    board: Option<Arc<BoardMemory>>,
}

impl Porter {
    /// Starts the thread. It takes over the rank's doors, and rank 0's own service. After each event it wakes
    /// `waker`, which is also what peers on this host are given to wake this process.
    pub fn start(joined: Joined, options: PorterOptions, waker: Waker) -> io::Result<(Porter, PorterFabric)> {
        let fits = (1..=TCP_LANES_MAX).contains(&options.tcp_lanes);
        assert!(fits != (options.choice == Choice::Mpi), "the number of lanes is checked as a knob");
        let size = joined.table.cards.len();
        // Each peer is asked for once until it is told, so these bounds are never reached.
        let (requests, asked) = bounded(size);
        let (tell, events) = bounded(2 * size);
        let (stop, stopped) = bounded(1);
        let bell = Waker::new()?;
        let (fd, board) = own_board(&joined, &options).unzip();
        let follows = Arc::new(AtomicU32::new(NOBODY));
        let ends = hall::Ends {
            requests: asked,
            events: tell,
            stopped,
            bell: bell.clone(),
            waker,
            board: fd,
            follows: Arc::clone(&follows),
        };
        let mut hall = hall::Hall::new(joined, options, ends)?;
        let thread = std::thread::Builder::new().name("carole-porter".into()).spawn(move || hall.run())?;
        let fabric = PorterFabric {
            asked: HashSet::new(),
            failed: Vec::new(),
            requests,
            events,
            bell: bell.clone(),
            board,
        };
        Ok((Porter { follows, stop, bell, thread: Some(thread) }, fabric))
    }

    /// Closes the doors and all unfinished connections and joins the thread. Bounded by `SHUTDOWN_MS`, which
    /// only rank 0 can need, to let its service finish sending.
    pub fn shutdown(mut self) {
        self.end();
    }

    /// From now on whoever comes to regroup is told that this rank has gone to that one.
    pub fn follow(&self, rank: Rank) {
        self.follows.store(rank.0, Ordering::Relaxed);
    }

    fn end(&mut self) {
        // Full means told already; disconnected means ended already.
        let _ = self.stop.try_send(());
        self.bell.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A board, where there are other ranks on this host to share it with. Without memory for it links do all the
/// work, and whoever cannot have them either is told so.
fn own_board(joined: &Joined, options: &PorterOptions) -> Option<(OwnedFd, Arc<BoardMemory>)> {
    let others = u64::from(joined.topology.local_size(joined.rank) - 1);
    // Links come first where the budget is small: nothing goes without them.
    let needed = BOARD_BYTES as u64 + others * SEGMENT_BYTES as u64;
    if !options.choice.shares_memory() || others == 0 || !options.memory.has(needed) {
        return None;
    }
    BoardMemory::create(&options.memory).ok()
}

impl Drop for Porter {
    fn drop(&mut self) {
        self.end();
    }
}

impl Fabric for PorterFabric {
    fn request(&mut self, peer: Rank) {
        if !self.asked.insert(peer) {
            return;
        }
        match self.requests.try_send(peer) {
            Ok(()) => self.bell.wake(),
            Err(_) => self.failed.push(peer),
        }
    }

    fn poll(&mut self) -> Option<FabricEvent> {
        if let Some(peer) = self.failed.pop() {
            self.asked.remove(&peer);
            let cause = Cause::Unreachable("links are no longer made here".into());
            return Some(FabricEvent::Failed { peer, culprit: peer, cause });
        }
        let event = self.events.try_recv().ok()?;
        match &event {
            // A link is there once in an epoch; after a failure the engine may ask again.
            FabricEvent::Up(link) => drop(self.asked.insert(link.peer())),
            FabricEvent::Failed { peer, .. } => drop(self.asked.remove(peer)),
        }
        Some(event)
    }

    fn board(&self) -> Option<Arc<BoardMemory>> {
        self.board.clone()
    }
}
