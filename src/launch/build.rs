//! What `--check-build` prints: what is really there.
#![forbid(unsafe_code)]

use std::fmt::Write;
use std::process::{Command, Stdio};

/// Asks Python which modules it finds, without importing any: that would take seconds.
const PROBE: &str = "import importlib.util as u\nfor m in ('carole','torch','numpy'):\n    print(m, u.find_spec(m) is not None)";

/// The report of `--check-build`.
pub fn report() -> String {
    let python = ["python3", "python"].iter().find_map(|name| Some((*name, modules(name)?)));
    let has = |module: &str| python.as_ref().is_some_and(|(_, found)| found.iter().any(|m| m == module));
    let both = |module: &str| has("carole") && has(module);
    let mut out = format!("Carole v{}:\n\n", env!("CARGO_PKG_VERSION"));
    let mut section = |title: &str, rows: &[(bool, &str)]| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{title}:");
        for (present, name) in rows {
            let _ = writeln!(out, "    [{}] {name}", if *present { 'X' } else { ' ' });
        }
        out.push('\n');
    };
    section(
        "Available Frameworks",
        &[(false, "TensorFlow"), (both("torch"), "PyTorch"), (false, "MXNet"), (both("numpy"), "NumPy")],
    );
    section("Available Controllers", &[(false, "MPI"), (false, "Gloo"), (true, "Carole")]);
    section(
        "Available Tensor Operations",
        &[(false, "NCCL"), (false, "CUDA"), (false, "MPI"), (true, "Shared memory"), (true, "TCP")],
    );
    let _ = writeln!(out, "{}", crate::device::cuda::describe());
    match &python {
        None => out.push_str("Frameworks: no python3 was found, so none can be used from here.\n"),
        Some((name, _)) if !has("carole") => {
            let _ = writeln!(out, "Frameworks: {name} does not find the module carole; install it with pip.");
        }
        Some((name, _)) => {
            let _ = writeln!(out, "Frameworks: as {name} finds them.");
        }
    }
    out
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
