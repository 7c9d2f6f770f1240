//! A cluster of engines over a simulated network: submits, drives, injects a fault, checks.

use super::check;
use super::program::{Fault, Planned, Random, Wrong, fault, program};
use carole::coordinator::{self, OpId};
use carole::cost::Prices;
use carole::engine::plan::PlanRules;
use carole::engine::{Engine, EngineSetup, Outcome, Submission, TensorMemory};
use carole::error::{Cause, Error};
use carole::fusion;
use carole::membership;
use carole::memory::Region;
use carole::transport::flow::FlowOptions;
use carole::transport::sim::{Fabric, Network, SimOptions};
use carole::types::{
    Collective, DType, Epoch, GLOBAL_SET, JoinAverage, Place, Rank, ReduceOp, Signature, TensorSignature,
    Time,
};
use std::sync::Arc;

/// What a cluster came to.
#[derive(Default)]
pub struct Report {
    pub operations: u64,
    pub faulty: bool,
    pub split: u64,
}

/// One rank: its engine, and what it still has to do.
struct Node {
    rank: Rank,
    engine: Option<Engine>,
    stopped_until: Option<Time>,
    /// Indices into the program with the time at which each is submitted, latest first.
    plan: Vec<(Time, usize)>,
    buffers: Vec<Vec<Vec<u8>>>,
    results: Vec<Option<Result<Outcome, Error>>>,
    left: bool,
}

struct Cluster {
    network: Network,
    random: Random,
    program: Vec<Planned>,
    nodes: Vec<Node>,
    size: u32,
    fault: Option<(u64, Fault)>,
    verbose: bool,
}

/// Submissions are spread over this much virtual time.
const HORIZON_NS: u64 = 20_000_000;
/// After this much virtual time everything must have ended: several times the limit on silence.
const END_NS: u64 = 200_000_000_000;

/// Simulates one cluster; the error says what was found wrong.
pub fn simulate(seed: u64, ranks: u32, verbose: bool) -> Result<Report, String> {
    let mut random = Random(seed.wrapping_mul(0xA076_1D64_78BD_642F));
    let size = if ranks == 0 { 1 + random.below(9) as u32 } else { ranks };
    let mut cluster = Cluster::new(random, seed, size, verbose);
    cluster.run()?;
    cluster.judge()
}

impl Cluster {
    fn new(mut random: Random, seed: u64, size: u32, verbose: bool) -> Cluster {
        let network = Network::new(SimOptions {
            seed,
            delay_min_ns: 1_000,
            delay_max_ns: random.pick(&[2_000, 50_000, 5_000_000]),
            capacity_bytes: random.pick(&[64, 4096, 64 << 10]),
            fragments: random.once_in(2),
        });
        let steps = 1 + random.below(24) as usize;
        let program = program(&mut random, size, steps);
        let per_host = 1 + random.below(u64::from(size)) as u32;
        let hosts: Arc<[u32]> = (0..size).map(|r| r / per_host).collect();
        let forced = random.pick(&[
            None,
            None,
            Some("ring"),
            Some("tree"),
            Some("doubling"),
            Some("direct"),
            Some("hierarchical"),
        ]);
        let strict = random.once_in(4);
        let fusion_bytes = random.pick(&[0, 3000, 1 << 20]);
        let cache_keys = random.pick(&[4, 1024]);
        let eager_bytes_max = random.pick(&[0, 64, 8 << 10]);
        let window_bytes = random.pick(&[4096, 1 << 20]);
        let fault = fault(&mut random, size, HORIZON_NS * 2);
        let nodes = (0..size)
            .map(|r| {
                let setup = EngineSetup {
                    me: Rank(r),
                    epoch: Epoch(1),
                    hosts: Arc::clone(&hosts),
                    agreement: coordinator::Rules { fusion_bytes, cache_keys, ..Default::default() },
                    fusion: fusion::Rules { fusion_bytes },
                    plans: PlanRules {
                        prices: Prices::default(),
                        forced: forced.map(str::to_string),
                        strict,
                        window_bytes,
                        plans_max: 16,
                    },
                    membership: membership::Rules::default(),
                };
                let fabric = Fabric::new(network.clone(), Rank(r), FlowOptions { eager_bytes_max });
                let mut plan: Vec<(Time, usize)> =
                    (0..program.len()).map(|i| (Time(random.below(HORIZON_NS)), i)).collect();
                plan.sort_by_key(|&(at, _)| std::cmp::Reverse(at));
                Node {
                    rank: Rank(r),
                    engine: Some(Engine::new(setup, Box::new(fabric))),
                    stopped_until: None,
                    plan,
                    buffers: vec![Vec::new(); program.len()],
                    results: (0..program.len()).map(|_| None).collect(),
                    left: false,
                }
            })
            .collect();
        if verbose {
            println!(
                "seed {seed}: {size} ranks, hosts {hosts:?}, algorithm {forced:?}, strict {strict}, fault {fault:?}"
            );
        }
        Cluster { network, random, program, nodes, size, fault, verbose }
    }

    fn run(&mut self) -> Result<(), String> {
        let mut now = Time(0);
        loop {
            self.inject(now);
            while self.turn_all(now)? {}
            if self.is_over() {
                return Ok(());
            }
            let Some(next) = self.next_event(now) else { return Ok(()) };
            if next.0 > END_NS {
                return Ok(());
            }
            now = next;
            self.network.advance(now);
        }
    }

    fn inject(&mut self, now: Time) {
        for node in &mut self.nodes {
            if node.stopped_until.is_some_and(|until| until <= now) {
                node.stopped_until = None;
                self.network.resume(node.rank);
            }
        }
        let Some((at, fault)) = self.fault else { return };
        if at > now.0 {
            return;
        }
        // Faults that are over stay known to `judge` through the nodes' state.
        self.fault = Some((u64::MAX, fault));
        if self.verbose {
            println!("  {} ns: {fault:?}", now.0);
        }
        match fault {
            Fault::Kill(rank) => {
                self.nodes[rank.0 as usize].engine = None;
                self.network.kill(rank);
            }
            Fault::Stop(rank) => {
                self.nodes[rank.0 as usize].stopped_until = Some(Time(u64::MAX));
                self.network.pause(rank);
            }
            Fault::Pause(rank, for_ns) => {
                self.nodes[rank.0 as usize].stopped_until = Some(now.after_ns(for_ns));
                self.network.pause(rank);
            }
            Fault::HalfOpen(from, to) => self.network.drop_silently(from, to),
            Fault::Leave(rank) => {
                let node = &mut self.nodes[rank.0 as usize];
                node.left = true;
                if let Some(engine) = &mut node.engine {
                    engine.leave();
                }
            }
        }
    }

    /// Gives every engine a turn, in random order; whether anything moved.
    fn turn_all(&mut self, now: Time) -> Result<bool, String> {
        let mut order: Vec<usize> = (0..self.nodes.len()).collect();
        self.random.shuffle(&mut order);
        let mut moved = false;
        for i in order {
            let node = &mut self.nodes[i];
            if node.stopped_until.is_some() || node.engine.is_none() {
                continue;
            }
            while node.plan.last().is_some_and(|&(at, _)| at <= now) {
                let (_, op) = node.plan.pop().expect("just seen");
                submit(node, &self.program[op], op, self.size, now);
                moved = true;
            }
            let engine = node.engine.as_mut().expect("just seen");
            moved |= engine.turn(now);
            for ended in engine.ended() {
                let slot = &mut node.results[ended.op.0 as usize];
                if slot.replace(ended.result).is_some() {
                    return Err(format!("operation {} ended twice on {}", ended.op.0, node.rank));
                }
            }
        }
        Ok(moved)
    }

    fn next_event(&self, now: Time) -> Option<Time> {
        let nodes = self.nodes.iter().filter(|n| n.engine.is_some());
        let own = nodes.flat_map(|n| {
            let resume = n.stopped_until.filter(|t| t.0 != u64::MAX);
            let engine = n.engine.as_ref().filter(|_| n.stopped_until.is_none());
            let submit = n.plan.last().map(|&(at, _)| at).filter(|_| n.stopped_until.is_none());
            [resume, engine.and_then(Engine::poll_timeout), submit]
        });
        let links = self.nodes.iter().filter_map(|n| {
            n.engine
                .as_ref()
                .and(Fabric::new(self.network.clone(), n.rank, FlowOptions::default()).next_event())
        });
        let fault = self.fault.map(|(at, _)| Time(at)).filter(|t| t.0 != u64::MAX);
        let all = own.flatten().chain(links).chain(self.network.next_event()).chain(fault);
        all.filter(|t| *t > now).min()
    }

    fn is_live(&self, node: &Node) -> bool {
        node.engine.is_some() && node.stopped_until.is_none() && !node.left
    }

    fn is_over(&self) -> bool {
        let pending_fault = self.fault.is_some_and(|(at, _)| at != u64::MAX);
        !pending_fault
            && self.nodes.iter().filter(|n| self.is_live(n)).all(|n| n.results.iter().all(Option::is_some))
    }

    /// Checks every operation on every live rank.
    fn judge(&self) -> Result<Report, String> {
        let injected = self.fault.is_some_and(|(at, _)| at == u64::MAX);
        let mut report = Report { faulty: injected, ..Report::default() };
        let live: Vec<&Node> = self.nodes.iter().filter(|n| self.is_live(n)).collect();
        for (i, planned) in self.program.iter().enumerate() {
            let mut verdicts: Vec<String> = Vec::new();
            for node in &live {
                let Some(result) = &node.results[i] else {
                    return Err(format!(
                        "'{}' ({planned:?}) never ended on {}: {}",
                        planned.name,
                        node.rank,
                        node.engine
                            .as_ref()
                            .and_then(|e| e.explain(OpId(i as u32), Time(END_NS)))
                            .unwrap_or_default()
                    ));
                };
                report.operations += 1;
                match result {
                    Ok(outcome) => {
                        self.check_bits(planned, node, i, outcome)?;
                        verdicts.push("ok".into());
                    }
                    Err(error) => {
                        self.check_error(planned, node, error)?;
                        verdicts.push(error.to_string());
                    }
                }
            }
            verdicts.sort();
            verdicts.dedup();
            let errors: Vec<&String> = verdicts.iter().filter(|v| *v != "ok").collect();
            match (errors.len(), verdicts.len()) {
                (0 | 1, 1) => {}
                // Some had finished when the epoch broke: the verdict round of elastic jobs will settle these.
                (1 | 2, 2) if injected => report.split += 1,
                // Two ranks may be at fault where one direction of a link is lost: each end blames the other.
                _ if matches!(self.fault, Some((_, Fault::HalfOpen(..)))) => {}
                _ => {
                    return Err(format!(
                        "'{}' has several verdicts on live ranks: {verdicts:?}",
                        planned.name
                    ));
                }
            }
        }
        Ok(report)
    }

    fn check_bits(&self, planned: &Planned, node: &Node, i: usize, outcome: &Outcome) -> Result<(), String> {
        if planned.wrong.is_some() {
            return Err(format!("'{}' is wrong on one rank and succeeded on {}", planned.name, node.rank));
        }
        for t in 0..planned.tensors.len() {
            let Some(expected) = check::expected(planned, node.rank.0, t, self.size) else { continue };
            let got = match outcome.tensors.get(t).map(|o| &o.memory) {
                Some(Some(owned)) => owned.as_slice(),
                Some(None) => &node.buffers[i][t],
                None => return Err(format!("'{}' has no output {t} on {}", planned.name, node.rank)),
            };
            if got != expected {
                return Err(format!("'{}' tensor {t} is wrong on {}: {planned:?}", planned.name, node.rank));
            }
        }
        Ok(())
    }

    fn check_error(&self, planned: &Planned, node: &Node, error: &Error) -> Result<(), String> {
        let injected = self.fault.filter(|(at, _)| *at == u64::MAX).map(|(_, fault)| fault);
        let fits = match (error, injected) {
            (Error::Mismatch(m), _) => planned.wrong.is_some() && m.message.contains(&planned.name),
            (Error::Usage(_), _) => planned.wrong.is_some(),
            (Error::Broken(b), Some(Fault::Kill(rank))) => {
                b.culprit == Some(rank) && b.cause == Cause::Exited
                    || b.culprit == Some(rank) && matches!(b.cause, Cause::Unreachable(_))
            }
            (Error::Broken(b), Some(Fault::Stop(rank))) => {
                b.culprit == Some(rank) && matches!(b.cause, Cause::Silent { .. })
            }
            (Error::Broken(_), Some(Fault::HalfOpen(..))) => true,
            (Error::Shutdown(who), Some(Fault::Leave(rank))) => *who == Some(rank),
            _ => false,
        };
        match fits {
            true => Ok(()),
            false => {
                Err(format!("'{}' on {} ended with: {error} (fault {injected:?})", planned.name, node.rank))
            }
        }
    }
}

fn submit(node: &mut Node, planned: &Planned, op: usize, size: u32, now: Time) {
    let me = node.rank.0;
    let wrong = planned.wrong.filter(|(rank, _)| *rank == node.rank).map(|(_, w)| w);
    let mut inputs: Vec<Vec<u8>> = (0..planned.tensors.len()).map(|t| check::input(planned, me, t)).collect();
    let mut outputs = vec![Vec::new(); inputs.len()];
    let own_output = matches!(planned.collective, Collective::Allreduce | Collective::Broadcast);
    let tensors: Vec<TensorMemory> = inputs
        .iter_mut()
        .zip(&mut outputs)
        .map(|(input, output)| {
            // SAFETY: the node keeps the buffers until the cluster is judged, and their heap does not move.
            let region = unsafe { Region::new(input.as_mut_ptr(), input.len() as u64) };
            if !own_output {
                return TensorMemory { input: region, output: None };
            }
            if planned.in_place {
                return TensorMemory { input: region, output: Some(region) };
            }
            *output = vec![0xEE; input.len()];
            // SAFETY: as above.
            let to = unsafe { Region::new(output.as_mut_ptr(), output.len() as u64) };
            TensorMemory { input: region, output: Some(to) }
        })
        .collect();
    let signature = signature(planned, wrong);
    let call: Vec<u64> = match planned.collective {
        Collective::Allgather | Collective::Gather => {
            planned.tensors.iter().map(|(_, rows)| rows[me as usize]).collect()
        }
        Collective::Alltoall => planned.splits.iter().flat_map(|m| m[me as usize].clone()).collect(),
        _ => Vec::new(),
    };
    let submission = Submission {
        op: OpId(op as u32),
        set: GLOBAL_SET,
        name: &planned.name,
        hold: false,
        signature: &signature,
        call: &call,
        tensors: &tensors,
        refused: (wrong == Some(Wrong::Refused)).then_some("the buffer is read-only"),
    };
    node.buffers[op] = if own_output && !planned.in_place { outputs } else { inputs.split_off(0) };
    if own_output && !planned.in_place {
        // The inputs must live as long.
        node.buffers[op].append(&mut inputs);
    }
    debug_assert!(size > 0);
    let accepted = node.engine.as_mut().expect("live nodes submit").submit(&submission, now);
    if let Err(error) = accepted {
        node.results[op] = Some(Err(error));
    }
}

fn signature(planned: &Planned, wrong: Option<Wrong>) -> Signature {
    let free = planned.collective.has_free_rows();
    let tensors = planned
        .tensors
        .iter()
        .map(|(row, rows)| TensorSignature {
            dtype: if wrong == Some(Wrong::DType) { DType::U64 } else { planned.dtype },
            shape: vec![if free { 0 } else { rows[0] }, row + u64::from(wrong == Some(Wrong::Shape))],
        })
        .collect();
    Signature {
        collective: if wrong == Some(Wrong::Collective) { Collective::Reduce } else { planned.collective },
        op: match (planned.collective.reduces(), wrong) {
            (true, Some(Wrong::Op)) => ReduceOp::Product,
            (true, _) => planned.op,
            (false, _) => ReduceOp::Sum,
        },
        scale: planned.scale,
        root: if planned.collective.has_root() { planned.root } else { Rank(0) },
        place: Place::Host,
        join_average: JoinAverage::Size,
        tensors,
        ranks: Vec::new(),
    }
}
