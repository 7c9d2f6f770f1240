//! What `--check-build` prints: what is really there, and why the rest is not.
#![forbid(unsafe_code)]

use super::remote::facts;
use crate::limits;
use std::fmt::Write;
use std::process::{Command, Stdio};

/// Asks Python which modules it finds, without importing any: that would take seconds.
const PROBE: &str = "import importlib.util as u\nfor m in ('carole','torch','numpy','tensorflow','jax','mxnet'):\n    print(m, u.find_spec(m) is not None)";

/// A row: what it is, and why it cannot be used, if so.
type Row<'a> = (&'a str, Option<String>);

/// The report of `--check-build`.
pub fn report() -> String {
    let mut out = format!("Carole v{}:\n\n", env!("CARGO_PKG_VERSION"));
    let mut section = |title: &str, rows: &[Row<'_>]| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{title}:");
        for (name, missing) in rows {
            let _ = match missing {
                None => writeln!(out, "    [X] {name}"),
                Some(why) => writeln!(out, "    [ ] {name:<14} {why}"),
            };
        }
        out.push('\n');
    };
    section("Available Frameworks", &frameworks());
    let gloo = "Carole finds and connects its ranks itself".to_owned();
    section("Available Controllers", &[("MPI", no_mpi()), ("Gloo", Some(gloo)), ("Carole", None)]);
    let cuda = crate::device::cuda::describe();
    section(
        "Available Tensor Operations",
        &[
            ("NCCL", Some("Carole does not use it".to_owned())),
            ("CUDA", Some(cuda.strip_prefix("CUDA: ").unwrap_or(&cuda).trim_end_matches('.').to_owned())),
            ("MPI", no_mpi()),
            ("Shared memory", no_shared_memory()),
            ("TCP", no_loopback()),
        ],
    );
    section(
        "Launching",
        &[
            ("this host", None),
            ("ssh", missing_program("ssh", "install it (Debian: openssh-client), or see --ssh-command")),
            ("mpirun", missing_program("mpirun", "for --mpi; install an MPI (Debian: openmpi-bin, mpich)")),
            ("srun", missing_program("srun", "for --slurm")),
        ],
    );
    tell_host(&mut out);
    out
}

fn no_mpi() -> Option<String> {
    let words = "as a transport it is not built in (the cargo feature mpi); under mpirun Carole uses its own";
    (!cfg!(feature = "mpi")).then(|| words.to_owned())
}

fn frameworks() -> Vec<Row<'static>> {
    let python = ["python3", "python"].iter().find_map(|name| Some((*name, modules(name)?)));
    let has = |module: &str| python.as_ref().is_some_and(|(_, found)| found.iter().any(|m| m == module));
    let found = |module: &str| match &python {
        None => Some("no python3 was found".to_owned()),
        Some((name, _)) if !has("carole") => {
            Some(format!("{name} does not find the module carole; install it with pip"))
        }
        Some((name, _)) if !has(module) => Some(format!("{name} does not find the module {module}")),
        Some(_) => None,
    };
    let planned = |module: &str| {
        found(module).or_else(|| Some("there is no binding for it in this version".to_owned()))
    };
    vec![
        ("TensorFlow", planned("tensorflow")),
        ("PyTorch", found("torch")),
        ("JAX", planned("jax")),
        ("MXNet", planned("mxnet")),
        ("NumPy", found("numpy")),
    ]
}

fn modules(python: &str) -> Option<Vec<String>> {
    let output =
        Command::new(python).args(["-c", PROBE]).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    output
        .status
        .success()
        .then(|| text.lines().filter_map(|line| line.strip_suffix(" True")).map(str::to_string).collect())
}

fn no_shared_memory() -> Option<String> {
    use rustix::fs::{MemfdFlags, memfd_create};
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    memfd_create("carole-check", flags).err().map(|e| format!("the kernel gives no memfd: {e}"))
}

fn no_loopback() -> Option<String> {
    std::net::TcpListener::bind(("127.0.0.1", 0)).err().map(|e| format!("no port on 127.0.0.1: {e}"))
}

fn missing_program(name: &str, remedy: &str) -> Option<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let there = std::env::split_paths(&path).any(|folder| folder.join(name).is_file());
    (!there).then(|| format!("there is no program {name} in PATH: {remedy}"))
}

/// This host's devices, interfaces and limits.
fn tell_host(out: &mut String) {
    let facts = facts::gather();
    let value = |name: &str| facts.iter().find(|(known, _)| known == name).map_or("", |(_, v)| v.as_str());
    let gib = |name: &str| value(name).parse::<u64>().unwrap_or(0) as f64 / (1u64 << 30) as f64;
    out.push_str("This host:\n");
    let _ = writeln!(out, "    processors     {}, reductions by {}", value("processors"), value("simd"));
    let _ = writeln!(
        out,
        "    memory         {:.1} GiB free; /dev/shm {:.1} GiB free (Carole needs none there)",
        gib("memory_free"),
        gib("shm_free")
    );
    let interfaces = match value("interfaces") {
        "" => "loopback only",
        list => list,
    };
    let _ = writeln!(out, "    interfaces     {interfaces}");
    let _ = writeln!(
        out,
        "    limits         {} open files (up to {}), {} processes, {} ranks in a job",
        value("open_files"),
        value("open_files_hard"),
        match value("processes").parse::<u64>() {
            Ok(u64::MAX) | Err(_) => "any number of",
            Ok(_) => value("processes"),
        },
        limits::RANKS_MAX
    );
}
