//! Makes `kernels/ptx` from `kernels`: PTX by NVRTC, which needs neither a device nor a CUDA toolkit. The compiler
//! is a wheel from PyPI in a virtual environment under `target`.
#![forbid(unsafe_code)]

use crate::install_c::repository;
use crate::{Count, Verdict};
use carole::device::cuda::launch::Module;
use carole::device::cuda::source::{COMPILER, OPTIONS, sealed};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

pub fn run() -> Verdict {
    let python = environment()?;
    let script = repository().join("ci/src/ptx/nvrtc.py");
    let out = repository().join("kernels/ptx");
    fs::create_dir_all(&out).map_err(|e| format!("{}: {e}", out.display()))?;
    let raw = repository().join("target/ci/module.ptx");
    let (mut modules, mut bytes) = (0, 0);
    for module in Module::all() {
        let mut command = Command::new(&python);
        command.current_dir(repository().join("kernels")).arg(&script).arg(module.source()).arg(&raw);
        command.args(OPTIONS).arg("--include-path=.");
        command.args(module.definition().map(|name| format!("-D{name}")));
        run_command(&mut command)?;
        let ptx = fs::read_to_string(&raw).map_err(|e| format!("{}: {e}", raw.display()))?;
        let path = out.join(format!("{}.ptx", module.name()));
        let kept = sealed(module, &ptx);
        fs::write(&path, &kept).map_err(|e| format!("{}: {e}", path.display()))?;
        modules += 1;
        bytes += kept.len();
    }
    println!("ptx: {modules} modules, {} KiB, by {COMPILER}", bytes / 1024);
    Ok(Count { passed: modules, skipped: 0 })
}

/// The Python of a virtual environment that has the compiler; made on first use.
fn environment() -> Result<PathBuf, String> {
    let version = COMPILER.rsplit('=').next().unwrap_or_default();
    let folder = repository().join(format!("target/ci/nvrtc-{version}"));
    let python = folder.join("bin/python");
    let done = folder.join("ready");
    if !done.exists() {
        run_command(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
        run_command(Command::new(&python).args(["-m", "pip", "install", "--quiet", COMPILER]))?;
        touch(&done)?;
    }
    Ok(python)
}

fn touch(path: &Path) -> Result<(), String> {
    fs::write(path, "").map_err(|e| format!("{}: {e}", path.display()))
}

fn run_command(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().map_err(|e| format!("{program}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}")) }
}
