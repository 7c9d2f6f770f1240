//! A cluster of engines over a simulated network: submits, drives, injects a fault.
#![forbid(unsafe_code)]

use super::node::Node;
use super::program::{Fault, HORIZON_NS, Kind, Planned, Program, Random, fault, program};
use super::reform::regroup;
use super::sabotage::{Sabotage, Sabotaged};
use super::submit::{joins_too_early, submit};
use carole::coordinator::{self, OpId};
use carole::cost::Prices;
use carole::engine::plan::PlanRules;
use carole::engine::{Ended, Engine, EngineSetup};
use carole::fusion;
use carole::limits::SHUTDOWN_MS;
use carole::membership::{self, ledger::Uniform};
use carole::rendezvous::past::Sets;
use carole::transport::flow::FlowOptions;
use carole::transport::sim::{Fabric, Network, SimOptions};
use carole::types::{Epoch, Rank, SetId, Time};
use std::sync::Arc;

/// What a cluster came to.
#[derive(Default, Debug, PartialEq, Eq)]
pub struct Report {
    pub operations: u64,
    pub faulty: bool,
    pub split: u64,
    /// Of those, how many where this was not to be (see `judge`).
    pub uniform_split: u64,
    /// Whether completion was uniform in an epoch.
    pub uniform: bool,
    /// Whether an epoch followed.
    pub reformed: bool,
    /// A hash of what ended when, where and how.
    pub trace: u64,
}

/// What to simulate.
#[derive(Clone, Copy, Debug, Default)]
pub struct Order {
    pub seed: u64,
    /// 0 takes them from the seed.
    pub ranks: u32,
    pub verbose: bool,
    pub sabotage: Option<Sabotage>,
}

pub struct Cluster {
    pub network: Network,
    pub random: Random,
    pub program: Program,
    pub nodes: Vec<Node>,
    pub fault: Option<(u64, Fault)>,
    /// Turns of ranks that do something between the time of the fault and the fault: within one instant, in which ranks
    /// of one host may exchange a whole batch, it strikes anywhere.
    fuse: u64,
    pub eager_bytes_max: usize,
    pub trace: u64,
    /// Where completion is uniform.
    pub uniform: Uniform,
    pub hosts: Arc<[u32]>,
    epoch: Epoch,
    order: Order,
}

/// After this much virtual time everything must have ended, on the slowest of the networks, too.
pub const END_NS: u64 = 120_000_000_000;

/// Simulates one cluster; the error says what was found wrong.
pub fn simulate(order: Order) -> Result<Report, String> {
    let (network, report) = simulate_in(order);
    // Ends of links that nobody picked up hold the network that holds them.
    network.forget_faults();
    report
}

fn simulate_in(order: Order) -> (Network, Result<Report, String>) {
    let mut random = Random(order.seed.wrapping_mul(0xA076_1D64_78BD_642F));
    let size = match order.ranks {
        0 if random.once_in(16) => 10 + random.below(24) as u32,
        0 => 1 + random.below(9) as u32,
        ranks => ranks,
    };
    // Narrow pipes and long delays together, or with many ranks, show nothing new and take long.
    let capacity_bytes = if size > 9 { 64 << 10 } else { random.pick(&[64, 4096, 64 << 10]) };
    let slow = capacity_bytes > 64 && size <= 9;
    let network = Network::new(SimOptions {
        seed: order.seed,
        delay_min_ns: 1_000,
        delay_max_ns: random.pick(&[2_000, 50_000, if slow { 5_000_000 } else { 200_000 }]),
        capacity_bytes,
        fragments: random.once_in(2),
        boards: random.once_in(2),
    });
    let report = simulate_over(&network, random, order, size);
    (network, report)
}

/// One epoch, and where it breaks another.
fn simulate_over(network: &Network, random: Random, order: Order, size: u32) -> Result<Report, String> {
    let none = Sets { next: 1, ..Sets::default() };
    let mut cluster = Cluster::new(random, order, network.clone(), size, Epoch(1), Time(0), &none);
    let end = cluster.run(Time(0))?;
    let mut report = cluster.judge()?;
    if matches!(
        cluster.injected(),
        Some(
            Fault::Kill(_)
                | Fault::KillHost(_)
                | Fault::Stop(_)
                | Fault::HalfOpen(..)
                | Fault::Flip(..)
                | Fault::Leave(_)
        )
    ) {
        // The survivors go on, or the processes start again: new engines, the same network.
        let mut random = cluster.random.clone();
        let follows = match random.once_in(4) {
            true => Some((size, none)),
            false => regroup(&cluster, &mut random, end)?,
        };
        let Some((size, carried)) = follows else {
            cluster.tear_down(end)?;
            return Ok(report);
        };
        report.reformed = true;
        drop(cluster);
        network.forget_faults();
        let mut again = Cluster::new(random, order, network.clone(), size, Epoch(2), end, &carried);
        let in_second = |found| format!("in the second epoch: {found}");
        let end = again.run(end).map_err(in_second)?;
        let second = again.judge().map_err(in_second)?;
        again.tear_down(end).map_err(in_second)?;
        report.operations += second.operations;
        report.uniform |= second.uniform;
        report.split += second.split;
        report.trace ^= second.trace.rotate_left(1);
        return Ok(report);
    }
    cluster.tear_down(end)?;
    Ok(report)
}

impl Cluster {
    fn new(
        mut random: Random,
        order: Order,
        network: Network,
        size: u32,
        epoch: Epoch,
        start: Time,
        carried: &Sets,
    ) -> Cluster {
        let strict = random.once_in(4);
        // What only ranks of one host do, and only where nothing is forced, would else be met in few clusters.
        let within = network.has_boards() && size <= 9 && random.once_in(2);
        let program = program(&mut random, size, (strict, within), carried);
        let per_host = if within { size } else { 1 + random.below(u64::from(size)) as u32 };
        let even = within || random.once_in(2);
        let hosts: Arc<[u32]> = match even {
            true => (0..size).map(|r| r / per_host).collect(),
            false => first_seen((0..size).map(|_| random.below(u64::from(size.div_ceil(per_host))))),
        };
        let list = ["ring", "tree", "doubling", "direct", "hierarchical"];
        let forced = if within || random.once_in(3) { None } else { Some(random.pick(&list)) };
        let fusion_bytes = random.pick(&[0, 3000, 1 << 20]);
        let cache_keys = if within { 1024 } else { random.pick(&[0, 4, 1024]) };
        let eager_bytes_max = random.pick(&[0, 64, 8 << 10]);
        let window_bytes = random.pick(&[4096, 1 << 20]);
        let uniform =
            random.pick(&[Uniform::Always, Uniform::WithinHosts, Uniform::WithinHosts, Uniform::Never]);
        let lent_bytes = random.pick(&[1, 1000, 16 << 10]);
        let stands_after = random.pick(&[1, 1, 2, 3]);
        let fault = fault(&mut random, size, within);
        // Every other cluster has links as between hosts; where bits are flipped, they must be such.
        let checksums = random.once_in(2) || matches!(fault, Some((_, Fault::Flip(..))));
        let like = EngineSetup {
            me: Rank(0),
            epoch,
            hosts: Arc::clone(&hosts),
            agreement: coordinator::Rules { fusion_bytes, cache_keys, ..Default::default() },
            fusion: fusion::Rules { fusion_bytes },
            direct: carole::engine::Direct { bytes: u64::MAX, slot_bytes: 0 },
            lent_bytes,
            stands_after,
            niche_bytes_within: if lent_bytes == 1 { 16 } else { 4 << 10 },
            plans: PlanRules {
                prices: Prices::default(),
                forced: forced.map(str::to_string),
                strict,
                window_bytes,
                plans_max: 16,
            },
            membership: membership::Rules::default(),
            uniform,
            sets: Vec::new(),
            next_set: carried.next,
        };
        let node = |me: u32| {
            let sets = carried_by(me, carried, order.sabotage);
            let setup = EngineSetup { me: Rank(me), sets, ..like.clone() };
            let fabric = Fabric::new(network.clone(), Rank(me), FlowOptions { eager_bytes_max, checksums });
            Node::new(Rank(me), engine(setup, fabric, order.sabotage), &program, start)
        };
        let nodes: Vec<Node> = (0..size).map(node).collect();
        if order.verbose {
            println!(
                "seed {}: {size} ranks, hosts {hosts:?}, sets {:?}, algorithm {forced:?}, strict {strict}, uniform {uniform:?}, fault {fault:?}",
                order.seed, program.sets
            );
        }
        let fault = fault.map(|(at, fault)| (at + start.0, fault));
        let fuse = if network.has_boards() { random.below(64) } else { 0 };
        Cluster {
            network,
            random,
            program,
            nodes,
            fault,
            fuse,
            eager_bytes_max,
            trace: 0xCBF2_9CE4_8422_2325,
            uniform,
            hosts,
            epoch,
            order,
        }
    }

    /// Runs until everything has ended, or never will; returns the time.
    fn run(&mut self, start: Time) -> Result<Time, String> {
        let mut now = start;
        loop {
            self.inject(now);
            while self.turn_all(now)? {}
            if self.is_over() {
                return Ok(now);
            }
            let Some(next) = self.next_event(now) else {
                if std::mem::take(&mut self.fuse) > 0 {
                    continue;
                }
                return Ok(now);
            };
            if next.0 > start.0 + END_NS {
                return Ok(now);
            }
            now = next;
            self.network.advance(now);
        }
    }

    /// The fault that has happened, if any.
    pub fn injected(&self) -> Option<Fault> {
        self.fault.filter(|(at, _)| *at == u64::MAX).map(|(_, fault)| fault)
    }

    /// Everybody leaves at once, and must be gone in time; where nothing has failed, without having to give up.
    fn tear_down(&mut self, now: Time) -> Result<(), String> {
        let waits = self.order.sabotage == Some(Sabotage::UntimedTeardown);
        let limit = now.after_ns(SHUTDOWN_MS * 1_000_000);
        for node in self.nodes.iter_mut().filter(|n| !n.left && n.stopped_until.is_none()) {
            let Some(engine) = &mut node.engine else { continue };
            (node.left, node.gone_at) = (true, (!waits).then_some(limit));
            if !waits {
                engine.leave();
                node.awake = true;
            }
        }
        let end = self.run(now)?;
        let stays = |node: &&Node| node.engine.is_some() && node.left;
        if let Some(node) = self.nodes.iter().find(stays) {
            return Err(format!("{} never ended its teardown", node.rank));
        }
        if self.injected().is_none() && end >= limit {
            return Err("a teardown in which nobody had failed took as long as it may".into());
        }
        Ok(())
    }

    /// The ranks whose processes were killed.
    pub fn killed(&self) -> Vec<Rank> {
        let host = |rank: Rank| self.hosts[rank.0 as usize];
        match self.injected() {
            Some(Fault::KillHost(one)) if self.hosts.iter().any(|&other| other != host(one)) => {
                (0..self.nodes.len() as u32).map(Rank).filter(|&rank| host(rank) == host(one)).collect()
            }
            Some(Fault::Kill(rank) | Fault::KillHost(rank)) => vec![rank],
            _ => Vec::new(),
        }
    }

    fn inject(&mut self, now: Time) {
        for node in &mut self.nodes {
            let gone = node.engine.as_ref().is_some_and(Engine::is_gone);
            if node.left && (gone || node.gone_at.is_some_and(|at| at <= now)) {
                // As `Driver::stop` does: its process lingers for a bounded time. Who asks for it now is refused.
                (node.engine, node.gone_at) = (None, None);
                self.network.kill(node.rank);
            }
            if node.stopped_until.is_some_and(|until| until <= now) {
                node.stopped_until = None;
                self.network.resume(node.rank);
            }
        }
        if self.fuse == 0 {
            self.strike(now);
        }
    }

    /// Injects the fault, if its time has come.
    fn strike(&mut self, now: Time) {
        let Some((_, fault)) = self.fault.filter(|(at, _)| *at <= now.0) else { return };
        // Faults that are over stay known to `judge`.
        self.fault = Some((u64::MAX, fault));
        if self.order.verbose {
            println!("  {} ns: {fault:?}", now.0);
        }
        match fault {
            Fault::Kill(_) | Fault::KillHost(_) => {
                for rank in self.killed() {
                    self.nodes[rank.0 as usize].engine = None;
                    self.network.kill(rank);
                }
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
            Fault::Flip(from, to) => self.network.flip_bit(from, to),
            Fault::Leave(rank) => {
                let node = &mut self.nodes[rank.0 as usize];
                node.left = true;
                node.left_idle =
                    node.submitted.iter().zip(&node.results).all(|(&began, ended)| !began || ended.is_some());
                node.gone_at = Some(now.after_ns(SHUTDOWN_MS * 1_000_000));
                if let Some(engine) = &mut node.engine {
                    engine.leave();
                    node.awake = true;
                }
            }
        }
    }

    /// Gives every engine a turn that may find something to do, and now and then one that will not, in random order;
    /// whether there may be more to do.
    fn turn_all(&mut self, now: Time) -> Result<bool, String> {
        let mut order: Vec<usize> = (0..self.nodes.len()).collect();
        self.random.shuffle(&mut order);
        self.rouse();
        let mut moved = false;
        for i in order {
            if self.fuse == 0 {
                self.strike(now);
            }
            if self.nodes[i].stopped_until.is_some() || self.nodes[i].engine.is_none() {
                continue;
            }
            let submitted = self.submit_due(i, now)?;
            let node = &mut self.nodes[i];
            let is_due = submitted || node.awake || node.timer.is_some_and(|at| at <= now);
            if !is_due && !self.random.once_in(16) {
                continue;
            }
            let engine = node.engine.as_mut().expect("just seen");
            let turned = engine.turn(now);
            let ended: Vec<Ended> = engine.ended().chain(node.done.drain(..)).collect();
            node.timer = engine.poll_timeout();
            node.awake = turned || !ended.is_empty();
            moved |= submitted || node.awake;
            if (submitted || node.awake) && self.fault.is_some_and(|(at, _)| at <= now.0) {
                self.fuse = self.fuse.saturating_sub(1);
            }
            for ended in ended {
                self.note(i, ended, now)?;
            }
        }
        // What is written on a board, the others of the host see without being told.
        if moved && self.network.has_boards() {
            self.nodes.iter_mut().for_each(|node| node.awake = true);
        }
        Ok(self.rouse() || moved)
    }

    /// Wakes the ranks for which the network has something; whether there are any.
    fn rouse(&mut self) -> bool {
        let roused = self.network.take_roused();
        for rank in &roused {
            // The pipes of an epoch that is over may be those of a rank that has no place any more.
            if let Some(node) = self.nodes.get_mut(rank.0 as usize) {
                node.awake = true;
            }
        }
        !roused.is_empty()
    }

    /// The planted bug of a rank that does without what the others begin an epoch with.
    fn skipped_sync(&self) -> Option<usize> {
        let planted = self.order.sabotage == Some(Sabotage::SyncSkipped) && self.epoch > Epoch(1);
        let begins = |op: &Planned| op.set == 0 && op.kind == Kind::Collective;
        self.program.ops.iter().position(begins).filter(|_| planted)
    }

    /// Submits what is due on a rank and can be submitted.
    fn submit_due(&mut self, i: usize, now: Time) -> Result<bool, String> {
        let skipped = self.skipped_sync();
        let joins_untold = self.order.sabotage == Some(Sabotage::JoinUntold);
        let (node, program) = (&mut self.nodes[i], &self.program);
        let mut moved = false;
        let mut at = node.plan.len();
        while at > 0 && !node.left {
            at -= 1;
            let (due, op) = node.plan[at];
            if due > now {
                break;
            }
            match node.may_submit(program, op) {
                Some(false) => continue,
                None => node.skipped[op] = true,
                Some(true) if i == 1 && skipped == Some(op) => node.skipped[op] = true,
                Some(true) if !joins_untold && joins_too_early(node, &program.ops[op], now) => continue,
                Some(true) => {
                    let alone = program.sets[program.ops[op].set].len() == 1;
                    let twice = !alone && self.random.once_in(16);
                    node.submitted[op] = true;
                    submit(node, program, op, twice, now)?;
                    if self.random.once_in(3) {
                        node.engine.as_mut().expect("live").wait_for(OpId(op as u32), now);
                    }
                }
            }
            node.plan.remove(at);
            moved = true;
        }
        Ok(moved)
    }

    /// An operation has ended on a rank.
    fn note(&mut self, i: usize, ended: Ended, now: Time) -> Result<(), String> {
        let node = &mut self.nodes[i];
        let op = ended.op.0 as usize;
        let planned = &self.program.ops[op];
        let words = match &ended.result {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        };
        let mut hash = |bytes: &[u8]| {
            for byte in bytes {
                self.trace = (self.trace ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3);
            }
        };
        hash(&now.0.to_le_bytes());
        hash(&[i as u8, op as u8]);
        hash(words.as_bytes());
        if let Ok(outcome) = &ended.result {
            for tensor in &outcome.tensors {
                hash(tensor.memory.as_ref().map_or(&[], |m| m.as_slice()));
            }
            node.buffers[op].iter().for_each(|buffer| hash(buffer.bytes()));
            match planned.kind {
                Kind::AddSet(set) => node.sets[set] = outcome.set,
                Kind::RemoveSet(set) => node.sets[set] = None,
                _ => {}
            }
        }
        if self.order.verbose {
            println!(
                "  {} ns: rank {i} '{}' {}",
                now.0,
                planned.name,
                if words.is_empty() { "ok" } else { &words }
            );
        }
        let twice = self.order.sabotage == Some(Sabotage::EndsTwice) && i == 1 && op == 1;
        if node.results[op].replace(ended.result).is_some() || twice {
            return Err(format!("operation {op} ended twice on {}", node.rank));
        }
        Ok(())
    }

    fn next_event(&self, now: Time) -> Option<Time> {
        let nodes = self.nodes.iter().filter(|n| n.engine.is_some());
        let own = nodes.flat_map(|n| {
            let resume = n.stopped_until.filter(|t| t.0 != u64::MAX);
            let timer = n.timer.filter(|_| n.stopped_until.is_none());
            let due = n.plan.iter().rev().map(|&(at, _)| at).find(|at| *at > now);
            let submit = due.filter(|_| n.stopped_until.is_none() && !n.left);
            [resume, timer, submit, n.gone_at]
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

    /// Whether a rank must come to an end with everything.
    pub fn is_live(&self, node: &Node) -> bool {
        node.engine.is_some() && node.stopped_until.is_none() && !node.left
    }

    fn is_over(&self) -> bool {
        let pending_fault = self.fault.is_some_and(|(at, _)| at != u64::MAX);
        let paused = self.nodes.iter().any(|n| n.stopped_until.is_some_and(|t| t.0 != u64::MAX));
        let leaving = self.nodes.iter().any(|n| n.left && n.engine.is_some());
        let live = self.nodes.iter().filter(|n| self.is_live(n));
        !pending_fault
            && !paused
            && !leaving
            && live.map(|n| (n, &self.program.ops)).all(|(n, ops)| {
                (0..ops.len()).all(|i| n.results[i].is_some() || n.skipped[i] || !n.takes(&ops[i]))
            })
    }
}

/// A rank's engine, with the planted bug, if it is one of this rank's.
fn engine(mut setup: EngineSetup, fabric: Fabric, sabotage: Option<Sabotage>) -> Engine {
    let me = setup.me.0;
    if sabotage == Some(Sabotage::StaleEpoch) && me == 1 {
        setup.epoch = Epoch(1);
    }
    match sabotage.filter(|bug| bug.is_of_links() && (me == 1 || bug.is_everywhere())) {
        Some(bug) => Engine::new(setup, Box::new(Sabotaged { fabric, bug })),
        None => Engine::new(setup, Box::new(fabric)),
    }
}

/// The sets that a rank has from the start.
fn carried_by(rank: u32, carried: &Sets, sabotage: Option<Sabotage>) -> Vec<(SetId, Vec<Rank>)> {
    let mut list = carried.list.clone();
    if rank == 1 && sabotage == Some(Sabotage::SetsDiffer) {
        list.iter_mut().filter(|(_, ranks)| ranks.len() > 1).for_each(|(_, ranks)| {
            ranks.pop();
        });
    }
    list
}

/// Numbers of hosts in order of first appearance.
fn first_seen(hosts: impl Iterator<Item = u64>) -> Arc<[u32]> {
    let mut seen: Vec<u64> = Vec::new();
    hosts
        .map(|host| {
            let place = seen.iter().position(|&h| h == host).unwrap_or_else(|| {
                seen.push(host);
                seen.len() - 1
            });
            place as u32
        })
        .collect()
}

const _: () = assert!(END_NS > HORIZON_NS);
