//! Coverage-guided fuzzing of the decoders: each target of `ci/fuzz` for some seconds.
#![forbid(unsafe_code)]

use crate::install_c::repository;
use crate::{Count, Verdict, decoders};
use clap::Args;
use std::process::{Command, Stdio};

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Only the targets whose names contain this.
    #[arg(long)]
    only: Option<String>,
    /// Writes the smallest corpus that reaches as much to ci/fuzz/seeds.
    #[arg(long)]
    keep: bool,
}

pub fn run(settings: &Settings) -> Verdict {
    let mut tried = Command::new("cargo-fuzz");
    tried.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
    if !tried.status().is_ok_and(|status| status.success()) {
        println!("fuzz: cargo-fuzz is missing and is installed");
        cargo(&["install", "--quiet", "--locked", "cargo-fuzz"])?;
    }
    let seconds = format!("-max_total_time={}", settings.seconds);
    let mut count = Count::default();
    for target in targets()? {
        if settings.only.as_ref().is_some_and(|only| !target.contains(only.as_str())) {
            continue;
        }
        println!("fuzz: {target} for {} s", settings.seconds);
        let corpus = repository().join("ci/fuzz/corpus").join(&target);
        unpack(&target, &corpus)?;
        cargo(&["fuzz", "run", "--fuzz-dir", "ci/fuzz", &target, "--", &seconds, "-print_final_stats=1"])?;
        if settings.keep {
            cargo(&["fuzz", "cmin", "--fuzz-dir", "ci/fuzz", &target])?;
            println!("fuzz: {} inputs of {target} are kept", decoders::keep(&target, &corpus)?);
        }
        count.passed += 1;
    }
    Ok(count)
}

/// Lays the committed inputs where the fuzzer looks for them.
fn unpack(target: &str, corpus: &std::path::Path) -> Result<(), String> {
    std::fs::create_dir_all(corpus).map_err(|e| format!("{}: {e}", corpus.display()))?;
    for (number, input) in decoders::seeds(target).unwrap_or_default().iter().enumerate() {
        let path = corpus.join(format!("kept-{number}"));
        std::fs::write(&path, input).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}

/// The targets are the files of the folder, so that a new one cannot be forgotten here.
fn targets() -> Result<Vec<String>, String> {
    let folder = repository().join("ci/fuzz/fuzz_targets");
    let entries = std::fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_string_lossy().strip_suffix(".rs").map(str::to_owned))
        .collect();
    names.sort();
    Ok(names)
}

/// The sanitizer's flags are of the nightly compiler; this task alone asks the stable one for them.
fn cargo(args: &[&str]) -> Result<(), String> {
    let mut command = Command::new("cargo");
    command.args(args).current_dir(repository()).env("RUSTC_BOOTSTRAP", "1").stdin(Stdio::null());
    let status = command.status().map_err(|e| format!("cargo: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("cargo {}: {status}", args.join(" "))) }
}
