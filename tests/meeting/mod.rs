//! Several ranks as threads of one process, with real sockets between them.

use carole::error::Result;
use carole::memory::Memory;
use carole::rendezvous::Warn;
use carole::rendezvous::client::{Join, Joined, join};
use carole::rendezvous::place::Environment;
use carole::rendezvous::porter::{Choice, Porter, PorterFabric, PorterOptions};
use carole::transport::wake::Waker;
use carole::transport::{Events, Fabric, FabricEvent, Link, LinkEvent};
use carole::types::{Epoch, Rank, Time};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Descriptors are counted, so the tests of this file run one after the other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

pub fn alone() -> std::sync::MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner())
}

pub fn quiet() -> Warn {
    Arc::new(|_| {})
}

pub fn environment(pairs: &[(&str, &str)]) -> Environment {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

pub fn unique(what: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{what}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

pub fn rank_environment(rank: u32, size: u32, more: &[(&str, &str)]) -> Environment {
    let mut environment = environment(more);
    environment.insert("CAROLE_RANK".into(), rank.to_string());
    environment.insert("CAROLE_SIZE".into(), size.to_string());
    environment
}

/// Joins all ranks at once, each in a thread.
pub fn join_all(size: u32, config: impl Fn(u32) -> Join + Sync) -> Vec<Result<Joined>> {
    std::thread::scope(|scope| {
        let config = &config;
        let threads: Vec<_> = (0..size).map(|rank| scope.spawn(move || join(&config(rank)))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

pub fn private(job: &str, size: u32) -> impl Fn(u32) -> Join + Sync + use<> {
    let job = job.to_owned();
    move |rank| Join::new(rank_environment(rank, size, &[("CAROLE_JOB", &job)]), Epoch(0), quiet())
}

pub struct Node {
    pub porter: Porter,
    pub fabric: PorterFabric,
    pub waker: Waker,
    pub links: Vec<Box<dyn Link>>,
    pub failed: Vec<(Rank, String)>,
}

impl Node {
    pub fn start(joined: Joined, options: PorterOptions) -> Node {
        let waker = Waker::new().unwrap();
        let (porter, fabric) = Porter::start(joined, options, waker.clone()).unwrap();
        Node { porter, fabric, waker, links: Vec::new(), failed: Vec::new() }
    }
    pub fn collect(&mut self) {
        while let Some(event) = self.fabric.poll() {
            match event {
                FabricEvent::Up(link) => self.links.push(link),
                FabricEvent::Failed { peer, culprit, cause } => {
                    self.failed.push((peer, format!("{culprit} {cause}")));
                }
            }
        }
    }
}

pub fn options(choice: Choice, tcp_lanes: usize) -> PorterOptions {
    PorterOptions { choice, tcp_lanes, ..PorterOptions::default() }
}

/// Drives all nodes until `done` or a limit that only a hang reaches.
pub fn drive(nodes: &mut [Node], mut done: impl FnMut(&mut [Node]) -> bool) {
    let limit = Instant::now() + Duration::from_secs(120);
    loop {
        nodes.iter_mut().for_each(Node::collect);
        if done(nodes) {
            return;
        }
        let seen: Vec<_> = nodes.iter().map(|n| (n.links.len(), n.failed.clone())).collect();
        assert!(Instant::now() < limit, "it hangs: {seen:?}");
        let wakers: Vec<Waker> = nodes.iter().map(|n| n.waker.clone()).collect();
        let mut fds: Vec<_> =
            wakers.iter().map(|w| rustix::event::PollFd::new(w, rustix::event::PollFlags::IN)).collect();
        let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
        rustix::event::poll(&mut fds, Some(&timeout)).unwrap();
        wakers.iter().for_each(Waker::clear);
    }
}

/// Sends a control message over every link and waits until all have arrived, whole and from the right rank.
pub fn talk(nodes: &mut [Node]) {
    let memory = Memory::default();
    let all = nodes.len();
    let mut heard = vec![vec![false; all]; all];
    for (me, node) in nodes.iter_mut().enumerate() {
        for link in &mut node.links {
            let to = link.peer().0;
            link.tell(format!("from {me} to {to}").as_bytes());
        }
    }
    let limit = Instant::now() + Duration::from_secs(120);
    let mut events = Events::default();
    while heard.iter().enumerate().any(|(me, row)| row.iter().enumerate().any(|(peer, h)| me != peer && !h)) {
        assert!(Instant::now() < limit, "messages are missing: {heard:?}");
        for (me, node) in nodes.iter_mut().enumerate() {
            for link in &mut node.links {
                events.clear();
                link.progress(&memory, Time(1), &mut events).unwrap();
                for event in &events.list {
                    let LinkEvent::Control(range) = event else { panic!("{event:?}") };
                    let peer = link.peer().0 as usize;
                    assert_eq!(&events.control[range.clone()], format!("from {peer} to {me}").as_bytes());
                    assert!(!heard[me][peer], "a message came twice");
                    heard[me][peer] = true;
                }
            }
        }
    }
}

/// All ranks ask for all others, in different orders; one link per pair must come of it.
pub fn mesh(joined: Vec<Result<Joined>>, options: PorterOptions, kind: &str) -> Vec<Node> {
    let mut nodes: Vec<Node> = joined.into_iter().map(|j| Node::start(j.unwrap(), options.clone())).collect();
    let size = nodes.len() as u32;
    for (me, node) in nodes.iter_mut().enumerate() {
        let mut peers: Vec<u32> = (0..size).filter(|peer| *peer != me as u32).collect();
        peers.rotate_left(me % (size as usize - 1));
        for peer in peers.iter().chain(&peers) {
            node.fabric.request(Rank(*peer));
        }
    }
    drive(&mut nodes, |nodes| nodes.iter().all(|n| n.links.len() == size as usize - 1));
    for node in &nodes {
        assert!(node.failed.is_empty(), "{:?}", node.failed);
        assert!(node.links.iter().all(|link| link.kind() == kind), "{kind} was to be used");
    }
    talk(&mut nodes);
    nodes
}

pub fn stop(nodes: Vec<Node>) {
    for node in nodes {
        drop(node.links);
        node.porter.shutdown();
    }
}

/// A port that nobody listens on. The kernel gives those from 32768 on to whatever connects or binds to port 0, at any
/// moment; it never gives one of these.
pub fn free_port(loopback: &str) -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let turn = NEXT.fetch_add(1, Ordering::Relaxed);
        // Test processes run side by side: each has its own places in the range.
        let place = std::process::id().wrapping_mul(37).wrapping_add(u32::from(turn));
        let port = 10_000 + (place % 22_000) as u16;
        if std::net::TcpListener::bind((loopback, port)).is_ok() {
            return port;
        }
    }
}
