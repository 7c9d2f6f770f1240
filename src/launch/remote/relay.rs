//! A running job on another host: between the launcher's orders and the guard, and between the ranks and the launcher.
//! Of a job whose workers come and go it has none in the beginning, and is told of each by an order of its own.
#![forbid(unsafe_code)]

use super::super::elastic::parcel;
use super::super::guard::{self, JobSpec, Lines, Order, RankSpec, Report};
use super::super::output::Sink;
use super::super::processes::{descendants, kill_descendants};
use super::super::sys::{self, Signals};
use super::super::{PLACE, SPARE_FILES, open_pipe};
use super::agent::{Job, Variables, ended_by_signal, reach, serve, timespec, variables};
use super::probe::Answerer;
use super::words::{BLOCK_BYTES_MAX, block_head};
use super::{PING_EVERY, SILENCE_AGENT};
use crate::rendezvous::secret::Secret;
use crate::transport::wake::Waker;
use crossbeam::channel::{Receiver, Sender, bounded};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, WaitOptions, waitpid};
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long output is awaited when all processes have ended: somebody outside the job may hold a pipe.
const DRAIN: Duration = Duration::from_secs(1);
/// How much of a rank's output is passed on before its end is reported.
const READS_BEFORE_REPORT: usize = 64;
/// How long the last words may take to leave.
const FLUSH: Duration = Duration::from_secs(5);
/// Workers that there may be descriptors for, where nobody knows how many will come.
const WORKERS: u64 = 1 << 10;
/// Other hosts that are tried at one time.
const PROBES_MAX: usize = 64;

/// A running job.
pub struct Relay {
    guard: i32,
    to_guard: File,
    from_guard: File,
    guard_lines: Lines,
    orders: Option<File>,
    order_lines: Lines,
    out: Sink,
    pipes: BTreeMap<usize, [Option<File>; 2]>,
    /// What a job has whose workers come and go.
    open: Option<Open>,
    signals: Signals,
    heard: Instant,
    guard_gone: bool,
    ending: bool,
    drained_by: Option<Instant>,
}

/// Of a job whose workers come and go, and its hosts with them.
struct Open {
    /// Orders to start a worker.
    parcels: OwnedFd,
    secret: Secret,
    /// For hosts that come later.
    answerer: Option<Answerer>,
    /// What was found out about other hosts.
    reached: (Sender<String>, Receiver<String>),
    bell: Waker,
}

/// The pipes of one rank: its ends, and ours.
fn pipes(variables: Variables) -> std::io::Result<(RankSpec, [Option<File>; 2])> {
    let ((out_reader, stdout), (err_reader, stderr)) = (open_pipe()?, open_pipe()?);
    let reader = |end: OwnedFd| rustix::io::ioctl_fionbio(&end, true).map(|()| Some(File::from(end)));
    Ok((RankSpec { variables, stdout, stderr }, [reader(out_reader)?, reader(err_reader)?]))
}

impl Relay {
    /// Forks the guard. `open`: workers come and go.
    pub fn start(
        job: Job,
        open: bool,
        orders: File,
        order_lines: Lines,
        signals: Signals,
    ) -> std::io::Result<Relay> {
        let (open_files, _) = sys::open_files_limit();
        let count = if open { WORKERS } else { job.ranks.len() as u64 };
        sys::set_open_files_limit(open_files.max(count * 4 + SPARE_FILES));
        let (mut ranks, mut ends) = (Vec::new(), BTreeMap::new());
        for (rank, variables) in job.ranks.into_iter().enumerate() {
            let (spec, ours) = pipes(variables)?;
            ranks.push(spec);
            ends.insert(rank, ours);
        }
        let secret = job.secret.ok_or_else(|| std::io::Error::other("the launcher told no secret"))?;
        let (parcels, guards_parcels) =
            if open { parcel::pair().map(|(a, b)| (Some(a), Some(b)))? } else { (None, None) };
        let spec = JobSpec {
            command: job.command,
            ranks,
            removed: PLACE.to_vec(),
            shared: job.shared,
            secret: secret.to_hex(),
            keeps_stdin: false,
            open_files,
            parcels: guards_parcels,
        };
        let ((order_reader, to_guard), (from_guard, report_writer)) = (open_pipe()?, open_pipe()?);
        sys::set_subreaper(true);
        let guard = match sys::fork()? {
            sys::Fork::Child => {
                drop((to_guard, from_guard, parcels, ends, orders));
                let life = std::panic::AssertUnwindSafe(|| {
                    guard::run(spec, File::from(order_reader), File::from(report_writer), &signals);
                });
                sys::exit_now(if std::panic::catch_unwind(life).is_ok() { 0 } else { 101 });
            }
            sys::Fork::Parent(pid) => pid,
        };
        let open = match parcels {
            Some(parcels) => Some(Open {
                parcels,
                secret,
                answerer: None,
                reached: bounded(PROBES_MAX),
                bell: Waker::new()?,
            }),
            None => None,
        };
        Ok(Relay {
            guard,
            to_guard: File::from(to_guard),
            from_guard: File::from(from_guard),
            guard_lines: Lines::default(),
            orders: Some(orders),
            order_lines,
            out: Sink::new(std::io::stdout().as_fd().try_clone_to_owned()?),
            pipes: ends,
            open,
            signals,
            heard: Instant::now(),
            guard_gone: false,
            ending: false,
            drained_by: None,
        })
    }

    /// Until nothing of the job is left here.
    pub fn run(&mut self) {
        while !self.is_over() {
            self.wait();
            let now = Instant::now();
            if self.orders.is_some() && now.duration_since(self.heard) >= SILENCE_AGENT {
                self.end("the launcher has not been heard of for a minute");
            }
            if self.drained_by.is_some_and(|by| by <= now) {
                self.pipes.clear();
                if self.guard_gone && self.drained_by.is_some_and(|by| by + FLUSH <= now) {
                    return;
                }
            }
        }
    }

    fn is_over(&self) -> bool {
        let open = self.pipes.values().flatten().any(Option::is_some);
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
        if let Some(open) = &self.open {
            fds.push(PollFd::new(&open.bell, PollFlags::IN));
            meaning.push(Ready::Bell);
        }
        for (rank, pair) in self.pipes.iter().filter(|_| !self.out.is_full()) {
            for (stream, pipe) in pair.iter().enumerate() {
                if let Some(pipe) = pipe {
                    fds.push(PollFd::new(pipe, PollFlags::IN));
                    meaning.push(Ready::Pipe(*rank, stream));
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
            Ready::Bell => {
                let Some(open) = &self.open else { return };
                open.bell.clear();
                while let Ok(answer) = open.reached.1.try_recv() {
                    self.out.push(&[answer.as_bytes()]);
                }
            }
            Ready::Pipe(rank, stream) => drop(self.pass(rank, stream)),
        }
    }

    /// An order of the launcher.
    pub fn on_order(&mut self, line: &str) {
        match Order::parse(line) {
            _ if line == "ping" => self.out.push(&[b"pong\n"]),
            Some(Order::Start { .. }) => self.end(MALFORMED),
            Some(order) => self.order(&order),
            None => {
                if self.on_open_order(line).is_none() {
                    self.end(MALFORMED);
                }
            }
        }
    }

    /// Orders that come only where workers come and go.
    fn on_open_order(&mut self, line: &str) -> Option<()> {
        let open = self.open.as_mut()?;
        let (order, rest) = line.split_once(' ').unwrap_or((line, ""));
        let words: Vec<&str> = rest.split(' ').filter(|word| !word.is_empty()).collect();
        match order {
            "worker" => {
                let (number, pairs) = words.split_first()?;
                let (number, variables) = (number.parse().ok()?, variables(pairs)?);
                let sent = pipes(variables).and_then(|(spec, ours)| {
                    parcel::send(&open.parcels, number, &spec)?;
                    Ok(ours)
                });
                match sent {
                    Ok(ours) => drop(self.pipes.insert(number, ours)),
                    // A guard that has gone is noticed by the end of its reports.
                    Err(e) => {
                        let errno = e.raw_os_error().unwrap_or(libc::EINVAL);
                        self.out.push(&[Report::Refused { rank: number, errno }.line().as_bytes()]);
                    }
                }
            }
            "serve" => {
                let (answerer, answer) = serve(open.secret.clone(), &words)?;
                open.answerer = answerer;
                self.out.push(&[answer.as_bytes()]);
            }
            "reach" => {
                // An address that does not answer takes seconds, and what the workers write must not wait.
                let (secret, line, bell) = (open.secret.clone(), rest.to_owned(), open.bell.clone());
                let tell = open.reached.0.clone();
                let look = move || {
                    let words: Vec<&str> = line.split(' ').collect();
                    let answer = reach(&secret, &words).unwrap_or_default();
                    // Who asks for more at one time than there is room for waits in vain, for a bounded time.
                    let _ = tell.try_send(answer);
                    bell.wake();
                };
                std::thread::Builder::new().name("carole-reach".into()).spawn(look).ok()?;
            }
            _ => return None,
        }
        Some(())
    }

    /// Passes an order on to the guard.
    pub fn order(&mut self, order: &Order) {
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
        let Some(pipe) = self.pipes.get_mut(&rank).map(|pair| &mut pair[stream]) else { return false };
        let Some(file) = pipe else { return false };
        let mut block = [0; 16 << 10];
        const { assert!(16 << 10 <= BLOCK_BYTES_MAX) };
        match file.read(&mut block) {
            Ok(0) => self.close(rank, stream),
            Ok(n) => self.out.push(&[block_head(rank, stream, n).as_bytes(), &block[..n]]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return false,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => self.close(rank, stream),
        }
        true
    }

    /// A rank writes no more to one of its streams.
    fn close(&mut self, rank: usize, stream: usize) {
        let Some(pair) = self.pipes.get_mut(&rank) else { return };
        pair[stream] = None;
        if pair.iter().all(Option::is_none) {
            self.pipes.remove(&rank);
        }
        if self.open.is_some() {
            self.out.push(&[format!("closed {rank} {stream}\n").as_bytes()]);
        }
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

/// Why the agent ends that cannot obey.
const MALFORMED: &str = "the launcher's order is malformed";

/// What a descriptor that is ready belongs to.
enum Ready {
    Signals,
    Bell,
    Orders,
    Guard,
    Out,
    Pipe(usize, usize),
}
