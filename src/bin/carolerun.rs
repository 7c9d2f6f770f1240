//! Starts the ranks of a job; see `carole::launch`.
#![forbid(unsafe_code)]

fn main() {
    std::process::exit(carole::launch::main(std::env::args_os().collect()));
}
