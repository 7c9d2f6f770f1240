//! Links between ranks: which kind, by whom, and what happens where there can be none. Real sockets, several ranks
//! as threads of one process.

mod meeting;

use carole::error::Cause;
use carole::rendezvous::Warn;
use carole::rendezvous::client::{Join, Joined};
use carole::rendezvous::porter::{Choice, PorterOptions};
use carole::transport::Fabric;
use carole::types::{Epoch, Rank};
use meeting::{Node, alone, drive, free_port, join_all, mesh, options, private, stop, talk, unique};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

fn warnings() -> (Warn, Arc<Mutex<Vec<String>>>) {
    let list = Arc::new(Mutex::new(Vec::new()));
    let sink = list.clone();
    (Arc::new(move |text: &str| sink.lock().unwrap().push(text.to_owned())), list)
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
    drive(&mut nodes, |nodes| nodes.iter().all(|n| n.failed.len() == 1));
    for node in &nodes {
        // A refused connection needs no deadline, which would have other words. These are the words of a link that
        // ended, so that it makes no difference whether there was one.
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
                nodes.push(Node::start(joined, PorterOptions { silence_ms: 4000, ..options(choice, 1) }))
            }
        }
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
        for node in &nodes {
            let words = format!("rank 1 {}", Cause::Silent { for_ms: 4000 });
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
    drive(&mut nodes, |nodes| nodes.iter().all(|n| n.failed.len() == 1));
    let words = &nodes[0].failed[0].1;
    assert!(words.starts_with("rank 0 cannot be reached") && words.contains("127.0.0.1"), "{words}");
    assert_eq!(*words, nodes[1].failed[0].1, "both name the same culprit in the same words");
    stop(nodes);
}

/// Rank 1, which connects, goes on trying an address where somebody else closes every connection.
fn with_a_futile_connector(stranger: SocketAddr) -> Vec<Node> {
    let joined: Vec<Joined> =
        join_all(2, private(&unique("knocked"), 2)).into_iter().map(Result::unwrap).collect();
    let start = |mut joined: Joined| {
        if joined.rank == Rank(1) {
            let mut table = (*joined.table).clone();
            table.cards[0].socket = None;
            table.cards[0].addresses = vec![stranger];
            joined.table = Arc::new(table);
        }
        Node::start(joined, PorterOptions { silence_ms: 3000, ..options(Choice::Auto, 1) })
    };
    joined.into_iter().map(start).collect()
}

#[test]
fn a_connector_that_ends_after_a_knock_is_noticed_at_once() {
    let _alone = alone();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let stranger = listener.local_addr().unwrap();
    std::thread::spawn(move || listener.incoming().for_each(drop));
    for attempt in 1.. {
        let mut nodes = with_a_futile_connector(stranger);
        nodes[0].fabric.request(Rank(1));
        // Longer than the silence: it says that it is still trying, so it is not taken for a stopped one.
        let start = Instant::now();
        let (mut last, mut gap) = (start, Duration::ZERO);
        drive(&mut nodes, |_| {
            gap = gap.max(last.elapsed());
            last = Instant::now();
            start.elapsed() >= Duration::from_millis(4500)
        });
        if nodes.iter().any(|node| !node.failed.is_empty()) {
            // Where threads get no processor for so long, silence means nothing.
            assert!(attempt < 5 && gap > Duration::from_millis(500), "{:?}", nodes[0].failed);
            stop(nodes);
            continue;
        }
        stop(vec![nodes.pop().unwrap()]);
        drive(&mut nodes, |nodes| nodes[0].failed.len() == 1);
        // At the limit for links, or of silence, the words would be others.
        assert_eq!(nodes[0].failed[0], (Rank(1), format!("rank 1 {}", Cause::Exited)));
        return stop(nodes);
    }
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
