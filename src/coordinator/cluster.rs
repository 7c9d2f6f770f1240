//! A deterministic cluster of coordinators in memory: virtual time, random delays, FIFO per pair.
#![forbid(unsafe_code)]

use super::*;
use crate::wire::Message;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

/// A small generator of numbers (SplitMix64), so that a seed is a bug report.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

#[derive(Clone, PartialEq, Debug)]
pub enum Outcome {
    Ran { key: TensorKey, absent: Vec<Member>, call: CallTable },
    Failed(String),
    Joined(Member),
}

/// A message under way: when it arrives, a number that keeps ties in order, from, to, bytes.
type Flight = Reverse<(Time, u64, u32, u32, Vec<u8>)>;

pub struct Cluster {
    pub nodes: Vec<Coordinator>,
    pub now: Time,
    pub random: Random,
    /// What each member was told to run, in order, own numbers left out: must be equal everywhere.
    pub logs: Vec<Vec<String>>,
    pub outcomes: Vec<BTreeMap<OpId, Outcome>>,
    pub warnings: Vec<String>,
    pub breaks: Vec<(u32, Cause)>,
    /// Errors of `receive`, which no correct peer causes.
    pub blamed: Vec<(Member, Cause)>,
    pub messages: u64,
    /// Bytes of the largest message.
    pub largest: usize,
    /// Deliver some marks twice: a planted bug that must be noticed.
    pub duplicate_marks: bool,
    /// Change a byte of one in so many messages; 0 none.
    pub corrupt_one_in: u64,
    next_op: u32,
    wire: BinaryHeap<Flight>,
    last: BTreeMap<(u32, u32), Time>,
}

impl Cluster {
    pub fn new(hosts: &[u32], rules: Rules, seed: u64) -> Cluster {
        let n = hosts.len();
        // Global ranks that differ from members, so that a confusion of the two shows.
        let ranks: Arc<[Rank]> = (0..n as u32).map(|i| Rank(i * 2 + 1)).collect();
        let node = |i| {
            Coordinator::new(Setup {
                set: SetId(5),
                me: Member(i as u32),
                ranks: ranks.clone(),
                hosts: hosts.into(),
                rules,
            })
        };
        Cluster {
            nodes: (0..n).map(node).collect(),
            now: Time(0),
            random: Random(seed),
            logs: vec![Vec::new(); n],
            outcomes: vec![BTreeMap::new(); n],
            warnings: Vec::new(),
            breaks: Vec::new(),
            blamed: Vec::new(),
            messages: 0,
            largest: 0,
            duplicate_marks: false,
            corrupt_one_in: 0,
            next_op: 0,
            wire: BinaryHeap::new(),
            last: BTreeMap::new(),
        }
    }

    pub fn size(&self) -> usize {
        self.nodes.len()
    }

    pub fn try_submit(
        &mut self,
        member: usize,
        name: &str,
        hold_if_busy: bool,
        signature: &Signature,
        call: &[u64],
        refused: Option<&str>,
    ) -> Result<OpId, SubmitError> {
        let op = OpId(self.next_op);
        self.next_op += 1;
        let submission = Submission { op, name, hold_if_busy, signature, call, refused };
        self.nodes[member].submit(submission, self.now)?;
        self.drain(member);
        Ok(op)
    }

    pub fn submit(&mut self, member: usize, name: &str, signature: &Signature) -> OpId {
        self.try_submit(member, name, false, signature, &[], None).expect("accepted")
    }

    pub fn wait_for(&mut self, member: usize, op: OpId) {
        self.nodes[member].wait_for(op, self.now);
        self.drain(member);
    }

    fn drain(&mut self, member: usize) {
        while let Some(intent) = self.nodes[member].poll() {
            match intent {
                Intent::Tell { to, message } => {
                    self.messages += 1;
                    self.largest = self.largest.max(message.len());
                    let copies = if self.duplicate_marks && self.random.below(4) == 0 { 2 } else { 1 };
                    for _ in 0..copies {
                        let pair = (member as u32, to.0);
                        let earliest = self.last.get(&pair).map_or(Time(0), |t| t.after_ns(1));
                        let at = self.now.after_ns(1 + self.random.below(20_000)).max(earliest);
                        self.last.insert(pair, at);
                        self.wire.push(Reverse((at, self.messages, pair.0, pair.1, message.clone())));
                    }
                    self.nodes[member].recycle(message);
                }
                Intent::Run(cut) => {
                    self.logs[member].push(String::from("cut"));
                    for a in &cut {
                        let shown = &a.call.values[..a.call.values.len().min(500)];
                        let shapes = &a.signature.tensors[..a.signature.tensors.len().min(3)];
                        self.logs[member]
                            .push(format!("{} {} {:?} {shown:?} {shapes:?}", a.key.0, a.name, a.absent));
                        if let Some(op) = a.op {
                            let (absent, call) = (a.absent.to_vec(), (*a.call).clone());
                            let ran = Outcome::Ran { key: a.key, absent, call };
                            assert!(self.outcomes[member].insert(op, ran).is_none(), "one outcome each");
                        }
                    }
                    self.nodes[member].recycle_cut(cut);
                }
                Intent::Failed { op, mismatch } => {
                    let failed = Outcome::Failed(mismatch.message.clone());
                    assert!(self.outcomes[member].insert(op, failed).is_none(), "one outcome each");
                }
                Intent::Joined { op, last } => {
                    self.logs[member].push(format!("joined {}", last.0));
                    assert!(self.outcomes[member].insert(op, Outcome::Joined(last)).is_none());
                }
                Intent::Warn(text) => self.warnings.push(text),
                Intent::Break(culprit, cause) => {
                    assert_eq!(culprit, None);
                    self.breaks.push((member as u32, cause));
                }
            }
        }
    }

    /// Delivers and lets time pass until nothing happens before `until`.
    pub fn run(&mut self, until: Time) {
        loop {
            let message = self.wire.peek().map(|Reverse(first)| first.0);
            let timers = self.nodes.iter().enumerate().filter_map(|(i, n)| Some((n.poll_timeout()?, i)));
            let timer = timers.min();
            match (message, timer) {
                (Some(at), timer) if at <= until && timer.is_none_or(|(t, _)| at <= t) => {
                    let Reverse((at, _, from, to, mut bytes)) = self.wire.pop().expect("peeked");
                    if self.corrupt_one_in > 0 && self.random.below(self.corrupt_one_in) == 0 {
                        let place = 5 + self.random.below(bytes.len() as u64 - 5) as usize;
                        bytes[place] = self.random.next() as u8 >> self.random.below(8);
                    }
                    self.now = self.now.max(at);
                    let Ok(Message::Coordination { set: SetId(5), body }) = Message::decode(&bytes) else {
                        panic!("not a coordination message of this set");
                    };
                    if let Err(cause) = self.nodes[to as usize].receive(Member(from), body, self.now) {
                        self.blamed.push((Member(from), cause));
                        return;
                    }
                    self.drain(to as usize);
                }
                (_, Some((at, node))) if at <= until => {
                    self.now = self.now.max(at);
                    self.nodes[node].handle_timeout(self.now);
                    self.drain(node);
                }
                _ => {
                    self.now = self.now.max(until);
                    return;
                }
            }
        }
    }

    /// Runs for a virtual millisecond or two: more than enough for any agreement that can be.
    pub fn settle(&mut self) {
        let until = self.now.after_ns(5_000_000);
        self.run(until);
    }

    /// Same log everywhere, nothing in flight, nobody blamed.
    pub fn check_finished(&self) {
        assert_eq!(self.blamed, []);
        for (i, log) in self.logs.iter().enumerate() {
            assert_eq!(*log, self.logs[0], "member {i} has another log");
            assert_eq!(self.nodes[i].in_flight(), 0, "member {i}");
            assert_eq!(self.nodes[i].table.len(), self.nodes[0].table.len());
            assert!(self.nodes[i].marked_by.iter().all(|&count| count == 0), "member {i}");
            assert!(self.nodes[i].table.rows.iter().all(|row| !row.in_flight), "member {i}");
        }
    }
}

/// One-tensor operations for tests.
pub fn signature(collective: Collective, shape: &[u64]) -> Signature {
    let tensor = crate::types::TensorSignature { dtype: crate::types::DType::F32, shape: shape.to_vec() };
    Signature {
        collective,
        op: crate::types::ReduceOp::Sum,
        scale: crate::types::Scale::default(),
        root: Rank(if collective.has_root() { 1 } else { 0 }),
        place: crate::types::Place::Host,
        join_average: crate::types::JoinAverage::Size,
        tensors: if matches!(collective, Collective::Join | Collective::Barrier) {
            vec![]
        } else {
            vec![tensor]
        },
        ranks: Vec::new(),
    }
}
