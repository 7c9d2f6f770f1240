//! MPI as the transport: the result matrix under an MPI's own launcher, and a rank that is killed there. Needs this
//! program to be built with the feature `mpi`, against the MPI whose launcher is named.
#![forbid(unsafe_code)]

use crate::matrix;
use crate::{Count, Verdict};
use carole::runtime::{self, Options, typed};
use carole::types::ReduceOp;
use clap::Args;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    /// MPI's launcher.
    #[arg(long, default_value = "mpirun")]
    launcher: String,
    /// Numbers of ranks.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 3, 4])]
    ranks: Vec<u32>,
    /// Algorithms.
    #[arg(long, value_delimiter = ',', default_values_t = matrix::ALGORITHMS.map(str::to_owned))]
    algorithms: Vec<String>,
    /// Jobs of which a rank is killed.
    #[arg(long, default_value_t = 3)]
    kills: u32,
    /// Of the inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// What one rank of a job with a victim runs.
#[derive(Args, Clone)]
pub struct RankSettings {
    /// The rank that ends without a word.
    #[arg(long)]
    victim: u32,
    /// At which step.
    #[arg(long)]
    step: u64,
}

/// Where a rank of such a job prints: launchers mix the ranks' outputs.
const FOLDER: &str = "CI_MPI_OUTPUT";
/// How much of what a launcher says is shown.
const SAID_BYTES: usize = 4000;
/// Longer than this, and it hangs.
const LIMIT: Duration = Duration::from_secs(300);
/// A job with a dead rank is over before this.
const DEATH: Duration = Duration::from_secs(15);

pub fn run(settings: &Settings) -> Verdict {
    if cfg!(not(feature = "mpi")) {
        return Err(
            "this program was built without MPI: cargo run --release -p ci --features mpi -- mpi".into()
        );
    }
    let mut count = Count::default();
    let mut jobs = 0;
    for &ranks in &settings.ranks {
        for algorithm in &settings.algorithms {
            jobs += 1;
            let turn = jobs.to_string();
            let args = ["matrix", "--seed", &settings.seed.to_string(), "--turn", &turn];
            let told = |e: String| {
                let again = format!("--ranks {ranks} --algorithms {algorithm} --kills 0");
                format!(
                    "{ranks} ranks, {algorithm}: {e}; again: ci mpi --launcher {} {again}",
                    settings.launcher
                )
            };
            let window = window(ranks + jobs as u32);
            let job = job(settings, ranks, algorithm, window, &args).map_err(told)?;
            if !job.succeeded {
                return Err(told(job.why()));
            }
            let cases = matrix::cases(ranks, settings.seed, jobs, false);
            count.passed += matrix::judge(&cases, &job.lines).map_err(told)?;
        }
    }
    println!("{}: {jobs} jobs, {} results on all ranks, none wrong", settings.launcher, count.passed);
    let mut slowest = Duration::ZERO;
    for turn in 0..settings.kills {
        let (victim, step) = ((turn % 3).to_string(), (20 + 7 * turn).to_string());
        let began = Instant::now();
        let job = job(settings, 3, "auto", window(turn), &["mpi", "--victim", &victim, "--step", &step])?;
        let took = began.elapsed();
        if job.succeeded || took > DEATH {
            let how = if job.succeeded { "well" } else { "badly" };
            return Err(format!(
                "rank {victim} was killed, and the job ended {how} after {took:?}: {}",
                job.why()
            ));
        }
        slowest = slowest.max(took);
        count.passed += 1;
    }
    if settings.kills > 0 {
        println!("{} jobs with a killed rank were over, the slowest after {slowest:.1?}", settings.kills);
    }
    Ok(count)
}

/// A job that has ended.
struct Ended {
    /// On all ranks.
    succeeded: bool,
    /// What each rank printed.
    lines: Vec<Vec<String>>,
    /// The end of what the launcher said, and of what the ranks said beside their results.
    said: String,
}

impl Ended {
    fn why(&self) -> String {
        let last = self.lines.iter().filter_map(|lines| lines.last()).find(|line| line.starts_with("error"));
        let word = last.map_or("no rank says why", String::as_str);
        if self.said.is_empty() {
            word.to_owned()
        } else {
            format!("{word}; the launcher's last words:\n{}", self.said)
        }
    }
}

/// In every other job payload goes by messages within the host, too, as it does between hosts.
fn window(turn: u32) -> &'static str {
    if turn.is_multiple_of(2) { "1" } else { "0" }
}

/// Runs a job to its end.
fn job(
    settings: &Settings,
    ranks: u32,
    algorithm: &str,
    window: &str,
    args: &[&str],
) -> Result<Ended, String> {
    let folder = tempfile::tempdir().map_err(|e| format!("no temporary directory: {e}"))?;
    let program = std::env::current_exe().map_err(|e| format!("this program cannot find itself: {e}"))?;
    let launcher = &settings.launcher;
    let mut command = Command::new(launcher);
    command.args(["-np", &ranks.to_string()]).arg(program).arg("rank").args(args);
    let log = folder.path().join("launcher");
    let file = || {
        File::options().append(true).create(true).open(&log).map_err(|e| format!("{}: {e}", log.display()))
    };
    command.stdin(Stdio::null()).stdout(file()?).stderr(file()?);
    command.env(FOLDER, folder.path()).env("CAROLE_TRANSPORT", "mpi").env("CAROLE_ALGORITHM", algorithm);
    command.env("CAROLE_MPI_WINDOW", window);
    command.env("CAROLE_TIMEOUT_MS", "20000").env("CAROLE_START_TIMEOUT_S", "120");
    // UCX warns on standard output, among the results, where a last word of a peer is not read before the end.
    command.env("UCX_LOG_LEVEL", "error");
    // Open MPI asks root for a word of consent, and wants to know of more ranks than processors.
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.env("OMPI_MCA_rmaps_base_oversubscribe", "1");
    let mut child = command.spawn().map_err(|e| format!("{launcher} does not start: {e}"))?;
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        match child.try_wait().map_err(|e| e.to_string())? {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("it was not over after {LIMIT:?}"));
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let read = |rank: u32| {
        let text = std::fs::read_to_string(folder.path().join(rank.to_string())).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    };
    let said = std::fs::read(&log).unwrap_or_default();
    let tail = said.len().saturating_sub(SAID_BYTES);
    Ok(Ended {
        succeeded: status.success(),
        lines: (0..ranks).map(read).collect(),
        said: String::from_utf8_lossy(&said[tail..]).trim().to_owned(),
    })
}

/// Lets a rank of such a job print to a file of its own.
pub fn redirect() -> Result<(), String> {
    let Some(folder) = std::env::var_os(FOLDER) else { return Ok(()) };
    let names = ["OMPI_COMM_WORLD_RANK", "PMI_RANK"];
    let rank =
        names.iter().find_map(|name| std::env::var(name).ok()).ok_or("no launcher says which rank it is")?;
    let file = std::fs::File::create(Path::new(&folder).join(rank)).map_err(|e| e.to_string())?;
    rustix::stdio::dup2_stdout(&file).map_err(|e| e.to_string())
}

/// One rank of a job with a victim.
pub fn rank(settings: &RankSettings) -> Result<(), String> {
    let fail = |error: carole::error::Error| error.to_string();
    runtime::init(&Options::default()).map_err(fail)?;
    let me = runtime::world().map_err(fail)?.rank;
    for step in 0.. {
        if (me, step) == (settings.victim, settings.step) {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
                .map_err(|e| e.to_string())?;
        }
        typed::allreduce("sum", &mut vec![1.0f32; 1 << (step % 16)], ReduceOp::Sum).map_err(fail)?;
    }
    Ok(())
}
