//! What each stage of a connection does with the bytes that have come.

use super::*;
use crate::rendezvous::card::{Answer, frame};
use std::os::fd::{AsFd, OwnedFd};

impl Hall {
    pub(super) fn step(&mut self, number: Number) -> Step {
        let Some(connection) = self.connections.get_mut(&number) else { return Step::Stay };
        match &mut connection.stage {
            Stage::Dialing { .. } => self.dialing(number),
            Stage::Offered { .. } => self.offered(number),
            Stage::Knocked { .. } => self.knocked(number),
            // Whoever knocks has nothing more to say; it may give up.
            Stage::Knocking { .. } => match connection.channel.is_closed() {
                true => Step::Gone,
                false => Step::Stay,
            },
            Stage::Accepting(handshake) => match connection.channel.prove(handshake) {
                Ok(false) => Step::Stay,
                Ok(true) => {
                    let hello = handshake.proven().expect("just proven").clone();
                    self.proven(number, &hello)
                }
                // Whoever it was is not worth a word: a port scan, or a rank that will say so itself.
                Err(e) => Step::Close(e.to_string()),
            },
            Stage::Joining { .. } => self.joining(number),
            Stage::Joined { .. } => self.joined(number),
            Stage::Control { .. } => self.control(number),
            // The peer has nothing to say before the last word; if it closes, the attempt is over.
            Stage::Waiting { .. } => match connection.channel.is_closed() {
                true => Step::Close("it closed the connection".into()),
                false => Step::Stay,
            },
        }
    }

    /// We connect: TCP, then the proof.
    fn dialing(&mut self, number: Number) -> Step {
        let by = Instant::now() + self.silence();
        let Some(connection) = self.connections.get_mut(&number) else { return Step::Stay };
        let Stage::Dialing { peer, purpose, attempt, handshake } = &mut connection.stage else {
            return Step::Stay;
        };
        let (peer, purpose, attempt) = (*peer, *purpose, *attempt);
        match rustix::net::sockopt::socket_error(&connection.channel) {
            Ok(Ok(())) => {}
            Ok(Err(e)) | Err(e) => {
                self.drop_connection(number, &e.to_string(), e == rustix::io::Errno::CONNREFUSED);
                return Step::Stay;
            }
        }
        match connection.channel.prove(handshake) {
            Ok(false) => {
                // It has connected: from here on the peer, not the network, takes its time.
                if connection.watching_write && !connection.channel.wants_write() {
                    self.taken_in(number, peer);
                }
                return Step::Stay;
            }
            Ok(true) => connection.deadline = by,
            // It is on its way from the epoch before to this one.
            Err(ProofError::WrongEpoch { ours, theirs }) if theirs < ours => return self.lags(peer, attempt),
            Err(e) => return Step::Close(e.to_string()),
        }
        self.heard(number, Some(by));
        let Some(connection) = self.connections.get_mut(&number) else { return Step::Stay };
        match purpose {
            Purpose::Knock => {
                // It will connect, and says here how it goes. The dial's own time runs until then.
                connection.stage = Stage::Knocked { peer, attempt };
                connection.deadline = Instant::now() + 2 * Duration::from_millis(LINK_MS);
                self.knocked(number)
            }
            Purpose::Shm => self.offer(number, peer, attempt),
            _ => {
                connection.stage = Stage::Waiting { peer, purpose, attempt };
                for lane in 0..self.options.tcp_lanes {
                    // A lane that fails at once ends the attempt, and with it the need for the others.
                    let dial =
                        self.dials.get_mut(&peer).filter(|d| d.attempt == attempt && d.retry.is_none());
                    match dial.map(|d| d.lane_target(lane)) {
                        Some(target) if purpose == Purpose::Control => {
                            self.open(peer, Purpose::Lane(lane as u8), attempt, &target);
                        }
                        _ => break,
                    }
                }
                self.finish_tcp(peer, attempt);
                Step::Stay
            }
        }
    }

    fn offer(&mut self, number: Number, peer: Rank, attempt: u64) -> Step {
        let offered = self.options.memory.take(shm::SEGMENT_BYTES as u64).and_then(|taken| {
            let segment = shm::create_segment()?;
            let channel = &self.connections[&number].channel;
            let board = self.ends.board.iter().map(AsFd::as_fd);
            let gifts: Vec<_> = [segment.as_fd(), self.ends.waker.as_fd()].into_iter().chain(board).collect();
            share::send(channel, share::OFFER, &gifts)?;
            Ok((segment, taken))
        });
        match offered {
            Ok(segment) => {
                let connection = self.connections.get_mut(&number).expect("looked at above");
                connection.stage = Stage::Offered { peer, attempt, segment: Some(segment), refused: false };
                Step::Stay
            }
            Err(cause) => self.without_shm(number, peer, cause),
        }
    }

    /// Ends a connection by which shared memory was to be had.
    fn without_shm(&mut self, number: Number, peer: Rank, cause: Cause) -> Step {
        drop(self.leave(number));
        self.shm_failed(peer, cause);
        Step::Stay
    }

    /// We connect: the peer has opened the segment, or not.
    fn offered(&mut self, number: Number) -> Step {
        let Some(connection) = self.connections.get_mut(&number) else { return Step::Stay };
        let Stage::Offered { peer, segment, refused, .. } = &mut connection.stage else { return Step::Stay };
        let peer = *peer;
        if !*refused {
            match share::receive(&connection.channel) {
                Ok(None) => return Step::Stay,
                Ok(Some((share::REFUSE, _))) => *refused = true,
                Ok(Some((share::ACCEPT, descriptors))) if matches!(descriptors.len(), 1 | 2) => {
                    let (segment, taken) = segment.take().expect("a segment is accepted once");
                    let opened = self.open_segment(number, segment, taken, shm::Side::Creator, descriptors);
                    let channel = &mut self.connections.get_mut(&number).expect("it is there").channel;
                    return match opened.and_then(|parts| say_go(channel).map(|()| parts)) {
                        Ok(parts) => {
                            drop(self.leave(number));
                            self.up(peer, parts.control, vec![parts.lane], parts.board);
                            Step::Stay
                        }
                        Err(cause) => self.without_shm(number, peer, cause),
                    };
                }
                Ok(Some(_)) => {
                    return Step::Close("its answer to the offer of a segment is malformed".into());
                }
                Err(e) => return Step::Close(format!("the connection ended: {e}")),
            }
        }
        match connection.channel.fill(share::REASON_BYTES) {
            Ok(None) => Step::Stay,
            Ok(Some(reason)) => {
                let reason: String =
                    String::from_utf8_lossy(reason).chars().filter(|c| !c.is_control()).collect();
                let cause = Cause::System(format!("{peer} could not open it: {}", reason.trim_end()));
                self.without_shm(number, peer, cause)
            }
            Err(e) => Step::Close(format!("the connection ended: {e}")),
        }
    }

    /// Somebody who came in is who it says it is.
    fn proven(&mut self, number: Number, hello: &Hello) -> Step {
        let peer = hello.rank;
        let attempt = hello.link;
        if hello.purpose == Purpose::Regroup {
            return self.not_there(number, hello);
        }
        if hello.purpose == Purpose::Knock {
            return self.knock(number, peer);
        }
        if connects(self.joined.rank, peer) || self.up.contains(&peer) {
            return Step::Close(ProofError::WrongPurpose(hello.purpose).to_string());
        }
        let deadline = Instant::now() + Duration::from_millis(HANDSHAKE_MS);
        let connection = self.connections.get_mut(&number).expect("it was just proven");
        connection.deadline = deadline;
        match hello.purpose {
            Purpose::Shm => {
                connection.stage = Stage::Joining { peer };
                self.joining(number)
            }
            Purpose::Control => {
                if self.assemblies.get(&peer).is_some_and(|a| a.attempt >= attempt) {
                    return Step::Close("an older attempt".into());
                }
                connection.stage = Stage::Control { peer, attempt };
                let lanes = (0..self.options.tcp_lanes).map(|_| None).collect();
                let older = self.assemblies.insert(peer, Assembly { attempt, control: number, lanes });
                if let Some(older) = older {
                    drop(self.leave(older.control));
                }
                Step::Stay
            }
            Purpose::Lane(lane) => {
                let slot = self.assemblies.get_mut(&peer).filter(|a| a.attempt == attempt);
                match slot.and_then(|a| a.lanes.get_mut(lane as usize)).filter(|slot| slot.is_none()) {
                    None => Step::Close("a lane of no link".into()),
                    Some(_) => {
                        let channel = self.leave(number);
                        let assembly = self.assemblies.get_mut(&peer).expect("just found");
                        assembly.lanes[lane as usize] = channel;
                        Step::Stay
                    }
                }
            }
            Purpose::Knock | Purpose::Register | Purpose::Regroup => Step::Gone,
        }
    }

    /// Somebody wants to form a new epoch: this rank has not called for it yet, or has gone on already.
    fn not_there(&mut self, number: Number, hello: &Hello) -> Step {
        let ours = self.joined.table.epoch;
        let answer = match self.ends.follows.load(Ordering::Relaxed) {
            _ if hello.epoch < ours => Answer::Excluded(ours),
            NOBODY => Answer::NotYet,
            rank => Answer::Elsewhere(Rank(rank)),
        };
        if let Some(connection) = self.connections.get_mut(&number) {
            connection.channel.queue(&frame(&answer.encode()));
            // It is short, and nothing else was written before: it fits, or the connection is dead.
            let _ = connection.channel.flush();
        }
        Step::Gone
    }

    /// The peer offers a segment.
    fn joining(&mut self, number: Number) -> Step {
        let Some(connection) = self.connections.get_mut(&number) else { return Step::Stay };
        let Stage::Joining { peer } = connection.stage else { return Step::Stay };
        let mut descriptors = match share::receive(&connection.channel) {
            Ok(None) => return Step::Stay,
            Ok(Some((share::OFFER, descriptors))) if matches!(descriptors.len(), 2 | 3) => descriptors,
            Ok(Some(_)) => return Step::Close("its offer of a segment is malformed".into()),
            Err(e) => return Step::Close(format!("the connection ended: {e}")),
        };
        let segment = descriptors.remove(0);
        let taken = self.options.memory.take(shm::SEGMENT_BYTES as u64);
        let opened =
            taken.and_then(|taken| self.open_segment(number, segment, taken, shm::Side::Joiner, descriptors));
        let answered = opened.and_then(|parts| {
            let board = self.ends.board.iter().map(AsFd::as_fd);
            let gifts: Vec<_> = [self.ends.waker.as_fd()].into_iter().chain(board).collect();
            share::send(&self.connections[&number].channel, share::ACCEPT, &gifts)?;
            Ok(parts)
        });
        let connection = self.connections.get_mut(&number).expect("it is there");
        match answered {
            Ok(parts) => {
                connection.stage = Stage::Joined { peer, parts: Some(parts) };
                Step::Stay
            }
            Err(cause) => {
                connection.channel.queue(&share::refusal(&cause.to_string()));
                let _ = connection.channel.flush();
                drop(self.leave(number));
                if self.options.choice == Choice::Shm && self.wanted.contains(&peer) {
                    self.fail(peer, Cause::System(format!("CAROLE_TRANSPORT=shm, but its segment: {cause}")));
                }
                Step::Stay
            }
        }
    }

    /// The segment is open here; the connector's last word makes it a link.
    fn joined(&mut self, number: Number) -> Step {
        let Some(connection) = self.connections.get_mut(&number) else { return Step::Stay };
        let Stage::Joined { peer, parts } = &mut connection.stage else { return Step::Stay };
        let peer = *peer;
        match connection.channel.fill(1) {
            Ok(None) => Step::Stay,
            Ok(Some([share::GO])) => {
                let parts = parts.take().expect("the last word comes once");
                drop(self.leave(number));
                self.arrived(peer);
                self.up(peer, parts.control, vec![parts.lane], parts.board);
                Step::Stay
            }
            Ok(Some(_)) => Step::Close("its last word is malformed".into()),
            Err(e) => Step::Close(format!("the connection ended: {e}")),
        }
    }

    /// The control connection of a link by TCP, on the accepting side.
    fn control(&mut self, number: Number) -> Step {
        let Some(connection) = self.connections.get_mut(&number) else { return Step::Stay };
        let Stage::Control { peer, attempt } = connection.stage else { return Step::Stay };
        match connection.channel.fill(1) {
            Ok(None) => return Step::Stay,
            Ok(Some([share::GO])) => connection.channel.taken(),
            Ok(Some(_)) => return Step::Close("its last word is malformed".into()),
            Err(e) => return Step::Close(format!("the connection ended: {e}")),
        }
        let complete = self.assemblies.get(&peer).is_some_and(|a| {
            a.attempt == attempt && a.control == number && a.lanes.iter().all(Option::is_some)
        });
        if !complete {
            return Step::Close("its last word came before all lanes".into());
        }
        let assembly = self.assemblies.remove(&peer).expect("just found");
        let control = self.leave(number).expect("it is there");
        self.arrived(peer);
        self.up_tcp(peer, control, assembly.lanes.into_iter().flatten().collect());
        Step::Stay
    }

    /// A link is about to be up on the accepting side: other connections of the peer that could become one go.
    fn arrived(&mut self, peer: Rank) {
        self.assemblies.remove(&peer);
        let reactor = &self.reactor;
        self.connections.retain(|_, connection| {
            let rival = match &connection.stage {
                Stage::Joining { peer: p }
                | Stage::Joined { peer: p, .. }
                | Stage::Control { peer: p, .. } => *p == peer,
                _ => false,
            };
            if rival {
                let _ = reactor.remove(&connection.channel);
            }
            !rival
        });
    }

    fn open_segment(
        &self,
        number: Number,
        segment: OwnedFd,
        taken: shm::Share,
        side: shm::Side,
        // The peer's eventfd, and its board.
        mut theirs: Vec<OwnedFd>,
    ) -> Result<Parts, Cause> {
        // The pipes watch the socket for the peer's death; until the last word the porter needs it as well.
        let socket = self.connections[&number].channel.as_fd().try_clone_to_owned();
        let socket = socket.map_err(|e| Cause::System(format!("a descriptor could not be copied: {e}")))?;
        let waker = theirs.remove(0);
        let (control, lane) = shm::open(segment, side, socket, self.ends.waker.clone(), waker, taken)?;
        // A link works without it, too.
        let board = theirs.pop().and_then(|fd| BoardMemory::map(&fd).ok());
        Ok(Parts { control: Box::new(control), lane: Box::new(lane), board })
    }
}

fn say_go(channel: &mut Channel) -> Result<(), Cause> {
    channel.queue(&[share::GO]);
    match channel.flush() {
        Ok(()) if !channel.wants_write() => Ok(()),
        _ => Err(Cause::Unreachable("it closed the connection at the last word".into())),
    }
}
