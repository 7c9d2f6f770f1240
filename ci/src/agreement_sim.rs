//! Figures of agreement: whole coordinators of 2 to 4096 ranks in one thread and virtual time, for a step of
//! cached tensors that every rank submits at once and then waits for.
//!
//! Shown for each number of ranks: the virtual time until the last rank knows the cut, and the messages and
//! bytes that the busiest rank and rank 0 send and receive in that step.
#![forbid(unsafe_code)]

use carole::coordinator::{Coordinator, Intent, OpId, Rules, Setup, Submission};
use carole::types::{
    Collective, DType, JoinAverage, Member, Place, Rank, ReduceOp, Scale, SetId, Signature, TensorSignature,
    Time,
};
use carole::wire::Message;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

/// What is simulated.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The largest number of ranks; the table doubles from 2.
    #[arg(long, default_value_t = 4096)]
    pub ranks_max: u32,
    /// Ranks on each host.
    #[arg(long, default_value_t = 8)]
    pub ranks_per_host: u32,
    /// Tensors in a step.
    #[arg(long, default_value_t = 1000)]
    pub tensors: u32,
    /// Latency within a host, in nanoseconds.
    #[arg(long, default_value_t = 1_000)]
    pub host_ns: u64,
    /// Latency between hosts, in nanoseconds.
    #[arg(long, default_value_t = 20_000)]
    pub network_ns: u64,
    /// Time that sending or receiving one message takes a rank, in nanoseconds, one after the other.
    #[arg(long, default_value_t = 500)]
    pub message_ns: u64,
    /// Nanoseconds that a byte takes on a link between hosts (0.08 is 100 Gbit/s).
    #[arg(long, default_value_t = 0.08)]
    pub byte_ns: f64,
    /// Submit in a different order on each rank.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub shuffle: bool,
}

/// Runs all sizes and prints the table. An error when a rank did not get all tensors, or another order.
pub fn run(args: &Args) -> Result<(), String> {
    println!(
        "A cached step of {} tensors, {} ranks a host, {} ns within and {} ns between hosts, {} ns a message:",
        args.tensors, args.ranks_per_host, args.host_ns, args.network_ns, args.message_ns
    );
    println!(
        "ranks  hosts  first step us  cached step us  messages/rank max  rank 0  bytes/rank max  rank 0"
    );
    let mut ranks = 2;
    while ranks <= args.ranks_max {
        let mut simulation = Simulation::new(args, ranks);
        let first = simulation.step(args, 1)?;
        let cached = simulation.step(args, 2)?;
        let load = |of: fn(&Load) -> u64| {
            let max = simulation.loads.iter().map(of).max().unwrap_or(0);
            (max, of(&simulation.loads[0]))
        };
        let (messages, messages_0) = load(|load| load.sent + load.received);
        let (bytes, bytes_0) = load(|load| load.bytes);
        println!(
            "{ranks:5} {:6} {:14.1} {:15.1} {messages:18} {messages_0:7} {bytes:15} {bytes_0:7}",
            ranks.div_ceil(args.ranks_per_host),
            first as f64 / 1e3,
            cached as f64 / 1e3,
        );
        ranks *= 2;
    }
    Ok(())
}

#[derive(Clone, Default)]
struct Load {
    sent: u64,
    received: u64,
    bytes: u64,
    busy_until: u64,
}

/// What a rank was told to run.
#[derive(Clone, Default, PartialEq)]
struct Ran {
    count: usize,
    order: u64,
}

/// A message under way: when it arrives, a number that keeps ties in order, from, to, bytes.
type Flight = Reverse<(u64, u64, u32, u32, Vec<u8>)>;

struct Simulation {
    ranks: u32,
    ranks_per_host: u32,
    nodes: Vec<Coordinator>,
    loads: Vec<Load>,
    flights: BinaryHeap<Flight>,
    number: u64,
    now: u64,
    names: Vec<String>,
    signature: Signature,
}

impl Simulation {
    fn new(args: &Args, ranks: u32) -> Simulation {
        let numbers: Arc<[Rank]> = (0..ranks).map(Rank).collect();
        let hosts: Arc<[u32]> = (0..ranks).map(|rank| rank / args.ranks_per_host).collect();
        let node = |me| {
            Coordinator::new(Setup {
                set: SetId(0),
                me: Member(me),
                ranks: numbers.clone(),
                hosts: hosts.clone(),
                rules: Rules::default(),
            })
        };
        Simulation {
            ranks,
            ranks_per_host: args.ranks_per_host,
            nodes: (0..ranks).map(node).collect(),
            loads: vec![Load::default(); ranks as usize],
            flights: BinaryHeap::new(),
            number: 0,
            now: 0,
            names: (0..args.tensors).map(|i| format!("model.layer.{i}.weight")).collect(),
            signature: Signature {
                collective: Collective::Allreduce,
                op: ReduceOp::Average,
                scale: Scale::default(),
                root: Rank(0),
                place: Place::Host,
                join_average: JoinAverage::Size,
                tensors: vec![TensorSignature { dtype: DType::F32, shape: vec![64] }],
                ranks: Vec::new(),
            },
        }
    }

    /// One step of all ranks; the virtual time until the last has its cut.
    fn step(&mut self, args: &Args, number: u64) -> Result<u64, String> {
        self.loads.fill(Load { busy_until: self.now, ..Load::default() });
        let start = self.now;
        let mut order: Vec<usize> = (0..self.names.len()).collect();
        let mut random = number;
        let mut ran = vec![Ran::default(); self.ranks as usize];
        for rank in 0..self.ranks {
            if args.shuffle {
                for i in (1..order.len()).rev() {
                    // xorshift: any order will do, and the same one in each run.
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    order.swap(i, (random % (i as u64 + 1)) as usize);
                }
            }
            let node = &mut self.nodes[rank as usize];
            for &i in &order {
                let submission = Submission {
                    op: OpId(i as u32),
                    name: &self.names[i],
                    hold_if_busy: false,
                    signature: &self.signature,
                    call: &[],
                    refused: None,
                };
                node.submit(submission, Time(self.now)).map_err(|error| format!("rank {rank}: {error}"))?;
            }
            node.wait_for(OpId(order[0] as u32), Time(self.now));
            self.drain(args, rank, &mut ran);
        }
        while let Some(Reverse((at, _, from, to, bytes))) = self.flights.pop() {
            let load = &mut self.loads[to as usize];
            load.busy_until = load.busy_until.max(at) + args.message_ns;
            load.received += 1;
            load.bytes += bytes.len() as u64;
            self.now = self.now.max(load.busy_until);
            let now = Time(load.busy_until);
            let Ok(Message::Coordination { body, .. }) = Message::decode(&bytes) else {
                return Err("a message that does not decode".into());
            };
            let taken = self.nodes[to as usize].receive(Member(from), body, now);
            taken.map_err(|cause| format!("rank {from} {cause}"))?;
            self.drain(args, to, &mut ran);
        }
        if ran.iter().any(|one| one.count != self.names.len() || *one != ran[0]) {
            return Err(format!("{} ranks did not agree on one order of all tensors", self.ranks));
        }
        Ok(self.now - start)
    }

    fn drain(&mut self, args: &Args, rank: u32, ran: &mut [Ran]) {
        while let Some(intent) = self.nodes[rank as usize].poll() {
            match intent {
                Intent::Tell { to, message } => {
                    let near = rank / self.ranks_per_host == to.0 / self.ranks_per_host;
                    let load = &mut self.loads[rank as usize];
                    load.busy_until += args.message_ns;
                    load.sent += 1;
                    load.bytes += message.len() as u64;
                    let wire_ns = if near { 0.0 } else { message.len() as f64 * args.byte_ns };
                    let latency = if near { args.host_ns } else { args.network_ns };
                    let at = load.busy_until + latency + wire_ns as u64;
                    self.number += 1;
                    self.flights.push(Reverse((at, self.number, rank, to.0, message)));
                }
                Intent::Run(cut) => {
                    let ran = &mut ran[rank as usize];
                    ran.count += cut.len();
                    for agreed in &cut {
                        // FNV-1a over the keys: two ranks that ran them in another order differ.
                        ran.order = (ran.order ^ u64::from(agreed.key.0)).wrapping_mul(0x0000_0100_0000_01b3);
                    }
                    self.nodes[rank as usize].recycle_cut(cut);
                }
                other => println!("rank {rank}: unexpected {other:?}"),
            }
        }
    }
}
