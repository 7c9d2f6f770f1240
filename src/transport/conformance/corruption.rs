//! Bytes that change on the way. Without checksums a wrong result can pass for a right one, which the first test
//! shows; with them, never: whatever bit is flipped, wherever, both results are right or the link has ended with
//! words about it.
#![forbid(unsafe_code)]

use super::rig::{Rig, pattern};
use crate::device::Reduction;
use crate::error::Cause;
use crate::transport::flow::{FlowLink, FlowOptions};
use crate::transport::{Link, Pipe};
use crate::types::{DType, Rank, ReduceOp};
use std::io::IoSlice;
use std::net::{TcpListener, TcpStream};
use std::os::fd::RawFd;

/// A pipe that flips one bit of what is written to it, `flip_at` bits after its beginning.
struct Flipping {
    pipe: Box<dyn Pipe>,
    written: u64,
    flip_at: u64,
}

impl Pipe for Flipping {
    fn write(&mut self, parts: &[IoSlice<'_>]) -> Result<usize, Cause> {
        let mut bytes: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        let end = self.written + bytes.len() as u64;
        if (self.written..end).contains(&(self.flip_at / 8)) {
            bytes[(self.flip_at / 8 - self.written) as usize] ^= 1 << (self.flip_at % 8);
        }
        let n = self.pipe.write(&[IoSlice::new(&bytes)])?;
        self.written += n as u64;
        Ok(n)
    }
    fn peek(&mut self) -> Result<&[u8], Cause> {
        self.pipe.peek()
    }
    fn consume(&mut self, n: usize) {
        self.pipe.consume(n);
    }
    fn read(&mut self, dst: &mut [u8]) -> Result<usize, Cause> {
        self.pipe.read(dst)
    }
    fn flush(&mut self) -> Result<(), Cause> {
        self.pipe.flush()
    }
    fn arm(&mut self, blocked: bool) -> Result<bool, Cause> {
        self.pipe.arm(blocked)
    }
    fn disarm(&mut self) {
        self.pipe.disarm();
    }
    fn descriptor(&self) -> Option<RawFd> {
        self.pipe.descriptor()
    }
    fn kind(&self) -> &'static str {
        self.pipe.kind()
    }
}

/// Two links over TCP, of which the first flips one bit on the pipe `at` (0 is control).
fn rig(checksums: bool, at: usize, flip_at: u64) -> Rig {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut a: Vec<Box<dyn Pipe>> = vec![];
    let mut b: Vec<Box<dyn Pipe>> = vec![];
    for i in 0..2 {
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (theirs, _) = listener.accept().unwrap();
        let pipe: Box<dyn Pipe> = super::tcp_pipe(ours);
        a.push(match i == at {
            true => Box::new(Flipping { pipe, written: 0, flip_at }),
            false => pipe,
        });
        b.push(super::tcp_pipe(theirs));
    }
    let options = FlowOptions { checksums, ..FlowOptions::default() };
    let link = |peer, mut pipes: Vec<Box<dyn Pipe>>| {
        let control = pipes.remove(0);
        FlowLink::new(Rank(peer), control, pipes, options)
    };
    Rig::new(link(1, a), link(0, b), None)
}

/// A small message, a large one in two frames, one that is reduced, one that lands unasked, and a word of control.
/// Says what `b` has ended with, and whether all that it was told is right.
fn exchange(mut rig: Rig) -> (Option<Cause>, bool) {
    let small = pattern(1000, 1);
    let large = pattern(300_001, 2);
    let ones: Vec<u8> = (0..5000u32).flat_map(|i| i.to_le_bytes()).collect();
    let reduction = Reduction { op: ReduceOp::Sum, dtype: DType::U32 };
    let early = rig.a.send(4, &small, 0);
    rig.a.link.tell(b"a word");
    let sends = [rig.a.send(1, &small, 0), rig.a.send(2, &large, 70_000), rig.a.send(3, &ones, 0)];
    rig.settle();
    let r1 = rig.b.recv(1, small.len(), 0);
    let r2 = rig.b.recv(2, large.len(), 0);
    let r3 = rig.b.recv_reduce(3, &ones, false, reduction, false);
    let r4 = rig.b.recv(4, small.len(), 0);
    let all = |rig: &Rig| [r1, r2, r3, r4].iter().all(|r| rig.b.is_done(*r));
    let sent = |rig: &Rig| sends.iter().all(|s| rig.a.is_done(*s)) && rig.a.is_done(early);
    // One of the two: it is all there, or something was noticed. (A length that was flipped would have the reader
    // wait; then nothing moves any more.)
    for _ in 0..4 {
        if !(all(&rig) && sent(&rig)) && rig.a.error.is_none() && rig.b.error.is_none() {
            rig.settle();
        }
    }
    let doubled: Vec<u8> = (0..5000u32).flat_map(|i| (2 * i).to_le_bytes()).collect();
    let right = [(r1, &small), (r2, &large), (r3, &doubled), (r4, &small)]
        .iter()
        .all(|(r, bytes)| !rig.b.is_done(*r) || rig.b.result(*r) == **bytes)
        && rig.b.control.iter().all(|word| word == b"a word");
    let complete = all(&rig) && rig.b.control.len() == 1;
    let noticed = rig.b.error.is_some();
    (rig.b.error, right && (complete || noticed))
}

/// The middle of the payload of the first frame on the lane.
const IN_PAYLOAD: u64 = (64 + 500) * 8 + 3;

#[test]
fn without_checksums_a_flipped_bit_is_a_wrong_result() {
    let (error, right) = exchange(rig(false, 1, IN_PAYLOAD));
    assert_eq!((error, right), (None, false), "this is what checksums are for");
}

#[test]
fn with_checksums_it_ends_the_link_and_says_what_was_found() {
    let (error, right) = exchange(rig(true, 1, IN_PAYLOAD));
    let Some(Cause::Corrupted(words)) = error else { panic!("{error:?}") };
    assert!(right, "nobody is told of a message that is wrong");
    assert!(words.contains("payload (bytes 0 to 1000 of 1000)") && words.contains("checksum"), "{words}");
}

#[test]
fn whatever_bit_is_flipped_nothing_wrong_passes() {
    assert_eq!(exchange(rig(true, 1, u64::MAX)), (None, true), "nothing is flipped");
    // Every bit of the first header and of what follows it, and places all over the rest. (Padding may change
    // unnoticed: nobody reads it.)
    let lane = (0..512).step_by(7).chain((512..350_000 * 8).step_by(8 * 4801 + 3));
    let control = (0..(64 + 32) * 8).step_by(11);
    let mut noticed = 0;
    for (at, flip_at) in lane.map(|bit| (1, bit)).chain(control.map(|bit| (0, bit))) {
        let (error, right) = exchange(rig(true, at, flip_at));
        assert!(right, "bit {flip_at} of pipe {at}: something wrong passed, or was lost without a word");
        match error {
            None => {}
            Some(Cause::Corrupted(_)) => noticed += 1,
            Some(other) => panic!("bit {flip_at} of pipe {at}: {other:?}"),
        }
    }
    assert!(noticed > 150, "only {noticed} flips were noticed");
}
