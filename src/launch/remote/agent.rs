//! The agent: `carolerun` on another host, started by ssh, that does there what the launcher does here. It reads its
//! orders from standard input and writes reports, and what its ranks write, to standard output. Its life hangs on
//! the connection: when standard input ends, or nothing has come for a minute, it ends its ranks and itself.
#![forbid(unsafe_code)]

use super::super::FORWARDED;
use super::super::guard::{Lines, Order};
use super::super::sys::Signals;
use super::probe::{self, Answerer};
use super::relay::Relay;
use super::words::{GREETING, PROTOCOL, escape, unescape, unescape_text};
use super::{SILENCE_AGENT, facts};
use crate::rendezvous::secret::Secret;
use crate::rendezvous::{build, listen};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

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

/// The order to begin without ranks, in a job whose workers come and go: each is ordered by itself.
pub const OPEN: &str = "open";

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
            let start = Order::parse(&line).filter(|order| matches!(order, Order::Start { .. }));
            if start.is_some() || line == OPEN {
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
    let mut relay = Relay::start(job, start.is_none(), orders, lines, signals)?;
    start.iter().for_each(|start| relay.order(start));
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

/// Whether a signal came that ends the agent.
pub fn ended_by_signal(signals: &Signals) -> bool {
    let mut ended = false;
    while let Some(signal) = signals.next() {
        ended |= signal != libc::SIGCHLD;
    }
    ended
}

/// As the kernel wants it.
pub fn timespec(time: Duration) -> Timespec {
    // Rounded up, or the loop would turn until the deadline is truly over.
    let time = time + Duration::from_millis(1);
    Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() }
}

/// What the agent is told before it starts anything.
#[derive(Default)]
pub struct Job {
    /// The job's secret.
    pub secret: Option<Secret>,
    answerer: Option<Answerer>,
    /// The command and its arguments.
    pub command: Vec<OsString>,
    /// Variables of all ranks.
    pub shared: Vec<(OsString, OsString)>,
    /// Those of each rank.
    pub ranks: Vec<Variables>,
}

/// Names and values.
pub type Variables = Vec<(String, String)>;

/// Names and values, each as a word.
pub fn variables(words: &[&str]) -> Option<Variables> {
    let pair = |pair: &[&str]| Some((unescape_text(pair[0])?, unescape_text(pair[1])?));
    words.chunks_exact(2).map(pair).collect()
}

/// Opens ports at which other hosts can see whether they reach this one: `serve NAME INTERFACE...`. The answer says
/// where.
pub fn serve(secret: Secret, words: &[&str]) -> Option<(Option<Answerer>, String)> {
    let name = unescape_text(words.first()?)?;
    let interfaces: Option<Vec<String>> = words[1..].iter().map(|word| unescape_text(word)).collect();
    Some(match Answerer::start(secret, name, &interfaces?) {
        Ok(answerer) => {
            let addresses: Vec<String> = answerer.addresses().iter().map(ToString::to_string).collect();
            (Some(answerer), format!("serving {}\n", addresses.join(" ")))
        }
        Err(e) => (None, format!("mute {}\n", escape(e.to_string().as_bytes()))),
    })
}

/// Sees at which addresses another host is reached: `reach NAME ADDRESS...`.
pub fn reach(secret: &Secret, words: &[&str]) -> Option<String> {
    let (name, addresses) = words.split_first()?;
    let addresses: Option<Vec<SocketAddr>> = addresses.iter().map(|word| word.parse().ok()).collect();
    let found = probe::reach(secret, &unescape_text(name)?, &addresses?);
    let parts: Vec<String> = found
        .into_iter()
        .map(|(address, reached)| match reached {
            Ok(()) => format!("{address} %"),
            Err(why) => format!("{address} {}", escape(why.as_bytes())),
        })
        .collect();
    Some(format!("reached {name} {}\n", parts.join(" ")))
}

impl Job {
    /// Obeys an order that comes before the start, and gives the answer, which may be empty.
    fn prepare(&mut self, line: &str) -> Option<String> {
        let (order, rest) = line.split_once(' ').unwrap_or((line, ""));
        let words: Vec<&str> = rest.split(' ').filter(|word| !word.is_empty()).collect();
        match order {
            "ping" => return Some("pong\n".to_owned()),
            "secret" => self.secret = Some(Secret::from_hex(rest).ok()?),
            "serve" => {
                let (answerer, answer) = serve(self.secret.clone()?, &words)?;
                self.answerer = answerer;
                return Some(answer);
            }
            "reach" => return reach(self.secret.as_ref()?, &words),
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
            "rank" => self.ranks.push(variables(&words)?),
            _ => return None,
        }
        Some(String::new())
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
