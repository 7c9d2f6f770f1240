//! The price of a schedule: how long it would take on wires of known speed. Small sizes are simulated step by
//! step; large ones are priced from the steps and bytes that each algorithm's row states.
//!
//! All members must come to the same price, so nothing here is measured and nothing depends on `me`. Sums and products
//! of f64 are the same on all machines; logarithms are not and are not used.
#![forbid(unsafe_code)]

use crate::algorithm::{Algorithm, Leg, Query};
use crate::schedule::{Schedule, Verb};
use crate::types::Collective;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// What one message over a kind of wire costs.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Wire {
    /// From the first byte leaving to the first byte arriving, with the wake of the receiver.
    pub latency_ns: f64,
    /// Per byte.
    pub ns_per_byte: f64,
    /// Work of the processor at each end for one message: system calls, the grant of a large one.
    pub message_ns: f64,
    /// Work of the processor at each end for each byte: TCP copies into the kernel and out of it. 0 where
    /// `ns_per_byte` is that very work.
    pub copy_ns_per_byte: f64,
}

impl Wire {
    /// Shared memory at 10 GB/s.
    pub const SHARED_MEMORY: Wire =
        Wire { latency_ns: 1_000.0, ns_per_byte: 0.1, message_ns: 300.0, copy_ns_per_byte: 0.0 };
    /// TCP within a host: no wire, but two copies.
    pub const LOOPBACK: Wire = Wire {
        latency_ns: 15_000.0,
        ns_per_byte: 0.05,
        message_ns: TCP_MESSAGE_NS,
        copy_ns_per_byte: TCP_COPY_NS_PER_BYTE,
    };

    /// MPI within a host: the receiver's MPI copies out of the sender's memory.
    pub const MPI_ON_HOST: Wire =
        Wire { latency_ns: 3_000.0, ns_per_byte: 0.15, message_ns: 1_500.0, copy_ns_per_byte: 0.1 };

    /// TCP over a network that carries `gbits` Gbit/s in each direction, with this latency.
    #[must_use]
    pub const fn network(gbits: f64, latency_us: f64) -> Wire {
        Wire {
            latency_ns: latency_us * 1e3,
            ns_per_byte: 8.0 / gbits,
            message_ns: TCP_MESSAGE_NS,
            copy_ns_per_byte: TCP_COPY_NS_PER_BYTE,
        }
    }

    /// Per byte of one message alone on the wire: copies overlap with the wire, the slower sets the pace.
    fn pace_ns_per_byte(&self) -> f64 {
        self.ns_per_byte.max(self.copy_ns_per_byte)
    }
}

/// Calls of the kernel for one message with its grant, at one end; from a grid of sizes, ranks and hosts
/// (`ci shaped`), where half of it made many small messages look better than they were.
const TCP_MESSAGE_NS: f64 = 8_000.0;
/// Of a byte between a process and the kernel, measured over loopback with both directions busy.
const TCP_COPY_NS_PER_BYTE: f64 = 0.2;
/// Windows of a batch that are at work at the same time: as many as the engine starts.
const WINDOWS_IN_FLIGHT: f64 = 4.0;

/// What everything costs. Agreed when the epoch starts: members with different prices would choose apart.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Prices {
    /// Between two members of one host.
    pub same_host: Wire,
    /// Between two hosts; the members of a host share one port.
    pub between_hosts: Wire,
    /// Per byte of an operand that is reduced.
    pub reduce_ns_per_byte: f64,
}

impl Default for Prices {
    /// Shared memory at 10 GB/s, a 10 Gbit/s network, and one core that reduces 20 GB/s.
    fn default() -> Prices {
        Prices {
            same_host: Wire::SHARED_MEMORY,
            between_hosts: Wire::network(10.0, 25.0),
            reduce_ns_per_byte: 0.05,
        }
    }
}

/// Up to this many members all schedules are built and simulated; that takes less than a millisecond.
pub const SIMULATED_SIZE_MAX: u32 = 8;

/// How long this algorithm would take on this query, cut into `windows`.
#[must_use]
pub fn predict_ns(query: &Query, algorithm: &Algorithm, windows: u32, prices: &Prices) -> u64 {
    if query.size() <= SIMULATED_SIZE_MAX {
        simulate_ns(query, algorithm, windows, prices)
    } else {
        estimate_ns(query, algorithm, windows, prices)
    }
}

/// From a simulation of all members' steps.
#[must_use]
pub fn simulate_ns(query: &Query, algorithm: &Algorithm, windows: u32, prices: &Prices) -> u64 {
    let all: Vec<Schedule> = (0..query.size()).map(|me| algorithm.schedule(me, query)).collect();
    let parts = match query.collective {
        // The bytes of an alltoall are those of all members' inputs, each cut into one chunk per member.
        Collective::Alltoall => f64::from(query.size()) * f64::from(query.size()),
        _ => f64::from(all[0].chunks),
    };
    let chunk_bytes = query.bytes as f64 / f64::from(windows) / parts;
    let (path, busiest) = Simulation::new(&all, query, prices, chunk_bytes).run();
    path + pipelined(path as f64, busiest as f64, windows)
}

/// From the algorithm's own statement of steps and bytes.
#[must_use]
pub fn estimate_ns(query: &Query, algorithm: &Algorithm, windows: u32, prices: &Prices) -> u64 {
    let load = (algorithm.load)(query);
    let w = f64::from(windows);
    let path =
        |leg: Leg, wire: Wire| leg.steps * wire.latency_ns + leg.path_bytes / w * wire.pace_ns_per_byte();
    let port = |leg: Leg, wire: Wire| leg.port_bytes / w * wire.ns_per_byte;
    // How the messages are divided between near and far is not stated; the steps tell roughly.
    let steps = (load.near.steps + load.far.steps).max(1.0);
    let message_ns = (load.near.steps * prices.same_host.message_ns
        + load.far.steps * prices.between_hosts.message_ns)
        / steps;
    let messages = 2.0 * load.messages * message_ns;
    // Out and in. The members of a host share its port, but each copies its own bytes.
    let local = f64::from(query.size()) / query.members_by_host().len().max(1) as f64;
    let copies = 2.0 / w
        * (load.near.port_bytes * prices.same_host.copy_ns_per_byte
            + load.far.port_bytes / local * prices.between_hosts.copy_ns_per_byte);
    let one = path(load.near, prices.same_host)
        + path(load.far, prices.between_hosts)
        + load.path_reduced / w * prices.reduce_ns_per_byte
        + messages;
    let each = port(load.near, prices.same_host)
        .max(port(load.far, prices.between_hosts))
        .max(load.port_reduced / w * prices.reduce_ns_per_byte + messages + copies);
    round_up(one) + pipelined(one, each, windows)
}

/// What all windows but the first add: the busiest port serves them one after another, and only so many are at
/// work at the same time.
fn pipelined(path: f64, busiest: f64, windows: u32) -> u64 {
    round_up(f64::from(windows - 1) * busiest.max(path / WINDOWS_IN_FLIGHT))
}

fn round_up(ns: f64) -> u64 {
    ns.ceil() as u64
}

/// Something that serves one thing at a time.
#[derive(Clone, Copy, Default)]
struct Port {
    free_at: u64,
    busy: u64,
}

impl Port {
    /// Serves for `ns`, from `at` or as soon as it is free. Returns the start.
    fn serve(&mut self, at: u64, ns: u64) -> u64 {
        let start = at.max(self.free_at);
        self.free_at = start + ns;
        self.busy += ns;
        start
    }
}

#[derive(Default)]
struct Ports {
    cpu: Vec<Port>,
    near_out: Vec<Port>,
    near_in: Vec<Port>,
    far_out: Vec<Port>,
    far_in: Vec<Port>,
}

/// A schedule in simulated time: ports serve one message at a time, latencies overlap.
struct Simulation<'a> {
    all: &'a [Schedule],
    query: &'a Query,
    prices: &'a Prices,
    chunk_bytes: f64,
    ports: Ports,
    waits: Vec<Vec<u32>>,
    ready_at: Vec<Vec<u64>>,
    dependents: Vec<Vec<Vec<u32>>>,
    /// The receive that meets each send: both sides of a wire are in program order.
    partner: Vec<Vec<u32>>,
    events: BinaryHeap<Reverse<(u64, u32, u32)>>,
    end: u64,
}

impl<'a> Simulation<'a> {
    fn new(all: &'a [Schedule], query: &'a Query, prices: &'a Prices, chunk_bytes: f64) -> Simulation<'a> {
        let p = all.len();
        let hosts = query.hosts.iter().max().map_or(1, |h| *h as usize + 1);
        let each = |n: usize| vec![Port::default(); n];
        let ports = Ports {
            cpu: each(p),
            near_out: each(p),
            near_in: each(p),
            far_out: each(hosts),
            far_in: each(hosts),
        };
        let mut simulation = Simulation {
            all,
            query,
            prices,
            chunk_bytes,
            ports,
            waits: all.iter().map(|s| vec![0; s.steps.len()]).collect(),
            ready_at: all.iter().map(|s| vec![0; s.steps.len()]).collect(),
            dependents: all.iter().map(|s| vec![vec![]; s.steps.len()]).collect(),
            partner: all.iter().map(|s| vec![u32::MAX; s.steps.len()]).collect(),
            events: BinaryHeap::new(),
            end: 0,
        };
        simulation.connect();
        simulation
    }

    /// Fills in who waits for whom: dependencies, the step before on the same wire, and for a receive its send.
    fn connect(&mut self) {
        let p = self.all.len();
        let mut sends: Vec<Vec<u32>> = vec![vec![]; p * p];
        let mut recvs: Vec<Vec<u32>> = vec![vec![]; p * p];
        for (m, schedule) in self.all.iter().enumerate() {
            for (i, step) in schedule.steps.iter().enumerate() {
                for &before in schedule.after(i) {
                    self.wait(m, i as u32, before);
                }
                let line = match &step.verb {
                    Verb::Send { to, .. } => &mut sends[m * p + *to as usize],
                    Verb::Recv { from, .. } | Verb::RecvReduce { from, .. } => {
                        self.waits[m][i] += 1;
                        &mut recvs[*from as usize * p + m]
                    }
                    _ => continue,
                };
                line.push(i as u32);
                if let [.., before, _] = line[..] {
                    self.wait(m, i as u32, before);
                }
            }
        }
        for (wire, (sends, recvs)) in sends.iter().zip(&recvs).enumerate() {
            assert!(sends.len() == recvs.len(), "every message is sent and received");
            for (&send, &recv) in sends.iter().zip(recvs) {
                self.partner[wire / p][send as usize] = recv;
            }
        }
    }
    fn wait(&mut self, member: usize, step: u32, before: u32) {
        self.dependents[member][before as usize].push(step);
        self.waits[member][step as usize] += 1;
    }

    /// The end of the last step, and how long the busiest port is busy.
    fn run(mut self) -> (u64, u64) {
        for m in 0..self.all.len() {
            for i in 0..self.waits[m].len() {
                if self.waits[m][i] == 0 {
                    self.events.push(Reverse((0, m as u32, i as u32)));
                }
            }
        }
        while let Some(Reverse((at, member, step))) = self.events.pop() {
            let end = self.step(at, member as usize, step as usize);
            self.end = self.end.max(end);
            for next in std::mem::take(&mut self.dependents[member as usize][step as usize]) {
                self.release(member as usize, next, end);
            }
        }
        let ports = &self.ports;
        let every = [&ports.cpu, &ports.near_out, &ports.near_in, &ports.far_out, &ports.far_in];
        let busiest = every.into_iter().flatten().map(|port| port.busy).max().unwrap_or(0);
        (self.end, busiest)
    }

    fn release(&mut self, member: usize, step: u32, at: u64) {
        let i = step as usize;
        self.ready_at[member][i] = self.ready_at[member][i].max(at);
        self.waits[member][i] -= 1;
        if self.waits[member][i] == 0 {
            self.events.push(Reverse((self.ready_at[member][i], member as u32, step)));
        }
    }

    /// Carries out a step and returns when it is complete. Copies and scales are left out: they are much the same
    /// whatever the algorithm, and mostly nothing is to be done.
    fn step(&mut self, at: u64, member: usize, step: usize) -> u64 {
        let all = self.all;
        let reduce = self.prices.reduce_ns_per_byte;
        let bytes = |chunks: u32| f64::from(chunks) * self.chunk_bytes;
        let work = match &all[member].steps[step].verb {
            Verb::Send { to, src } => return self.send(at, member, step, *to as usize, bytes(src.count())),
            Verb::Recv { from, dst } => self.receive(member, *from as usize, bytes(dst.count())),
            Verb::RecvReduce { from, dst, .. } => {
                let bytes = bytes(dst.count());
                self.receive(member, *from as usize, bytes) + bytes * reduce
            }
            Verb::Reduce { dst, .. } => bytes(dst.count()) * reduce,
            Verb::ReduceMany { dst, srcs } => bytes(dst.count()) * reduce * (srcs.len() - 1) as f64,
            // Once for the dot products, once for the sum.
            Verb::Combine { dst, .. } => 2.0 * bytes(dst.count()) * reduce,
            Verb::Copy { .. } | Verb::Prepare { .. } | Verb::Finish { .. } => 0.0,
        };
        let work = round_up(work);
        self.ports.cpu[member].serve(at, work) + work
    }

    fn wire(&self, a: usize, b: usize) -> (bool, Wire) {
        let near = self.query.hosts[a] == self.query.hosts[b];
        (near, if near { self.prices.same_host } else { self.prices.between_hosts })
    }

    /// Work that is left when the last byte has arrived. The copies before it are done meanwhile: they keep the
    /// processor busy, but nobody waits for them.
    fn receive(&mut self, member: usize, from: usize, bytes: f64) -> f64 {
        let (_, wire) = self.wire(member, from);
        self.ports.cpu[member].busy += round_up(bytes * wire.copy_ns_per_byte.min(wire.ns_per_byte));
        wire.message_ns + bytes * (wire.pace_ns_per_byte() - wire.ns_per_byte)
    }

    fn send(&mut self, at: u64, member: usize, step: usize, to: usize, bytes: f64) -> u64 {
        let (near, wire) = self.wire(member, to);
        let (mine, theirs) = (self.query.hosts[member], self.query.hosts[to]);
        let message = round_up(wire.message_ns);
        let moving = round_up(bytes * wire.ns_per_byte);
        let ports = &mut self.ports;
        let (out, into) = match near {
            true => (&mut ports.near_out[member], &mut ports.near_in[to]),
            false => (&mut ports.far_out[mine as usize], &mut ports.far_in[theirs as usize]),
        };
        let copying = round_up(bytes * wire.copy_ns_per_byte);
        // The first bytes leave while the others are copied.
        let posted = ports.cpu[member].serve(at, message + copying) + message;
        let left = out.serve(posted, moving).max(posted + copying.saturating_sub(moving));
        let arrived = into.serve(left + round_up(wire.latency_ns), moving) + moving;
        let recv = self.partner[member][step];
        self.release(to, recv, arrived);
        left + moving
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithm::{TABLE, find};
    use crate::types::{DType, ReduceOp};

    fn query(row: &Algorithm, hosts: Vec<u32>, bytes: u64) -> Query {
        let op = if row.name == "adasum" { ReduceOp::Adasum } else { ReduceOp::Sum };
        Query {
            collective: row.collective,
            op,
            dtype: DType::F32,
            bytes,
            hosts: hosts.into(),
            root: 0,
            prescaled: false,
            strict: false,
        }
    }

    #[test]
    fn formula_and_simulation_agree_within_a_factor_of_three() {
        let shapes: [fn(u32) -> u32; 4] = [|_| 0, |m| m, |m| m / 2, |m| m / 4];
        let mut wrong = vec![];
        for row in TABLE {
            for size in [2, 3, 4, 6, 8, 12, 16, 33, 64] {
                for (shape, host) in shapes.iter().enumerate() {
                    for bytes in [64, 64 << 10, 64 << 20] {
                        // As select cuts: small buffers go whole.
                        let cuts = row.windows && bytes > 16 << 20;
                        for windows in if cuts { vec![1, 16] } else { vec![1] } {
                            let q = query(row, (0..size).map(host).collect(), bytes);
                            if (row.fits)(&q).is_err() {
                                continue;
                            }
                            let exact = simulate_ns(&q, row, windows, &Prices::default()) as f64;
                            let rough = estimate_ns(&q, row, windows, &Prices::default()) as f64;
                            if !(1.0 / 3.0..3.0).contains(&(rough / exact)) {
                                wrong.push(format!(
                                    "{row:?} size {size} shape {shape} bytes {bytes} windows {windows}: {rough} for {exact}"
                                ));
                            }
                        }
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "{} prices are off:\n{}", wrong.len(), wrong.join("\n"));
    }

    #[test]
    fn a_ring_costs_what_the_paper_says() {
        // 4 members, latency only: 6 steps of one latency and two message costs each.
        let row = find("ring", Collective::Allreduce).expect("a row");
        let free = Wire { latency_ns: 1000.0, ns_per_byte: 0.0, message_ns: 0.0, copy_ns_per_byte: 0.0 };
        let prices = Prices { same_host: free, between_hosts: free, reduce_ns_per_byte: 0.0 };
        assert_eq!(simulate_ns(&query(row, vec![0; 4], 1 << 20), row, 1, &prices), 6000);
        // Bandwidth only: 2 n 3/4.
        let wire = Wire { latency_ns: 0.0, ns_per_byte: 1.0, ..free };
        let prices = Prices { same_host: wire, ..prices };
        assert_eq!(simulate_ns(&query(row, vec![0; 4], 1 << 20), row, 1, &prices), (1 << 20) * 3 / 2);
    }

    #[test]
    fn one_member_costs_nothing() {
        for row in TABLE {
            let q = query(row, vec![0], 1 << 20);
            if (row.fits)(&q).is_ok() {
                assert_eq!(predict_ns(&q, row, 1, &Prices::default()), 0, "{row:?}");
                assert_eq!(estimate_ns(&q, row, 1, &Prices::default()), 0, "{row:?}");
            }
        }
    }
}
