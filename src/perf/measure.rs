//! One rank's part of a measurement.
#![forbid(unsafe_code)]

use super::calls::{self, Buffers, Memory, Planned};
use super::pattern::{self, Pattern};
use super::report::{self, Heading, Row};
use super::{Settings, start};
use crate::error::Result;
use crate::runtime::{self, Outcome, Request};
use crate::types::{Collective, DType, Rank, ReduceOp};
use std::time::Instant;

/// What can be measured: the collectives that carry data or wait for all, and messages between neighbours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Collective(Collective),
    Sendrecv,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Collective(collective) => collective.name(),
            Kind::Sendrecv => "sendrecv",
        }
    }

    fn reduces(self) -> bool {
        matches!(self, Kind::Collective(collective) if collective.reduces())
    }

    /// Whether these settings make sense; the reason when they do not.
    pub(super) fn accepts(self, settings: &Settings) -> std::result::Result<(), String> {
        if settings.min > settings.max {
            return Err(format!("--min {} is larger than --max {}", settings.min, settings.max));
        }
        if settings.ranks == 0 {
            return Err("a job has at least one rank; give -np 1 or more".to_owned());
        }
        if !start::inside_a_job() && settings.root >= settings.ranks {
            return Err(format!("--root {} is not among {} ranks", settings.root, settings.ranks));
        }
        if self.reduces() {
            settings.op.accepts(settings.dtype)?;
        }
        let whole = [Collective::Allreduce, Collective::Broadcast, Collective::Reduce].map(Kind::Collective);
        if settings.in_place && !whole.contains(&self) {
            return Err(format!("{} cannot run in place: its input and output differ in size", self.name()));
        }
        if settings.persistent && matches!(self, Kind::Sendrecv | Kind::Collective(Collective::Barrier)) {
            return Err(format!("{} is not planned; leave out --persistent", self.name()));
        }
        Ok(())
    }

    /// The share of the size that crosses each rank's link (the factors of nccl-tests).
    fn bus_factor(self, ranks: u32) -> f64 {
        let n = f64::from(ranks);
        match self {
            Kind::Collective(Collective::Allreduce) => 2.0 * (n - 1.0) / n,
            Kind::Collective(
                Collective::Allgather
                | Collective::Reducescatter
                | Collective::Alltoall
                | Collective::Gather
                | Collective::Scatter,
            ) => (n - 1.0) / n,
            _ => 1.0,
        }
    }

    /// Elements that each rank gives, for a size of this many bytes. Where blocks of all ranks make up the
    /// size, it is rounded down to equal blocks.
    fn elements(self, bytes: u64, dtype: DType, ranks: u32) -> u64 {
        let all = bytes / dtype.size() as u64;
        match self {
            Kind::Collective(Collective::Allgather | Collective::Gather) => all / u64::from(ranks),
            Kind::Collective(Collective::Alltoall) => all / u64::from(ranks) * u64::from(ranks),
            _ => all,
        }
    }

    /// Bytes of the size that really is measured, for elements that each rank gives.
    fn bytes(self, elements: u64, dtype: DType, ranks: u32) -> u64 {
        let blocks = match self {
            Kind::Collective(Collective::Allgather | Collective::Gather) => u64::from(ranks),
            _ => 1,
        };
        elements * blocks * dtype.size() as u64
    }
}

/// Measures every size as one rank of a job; rank 0 prints.
pub(super) fn run(kind: Kind, settings: &Settings) -> std::result::Result<(), String> {
    let mut options = runtime::Options::default();
    let forced = [("CAROLE_TRANSPORT", &settings.transport), ("CAROLE_ALGORITHM", &settings.algorithm)];
    for (knob, value) in forced {
        options.knobs.extend(value.iter().map(|value| (knob.to_owned(), value.clone())));
    }
    runtime::init(&options).map_err(|error| error.to_string())?;
    let measured = measure_all(kind, settings);
    let left = runtime::shutdown().map_err(|error| error.to_string());
    let wrong = measured?;
    left?;
    if wrong > 0 { Err(format!("{wrong} elements are wrong")) } else { Ok(()) }
}

fn measure_all(kind: Kind, settings: &Settings) -> std::result::Result<u64, String> {
    let world = runtime::world().map_err(|error| error.to_string())?;
    if settings.root >= world.size {
        return Err(format!("--root {} is not among {} ranks", settings.root, world.size));
    }
    let heading = Heading {
        collective: kind.name(),
        ranks: world.size,
        dtype: settings.dtype.name(),
        op: kind.reduces().then(|| settings.op.name()),
        transport: settings.transport.clone().unwrap_or_else(|| "auto".to_owned()),
        algorithm: settings.algorithm.clone().unwrap_or_else(|| "auto".to_owned()),
        in_place: settings.in_place,
    };
    if world.rank == 0 {
        println!("{}", report::heading(&heading));
    }
    let job = Job::new(kind, settings, world.rank, world.size);
    let mut rows: Vec<Row> = Vec::new();
    for bytes in sizes(kind, settings) {
        let elements = kind.elements(bytes, settings.dtype, world.size);
        if rows.last().is_some_and(|row| row.elements == elements) {
            continue;
        }
        let row = job.measure(elements).map_err(|error| error.to_string())?;
        if world.rank == 0 {
            println!("{}", report::line(&row));
        }
        rows.push(row);
    }
    if let Some(path) = settings.json.as_ref().filter(|_| world.rank == 0) {
        std::fs::write(path, report::json(&heading, &rows))
            .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    }
    Ok(rows.iter().map(|row| row.wrong).sum())
}

/// The sizes to measure; a barrier has only one.
fn sizes(kind: Kind, settings: &Settings) -> Vec<u64> {
    if kind == Kind::Collective(Collective::Barrier) {
        return vec![0];
    }
    let mut sizes = vec![settings.min];
    while let Some(next) = sizes.last().and_then(|last| last.max(&1).checked_mul(settings.factor)) {
        if next > settings.max {
            break;
        }
        sizes.push(next);
    }
    sizes
}

struct Job<'a> {
    kind: Kind,
    settings: &'a Settings,
    rank: u32,
    size: u32,
    /// One period of what each rank gives.
    given: Vec<Vec<u8>>,
    /// One period of the reduction, where there is one.
    reduced: Vec<u8>,
}

impl Job<'_> {
    fn new(kind: Kind, settings: &Settings, rank: u32, size: u32) -> Job<'_> {
        let pattern = Pattern { op: kind.reduces().then_some(settings.op), dtype: settings.dtype, size };
        let given = (0..size).map(|rank| pattern.given(rank)).collect();
        let reduced = if kind.reduces() { pattern.reduced() } else { Vec::new() };
        Job { kind, settings, rank, size, given, reduced }
    }

    fn measure(&self, elements: u64) -> Result<Row> {
        let len = elements as usize * self.settings.dtype.size();
        if self.settings.persistent {
            return self.measure_plan(elements);
        }
        let bytes = self.kind.bytes(elements, self.settings.dtype, self.size);
        let iterations = self.settings.iterations.unwrap_or_else(|| iterations_for(bytes)).max(1);
        let mut input = Memory::zeroed(len, self.settings.shared)?;
        self.fill(&mut input);
        let mut output = Memory::zeroed(if self.has_own_output() { len } else { 0 }, self.settings.shared)?;
        let mut wrong = 0;
        for _ in 0..self.settings.warmup {
            self.call(elements, &mut input, &mut output)?;
            self.restore(&mut input);
        }
        let mut algorithm = None;
        let mut times = Vec::with_capacity(iterations as usize);
        for iteration in 0..iterations {
            let checked = iteration == 0 || iteration + 1 == iterations;
            if checked {
                // What an earlier call left must not pass for this one's result.
                output.fill(0xA5);
            }
            calls::barrier()?;
            let begin = Instant::now();
            let outcome = self.call(elements, &mut input, &mut output)?;
            times.push(begin.elapsed().as_secs_f64() * 1e6);
            // Before anything else runs.
            algorithm = runtime::last_algorithm()?.or(algorithm);
            if checked {
                wrong +=
                    self.wrong(&outcome, if self.settings.in_place { &input } else { &output }, elements);
            }
            self.restore(&mut input);
        }
        let moves =
            self.size > 1 && !matches!(self.kind, Kind::Sendrecv | Kind::Collective(Collective::Barrier));
        let algorithm = algorithm.filter(|_| moves && bytes > 0).unwrap_or("-");
        let transport = self.transport()?;
        self.row(elements, bytes, wrong, &times, algorithm, transport)
    }

    /// The same of an operation that is planned once.
    fn measure_plan(&self, elements: u64) -> Result<Row> {
        let len = elements as usize * self.settings.dtype.size();
        let bytes = self.kind.bytes(elements, self.settings.dtype, self.size);
        let iterations = self.settings.iterations.unwrap_or_else(|| iterations_for(bytes)).max(1);
        let mut input = Memory::zeroed(len, self.settings.shared)?;
        self.fill(&mut input);
        let output = Memory::zeroed(if self.has_own_output() { len } else { 0 }, self.settings.shared)?;
        let Kind::Collective(collective) = self.kind else {
            unreachable!("settings that cannot be persistent are refused")
        };
        let (dtype, in_place) = (self.settings.dtype, self.settings.in_place);
        let mut plan = Planned::new(&self.request(collective), dtype, elements, input, output, in_place)?;
        let (mut wrong, mut times) = (0, Vec::with_capacity(iterations as usize));
        for iteration in 0..self.settings.warmup + iterations {
            let first = self.settings.warmup;
            let checked = iteration == first || iteration + 1 == first + iterations;
            if checked {
                plan.output().fill(0xA5);
            }
            calls::barrier()?;
            let begin = Instant::now();
            plan.run()?;
            let time = begin.elapsed().as_secs_f64() * 1e6;
            times.extend((iteration >= first).then_some(time));
            if checked {
                wrong += self.wrong(&Outcome::default(), plan.result(in_place), elements);
            }
            self.restore(plan.input());
        }
        let transport = self.transport()?;
        self.row(elements, bytes, wrong, &times, "planned", transport)
    }

    /// Whether the caller gives the place of the output: where its size is known beforehand.
    fn has_own_output(&self) -> bool {
        !self.settings.in_place
            && !matches!(
                self.kind,
                Kind::Collective(
                    Collective::Allgather | Collective::Gather | Collective::Alltoall | Collective::Barrier
                )
            )
    }

    fn fill(&self, input: &mut [u8]) {
        pattern::fill(input, &self.given[self.rank as usize], 0, self.settings.dtype);
    }

    /// In place, the input is gone after each call.
    fn restore(&self, input: &mut [u8]) {
        if self.settings.in_place {
            self.fill(input);
        }
    }

    fn call(&self, elements: u64, input: &mut [u8], output: &mut [u8]) -> Result<Outcome> {
        let dtype = self.settings.dtype;
        let collective = match self.kind {
            Kind::Sendrecv => {
                let (to, from) =
                    (Rank((self.rank + 1) % self.size), Rank((self.rank + self.size - 1) % self.size));
                return calls::sendrecv(to, from, dtype, elements, input, output)
                    .map(|()| Outcome::default());
            }
            Kind::Collective(Collective::Barrier) => return calls::barrier().map(|()| Outcome::default()),
            Kind::Collective(collective) => collective,
        };
        let buffers =
            if self.settings.in_place { Buffers::InPlace(input) } else { Buffers::Apart(input, output) };
        calls::run(&self.request(collective), dtype, elements, buffers)
    }

    fn request(&self, collective: Collective) -> Request<'static> {
        Request {
            name: Some("carole-perf"),
            collective,
            op: if collective.reduces() { self.settings.op } else { ReduceOp::Sum },
            root: Rank(if collective.has_root() { self.settings.root } else { 0 }),
            ..Request::default()
        }
    }

    /// How many elements of this rank's result are not what they must be; missing ones count.
    fn wrong(&self, outcome: &Outcome, own: &[u8], elements: u64) -> u64 {
        let dtype = self.settings.dtype;
        let handed = outcome.tensors.first().and_then(|tensor| tensor.memory.as_ref());
        let bytes = handed.map_or(own, |memory| memory.as_slice());
        let root = self.settings.root as usize;
        let (first, mine) = part(elements, self.rank, self.size);
        let blocks: Vec<(&[u8], u64, u64)> = match self.kind {
            Kind::Collective(Collective::Allreduce) => vec![(&self.reduced, 0, elements)],
            Kind::Collective(Collective::Reduce | Collective::Gather) if self.rank as usize != root => vec![],
            Kind::Collective(Collective::Reduce) => vec![(&self.reduced, 0, elements)],
            Kind::Collective(Collective::Broadcast) => vec![(&self.given[root], 0, elements)],
            Kind::Collective(Collective::Reducescatter) => vec![(&self.reduced, first, mine)],
            Kind::Collective(Collective::Scatter) => vec![(&self.given[root], first, mine)],
            Kind::Collective(Collective::Allgather | Collective::Gather) => {
                self.given.iter().map(|given| (&given[..], 0, elements)).collect()
            }
            Kind::Collective(Collective::Alltoall) => {
                self.given.iter().map(|given| (&given[..], first, mine)).collect()
            }
            Kind::Sendrecv => {
                vec![(&self.given[((self.rank + self.size - 1) % self.size) as usize], 0, elements)]
            }
            Kind::Collective(_) => vec![],
        };
        let mut at = 0;
        let mut wrong = 0;
        for (table, first, elements) in blocks {
            let len = elements as usize * dtype.size();
            let end = bytes.len().min(at + len);
            let block = &bytes[at.min(end)..end];
            wrong += (len - block.len()) as u64 / dtype.size() as u64;
            wrong += pattern::wrong(block, table, first, dtype);
            at += len;
        }
        wrong
    }

    /// The kinds of the links that traffic has made, over all ranks.
    fn transport(&self) -> Result<String> {
        const KINDS: [&str; 3] = ["shm", "tcp", "tls"];
        let mut used = [0.0; KINDS.len()];
        for peer in (0..self.size).filter(|&peer| peer != self.rank) {
            let kind = runtime::link_kind(Rank(peer))?;
            for (used, name) in used.iter_mut().zip(KINDS) {
                *used += f64::from(u8::from(kind == Some(name)));
            }
        }
        let used = agree(ReduceOp::Max, &used)?;
        let names: Vec<&str> =
            KINDS.iter().zip(used).filter(|(_, n)| *n > 0.0).map(|(name, _)| *name).collect();
        Ok(if names.is_empty() { "-".to_owned() } else { names.join("+") })
    }

    /// What all ranks found together. Of each call the slowest rank counts.
    fn row(
        &self,
        elements: u64,
        bytes: u64,
        wrong: u64,
        times: &[f64],
        algorithm: &'static str,
        transport: String,
    ) -> Result<Row> {
        let mut slowest = agree(ReduceOp::Max, times)?;
        let wrong = agree(ReduceOp::Sum, &[wrong as f64])?[0] as u64;
        slowest.sort_by(f64::total_cmp);
        let median_us = report::quantile(&slowest, 0.5);
        let algorithm_gbs = bytes as f64 / (median_us * 1e3);
        Ok(Row {
            bytes,
            elements,
            iterations: times.len() as u32,
            median_us,
            p10_us: report::quantile(&slowest, 0.1),
            p90_us: report::quantile(&slowest, 0.9),
            algorithm_gbs,
            bus_gbs: algorithm_gbs * self.kind.bus_factor(self.size),
            wrong,
            algorithm,
            transport,
        })
    }
}

/// The rows of one member when rows are dealt out as reducescatter does: the first, and how many.
fn part(rows: u64, member: u32, size: u32) -> (u64, u64) {
    let (member, size) = (u64::from(member), u64::from(size));
    let (each, more) = (rows / size, rows % size);
    (member * each + member.min(more), each + u64::from(member < more))
}

/// Reduces figures over all ranks.
fn agree(op: ReduceOp, values: &[f64]) -> Result<Vec<f64>> {
    let mut bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    // Each number of figures has a name of its own, so that none looks like a changed shape of another.
    let name = format!("carole-perf.{op}.{}", values.len());
    let request = Request { name: Some(&name), collective: Collective::Allreduce, op, ..Request::default() };
    calls::run(&request, DType::F64, values.len() as u64, Buffers::InPlace(&mut bytes))?;
    Ok(bytes.chunks_exact(8).map(|chunk| f64::from_le_bytes(chunk.try_into().expect("8 bytes"))).collect())
}

/// Enough calls for a steady median, and no more than a few seconds for large sizes.
fn iterations_for(bytes: u64) -> u32 {
    match bytes {
        0..=65_536 => 200,
        65_537..=1_048_576 => 50,
        1_048_577..=16_777_216 => 20,
        _ => 7,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_all_rows_once() {
        for size in 1..9 {
            for rows in 0..40 {
                let mut next = 0;
                for member in 0..size {
                    let (first, count) = part(rows, member, size);
                    assert_eq!(first, next);
                    next += count;
                }
                assert_eq!(next, rows);
            }
        }
    }

    #[test]
    fn bus_factors_are_those_of_nccl_tests() {
        assert_eq!(Kind::Collective(Collective::Allreduce).bus_factor(4), 1.5);
        assert_eq!(Kind::Collective(Collective::Allgather).bus_factor(4), 0.75);
        assert_eq!(Kind::Collective(Collective::Broadcast).bus_factor(4), 1.0);
        assert_eq!(Kind::Collective(Collective::Allreduce).bus_factor(1), 0.0);
    }
}
