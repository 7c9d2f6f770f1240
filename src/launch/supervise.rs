//! The launcher's loop: output, signals, the guard's reports, and the decision when and how the job ends.
#![forbid(unsafe_code)]

use super::guard::{Lines, Order, Report};
use super::output::{Sink, Stream};
use super::processes::{descendants, kill_descendants};
use super::sys::{Signals, signal_name};
use super::verdict::{Finding, Verdict};
use super::{args, owns_terminal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, WaitOptions, waitpid};
use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// After the first failure the others get this long to see it and end by themselves, with their own words.
const GRACE: Duration = Duration::from_secs(2);
/// After that, and SIGTERM, this long until SIGKILL.
const TERM_GRACE: Duration = Duration::from_secs(3);
/// How long output is awaited when all processes have ended: somebody outside the job may hold a pipe.
const DRAIN: Duration = Duration::from_secs(1);
/// How much of a failed rank's output is read before its failure is reported.
const READS_BEFORE_REPORT: usize = 64;

/// What the supervisor is made of.
pub struct Setup {
    /// The guard's process id.
    pub guard: i32,
    /// Orders to the guard.
    pub orders: File,
    /// The guard's reports.
    pub reports: File,
    /// The launcher's signals.
    pub signals: Signals,
    /// Standard output and standard error of each rank.
    pub streams: Vec<[Stream; 2]>,
    /// The command, for messages.
    pub command: OsString,
    /// From the user's first signal to SIGKILL.
    pub kill_after: Duration,
    /// Whether to tell what is done.
    pub verbose: bool,
}

/// How far the end of the job has gone.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Stage {
    /// It runs.
    Running,
    /// A rank has failed, or the user asked for the end; the ranks may end by themselves.
    Ending,
    /// SIGTERM was sent.
    Terminated,
    /// The guard was told to kill what is left (or to look whether anything is left).
    Finishing,
}

/// How a rank ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    Exited(i32),
    Killed(i32),
}

/// Looks after one job.
pub struct Supervisor {
    setup: Setup,
    sinks: [Sink; 2],
    lines: Lines,
    endings: Vec<Option<Ending>>,
    verdict: Verdict,
    stage: Stage,
    /// Whether somebody outside asked for the end, so that what fails then is no failure.
    asked: bool,
    deadline: Option<Instant>,
    /// The code of the first rank that failed, or what else decides the launcher's code.
    code: Option<i32>,
    guard_gone: bool,
    drained_by: Option<Instant>,
    /// Children that the process had before the job.
    strangers: HashSet<i32>,
    terminal_lent: bool,
}

impl Supervisor {
    /// A supervisor of a guard that waits for its first order.
    pub fn new(setup: Setup) -> std::io::Result<Supervisor> {
        let me = rustix::process::getpid().as_raw_nonzero().get();
        let strangers = descendants(me).iter().map(|p| p.pid).filter(|pid| *pid != setup.guard).collect();
        let sinks = [
            Sink::new(std::io::stdout().as_fd().try_clone_to_owned()?),
            Sink::new(std::io::stderr().as_fd().try_clone_to_owned()?),
        ];
        Ok(Supervisor {
            endings: vec![None; setup.streams.len()],
            verdict: Verdict::new(setup.streams.len()),
            setup,
            sinks,
            lines: Lines::default(),
            stage: Stage::Running,
            asked: false,
            deadline: None,
            code: None,
            guard_gone: false,
            drained_by: None,
            strangers,
            terminal_lent: false,
        })
    }

    /// Orders the start of the ranks.
    pub fn start(&mut self, rendezvous: &str) {
        if self.setup.verbose {
            self.say(&format!("starting {} ranks; rendezvous at {rendezvous}", self.endings.len()));
        }
        self.order(&Order::Start { rendezvous: rendezvous.to_string() });
    }

    /// Ends the guard before any rank was started.
    pub fn abandon(&mut self) {
        self.finish();
        self.supervise();
    }

    /// Looks after the job until nothing of it is left, and returns the launcher's exit code.
    pub fn supervise(&mut self) -> i32 {
        while !self.is_over() {
            self.wait();
            while let Some(signal) = self.setup.signals.next() {
                self.on_signal(signal);
            }
            self.on_deadline(Instant::now());
        }
        self.take_terminal_back();
        self.code.unwrap_or(0)
    }

    fn is_over(&self) -> bool {
        let open = self.setup.streams.iter().flatten().any(|stream| stream.pipe().is_some());
        self.guard_gone && !open && self.sinks.iter().all(Sink::is_empty)
    }

    /// Waits until something can be done, and does it.
    fn wait(&mut self) {
        let mut fds = vec![PollFd::new(&self.setup.signals, PollFlags::IN)];
        let mut meaning = vec![Ready::Signals];
        if !self.guard_gone {
            fds.push(PollFd::new(&self.setup.reports, PollFlags::IN));
            meaning.push(Ready::Reports);
        }
        for (index, sink) in self.sinks.iter().enumerate() {
            if !sink.is_empty() {
                fds.push(PollFd::from_borrowed_fd(sink.descriptor(), PollFlags::OUT));
                meaning.push(Ready::Sink(index));
            }
        }
        for (rank, pair) in self.setup.streams.iter().enumerate() {
            for (index, stream) in pair.iter().enumerate() {
                if let Some(pipe) = stream.pipe().filter(|_| !self.sinks[index].is_full()) {
                    fds.push(PollFd::new(pipe, PollFlags::IN));
                    meaning.push(Ready::Stream(rank, index));
                }
            }
        }
        let timeout = self.timeout();
        if poll(&mut fds, timeout.as_ref()).is_err() {
            return;
        }
        let ready: Vec<Ready> = fds
            .iter()
            .zip(meaning)
            .filter(|(fd, _)| !fd.revents().is_empty())
            .map(|(_, meaning)| meaning)
            .collect();
        drop(fds);
        for ready in ready {
            self.on_ready(ready);
        }
    }

    fn timeout(&self) -> Option<Timespec> {
        let next = [self.deadline, self.drained_by].into_iter().flatten().min()?;
        let left = next.saturating_duration_since(Instant::now());
        // Rounded up, or the loop would turn until the deadline is truly over.
        let nanoseconds = i64::from(left.subsec_nanos()) + 1_000_000;
        let seconds = left.as_secs() as i64 + nanoseconds / 1_000_000_000;
        Some(Timespec { tv_sec: seconds, tv_nsec: nanoseconds % 1_000_000_000 })
    }

    fn on_ready(&mut self, ready: Ready) {
        match ready {
            Ready::Signals => {}
            Ready::Reports => match self.lines.read(&self.setup.reports) {
                None => self.on_guard_gone(),
                Some(lines) => {
                    for line in lines {
                        let report = Report::parse(&line).expect("the guard writes only reports");
                        self.on_report(report);
                    }
                }
            },
            Ready::Sink(index) => {
                self.sinks[index].write_some();
                if self.sinks[index].is_closed() {
                    self.on_sink_closed(index);
                }
            }
            Ready::Stream(rank, index) => {
                self.read(rank, index);
            }
        }
    }

    fn read(&mut self, rank: usize, index: usize) -> bool {
        let mut complaints = Vec::new();
        let more = self.setup.streams[rank][index].read(&mut self.sinks[index], &mut complaints);
        for words in complaints {
            self.say(&words);
        }
        more
    }

    fn on_report(&mut self, report: Report) {
        match report {
            Report::Started { rank, pid } => {
                if self.setup.verbose {
                    self.say(&format!("rank {rank} is process {pid}"));
                }
                self.lend_terminal(pid);
            }
            Report::Refused { rank: _, errno } => self.on_refused(errno),
            Report::Exited { rank, code } => self.on_end(rank, Ending::Exited(code)),
            Report::Killed { rank, signal } => self.on_end(rank, Ending::Killed(signal)),
            Report::Left { count } => {
                self.say(&format!("{count} processes of the job do not die of SIGKILL; see ps for state D"));
            }
        }
    }

    fn on_refused(&mut self, errno: i32) {
        let command = self.setup.command.to_string_lossy().into_owned();
        let error = std::io::Error::from_raw_os_error(errno);
        let here = std::path::Path::new(&self.setup.command).is_file();
        let (code, mut words) = match errno {
            libc::ENOENT if here && !command.contains('/') => (
                127,
                format!("the command '{command}' is not in PATH; the file in this folder is ./{command}"),
            ),
            libc::ENOENT if here => (
                127,
                format!(
                    "'{command}' cannot be run: the interpreter that its first line names does not exist"
                ),
            ),
            libc::ENOENT => (127, format!("the command '{command}' was not found")),
            libc::EACCES | libc::ENOEXEC => {
                (126, format!("the command '{command}' is not executable: {error}"))
            }
            libc::EAGAIN => {
                (126, format!("'{command}' cannot be started: too many processes ({error}); see ulimit -u"))
            }
            _ => (126, format!("'{command}' cannot be started: {error}")),
        };
        if args::looks_like_python(&self.setup.command) {
            words.push_str(&format!("; did you mean: carolerun ... python {command}?"));
        }
        self.say(&words);
        self.code = Some(code);
        self.finish();
    }

    fn on_end(&mut self, rank: usize, ending: Ending) {
        if self.endings[rank].replace(ending).is_some() {
            unreachable!("a rank ends once");
        }
        let failed = ending.code() != 0;
        let named = if failed { self.culprit(rank) } else { None };
        self.verdict.ended(rank, failed, named);
        if self.setup.verbose {
            self.say(&format!("rank {rank} {}", ending.words()));
        }
        match self.verdict.first() {
            _ if self.code.is_some() => {}
            Finding::Nobody => {}
            Finding::First(first) => self.settle(first, None),
            // It is about to end, and its ending says more than what others heard of it.
            Finding::Named { .. } if self.stage == Stage::Running => self.enter(Stage::Ending, Some(GRACE)),
            Finding::Named { .. } if self.asked => self.settle_now(),
            Finding::Named { .. } => {}
        }
        if self.endings.iter().all(Option::is_some) {
            self.finish();
        }
    }

    /// Whom a rank that has ended held to be at fault.
    fn culprit(&mut self, rank: usize) -> Option<usize> {
        // What it wrote before it ended is in the pipes; children of it may go on writing.
        for index in 0..2 {
            for _ in 0..READS_BEFORE_REPORT {
                if self.sinks[index].is_full() || !self.read(rank, index) {
                    break;
                }
            }
        }
        let [out, err] = &self.setup.streams[rank];
        err.culprit().or(out.culprit()).map(|rank| rank.0 as usize)
    }

    /// Ends the wait for a rank that was named, if there is one.
    fn settle_now(&mut self) {
        if let (None, Finding::Named { culprit, by }) = (self.code, self.verdict.first()) {
            self.settle(by, Some(culprit));
        }
    }

    /// The verdict: this rank failed first, or a rank that it names and that still runs.
    fn settle(&mut self, rank: usize, named: Option<usize>) {
        let ending = self.endings[rank].expect("only who has ended has failed");
        self.code = Some(ending.code());
        self.tell_failure(rank, ending, named);
        if self.stage == Stage::Running && self.endings.iter().any(Option::is_none) {
            self.enter(Stage::Ending, Some(GRACE));
        }
    }

    /// Says which rank failed first, and why, with its own last words.
    fn tell_failure(&mut self, rank: usize, ending: Ending, named: Option<usize>) {
        let last = self.setup.streams[rank][1].last_line();
        let last = if last.is_empty() { String::new() } else { format!("; its last line on stderr: {last}") };
        let running = self.endings.iter().filter(|ending| ending.is_none()).count();
        let others = match running {
            0 => String::new(),
            1 => "; ending the other one".to_string(),
            n => format!("; ending the other {n}"),
        };
        let first = match named {
            Some(culprit) => format!(
                "rank {culprit} failed first, though it still runs (stopped, or stuck?): rank {rank}, which names it,"
            ),
            None if self.endings.len() > 1 && !self.asked => format!("rank {rank} failed first: it"),
            None => format!("rank {rank}"),
        };
        self.say(&format!("{first} {}{last}{others}", ending.words()));
    }

    fn on_signal(&mut self, signal: i32) {
        match signal {
            libc::SIGCHLD | libc::SIGTTOU => {}
            libc::SIGUSR1 | libc::SIGUSR2 => self.signal_all(signal, false),
            _ => self.on_call_to_end(signal),
        }
    }

    fn on_call_to_end(&mut self, signal: i32) {
        self.settle_now();
        self.asked = true;
        match signal {
            _ if self.stage >= Stage::Finishing => {
                // The ranks are being killed already; who asks again does not want to wait for output either.
                self.drained_by = Some(Instant::now());
                self.sinks.iter_mut().for_each(Sink::give_up);
            }
            libc::SIGINT if self.stage == Stage::Running => {
                self.say("interrupted (SIGINT); waiting for the ranks to end; interrupt again to force it");
                self.signal_all(signal, true);
                self.enter(Stage::Ending, Some(self.setup.kill_after));
            }
            _ if self.stage == Stage::Terminated => self.finish(),
            _ => {
                let sent = if signal == libc::SIGINT { libc::SIGTERM } else { signal };
                self.say(&format!("{}: passing {} on to the ranks", signal_name(signal), signal_name(sent)));
                self.signal_all(sent, true);
                self.enter(Stage::Terminated, Some(self.setup.kill_after));
            }
        }
    }

    fn on_deadline(&mut self, now: Instant) {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            match self.stage {
                Stage::Ending => {
                    self.settle_now();
                    self.signal_all(libc::SIGTERM, true);
                    self.enter(Stage::Terminated, Some(TERM_GRACE));
                }
                _ => self.finish(),
            }
        }
        if self.drained_by.is_some_and(|deadline| deadline <= now) {
            self.drained_by = None;
            for pair in &mut self.setup.streams {
                for (stream, sink) in pair.iter_mut().zip(&mut self.sinks) {
                    if stream.pipe().is_some() {
                        stream.close(sink);
                    }
                }
            }
        }
    }

    /// The reader of our output has gone, as in `carolerun ... | head`.
    fn on_sink_closed(&mut self, index: usize) {
        if index == 0 && self.stage == Stage::Running {
            self.asked = true;
            self.say("standard output was closed by its reader; ending the job");
            self.code = self.code.or(Some(128 + libc::SIGPIPE));
            self.signal_all(libc::SIGTERM, true);
            self.enter(Stage::Terminated, Some(TERM_GRACE));
        }
    }

    /// The guard has ended: as it should, or killed. Then its orphans are ours.
    fn on_guard_gone(&mut self) {
        self.guard_gone = true;
        self.deadline = None;
        self.settle_now();
        if self.stage != Stage::Finishing {
            self.stage = Stage::Finishing;
            self.say("the guard process was killed; ending the job");
            self.code = self.code.or(Some(128 + libc::SIGKILL));
            let me = rustix::process::getpid().as_raw_nonzero().get();
            let deadline = Instant::now() + TERM_GRACE;
            while kill_descendants(me, &self.strangers) > 0 && Instant::now() < deadline {
                let mut fds = [PollFd::new(&self.setup.signals, PollFlags::IN)];
                let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 10_000_000 }));
                while self.setup.signals.next().is_some() {}
                self.reap_adopted();
            }
        }
        let _ = waitpid(Pid::from_raw(self.setup.guard), WaitOptions::empty());
        self.reap_adopted();
        self.drained_by = Some(Instant::now() + DRAIN);
    }

    /// Children of the process that hosts us (Python, say) are left for it to reap.
    fn reap_adopted(&self) {
        let me = rustix::process::getpid().as_raw_nonzero().get();
        for process in descendants(me) {
            if process.zombie && process.parent == me && !self.strangers.contains(&process.pid) {
                let _ = waitpid(Pid::from_raw(process.pid), WaitOptions::NOHANG);
            }
        }
    }

    fn enter(&mut self, stage: Stage, limit: Option<Duration>) {
        self.stage = stage;
        self.deadline = limit.map(|limit| Instant::now() + limit);
    }

    /// Has everything killed that is left of the job.
    fn finish(&mut self) {
        if self.stage != Stage::Finishing {
            self.enter(Stage::Finishing, None);
            self.order(&Order::Finish);
        }
    }

    fn signal_all(&mut self, signal: i32, group: bool) {
        for rank in 0..self.endings.len() {
            if self.endings[rank].is_none() {
                self.order(&Order::Signal { rank, signal, group });
            }
        }
    }

    fn order(&mut self, order: &Order) {
        // A guard that has gone is noticed by the end of its reports.
        let _ = self.setup.orders.write_all(order.line().as_bytes());
    }

    fn say(&mut self, words: &str) {
        self.sinks[1].push(&[b"carolerun: ", words.as_bytes(), b"\n"]);
    }

    /// The one rank of a job on a terminal may read from it, so its group must be in the foreground.
    fn lend_terminal(&mut self, pid: i32) {
        if self.endings.len() != 1 || !owns_terminal() {
            return;
        }
        if let Some(group) = Pid::from_raw(pid) {
            self.terminal_lent = rustix::termios::tcsetpgrp(std::io::stdin(), group).is_ok();
            // It may have tried to read before, and been stopped.
            self.order(&Order::Signal { rank: 0, signal: libc::SIGCONT, group: true });
        }
    }

    fn take_terminal_back(&mut self) {
        if std::mem::take(&mut self.terminal_lent) {
            // SIGTTOU is blocked here, so this works from the background.
            let _ = rustix::termios::tcsetpgrp(std::io::stdin(), rustix::process::getpgrp());
        }
    }
}

/// What a descriptor that is ready belongs to.
enum Ready {
    Signals,
    Reports,
    Sink(usize),
    Stream(usize, usize),
}

impl Ending {
    /// The exit code that stands for it, as in a shell.
    fn code(self) -> i32 {
        match self {
            Ending::Exited(code) => code,
            Ending::Killed(signal) => 128 + signal,
        }
    }

    fn words(self) -> String {
        match self {
            Ending::Exited(code) => format!("exited with code {code}"),
            Ending::Killed(signal) => format!("was killed by {}", signal_name(signal)),
        }
    }
}
