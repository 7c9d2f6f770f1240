//! The agent: `carolerun` on another host, started by ssh, that does there what the launcher does here. It reads its
//! orders from standard input and writes reports, and what its ranks write, to standard output. Its life hangs on
//! the connection: when standard input ends, or nothing has come for a minute, it ends its ranks and itself.
#![forbid(unsafe_code)]

use super::super::guard::{self, JobSpec, Lines, Order, RankSpec, Report};
use super::super::output::Sink;
use super::super::processes::{descendants, kill_descendants};
use super::super::sys::{self, Signals};
use super::super::{FORWARDED, PLACE, SPARE_FILES, open_pipe};
use super::facts;
use super::probe::{self, Answerer};
use super::words::{BLOCK_BYTES_MAX, GREETING, PROTOCOL, block_head, escape, unescape, unescape_text};
use super::{PING_EVERY, SILENCE_AGENT};
use crate::rendezvous::secret::Secret;
use crate::rendezvous::{build, listen};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, WaitOptions, waitpid};
use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long output is awaited when all processes have ended: somebody outside the job may hold a pipe.
const DRAIN: Duration = Duration::from_secs(1);
/// How much of a rank's output is passed on before its end is reported.
const READS_BEFORE_REPORT: usize = 64;
/// How long the last words may take to leave.
const FLUSH: Duration = Duration::from_secs(5);

/// The whole of `carolerun --agent`.
pub fn main() -> i32 {
    match live() {
        Ok(()) => 0,
        Err(error) => {
            let _ = writeln!(std::io::stderr().lock(), "the agent ends: {error}");
            1
        }
    }
}

fn live() -> std::io::Result<()> {
    let signals = Signals::block(&[&FORWARDED[..], &[libc::SIGCHLD]].concat())?;
    let orders = File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut job = Job::default();
    let mut lines = Lines::default();
    let hello = format!(
        "{GREETING} {PROTOCOL} {} {} {}\n",
        escape(build().as_bytes()),
        escape(host_id().as_bytes()),
        escape(listen::hostname().as_bytes())
    );
    answer(&hello)?;
    let mut early = Vec::new();
    let start = 'start: loop {
        let mut fds = [PollFd::new(&orders, PollFlags::IN), PollFd::new(&signals, PollFlags::IN)];
        if poll(&mut fds, Some(&timespec(SILENCE_AGENT))) == Ok(0) {
            return Err(std::io::Error::other("the launcher has not been heard of for a minute"));
        }
        if !fds[1].revents().is_empty() && ended_by_signal(&signals) {
            return Ok(());
        }
        if fds[0].revents().is_empty() {
            continue;
        }
        let Some(received) = lines.read(&orders) else { return Ok(()) };
        let mut received = received.into_iter();
        while let Some(line) = received.next() {
            if let Some(start @ Order::Start { .. }) = Order::parse(&line) {
                early.extend(received);
                break 'start start;
            }
            match job.prepare(&line) {
                Some(words) => answer(&words)?,
                None => return Err(std::io::Error::other("the launcher's order is malformed")),
            }
        }
    };
    // Its thread must not be there when the guard is forked.
    job.answerer = None;
    let mut relay = Relay::start(job, orders, lines, signals)?;
    relay.order(&start);
    early.iter().for_each(|line| relay.on_order(line));
    relay.run();
    Ok(())
}

/// Ranks of this host share memory when this text is the same; see [`listen::host_id`].
pub fn host_id() -> String {
    std::env::var("CAROLE_HOST_ID").ok().filter(|id| !id.is_empty()).unwrap_or_else(listen::host_id)
}

fn answer(words: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(words.as_bytes())?;
    stdout.flush()
}

fn ended_by_signal(signals: &Signals) -> bool {
    let mut ended = false;
    while let Some(signal) = signals.next() {
        ended |= signal != libc::SIGCHLD;
    }
    ended
}

fn timespec(time: Duration) -> Timespec {
    // Rounded up, or the loop would turn until the deadline is truly over.
    let time = time + Duration::from_millis(1);
    Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() }
}

/// What the agent is told before it starts anything.
#[derive(Default)]
struct Job {
    secret: Option<Secret>,
    answerer: Option<Answerer>,
    command: Vec<OsString>,
    shared: Vec<(OsString, OsString)>,
    ranks: Vec<Vec<(String, String)>>,
}

impl Job {
    /// Obeys an order that comes before the start, and gives the answer, which may be empty.
    fn prepare(&mut self, line: &str) -> Option<String> {
        let (order, rest) = line.split_once(' ').unwrap_or((line, ""));
        let words: Vec<&str> = rest.split(' ').filter(|word| !word.is_empty()).collect();
        match order {
            "ping" => return Some("pong\n".to_owned()),
            "secret" => self.secret = Some(Secret::from_hex(rest).ok()?),
            "serve" => return self.serve(&words),
            "reach" => return self.reach(&words),
            "measure" => return self.measure(&words),
            "facts" => return Some(format!("facts {}\n", facts::encode())),
            "directory" => {
                let path = PathBuf::from(OsString::from_vec(unescape(words.first()?)?));
                return Some(match std::env::set_current_dir(&path) {
                    Ok(()) => "entered\n".to_owned(),
                    Err(e) => format!("absent {}\n", escape(e.to_string().as_bytes())),
                });
            }
            "command" => {
                let words: Option<Vec<_>> = words.iter().map(|word| unescape(word)).collect();
                self.command = words?.into_iter().map(OsString::from_vec).collect();
            }
            "variable" => {
                let [name, value] = words[..] else { return None };
                let os = |word| unescape(word).map(OsString::from_vec);
                self.shared.push((os(name)?, os(value)?));
            }
            "rank" => {
                let pairs = words.chunks_exact(2);
                let pair = |pair: &[&str]| Some((unescape_text(pair[0])?, unescape_text(pair[1])?));
                self.ranks.push(pairs.map(pair).collect::<Option<_>>()?);
            }
            _ => return None,
        }
        Some(String::new())
    }

    fn serve(&mut self, words: &[&str]) -> Option<String> {
        let name = unescape_text(words.first()?)?;
        let interfaces: Option<Vec<String>> = words[1..].iter().map(|word| unescape_text(word)).collect();
        Some(match Answerer::start(self.secret.clone()?, name, &interfaces?) {
            Ok(answerer) => {
                let addresses: Vec<String> = answerer.addresses().iter().map(ToString::to_string).collect();
                self.answerer = Some(answerer);
                format!("serving {}\n", addresses.join(" "))
            }
            Err(e) => format!("mute {}\n", escape(e.to_string().as_bytes())),
        })
    }

    fn reach(&self, words: &[&str]) -> Option<String> {
        let (name, addresses) = words.split_first()?;
        let addresses: Option<Vec<SocketAddr>> = addresses.iter().map(|word| word.parse().ok()).collect();
        let found = probe::reach(self.secret.as_ref()?, &unescape_text(name)?, &addresses?);
        let parts: Vec<String> = found
            .into_iter()
            .map(|(address, reached)| match reached {
                Ok(()) => format!("{address} %"),
                Err(why) => format!("{address} {}", escape(why.as_bytes())),
            })
            .collect();
        Some(format!("reached {name} {}\n", parts.join(" ")))
    }

    fn measure(&self, words: &[&str]) -> Option<String> {
        let [name, address] = words[..] else { return None };
        let measured = probe::measure(self.secret.as_ref()?, &unescape_text(name)?, address.parse().ok()?);
        Some(match measured {
            Ok(m) => format!("measured {name} {} {} {}\n", m.latency_us, m.bytes_per_s, m.segment_bytes),
            Err(why) => format!("unmeasured {name} {}\n", escape(why.as_bytes())),
        })
    }
}

/// A running job: between the launcher's orders and the guard, and between the ranks and the launcher.
struct Relay {
    guard: i32,
    to_guard: File,
    from_guard: File,
    guard_lines: Lines,
    orders: Option<File>,
    order_lines: Lines,
    out: Sink,
    pipes: Vec<[Option<File>; 2]>,
    signals: Signals,
    heard: Instant,
    guard_gone: bool,
    ending: bool,
    drained_by: Option<Instant>,
}

impl Relay {
    fn start(job: Job, orders: File, order_lines: Lines, signals: Signals) -> std::io::Result<Relay> {
        let (open_files, _) = sys::open_files_limit();
        sys::set_open_files_limit(open_files.max(job.ranks.len() as u64 * 4 + SPARE_FILES));
        let (mut specs, mut pipes) = (Vec::new(), Vec::new());
        for variables in job.ranks {
            let ((out_reader, stdout), (err_reader, stderr)) = (open_pipe()?, open_pipe()?);
            specs.push(RankSpec { variables, stdout, stderr });
            let reader = |end: OwnedFd| rustix::io::ioctl_fionbio(&end, true).map(|()| Some(File::from(end)));
            pipes.push([reader(out_reader)?, reader(err_reader)?]);
        }
        let spec = JobSpec {
            command: job.command,
            ranks: specs,
            removed: PLACE.to_vec(),
            shared: job.shared,
            secret: job.secret.map(|secret| secret.to_hex()).unwrap_or_default(),
            keeps_stdin: false,
            open_files,
            parcels: None,
        };
        let ((order_reader, to_guard), (from_guard, report_writer)) = (open_pipe()?, open_pipe()?);
        sys::set_subreaper(true);
        let guard = match sys::fork()? {
            sys::Fork::Child => {
                drop((to_guard, from_guard, pipes, orders));
                let life = std::panic::AssertUnwindSafe(|| {
                    guard::run(spec, File::from(order_reader), File::from(report_writer), &signals);
                });
                sys::exit_now(if std::panic::catch_unwind(life).is_ok() { 0 } else { 101 });
            }
            sys::Fork::Parent(pid) => pid,
        };
        Ok(Relay {
            guard,
            to_guard: File::from(to_guard),
            from_guard: File::from(from_guard),
            guard_lines: Lines::default(),
            orders: Some(orders),
            order_lines,
            out: Sink::new(std::io::stdout().as_fd().try_clone_to_owned()?),
            pipes,
            signals,
            heard: Instant::now(),
            guard_gone: false,
            ending: false,
            drained_by: None,
        })
    }

    /// Until nothing of the job is left here.
    fn run(&mut self) {
        while !self.is_over() {
            self.wait();
            let now = Instant::now();
            if self.orders.is_some() && now.duration_since(self.heard) >= SILENCE_AGENT {
                self.end("the launcher has not been heard of for a minute");
            }
            if self.drained_by.is_some_and(|by| by <= now) {
                self.pipes.iter_mut().flatten().for_each(|pipe| *pipe = None);
                if self.guard_gone && self.drained_by.is_some_and(|by| by + FLUSH <= now) {
                    return;
                }
            }
        }
    }

    fn is_over(&self) -> bool {
        let open = self.pipes.iter().flatten().any(Option::is_some);
        self.guard_gone && !open && self.out.is_empty()
    }

    fn wait(&mut self) {
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN)];
        let mut meaning = vec![Ready::Signals];
        if let Some(orders) = &self.orders {
            fds.push(PollFd::new(orders, PollFlags::IN));
            meaning.push(Ready::Orders);
        }
        if !self.guard_gone {
            fds.push(PollFd::new(&self.from_guard, PollFlags::IN));
            meaning.push(Ready::Guard);
        }
        if !self.out.is_empty() {
            fds.push(PollFd::from_borrowed_fd(self.out.descriptor(), PollFlags::OUT));
            meaning.push(Ready::Out);
        }
        for (rank, pair) in self.pipes.iter().enumerate().filter(|_| !self.out.is_full()) {
            for (stream, pipe) in pair.iter().enumerate() {
                if let Some(pipe) = pipe {
                    fds.push(PollFd::new(pipe, PollFlags::IN));
                    meaning.push(Ready::Pipe(rank, stream));
                }
            }
        }
        let until = self.drained_by.map_or(PING_EVERY, |by| {
            by.saturating_duration_since(Instant::now()).max(Duration::from_millis(100)).min(PING_EVERY)
        });
        if poll(&mut fds, Some(&timespec(until))).is_err() {
            return;
        }
        let ready = fds.iter().zip(meaning).filter(|(fd, _)| !fd.revents().is_empty());
        let ready: Vec<Ready> = ready.map(|(_, meaning)| meaning).collect();
        drop(fds);
        ready.into_iter().for_each(|ready| self.on_ready(ready));
    }

    fn on_ready(&mut self, ready: Ready) {
        match ready {
            Ready::Signals => {
                if ended_by_signal(&self.signals) {
                    self.end("it was told to end by a signal");
                }
            }
            Ready::Orders => {
                let Some(orders) = &self.orders else { return };
                match self.order_lines.read(orders) {
                    Some(lines) => {
                        self.heard = Instant::now();
                        lines.iter().for_each(|line| self.on_order(line));
                    }
                    // The launcher or ssh has gone; there is nobody to tell.
                    None => self.end(""),
                }
            }
            Ready::Guard => match self.guard_lines.read(&self.from_guard) {
                Some(lines) => lines.iter().for_each(|line| self.on_report(line)),
                None => self.on_guard_gone(),
            },
            Ready::Out => {
                self.out.write_some();
                if self.out.is_closed() {
                    self.end("");
                }
            }
            Ready::Pipe(rank, stream) => drop(self.pass(rank, stream)),
        }
    }

    fn on_order(&mut self, line: &str) {
        match Order::parse(line) {
            _ if line == "ping" => self.out.push(&[b"pong\n"]),
            Some(Order::Start { .. }) | None => self.end("the launcher's order is malformed"),
            Some(order) => self.order(&order),
        }
    }

    fn order(&mut self, order: &Order) {
        // A guard that has gone is noticed by the end of its reports.
        let _ = self.to_guard.write_all(order.line().as_bytes());
    }

    fn on_report(&mut self, line: &str) {
        if let Some(Report::Exited { rank, .. } | Report::Killed { rank, .. }) = Report::parse(line) {
            // What it wrote before it ended is in the pipes; children of it may go on writing.
            for stream in 0..2 {
                for _ in 0..READS_BEFORE_REPORT {
                    if self.out.is_full() || !self.pass(rank, stream) {
                        break;
                    }
                }
            }
        }
        self.out.push(&[line.as_bytes(), b"\n"]);
    }

    /// Passes on what a rank has written; `false` when there was nothing.
    fn pass(&mut self, rank: usize, stream: usize) -> bool {
        let Some(pipe) = self.pipes.get_mut(rank).map(|pair| &mut pair[stream]) else { return false };
        let Some(file) = pipe else { return false };
        let mut block = [0; 16 << 10];
        const { assert!(16 << 10 <= BLOCK_BYTES_MAX) };
        match file.read(&mut block) {
            Ok(0) => *pipe = None,
            Ok(n) => self.out.push(&[block_head(rank, stream, n).as_bytes(), &block[..n]]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return false,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => *pipe = None,
        }
        true
    }

    /// Ends the ranks, for a reason that the launcher may not know.
    fn end(&mut self, why: &str) {
        self.orders = None;
        if !std::mem::replace(&mut self.ending, true) {
            if !why.is_empty() {
                let _ = writeln!(std::io::stderr().lock(), "the agent ends: {why}");
            }
            self.order(&Order::Finish);
        }
    }

    /// The guard has ended: as it should, or killed. Then its orphans are ours.
    fn on_guard_gone(&mut self) {
        self.guard_gone = true;
        let me = rustix::process::getpid().as_raw_nonzero().get();
        let nobody = HashSet::new();
        let deadline = Instant::now() + FLUSH;
        while kill_descendants(me, &nobody) > 0 && Instant::now() < deadline {
            let mut fds = [PollFd::new(&self.signals, PollFlags::IN)];
            let _ = poll(&mut fds, Some(&timespec(Duration::from_millis(10))));
            while self.signals.next().is_some() {}
            for process in descendants(me).iter().filter(|p| p.zombie && p.parent == me) {
                let _ = waitpid(Pid::from_raw(process.pid), WaitOptions::NOHANG);
            }
        }
        let _ = waitpid(Pid::from_raw(self.guard), WaitOptions::NOHANG);
        self.drained_by = Some(Instant::now() + DRAIN);
    }
}

/// What a descriptor that is ready belongs to.
enum Ready {
    Signals,
    Orders,
    Guard,
    Out,
    Pipe(usize, usize),
}
