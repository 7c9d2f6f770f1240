//! `carole-perf`: times and checks every collective; explains the choice of an algorithm.
#![forbid(unsafe_code)]

fn main() {
    std::process::exit(carole::perf::main(std::env::args_os().collect()));
}
