//! Two links that face each other, with memory, driven in turn by one thread.

use crate::device::{Reduction, Token};
use crate::error::Cause;
use crate::memory::{Memory, Piece, PieceRange, Region};
use crate::transport::flow::{FlowLink, Leftovers};
use crate::transport::sim::Network;
use crate::transport::{Events, Link, LinkEvent, LinkOrder, OrderKind, Stream};
use crate::types::Time;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

/// Far beyond what any case takes on a loaded machine: what is not there by then never comes.
const HANG: Duration = Duration::from_secs(180);

/// One side.
pub struct Side {
    pub link: FlowLink,
    pub memory: Memory,
    pub events: Events,
    pub done: HashSet<Token>,
    pub lengths: Vec<(Token, u64, u64)>,
    pub control: Vec<Vec<u8>>,
    pub error: Option<Cause>,
    buffers: HashMap<Token, (Box<[u8]>, PieceRange)>,
    now: u64,
}

/// How the bytes of a buffer are cut into pieces: 0 is one piece; otherwise pieces of this many bytes, laid
/// into memory from the back to the front.
fn cut(len: usize, piece: usize) -> PieceRange {
    let piece = if piece == 0 { len } else { piece };
    let mut list = Vec::new();
    let mut at = 0;
    while at < len {
        let n = piece.min(len - at);
        list.push(Piece { region: 0, offset: (len - at - n) as u64, len: n as u64 });
        at += n;
    }
    let end = list.len() as u32;
    PieceRange { list: list.into(), start: 0, end }
}

impl Side {
    pub fn new(link: FlowLink) -> Side {
        Side {
            link,
            memory: Memory::default(),
            events: Events::default(),
            done: HashSet::new(),
            lengths: vec![],
            control: vec![],
            error: None,
            buffers: HashMap::new(),
            now: 0,
        }
    }

    fn order(
        &mut self,
        stream: u128,
        mut buffer: Box<[u8]>,
        range: PieceRange,
        kind: impl FnOnce(PieceRange) -> OrderKind,
    ) -> Token {
        // SAFETY: the buffer is kept beside the memory, and only read once the order is done or withdrawn.
        let region = unsafe { Region::new(buffer.as_mut_ptr(), buffer.len() as u64) };
        let run = self.memory.register([region]);
        let token = Token { run, window: 0, step: 0 };
        self.link.post(LinkOrder { token, stream: Stream(stream), kind: kind(range.clone()) });
        self.buffers.insert(token, (buffer, range));
        token
    }

    pub fn send(&mut self, stream: u128, bytes: &[u8], piece: usize) -> Token {
        let range = cut(bytes.len(), piece);
        let mut buffer = vec![0u8; bytes.len()].into_boxed_slice();
        let mut at = 0;
        for p in range.pieces() {
            let n = p.len as usize;
            buffer[p.offset as usize..][..n].copy_from_slice(&bytes[at..at + n]);
            at += n;
        }
        self.order(stream, buffer, range, |src| OrderKind::Send { src })
    }

    pub fn recv(&mut self, stream: u128, len: usize, piece: usize) -> Token {
        let buffer = vec![0xEE; len].into_boxed_slice();
        self.order(stream, buffer, cut(len, piece), |dst| OrderKind::Recv { dst })
    }

    /// `apart`: the operand lies behind the destination instead of in it.
    pub fn recv_reduce(
        &mut self,
        stream: u128,
        with: &[u8],
        apart: bool,
        reduction: Reduction,
        incoming_first: bool,
    ) -> Token {
        let n = with.len();
        let (buffer, operand) =
            if apart { ([vec![0xEE; n], with.to_vec()].concat(), n) } else { (with.to_vec(), 0) };
        let whole = |offset| Piece { region: 0, offset: offset as u64, len: n as u64 };
        let of = |list: Vec<Piece>| {
            let end = list.len() as u32;
            PieceRange { list: list.into(), start: 0, end }
        };
        // The operand is cut elsewhere than the destination, at an element.
        let mut parts = vec![whole(operand)];
        let first = (n / 3) & !15;
        if first > 0 {
            let rest = Piece { region: 0, offset: (operand + first) as u64, len: (n - first) as u64 };
            parts = vec![Piece { len: first as u64, ..whole(operand) }, rest];
        }
        let with = of(parts);
        self.order(stream, buffer.into(), of(vec![whole(0)]), |dst| OrderKind::RecvReduce {
            dst,
            with,
            reduction,
            incoming_first,
        })
    }

    /// What an order received, in the order of its pieces.
    pub fn result(&self, token: Token) -> Vec<u8> {
        let (buffer, range) = &self.buffers[&token];
        range.pieces().iter().flat_map(|p| &buffer[p.offset as usize..][..p.len as usize]).copied().collect()
    }

    /// Forgets an order and its memory, which is overwritten, as its owner might.
    pub fn withdraw(&mut self, token: Token) {
        self.link.withdraw(token.run, &self.memory);
        self.memory.forget(token.run);
        self.buffers.remove(&token);
    }

    /// Ends the connection; what had landed, and a message of it.
    pub fn leave(self) -> (Leftovers, impl FnMut(&mut Leftovers, u128, usize) -> Option<Vec<u8>>) {
        let (mut memory, mut events) = (self.memory, self.events);
        let left = Box::new(self.link).leave(|_| true).expect("something has landed");
        let receive = move |left: &mut Leftovers, stream: u128, len: usize| {
            let mut buffer = vec![0xEE; len];
            // SAFETY: the buffer outlives the order, which is done or was dropped when this ends.
            let region = unsafe { Region::new(buffer.as_mut_ptr(), len as u64) };
            let token = Token { run: memory.register([region]), window: 0, step: 0 };
            let dst = cut(len, 7);
            let kind = OrderKind::Recv { dst: dst.clone() };
            left.post(LinkOrder { token, stream: Stream(stream), kind });
            events.clear();
            let moved = left.settle(&memory, &mut events);
            memory.forget(token.run);
            assert_eq!(moved, events.list == [LinkEvent::Done(token)]);
            let piece = |p: &Piece| buffer[p.offset as usize..][..p.len as usize].to_vec();
            moved.then(|| dst.pieces().iter().flat_map(piece).collect())
        };
        (left, receive)
    }

    /// The order is over: its memory is the owner's again.
    pub fn forget(&mut self, token: Token) {
        self.memory.forget(token.run);
        self.buffers.remove(&token);
        self.done.remove(&token);
    }

    pub fn is_done(&self, token: Token) -> bool {
        self.done.contains(&token)
    }

    pub fn step(&mut self) -> bool {
        if self.error.is_some() {
            return false;
        }
        self.now += 1;
        self.events.clear();
        let moved = self.link.progress(&self.memory, Time(self.now), &mut self.events);
        for event in &self.events.list {
            match event {
                LinkEvent::Done(token) => {
                    assert!(self.done.insert(*token), "an order is done once");
                }
                LinkEvent::Length { token, ours, theirs } => self.lengths.push((*token, *ours, *theirs)),
                LinkEvent::Control(range) => self.control.push(self.events.control[range.clone()].to_vec()),
            }
        }
        moved.unwrap_or_else(|cause| {
            self.error = Some(cause);
            true
        })
    }
}

/// Two sides.
pub struct Rig {
    pub a: Side,
    pub b: Side,
    pub network: Option<Network>,
}

impl Rig {
    pub fn new(a: FlowLink, b: FlowLink, network: Option<Network>) -> Rig {
        Rig { a: Side::new(a), b: Side::new(b), network }
    }

    /// One step of each side, and of time.
    pub fn step(&mut self) -> bool {
        let moved = self.a.step() | self.b.step();
        if !moved {
            match &self.network {
                Some(network) => match network.next_event() {
                    Some(time) => network.advance(time),
                    None => return false,
                },
                None => std::thread::yield_now(),
            }
        }
        true
    }

    /// Steps until `done`; panics when that never comes.
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&Rig) -> bool) {
        let start = Instant::now();
        while !done(self) {
            let alive = self.step();
            let (a, b) = (&self.a.error, &self.b.error);
            assert!(alive || done(self), "{what}: nothing is under way any more ({a:?}, {b:?})");
            assert!(start.elapsed() < HANG, "{what}: never happened ({a:?}, {b:?})");
        }
    }

    /// Steps until nothing moves for a while, to show that something does not happen.
    pub fn settle(&mut self) {
        let mut idle = 0;
        while idle < 200 {
            let moved = self.a.step() | self.b.step();
            idle = if moved { 0 } else { idle + 1 };
            if let Some(time) = self.network.as_ref().and_then(Network::next_event) {
                self.network.as_ref().unwrap().advance(time);
                idle = 0;
            }
        }
    }
}

/// Bytes that differ everywhere and by seed.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 32) as u8
        })
        .collect()
}
