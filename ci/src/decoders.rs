//! The decoders on the committed corpus (`ci/fuzz/seeds`, one input a line, in hexadecimal) and on random changes of
//! it, without a fuzzer. `ci fuzz` begins with the same inputs and adds those that have reached something new.
#![forbid(unsafe_code)]

use crate::install_c::repository;
use crate::random::Random;
use crate::{Count, Verdict};
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

/// Keeps the inputs of a folder, the shortest first.
pub fn keep(target: &str, folder: &Path) -> Result<usize, String> {
    let entries = std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut inputs: Vec<Vec<u8>> =
        entries.flatten().filter_map(|entry| std::fs::read(entry.path()).ok()).collect();
    inputs.retain(|input| input.len() <= INPUT_BYTES_MAX);
    inputs.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
    inputs.dedup();
    inputs.truncate(INPUTS_MAX);
    let text: String = inputs.iter().map(|input| hex(input) + "\n").collect();
    let path = path(target);
    std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(inputs.len())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
