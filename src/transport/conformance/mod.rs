//! One suite for all transports: what a link must do, whatever carries it.

mod bench;
mod cases;
mod corruption;
mod faults;
mod rig;
mod sleep;

use crate::transport::Pipe;
use crate::transport::flow::{FlowLink, FlowOptions};
use crate::transport::shm::{self, Side};
use crate::transport::sim::{Network, SimOptions};
use crate::transport::tcp::{TcpOptions, TcpPipe};
use crate::transport::tls::{SEED_BYTES, Tls, TlsKey};
use crate::transport::wake::Waker;
use crate::types::Rank;
use rig::Rig;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

/// The pipes of a link at its two ends, control first.
pub(super) struct Ends {
    pub a: Vec<Box<dyn Pipe>>,
    pub b: Vec<Box<dyn Pipe>>,
    /// What ends the sleep of each side, where a transport has it.
    pub wakers: Option<(Waker, Waker)>,
    pub network: Option<Network>,
    pub checksums: bool,
}

impl Ends {
    fn rig(self) -> Rig {
        let link = |peer, mut pipes: Vec<Box<dyn Pipe>>| {
            let control = pipes.remove(0);
            let options = FlowOptions { checksums: self.checksums, ..FlowOptions::default() };
            FlowLink::new(Rank(peer), control, pipes, options)
        };
        Rig::new(link(1, self.a), link(0, self.b), self.network)
    }
}

pub(super) fn shm_ends() -> Ends {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let wakers = (Waker::new().unwrap(), Waker::new().unwrap());
    let segment = shm::create_segment().unwrap();
    let copy = segment.try_clone().unwrap();
    let eventfd = |w: &Waker| w.as_fd().try_clone_to_owned().unwrap();
    let share = || shm::Budget::new(u64::MAX).take(shm::SEGMENT_BYTES as u64).unwrap();
    let a = shm::open(segment, Side::Creator, ours.into(), wakers.0.clone(), eventfd(&wakers.1), share())
        .unwrap();
    let b =
        shm::open(copy, Side::Joiner, theirs.into(), wakers.1.clone(), eventfd(&wakers.0), share()).unwrap();
    let both = |(control, data): (shm::ShmPipe, shm::ShmPipe)| -> Vec<Box<dyn Pipe>> {
        vec![Box::new(control), Box::new(data)]
    };
    Ends { a: both(a), b: both(b), wakers: Some(wakers), network: None, checksums: false }
}

fn tcp_ends(address: &str, lanes: usize) -> Ends {
    let listener = TcpListener::bind(address).unwrap();
    let mut ends = Ends { a: vec![], b: vec![], wakers: None, network: None, checksums: false };
    for _ in 0..=lanes {
        let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (b, _) = listener.accept().unwrap();
        ends.a.push(tcp_pipe(a));
        ends.b.push(tcp_pipe(b));
    }
    ends
}

fn tcp_pipe(stream: TcpStream) -> Box<dyn Pipe> {
    Box::new(TcpPipe::new(stream, &TcpOptions::default()).unwrap())
}

fn tls_ends(lanes: usize) -> Ends {
    let key = TlsKey::derive(&[7; SEED_BYTES]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut ends = Ends { a: vec![], b: vec![], wakers: None, network: None, checksums: false };
    for _ in 0..=lanes {
        let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (b, _) = listener.accept().unwrap();
        let pipe = |stream: TcpStream, tls: Tls| -> Box<dyn Pipe> {
            Box::new(TcpPipe::encrypted(stream, Box::new(tls), &TcpOptions::default()).unwrap())
        };
        ends.a.push(pipe(a, Tls::connector(&key).unwrap()));
        ends.b.push(pipe(b, Tls::acceptor(&key).unwrap()));
    }
    ends
}

/// As between hosts: with checksums.
fn checked_ends() -> Ends {
    Ends { checksums: true, ..tcp_ends("127.0.0.1:0", 2) }
}

fn unix_ends() -> Ends {
    let mut ends = Ends { a: vec![], b: vec![], wakers: None, network: None, checksums: false };
    for _ in 0..3 {
        let (a, b) = UnixStream::pair().unwrap();
        ends.a.push(Box::new(TcpPipe::from_socket(a.into()).unwrap()));
        ends.b.push(Box::new(TcpPipe::from_socket(b.into()).unwrap()));
    }
    ends
}

/// Two ends in one process: it sends to itself, with other tags in each direction and for each pair.
#[cfg(feature = "mpi")]
fn mpi_ends() -> Ends {
    use crate::transport::mpi::{self, Address, Threads};
    use std::sync::atomic::{AtomicI32, Ordering};
    static TAGS: AtomicI32 = AtomicI32::new(0);
    // A process has one MPI, so that another number of threads takes another run of the suite.
    let one = std::env::var_os("CAROLE_TEST_MPI_ONE_THREAD").is_some();
    let threads = if one { Threads::One } else { Threads::Many };
    let limit = std::time::Duration::from_secs(30);
    let world = mpi::join(threads, limit).unwrap();
    let messages_only = std::env::var_os("CAROLE_TEST_MPI_MESSAGES").is_some();
    world.share(!messages_only, limit).unwrap();
    let (there, back) = (TAGS.fetch_add(8, Ordering::SeqCst), 4);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let peer = Rank(world.rank());
    let side = |tags, watch: UnixStream| -> Vec<Box<dyn Pipe>> {
        let (control, lane) = mpi::link(world, &Address { peer, tags }, Some(watch.into()), None).unwrap();
        vec![Box::new(control), Box::new(lane)]
    };
    let a = side((there, there + back), ours);
    let b = side((there + back, there), theirs);
    Ends { a, b, wakers: None, network: None, checksums: false }
}

fn sim_ends(seed: u64) -> Ends {
    let capacity_bytes = [480, 4096, 64 << 10, 1 << 20][(seed % 4) as usize];
    let network = Network::new(SimOptions { seed, capacity_bytes, ..SimOptions::default() });
    let mut ends =
        Ends { a: vec![], b: vec![], wakers: None, network: Some(network.clone()), checksums: seed % 2 == 1 };
    for _ in 0..2 + seed % 3 {
        let (a, b) = network.pipe(Rank(0), Rank(1));
        ends.a.push(Box::new(a));
        ends.b.push(Box::new(b));
    }
    ends
}

macro_rules! suite {
    ($($file:ident :: $name:ident;)*) => {
        mod shm_suite { $(#[test] fn $name() { super::$file::$name(&mut super::shm_ends); })* }
        mod tcp_v4_one_lane { $(#[test] fn $name() { super::$file::$name(&mut || super::tcp_ends("127.0.0.1:0", 1)); })* }
        mod tcp_v4_four_lanes { $(#[test] fn $name() { super::$file::$name(&mut || super::tcp_ends("127.0.0.1:0", 4)); })* }
        mod tls_one_lane { $(#[test] fn $name() { super::$file::$name(&mut || super::tls_ends(1)); })* }
        mod tls_three_lanes { $(#[test] fn $name() { super::$file::$name(&mut || super::tls_ends(3)); })* }
        mod tcp_checked { $(#[test] fn $name() { super::$file::$name(&mut super::checked_ends); })* }
        mod tcp_v6 { $(#[test] fn $name() { super::$file::$name(&mut || super::tcp_ends("[::1]:0", 2)); })* }
        mod unix_suite { $(#[test] fn $name() { super::$file::$name(&mut super::unix_ends); })* }
        #[cfg(feature = "mpi")]
        mod mpi_suite { $(#[test] fn $name() { super::$file::$name(&mut super::mpi_ends); })* }
        mod sim_suite { $(#[test] fn $name() {
            for seed in 0..8 { super::$file::$name(&mut || super::sim_ends(seed)); }
        })* }
    };
}

suite! {
    cases::sizes;
    cases::many_pieces;
    cases::reduces;
    cases::posting_orders;
    cases::eager_without_receives;
    cases::opposite_streams;
    cases::control_overtakes;
    cases::large_control;
    cases::streams_are_retired;
    cases::random_traffic;
    cases::unasked_messages_are_known;
    cases::what_has_landed_outlives_the_link;
    faults::lengths_differ;
    faults::peer_dies;
    faults::withdrawn;
    faults::garbage;
}
