//! `carolerun`: starts the ranks of a job on this host, gives them their places, a rendezvous and a secret,
//! passes on what they write, forwards signals, and ends the job as a whole.
//!
//! Two processes look after the ranks. The *launcher* (this module and [`supervise`]) talks to the user and
//! serves the rendezvous. Its child, the *guard*, is the parent of all ranks. Whichever of the two is killed,
//! the other one ends the job, so nothing is left behind.
#![deny(unsafe_code)]

mod args;
mod build;
mod elastic;
mod guard;
mod hosts;
mod output;
mod processes;
mod supervise;
#[allow(unsafe_code)]
mod sys;
mod verdict;

use crate::config::{Config, Layer, environment, manual};
use crate::error::{Error, Result};
use crate::limits;
use crate::log;
use crate::rendezvous::secret::Secret;
use crate::rendezvous::server::{Bind, Server, ServerOptions};
use crate::types::Epoch;
use args::Arguments;
use guard::{JobSpec, RankSpec};
use output::Stream;
use std::ffi::OsString;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use supervise::Supervisor;

/// The exit code for wrong arguments, as of most commands.
const USAGE: i32 = 2;
/// What the launcher needs besides four descriptors for each rank.
const SPARE_FILES: u64 = 64;
/// Signals that the launcher forwards.
const FORWARDED: [i32; 6] =
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];

/// The whole of `carolerun`: takes argv, returns the exit code.
pub fn main(argv: Vec<OsString>) -> i32 {
    let arguments = match Arguments::read(argv) {
        Ok(arguments) => arguments,
        Err(error) => {
            // A closed standard output is no reason to fail.
            let _ = error.print();
            return error.exit_code();
        }
    };
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            complain(&error.to_string());
            USAGE
        }
    }
}

fn run(arguments: &Arguments) -> Result<i32> {
    if arguments.about.version {
        return Ok(print(&format!("carolerun {}\n", env!("CARGO_PKG_VERSION"))));
    }
    if arguments.about.manual {
        return Ok(print(&manual()));
    }
    if arguments.about.check_build {
        return Ok(print(&build::report()));
    }
    let (config, warnings) = Config::load_with_flags(&[], &arguments.settings(), job_environment())?;
    log::configure(&config);
    if arguments.about.print_config {
        warnings.iter().for_each(|warning| complain(&warning.message));
        return Ok(print(&config.print_config()));
    }
    let is_elastic = elastic::is_elastic(arguments);
    let size =
        if is_elastic { check_command(arguments, "--min-np 2").map(|()| 0) } else { check(arguments) }?;
    if arguments.verbose {
        // The ranks give these warnings themselves.
        warnings.iter().for_each(|warning| complain(&warning.message));
    }
    let unused = arguments.unused.given();
    if !unused.is_empty() {
        complain(&format!("no effect in this version of Carole: {}", unused.join(", ")));
    }
    if is_elastic {
        return elastic::run(arguments, &config);
    }
    launch(arguments, &config, size)
}

/// The environment without the place of another job: carolerun may itself be started by a rank.
fn job_environment() -> impl Iterator<Item = (String, String)> {
    environment().filter(|(name, _)| !PLACE.contains(&name.as_str()))
}

/// What the launcher decides for each rank.
const PLACE: [&str; 22] = [
    "CAROLE_WORKER",
    "HOROVOD_ELASTIC",
    "CAROLE_RANK",
    "CAROLE_SIZE",
    "CAROLE_LOCAL_RANK",
    "CAROLE_LOCAL_SIZE",
    "CAROLE_CROSS_RANK",
    "CAROLE_CROSS_SIZE",
    "CAROLE_RENDEZVOUS",
    "CAROLE_RENDEZVOUS_PORT",
    "CAROLE_SECRET_FD",
    "CAROLE_SECRET_FILE",
    "CAROLE_JOB",
    "HOROVOD_RANK",
    "HOROVOD_SIZE",
    "HOROVOD_LOCAL_RANK",
    "HOROVOD_LOCAL_SIZE",
    "HOROVOD_CROSS_RANK",
    "HOROVOD_CROSS_SIZE",
    "HOROVOD_HOSTNAME",
    "HOROVOD_GLOO_RENDEZVOUS_ADDR",
    "HOROVOD_GLOO_RENDEZVOUS_PORT",
];

/// Checks what was asked for, and says how many ranks there will be.
fn check(arguments: &Arguments) -> Result<u32> {
    let Some(size) = arguments.num_proc else {
        return Err(Error::usage(
            "-np N is missing: how many processes to start, as in carolerun -np 4 python train.py",
        ));
    };
    if size == 0 || size as usize > limits::RANKS_MAX {
        return Err(Error::usage(format!("-np {size}: a job has from 1 to {} processes", limits::RANKS_MAX)));
    }
    check_command(arguments, &format!("-np {size}"))?;
    let this_host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if let Some(list) = &arguments.hosts.hosts {
        hosts::check_hosts(list, size, &this_host)?;
    }
    if let Some(path) = &arguments.hosts.hostfile {
        hosts::check_hostfile(path, size, &this_host)?;
    }
    Ok(size)
}

/// Checks what jobs of every kind need.
fn check_command(arguments: &Arguments, flags: &str) -> Result<()> {
    if arguments.command.is_empty() {
        return Err(Error::usage(format!(
            "there is no command to run, as in carolerun {flags} python train.py"
        )));
    }
    if !(arguments.kill_after >= 0.0 && arguments.kill_after <= 86_400.0) {
        return Err(Error::usage(format!(
            "--kill-after {}: a number of seconds up to a day",
            arguments.kill_after
        )));
    }
    Ok(())
}

/// Forks the guard, starts the rendezvous, and supervises the job to its end.
fn launch(arguments: &Arguments, config: &Config, size: u32) -> Result<i32> {
    let (open_files, _) = sys::open_files_limit();
    sys::set_open_files_limit(open_files.max(u64::from(size) * 4 + SPARE_FILES));
    let secret = Secret::mint()?;
    let (specs, streams) = make_streams(arguments, config, size)?;
    let job = JobSpec {
        command: arguments.command.clone(),
        ranks: specs,
        removed: PLACE.to_vec(),
        secret: secret.to_hex(),
        keeps_stdin: size == 1,
        open_files,
        parcels: None,
    };
    let (order_reader, order_writer) = pipe()?;
    let (report_reader, report_writer) = pipe()?;
    let signals =
        sys::Signals::block(&[&FORWARDED[..], &[libc::SIGCHLD, libc::SIGTTOU]].concat()).map_err(system)?;
    // Nothing of ours may run between fork and this point in another thread: the rendezvous starts later.
    sys::set_subreaper(true);
    let guard = match sys::fork().map_err(system)? {
        sys::Fork::Child => {
            drop((order_writer, report_reader, streams));
            let life = std::panic::AssertUnwindSafe(|| {
                guard::run(job, File::from(order_reader), File::from(report_writer), &signals);
            });
            sys::exit_now(if std::panic::catch_unwind(life).is_ok() { 0 } else { 101 });
        }
        sys::Fork::Parent(pid) => pid,
    };
    drop((job, order_reader, report_writer));
    let mut supervisor = Supervisor::new(supervise::Setup {
        guard,
        orders: File::from(order_writer),
        reports: File::from(report_reader),
        signals,
        streams,
        command: arguments.command[0].clone(),
        kill_after: Duration::from_secs_f64(arguments.kill_after),
        verbose: arguments.verbose,
    })
    .map_err(system)?;
    // From here on the supervisor must see the guard out, whatever happens.
    let server = serve(config, secret, size);
    let result = match &server {
        Ok(server) => {
            supervisor.start(&address(server));
            Ok(supervisor.supervise())
        }
        Err(error) => {
            supervisor.abandon();
            Err(error.clone())
        }
    };
    drop(server);
    sys::set_subreaper(false);
    sys::set_open_files_limit(open_files);
    result
}

/// Starts the rendezvous server, which lives as long as the job.
fn serve(config: &Config, secret: Secret, size: u32) -> Result<Server> {
    Server::start(ServerOptions {
        bind: Bind::Loopback(0),
        secret,
        size,
        epoch: Epoch(0),
        once: false,
        start_timeout_ms: config.start_timeout_s.saturating_mul(1000),
        publish: None,
        warn: Arc::new(|words: &str| log::warn(format_args!("{words}"))),
    })
}

fn address(server: &Server) -> String {
    server.addresses().iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// The pipes of all ranks: the ends for the ranks, and the ends for us.
fn make_streams(
    arguments: &Arguments,
    config: &Config,
    size: u32,
) -> Result<(Vec<RankSpec>, Vec<[Stream; 2]>)> {
    let timestamps = arguments.output.prefix_output_with_timestamp;
    let settings = config.set_by(Layer::Flag);
    let (mut specs, mut streams) = (Vec::new(), Vec::new());
    for rank in 0..size {
        let (out_reader, stdout) = pipe()?;
        let (err_reader, stderr) = pipe()?;
        let prefix = |name: &str| match arguments.plain_output {
            true => String::new(),
            false => format!("[{rank}]<{name}>:"),
        };
        let mut pair = [
            Stream::new(out_reader, prefix("stdout"), timestamps),
            Stream::new(err_reader, prefix("stderr"), timestamps),
        ];
        if let Some(directory) = &arguments.output.output_filename {
            copy_to_files(&mut pair, directory, rank, size)?;
        }
        for stream in &pair {
            let pipe = stream.pipe().expect("a new stream has its pipe");
            rustix::io::ioctl_fionbio(pipe, true).map_err(|e| system(e.into()))?;
        }
        specs.push(RankSpec { variables: variables(rank, size, &settings), stdout, stderr });
        streams.push(pair);
    }
    Ok((specs, streams))
}

fn copy_to_files(pair: &mut [Stream; 2], directory: &Path, rank: u32, size: u32) -> Result<()> {
    let width = (size - 1).to_string().len();
    let directory = directory.join(format!("rank.{rank:0width$}"));
    let failed = |e: std::io::Error| {
        Error::usage(format!("--output-filename: '{}' cannot be written: {e}", directory.display()))
    };
    std::fs::create_dir_all(&directory).map_err(failed)?;
    for (stream, name) in pair.iter_mut().zip(["stdout", "stderr"]) {
        stream.copy_to(&directory.join(name)).map_err(failed)?;
    }
    Ok(())
}

/// The variables of one rank. All ranks are on one host, so the local place is the place.
fn variables(rank: u32, size: u32, settings: &[(&'static str, String)]) -> Vec<(String, String)> {
    let mut variables = Vec::new();
    let place = [
        ("RANK", rank),
        ("SIZE", size),
        ("LOCAL_RANK", rank),
        ("LOCAL_SIZE", size),
        ("CROSS_RANK", 0),
        ("CROSS_SIZE", 1),
    ];
    for (name, value) in place {
        variables.push((format!("CAROLE_{name}"), value.to_string()));
        // Scripts that were written for Horovod read these.
        variables.push((format!("HOROVOD_{name}"), value.to_string()));
    }
    variables.push(("HOROVOD_HOSTNAME".to_string(), "localhost".to_string()));
    if std::env::var_os("PYTHONUNBUFFERED").is_none() {
        // Python keeps what it prints to a pipe for a long time, and loses it when it is killed.
        variables.push(("PYTHONUNBUFFERED".to_string(), "1".to_string()));
    }
    variables.extend(settings.iter().map(|(name, value)| ((*name).to_string(), value.clone())));
    variables
}

/// A pipe whose ends are not inherited.
fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|errno| match errno {
        rustix::io::Errno::MFILE => Error::usage(
            "there are too few file descriptors for so many processes; raise the limit with ulimit -n",
        ),
        errno => system(errno.into()),
    })
}

fn system(error: std::io::Error) -> Error {
    Error::usage(format!("the operating system refuses what carolerun needs: {error}"))
}

/// Whether the launcher's standard input is a terminal that belongs to it.
fn owns_terminal() -> bool {
    let stdin = std::io::stdin();
    stdin.is_terminal() && rustix::termios::tcgetpgrp(stdin.as_fd()).ok() == Some(rustix::process::getpgrp())
}

fn complain(words: &str) {
    let _ = writeln!(std::io::stderr().lock(), "carolerun: {words}");
}

fn print(text: &str) -> i32 {
    // A reader that has seen enough (`| head`) is no error.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    0
}
