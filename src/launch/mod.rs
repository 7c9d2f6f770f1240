//! `carolerun`: starts the ranks of a job, on this host and on others, gives them their places, a rendezvous and a
//! secret, passes on what they write, forwards signals, and ends the job as a whole.
//!
//! Two processes look after the ranks of a host. The *launcher* (this module and `supervise`) talks to the user and
//! serves the rendezvous. Its child, the *guard*, is the parent of all ranks. Whichever of the two is killed,
//! the other one ends the job, so nothing is left behind. On another host an *agent* (`remote`) stands for the
//! launcher: it passes orders on to a guard there, and reports and output back. In an elastic job (`elastic`) agents
//! and ranks come and go while it runs.
#![deny(unsafe_code)]

mod args;
mod build;
mod doctor;
mod elastic;
mod ending;
mod guard;
mod help;
mod hosts;
mod link;
mod native;
mod output;
mod processes;
mod progress;
mod remote;
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
use hosts::Placement;
use link::Link;
use output::Stream;
use progress::Progress;
use remote::gather::Crew;
use remote::ssh::{self, Ssh};
use remote::ways::Ways;
use std::ffi::{OsStr, OsString};
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
pub fn main(mut argv: Vec<OsString>) -> i32 {
    if argv.get(1).is_some_and(|first| first == "--agent") {
        return remote::agent::main();
    }
    if let Some(topic) = help::asked(&argv) {
        return help::show(topic.as_deref());
    }
    let doctor = argv.get(1).is_some_and(|first| first == "doctor");
    if doctor {
        argv.remove(1);
    }
    let called = argv.first().cloned().unwrap_or_else(|| OsString::from("carolerun"));
    let arguments = match Arguments::read(argv) {
        Ok(arguments) => arguments,
        Err(error) => {
            // A closed standard output is no reason to fail.
            let _ = error.print();
            return error.exit_code();
        }
    };
    let result = if doctor { doctor::run(&arguments, &called) } else { run(&arguments, &called) };
    match result {
        Ok(code) => code,
        Err(error) => {
            complain(&error.to_string());
            USAGE
        }
    }
}

fn run(arguments: &Arguments, called: &OsStr) -> Result<i32> {
    if arguments.about.version {
        return Ok(print(&format!("carolerun {}\n", env!("CARGO_PKG_VERSION"))));
    }
    if arguments.about.manual {
        return Ok(print(&manual()));
    }
    if arguments.about.man_page {
        return Ok(print(&help::man_page()));
    }
    if let Some(shell) = arguments.about.completion {
        return Ok(print(&help::completion(shell)));
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
    if native::is_asked(arguments) {
        return match is_elastic {
            true => Err(Error::usage(
                "an elastic job is started by carolerun itself: leave --mpi, --slurm and --jsrun out",
            )),
            false => native::run(arguments, &config),
        };
    }
    let placements = if is_elastic {
        check_command(arguments, "--min-np 2").map(|()| Vec::new())
    } else {
        check(arguments)
    }?;
    if arguments.verbose {
        // The ranks give these warnings themselves.
        warnings.iter().for_each(|warning| complain(&warning.message));
    }
    let unused = arguments.unused.given();
    if !unused.is_empty() {
        complain(&format!("no effect in this version of Carole: {}", unused.join(", ")));
    }
    if is_elastic {
        return elastic::run(arguments, called, &config);
    }
    launch(arguments, called, &config, &placements)
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

/// Checks what was asked for, and says which ranks run where.
fn check(arguments: &Arguments) -> Result<Vec<Placement>> {
    let Some(size) = arguments.num_proc else {
        return Err(Error::usage(
            "-np N is missing: how many processes to start, as in carolerun -np 4 python train.py",
        ));
    };
    if size == 0 || size as usize > limits::RANKS_MAX {
        return Err(Error::usage(format!("-np {size}: a job has from 1 to {} processes", limits::RANKS_MAX)));
    }
    check_command(arguments, &format!("-np {size}"))?;
    let hosts = arguments.hosts.source().or_found(|name| std::env::var(name).ok()).read()?;
    hosts::assign(&hosts, size, hosts::is_this_host)
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

/// Reaches the other hosts, forks the guard, starts the rendezvous, and supervises the job to its end.
fn launch(arguments: &Arguments, called: &OsStr, config: &Config, placements: &[Placement]) -> Result<i32> {
    let size = placements.last().map_or(0, |placement| placement.ranks.end);
    let (open_files, _) = sys::open_files_limit();
    sys::set_open_files_limit(open_files.max(u64::from(size) * 4 + SPARE_FILES));
    let secret = Secret::mint()?;
    let signals =
        sys::Signals::block(&[&FORWARDED[..], &[libc::SIGCHLD, libc::SIGTTOU]].concat()).map_err(system)?;
    let mut crew = reach(arguments, called, config, placements, &signals)?;
    let (specs, mut streams) = make_streams(arguments, config, placements)?;
    let here = placements.iter().find(|placement| placement.local);
    let job = JobSpec {
        command: arguments.command.clone(),
        ranks: specs,
        removed: PLACE.to_vec(),
        shared: Vec::new(),
        secret: secret.to_hex(),
        keeps_stdin: size == 1,
        open_files,
        parcels: None,
    };
    // Nothing of ours may run between fork and this point in another thread: the rendezvous starts later.
    sys::set_subreaper(true);
    let mut links = Vec::new();
    if let Some(here) = here {
        let (link, kept) = fork_guard(job, here, &signals, streams)?;
        streams = kept;
        links.push(link);
    }
    let mut supervisor = Supervisor::new(supervise::Setup {
        links,
        signals: &signals,
        streams,
        command: arguments.command[0].clone(),
        kill_after: Duration::from_secs_f64(arguments.kill_after),
        verbose: arguments.verbose,
    })
    .map_err(system)?;
    // From here on the supervisor must see the guard out, whatever happens.
    let server = serve(config, &secret, size, placements.iter().any(|placement| !placement.local));
    let prepared = server.and_then(|server| {
        prepare(arguments, config, placements, &secret, &server, &mut crew, &mut supervisor)?;
        Ok(server)
    });
    let result = match &prepared {
        Ok(server) => {
            supervisor.add(crew.agents.drain(..).map(|agent| agent.link));
            supervisor.start(Progress::new(server.arrivals(), size as usize, arguments.verbose));
            Ok(supervisor.supervise())
        }
        Err(error) => {
            supervisor.abandon();
            Err(error.clone())
        }
    };
    drop(prepared);
    sys::set_subreaper(false);
    sys::set_open_files_limit(open_files);
    result
}

/// Starts an agent on every other host that gets ranks.
fn reach<'a>(
    arguments: &Arguments,
    called: &OsStr,
    config: &Config,
    placements: &[Placement],
    signals: &'a sys::Signals,
) -> Result<Crew<'a>> {
    let others = placements.iter().filter(|placement| !placement.local);
    let hosts: Vec<String> = others.map(|placement| placement.host.clone()).collect();
    let ssh = Ssh::new(arguments.hosts.ssh(), called, |name| std::env::var(name).ok())?;
    let limit = Duration::from_secs(config.start_timeout_s);
    let crew = Crew::connect(&ssh, &hosts, signals, limit, complain)?;
    let here = placements.iter().find(|placement| placement.local);
    remote::check_distinct(&crew, here.map(|placement| placement.host.as_str()))?;
    Ok(crew)
}

/// Finds the ways between the hosts and tells everybody its part; what is left is the order to start.
fn prepare(
    arguments: &Arguments,
    config: &Config,
    placements: &[Placement],
    secret: &Secret,
    server: &Server,
    crew: &mut Crew<'_>,
    supervisor: &mut Supervisor<'_>,
) -> Result<()> {
    let here = placements.iter().any(|placement| placement.local);
    if let Some(link) = supervisor.local() {
        link.rendezvous = address(server);
    }
    if crew.agents.is_empty() {
        return Ok(());
    }
    let ways = Ways::find(crew, secret, here, &arguments.hosts.network_interfaces)?;
    if let Some(complaint) = ways.complaint() {
        return Err(Error::usage(complaint));
    }
    let chosen = |host: usize| {
        let asked = !arguments.hosts.network_interfaces.is_empty();
        if asked { None } else { ways.interfaces(host) }
    };
    if let Some(link) = supervisor.local() {
        link.interfaces = chosen(0);
    }
    let mut others = placements.iter().filter(|placement| !placement.local);
    for (index, agent) in crew.agents.iter_mut().enumerate() {
        let reached = ways.reached(index + 1, 0);
        let serves = server.addresses().iter().filter(|a| reached.iter().any(|r| r.ip() == a.ip()));
        agent.link.rendezvous = serves.map(ToString::to_string).collect::<Vec<_>>().join(",");
        agent.link.interfaces = chosen(index + 1);
        let ranks = others.next().map_or(0..0, |placement| placement.ranks.clone());
        agent.link.ranks = ranks.start as usize..ranks.end as usize;
    }
    let settings = config.set_by(Layer::Flag);
    let directory = std::env::current_dir().unwrap_or_default();
    let shared = ssh::forwarded(std::env::vars_os());
    let task = remote::Task { command: &arguments.command, directory: &directory, shared: &shared };
    let variables = |rank| variables(rank, placements, &settings);
    for warning in remote::send(crew, placements, secret, &task, variables)? {
        supervisor.tell(&warning);
    }
    Ok(())
}

/// Forks the guard of this host. The streams belong to the launcher alone, which gets them back.
fn fork_guard(
    job: JobSpec,
    here: &Placement,
    signals: &sys::Signals,
    streams: Vec<[Stream; 2]>,
) -> Result<(Link, Vec<[Stream; 2]>)> {
    let (order_reader, order_writer) = pipe()?;
    let (report_reader, report_writer) = pipe()?;
    let pid = match sys::fork().map_err(system)? {
        sys::Fork::Child => {
            drop((order_writer, report_reader, streams));
            let life = std::panic::AssertUnwindSafe(|| {
                guard::run(job, File::from(order_reader), File::from(report_writer), signals);
            });
            sys::exit_now(if std::panic::catch_unwind(life).is_ok() { 0 } else { 101 });
        }
        sys::Fork::Parent(pid) => pid,
    };
    let ranks = here.ranks.start as usize..here.ranks.end as usize;
    Ok((Link::local(pid, order_writer, report_reader, ranks), streams))
}

/// Starts the rendezvous server, which lives as long as the job.
fn serve(config: &Config, secret: &Secret, size: u32, for_others: bool) -> Result<Server> {
    Server::start(ServerOptions {
        bind: if for_others { Bind::on(interfaces(config), 0) } else { Bind::Loopback(0) },
        secret: secret.clone().encrypting(config.encrypt),
        size,
        epoch: Epoch(0),
        once: false,
        start_timeout_ms: config.start_timeout_s.saturating_mul(1000),
        publish: None,
        warn: Arc::new(|words: &str| log::warn(format_args!("{words}"))),
    })
}

/// The interfaces that the job may use; empty for all.
fn interfaces(config: &Config) -> Vec<String> {
    config.interfaces.iter().map(ToString::to_string).collect()
}

fn address(server: &Server) -> String {
    server.addresses().iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// What all ranks write, and for those of this host the other ends of the pipes.
fn make_streams(
    arguments: &Arguments,
    config: &Config,
    placements: &[Placement],
) -> Result<(Vec<RankSpec>, Vec<[Stream; 2]>)> {
    let size = placements.last().map_or(0, |placement| placement.ranks.end);
    let timestamps = arguments.output.prefix_output_with_timestamp;
    let settings = config.set_by(Layer::Flag);
    let (mut specs, mut streams) = (Vec::new(), Vec::new());
    for (rank, local) in placements.iter().flat_map(|p| p.ranks.clone().map(|rank| (rank, p.local))) {
        let prefix = |name: &str| match arguments.plain_output {
            true => String::new(),
            false => format!("[{rank}]<{name}>:"),
        };
        let mut pair = if local {
            let (out_reader, stdout) = pipe()?;
            let (err_reader, stderr) = pipe()?;
            specs.push(RankSpec { variables: variables(rank, placements, &settings), stdout, stderr });
            for pipe in [&out_reader, &err_reader] {
                rustix::io::ioctl_fionbio(pipe, true).map_err(|e| system(e.into()))?;
            }
            [
                Stream::new(out_reader, prefix("stdout"), timestamps),
                Stream::new(err_reader, prefix("stderr"), timestamps),
            ]
        } else {
            [Stream::remote(prefix("stdout"), timestamps), Stream::remote(prefix("stderr"), timestamps)]
        };
        if let Some(directory) = &arguments.output.output_filename {
            copy_to_files(&mut pair, directory, rank, size)?;
        }
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

/// The variables of one rank.
fn variables(
    rank: u32,
    placements: &[Placement],
    settings: &[(&'static str, String)],
) -> Vec<(String, String)> {
    let mut variables = Vec::new();
    let size = placements.last().map_or(0, |placement| placement.ranks.end);
    let index = placements.iter().position(|p| p.ranks.contains(&rank)).expect("every rank has a place");
    let host = &placements[index];
    let local_rank = rank - host.ranks.start;
    let across =
        |hosts: &[Placement]| hosts.iter().filter(|p| p.ranks.len() as u32 > local_rank).count() as u32;
    let place = [
        ("RANK", rank),
        ("SIZE", size),
        ("LOCAL_RANK", local_rank),
        ("LOCAL_SIZE", host.ranks.len() as u32),
        ("CROSS_RANK", across(&placements[..index])),
        ("CROSS_SIZE", across(placements)),
    ];
    for (name, value) in place {
        variables.push((format!("CAROLE_{name}"), value.to_string()));
        // Scripts that were written for Horovod read these.
        variables.push((format!("HOROVOD_{name}"), value.to_string()));
    }
    variables.push(("HOROVOD_HOSTNAME".to_string(), host.host.clone()));
    if std::env::var_os("PYTHONUNBUFFERED").is_none() {
        // Python keeps what it prints to a pipe for a long time, and loses it when it is killed.
        variables.push(("PYTHONUNBUFFERED".to_string(), "1".to_string()));
    }
    variables.extend(settings.iter().map(|(name, value)| ((*name).to_string(), value.clone())));
    variables
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    open_pipe().map_err(|error| match error.raw_os_error() {
        Some(libc::EMFILE) => Error::usage(
            "there are too few file descriptors for so many processes; raise the limit with ulimit -n",
        ),
        _ => system(error),
    })
}

/// A pipe whose ends are not inherited.
fn open_pipe() -> std::io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?)
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
