//! `--mpi`, `--slurm` and `--jsrun`: the job is started by the cluster's own launcher, and its ranks find themselves by
//! that launcher's variables. `carolerun` becomes it.
#![forbid(unsafe_code)]

use super::args::Arguments;
use super::{PLACE, check_command, complain};
use crate::config::{Config, Layer};
use crate::error::{Error, Result};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// Whose launcher `mpirun` is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flavour {
    OpenMpi,
    /// MPICH's, Intel MPI's and others made of it.
    Hydra,
    Slurm,
    Jsrun,
}

impl Flavour {
    fn program(self) -> &'static str {
        match self {
            Flavour::OpenMpi | Flavour::Hydra => "mpirun",
            Flavour::Slurm => "srun",
            Flavour::Jsrun => "jsrun",
        }
    }
}

/// Whether another launcher is asked for.
pub fn is_asked(arguments: &Arguments) -> bool {
    let native = &arguments.native;
    native.mpi || native.slurm || native.jsrun
}

/// Becomes the other launcher; returns only when that cannot be.
pub fn run(arguments: &Arguments, config: &Config) -> Result<i32> {
    let size =
        arguments.num_proc.ok_or_else(|| Error::usage("-np N is missing: how many processes to start"))?;
    check_command(arguments, &format!("-np {size}"))?;
    let native = &arguments.native;
    let flavour = match (native.slurm, native.jsrun) {
        (true, _) => Flavour::Slurm,
        (_, true) => Flavour::Jsrun,
        _ => mpirun()?,
    };
    let settings = config.set_by(Layer::Flag);
    let names: Vec<&str> = settings.iter().map(|(name, _)| *name).collect();
    let line = compose(arguments, flavour, size, &names, rustix::process::geteuid().is_root())?;
    if arguments.verbose {
        let words: Vec<_> = line.iter().map(|word| word.to_string_lossy()).collect();
        complain(&format!("becoming {}", words.join(" ")));
    }
    let mut command = Command::new(&line[0]);
    command.args(&line[1..]).envs(settings);
    for name in PLACE {
        command.env_remove(name);
    }
    let program = flavour.program();
    Err(match command.exec() {
        e if e.kind() == std::io::ErrorKind::NotFound => missing(program),
        e => Error::usage(format!("{program} cannot be started: {e}")),
    })
}

fn missing(program: &str) -> Error {
    let remedy = match program {
        "mpirun" => {
            "install an MPI (Debian: openmpi-bin or mpich), or leave --mpi out: carolerun starts ranks itself"
        }
        "srun" => "run this where Slurm is, or leave --slurm out",
        _ => "run this where Spectrum LSF is, or leave --jsrun out",
    };
    Error::usage(format!("there is no program {program} in PATH: {remedy}"))
}

/// Asks `mpirun` whose it is.
fn mpirun() -> Result<Flavour> {
    let mut command = Command::new("mpirun");
    let asked = command.arg("--version").stdin(Stdio::null()).stderr(Stdio::null()).output();
    let words = asked.map_err(|_| missing("mpirun"))?.stdout;
    let words = String::from_utf8_lossy(&words);
    let known = [
        ("Open MPI", Flavour::OpenMpi),
        ("OpenRTE", Flavour::OpenMpi),
        ("HYDRA", Flavour::Hydra),
        ("Intel", Flavour::Hydra),
        ("MPICH", Flavour::Hydra),
    ];
    known.iter().find(|(name, _)| words.contains(name)).map(|(_, flavour)| *flavour).ok_or_else(|| {
        let first = words.lines().next().unwrap_or("nothing");
        Error::usage(format!(
            "mpirun --version says '{first}', which is neither Open MPI, MPICH nor Intel MPI"
        ))
    })
}

/// The whole command line. `names`: variables that the flags set, which all ranks get.
fn compose(
    arguments: &Arguments,
    flavour: Flavour,
    size: u32,
    names: &[&str],
    is_root: bool,
) -> Result<Vec<OsString>> {
    let mut line: Vec<OsString> = vec![flavour.program().into()];
    let mut add = |words: &[&str]| line.extend(words.iter().map(OsString::from));
    let (hosts, file) = (&arguments.hosts.hosts, &arguments.hosts.hostfile);
    let file = file.as_ref().map(|path| path.to_string_lossy().into_owned());
    let size = size.to_string();
    match flavour {
        Flavour::OpenMpi => {
            add(if is_root { &["--allow-run-as-root"] } else { &[] });
            add(&["-np", &size]);
            hosts.iter().for_each(|list| add(&["-H", list]));
            file.iter().for_each(|path| add(&["--hostfile", path]));
            if arguments.native.binding_args.is_none() {
                // As Horovod does: ranks have threads, and one processor each would be too few.
                add(&["--bind-to", "none", "--map-by", "slot"]);
            }
            names.iter().for_each(|name| add(&["-x", name]));
        }
        Flavour::Hydra => {
            add(&["-np", &size]);
            hosts.iter().for_each(|list| add(&["-hosts", list]));
            // It passes the whole environment on by itself.
            file.iter().for_each(|path| add(&["-f", path]));
        }
        Flavour::Slurm => {
            // A rank that fails ends the job, as everywhere; srun by itself lets the others wait for it.
            add(&["--ntasks", &size, "--export", "ALL", "--kill-on-bad-exit=1"]);
            if hosts.is_some() || file.is_some() {
                return Err(Error::usage(
                    "with --slurm Slurm chooses the hosts: leave -H and --hostfile out",
                ));
            }
        }
        Flavour::Jsrun => {
            add(&["--nrs", &size, "--tasks_per_rs", "1"]);
            names.iter().for_each(|name| add(&["--env", name]));
        }
    }
    for more in [&arguments.native.binding_args, &arguments.native.mpi_args].into_iter().flatten() {
        add(&more.split_whitespace().collect::<Vec<_>>());
    }
    line.extend(arguments.command.iter().cloned());
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(flavour: Flavour, text: &str) -> Result<String> {
        let argv = text.split(' ').map(OsString::from).collect();
        let arguments = Arguments::read(argv).unwrap_or_else(|e| panic!("{text}: {e}"));
        let words = compose(&arguments, flavour, 4, &["CAROLE_TRANSPORT", "CAROLE_LOG_LEVEL"], false)?;
        Ok(words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn each_launcher_is_told_in_its_own_words() {
        assert_eq!(
            line(
                Flavour::OpenMpi,
                "carolerun --mpi -np 4 -H a:2,b:2 --mpi-args=--report-bindings python x.py"
            )
            .unwrap(),
            "mpirun -np 4 -H a:2,b:2 --bind-to none --map-by slot -x CAROLE_TRANSPORT -x CAROLE_LOG_LEVEL \
             --report-bindings python x.py"
        );
        assert_eq!(
            line(Flavour::OpenMpi, "carolerun --mpi -np 4 --binding-args=--bind-to=socket x").unwrap(),
            "mpirun -np 4 -x CAROLE_TRANSPORT -x CAROLE_LOG_LEVEL --bind-to=socket x"
        );
        assert_eq!(
            line(Flavour::Hydra, "carolerun --mpi -np 4 --hostfile f x -y").unwrap(),
            "mpirun -np 4 -f f x -y"
        );
        assert_eq!(
            line(Flavour::Slurm, "carolerun --slurm -np 4 x").unwrap(),
            "srun --ntasks 4 --export ALL --kill-on-bad-exit=1 x"
        );
        assert_eq!(
            line(Flavour::Jsrun, "carolerun --jsrun -np 4 x").unwrap(),
            "jsrun --nrs 4 --tasks_per_rs 1 --env CAROLE_TRANSPORT --env CAROLE_LOG_LEVEL x"
        );
        assert!(
            line(Flavour::Slurm, "carolerun --slurm -np 4 -H a:4 x").unwrap_err().to_string().contains("-H")
        );
    }
}
