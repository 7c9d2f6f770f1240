//! The kinds of test, in the order in which they run: the cheap ones first.
#![forbid(unsafe_code)]

use crate::install_c::repository;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// One kind of test.
pub struct Step {
    pub name: &'static str,
    /// Run one after another from the root of the repository.
    pub commands: Vec<Vec<String>>,
    pub env: Vec<(String, String)>,
    /// What must be there, and the reason that the table gives when it is not.
    needs: Vec<(Need, &'static str)>,
    /// Longer than this, and it hangs.
    pub limit: Duration,
}

enum Need {
    /// A file or folder of the repository.
    File(&'static str),
    /// A program that can be started.
    Program(&'static str),
    /// A device of this machine.
    Device(&'static str),
    /// A virtual environment that ci/test makes, and what else there may be a file `.reason` for, by ci/test.
    Venv(&'static str, &'static str),
}

impl Need {
    fn is_met(&self) -> bool {
        match self {
            Need::File(path) => repository().join(path).exists(),
            Need::Program(program) => {
                let mut tried = Command::new(program);
                tried.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
                tried.status().is_ok_and(|status| status.success())
            }
            Need::Device(path) => Path::new(path).exists(),
            Need::Venv(folder, _) => {
                repository().join(folder).join(".packages").exists() && self.told().is_none()
            }
        }
    }
    /// Why it is missing, where ci/test has left word of it.
    fn told(&self) -> Option<String> {
        let Need::Venv(_, reason) = self else { return None };
        std::fs::read_to_string(repository().join(reason)).ok().map(|text| text.trim().to_owned())
    }
}

impl Step {
    fn new(name: &'static str, line: &str) -> Step {
        Step {
            name,
            commands: Vec::new(),
            env: Vec::new(),
            needs: Vec::new(),
            limit: Duration::from_secs(1800),
        }
        .then(line)
    }
    /// A task of this program.
    fn task(name: &'static str, line: &str) -> Step {
        let own = std::env::current_exe().expect("a program knows where it lies");
        let mut step = Step::new(name, line);
        step.commands[0].insert(0, own.display().to_string());
        step
    }
    fn then(mut self, line: &str) -> Step {
        self.commands.push(line.split_whitespace().map(str::to_owned).collect());
        self
    }
    fn with(mut self, name: &str, value: &str) -> Step {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }
    /// What is built for this step alone is built in less time than what is shipped.
    fn quickly(self) -> Step {
        self.with("CARGO_PROFILE_RELEASE_LTO", "off")
            .with("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
            .with("CARGO_PROFILE_RELEASE_DEBUG", "0")
    }
    fn needs(mut self, need: Need, reason: &'static str) -> Step {
        self.needs.push((need, reason));
        self
    }
    fn within(mut self, limit: Duration) -> Step {
        self.limit = limit;
        self
    }
    /// Why the step cannot be run here.
    pub fn missing(&self) -> Option<String> {
        let (need, reason) = self.needs.iter().find(|(need, _)| !need.is_met())?;
        Some(need.told().unwrap_or_else(|| (*reason).to_owned()))
    }
}

/// How much of everything.
#[derive(Clone, Copy)]
pub struct Scale {
    pub long: bool,
    /// Of a hundred parts of the full counts, where they can be shared out: those of faults and mutants.
    pub share: u64,
}

impl Scale {
    fn of(self, short: u64, full: u64) -> u64 {
        if self.long { (full * self.share).div_ceil(100) } else { short }
    }
}

/// All steps. The long suite does the same with full counts, or a share of them.
pub fn all(scale: Scale) -> Vec<Step> {
    let long = scale.long;
    let pick = |short: &'static str, full: &'static str| if long { full } else { short };
    let mut steps = vec![
        Step::new("rustfmt", "cargo fmt --all -- --check"),
        Step::new("clippy", "cargo clippy --workspace --all-targets -- -D warnings"),
        Step::new(
            "documentation",
            "cargo doc --quiet --no-deps -p carole --features cuda --document-private-items",
        )
        .with("RUSTDOCFLAGS", "-D warnings"),
        Step::new("tidy", &format!("cargo test --quiet {PACKAGES} --test tidy")),
    ];
    steps.extend(rust_tests());
    steps.push(Step::new("doc tests", &format!("cargo test --doc {PACKAGES}")));
    steps.push(
        Step::new("loom models", "cargo test --release -p carole --lib loom")
            .with("RUSTFLAGS", "--cfg loom")
            .with("CARGO_TARGET_DIR", "target/loom")
            .quickly(),
    );
    steps.push(
        Step::task("simulator", &format!("sim --seeds {}", scale.of(2000, 1_000_000)))
            .within(Duration::from_secs(if long { 48 * 3600 } else { 1800 })),
    );
    steps.push(Step::task("agreed steps", pick("agreement --ranks-max 256", "agreement")));
    steps.extend(faults(scale));
    steps.extend(processes(long));
    steps.extend(
        [("Open MPI", "mpirun.openmpi", "mpicc.openmpi"), ("MPICH", "mpirun.mpich", "mpicc.mpich")]
            .map(over_mpi),
    );
    steps.extend(bindings(long));
    steps.push(
        Step::new("CUDA on a device", &format!("cargo test {PACKAGES} --test kernels on_a_device"))
            .needs(Need::Device("/dev/nvidia0"), "no device"),
    );
    steps
}

/// MPI as the transport, built against one MPI: the transports' common suite, and the result matrix.
fn over_mpi((name, launcher, compiler): (&'static str, &'static str, &'static str)) -> Step {
    let cargo = |what: &str| format!("cargo {what} --release --target-dir target/mpi");
    // Both are built in one folder, since most is the same; the crate that binds to MPI does not see that another is meant.
    Step::new(name, &cargo("clean -p mpi-sys"))
        .then(&cargo("test -p carole --features mpi --lib mpi"))
        .then(&format!("env CAROLE_TEST_MPI_MESSAGES=1 {}", cargo("test -p carole --features mpi --lib mpi")))
        .then(&format!("{} -p ci --features mpi -- mpi --launcher {launcher}", cargo("run")))
        .with("MPICC", compiler)
        .quickly()
        .with("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .with("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .needs(Need::Program(launcher), "it is not installed")
        .needs(Need::Program(compiler), "it cannot be compiled with")
        .needs(Need::Program("clang"), "no libclang, which the crate mpi is built with")
}

/// What most tests are of. The same list everywhere means the same features, and so one build.
const PACKAGES: &str = "--workspace --exclude carole-c";
/// Kernels as host C++, and devices under a stand-in for the driver; both are compiled by the tests.
const CUDA_TESTS: [&str; 3] = ["kernels", "cuda", "cuda_direct"];

fn rust_tests() -> Vec<Step> {
    let nextest = Need::Program("cargo-nextest").is_met();
    let run = match nextest {
        true => "cargo nextest run --config-file ci/nextest.toml --no-fail-fast",
        false => "cargo test --no-fail-fast",
    };
    let all = if nextest { "" } else { "--lib --bins --tests" };
    let cuda = CUDA_TESTS.map(|test| format!("--test {test}")).join(" ");
    // Only nextest can leave tests out by the binary in which they are.
    let binaries = CUDA_TESTS.map(|test| format!("binary({test})")).join("+");
    let others = if nextest { format!("-E !({binaries})") } else { all.to_owned() };
    vec![
        Step::new("unit and launcher tests", &format!("{run} {PACKAGES} {others}")),
        Step::new("CUDA without a device", &format!("{run} {PACKAGES} {cuda}"))
            .needs(Need::Program("c++"), "no C++ compiler"),
        Step::new("C interface, C99 and C++", &format!("{run} -p carole-c {all}"))
            .needs(Need::Program("cc"), "no C compiler")
            .needs(Need::Program("c++"), "no C++ compiler"),
    ]
}

/// Faults of real processes, hostile bytes, and bugs planted at random.
fn faults(scale: Scale) -> Vec<Step> {
    let hours = |n: u64| Duration::from_secs(n * 3600);
    let chaos = format!(
        "chaos --kills {} --stops {} --starts {} --teardowns {}",
        scale.of(6, 500),
        scale.of(2, 50),
        scale.of(2, 200),
        scale.of(3, 500)
    );
    // One alone says nothing about a share.
    let percent = if scale.long { 90 } else { 0 };
    let mutants = format!("mutants --sample {} --percent {percent}", scale.of(1, 150));
    let mut steps = vec![
        Step::task("killed and stopped ranks", &chaos).within(hours(4)),
        Step::task("churn of ranks", &format!("churn --seconds {}", scale.of(10, 600))),
        Step::task("too little of everything", "scarce"),
        Step::task("decoders", &format!("decoders --changes {}", scale.of(300, 30_000))).within(hours(2)),
        Step::task("mutants", &mutants).within(hours(24)),
    ];
    if scale.long {
        let seconds = format!("fuzz --seconds {}", scale.of(0, 600));
        steps.push(Step::task("fuzzed decoders", &seconds).within(hours(2)));
    }
    steps
}

/// Real processes on this host.
fn processes(long: bool) -> Vec<Step> {
    let pick = |short: &'static str, full: &'static str| if long { full } else { short };
    let hours = |n: u64| Duration::from_secs(n * 3600);
    vec![
        Step::task("result matrix", pick("matrix", "matrix --full")).within(hours(if long { 12 } else { 1 })),
        Step::task(
            "result matrix, encrypted",
            pick("matrix --transports tls --ranks 2,5", "matrix --transports tls --full"),
        )
        .within(hours(6)),
        Step::task("strict mode", pick("strict --runs 20", "strict --runs 20 --full")).within(hours(6)),
        Step::task("random orders", pick("order --steps 1000", "order --steps 20000")).within(hours(6)),
        Step::task("intruders", pick("intrude", "intrude --connections 300")),
        Step::task("a flood of connections", pick("flood --seconds 8", "flood --seconds 200")),
        Step::task("several hosts", "hosts"),
        with_launcher("several hosts over ssh", pick("ssh", "ssh --hosts 2,3,4 --kills 60")).within(hours(2)),
        with_launcher("Slurm", "slurm"),
        with_launcher(
            "start-up",
            pick("startup --ranks 32 --simulated 64,256 --cycles 10", "startup --ranks 128 --cycles 200"),
        )
        .within(hours(2)),
        Step::task("threads and memory", "figures --simulated 64,512"),
        Step::task("more than 2^31 elements", "huge"),
    ]
}

/// A task of this program that starts `carolerun`, which lies beside it.
fn with_launcher(name: &'static str, line: &str) -> Step {
    let own = std::env::current_exe().expect("a program knows where it lies");
    // Together with this program, as it was built.
    Step::new(name, "cargo build --quiet --release -p ci -p carole --bin carolerun --bin carole-perf")
        .then(&format!("{} {line}", own.display()))
}

fn bindings(long: bool) -> Vec<Step> {
    let python = "target/ci/venv/bin/python";
    let torch = "target/ci/venv-torch/bin/python";
    let newest = "target/ci/venv-torch-newest";
    let wheels = "target/ci/wheels";
    let install =
        format!("-m pip install --quiet --no-index --find-links {wheels} --force-reinstall --no-deps carole");
    let with_torch = ["surface", "torch", "torch_backend", "torch_trainers", "torch_training", "examples"]
        .map(|name| format!("bindings/python/tests/test_{name}.py"))
        .join(" ");
    let mut steps = vec![
        Step::new(
            "Python",
            &format!("{python} -m pip wheel --quiet --no-deps -w {wheels} ./bindings/python"),
        )
        .then(&format!("{python} {install}"))
        .then(&format!("{python} -m pytest -q bindings/python/tests"))
        .needs(Need::File("bindings/python/pyproject.toml"), "not in this tree")
        .needs(Need::File(python), "no virtual environment; ci/test makes it"),
        // The same wheel, with another Python that has torch.
        Step::new("PyTorch", &format!("{torch} {install}"))
            .then(&format!("{torch} -m pytest -q {with_torch}"))
            .needs(Need::File(wheels), "no wheel: the step Python makes it")
            .needs(Need::File(torch), "no virtual environment with torch; ci/test makes it"),
        Step::new("PyTorch, newest", &format!("{newest}/bin/python {install}"))
            .then(&format!("{newest}/bin/python -m pytest -q {with_torch}"))
            .needs(Need::File(wheels), "no wheel: the step Python makes it")
            .needs(
                Need::Venv(newest, "target/ci/venv-torch-newest.reason"),
                "no virtual environment with the newest torch; ci/test makes it",
            ),
        Step::new("demo, short", "ci/demo --epochs 2")
            .needs(Need::File("bindings/python/examples/digits_numpy.py"), "not in this tree"),
    ];
    if long {
        steps.push(
            Step::new("Lightning, Accelerate, DeepSpeed", &format!("{newest}/bin/python {install}"))
                .then(&format!("{newest}/bin/python -m pytest -q bindings/python/tests/long_trainers.py"))
                .needs(Need::File(wheels), "no wheel: the step Python makes it")
                .needs(
                    Need::Venv(newest, "target/ci/venv-torch-newest-trainers.reason"),
                    "no virtual environment with the trainers; ci/long makes it",
                )
                .within(Duration::from_secs(3600)),
        );
    }
    steps
}
