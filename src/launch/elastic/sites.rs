//! The other hosts of an elastic job: each is reached when it is needed, examined ([`Exam`]), and then told whom to
//! start; it may be lost, and reached again. Nothing here waits: the crew's loop goes on meanwhile.
#![forbid(unsafe_code)]

mod exams;

use super::super::guard::{Order, Report};
use super::super::link::Link;
use super::super::remote::candidate::Candidate;
use super::super::remote::gather::AT_ONCE;
use super::super::remote::probe::Answerer;
use super::super::remote::ssh::Ssh;
use super::super::remote::words::{Piece, unescape_text};
use super::super::remote::{absent, pairs, ways};
use super::exam::Exam;
use super::plan::Worker;
use crate::rendezvous::secret::Secret;
use crate::transport::wake::Waker;
use crossbeam::channel::{Receiver, Sender, bounded};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The variables of a worker.
pub type Variables = Vec<(String, String)>;

/// How hosts are reached, and what each is told.
pub struct Reach {
    /// How a command is run there.
    pub ssh: Ssh,
    /// The job's secret.
    pub secret: Secret,
    /// What every agent is told before the rest; it answers whether it has entered the folder.
    pub preamble: String,
    /// What all workers have in common.
    pub common: String,
    /// That folder.
    pub directory: PathBuf,
    /// Interfaces that the user has named.
    pub interfaces: Vec<String>,
    /// How long it may take to reach a host.
    pub limit: Duration,
    /// Where the rendezvous is served.
    pub serves: Vec<SocketAddr>,
    /// Rung when the launcher has tried to reach a host.
    pub bell: Waker,
}

/// What has happened on other hosts.
pub enum News {
    /// Words for the user.
    Say(String),
    /// A host cannot be used, and the workers that wait for it will not start.
    Unreached {
        /// Which.
        host: String,
        /// Why.
        why: String,
    },
    /// A host is lost with all its workers.
    Lost {
        /// Which.
        host: String,
        /// Why.
        why: String,
    },
    /// A report of the guard there.
    Report(String, Report),
    /// What a worker there has written to one of its streams; nothing more will come where there is nothing.
    Wrote {
        /// The host.
        host: String,
        /// The worker.
        worker: Worker,
        /// 0 or 1.
        stream: usize,
        /// What it wrote.
        bytes: Option<Vec<u8>>,
    },
    /// A worker that waited for its host will not be started.
    Never(Worker),
}

/// A part of the connection to a host.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// What waits to be sent can be.
    Orders,
    /// Something has come.
    Reports,
    /// ssh or the agent has something to say.
    Errors,
}

/// The other hosts.
pub struct Sites {
    reach: Reach,
    sites: Vec<Site>,
    /// Numbers for what hosts prove to be.
    next: usize,
    /// The launcher's own end of the exams.
    answerer: Option<Answerer>,
    /// Whether workers run on the launcher's host, too.
    local: bool,
    /// What the launcher has found out about hosts that it tried.
    own: (Sender<Tried>, Receiver<Tried>),
    news: VecDeque<News>,
}

/// What a host proves to be, and at which addresses it was reached.
type Tried = (String, Vec<ways::Probed>);

struct Site {
    host: String,
    proof: String,
    host_id: String,
    stage: Stage,
    /// Those that are started as soon as it is ready.
    waiting: Vec<(Worker, Variables)>,
    served: Vec<SocketAddr>,
    rendezvous: String,
    interfaces: Option<String>,
}

enum Stage {
    Reaching(Box<Candidate>),
    /// Until then the agent must have answered.
    Examined(Box<Link>, Option<Box<Exam>>, Instant),
    Ready(Box<Link>),
    /// It was told to end what is left there.
    Ending(Box<Link>),
    Gone,
}

impl Site {
    fn new(host: &str, number: usize, now: Instant) -> Site {
        Site {
            host: host.to_owned(),
            proof: ways::name_of(number, host),
            host_id: String::new(),
            stage: Stage::Reaching(Box::new(Candidate::new(host, now))),
            waiting: Vec::new(),
            served: Vec::new(),
            rendezvous: String::new(),
            interfaces: None,
        }
    }

    fn link(&self) -> Option<&Link> {
        match &self.stage {
            Stage::Reaching(candidate) => candidate.link.as_ref(),
            Stage::Examined(link, ..) | Stage::Ready(link) | Stage::Ending(link) => Some(link),
            Stage::Gone => None,
        }
    }

    fn link_mut(&mut self) -> Option<&mut Link> {
        match &mut self.stage {
            Stage::Reaching(candidate) => candidate.link.as_mut(),
            Stage::Examined(link, ..) | Stage::Ready(link) | Stage::Ending(link) => Some(link),
            Stage::Gone => None,
        }
    }

    /// Whether it answers probes.
    fn answers(&self) -> bool {
        matches!(self.stage, Stage::Examined(..) | Stage::Ready(_)) && !self.served.is_empty()
    }

    fn order(&mut self, line: &str) {
        if let Some(link) = self.link_mut() {
            link.orders.push(&[line.as_bytes()]);
        }
    }

    fn start(&mut self, worker: Worker, mut variables: Variables) {
        variables.push(("CAROLE_RENDEZVOUS".to_owned(), self.rendezvous.clone()));
        variables.extend(self.interfaces.clone().map(|list| ("CAROLE_INTERFACES".to_owned(), list)));
        self.order(&format!("worker {worker} {}\n", pairs(&variables)));
    }

    /// Why the connection has ended, as far as it is known.
    fn last_words(&mut self) -> String {
        let Some(link) = self.link_mut() else { return String::new() };
        link.read_errors();
        let words = std::mem::take(&mut link.last_words);
        if words.is_empty() { words } else { format!(": {words}") }
    }

    fn close(&mut self) {
        match std::mem::replace(&mut self.stage, Stage::Gone) {
            Stage::Reaching(mut candidate) => candidate.close(),
            Stage::Examined(mut link, ..) | Stage::Ready(mut link) | Stage::Ending(mut link) => link.close(),
            Stage::Gone => {}
        }
    }
}

impl Sites {
    /// No host is known yet.
    pub fn new(reach: Reach) -> Sites {
        Sites {
            reach,
            sites: Vec::new(),
            next: 0,
            answerer: None,
            local: false,
            own: bounded(AT_ONCE),
            news: VecDeque::new(),
        }
    }

    /// What has happened since the last call.
    pub fn poll(&mut self) -> Option<News> {
        self.news.pop_front()
    }

    /// Whether something has happened that was not taken yet.
    pub fn has_news(&self) -> bool {
        !self.news.is_empty()
    }

    /// From now on there are workers on the launcher's host, too.
    pub fn use_local(&mut self) {
        self.local = true;
    }

    /// Whether nothing is left on any host, as far as it is known.
    pub fn is_empty(&self) -> bool {
        self.sites.iter().all(|site| matches!(site.stage, Stage::Gone) && site.waiting.is_empty())
    }

    /// The ssh clients.
    pub fn pids(&self) -> impl Iterator<Item = i32> + '_ {
        self.sites.iter().filter_map(|site| Some(site.link()?.pid))
    }

    /// Starts a worker as soon as its host is ready.
    pub fn start(&mut self, host: &str, worker: Worker, variables: Variables, now: Instant) {
        let index =
            self.sites.iter().position(|site| site.host == host && !matches!(site.stage, Stage::Gone));
        let index = index.unwrap_or_else(|| self.add(host, now));
        let site = &mut self.sites[index];
        match site.stage {
            Stage::Ready(_) => site.start(worker, variables),
            _ => site.waiting.push((worker, variables)),
        }
    }

    fn add(&mut self, host: &str, now: Instant) -> usize {
        self.next += 1;
        self.sites.push(Site::new(host, self.next, now));
        self.sites.len() - 1
    }

    /// Sends a signal to a worker's process group; one that waits for its host is not started any more.
    pub fn signal(&mut self, host: &str, worker: Worker, signal: i32) {
        let ends = !matches!(signal, libc::SIGUSR1 | libc::SIGUSR2);
        for site in self.sites.iter_mut().filter(|site| site.host == host) {
            let before = site.waiting.len();
            site.waiting.retain(|(waiting, _)| *waiting != worker || !ends);
            if site.waiting.len() < before {
                self.news.push_back(News::Never(worker));
            } else if !matches!(site.stage, Stage::Reaching(_) | Stage::Gone) {
                site.order(&Order::Signal { rank: worker, signal, group: true }.line());
            }
        }
    }

    /// Lets go of hosts that are not needed any more.
    pub fn release(&mut self, needed: impl Fn(&str) -> bool) {
        for index in 0..self.sites.len() {
            let site = &mut self.sites[index];
            if site.waiting.is_empty() && !needed(&site.host) {
                Sites::finish_one(site);
            }
        }
    }

    /// Has everything ended that is left anywhere.
    pub fn finish(&mut self) {
        for site in &mut self.sites {
            for (worker, _) in std::mem::take(&mut site.waiting) {
                self.news.push_back(News::Never(worker));
            }
            Sites::finish_one(site);
        }
    }

    fn finish_one(site: &mut Site) {
        site.stage = match std::mem::replace(&mut site.stage, Stage::Gone) {
            Stage::Ready(mut link) => {
                link.order(&Order::Finish);
                Stage::Ending(link)
            }
            Stage::Ending(link) => Stage::Ending(link),
            stage => {
                site.stage = stage;
                site.close();
                Stage::Gone
            }
        };
    }

    /// Hosts that do not say that they have ended what is left there are not waited for any longer.
    pub fn give_up(&mut self) {
        for site in self.sites.iter_mut().filter(|site| !matches!(site.stage, Stage::Gone)) {
            self.news.push_back(News::Say(format!(
                "host '{}' does not say whether its workers have ended; they do when its agent hears nothing for a minute",
                site.host
            )));
            site.close();
        }
    }

    /// When [`Sites::tick`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        let busy = self.busy() >= AT_ONCE;
        let limit = self.reach.limit;
        let due = |site: &Site| match &site.stage {
            Stage::Reaching(candidate) => {
                let retry = candidate.retry_at.filter(|_| !busy);
                [retry, Some(candidate.since + limit)].into_iter().flatten().min()
            }
            Stage::Examined(link, _, until) => link.deadline().into_iter().chain([*until]).min(),
            Stage::Ready(link) | Stage::Ending(link) => link.deadline(),
            Stage::Gone => None,
        };
        self.sites.iter().filter_map(due).min()
    }

    fn busy(&self) -> usize {
        let tried = |site: &&Site| matches!(&site.stage, Stage::Reaching(c) if c.link.is_some());
        self.sites.iter().filter(tried).count()
    }

    /// Lets time pass. Whether what comes from hosts is being read: who does not listen cannot say that they are silent.
    pub fn tick(&mut self, now: Instant, listening: bool) {
        let mut busy = self.busy();
        for index in 0..self.sites.len() {
            let site = &mut self.sites[index];
            match &mut site.stage {
                Stage::Reaching(candidate) => {
                    if now >= candidate.since + self.reach.limit {
                        let said = candidate.said.last().map_or(String::new(), |said| format!(" ({said})"));
                        let seconds = self.reach.limit.as_secs();
                        let host = site.host.clone();
                        self.unreached(
                            index,
                            format!(
                                "host '{host}' was not reached within {seconds} s{said}; --start-timeout allows more"
                            ),
                        );
                    } else if candidate.retry_at.is_some_and(|at| at <= now) && busy < AT_ONCE {
                        busy += 1;
                        if let Err(error) = candidate.start(&self.reach.ssh) {
                            self.unreached(index, error.to_string());
                        }
                    }
                }
                Stage::Examined(_, _, until) if *until <= now => {
                    let host = site.host.clone();
                    let why = format!(
                        "host '{host}' does not answer any more ({} s); is it overloaded, or has the network failed?",
                        ways::PROBES.as_secs()
                    );
                    self.unreached(index, why);
                }
                Stage::Examined(link, ..) | Stage::Ready(link) | Stage::Ending(link) => {
                    if link.keep_alive(now, listening) {
                        link.last_words = "no sign of life for half a minute".to_owned();
                        self.gone(index);
                    }
                }
                Stage::Gone => {}
            }
        }
        // Who was to end and is wanted again begins anew.
        for site in self.sites.iter_mut().filter(|site| matches!(site.stage, Stage::Gone)) {
            if !site.waiting.is_empty() {
                self.next += 1;
                let waiting = std::mem::take(&mut site.waiting);
                *site = Site { waiting, ..Site::new(&site.host, self.next, now) };
            }
        }
        self.sites.retain(|site| !matches!(site.stage, Stage::Gone));
    }

    /// What to wait for: of which host, and which part of the connection to it. `listening`: whether its output can be
    /// taken.
    pub fn watched(&self, listening: bool) -> impl Iterator<Item = (usize, Part, &Link)> {
        self.sites.iter().enumerate().filter_map(|(index, site)| Some((index, site.link()?))).flat_map(
            move |(index, link)| {
                let parts = [
                    (Part::Reports, listening),
                    (Part::Errors, link.errors.is_some()),
                    (Part::Orders, !link.orders.is_empty()),
                ];
                parts.into_iter().filter(|(_, wanted)| *wanted).map(move |(part, _)| (index, part, link))
            },
        )
    }

    /// A part of a connection is ready.
    pub fn on_ready(&mut self, index: usize, part: Part) {
        let Some(site) = self.sites.get_mut(index) else { return };
        if let Stage::Reaching(candidate) = &mut site.stage {
            match part {
                Part::Errors => candidate.read_errors(),
                Part::Orders => {}
                Part::Reports => match candidate.read(&self.reach.ssh) {
                    Err(error) => self.unreached(index, error.to_string()),
                    Ok(()) => {
                        if let Some(agent) = candidate.agent.take() {
                            self.examine(index, agent);
                        }
                    }
                },
            }
            return;
        }
        let host = site.host.clone();
        let Some(link) = site.link_mut() else { return };
        match part {
            Part::Orders => link.orders.write_some(),
            Part::Errors => {
                let lines = link.read_errors();
                self.news.extend(lines.iter().map(|line| News::Say(format!("host '{host}': {line}"))));
            }
            Part::Reports => match link.read() {
                None => self.gone(index),
                Some(pieces) => {
                    for piece in pieces {
                        if self.take(index, piece).is_none() {
                            // No agent of ours can mean that.
                            self.gone(index);
                            return;
                        }
                    }
                }
            },
        }
    }

    /// Takes what an agent has sent; nothing where it cannot be meant.
    fn take(&mut self, index: usize, piece: Piece) -> Option<()> {
        let site = &self.sites[index];
        let host = site.host.clone();
        let line = match piece {
            Piece::Output { rank: worker, stream, bytes } => {
                self.news.push_back(News::Wrote { host, worker, stream, bytes: Some(bytes) });
                return Some(());
            }
            Piece::Line(line) => line,
        };
        let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
        match word {
            "pong" | "entered" => {}
            "absent" => {
                let words = absent(&host, &line, &self.reach.directory)?;
                self.news.push_back(News::Say(words));
            }
            "serving" | "mute" => self.served(index, &line),
            "reached" => {
                let to = unescape_text(rest.split(' ').next()?)?;
                let from = site.proof.clone();
                self.tried(&from, &to, ways::parse(&line)?);
            }
            "closed" => {
                let (worker, stream) = rest.split_once(' ')?;
                let (worker, stream) = (worker.parse().ok()?, stream.parse().ok().filter(|s| *s < 2)?);
                self.news.push_back(News::Wrote { host, worker, stream, bytes: None });
            }
            _ => self.news.push_back(News::Report(host, Report::parse(&line)?)),
        }
        Some(())
    }

    /// The connection to a host has ended.
    fn gone(&mut self, index: usize) {
        let site = &mut self.sites[index];
        let (host, words) = (site.host.clone(), site.last_words());
        match site.stage {
            Stage::Ready(_) => {
                self.close(index);
                self.news.push_back(News::Lost { host, why: format!("its connection ended{words}") });
            }
            Stage::Ending(_) => self.close(index),
            _ => self.unreached(index, format!("the connection to host '{host}' has ended{words}")),
        }
    }

    fn unreached(&mut self, index: usize, why: String) {
        self.sites[index].waiting.clear();
        self.close(index);
        let host = self.sites[index].host.clone();
        self.news.push_back(News::Unreached { host, why });
    }

    fn close(&mut self, index: usize) {
        self.sites[index].close();
        let proof = self.sites[index].proof.clone();
        for other in 0..self.sites.len() {
            if let Stage::Examined(_, Some(exam), _) = &mut self.sites[other].stage {
                exam.forget(&proof);
                self.judge(other);
            }
        }
    }
}
