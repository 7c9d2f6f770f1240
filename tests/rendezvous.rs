//! Ranks find, prove and reach each other over real sockets: several ranks as threads of one process.

use carole::config::Config;
use carole::error::{Cause, Error, Result};
use carole::memory::Memory;
use carole::rendezvous::Warn;
use carole::rendezvous::client::{Join, Joined, join};
use carole::rendezvous::place::Environment;
use carole::rendezvous::porter::{Choice, Porter, PorterFabric, PorterOptions};
use carole::rendezvous::secret::Secret;
use carole::rendezvous::server::{Bind, Server, ServerOptions};
use carole::transport::wake::Waker;
use carole::transport::{Events, Fabric, FabricEvent, Link, LinkEvent};
use carole::types::{Epoch, Rank, Time};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Descriptors are counted, so the tests of this file run one after the other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner())
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn warnings() -> (Warn, Arc<Mutex<Vec<String>>>) {
    let list = Arc::new(Mutex::new(Vec::new()));
    let sink = list.clone();
    (Arc::new(move |text: &str| sink.lock().unwrap().push(text.to_owned())), list)
}

fn quiet() -> Warn {
    Arc::new(|_| {})
}

fn environment(pairs: &[(&str, &str)]) -> Environment {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn unique(what: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{what}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

fn rank_environment(rank: u32, size: u32, more: &[(&str, &str)]) -> Environment {
    let mut environment = environment(more);
    environment.insert("CAROLE_RANK".into(), rank.to_string());
    environment.insert("CAROLE_SIZE".into(), size.to_string());
    environment
}

/// Joins all ranks at once, each in a thread.
fn join_all(size: u32, config: impl Fn(u32) -> Join + Sync) -> Vec<Result<Joined>> {
    std::thread::scope(|scope| {
        let config = &config;
        let threads: Vec<_> = (0..size).map(|rank| scope.spawn(move || join(&config(rank)))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn private(job: &str, size: u32) -> impl Fn(u32) -> Join + Sync + use<> {
    let job = job.to_owned();
    move |rank| Join::new(rank_environment(rank, size, &[("CAROLE_JOB", &job)]), Epoch(0), quiet())
}

struct Node {
    porter: Porter,
    fabric: PorterFabric,
    waker: Waker,
    links: Vec<Box<dyn Link>>,
    failed: Vec<(Rank, String)>,
}

impl Node {
    fn start(joined: Joined, options: PorterOptions) -> Node {
        let waker = Waker::new().unwrap();
        let (porter, fabric) = Porter::start(joined, options, waker.clone()).unwrap();
        Node { porter, fabric, waker, links: Vec::new(), failed: Vec::new() }
    }
    fn collect(&mut self) {
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

fn options(choice: Choice, tcp_lanes: usize) -> PorterOptions {
    PorterOptions { choice, tcp_lanes, ..PorterOptions::default() }
}

/// Drives all nodes until `done` or a limit that only a hang reaches.
fn drive(nodes: &mut [Node], mut done: impl FnMut(&mut [Node]) -> bool) {
    let limit = Instant::now() + Duration::from_secs(40);
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
fn talk(nodes: &mut [Node]) {
    let memory = Memory::default();
    let all = nodes.len();
    let mut heard = vec![vec![false; all]; all];
    for (me, node) in nodes.iter_mut().enumerate() {
        for link in &mut node.links {
            let to = link.peer().0;
            link.tell(format!("from {me} to {to}").as_bytes());
        }
    }
    let limit = Instant::now() + Duration::from_secs(20);
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
fn mesh(joined: Vec<Result<Joined>>, options: PorterOptions, kind: &str) -> Vec<Node> {
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

fn stop(nodes: Vec<Node>) {
    for node in nodes {
        drop(node.links);
        node.porter.shutdown();
    }
}

fn secret_file(secret: &Secret) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o600)).unwrap();
    file.write_all(secret.to_hex().as_bytes()).unwrap();
    file
}

fn text(result: Result<Joined>) -> String {
    match result {
        Ok(_) => panic!("this must fail"),
        Err(error) => {
            assert!(matches!(error, Error::Usage(_)));
            error.to_string()
        }
    }
}

#[test]
fn without_variables_a_rank_is_alone() {
    let _alone = alone();
    let joined = join(&Join::new(environment(&[]), Epoch(0), quiet())).unwrap();
    assert_eq!((joined.rank, joined.table.cards.len()), (Rank(0), 1));
    stop(vec![Node::start(joined, PorterOptions::default())]);
}

#[test]
fn one_host_without_anything_set_forms_links_of_every_kind() {
    let _alone = alone();
    let before = descriptors();
    for (choice, lanes, kind) in
        [(Choice::Auto, 1, "shm"), (Choice::Shm, 1, "shm"), (Choice::Tcp, 1, "tcp"), (Choice::Tcp, 4, "tcp")]
    {
        for size in [2, 5] {
            let joined = join_all(size, private(&unique("kinds"), size));
            stop(mesh(joined, options(choice, lanes), kind));
        }
    }
    assert_eq!(descriptors(), before, "descriptors leak");
}

#[test]
fn init_after_shutdown_works_any_number_of_times() {
    let _alone = alone();
    let job = unique("again");
    let before = descriptors();
    for epoch in 0..20 {
        let joined = join_all(3, |rank| Join { epoch: Epoch(epoch), ..private(&job, 3)(rank) });
        assert!(joined.iter().all(|j| j.as_ref().unwrap().table.epoch == Epoch(epoch)));
        stop(mesh(joined, options(Choice::Auto, 1), "shm"));
    }
    assert_eq!(descriptors(), before, "descriptors leak");
}

fn launcher(secret: &Secret, size: u32, timeout_ms: u64) -> Server {
    Server::start(ServerOptions {
        bind: Bind::Loopback(0),
        secret: secret.clone(),
        size,
        epoch: Epoch(0),
        once: false,
        start_timeout_ms: timeout_ms,
        publish: None,
        warn: quiet(),
    })
    .unwrap()
}

fn launched(server: &Server, secret: &Secret, size: u32) -> impl Fn(u32) -> Join + Sync + use<> {
    let address = format!("tcp://{}", server.addresses()[0]);
    let secret = secret.clone();
    move |rank| Join {
        secret: Some(secret.clone()),
        ..Join::new(rank_environment(rank, size, &[("CAROLE_RENDEZVOUS", &address)]), Epoch(0), quiet())
    }
}

#[test]
fn the_launchers_service_serves_epoch_after_epoch() {
    let _alone = alone();
    let before = descriptors();
    let secret = Secret::mint().unwrap();
    let server = launcher(&secret, 3, 20_000);
    for epoch in 0..4 {
        let config = launched(&server, &secret, 3);
        let joined = join_all(3, |rank| Join { epoch: Epoch(epoch), ..config(rank) });
        stop(mesh(joined, options(Choice::Tcp, 2), "tcp"));
    }
    let error = text(join(&launched(&server, &secret, 3)(1)));
    assert!(error.contains("epoch 0 of this job has already begun") && error.contains("rank 1"), "{error}");
    server.shutdown();
    assert_eq!(descriptors(), before, "descriptors leak");
}

#[test]
fn a_file_is_written_found_and_removed_even_over_a_stale_one() {
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("meet");
    // An earlier job's file: its address belongs to somebody who speaks, but not this language.
    let stranger = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let stale = format!("carole rendezvous 1\njob 00\nepoch 0\naddress {}\n", stranger.local_addr().unwrap());
    std::fs::write(&path, stale).unwrap();
    std::thread::spawn(move || {
        for stream in stranger.incoming().take(2) {
            let _ = stream.unwrap().write_all(b"HTTP/1.0 400 Bad Request\r\n\r\n");
        }
    });
    let file = secret_file(&Secret::mint().unwrap());
    let (meet, secret) = (format!("file://{}", path.display()), file.path().display().to_string());
    let config = |rank| {
        let more = [("CAROLE_RENDEZVOUS", meet.as_str()), ("CAROLE_SECRET_FILE", secret.as_str())];
        Join::new(rank_environment(rank, 3, &more), Epoch(0), quiet())
    };
    let joined = std::thread::scope(|scope| {
        let early: Vec<_> = [1, 2].map(|rank| scope.spawn(move || join(&config(rank)))).into_iter().collect();
        std::thread::sleep(Duration::from_millis(300));
        let mut all = vec![join(&config(0))];
        all.extend(early.into_iter().map(|thread| thread.join().unwrap()));
        all
    });
    stop(mesh(joined, options(Choice::Tcp, 1), "tcp"));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn arguments_of_init_and_lines_of_a_file_reach_the_rendezvous() {
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    let secret = secret_file(&Secret::mint().unwrap());
    let knobs = directory.path().join("knobs");
    let meet = format!("file://{}/meet", directory.path().display());
    // The variables name a port that nobody serves, and no secret.
    let port = free_port("127.0.0.1").to_string();
    std::fs::write(&knobs, format!("secret_file = {}\nhost_id = of the file\n", secret.path().display()))
        .unwrap();
    let joined = join_all(2, |rank| {
        let own = environment(&[
            ("CAROLE_CONFIG_FILE", knobs.to_str().unwrap()),
            ("CAROLE_RENDEZVOUS", &format!("127.0.0.1:{port}")),
            ("CAROLE_START_TIMEOUT_S", "20"),
            ("HOROVOD_RANK", &rank.to_string()),
        ]);
        // By field, as Python's keywords are, and by variable.
        let init = [("rendezvous".to_owned(), meet.clone()), ("CAROLE_SIZE".to_owned(), "2".to_owned())];
        let (config, _) = Config::load(&init, own.clone().into_iter()).unwrap();
        Join::from_config(&config, own.into_iter(), Epoch(0), quiet())
    });
    for joined in joined {
        let joined = joined.unwrap();
        assert!(joined.table.cards.iter().all(|card| card.host_id == "of the file"));
        let job = Secret::from_file(secret.path()).unwrap().job();
        assert_eq!(joined.table.job, job, "the secret is the file's");
    }
}

fn free_port(loopback: &str) -> u16 {
    std::net::TcpListener::bind((loopback, 0)).unwrap().local_addr().unwrap().port()
}

#[test]
fn rank_zero_serves_at_a_given_address_of_either_family() {
    let _alone = alone();
    for host in ["127.0.0.1", "::1"] {
        let port = free_port(host);
        let address = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let file = secret_file(&Secret::mint().unwrap());
        let secret = file.path().display().to_string();
        let more = [("CAROLE_RENDEZVOUS", address.as_str()), ("CAROLE_SECRET_FILE", secret.as_str())];
        let joined = join_all(2, |rank| Join::new(rank_environment(rank, 2, &more), Epoch(0), quiet()));
        stop(mesh(joined, options(Choice::Tcp, 1), "tcp"));
    }
}

#[test]
fn a_port_in_use_is_named() {
    let _alone = alone();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let config = Join {
        secret: Some(Secret::mint().unwrap()),
        ..Join::new(rank_environment(0, 2, &[("CAROLE_RENDEZVOUS", &address)]), Epoch(0), quiet())
    };
    let error = text(join(&config));
    assert!(
        error.contains("is in use") && error.contains(&taken.local_addr().unwrap().port().to_string()),
        "{error}"
    );
}

#[test]
fn links_over_ipv6() {
    let _alone = alone();
    let joined = join_all(3, private(&unique("six"), 3));
    let joined = joined
        .into_iter()
        .map(|joined| {
            let mut joined = joined.unwrap();
            let mut table = (*joined.table).clone();
            for card in &mut table.cards {
                card.addresses.retain(SocketAddr::is_ipv6);
                assert!(!card.addresses.is_empty(), "this host has ::1");
            }
            joined.table = Arc::new(table);
            Ok(joined)
        })
        .collect();
    stop(mesh(joined, options(Choice::Tcp, 2), "tcp"));
}

#[test]
fn missing_ranks_are_named_on_every_rank_that_came() {
    let _alone = alone();
    let secret = Secret::mint().unwrap();
    let server = launcher(&secret, 5, 700);
    let config = launched(&server, &secret, 5);
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = [0, 3]
            .map(|rank| {
                scope.spawn({
                    let c = config(rank);
                    move || join(&c)
                })
            })
            .into_iter()
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for result in results {
        let error = text(result);
        assert!(error.contains("ranks 1, 2, 4 of 5 did not arrive"), "{error}");
    }
    // One of the missing comes late and learns at once.
    let error = text(join(&config(1)));
    assert!(error.contains("ranks 1, 2, 4 of 5 did not arrive"), "{error}");
}

#[test]
fn knobs_that_differ_are_named_with_ranks_and_values() {
    let _alone = alone();
    let job = unique("knobs");
    let results = join_all(3, |rank| {
        let value = if rank == 1 { "ring" } else { "tree" };
        Join { knobs: vec![("CAROLE_ALGORITHM".into(), value.into())], ..private(&job, 3)(rank) }
    });
    for result in results {
        let error = text(result);
        assert!(error.contains("CAROLE_ALGORITHM must be the same on all ranks"), "{error}");
        assert!(error.contains("'ring' on rank 1") && error.contains("'tree' on ranks 0, 2"), "{error}");
    }
}

#[test]
fn two_processes_of_one_rank_are_both_named() {
    let _alone = alone();
    let secret = Secret::mint().unwrap();
    let server = launcher(&secret, 2, 1500);
    let config = launched(&server, &secret, 2);
    let errors: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn({
                    let c = config(1);
                    move || join(&c)
                })
            })
            .collect();
        threads.into_iter().map(|t| text(t.join().unwrap())).collect()
    });
    assert!(errors.iter().any(|e| e.contains("two processes claim rank 1")), "{errors:?}");
    assert!(errors.iter().any(|e| e.contains("rank 0 of 2 did not arrive")), "{errors:?}");
}

#[test]
fn a_wrong_secret_is_told_at_once_and_disturbs_nobody() {
    let _alone = alone();
    let secret = Secret::mint().unwrap();
    let server = launcher(&secret, 2, 20_000);
    let config = launched(&server, &secret, 2);
    let stranger = Join { secret: Some(Secret::mint().unwrap()), ..config(1) };
    let error = text(join(&stranger));
    assert!(error.contains("another job") && error.contains("secret"), "{error}");
    stop(mesh(join_all(2, config), options(Choice::Auto, 1), "shm"));
}

#[test]
fn scans_garbage_and_half_open_connections_disturb_neither_service_nor_links() {
    let _alone = alone();
    let secret = Secret::mint().unwrap();
    let server = launcher(&secret, 3, 20_000);
    let hold = |address: SocketAddr, silent: usize| -> Vec<TcpStream> {
        let mut open = Vec::new();
        for i in 0..silent + 20 {
            let Ok(mut stream) = TcpStream::connect(address) else { continue };
            match i % 4 {
                0 => {
                    drop(stream.write_all(b"GET / HTTP/1.1\r\n\r\n and much more garbage than a prefix has"))
                }
                1 => drop(stream.write_all(b"\x93carole\n\x01\0\0\0\xff\xff\xff\xff")),
                2 => drop(stream.write_all(b"\x93car")),
                _ => {}
            }
            open.push(stream);
        }
        open
    };
    let _held = hold(server.addresses()[0], 100);
    let joined = join_all(3, launched(&server, &secret, 3));
    let doors: Vec<SocketAddr> =
        joined.iter().flat_map(|j| j.as_ref().unwrap().doors.addresses.clone()).collect();
    let held: Vec<_> = doors.iter().map(|door| hold(*door, 70)).collect();
    stop(mesh(joined, options(Choice::Tcp, 2), "tcp"));
    drop(held);
}

#[test]
fn garbage_gets_no_answer() {
    let _alone = alone();
    let secret = Secret::mint().unwrap();
    let server = launcher(&secret, 2, 20_000);
    let mut stream = TcpStream::connect(server.addresses()[0]).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(answer.is_empty());
}

#[test]
fn a_peer_that_is_gone_is_told_at_once() {
    let _alone = alone();
    let mut joined: Vec<Joined> =
        join_all(3, private(&unique("gone"), 3)).into_iter().map(Result::unwrap).collect();
    drop(joined.remove(1));
    let mut nodes: Vec<Node> = joined.into_iter().map(|j| Node::start(j, options(Choice::Auto, 1))).collect();
    for node in &mut nodes {
        node.fabric.request(Rank(1));
    }
    let start = Instant::now();
    drive(&mut nodes, |nodes| nodes.iter().all(|n| n.failed.len() == 1));
    assert!(start.elapsed() < Duration::from_secs(5), "a refused connection needs no deadline");
    for node in &nodes {
        // The words of a link that ended, so that it makes no difference whether there was one.
        assert_eq!(node.failed[0], (Rank(1), format!("rank 1 {}", Cause::Exited)));
    }
    stop(nodes);
}

#[test]
fn a_peer_that_does_not_answer_is_silent_as_long_as_any_and_others_do_not_wait() {
    let _alone = alone();
    for choice in [Choice::Auto, Choice::Tcp] {
        let joined: Vec<Joined> =
            join_all(3, private(&unique("mute"), 3)).into_iter().map(Result::unwrap).collect();
        // Rank 1's doors are open, but nobody is home, as with a process that is stopped.
        let mut nodes = Vec::new();
        let mut mute = None;
        for joined in joined {
            if joined.rank == Rank(1) {
                mute = Some(joined)
            } else {
                nodes.push(Node::start(joined, PorterOptions { silence_ms: 1200, ..options(choice, 1) }))
            }
        }
        let start = Instant::now();
        // Rank 0 knocks, rank 2 connects.
        nodes[0].fabric.request(Rank(1));
        nodes[1].fabric.request(Rank(1));
        nodes[1].fabric.request(Rank(0));
        drive(&mut nodes, |nodes| nodes.iter().all(|n| n.links.len() == 1));
        assert!(
            nodes.iter().all(|n| n.failed.is_empty()),
            "the link to the living does not wait for the mute"
        );
        drive(&mut nodes, |nodes| nodes.iter().all(|n| n.failed.len() == 1));
        // Links had ten seconds before.
        assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
        for node in &nodes {
            let words = format!("rank 1 {}", Cause::Silent { for_ms: 1200 });
            assert_eq!(node.failed, [(Rank(1), words)], "the words of a link that falls silent");
        }
        drop(mute);
        stop(nodes);
    }
}

#[test]
fn when_the_connector_fails_the_one_that_knocked_fails_alike() {
    let _alone = alone();
    let joined: Vec<Joined> =
        join_all(2, private(&unique("deaf"), 2)).into_iter().map(Result::unwrap).collect();
    let mut nodes: Vec<Node> = joined
        .into_iter()
        .map(|mut joined| {
            if joined.rank == Rank(1) {
                // Rank 1 looks for rank 0 where nobody listens, as across a firewall with one open direction.
                let mut table = (*joined.table).clone();
                table.cards[0].socket = Some([0xee; 16]);
                table.cards[0].addresses = vec![SocketAddr::from(([127, 0, 0, 1], free_port("127.0.0.1")))];
                table.cards[0].host_id = "far".into();
                joined.table = Arc::new(table);
            }
            Node::start(joined, options(Choice::Tcp, 1))
        })
        .collect();
    // Rank 1's engine asks for nothing; its call fails with the epoch all the same.
    nodes[0].fabric.request(Rank(1));
    let start = Instant::now();
    drive(&mut nodes, |nodes| nodes.iter().all(|n| n.failed.len() == 1));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let words = &nodes[0].failed[0].1;
    assert!(words.starts_with("rank 0 cannot be reached") && words.contains("127.0.0.1"), "{words}");
    assert_eq!(*words, nodes[1].failed[0].1, "both name the same culprit in the same words");
    stop(nodes);
}

#[test]
fn a_connector_that_ends_after_a_knock_is_noticed_at_once() {
    let _alone = alone();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let stranger = listener.local_addr().unwrap();
    std::thread::spawn(move || listener.incoming().for_each(drop));
    let joined: Vec<Joined> =
        join_all(2, private(&unique("knocked"), 2)).into_iter().map(Result::unwrap).collect();
    let mut nodes: Vec<Node> = joined
        .into_iter()
        .map(|mut joined| {
            if joined.rank == Rank(1) {
                // It goes on trying an address where somebody else closes every connection.
                let mut table = (*joined.table).clone();
                table.cards[0].socket = None;
                table.cards[0].addresses = vec![stranger];
                joined.table = Arc::new(table);
            }
            Node::start(joined, PorterOptions { silence_ms: 1200, ..options(Choice::Auto, 1) })
        })
        .collect();
    nodes[0].fabric.request(Rank(1));
    // Longer than the silence: it says that it is still trying, so it is not taken for a stopped one.
    let until = Instant::now() + Duration::from_millis(2500);
    drive(&mut nodes, |_| Instant::now() >= until);
    assert!(nodes.iter().all(|node| node.failed.is_empty()), "{:?} {:?}", nodes[0].failed, nodes[1].failed);
    let start = Instant::now();
    stop(vec![nodes.pop().unwrap()]);
    drive(&mut nodes, |nodes| nodes[0].failed.len() == 1);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    stop(nodes);
}

#[test]
fn forced_shared_memory_between_hosts_is_refused_and_auto_takes_tcp() {
    let _alone = alone();
    let job = unique("hosts");
    let apart = |rank: u32| {
        let mut config = private(&job, 2)(rank);
        config.environment.insert("CAROLE_HOST_ID".into(), format!("host-{rank}"));
        config
    };
    let mut nodes: Vec<Node> =
        join_all(2, apart).into_iter().map(|j| Node::start(j.unwrap(), options(Choice::Shm, 1))).collect();
    nodes[1].fabric.request(Rank(0));
    drive(&mut nodes, |nodes| nodes[1].failed.len() == 1);
    assert!(nodes[1].failed[0].1.contains("share no memory"), "{:?}", nodes[1].failed);
    stop(nodes);
    stop(mesh(join_all(2, apart), options(Choice::Auto, 1), "tcp"));
}

#[test]
fn where_shared_memory_fails_auto_takes_tcp_and_warns_once() {
    let _alone = alone();
    let (warn, list) = warnings();
    let job = unique("fallback");
    let joined: Vec<Joined> = join_all(3, |rank| Join { warn: warn.clone(), ..private(&job, 3)(rank) })
        .into_iter()
        .map(|joined| {
            let mut joined = joined.unwrap();
            let mut table = (*joined.table).clone();
            // Nobody listens there, as in another network namespace.
            table.cards.iter_mut().for_each(|card| card.socket = Some([0xee; 16]));
            joined.table = Arc::new(table);
            joined
        })
        .collect();
    stop(mesh(joined.into_iter().map(Ok).collect(), options(Choice::Auto, 1), "tcp"));
    let list = list.lock().unwrap();
    // Rank 1 connects to 0, rank 2 to 0 and 1: one warning each.
    assert_eq!(list.len(), 2, "{list:?}");
    assert!(list[0].contains("TCP is used instead"), "{list:?}");
}

#[test]
fn racing_requests_make_one_link() {
    let _alone = alone();
    let job = unique("race");
    for epoch in 0..15 {
        let joined = join_all(2, |rank| Join { epoch: Epoch(epoch), ..private(&job, 2)(rank) });
        let choice = if epoch % 2 == 0 { Choice::Tcp } else { Choice::Auto };
        let mut nodes: Vec<Node> =
            joined.into_iter().map(|j| Node::start(j.unwrap(), options(choice, 2))).collect();
        std::thread::scope(|scope| {
            for (me, node) in nodes.iter_mut().enumerate() {
                scope.spawn(move || node.fabric.request(Rank(1 - me as u32)));
            }
        });
        drive(&mut nodes, |nodes| nodes.iter().all(|n| n.links.len() == 1));
        talk(&mut nodes);
        nodes.iter_mut().for_each(Node::collect);
        assert!(nodes.iter().all(|n| n.links.len() == 1 && n.failed.is_empty()));
        stop(nodes);
    }
}

#[test]
fn the_lower_rank_alone_can_ask() {
    let _alone = alone();
    for choice in [Choice::Auto, Choice::Tcp] {
        let joined = join_all(2, private(&unique("knock"), 2));
        let mut nodes: Vec<Node> =
            joined.into_iter().map(|j| Node::start(j.unwrap(), options(choice, 1))).collect();
        nodes[0].fabric.request(Rank(1));
        drive(&mut nodes, |nodes| nodes.iter().all(|n| n.links.len() == 1));
        talk(&mut nodes);
        stop(nodes);
    }
}
