//! The tasks behind ci/test, ci/long and ci/demo.

mod sim;

use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Simulates clusters of whole engines, with faults, from seeds.
    Sim(sim::SimArgs),
}

fn main() {
    let code = match Cli::parse().task {
        Task::Sim(args) => sim::run(&args),
    };
    std::process::exit(code);
}
