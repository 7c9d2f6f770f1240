//! Reaching peers: requests, attempts, what follows a failed one, and the finished link.

use super::*;
use crate::transport::flow::{FlowLink, FlowOptions};
use crate::transport::tcp::TcpPipe;

impl Hall {
    /// The engine wants a link.
    pub(super) fn request(&mut self, peer: Rank) {
        let known = (peer.0 as usize) < self.joined.table.cards.len();
        assert!(known && peer != self.joined.rank, "the engine asks for links to other ranks of the table");
        if self.up.contains(&peer) {
            return;
        }
        self.wanted.insert(peer);
        self.begin(peer);
    }

    /// Begins to reach a peer, unless that is under way: to connect, or to ask it to.
    pub(super) fn begin(&mut self, peer: Rank) {
        if self.up.contains(&peer) || self.dials.contains_key(&peer) {
            return;
        }
        let me = self.joined.rank;
        let aim = if connects(me, peer) { Aim::Link } else { Aim::Knock };
        let cards = &self.joined.table.cards;
        match targets(&cards[me.0 as usize], &cards[peer.0 as usize], aim, self.options.choice) {
            Err(why) => self.fail(peer, Cause::Unreachable(why)),
            Ok(targets) => {
                // Who knocks hears from the peer when that gives up.
                let patience = LINK_MS * if aim == Aim::Knock { 2 } else { 1 };
                let limit = Instant::now() + Duration::from_millis(patience);
                let last = "nothing was tried".to_owned();
                let dial = Dial {
                    aim,
                    targets,
                    at: 0,
                    attempt: 0,
                    limit,
                    answer_by: None,
                    retry: None,
                    spread: self.options.spread,
                    spreading: false,
                    refused: true,
                    last,
                    shm_failure: None,
                };
                self.dials.insert(peer, dial);
                self.try_target(peer);
            }
        }
    }

    /// Opens the first connection of a new attempt at the dial's target.
    pub(super) fn try_target(&mut self, peer: Rank) {
        self.last_attempt += 1;
        let attempt = self.last_attempt;
        let Some(dial) = self.dials.get_mut(&peer) else { return };
        dial.retry = None;
        dial.attempt = attempt;
        let target = dial.targets[dial.at].clone();
        let purpose = match (dial.aim, &target) {
            (Aim::Knock, _) => Purpose::Knock,
            (Aim::Link, Target::Unix(_)) => Purpose::Shm,
            (Aim::Link, Target::Tcp(_)) => Purpose::Control,
        };
        self.open(peer, purpose, attempt, &target);
    }

    /// Opens one connection. What goes wrong here goes the way of what goes wrong later.
    pub(super) fn open(&mut self, peer: Rank, purpose: Purpose, attempt: u64, target: &Target) {
        let opened = target.connect().map_err(|e| {
            if e.kind() == io::ErrorKind::WouldBlock {
                // The door's queue is full, and nobody empties it.
                self.must_answer(peer);
            }
            (e.to_string(), e.kind() == io::ErrorKind::ConnectionRefused)
        });
        let entered = opened.and_then(|channel| {
            let (secret, epoch) = (&self.joined.secret, self.joined.table.epoch);
            let hello = Hello::new(secret, epoch, (self.joined.rank, peer), purpose, attempt)
                .map_err(|e| (format!("the kernel gave no random bytes: {e}"), false))?;
            let handshake = Handshake::connector(secret, hello);
            let within = match target {
                Target::Tcp(_) => CONNECT_MS,
                Target::Unix(_) => self.options.silence_ms,
            };
            let stage = Stage::Dialing { peer, purpose, attempt, handshake };
            // Room to write tells that TCP has connected.
            self.enter(channel, stage, within, true).ok_or_else(|| ("epoll refused it".to_owned(), false))
        });
        if let Err((why, refused)) = entered {
            self.attempt_failed(peer, attempt, &why, refused);
        }
    }

    /// The peer has not left the epoch before yet: the same target is tried again, very soon.
    pub(super) fn lags(&mut self, peer: Rank, attempt: u64) -> Step {
        if let Some(dial) = self.dials.get_mut(&peer).filter(|d| d.attempt == attempt && d.retry.is_none()) {
            dial.last = "it is still in the epoch before".to_owned();
            dial.answer_by = None;
            dial.retry = Some(Instant::now() + Duration::from_millis(LAG_MS));
        }
        self.close_attempts(peer);
        Step::Stay
    }

    /// One connection of an attempt has failed: the rest of it goes too, and the next target is tried.
    pub(super) fn attempt_failed(&mut self, peer: Rank, attempt: u64, why: &str, refused: bool) {
        // A late word about an attempt that is over already.
        let Some(dial) = self.dials.get_mut(&peer).filter(|d| d.attempt == attempt && d.retry.is_none())
        else {
            return;
        };
        let target = &dial.targets[dial.at];
        dial.last = match target {
            Target::Tcp(address) => format!("{address}: {why}"),
            Target::Unix(_) => format!("shared memory: {why}"),
        };
        if matches!(target, Target::Unix(_)) && dial.aim == Aim::Link {
            dial.shm_failure = Some(why.to_owned());
        }
        if std::mem::take(&mut dial.spreading) {
            // An address that leads nowhere must not keep the others from being used.
            dial.spread = false;
        } else {
            dial.refused &= refused;
            dial.at += 1;
        }
        let (rounds_end, all_refused) = (dial.at == dial.targets.len(), dial.refused);
        let last = dial.last.clone();
        if rounds_end {
            dial.at = 0;
            dial.refused = true;
            dial.retry = Some(Instant::now() + Duration::from_millis(RETRY_MS));
        }
        self.close_attempts(peer);
        if !rounds_end {
            self.try_target(peer);
        } else if all_refused {
            // Its doors are open from before the table until it shuts down. On this host the kernel knows; far
            // away it may be a firewall that refuses.
            let cards = &self.joined.table.cards;
            let near = cards[self.joined.rank.0 as usize].host_id == cards[peer.0 as usize].host_id;
            self.fail(
                peer,
                match near {
                    true => Cause::Exited,
                    false => Cause::Unreachable(format!(
                        "no door of it is open ({last}); it has ended or shut down, or a firewall refuses"
                    )),
                },
            );
        }
    }

    /// Shared memory does not work with this peer: TCP, or nothing if shared memory is forced.
    pub(super) fn shm_failed(&mut self, peer: Rank, cause: Cause) {
        let why = match &cause {
            Cause::System(why) | Cause::Misbehaved(why) | Cause::Unreachable(why) => why.clone(),
            other => other.to_string(),
        };
        if self.options.choice == Choice::Shm {
            let why = format!("CAROLE_TRANSPORT=shm, but {why}");
            self.fail(peer, Cause::System(why));
        } else if let Some(attempt) = self.dials.get(&peer).map(|dial| dial.attempt) {
            self.attempt_failed(peer, attempt, &why, false);
        }
    }

    /// All connections of a link by TCP are proven on the connecting side: says so and hands it over.
    pub(super) fn finish_tcp(&mut self, peer: Rank, attempt: u64) {
        let mut lanes: Vec<(u8, Number)> = Vec::new();
        let mut control = None;
        for (number, connection) in &self.connections {
            match connection.stage {
                Stage::Waiting { peer: p, purpose, attempt: a } if p == peer && a == attempt => match purpose
                {
                    Purpose::Lane(lane) => lanes.push((lane, *number)),
                    _ => control = Some(*number),
                },
                _ => {}
            }
        }
        let Some(control) = control.filter(|_| lanes.len() == self.options.tcp_lanes) else { return };
        let channel = &mut self.connections.get_mut(&control).expect("just found").channel;
        channel.queue(&[share::GO]);
        if channel.flush().is_err() || channel.wants_write() {
            return self.attempt_failed(peer, attempt, "it closed the connection at the last word", false);
        }
        lanes.sort_unstable();
        let control = self.leave(control).expect("just found");
        let lanes: Vec<Channel> = lanes.into_iter().filter_map(|(_, number)| self.leave(number)).collect();
        self.up_tcp(peer, control, lanes);
    }

    /// Makes the link of proven connections.
    pub(super) fn up_tcp(&mut self, peer: Rank, control: Channel, lanes: Vec<Channel>) {
        #[cfg(feature = "mpi")]
        if self.options.choice == Choice::Mpi {
            return self.up_mpi(peer, control);
        }
        let pipe = |channel: Channel| -> Result<Box<dyn Pipe>, Cause> {
            let tcp = &self.options.tcp;
            match channel.into_parts() {
                (Stream::Tcp(stream), None) => Ok(Box::new(TcpPipe::new(stream, tcp)?)),
                (Stream::Tcp(stream), Some(tls)) => Ok(Box::new(TcpPipe::encrypted(stream, tls, tcp)?)),
                (Stream::Unix(_), _) => Err(Cause::Misbehaved("a lane by TCP over a unix socket".into())),
            }
        };
        let pipes = pipe(control)
            .and_then(|control| Ok((control, lanes.into_iter().map(pipe).collect::<Result<_, _>>()?)));
        match pipes {
            Ok((control, lanes)) => self.up(peer, control, lanes, None),
            Err(cause) => self.fail(peer, cause),
        }
    }

    /// Makes the link of MPI; the proven connection stays as a sign that the peer lives.
    #[cfg(feature = "mpi")]
    fn up_mpi(&mut self, peer: Rank, control: Channel) {
        use crate::transport::mpi::{self, Address, Threads};
        let watch = OwnedFd::from(control.into_parts().0);
        let waker = self.ends.waker.clone();
        // It has been initialised before the ranks met, or there would be no such choice.
        let pipes = mpi::join(Threads::default(), Duration::ZERO)
            .map_err(|error| Cause::System(error.to_string()))
            .and_then(|world| {
                let address = Address::of(world, peer, self.joined.table.epoch);
                mpi::link(world, &address, Some(watch), Some(waker))
            });
        match pipes {
            Ok((control, lane)) => self.up(peer, Box::new(control), vec![Box::new(lane)], None),
            Err(cause) => self.fail(peer, cause),
        }
    }

    /// A link is up.
    pub(super) fn up(
        &mut self,
        peer: Rank,
        control: Box<dyn Pipe>,
        lanes: Vec<Box<dyn Pipe>>,
        board: Option<Arc<BoardMemory>>,
    ) {
        self.close_attempts(peer);
        self.close_knocks(peer);
        self.wanted.remove(&peer);
        if let Some(why) = self.dials.remove(&peer).and_then(|dial| dial.shm_failure)
            && !std::mem::replace(&mut self.warned_shm, true)
        {
            (self.joined.warn)(&format!(
                "shared memory with {peer} was not possible ({why}); TCP is used instead, which is slower"
            ));
        }
        assert!(self.up.insert(peer), "one link for each pair of ranks");
        // Bytes that leave the host pass cards, cables and switches. On a host memory's own checks must do; what is
        // encrypted is checked with the key.
        let host = |rank: Rank| &self.joined.table.cards[rank.0 as usize].host_id;
        let checksums = host(self.joined.rank) != host(peer) && control.kind() != "tls";
        let options = FlowOptions { checksums, ..FlowOptions::default() };
        let link = FlowLink::new(peer, control, lanes, options).with_board(board);
        self.tell(FabricEvent::Up(Box::new(link)));
    }
}
