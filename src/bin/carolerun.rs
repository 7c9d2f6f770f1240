//! Starts the ranks of a job; see `carole::launch`.
fn main() {
    std::process::exit(carole::launch::main(std::env::args_os().collect()));
}
