//! The decoders on the committed corpus (`ci/fuzz/seeds`, one input a line, in hexadecimal) and on random changes of
//! it, without a fuzzer. `ci fuzz` begins with the same inputs and adds those that have reached something new.
#![forbid(unsafe_code)]

use crate::install_c::repository;
use crate::random::Random;
use crate::{Count, Verdict};
use carole::coordinator::{Coordinator, Intent, OpId, Rules, Setup, Submission};
use carole::error::{Broken, Cause};
use carole::types::{
    Collective, DType, Epoch, JoinAverage, Member, Place, Rank, ReduceOp, Scale, SetId, Signature,
    TensorSignature, Time,
};
use carole::wire::agreement::HEADER_BYTES;
use carole::wire::signature::put_signature;
use carole::wire::{ENVELOPE_BYTES, Message};
use clap::Args;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

#[path = "../fuzz/targets.rs"]
mod targets;

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    /// Changes of each input.
    #[arg(long, default_value_t = 300)]
    changes: u64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Adds what coordinators say to each other in some steps to the corpus.
    #[arg(long)]
    record: bool,
}

/// Longer inputs, and more of them, are not kept.
const INPUT_BYTES_MAX: usize = 400;
const INPUTS_MAX: usize = 500;

type Target = (&'static str, fn(&[u8]));

const TARGETS: [Target; 4] = [
    ("agreement", targets::agreement),
    ("coordinator", targets::coordinator),
    ("message", targets::message),
    ("signature", targets::signature),
];

pub fn run(settings: &Settings) -> Verdict {
    if settings.record {
        record()?;
    }
    let mut count = Count::default();
    let mut inputs = 0;
    for (name, target) in TARGETS {
        let corpus = seeds(name)?;
        inputs += corpus.len();
        let mut random = Random::new(&[settings.seed, corpus.len() as u64]);
        for input in &corpus {
            for change in 0..=settings.changes {
                let mut bytes = input.clone();
                if change > 0 {
                    alter(&mut bytes, &corpus, &mut random);
                }
                catch_unwind(|| target(&bytes))
                    .map_err(|_| format!("{name}: the input {} is not taken well", hex(&bytes)))?;
                count.passed += 1;
            }
        }
    }
    println!(
        "decoders: {} inputs of {inputs} in the corpus and changes of them; none is taken ill",
        count.passed
    );
    Ok(count)
}

/// One to four changes: a bit, a byte, a cut, a piece of another input.
fn alter(bytes: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut Random) {
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() as u64 + 1) as usize;
        match random.below(5) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.next() as u8,
            2 => bytes.truncate(at),
            3 => bytes.insert(at, [0, 1, 0x7F, 0x80, 0xFF][random.below(5) as usize]),
            _ => {
                let other = &corpus[random.below(corpus.len() as u64) as usize];
                let from = random.below(other.len() as u64 + 1) as usize;
                bytes.splice(at.min(bytes.len()).., other[from..].iter().copied());
            }
        }
    }
}

fn path(target: &str) -> PathBuf {
    repository().join("ci/fuzz/seeds").join(format!("{target}.hex"))
}

/// The inputs of a target.
pub fn seeds(target: &str) -> Result<Vec<Vec<u8>>, String> {
    let path = path(target);
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let byte = |line: &str, at: usize| line.get(at..at + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
    let input = |line: &str| (0..line.len()).step_by(2).map(|at| byte(line, at)).collect::<Option<Vec<u8>>>();
    text.lines().map(|line| input(line).ok_or_else(|| format!("{}: {line}", path.display()))).collect()
}

/// Keeps the inputs of a folder.
pub fn keep(target: &str, folder: &Path) -> Result<usize, String> {
    let entries = std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    write(target, entries.flatten().filter_map(|entry| std::fs::read(entry.path()).ok()).collect())
}

/// Writes the corpus of a target, the shortest inputs first.
fn write(target: &str, mut inputs: Vec<Vec<u8>>) -> Result<usize, String> {
    inputs.retain(|input| input.len() <= INPUT_BYTES_MAX);
    inputs.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
    inputs.dedup();
    inputs.truncate(INPUTS_MAX);
    let text: String = inputs.iter().map(|input| hex(input) + "\n").collect();
    let path = path(target);
    std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(inputs.len())
}

/// Members of a set over three hosts, some of which refuse or disagree now and then, with a tiny cache: the messages
/// of their agreement, the items in them, and what one of them hears.
fn record() -> Result<(), String> {
    let (mut agreement, mut coordinator, mut message, mut signature) =
        (seeds("agreement")?, seeds("coordinator")?, seeds("message")?, seeds("signature")?);
    let hosts: std::sync::Arc<[u32]> = [0, 0, 0, 1, 1, 2].into();
    let setup = |me| Setup {
        set: SetId(3),
        me: Member(me),
        ranks: (0..6).map(Rank).collect(),
        hosts: hosts.clone(),
        rules: Rules { cache_keys: 2, stall_warn_ns: 1_000_000, ..Rules::default() },
    };
    let mut nodes: Vec<Coordinator> = (0..6).map(|me| Coordinator::new(setup(me))).collect();
    let mut heard = vec![3u8];
    let mut now = Time(0);
    for step in 0..60u32 {
        for (me, node) in nodes.iter_mut().enumerate() {
            signature.push(submit(node, step, me, now));
        }
        for _ in 0..40 {
            now = now.after_ns(100_000);
            for (from, to, envelope) in turn(&mut nodes, now) {
                let body = &envelope[ENVELOPE_BYTES..];
                agreement.extend([body.to_vec(), body[HEADER_BYTES..].to_vec()]);
                if to == Member(3) && body.len() < 256 {
                    heard.extend([from as u8, body.len() as u8]);
                    heard.extend_from_slice(body);
                    coordinator.push(heard.clone());
                }
                nodes[to.0 as usize]
                    .receive(Member(from), body, now)
                    .map_err(|cause| format!("{cause:?}"))?;
                message.push(envelope);
            }
        }
        if heard.len() > INPUT_BYTES_MAX {
            heard.truncate(1);
        }
    }
    message.extend(other_messages());
    for (target, inputs) in [
        ("agreement", agreement),
        ("coordinator", coordinator),
        ("message", message),
        ("signature", signature),
    ] {
        println!("decoders: {} inputs of {target} are kept", write(target, inputs)?);
    }
    Ok(())
}

/// A member submits what it has for a step; the bytes of its signature.
fn submit(node: &mut Coordinator, step: u32, me: usize, now: Time) -> Vec<u8> {
    let it = signature_of(step, me);
    let submission = Submission {
        op: OpId(step),
        name: ["a", "b", "c", "d"][step as usize % 4],
        hold_if_busy: true,
        signature: &it,
        call: if it.collective == Collective::Allgather { &[7] } else { &[] },
        refused: (step % 17 == 9 && me == 4).then_some("read-only"),
    };
    // Who has joined submits nothing.
    let _ = node.submit(submission, now);
    let mut bytes = Vec::new();
    put_signature(&mut bytes, &it);
    bytes
}

/// What all say at this time.
fn turn(nodes: &mut [Coordinator], now: Time) -> Vec<(u32, Member, Vec<u8>)> {
    let mut told = Vec::new();
    for (me, node) in nodes.iter_mut().enumerate() {
        node.handle_timeout(now);
        while let Some(intent) = node.poll() {
            match intent {
                Intent::Tell { to, message } => told.push((me as u32, to, message)),
                Intent::Run(cut) => node.recycle_cut(cut),
                _ => {}
            }
        }
    }
    told
}

/// Messages that are not of a coordinator.
fn other_messages() -> Vec<Vec<u8>> {
    let broken = |cause| Broken { epoch: Epoch(3), culprit: Some(Rank(1)), cause };
    let marks = vec![(SetId(0), 700), (SetId(4), 1)];
    let all = [
        Message::Heartbeat,
        Message::Goodbye { who: Rank(2), clean: true, sent: 3 },
        Message::Closed { set: SetId(0), who: Rank(2) },
        Message::Mark { set: SetId(0), mark: 300 },
        Message::Abort(broken(Cause::Exited)),
        Message::Abort(broken(Cause::Stalled { tensor: "grad/1".into(), missing: vec![Rank(0), Rank(300)] })),
        Message::Abort(broken(Cause::Corrupted("payload".into()))),
        Message::Ballot { verdict: true, broken: broken(Cause::Silent { for_ms: 3000 }), marks },
    ];
    let encoded = all.iter().map(|message| {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        bytes
    });
    encoded.collect()
}

/// What a member submits in a step.
fn signature_of(step: u32, member: usize) -> Signature {
    let collective = match step % 12 {
        3 => Collective::Allgather,
        11 => Collective::Join,
        7 => Collective::Broadcast,
        _ => Collective::Allreduce,
    };
    let odd = u64::from(step % 13 == 5 && member == 2);
    let rows = if collective == Collective::Allgather { 0 } else { u64::from(step % 5) + 1 };
    let tensor = TensorSignature { dtype: DType::F32, shape: vec![rows, 300 + odd] };
    Signature {
        collective,
        op: ReduceOp::Sum,
        scale: Scale::default(),
        root: Rank(0),
        place: Place::Host,
        join_average: JoinAverage::Size,
        tensors: if collective == Collective::Join { Vec::new() } else { vec![tensor] },
        ranks: Vec::new(),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
