use super::*;
use crate::memory::Memory;
use crate::transport::flow::FlowOptions;
use crate::transport::{self, Events, FabricEvent, Link};

fn network(seed: u64) -> Network {
    Network::new(SimOptions { seed, fragments: false, ..SimOptions::default() })
}

fn run_out(network: &Network) {
    while let Some(time) = network.next_event() {
        network.advance(time);
    }
}

#[test]
fn bytes_take_time_and_the_same_seed_takes_the_same_time() {
    let arrival = |seed| {
        let network = network(seed);
        let (mut a, mut b) = network.pipe(Rank(0), Rank(1));
        assert_eq!(a.write(&[IoSlice::new(b"hello")]).unwrap(), 5);
        assert!(b.peek().unwrap().is_empty(), "nothing arrives at once");
        let time = network.next_event().unwrap();
        network.advance(time);
        assert!(b.arm(false).unwrap());
        assert_eq!(b.peek().unwrap(), b"hello");
        time
    };
    assert_eq!(arrival(7), arrival(7));
    assert_ne!(arrival(7), arrival(8));
}

#[test]
fn faults_do_what_they_say() {
    let network = network(1);
    let (mut a, mut b) = network.pipe(Rank(0), Rank(1));
    network.drop_silently(Rank(0), Rank(1));
    assert_eq!(a.write(&[IoSlice::new(b"lost")]).unwrap(), 4);
    b.write(&[IoSlice::new(b"kept")]).unwrap();
    network.pause(Rank(0));
    assert_eq!(network.next_event(), None, "a paused rank hears nothing");
    network.resume(Rank(0));
    run_out(&network);
    assert_eq!(a.peek().unwrap(), b"kept");
    assert!(b.peek().unwrap().is_empty(), "half-open: one direction works");
    network.cut(Rank(1), Rank(0));
    run_out(&network);
    assert_eq!(a.peek().unwrap(), b"kept", "what came before the cut is there");
    a.consume(4);
    assert_eq!(a.peek().err(), Some(Cause::Exited));
    assert_eq!(b.peek().err(), Some(Cause::Exited));
}

#[test]
fn capacity_is_bounded() {
    let network = network(1);
    let (mut a, _b) = network.pipe(Rank(0), Rank(1));
    let big = vec![0; 1 << 20];
    assert_eq!(a.write(&[IoSlice::new(&big)]).unwrap(), 64 << 10);
    assert_eq!(a.write(&[IoSlice::new(&big)]).unwrap(), 0);
}

fn up(fabric: &mut Fabric, network: &Network) -> Result<Box<dyn Link>, Cause> {
    let time = fabric.next_event().expect("something is under way");
    network.advance(time);
    match transport::Fabric::poll(fabric).expect("it has happened") {
        FabricEvent::Up(link) => Ok(link),
        FabricEvent::Failed { cause, .. } => Err(cause),
    }
}

#[test]
fn a_fabric_links_two_ranks_once() {
    let network = network(3);
    let fabric = |rank| Fabric::new(network.clone(), Rank(rank), FlowOptions::default());
    let (mut a, mut b, mut c) = (fabric(0), fabric(1), fabric(2));
    // Both ask at the same time: one link.
    transport::Fabric::request(&mut a, Rank(1));
    transport::Fabric::request(&mut b, Rank(0));
    let (mut at_a, mut at_b) = (up(&mut a, &network).unwrap(), up(&mut b, &network).unwrap());
    assert!(a.next_event().is_none() && b.next_event().is_none());
    assert_eq!((at_a.peer(), at_b.peer(), at_a.kind()), (Rank(1), Rank(0), "sim"));
    at_a.tell(b"hello");
    let (memory, mut events) = (Memory::default(), Events::default());
    at_a.progress(&memory, network.now(), &mut events).unwrap();
    run_out(&network);
    at_b.progress(&memory, network.now(), &mut events).unwrap();
    assert_eq!(events.control, b"hello");
    network.kill(Rank(1));
    run_out(&network);
    at_a.progress(&memory, network.now(), &mut events).unwrap_err();
    transport::Fabric::request(&mut c, Rank(1));
    assert!(matches!(up(&mut c, &network), Err(Cause::Exited)), "a dead rank is not reached");
}
