//! Runs all members' schedules symbolically, in a seeded random order, and checks what comes out. One seed
//! proves little: an erased dependency shows only in orders that use the freedom it gives.
#![forbid(unsafe_code)]

use super::symbol::{Nonsense, POISON, Symbols, Value};
use super::{Schedule, Space, Span, Verb, has_input, has_output};
use crate::types::Collective;
use std::collections::VecDeque;
use std::fmt;

/// What the schedules are to achieve.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Goal {
    /// The collective.
    pub collective: Collective,
    /// Its root.
    pub root: u32,
    /// Whether inputs are to be prescaled.
    pub prescaled: bool,
    /// Whether values are combined with Adasum: in the canonical tree, always.
    pub adasum: bool,
    /// Whether the reduction must be the canonical tree.
    pub strict: bool,
    /// Whether it must also be rounded only once (16-bit types in strict mode).
    pub rounded_once: bool,
    /// Whether input and output are the same memory. Both ways must be verified.
    pub in_place: bool,
}

/// What is wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Nothing can go on.
    Deadlock {
        /// Steps done.
        done: usize,
        /// Steps in all.
        of: usize,
        /// A step that cannot go on.
        member: u32,
        /// Its number.
        step: u32,
    },
    /// Messages that nobody received.
    Undelivered {
        /// Who sent.
        from: u32,
        /// To whom.
        to: u32,
    },
    /// A step that makes no sense.
    Nonsense {
        /// Whose step.
        member: u32,
        /// Its number.
        step: u32,
        /// Why.
        reason: &'static str,
    },
    /// A result that is not what it should be.
    Wrong {
        /// On whom.
        member: u32,
        /// Of which chunk.
        chunk: u32,
        /// Why.
        reason: &'static str,
        /// What is there.
        got: String,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Deadlock { done, of, member, step } => {
                write!(f, "deadlock after {done} of {of} steps: member {member} is stuck at step {step}")
            }
            Fault::Undelivered { from, to } => write!(f, "a message from {from} to {to} was not received"),
            Fault::Nonsense { member, step, reason } => write!(f, "member {member}, step {step}: {reason}"),
            Fault::Wrong { member, chunk, reason, got } => {
                write!(f, "member {member}, chunk {chunk}: {reason}; it is {got}")
            }
        }
    }
}

/// Runs the schedules of all members, in member order. `slots` messages fit on a wire; with 0 a message
/// passes only into a posted receive (rendezvous). Returns the number of steps.
pub fn verify(all: &[Schedule], goal: &Goal, seed: u64, slots: usize) -> Result<usize, Fault> {
    let mut world = World::new(all, goal, slots);
    for (member, schedule) in all.iter().enumerate() {
        for step in 0..schedule.steps.len() {
            if world.members[member].waits[step] == 0 {
                world.unblocked(member, step);
            }
        }
    }
    let mut random = Random::new(seed);
    let mut done = 0;
    while !world.ready.is_empty() {
        let choice = random.below(world.ready.len());
        done += match world.ready.swap_remove(choice) {
            Ready::Local { member, step } => world.local(member, step)?,
            Ready::Send { wire } => world.send(wire)?,
            Ready::Recv { wire } => world.recv(wire)?,
            Ready::Pair { wire } => world.send(wire)? + world.recv(wire)?,
        };
    }
    world.check_end(done)?;
    world.check_results()?;
    Ok(done)
}

/// Something that can happen next. What is ready stays ready until it happens.
enum Ready {
    Local { member: usize, step: usize },
    Send { wire: usize },
    Recv { wire: usize },
    Pair { wire: usize },
}

/// One member's progress.
struct Progress {
    /// For each step, how many others it still waits for.
    waits: Vec<u32>,
    dependents: Vec<Vec<u32>>,
    done: Vec<bool>,
    input: Vec<Value>,
    output: Vec<Value>,
    scratch: Vec<Value>,
}

/// From one member to another: posted in program order, so only the first of each side can go on.
#[derive(Default)]
struct Wire {
    sends: VecDeque<u32>,
    recvs: VecDeque<u32>,
    messages: VecDeque<(u32, Vec<Value>)>,
    send_listed: bool,
    recv_listed: bool,
}

struct World<'a> {
    all: &'a [Schedule],
    goal: &'a Goal,
    slots: usize,
    symbols: Symbols,
    members: Vec<Progress>,
    wires: Vec<Wire>,
    ready: Vec<Ready>,
}

impl<'a> World<'a> {
    fn new(all: &'a [Schedule], goal: &'a Goal, slots: usize) -> World<'a> {
        let size = all.len();
        let mut symbols = Symbols::new(size as u32);
        let mut wires: Vec<Wire> = (0..size * size).map(|_| Wire::default()).collect();
        let mut members = Vec::with_capacity(size);
        for (me, schedule) in all.iter().enumerate() {
            assert!(schedule.me as usize == me && schedule.size as usize == size, "one schedule per member");
            for (i, step) in schedule.steps.iter().enumerate() {
                match &step.verb {
                    Verb::Send { to, .. } => wires[me * size + *to as usize].sends.push_back(i as u32),
                    Verb::Recv { from, .. } | Verb::RecvReduce { from, .. } => {
                        wires[*from as usize * size + me].recvs.push_back(i as u32);
                    }
                    _ => {}
                }
            }
            members.push(Progress::new(schedule, goal, &mut symbols));
        }
        World { all, goal, slots, symbols, members, wires, ready: vec![] }
    }

    fn local(&mut self, member: usize, step: usize) -> Result<usize, Fault> {
        let all = self.all;
        let verb = &all[member].steps[step].verb;
        let operands = verb.reads().map(|s| self.read(member, step, s)).collect::<Result<Vec<_>, _>>()?;
        let dst = verb.writes().expect("sends and receives are not local");
        let symbols = &mut self.symbols;
        let count = dst.count() as usize;
        if operands.iter().any(|o| o.len() != count) || verb.reads().any(|s| !self.goal.alike(s, dst)) {
            return Err(nonsense(member, step, "the spans differ in length"));
        }
        let mut values = Vec::with_capacity(count);
        for i in 0..count {
            let value = match verb {
                Verb::Copy { .. } => Ok(operands[0][i]),
                Verb::Prepare { .. } => symbols.prepared(operands[0][i]),
                Verb::Finish { .. } => symbols.finished(operands[0][i]),
                Verb::Reduce { .. } => symbols.reduced(operands[0][i], operands[1][i]),
                Verb::Combine { .. } => symbols.combined(operands[0][i], operands[1][i]),
                Verb::ReduceMany { .. } => {
                    let column: Vec<Value> = operands.iter().map(|o| o[i]).collect();
                    symbols.many(&column)
                }
                Verb::Send { .. } | Verb::Recv { .. } | Verb::RecvReduce { .. } => unreachable!("not local"),
            };
            values.push(value.map_err(|reason| nonsense(member, step, reason))?);
        }
        self.write(member, step, dst, &values)?;
        self.complete(member, step);
        Ok(1)
    }

    fn send(&mut self, wire: usize) -> Result<usize, Fault> {
        let (from, all) = (wire / self.all.len(), self.all);
        let step = self.wires[wire].sends.pop_front().expect("it was first in line") as usize;
        self.wires[wire].send_listed = false;
        let Verb::Send { src, .. } = &all[from].steps[step].verb else { unreachable!("a send") };
        let values = self.read(from, step, src)?;
        self.wires[wire].messages.push_back((src.of, values));
        self.complete(from, step);
        self.consider(wire);
        Ok(1)
    }

    fn recv(&mut self, wire: usize) -> Result<usize, Fault> {
        let (from, to, all) = (wire / self.all.len(), wire % self.all.len(), self.all);
        let step = self.wires[wire].recvs.pop_front().expect("it was first in line") as usize;
        self.wires[wire].recv_listed = false;
        let (of, mut values) = self.wires[wire].messages.pop_front().expect("there is a message");
        let verb = &all[to].steps[step].verb;
        let dst = verb.writes().expect("a receive writes");
        let same = of == dst.of || self.goal.collective == Collective::Alltoall;
        if values.len() != dst.count() as usize || !same {
            return Err(nonsense(to, step, "it receives a message of another length"));
        }
        if let Verb::RecvReduce { with, .. } = verb {
            let mine = self.read(to, step, with)?;
            if mine.len() != values.len() || with.of != dst.of {
                return Err(nonsense(to, step, "the spans differ in length"));
            }
            for (theirs, mine) in values.iter_mut().zip(mine) {
                let (a, b) = if from < to { (*theirs, mine) } else { (mine, *theirs) };
                *theirs = self.symbols.reduced(a, b).map_err(|reason| nonsense(to, step, reason))?;
            }
        }
        self.write(to, step, dst, &values)?;
        self.complete(to, step);
        self.consider(wire);
        Ok(1)
    }

    fn complete(&mut self, member: usize, step: usize) {
        self.members[member].done[step] = true;
        for next in std::mem::take(&mut self.members[member].dependents[step]) {
            let waits = &mut self.members[member].waits[next as usize];
            *waits -= 1;
            if *waits == 0 {
                self.unblocked(member, next as usize);
            }
        }
    }

    fn unblocked(&mut self, member: usize, step: usize) {
        let size = self.all.len();
        match &self.all[member].steps[step].verb {
            Verb::Send { to, .. } => self.consider(member * size + *to as usize),
            Verb::Recv { from, .. } | Verb::RecvReduce { from, .. } => {
                self.consider(*from as usize * size + member);
            }
            _ => self.ready.push(Ready::Local { member, step }),
        }
    }

    /// Lists what can happen on a wire, unless it is listed already.
    fn consider(&mut self, wire: usize) {
        let (from, to) = (wire / self.all.len(), wire % self.all.len());
        let free = |member: usize, step: Option<&u32>| {
            step.is_some_and(|&s| self.members[member].waits[s as usize] == 0)
        };
        let w = &self.wires[wire];
        let (sender, receiver) = (free(from, w.sends.front()), free(to, w.recvs.front()));
        let room = w.messages.len() < self.slots;
        let full = !w.messages.is_empty();
        let w = &mut self.wires[wire];
        if self.slots == 0 {
            if sender && receiver && !full && !w.send_listed {
                (w.send_listed, w.recv_listed) = (true, true);
                self.ready.push(Ready::Pair { wire });
            }
            return;
        }
        if sender && room && !w.send_listed {
            w.send_listed = true;
            self.ready.push(Ready::Send { wire });
        }
        if receiver && full && !w.recv_listed {
            w.recv_listed = true;
            self.ready.push(Ready::Recv { wire });
        }
    }

    fn read(&self, member: usize, step: usize, span: &Span) -> Result<Vec<Value>, Fault> {
        let memory = &self.members[member];
        self.check_span(member, step, span)?;
        let cells = match span.space {
            Space::Input => &memory.input,
            Space::Output if self.goal.in_place => &memory.input,
            Space::Output => &memory.output,
            Space::Scratch => &memory.scratch,
        };
        let values = &cells[span.chunks.start as usize..span.chunks.end as usize];
        if values.contains(&POISON) {
            return Err(nonsense(member, step, "it reads memory that nobody has written"));
        }
        let checked = self.goal.collective != Collective::Alltoall;
        if checked && values.iter().zip(span.of..).any(|(&v, of)| self.symbols.chunk(v) != of) {
            return Err(nonsense(member, step, "it reads a chunk as another one"));
        }
        Ok(values.to_vec())
    }

    fn write(&mut self, member: usize, step: usize, span: &Span, values: &[Value]) -> Result<(), Fault> {
        if span.space == Space::Input {
            return Err(nonsense(member, step, "it writes the input"));
        }
        self.check_span(member, step, span)?;
        let memory = &mut self.members[member];
        let cells = match span.space {
            Space::Output if !self.goal.in_place => &mut memory.output,
            Space::Scratch => &mut memory.scratch,
            _ => &mut memory.input,
        };
        cells[span.chunks.start as usize..span.chunks.end as usize].copy_from_slice(values);
        Ok(())
    }

    /// The span must lie in memory that this member has, and say its length rightly.
    fn check_span(&self, member: usize, step: usize, span: &Span) -> Result<(), Fault> {
        let (schedule, goal, me) = (&self.all[member], self.goal, member as u32);
        let has = |c: u32| match span.space {
            Space::Input => c < schedule.chunks && has_input(goal.collective, goal.root, me, c),
            Space::Output => c < schedule.chunks && has_output(goal.collective, goal.root, me, c),
            Space::Scratch => c < schedule.scratch,
        };
        if span.chunks.is_empty() || !span.chunks.clone().all(has) {
            return Err(nonsense(member, step, "it touches memory that this member does not have"));
        }
        let own = match span.space {
            Space::Scratch => return Ok(()),
            Space::Output if goal.collective == Collective::Alltoall => schedule.chunks + span.chunks.start,
            _ => span.chunks.start,
        };
        if span.of == own { Ok(()) } else { Err(nonsense(member, step, "a span says a wrong length")) }
    }

    fn check_end(&self, done: usize) -> Result<(), Fault> {
        let of = self.all.iter().map(|s| s.steps.len()).sum();
        if done < of {
            let stuck = |p: &Progress| p.done.iter().position(|done| !done);
            let (member, step) = (self.members.iter().enumerate())
                .find_map(|(m, p)| Some((m as u32, stuck(p)? as u32)))
                .expect("a step is not done");
            return Err(Fault::Deadlock { done, of, member, step });
        }
        match self.wires.iter().position(|w| !w.messages.is_empty()) {
            Some(wire) => Err(Fault::Undelivered {
                from: (wire / self.all.len()) as u32,
                to: (wire % self.all.len()) as u32,
            }),
            None => Ok(()),
        }
    }

    fn check_results(&mut self) -> Result<(), Fault> {
        for member in 0..self.all.len() as u32 {
            for chunk in 0..self.all[member as usize].chunks {
                if !has_output(self.goal.collective, self.goal.root, member, chunk) {
                    continue;
                }
                let memory = &self.members[member as usize];
                let cells = if self.goal.in_place { &memory.input } else { &memory.output };
                let value = cells[chunk as usize];
                if let Err(reason) = self.check_result(member, chunk, value) {
                    let got = self.symbols.show(value);
                    return Err(Fault::Wrong { member, chunk, reason, got });
                }
            }
        }
        Ok(())
    }

    fn check_result(&mut self, member: u32, chunk: u32, value: Value) -> Result<(), Nonsense> {
        let (goal, size) = (self.goal, self.all.len() as u32);
        let moved = match goal.collective {
            Collective::Allgather | Collective::Gather => self.symbols.leaf(chunk, chunk),
            Collective::Broadcast | Collective::Scatter => self.symbols.leaf(goal.root, chunk),
            Collective::Alltoall => self.symbols.leaf(chunk, member),
            Collective::Barrier => {
                let whole = self.symbols.is_whole(value, size, true);
                return if whole { Ok(()) } else { Err("not every member has entered") };
            }
            _ => return self.check_reduction(chunk, value),
        };
        if value == moved { Ok(()) } else { Err("it is not the input that belongs there") }
    }

    fn check_reduction(&mut self, chunk: u32, value: Value) -> Result<(), Nonsense> {
        let (goal, size, symbols) = (self.goal, self.all.len() as u32, &mut self.symbols);
        if !symbols.is_whole(value, size, false) {
            return Err("it does not have each member's input exactly once");
        }
        if !symbols.is_finished(value) {
            return Err("the final scale is missing");
        }
        let many = symbols.many_of_all(chunk, size);
        if !goal.adasum && value == many {
            return Ok(());
        }
        if goal.rounded_once {
            return Err("it is rounded more than once");
        }
        if !symbols.is_prescaled_as(value, goal.prescaled) {
            return Err("the prescale factor is applied wrongly");
        }
        if goal.strict || goal.adasum {
            let canonical = symbols.canonical(chunk, size, goal.prescaled, goal.adasum);
            if value != canonical {
                return Err("it is not reduced in the canonical tree");
            }
        }
        Ok(())
    }
}

impl Goal {
    /// Whether two spans of one step stand for the same lengths. In an alltoall only a member's own chunk is
    /// copied from input to output, and lengths there are the layout's business.
    fn alike(&self, a: &Span, b: &Span) -> bool {
        a.of == b.of || self.collective == Collective::Alltoall
    }
}

impl Progress {
    fn new(schedule: &Schedule, goal: &Goal, symbols: &mut Symbols) -> Progress {
        let steps = schedule.steps.len();
        let mut dependents = vec![vec![]; steps];
        let mut waits = vec![0; steps];
        for (i, waits) in waits.iter_mut().enumerate() {
            for &before in schedule.after(i) {
                assert!((before as usize) < i, "dependencies point backwards");
                dependents[before as usize].push(i as u32);
                *waits += 1;
            }
        }
        let me = schedule.me;
        let input = (0..schedule.chunks).map(|c| match has_input(goal.collective, goal.root, me, c) {
            true => symbols.leaf(me, c),
            false => POISON,
        });
        Progress {
            waits,
            dependents,
            done: vec![false; steps],
            input: input.collect(),
            output: vec![POISON; schedule.chunks as usize],
            scratch: vec![POISON; schedule.scratch as usize],
        }
    }
}

fn nonsense(member: usize, step: usize, reason: Nonsense) -> Fault {
    Fault::Nonsense { member: member as u32, step: step as u32, reason }
}

/// Xorshift: the order must depend on the seed alone.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        Random(seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}
