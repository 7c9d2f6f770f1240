//! The order in which a peer's addresses are tried.
#![forbid(unsafe_code)]

use super::Choice;
use crate::rendezvous::card::Card;
use crate::rendezvous::channel::{Channel, Stream};
use crate::rendezvous::listen;
use crate::types::Rank;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The least that a connection to one of several addresses waits for an answer.
const SHARE_MS: u64 = 250;

/// A place where a peer may be reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// Its unix socket.
    Unix([u8; 16]),
    /// A TCP address.
    Tcp(SocketAddr),
}

impl Target {
    /// Begins to connect, without waiting for it.
    pub fn connect(&self) -> io::Result<Channel> {
        match self {
            Target::Unix(name) => {
                let name = std::os::unix::net::SocketAddr::from_abstract_name(listen::socket_name(name))?;
                // A unix socket connects at once, unless the peer's queue is full: then it blocks, which the
                // porter must not. So it is made nonblocking first.
                let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None)?;
                socket.set_nonblocking(true)?;
                let bytes = name.as_abstract_name().expect("an abstract name").to_owned();
                let address = rustix::net::SocketAddrUnix::new_abstract_name(&bytes)?;
                rustix::net::connect(&socket, &address)?;
                Channel::new(Stream::Unix(UnixStream::from(OwnedFd::from(socket))))
            }
            Target::Tcp(address) => {
                let domain = socket2::Domain::for_address(*address);
                let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
                socket.set_nonblocking(true)?;
                match socket.connect(&(*address).into()) {
                    Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => return Err(e),
                    _ => {}
                }
                Channel::new(Stream::Tcp(socket.into()))
            }
        }
    }
}

/// What is tried at a target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Aim {
    /// To make a link.
    Link,
    /// To ask the peer to make one.
    Knock,
}

/// Attempts to reach one peer.
#[derive(Debug)]
pub struct Dial {
    /// What for.
    pub aim: Aim,
    /// Where, in order.
    pub targets: Vec<Target>,
    /// The target being tried.
    pub at: usize,
    /// The attempt being made: its number, which all its connections carry.
    pub attempt: u64,
    /// When it is given up, whatever happens.
    pub limit: Instant,
    /// A door of it has taken a connection, and it has until then to give a sign of life.
    pub answer_by: Option<Instant>,
    /// The next round of targets begins then.
    pub retry: Option<Instant>,
    /// Whether lanes may go to other addresses than the control connection.
    pub spread: bool,
    /// Whether some of this attempt's do.
    pub spreading: bool,
    /// Whether every target of this round has refused the connection.
    pub refused: bool,
    /// What was said last.
    pub last: String,
    /// Why shared memory was not possible.
    pub shm_failure: Option<String>,
}

impl Dial {
    /// When something is to be done about it.
    pub fn deadline(&self) -> Instant {
        [self.answer_by, self.retry].into_iter().flatten().fold(self.limit, Instant::min)
    }

    /// Where a lane goes: to the target that is being tried or, where lanes are spread, to the peer's addresses of its
    /// family in turn.
    pub fn lane_target(&mut self, lane: usize) -> Target {
        let here = self.targets[self.at].clone();
        let Target::Tcp(address) = here else { return here };
        if !self.spread {
            return here;
        }
        let like = |t: &&Target| matches!(t, Target::Tcp(a) if a.is_ipv4() == address.is_ipv4() && !a.ip().is_loopback());
        let around = self.targets[self.at..].iter().chain(&self.targets[..self.at]);
        let alike: Vec<&Target> = around.filter(like).collect();
        let chosen = alike.get(lane % alike.len().max(1)).map_or_else(|| here.clone(), |t| (*t).clone());
        self.spreading |= chosen != here;
        chosen
    }

    /// How long one connection waits for an answer. A unix socket of a random name is the peer's; behind one of
    /// several TCP addresses there may be somebody else, so each gets its share.
    pub fn patience(&self, silence: Duration) -> Duration {
        match &self.targets[self.at] {
            Target::Tcp(_) if self.targets.len() > 1 => {
                (silence / self.targets.len() as u32).max(Duration::from_millis(SHARE_MS))
            }
            _ => silence,
        }
    }
}

/// Where `peer` may be reached by this rank, or why nowhere.
pub fn targets(me: &Card, peer: &Card, aim: Aim, choice: Choice) -> Result<Vec<Target>, String> {
    let same_host = me.host_id == peer.host_id;
    let mut targets = Vec::new();
    if let Some(socket) = peer.socket
        && same_host
        && choice.shares_memory()
    {
        targets.push(Target::Unix(socket));
    }
    if choice == Choice::Shm && aim == Aim::Link {
        return match targets.is_empty() {
            false => Ok(targets),
            true => Err(format!(
                "CAROLE_TRANSPORT=shm, but {} (host {}) and {} (host {}) share no memory; use CAROLE_TRANSPORT=auto",
                me.rank, me.hostname, peer.rank, peer.hostname
            )),
        };
    }
    // A loopback address means this host: the best way to a rank on it, and the wrong rank elsewhere. Where
    // there is nothing else, one machine stands for several (CAROLE_HOST_ID), and the proof tells the ranks apart.
    let (loopback, other): (Vec<SocketAddr>, Vec<SocketAddr>) =
        peer.addresses.iter().partition(|address| address.ip().is_loopback());
    let addresses = match (same_host, other.is_empty()) {
        (true, _) => [loopback, other].concat(),
        (false, true) => loopback,
        (false, false) => other,
    };
    targets.extend(addresses.into_iter().map(Target::Tcp));
    if targets.is_empty() { Err(format!("{} has told no address", peer.rank)) } else { Ok(targets) }
}

/// Who connects.
pub fn connects(me: Rank, peer: Rank) -> bool {
    me > peer
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rendezvous::card::tests::card;

    #[test]
    fn the_order_of_targets() {
        let (mut me, mut peer) = (card(1), card(0));
        let (far, near) = (SocketAddr::from(([10, 0, 0, 1], 5)), SocketAddr::from(([127, 0, 0, 1], 5)));
        peer.addresses = vec![far, near];
        peer.socket = Some([7; 16]);
        peer.host_id = me.host_id.clone();
        let of = |me: &Card, peer: &Card, choice| targets(me, peer, Aim::Link, choice);
        let (unix, far, near) = (Target::Unix([7; 16]), Target::Tcp(far), Target::Tcp(near));
        assert_eq!(of(&me, &peer, Choice::Auto).unwrap(), [unix.clone(), near.clone(), far.clone()]);
        assert_eq!(of(&me, &peer, Choice::Shm).unwrap(), [unix]);
        assert_eq!(of(&me, &peer, Choice::Tcp).unwrap(), [near.clone(), far.clone()]);
        me.host_id = "elsewhere".into();
        assert_eq!(of(&me, &peer, Choice::Auto).unwrap(), [far]);
        let error = of(&me, &peer, Choice::Shm).unwrap_err();
        assert!(error.contains("share no memory") && error.contains("rank 0"), "{error}");
        peer.addresses.remove(0);
        assert_eq!(of(&me, &peer, Choice::Auto).unwrap(), [near]);
        peer.addresses.clear();
        assert!(of(&me, &peer, Choice::Auto).is_err());
    }

    #[test]
    fn lanes_are_spread_over_the_addresses_of_one_family() {
        let tcp = |text: &str| Target::Tcp(text.parse().unwrap());
        let targets = ["10.0.0.1:5", "[fd00::1]:5", "10.1.0.1:5", "127.0.0.1:5"].map(tcp);
        let mut dial = Dial {
            aim: Aim::Link,
            targets: targets.to_vec(),
            at: 2,
            attempt: 1,
            limit: Instant::now(),
            answer_by: None,
            retry: None,
            spread: true,
            spreading: false,
            refused: true,
            last: String::new(),
            shm_failure: None,
        };
        assert_eq!(dial.lane_target(0), targets[2]);
        assert!(!dial.spreading);
        assert_eq!(
            [1, 2, 3].map(|lane| dial.lane_target(lane)),
            [0, 2, 0].map(|i: usize| targets[i].clone())
        );
        assert!(dial.spreading);
        dial.at = 1;
        assert_eq!(dial.lane_target(1), targets[1]);
        (dial.at, dial.spread) = (0, false);
        assert_eq!(dial.lane_target(1), targets[0]);
        (dial.at, dial.spread) = (3, true);
        assert_eq!(dial.lane_target(0), targets[0], "loopback carries no spread lanes");
    }

    #[test]
    fn of_two_ranks_one_connects() {
        for (a, b) in [(0, 1), (3, 9)] {
            assert_ne!(connects(Rank(a), Rank(b)), connects(Rank(b), Rank(a)));
        }
    }
}
