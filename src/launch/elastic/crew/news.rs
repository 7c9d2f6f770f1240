//! What guards report, on this host and on others, and what becomes of workers.
#![forbid(unsafe_code)]

use super::super::super::USAGE;
use super::super::super::ending::{Ending, LOST, refusal};
use super::super::super::guard::Report;
use super::super::super::remote::words::Piece;
use super::super::plan::Worker;
use super::super::sites::News;
use super::{Crew, Stage};
use crate::rendezvous::server::Word;
use std::time::Instant;

impl Crew {
    /// A line of the guard of this host.
    pub(super) fn on_piece(&mut self, piece: Piece) {
        if let Piece::Line(line) = piece {
            self.on_report(Report::parse(&line).expect("the guard writes only reports"));
        }
    }

    /// Takes what has happened on other hosts.
    pub(super) fn on_news(&mut self) {
        while let Some(news) = self.setup.sites.poll() {
            match news {
                News::Say(words) => self.say(&words),
                News::Unreached { host, why } => self.on_unreached(&host, &why),
                News::Lost { host, why } => self.on_lost(&host, &why),
                // An agent speaks of its own workers only.
                News::Report(host, report) if report.rank().is_none_or(|w| self.lives_on(w, &host)) => {
                    self.on_report(report);
                }
                News::Wrote { host, worker, stream, bytes } if self.lives_on(worker, &host) => {
                    self.on_output(worker, stream, bytes);
                }
                News::Report(..) | News::Wrote { .. } => {}
                News::Never(worker) => {
                    self.close_streams(worker);
                    self.on_end(worker, Ending::Killed(libc::SIGTERM));
                }
            }
        }
        self.look_whether_all_have_gone();
    }

    fn lives_on(&self, worker: Worker, host: &str) -> bool {
        self.people.get(&worker).is_some_and(|person| person.host.as_deref() == Some(host))
    }

    fn on_output(&mut self, worker: Worker, stream: usize, bytes: Option<Vec<u8>>) {
        let mut complaints = Vec::new();
        if let Some(person) = self.people.get_mut(&worker) {
            match bytes {
                Some(bytes) => person.streams[stream].take(&bytes, &mut self.sinks[stream], &mut complaints),
                None => person.streams[stream].close(&mut self.sinks[stream]),
            }
        }
        complaints.iter().for_each(|words| self.say(words));
    }

    fn close_streams(&mut self, worker: Worker) {
        if let Some(person) = self.people.get_mut(&worker) {
            for (stream, sink) in person.streams.iter_mut().zip(&mut self.sinks) {
                stream.close(sink);
            }
        }
    }

    /// All workers of a host are no more, those that have ended before included: nothing more comes from there.
    fn bury(&mut self, host: &str) -> Vec<Worker> {
        let there = self.people.iter().filter(|(_, person)| person.host.as_deref() == Some(host));
        let there: Vec<(Worker, bool)> = there.map(|(worker, person)| (*worker, person.runs)).collect();
        for &(worker, ran) in &there {
            self.close_streams(worker);
            if let Some(person) = self.people.get_mut(&worker) {
                person.runs = false;
            }
            if ran {
                self.setup.server.tell(Word::Ended(worker as u32));
            }
        }
        there.into_iter().filter(|(_, ran)| *ran).map(|(worker, _)| worker).collect()
    }

    fn on_unreached(&mut self, host: &str, why: &str) {
        let workers = self.bury(host);
        if self.stage == Stage::Running {
            self.setup.plan.unfit(host, &workers, why, (USAGE, true), Instant::now());
        } else {
            self.see_whether_all_have_ended();
        }
    }

    fn on_lost(&mut self, host: &str, why: &str) {
        let workers = self.bury(host);
        if self.stage != Stage::Running {
            return self.see_whether_all_have_ended();
        }
        if workers.is_empty() {
            self.say(&format!("host '{host}' is lost: {why}; nobody ran there"));
        } else {
            self.setup.plan.lost(host, LOST, why, Instant::now());
        }
    }

    fn on_report(&mut self, report: Report) {
        match report {
            Report::Started { rank, pid } => {
                if self.setup.verbose {
                    let there = self.people.get(&rank).and_then(|person| person.host.clone());
                    let there = there.map_or(String::new(), |host| format!(" on host '{host}'"));
                    self.say(&format!("worker {rank} is process {pid}{there}"));
                }
            }
            Report::Refused { rank, errno } => self.on_refused(rank, errno),
            Report::Exited { rank, code } => self.on_end(rank, Ending::Exited(code)),
            Report::Killed { rank, signal } => self.on_end(rank, Ending::Killed(signal)),
            Report::Left { count } => {
                self.say(&format!("{count} processes of the job do not die of SIGKILL; see ps for state D"));
            }
        }
    }

    fn on_refused(&mut self, worker: Worker, errno: i32) {
        self.setup.server.tell(Word::Ended(worker as u32));
        let Some(person) = self.people.get_mut(&worker) else { return };
        person.runs = false;
        match person.host.clone() {
            // Other hosts may have what this one lacks.
            Some(host) => {
                let (code, why) = refusal(&self.setup.command, errno, Some(&host));
                self.close_streams(worker);
                if self.stage == Stage::Running {
                    self.setup.plan.unfit(&host, &[worker], &why, (code, false), Instant::now());
                }
            }
            None => {
                let command = self.setup.command.to_string_lossy();
                let error = std::io::Error::from_raw_os_error(errno);
                let code = if errno == libc::ENOENT { 127 } else { 126 };
                let why = format!("the command '{command}' cannot be started: {error}");
                self.setup.plan.refused(worker, code, why);
            }
        }
        if self.stage != Stage::Running {
            self.see_whether_all_have_ended();
        }
    }

    fn on_end(&mut self, worker: Worker, ending: Ending) {
        self.setup.server.tell(Word::Ended(worker as u32));
        let Some(person) = self.people.get_mut(&worker).filter(|person| person.runs) else {
            // It ends once; what an agent says twice is no news.
            return;
        };
        person.runs = false;
        if self.setup.verbose {
            self.say(&format!("worker {worker} {}", ending.words()));
        }
        if self.stage == Stage::Running {
            self.setup.plan.ended(worker, ending.code(), &ending.words(), Instant::now());
        } else {
            self.see_whether_all_have_ended();
        }
    }

    fn see_whether_all_have_ended(&mut self) {
        if !self.people.values().any(|person| person.runs) {
            self.finish();
        }
    }

    /// Hosts that are not needed any more are let go.
    pub(super) fn release(&mut self) {
        if self.stage == Stage::Running {
            let plan = &self.setup.plan;
            self.setup.sites.release(|host| plan.needs(host));
        }
    }
}
