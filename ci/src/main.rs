//! The tasks behind `ci/test`, `ci/long` and `ci/demo`: `cargo run --release -p ci -- TASK`.
//!
//! Tasks that need several processes start this program again, once per rank, with plain variables
//! (`CAROLE_RANK`, `CAROLE_SIZE`) and no launcher. Each task prints what it counted, ends with a line
//! `passed=N skipped=M`, and fails with a reason and the command that shows it again.

mod agreement_sim;
mod call;
mod chaos;
mod churn;
mod decoders;
mod elastic;
mod figures;
mod flood;
mod fuzz;
mod hosts;
mod huge;
mod install_c;
mod intrude;
mod job;
mod matrix;
mod mpi;
mod mutants;
mod oracle;
mod order;
mod ptx;
mod random;
mod scarce;
mod shaped;
mod sim;
mod slurm;
mod ssh;
mod startup;
mod strict;
mod suite;
mod train;

use clap::{Parser, Subcommand};
use std::path::PathBuf;

#[derive(Parser)]
#[command(name = "ci", about = "The tasks behind ci/test, ci/long and ci/demo")]
struct Command {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Every kind of test, with a table at the end (ci/test; with --long: ci/long).
    Suite(suite::Settings),
    /// Whole engines in one thread and virtual time, with faults, from a seed.
    Sim(sim::SimArgs),
    /// Latency and messages of an agreed step, from 2 to 4096 ranks.
    Agreement(agreement_sim::Args),
    /// Results of every collective, operation, type, algorithm, transport and number of ranks.
    Matrix(matrix::Settings),
    /// Strict mode: the same bits whatever the order, the transport and the algorithm.
    Strict(strict::Settings),
    /// Many tensors, submitted in another random order on each rank and in each step.
    Order(order::Settings),
    /// Ranks killed and stopped at random moments.
    Chaos(chaos::Settings),
    /// Ranks killed one after another while the others form new epochs and go on.
    Churn(churn::Settings),
    /// Jobs with few file descriptors, or with a full /dev/shm.
    Scarce(scarce::Settings),
    /// Garbage, scans and half-open connections on the ports of a running job.
    Intrude(intrude::Settings),
    /// What a flood of connections on the ports of a running job costs it.
    Flood(flood::Settings),
    /// Several hosts, as network namespaces around a router; takes root.
    Hosts(hosts::Settings),
    /// The launcher over ssh between namespaces with an sshd each: results, failures, mistakes; takes root.
    Ssh(ssh::Settings),
    /// Ranks under a real Slurm, whose daemons the task starts: results, failures, mistakes; takes root.
    Slurm(slurm::Settings),
    /// From the launcher's start to the first barrier; the rendezvous of many ranks; jobs started and killed.
    Startup(startup::Settings),
    /// Algorithms on links of a set rate between namespaces: regret of the choice, cost of checksums; takes root.
    Shaped(shaped::Settings),
    /// MPI as the transport, under an MPI's own launcher.
    Mpi(mpi::Settings),
    /// Threads and memory of a process, and of simulated engines.
    Figures(figures::Settings),
    /// One tensor of more than 2^31 elements.
    Huge(huge::Settings),
    /// The decoders on the committed corpus and on changes of it.
    Decoders(decoders::Settings),
    /// Coverage-guided fuzzing of the decoders; installs cargo-fuzz if it is missing.
    Fuzz(fuzz::Settings),
    /// Mutation testing of the protocol core: a random sample, from a seed.
    Mutants(mutants::Settings),
    /// Compiles kernels/ to kernels/ptx with NVRTC from PyPI; no device is needed.
    Ptx,
    /// Installs libcarole, carole.h and carole.pc.
    InstallC {
        /// Where to.
        #[arg(long)]
        prefix: PathBuf,
    },
    /// One rank of a job of the tasks above.
    #[command(hide = true, subcommand)]
    Rank(Rank),
}

#[derive(Subcommand)]
enum Rank {
    Matrix(matrix::RankSettings),
    Strict(strict::RankSettings),
    Order(order::RankSettings),
    Chaos(chaos::RankSettings),
    Churn,
    Elastic(elastic::RankSettings),
    Figures(figures::RankSettings),
    Flood(flood::RankSettings),
    Huge(huge::RankSettings),
    Shaped(shaped::RankSettings),
    Train(train::RankSettings),
    Startup(startup::RankSettings),
    Mpi(mpi::RankSettings),
}

/// What a task found: how many checks passed and how many were not made; or why it failed.
type Verdict = Result<Count, String>;

/// Checks that passed, and those that were skipped.
#[derive(Clone, Copy, Default, Debug)]
struct Count {
    passed: u64,
    skipped: u64,
}

fn main() {
    let verdict = match Command::parse().task {
        Task::Suite(settings) => std::process::exit(suite::run(&settings)),
        Task::Sim(settings) => match sim::run(&settings) {
            0 => Ok(Count { passed: settings.seeds, skipped: 0 }),
            code => std::process::exit(code),
        },
        Task::Agreement(settings) => agreement_sim::run(&settings).map(|()| Count { passed: 1, skipped: 0 }),
        Task::Matrix(settings) => matrix::run(&settings),
        Task::Strict(settings) => strict::run(&settings),
        Task::Order(settings) => order::run(&settings),
        Task::Chaos(settings) => chaos::run(&settings),
        Task::Churn(settings) => churn::run(&settings),
        Task::Scarce(settings) => scarce::run(&settings),
        Task::Intrude(settings) => intrude::run(&settings),
        Task::Flood(settings) => flood::run(&settings),
        Task::Hosts(settings) => hosts::run(&settings),
        Task::Ssh(settings) => ssh::run(&settings),
        Task::Slurm(settings) => slurm::run(&settings),
        Task::Startup(settings) => startup::run(&settings),
        Task::Shaped(settings) => shaped::run(&settings),
        Task::Mpi(settings) => mpi::run(&settings),
        Task::Figures(settings) => figures::run(&settings),
        Task::Huge(settings) => huge::run(&settings),
        Task::Decoders(settings) => decoders::run(&settings),
        Task::Fuzz(settings) => fuzz::run(&settings),
        Task::Mutants(settings) => mutants::run(&settings),
        Task::Ptx => ptx::run(),
        Task::InstallC { prefix } => install_c::run(&prefix),
        Task::Rank(rank) => std::process::exit(run_rank(rank)),
    };
    match verdict {
        Ok(count) => println!("passed={} skipped={}", count.passed, count.skipped),
        Err(words) => {
            eprintln!("failed: {words}");
            std::process::exit(1);
        }
    }
}

fn run_rank(rank: Rank) -> i32 {
    if let Err(words) = mpi::redirect() {
        eprintln!("{words}");
        return 1;
    }
    let result = match rank {
        Rank::Matrix(settings) => matrix::rank(&settings),
        Rank::Strict(settings) => strict::rank(&settings),
        Rank::Order(settings) => order::rank(&settings),
        Rank::Chaos(settings) => chaos::rank(&settings),
        Rank::Churn => churn::rank(),
        Rank::Elastic(settings) => elastic::rank(&settings),
        Rank::Figures(settings) => figures::rank(&settings),
        Rank::Flood(settings) => flood::rank(&settings),
        Rank::Huge(settings) => huge::rank(&settings),
        Rank::Shaped(settings) => shaped::rank(&settings),
        Rank::Train(settings) => train::rank(&settings),
        Rank::Startup(settings) => startup::rank(&settings),
        Rank::Mpi(settings) => mpi::rank(&settings),
    };
    match result {
        Ok(()) => 0,
        Err(error) => {
            println!("error {error}");
            1
        }
    }
}
