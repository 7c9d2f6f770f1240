//! Strict mode: sums of floats with full fractions have the same bits in every run, whatever the order of
//! submission, the transport and the algorithm; and they are the bits of the canonical tree.
#![forbid(unsafe_code)]

use crate::call::{self, Operation, Target, Tensor};
use crate::job::Plan;
use crate::matrix::{ALGORITHMS, hosts};
use crate::oracle::{Element, encode, rough, strict_sum};
use crate::random::{Random, hash};
use crate::{Count, Verdict};
use carole::runtime::{self, Request};
use carole::types::{Collective, DType, ReduceOp};
use clap::Args;
use std::collections::BTreeMap;
use std::time::Duration;

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    /// Runs, each with another order of submission; they go round transports and algorithms.
    #[arg(long, default_value_t = 20)]
    runs: u64,
    /// Numbers of ranks.
    #[arg(long, value_delimiter = ',', default_values_t = [2, 3, 5, 8])]
    ranks: Vec<u32>,
    /// Every transport and algorithm in every run.
    #[arg(long)]
    full: bool,
}

/// What one rank runs.
#[derive(Args, Clone)]
pub struct RankSettings {
    /// Of the order of submission.
    #[arg(long)]
    order: u64,
}

const DTYPES: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];
const ELEMENTS: [u64; 6] = [1, 3, 17, 1000, 4097, 40_000];
const TRANSPORTS: [&str; 2] = ["shm", "tcp"];

pub fn run(settings: &Settings) -> Verdict {
    let mut count = Count::default();
    for &ranks in &settings.ranks {
        let mut first: BTreeMap<String, String> = BTreeMap::new();
        for run in 0..settings.runs {
            for (at, (transport, algorithm)) in pairs().enumerate() {
                if !settings.full && at as u64 != run % pairs().count() as u64 {
                    continue;
                }
                count.passed += one_run(ranks, run, transport, algorithm, &mut first)?;
            }
        }
    }
    println!("strict: {} results with the bits of the canonical tree", count.passed);
    Ok(count)
}

fn pairs() -> impl Iterator<Item = (&'static str, &'static str)> {
    ALGORITHMS.into_iter().flat_map(|algorithm| TRANSPORTS.map(|transport| (transport, algorithm)))
}

/// One job; compares every tensor of every rank with what earlier jobs found.
fn one_run(
    ranks: u32,
    order: u64,
    transport: &str,
    algorithm: &str,
    first: &mut BTreeMap<String, String>,
) -> Result<u64, String> {
    let plan = Plan {
        args: ["strict", "--order"].map(str::to_owned).into_iter().chain([order.to_string()]).collect(),
        size: ranks,
        hosts: hosts(algorithm, transport, ranks),
        places: Vec::new(),
        knobs: vec![
            ("CAROLE_TRANSPORT", transport.to_owned()),
            ("CAROLE_ALGORITHM", algorithm.to_owned()),
            ("CAROLE_DETERMINISTIC", "1".to_owned()),
            // Other batches in other runs.
            ("CAROLE_FUSION_BYTES", ["0", "4096", "64M"][(order % 3) as usize].to_owned()),
        ],
        limit: Duration::from_secs(600),
    };
    let mut results = 0;
    for (rank, lines) in plan.run()?.iter().enumerate() {
        for line in lines {
            let words: Vec<&str> = line.split(' ').collect();
            let &["sum", tensor, hash, "ok"] = words.as_slice() else {
                return Err(format!(
                    "{ranks} ranks, {transport}, {algorithm}, order {order}, rank {rank}: {line}"
                ));
            };
            let known = first.entry(tensor.to_owned()).or_insert_with(|| hash.to_owned());
            if known != hash {
                return Err(format!(
                    "{tensor} has other bits with {transport}, {algorithm}, order {order} on rank {rank} of {ranks}"
                ));
            }
            results += 1;
        }
        if lines.len() != DTYPES.len() * ELEMENTS.len() {
            return Err(format!("rank {rank} of {ranks} reported {} results", lines.len()));
        }
    }
    Ok(results)
}

/// One rank: all tensors at once, in this run's and this rank's order.
pub fn rank(settings: &RankSettings) -> Result<(), String> {
    let fail = |error: carole::error::Error| error.to_string();
    runtime::init(&runtime::Options::default()).map_err(fail)?;
    let world = runtime::world().map_err(fail)?;
    let mut list: Vec<(DType, u64)> =
        DTYPES.into_iter().flat_map(|dtype| ELEMENTS.map(|elements| (dtype, elements))).collect();
    Random::new(&[settings.order, u64::from(world.rank)]).shuffle(&mut list);
    let mut flying = Vec::new();
    for &(dtype, elements) in &list {
        let name = format!("{dtype}.{elements}");
        let request = Request {
            name: Some(&name),
            collective: Collective::Allreduce,
            op: ReduceOp::Sum,
            ..Request::default()
        };
        let input = bytes(dtype, &values(dtype, elements, world.rank));
        let tensor = Tensor { dtype, shape: vec![elements], input, place: Target::InPlace };
        flying.push((
            name.clone(),
            dtype,
            elements,
            Operation::submit(&request, vec![tensor]).map_err(fail)?,
        ));
    }
    for (name, dtype, elements, operation) in flying {
        let got = operation.wait().map_err(fail)?;
        let given: Vec<Vec<f64>> = (0..world.size).map(|rank| values(dtype, elements, rank)).collect();
        let expected: Vec<f64> = (0..elements as usize)
            .map(|i| strict_sum(dtype, &given.iter().map(|values| values[i]).collect::<Vec<_>>()))
            .collect();
        let verdict = if got.outputs[0] == bytes(dtype, &expected) { "ok" } else { "differs-from-the-tree" };
        println!("sum {name} {:016x} {verdict}", hash(&got.outputs[0]));
    }
    call::barrier().map_err(fail)?;
    runtime::shutdown().map_err(fail)
}

fn values(dtype: DType, elements: u64, rank: u32) -> Vec<f64> {
    let mut random = Random::new(&[u64::from(dtype.code()), elements, u64::from(rank)]);
    (0..elements).map(|_| rough(dtype, &mut random)).collect()
}

fn bytes(dtype: DType, values: &[f64]) -> Vec<u8> {
    let mut out = Vec::with_capacity(values.len() * dtype.size());
    for &value in values {
        encode(dtype, Element::Real(value), &mut out);
    }
    out
}
