//! Knocks: how the lower rank of a pair, which does not connect, follows what the higher one does about its link.
//! And the time that a peer has to give a sign of life before it is held to be stopped.

use super::*;
use crate::error::Broken;
use crate::limits::HANDSHAKE_BYTES_MAX;
use crate::wire::Message;

/// Bytes of the length of a refusal.
const LENGTH_BYTES: usize = 4;

impl Hall {
    /// A peer has knocked: connects to it, unless that is under way or done.
    pub(super) fn knock(&mut self, number: Number, peer: Rank) -> Step {
        if !connects(self.joined.rank, peer) || self.up.contains(&peer) {
            return Step::Gone;
        }
        // Whoever knocks again has given up the knock before.
        self.close_knocks(peer);
        let deadline = Instant::now() + self.word_every();
        let connection = self.connections.get_mut(&number).expect("it was just proven");
        connection.stage = Stage::Knocking { peer };
        connection.deadline = deadline;
        self.begin(peer);
        Step::Stay
    }

    /// Tells one that has knocked that its link is still being made.
    pub(super) fn still_trying(&mut self, number: Number) {
        let deadline = Instant::now() + self.word_every();
        let Some(connection) = self.connections.get_mut(&number) else { return };
        connection.deadline = deadline;
        connection.channel.queue(&[share::TRYING]);
        if connection.channel.flush().is_err() || connection.channel.wants_write() {
            drop(self.leave(number));
        }
    }

    /// Tells one that has knocked why there will be no link.
    pub(super) fn answer_knocks(&mut self, peer: Rank, culprit: Rank, cause: &Cause) {
        let broken = Broken { epoch: self.joined.table.epoch, culprit: Some(culprit), cause: cause.clone() };
        let mut body = Vec::new();
        Message::Abort(broken).encode(&mut body);
        for connection in self.connections.values_mut() {
            if matches!(connection.stage, Stage::Knocking { peer: p } if p == peer) {
                connection.channel.queue(&[share::REFUSE]);
                connection.channel.queue(&(body.len() as u32).to_le_bytes());
                connection.channel.queue(&body);
                // It has read all there was, so there is room; and if not, it finds the connection closed.
                let _ = connection.channel.flush();
            }
        }
        self.close_knocks(peer);
    }

    /// Closes the knocks of a peer.
    pub(super) fn close_knocks(&mut self, peer: Rank) {
        let theirs = |c: &Connection| matches!(c.stage, Stage::Knocking { peer: p } if p == peer);
        let numbers: Vec<Number> =
            self.connections.iter().filter(|(_, c)| theirs(c)).map(|(number, _)| *number).collect();
        for number in numbers {
            drop(self.leave(number));
        }
    }

    /// We knocked: the peer says how it goes.
    pub(super) fn knocked(&mut self, number: Number) -> Step {
        loop {
            let Some(connection) = self.connections.get_mut(&number) else { return Step::Stay };
            let Stage::Knocked { peer, .. } = connection.stage else { return Step::Stay };
            let channel = &mut connection.channel;
            match channel.fill(1) {
                Ok(None) => return Step::Stay,
                Ok(Some([share::TRYING])) => {
                    channel.taken();
                    self.heard(number, Some(Instant::now() + self.silence()));
                }
                Ok(Some([share::REFUSE])) => return self.refused(number, peer),
                Ok(Some(_)) => return Step::Close("its word about the link is malformed".into()),
                // It has ended, or the link is about to be up; if neither, one knocks again.
                Err(e) => return Step::Close(format!("the connection ended: {e}")),
            }
        }
    }

    /// The peer says why there will be no link.
    fn refused(&mut self, number: Number, peer: Rank) -> Step {
        let Some(connection) = self.connections.get_mut(&number) else { return Step::Stay };
        let head = 1 + LENGTH_BYTES;
        let malformed = || Step::Close("its refusal of the link is malformed".into());
        let len = match connection.channel.fill(head) {
            Ok(None) => return Step::Stay,
            Ok(Some(bytes)) => u32::from_le_bytes(bytes[1..].try_into().expect("four bytes")) as usize,
            Err(e) => return Step::Close(format!("the connection ended: {e}")),
        };
        if len > HANDSHAKE_BYTES_MAX {
            return malformed();
        }
        let body = match connection.channel.fill(head + len) {
            Ok(None) => return Step::Stay,
            Ok(Some(bytes)) => &bytes[head..],
            Err(e) => return Step::Close(format!("the connection ended: {e}")),
        };
        let Ok(Message::Abort(broken)) = Message::decode(body) else { return malformed() };
        // It can only speak of the two ends of the link.
        let culprit = broken.culprit.filter(|&who| who == self.joined.rank || who == peer).unwrap_or(peer);
        self.fail_for(peer, culprit, broken.cause);
        Step::Stay
    }

    /// A door of the peer has taken a connection: from now on the peer must give a sign of life.
    pub(super) fn taken_in(&mut self, number: Number, peer: Rank) {
        let silence = self.silence();
        self.must_answer(peer);
        let Some(dial) = self.dials.get(&peer) else { return };
        let deadline = Instant::now() + dial.patience(silence);
        if let Some(connection) = self.connections.get_mut(&number) {
            connection.deadline = deadline;
        }
    }

    /// Starts the time within which a peer must give a sign of life, unless it runs already.
    pub(super) fn must_answer(&mut self, peer: Rank) {
        let by = Instant::now() + self.silence();
        if let Some(dial) = self.dials.get_mut(&peer) {
            dial.answer_by.get_or_insert(by);
        }
    }

    /// The peer of a connection that we opened has given a sign of life; the next is due by then, if any is.
    pub(super) fn heard(&mut self, number: Number, next_by: Option<Instant>) {
        let Some(connection) = self.connections.get(&number) else { return };
        let (Stage::Dialing { peer, attempt, .. }
        | Stage::Waiting { peer, attempt, .. }
        | Stage::Offered { peer, attempt, .. }
        | Stage::Knocked { peer, attempt }) = connection.stage
        else {
            return;
        };
        if let Some(dial) = self.dials.get_mut(&peer).filter(|dial| dial.attempt == attempt) {
            dial.answer_by = next_by;
        }
    }

    fn word_every(&self) -> Duration {
        self.silence() / 6
    }
}
