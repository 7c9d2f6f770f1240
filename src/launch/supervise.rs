//! The launcher's loop: output, signals, the guard's reports, and the decision when and how the job ends.
#![forbid(unsafe_code)]

mod lost;

use super::ending::{Ending, refusal};
use super::guard::{Order, Report};
use super::link::Link;
use super::output::{Sink, Stream};
use super::owns_terminal;
use super::processes::descendants;
use super::progress::Progress;
use super::remote::words::Piece;
use super::sys::{Signals, signal_name};
use super::verdict::{Finding, Verdict};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Pid;
use std::collections::HashSet;
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// After the first failure the others get this long to see it and end by themselves, with their own words.
const GRACE: Duration = Duration::from_secs(2);
/// After that, and SIGTERM, this long until SIGKILL.
const TERM_GRACE: Duration = Duration::from_secs(3);
/// How long output is awaited when all processes have ended: somebody outside the job may hold a pipe.
const DRAIN: Duration = Duration::from_secs(1);
/// How long other hosts may take to end what is left there and to say so.
const FINISH_REMOTE: Duration = Duration::from_secs(15);
/// How much of a failed rank's output is read before its failure is reported.
const READS_BEFORE_REPORT: usize = 64;

/// What the supervisor is made of.
pub struct Setup<'a> {
    /// The guards, each with its ranks.
    pub links: Vec<Link>,
    /// The launcher's signals.
    pub signals: &'a Signals,
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

/// Looks after one job.
pub struct Supervisor<'a> {
    setup: Setup<'a>,
    sinks: [Sink; 2],
    progress: Progress,
    endings: Vec<Option<Ending>>,
    verdict: Verdict,
    stage: Stage,
    /// Whether somebody outside asked for the end, so that what fails then is no failure.
    asked: bool,
    deadline: Option<Instant>,
    /// The code of the first rank that failed, or what else decides the launcher's code.
    code: Option<i32>,
    drained_by: Option<Instant>,
    /// Children that the process had before the job.
    strangers: HashSet<i32>,
    terminal_lent: bool,
}

impl<'a> Supervisor<'a> {
    /// A supervisor of a guard that waits for its first order.
    pub fn new(setup: Setup<'a>) -> std::io::Result<Supervisor<'a>> {
        let me = rustix::process::getpid().as_raw_nonzero().get();
        let ours = |pid: &i32| setup.links.iter().any(|link| link.pid == *pid);
        let strangers = descendants(me).iter().map(|p| p.pid).filter(|pid| !ours(pid)).collect();
        let sinks = [
            Sink::new(std::io::stdout().as_fd().try_clone_to_owned()?),
            Sink::new(std::io::stderr().as_fd().try_clone_to_owned()?),
        ];
        Ok(Supervisor {
            endings: vec![None; setup.streams.len()],
            verdict: Verdict::new(setup.streams.len()),
            setup,
            sinks,
            progress: Progress::default(),
            stage: Stage::Running,
            asked: false,
            deadline: None,
            code: None,
            drained_by: None,
            strangers,
            terminal_lent: false,
        })
    }

    /// Orders the start of the ranks. `progress` tells which of them have arrived at the rendezvous.
    pub fn start(&mut self, progress: Progress) {
        self.progress = progress;
        if self.setup.verbose {
            let places: Vec<&str> = self.setup.links.iter().map(|link| link.rendezvous.as_str()).collect();
            self.say(&format!("starting {} ranks; rendezvous at {}", self.endings.len(), places.join("; ")));
        }
        for link in &mut self.setup.links {
            let (rendezvous, interfaces) = (link.rendezvous.clone(), link.interfaces.clone());
            link.order(&Order::Start { rendezvous, interfaces });
        }
    }

    /// Takes over the agents of other hosts.
    pub fn add(&mut self, links: impl Iterator<Item = Link>) {
        self.setup.links.extend(links);
    }

    /// The way to the ranks of this host.
    pub fn local(&mut self) -> Option<&mut Link> {
        self.setup.links.iter_mut().find(|link| !link.is_remote())
    }

    /// Says something on standard error, at the next opportunity.
    pub fn tell(&mut self, words: &str) {
        self.say(words);
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
        let open = self.setup.streams.iter().flatten().any(Stream::is_open);
        self.all_gone() && !open && self.sinks.iter().all(Sink::is_empty)
    }

    fn all_gone(&self) -> bool {
        self.setup.links.iter().all(|link| link.gone)
    }

    /// Whether so much waits to be written that nothing more is taken from other hosts.
    fn is_full(&self) -> bool {
        self.sinks.iter().any(Sink::is_full)
    }

    /// Waits until something can be done, and does it.
    fn wait(&mut self) {
        let mut fds = vec![PollFd::new(self.setup.signals, PollFlags::IN)];
        let mut meaning = vec![Ready::Signals];
        for (index, link) in self.setup.links.iter().enumerate().filter(|(_, link)| !link.gone) {
            if !link.is_remote() || !self.is_full() {
                fds.push(PollFd::new(&link.reports, PollFlags::IN));
                meaning.push(Ready::Reports(index));
            }
            if !link.orders.is_empty() {
                fds.push(PollFd::from_borrowed_fd(link.orders.descriptor(), PollFlags::OUT));
                meaning.push(Ready::Orders(index));
            }
            if let Some(errors) = &link.errors {
                fds.push(PollFd::new(errors, PollFlags::IN));
                meaning.push(Ready::Errors(index));
            }
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
        let links = self.setup.links.iter().filter_map(Link::deadline);
        let own = [self.deadline, self.drained_by, self.progress.deadline()];
        let next = own.into_iter().flatten().chain(links).min()?;
        let left = next.saturating_duration_since(Instant::now());
        // Rounded up, or the loop would turn until the deadline is truly over.
        let nanoseconds = i64::from(left.subsec_nanos()) + 1_000_000;
        let seconds = left.as_secs() as i64 + nanoseconds / 1_000_000_000;
        Some(Timespec { tv_sec: seconds, tv_nsec: nanoseconds % 1_000_000_000 })
    }

    fn on_ready(&mut self, ready: Ready) {
        match ready {
            Ready::Signals => {}
            Ready::Reports(index) => match self.setup.links[index].read() {
                None => self.on_link_gone(index),
                Some(pieces) => {
                    if !pieces.into_iter().all(|piece| self.on_piece(index, piece)) {
                        self.on_link_gone(index);
                    }
                }
            },
            Ready::Orders(index) => self.setup.links[index].orders.write_some(),
            Ready::Errors(index) => {
                for line in self.setup.links[index].read_errors() {
                    let host = self.setup.links[index].host.clone().unwrap_or_default();
                    self.say(&format!("host '{host}': {line}"));
                }
            }
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

    /// Takes what a guard or an agent sent; `false` when no agent of ours can mean that.
    fn on_piece(&mut self, index: usize, piece: Piece) -> bool {
        let ranks = self.setup.links[index].ranks.clone();
        match piece {
            Piece::Line(line) if line == "pong" => true,
            Piece::Line(line) => match Report::parse(&line) {
                Some(report) if report.rank().is_none_or(|rank| rank < ranks.len()) => {
                    self.on_report(index, report);
                    true
                }
                _ => false,
            },
            Piece::Output { rank, stream, bytes } => {
                let known = rank < ranks.len() && self.setup.links[index].is_remote();
                if known {
                    let mut complaints = Vec::new();
                    let from = &mut self.setup.streams[ranks.start + rank][stream];
                    from.take(&bytes, &mut self.sinks[stream], &mut complaints);
                    complaints.iter().for_each(|words| self.say(words));
                }
                known
            }
        }
    }

    fn on_report(&mut self, index: usize, report: Report) {
        let first = self.setup.links[index].ranks.start;
        let host = self.setup.links[index].host.clone();
        let there = host.as_ref().map_or(String::new(), |host| format!(" on host '{host}'"));
        match report {
            Report::Started { rank, pid } => {
                if self.setup.verbose {
                    self.say(&format!("rank {} is process {pid}{there}", first + rank));
                }
                if host.is_none() {
                    self.lend_terminal(pid);
                }
            }
            Report::Refused { rank: _, errno } => {
                let (code, words) = refusal(&self.setup.command, errno, host.as_deref());
                self.say(&words);
                self.code = self.code.or(Some(code));
                self.finish();
            }
            Report::Exited { rank, code } => self.on_end(first + rank, Ending::Exited(code)),
            Report::Killed { rank, signal } => self.on_end(first + rank, Ending::Killed(signal)),
            Report::Left { count } => {
                self.say(&format!(
                    "{count} processes of the job{there} do not die of SIGKILL; see ps for state D"
                ));
            }
        }
    }

    fn on_end(&mut self, rank: usize, ending: Ending) {
        if self.endings[rank].is_some() {
            // A rank of this host ends once; what an agent says twice is no news.
            return;
        }
        self.endings[rank] = Some(ending);
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
        // What it wrote before it ended is in the pipes, and is read however much waits for a slow reader of ours: else
        // a rank that names another would be taken for the first that failed. A pipe is bounded; children of
        // the rank may go on writing.
        for index in 0..2 {
            for _ in 0..READS_BEFORE_REPORT {
                if !self.read(rank, index) {
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
                "{} failed first, though it still runs (stopped, or stuck?): {}, which names it,",
                self.place(culprit),
                self.place(rank)
            ),
            None if self.endings.len() > 1 && !self.asked => {
                format!("{} failed first: it", self.place(rank))
            }
            None => self.place(rank),
        };
        self.say(&format!("{first} {}{last}{others}", ending.words()));
    }

    /// "rank 3", with its host where there are several.
    fn place(&self, rank: usize) -> String {
        place(&self.setup.links, rank)
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
                self.give_up_remote();
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
                Stage::Finishing => self.give_up_remote(),
                _ => self.finish(),
            }
        }
        let listening = !self.is_full();
        for index in 0..self.setup.links.len() {
            if self.setup.links[index].keep_alive(now, listening) {
                self.setup.links[index].last_words = "no sign of life for half a minute".to_string();
                self.on_link_gone(index);
            }
        }
        if let Some(words) = self.progress.words(now, |rank| place(&self.setup.links, rank)) {
            self.say(&words);
        }
        if self.drained_by.is_some_and(|deadline| deadline <= now) {
            self.drained_by = None;
            for pair in &mut self.setup.streams {
                for (stream, sink) in pair.iter_mut().zip(&mut self.sinks) {
                    if stream.is_open() {
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

    fn enter(&mut self, stage: Stage, limit: Option<Duration>) {
        self.stage = stage;
        self.deadline = limit.map(|limit| Instant::now() + limit);
    }

    /// Has everything killed that is left of the job.
    fn finish(&mut self) {
        if self.stage != Stage::Finishing {
            let remote = self.setup.links.iter().any(|link| link.is_remote() && !link.gone);
            self.enter(Stage::Finishing, remote.then_some(FINISH_REMOTE));
            for link in self.setup.links.iter_mut().filter(|link| !link.gone) {
                link.order(&Order::Finish);
            }
        }
    }

    fn signal_all(&mut self, signal: i32, group: bool) {
        for rank in 0..self.endings.len() {
            let link = self.setup.links.iter_mut().find(|link| link.ranks.contains(&rank) && !link.gone);
            if let Some(link) = link.filter(|_| self.endings[rank].is_none()) {
                let rank = rank - link.ranks.start;
                link.order(&Order::Signal { rank, signal, group });
            }
        }
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
            self.signal_all(libc::SIGCONT, true);
        }
    }

    fn take_terminal_back(&mut self) {
        if std::mem::take(&mut self.terminal_lent) {
            // SIGTTOU is blocked here, so this works from the background.
            let _ = rustix::termios::tcsetpgrp(std::io::stdin(), rustix::process::getpgrp());
        }
    }
}

fn place(links: &[Link], rank: usize) -> String {
    let link = links.iter().find(|link| link.ranks.contains(&rank));
    match link.and_then(|link| link.host.as_ref()) {
        Some(host) => format!("rank {rank} (host '{host}')"),
        None => format!("rank {rank}"),
    }
}

/// What a descriptor that is ready belongs to.
enum Ready {
    Signals,
    Reports(usize),
    Orders(usize),
    Errors(usize),
    Sink(usize),
    Stream(usize, usize),
}
