//! The guard: a process between the launcher and the ranks. It starts them, reaps them, tells the launcher how
//! they ended, and adopts their orphans, so that when the launcher goes away, in whatever manner, it can kill
//! every descendant. When the guard itself is killed, the ranks die by their parent-death signal, and the
//! launcher, next in line, adopts and kills what is left.
//!
//! It is a forked copy of the launcher, made before the launcher has threads. It speaks lines of text:
//! orders come on one pipe (its end is the launcher's death), reports leave on another.
#![forbid(unsafe_code)]

use super::elastic::parcel;
use super::processes::{descendants, kill_descendants};
use super::sys::{self, Signals};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, kill_process_group, wait};
use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A process that does not die of SIGKILL sleeps in the kernel (a dead file system, say). After this long the
/// guard gives it up and says so.
const SWEEP: Duration = Duration::from_secs(10);

/// What the guard needs to start one rank.
pub struct RankSpec {
    /// Variables on top of the launcher's own.
    pub variables: Vec<(String, String)>,
    /// Its standard output.
    pub stdout: OwnedFd,
    /// Its standard error.
    pub stderr: OwnedFd,
}

/// What the guard needs to start the job.
pub struct JobSpec {
    /// The command and its arguments.
    pub command: Vec<OsString>,
    /// One for each rank.
    pub ranks: Vec<RankSpec>,
    /// Variables that ranks must not inherit.
    pub removed: Vec<&'static str>,
    /// Variables of all ranks, which come from another host.
    pub shared: Vec<(OsString, OsString)>,
    /// The job's secret, as the text that ranks read from their descriptor.
    pub secret: String,
    /// Whether the one rank there is reads the launcher's standard input.
    pub keeps_stdin: bool,
    /// The soft limit of open files that the launcher was started with.
    pub open_files: u64,
    /// Where orders to start one more come from, in a job whose workers come and go.
    pub parcels: Option<OwnedFd>,
}

/// A report of the guard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// A rank runs.
    Started { rank: usize, pid: i32 },
    /// A rank cannot be started.
    Refused { rank: usize, errno: i32 },
    /// A rank has ended with this code.
    Exited { rank: usize, code: i32 },
    /// A rank was ended by this signal.
    Killed { rank: usize, signal: i32 },
    /// So many descendants do not die.
    Left { count: usize },
}

impl Report {
    /// The report as a line.
    pub fn line(&self) -> String {
        match self {
            Report::Started { rank, pid } => format!("started {rank} {pid}\n"),
            Report::Refused { rank, errno } => format!("refused {rank} {errno}\n"),
            Report::Exited { rank, code } => format!("exited {rank} {code}\n"),
            Report::Killed { rank, signal } => format!("killed {rank} {signal}\n"),
            Report::Left { count } => format!("left {count} 0\n"),
        }
    }

    /// The rank that it is about.
    pub fn rank(&self) -> Option<usize> {
        match self {
            Report::Started { rank, .. }
            | Report::Refused { rank, .. }
            | Report::Exited { rank, .. }
            | Report::Killed { rank, .. } => Some(*rank),
            Report::Left { .. } => None,
        }
    }

    /// Reads a line again.
    pub fn parse(line: &str) -> Option<Report> {
        let mut words = line.split(' ');
        let word = words.next()?;
        let rank = words.next()?.parse().ok()?;
        let number = words.next()?.parse().ok()?;
        Some(match word {
            "started" => Report::Started { rank, pid: number },
            "refused" => Report::Refused { rank, errno: number },
            "exited" => Report::Exited { rank, code: number },
            "killed" => Report::Killed { rank, signal: number },
            "left" => Report::Left { count: rank },
            _ => return None,
        })
    }
}

/// An order to the guard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Start all ranks; the rendezvous server listens there, and links may use these interfaces (all where none are
    /// named).
    Start { rendezvous: String, interfaces: Option<String> },
    /// Send a signal to a rank, or to its whole process group.
    Signal { rank: usize, signal: i32, group: bool },
    /// Kill everything that is left, and end.
    Finish,
}

impl Order {
    /// The order as a line.
    pub fn line(&self) -> String {
        match self {
            Order::Start { rendezvous, interfaces } => {
                format!("start {rendezvous} {}\n", interfaces.as_deref().unwrap_or("-"))
            }
            Order::Signal { rank, signal, group } => format!("signal {rank} {signal} {}\n", u8::from(*group)),
            Order::Finish => "finish\n".to_string(),
        }
    }

    /// Reads a line again.
    pub fn parse(line: &str) -> Option<Order> {
        let mut words = line.split(' ');
        Some(match words.next()? {
            "start" => Order::Start {
                rendezvous: words.next()?.to_string(),
                interfaces: words.next().filter(|word| *word != "-").map(str::to_string),
            },
            "signal" => Order::Signal {
                rank: words.next()?.parse().ok()?,
                signal: words.next()?.parse().ok()?,
                group: words.next()? == "1",
            },
            "finish" => Order::Finish,
            _ => return None,
        })
    }
}

/// Splits a stream into lines.
#[derive(Default)]
pub struct Lines(Vec<u8>);

impl Lines {
    /// Reads once; `None` at the end of the stream.
    pub fn read(&mut self, mut from: &File) -> Option<Vec<String>> {
        let mut chunk = [0; 4096];
        match from.read(&mut chunk) {
            Ok(0) => return None,
            Ok(n) => self.0.extend_from_slice(&chunk[..n]),
            Err(e)
                if matches!(e.kind(), std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock) => {}
            Err(_) => return None,
        }
        let mut lines = Vec::new();
        while let Some(end) = self.0.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.0.drain(..=end).collect();
            lines.push(String::from_utf8_lossy(&line[..end]).into_owned());
        }
        Some(lines)
    }
}

/// The life of the guard. `signals` must hold SIGCHLD, and block those that a terminal sends to all.
pub fn run(mut job: JobSpec, orders: File, reports: File, signals: &Signals) {
    // Not "carolerun", so that `killall -9 carolerun` leaves somebody to clean up.
    sys::set_process_name(c"carole-guard");
    sys::set_subreaper(true);
    // The terminal's signals are for the launcher, which forwards them.
    let _ = rustix::process::setpgid(None, None);
    let mut guard = Guard { pids: vec![None; job.ranks.len()], reports };
    let mut lines = Lines::default();
    let parcels = job.parcels.take();
    loop {
        let mut fds = vec![PollFd::new(&orders, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        fds.extend(parcels.as_ref().map(|parcels| PollFd::new(parcels, PollFlags::IN)));
        if poll(&mut fds, None).is_err() {
            continue;
        }
        let has_orders = !fds[0].revents().is_empty();
        let has_parcel = fds.get(2).is_some_and(|fd| !fd.revents().is_empty());
        while signals.next().is_some() {}
        guard.reap();
        if let Some(parcels) = parcels.as_ref().filter(|_| has_parcel) {
            match parcel::receive(parcels) {
                Ok(Some((number, spec))) => guard.start_one(&job, number, spec),
                Ok(None) => break,
                Err(error) => unreachable!("the launcher sends only orders: {error}"),
            }
        }
        if !has_orders {
            continue;
        }
        let Some(received) = lines.read(&orders) else { break };
        for line in received {
            match Order::parse(&line) {
                Some(Order::Start { rendezvous, interfaces }) => {
                    guard.start(&mut job, &rendezvous, interfaces.as_deref());
                }
                Some(Order::Signal { rank, signal, group }) => guard.signal(rank, signal, group),
                Some(Order::Finish) => return guard.sweep(signals),
                None => unreachable!("the launcher sends only orders"),
            }
        }
    }
    guard.sweep(signals);
}

struct Guard {
    /// The process of each rank that runs and has not been reaped.
    pids: Vec<Option<Pid>>,
    reports: File,
}

impl Guard {
    fn report(&mut self, report: &Report) {
        // When the launcher is gone there is nobody to tell; the end of its orders says so too.
        let _ = self.reports.write_all(report.line().as_bytes());
    }

    fn start(&mut self, job: &mut JobSpec, rendezvous: &str, interfaces: Option<&str>) {
        for (rank, spec) in std::mem::take(&mut job.ranks).into_iter().enumerate() {
            match start_rank(job, spec, rendezvous, interfaces) {
                Ok(pid) => {
                    self.pids[rank] = Pid::from_raw(pid);
                    self.report(&Report::Started { rank, pid });
                }
                Err(error) => {
                    let errno = error.raw_os_error().unwrap_or(libc::EINVAL);
                    self.report(&Report::Refused { rank, errno });
                    // What cannot be started once cannot be started again.
                    return;
                }
            }
        }
    }

    /// Starts a worker. Its variables say where the rendezvous is.
    fn start_one(&mut self, job: &JobSpec, number: usize, spec: RankSpec) {
        if self.pids.len() <= number {
            self.pids.resize(number + 1, None);
        }
        let rendezvous = spec.variables.iter().find(|(name, _)| name == "CAROLE_RENDEZVOUS");
        let rendezvous = rendezvous.map_or(String::new(), |(_, value)| value.clone());
        match start_rank(job, spec, &rendezvous, None) {
            Ok(pid) => {
                self.pids[number] = Pid::from_raw(pid);
                self.report(&Report::Started { rank: number, pid });
            }
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EINVAL);
                self.report(&Report::Refused { rank: number, errno });
            }
        }
    }

    /// Only processes that have not been reaped are signalled, so that no stranger with the same id is hit.
    fn signal(&self, rank: usize, signal: i32, group: bool) {
        let (Some(Some(pid)), Some(signal)) = (self.pids.get(rank), Signal::from_named_raw(signal)) else {
            return;
        };
        // It may have ended already.
        let _ = if group { kill_process_group(*pid, signal) } else { kill_process(*pid, signal) };
    }

    /// Takes the results of all children that have ended, ranks and adopted orphans.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let Some(rank) = self.pids.iter().position(|known| *known == Some(pid)) else { continue };
            self.pids[rank] = None;
            let report = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Report::Exited { rank, code },
                (_, Some(signal)) => Report::Killed { rank, signal },
                _ => continue,
            };
            self.report(&report);
        }
    }

    /// Kills all descendants, until there are none.
    fn sweep(&mut self, signals: &Signals) {
        let me = rustix::process::getpid().as_raw_nonzero().get();
        let nobody = HashSet::new();
        let deadline = Instant::now() + SWEEP;
        loop {
            let killed = kill_descendants(me, &nobody);
            while signals.next().is_some() {}
            self.reap();
            if descendants(me).is_empty() {
                return;
            }
            if Instant::now() > deadline {
                return self.report(&Report::Left { count: killed });
            }
            // The end of a child wakes; that of a grandchild, which is adopted first, does too.
            let mut fds = [PollFd::new(signals, PollFlags::IN)];
            let _ = poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 20_000_000 }));
        }
    }
}

fn start_rank(
    job: &JobSpec,
    spec: RankSpec,
    rendezvous: &str,
    interfaces: Option<&str>,
) -> std::io::Result<i32> {
    let secret = secret_descriptor(&job.secret)?;
    let mut command = Command::new(&job.command[0]);
    command.args(&job.command[1..]);
    command.envs(job.shared.iter().map(|(name, value)| (name, value)));
    for name in &job.removed {
        command.env_remove(name);
    }
    command.envs(interfaces.map(|list| ("CAROLE_INTERFACES", list)));
    command.envs(spec.variables);
    command.env("CAROLE_RENDEZVOUS", rendezvous);
    command.env("CAROLE_SECRET_FD", secret.as_raw_fd().to_string());
    command.stdin(if job.keeps_stdin { Stdio::inherit() } else { Stdio::null() });
    command.stdout(spec.stdout).stderr(spec.stderr);
    sys::prepare_rank(&mut command, &secret, job.open_files);
    // The child is reaped by wait() for all children, so its handle is not needed.
    command.spawn().map(|child| child.id() as i32)
}

/// A sealed memory file: each rank has its own, so that ranks do not share a position.
fn secret_descriptor(secret: &str) -> std::io::Result<OwnedFd> {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    let fd = memfd_create("carole-secret", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(fd);
    file.write_all(secret.as_bytes())?;
    file.rewind()?;
    fcntl_add_seals(file.as_fd(), SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_and_reports_are_read_as_they_were_written() {
        let orders = [
            Order::Start { rendezvous: "127.0.0.1:1".to_string(), interfaces: None },
            Order::Start {
                rendezvous: "[fd00::1]:1".to_string(),
                interfaces: Some("10.0.0.1,eth0".to_string()),
            },
            Order::Signal { rank: 3, signal: 15, group: true },
            Order::Signal { rank: 0, signal: 10, group: false },
            Order::Finish,
        ];
        for order in orders {
            assert_eq!(Order::parse(order.line().trim_end()), Some(order));
        }
        let reports = [
            Report::Started { rank: 1, pid: 77 },
            Report::Refused { rank: 1, errno: 2 },
            Report::Exited { rank: 2, code: 255 },
            Report::Killed { rank: 2, signal: 9 },
            Report::Left { count: 4 },
        ];
        for report in reports {
            assert_eq!(Report::parse(report.line().trim_end()), Some(report));
        }
        assert_eq!(Report::parse("exited x 1"), None);
    }
}
