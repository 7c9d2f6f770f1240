//! Joining a job: from the variables of this process to the table of all ranks. A worker of an elastic job comes back
//! here for each later epoch; how other ranks do that is said in [`super::reform`].
#![forbid(unsafe_code)]

use super::Warn;
use super::approach::{Ended, read_answer};
use super::card::{Answer, Knob, Registration, Table, frame};
use super::channel::{Channel, Stream};
use super::found::{Found, Veteran, card, over};
use super::listen::Doors;
use super::meet::{Goal, prepare, resolve, shared_files};
use super::past::Sets;
use super::place::{self, Environment, Hints, Meeting, Place};
use super::pmi;
use super::proof::{Handshake, Hello, ProofError, Purpose, SERVICE};
use super::reactor::timespec;
use super::secret::{SECRET_BYTES, Secret};
use super::server::{self, PRIVATE_SOCKET, Server};
use super::topology::Topology;
use crate::config::Config;
use crate::error::{Cause, Error, Result};
use crate::limits::{HANDSHAKE_MS, SILENCE_MS};
use crate::types::{Epoch, Rank};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the ranks wait for each other where nothing else is said.
pub const START_TIMEOUT_MS: u64 = 60_000;
/// Between two attempts; a change in the watched directory ends the pause early.
const PAUSE_MS: u64 = 100;
/// An address that does not answer is left for the next one after this long.
const CONNECT_MS: u64 = 3000;
/// What the service's own verdict may be later than its deadline.
const VERDICT_MS: u64 = 5000;
/// Bytes of a rendezvous file.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// How to join.
#[derive(Clone)]
pub struct Join {
    /// The variables that count; see [`place::environment`].
    pub environment: Environment,
    /// The epoch to take part in: how often this process has joined the job before.
    pub epoch: Epoch,
    /// Knobs that must be the same on every rank, with their values.
    pub knobs: Vec<Knob>,
    /// The widest vector instructions of this processor.
    pub simd: u8,
    /// A secret that the binding has exchanged by itself (torch's store, say); goes before all others.
    pub secret: Option<Secret>,
    /// Whether connections over TCP are encrypted.
    pub encrypts: bool,
    /// How long the ranks wait for each other.
    pub start_timeout_ms: u64,
    /// How long ranks wait for each other where they come and go: in an elastic job, and when they re-form.
    pub elastic_timeout_ms: u64,
    /// Silence after which a peer is held to be stopped.
    pub silence_ms: u64,
    /// Who this process is, where that does not come from variables.
    pub place: Option<Place>,
    /// How rank 0 can tell the others where to meet, where there is such a way.
    pub announce: Option<Announce>,
    /// Where warnings go.
    pub warn: Warn,
}

/// Tells all ranks what rank 0 says, before there are links: rank 0 gives words, and everybody gets them back. What
/// carries them is trusted.
pub type Announce = Arc<dyn Fn(Vec<u8>) -> Result<Vec<u8>> + Send + Sync>;

/// A rank that has joined.
pub struct Joined {
    /// This rank.
    pub rank: Rank,
    /// All ranks.
    pub table: Arc<Table>,
    /// Who shares a host with whom.
    pub topology: Arc<Topology>,
    /// The job's secret; every link proves it.
    pub secret: Secret,
    /// This rank's listeners, open since before it registered.
    pub doors: Doors,
    /// This rank's own service, which still sends the table to others and then ends by itself.
    pub server: Option<Server>,
    /// The connection to an elastic job's rendezvous, on which it tells of changes.
    pub leash: Option<Channel>,
    /// Where warnings go.
    pub warn: Warn,
}

impl Join {
    /// A join that takes everything from these variables.
    #[must_use]
    pub fn new(environment: Environment, epoch: Epoch, warn: Warn) -> Join {
        Join {
            environment,
            epoch,
            knobs: Vec::new(),
            simd: 0,
            secret: None,
            encrypts: false,
            start_timeout_ms: START_TIMEOUT_MS,
            elastic_timeout_ms: START_TIMEOUT_MS,
            silence_ms: SILENCE_MS,
            place: None,
            announce: None,
            warn,
        }
    }

    /// The join of this process as its configuration has settled it. Whatever the configuration knows comes
    /// from there, so that an argument of init() or a line of a file counts here as a variable does.
    #[must_use]
    pub fn from_config(
        config: &Config,
        own: impl Iterator<Item = (String, String)>,
        epoch: Epoch,
        warn: Warn,
    ) -> Join {
        let mut join = Join {
            knobs: config.agreed().into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
            start_timeout_ms: config.start_timeout_s.saturating_mul(1000),
            elastic_timeout_ms: config.elastic_timeout_s.saturating_mul(1000),
            silence_ms: config.timeout_ms,
            encrypts: config.encrypt,
            ..Join::new(place::environment(own, config), epoch, warn)
        };
        join.ask_launcher();
        join
    }

    /// Ranks on several hosts that MPICH's launcher or one like it has started meet through its PMI.
    fn ask_launcher(&mut self) {
        // What is wrong with the place is said when it is needed.
        let Ok(place) = Place::read(&self.environment) else { return };
        let descriptor = self.environment.get("PMI_FD").and_then(|text| text.parse().ok());
        let serves = place.origin == "PMI" && place.spans_hosts();
        if let Some(descriptor) = descriptor.filter(|_| serves) {
            let limit = Duration::from_millis(self.start_timeout_ms);
            self.announce = Some(pmi::announce(descriptor, place.rank, self.epoch, limit));
        }
    }
}

/// Finds the others and waits until all are there. Bounded by the start timeout.
pub fn join(config: &Join) -> Result<Joined> {
    if let Some(worker) = place::worker(&config.environment)? {
        return join_elastic(config, worker, None);
    }
    let place = config.place.clone().map_or_else(|| Place::read(&config.environment), Ok)?;
    let given = find_secret(config)?;
    let meeting = match config.announce.is_some() && place.size > 1 && !is_named(config) {
        true => Meeting::Announced,
        false => Meeting::read(&config.environment, &place, given.is_some(), parent())?,
    };
    if meeting == Meeting::Alone {
        return alone(config, &place);
    }
    let secret = match (&meeting, given) {
        (_, Some(secret)) => Some(secret),
        (Meeting::Private(_) | Meeting::Shared(_) | Meeting::Announced, None) => None,
        (meeting, None) => Some(insecure(config, meeting)),
    };
    let one_host = match &meeting {
        Meeting::Private(_) => true,
        Meeting::Service(list) => list.iter().all(|a| place::is_loopback(a)),
        Meeting::RankZero(address) => place::is_loopback(address),
        Meeting::Announced => place.hints.local_size == Some(place.size),
        Meeting::File(_) | Meeting::Shared(_) | Meeting::Alone => false,
    };
    let doors = Doors::open(one_host, &interfaces(config))?;
    let (server, secret, goal) = prepare(config, &place, meeting, secret)?;
    let registration = Registration {
        card: card(config, place.rank, place.hints, &doors),
        size: place.size,
        knobs: config.knobs.clone(),
        past: None,
    };
    let who = format!("rank {} of {}", place.rank, place.size);
    let found =
        Seeker { config, who, secret, goal, registration, patience_ms: config.start_timeout_ms }.seek()?;
    Ok(Joined { server, ..found.joined(config, doors) })
}

/// Comes to the launcher's rendezvous, for the first time or after an epoch, and waits for the next epoch. Bounded by
/// the elastic timeout.
pub fn join_elastic(config: &Join, worker: u32, veteran: Option<Veteran>) -> Result<Joined> {
    let addresses = match config.environment.get("CAROLE_RENDEZVOUS") {
        Some(list) => list.trim_start_matches("tcp://").split(',').map(|a| a.trim().to_owned()).collect(),
        None => Vec::new(),
    };
    if addresses.is_empty() || addresses.iter().any(|address: &String| place::check_address(address).is_err())
    {
        return Err(Error::usage(
            "CAROLE_WORKER is set, as carolerun does in an elastic job, but CAROLE_RENDEZVOUS names no launcher: start \
             the job by carolerun --min-np, or unset CAROLE_WORKER",
        ));
    }
    let (doors, secret, past) = match veteran {
        Some(Veteran { doors, secret, past }) => (doors, secret, Some(past)),
        None => {
            let one_host = addresses.iter().all(|address| place::is_loopback(address));
            let secret = find_secret(config)?.ok_or_else(|| {
                Error::usage(
                    "an elastic job's secret comes from carolerun in CAROLE_SECRET_FD, which is not set",
                )
            })?;
            (Doors::open(one_host, &interfaces(config))?, secret, None)
        }
    };
    let registration = Registration {
        card: card(config, worker, Hints::default(), &doors),
        size: 0,
        knobs: config.knobs.clone(),
        past,
    };
    let who = format!("worker {worker} of the elastic job");
    let (secret, goal) = (Some(secret), Goal::Names(addresses));
    let patience_ms = config.elastic_timeout_ms;
    Ok(Seeker { config, who, secret, goal, registration, patience_ms }.seek()?.joined(config, doors))
}

/// The interfaces that the job may use; empty for all.
pub(super) fn interfaces(config: &Join) -> Vec<String> {
    let list = config.environment.get("CAROLE_INTERFACES").map(String::as_str).unwrap_or_default();
    list.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect()
}

/// Whether the user says where to meet.
fn is_named(config: &Join) -> bool {
    config.environment.get("CAROLE_RENDEZVOUS").is_some_and(|text| !text.is_empty())
}

fn alone(config: &Join, place: &Place) -> Result<Joined> {
    let secret = Secret::mint()?.encrypting(config.encrypts);
    let doors = Doors::none();
    let table = Table {
        epoch: config.epoch,
        job: secret.job(),
        cards: vec![card(config, 0, place.hints, &doors)],
        knobs: config.knobs.clone(),
        simd: config.simd,
        sets: Sets { next: 1, ..Sets::default() },
    };
    Ok(Found { table, rank: Rank(0), secret, leash: None }.joined(config, doors))
}

fn find_secret(config: &Join) -> Result<Option<Secret>> {
    if let Some(secret) = &config.secret {
        return Ok(Some(secret.clone()));
    }
    if let Some(text) = config.environment.get("CAROLE_SECRET_FD") {
        let number = text.parse().map_err(|_| {
            Error::usage(format!("CAROLE_SECRET_FD={text}: it is the number of an inherited descriptor"))
        })?;
        return Secret::from_descriptor(number).map(Some);
    }
    match config.environment.get("CAROLE_SECRET_FILE") {
        Some(path) => Secret::from_file(Path::new(path)).map(Some),
        None => Ok(None),
    }
}

fn insecure(config: &Join, meeting: &Meeting) -> Secret {
    (config.warn)(
        "CAROLE_INSECURE=1: this job runs WITHOUT a secret. Anybody who can reach its ports can read and change its \
         data. Set CAROLE_SECRET_FILE instead",
    );
    let name = match meeting {
        Meeting::RankZero(address) => address.clone(),
        Meeting::Service(list) => list.join(","),
        Meeting::File(path) => path.display().to_string(),
        Meeting::Private(_) | Meeting::Shared(_) | Meeting::Announced | Meeting::Alone => String::new(),
    };
    Secret::insecure(&name)
}

fn parent() -> u32 {
    rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get() as u32)
}

struct Seeker<'a> {
    config: &'a Join,
    /// This process, for messages.
    who: String,
    secret: Option<Secret>,
    goal: Goal,
    registration: Registration,
    /// How long the service may wait for others.
    patience_ms: u64,
}

/// Why an attempt failed.
enum Failure {
    /// Another attempt may succeed.
    Again(String),
    /// None will.
    Final(String),
    /// The others go on without this process.
    Over(Cause),
}

impl Seeker<'_> {
    fn seek(&self) -> Result<Found> {
        let deadline = Instant::now() + Duration::from_millis(self.config.start_timeout_ms);
        let watch = self.watch();
        let mut last = "nothing was tried".to_owned();
        while Instant::now() < deadline {
            match self.attempt(deadline, &mut last) {
                Ok(found) => return Ok(found),
                Err(Failure::Final(why)) => return Err(self.error(&why)),
                Err(Failure::Over(cause)) => return Err(over(self.registration.past.as_ref(), cause)),
                Err(Failure::Again(why)) => last = why,
            }
            pause(&watch, deadline);
        }
        Err(self.error(&format!(
            "the rendezvous was not reached within {} s: {last}",
            self.config.start_timeout_ms as f64 / 1000.0
        )))
    }

    fn error(&self, why: &str) -> Error {
        Error::usage(format!("{} could not join the job: {why}", self.who))
    }

    /// Tells when a file appears, so that the pause between attempts need not be short.
    fn watch(&self) -> Option<OwnedFd> {
        let directory = match &self.goal {
            Goal::File(path) | Goal::Socket(path) | Goal::Shared(path) => path.parent()?,
            _ => return None,
        };
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).ok()?;
        let flags =
            inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO | inotify::WatchFlags::CLOSE_WRITE;
        inotify::add_watch(&watch, directory, flags).ok()?;
        Some(watch)
    }

    fn attempt(&self, deadline: Instant, last: &mut String) -> std::result::Result<Found, Failure> {
        let addresses = match &self.goal {
            Goal::Socket(directory) => return self.over_socket(directory),
            Goal::Addresses(addresses) => addresses.clone(),
            Goal::File(path) => read_file(path).map_err(Failure::Again)?,
            Goal::Shared(directory) => return self.over_shared(directory, deadline),
            Goal::Names(names) => {
                let mut addresses = Vec::new();
                for name in names {
                    match resolve(name) {
                        Ok(found) => addresses.extend(found),
                        Err(why) => *last = why,
                    }
                }
                addresses
            }
        };
        let secret = self.secret.as_ref().expect("every meeting over TCP has a secret");
        self.over_tcp(&addresses, secret, deadline, last)
    }

    /// By what rank 0 has left in a directory that all hosts see.
    fn over_shared(&self, directory: &Path, deadline: Instant) -> std::result::Result<Found, Failure> {
        let again = |why: String| {
            Failure::Again(format!(
                "{why} (ranks on several hosts meet in this directory, which must be on a file system that all of them \
                 see; otherwise set CAROLE_RENDEZVOUS=HOST:PORT of rank 0 and CAROLE_SECRET_FILE)"
            ))
        };
        let files = shared_files(directory);
        let addresses = read_file(&files.addresses).map_err(again)?;
        // What lies there may be an earlier job's, until rank 0 has written its own.
        let secret = match &self.secret {
            Some(secret) => secret.clone(),
            None => Secret::from_file(&files.secret).map_err(|e| again(e.to_string()))?,
        };
        self.over_tcp(&addresses, &secret, deadline, "no address was told")
    }

    fn over_tcp(
        &self,
        addresses: &[SocketAddr],
        secret: &Secret,
        deadline: Instant,
        last: &str,
    ) -> std::result::Result<Found, Failure> {
        let mut failure = Failure::Again(last.to_owned());
        for address in addresses {
            let left =
                deadline.saturating_duration_since(Instant::now()).min(Duration::from_millis(CONNECT_MS));
            if left.is_zero() {
                break;
            }
            let stream = match TcpStream::connect_timeout(address, left) {
                Ok(stream) => stream,
                Err(e) => {
                    failure = Failure::Again(format!("{address}: {e}"));
                    continue;
                }
            };
            match self.register(Stream::Tcp(stream), secret) {
                Err(Failure::Again(why)) => failure = Failure::Again(format!("{address}: {why}")),
                settled => return settled,
            }
        }
        Err(failure)
    }

    fn over_socket(&self, directory: &Path) -> std::result::Result<Found, Failure> {
        let where_ = directory.join(PRIVATE_SOCKET);
        let again = |why: String| {
            Failure::Again(format!(
                "{}: {why} (without a secret only ranks of one host and one user meet; ranks on several hosts need \
                 CAROLE_RENDEZVOUS and CAROLE_SECRET_FILE; ranks started by different parents need the same CAROLE_JOB)",
                where_.display()
            ))
        };
        // Looked at once only: rank 0 may be making it right now, and then the next attempt finds it.
        match std::fs::symlink_metadata(directory) {
            Err(e) => return Err(again(e.to_string())),
            Ok(facts) => server::is_private(&facts).map_err(|why| {
                Failure::Final(format!("the rendezvous directory {} {why}", directory.display()))
            })?,
        }
        let stream = UnixStream::connect(&where_).map_err(|e| again(e.to_string()))?;
        let peer = rustix::net::sockopt::socket_peercred(&stream).map_err(|e| again(e.to_string()))?;
        if peer.uid != rustix::process::geteuid() {
            return Err(Failure::Final(format!("{} is served by another user", where_.display())));
        }
        let mut channel = Channel::new(Stream::Unix(stream)).map_err(|e| again(e.to_string()))?;
        let deadline = Instant::now() + Duration::from_millis(HANDSHAKE_MS);
        let mut bytes = [0; SECRET_BYTES];
        bytes.copy_from_slice(read(&mut channel, SECRET_BYTES, deadline).map_err(again)?);
        channel.taken();
        // A secret that was given too is the same one, or the handshake fails.
        let secret = self.secret.clone().unwrap_or_else(|| Secret::from_bytes(bytes));
        bytes.fill(0);
        self.register_on(channel, &secret)
    }

    fn register(&self, stream: Stream, secret: &Secret) -> std::result::Result<Found, Failure> {
        let channel = Channel::new(stream).map_err(|e| Failure::Again(e.to_string()))?;
        self.register_on(channel, secret)
    }

    fn register_on(&self, mut channel: Channel, secret: &Secret) -> std::result::Result<Found, Failure> {
        let secret = &secret.clone().encrypting(self.config.encrypts);
        let ends = (self.registration.card.rank, SERVICE);
        let hello = Hello::new(secret, self.config.epoch, ends, Purpose::Register, 0)
            .map_err(|e| Failure::Final(format!("the kernel gave no random bytes: {e}")))?;
        let mut handshake = Handshake::connector(secret, hello);
        let deadline = Instant::now() + Duration::from_millis(HANDSHAKE_MS);
        while !channel.prove(&mut handshake).map_err(|e| self.judge(e))? {
            if !channel.wait(deadline).map_err(|e| Failure::Again(e.to_string()))? {
                return Err(Failure::Again("it did not prove itself in time".into()));
            }
        }
        channel.queue(&frame(&self.registration.encode()));
        // From here the service decides; its deadline began when the first rank registered.
        let deadline = Instant::now() + Duration::from_millis(self.patience_ms + VERDICT_MS);
        let lost =
            |why: &str| Failure::Again(format!("the rendezvous ended while ranks were arriving: {why}"));
        match read_answer(&mut channel, deadline).map_err(|Ended| lost("it closed the connection"))? {
            None => Err(lost("no answer came in time")),
            Some(Answer::Refused(reason)) => Err(Failure::Final(reason)),
            Some(Answer::Excluded(epoch)) => Err(Failure::Over(Cause::Excluded { epoch })),
            Some(Answer::Minority { here, of }) => Err(Failure::Over(Cause::Minority { here, of })),
            Some(Answer::Table(table)) => self.check(table, secret, channel),
            Some(_) => Err(Failure::Final("the rendezvous sent an answer that makes no sense here".into())),
        }
    }

    fn check(&self, table: Table, secret: &Secret, channel: Channel) -> std::result::Result<Found, Failure> {
        let Registration { card, size, .. } = &self.registration;
        let found = Found::of(table, card, secret).map_err(Failure::Final)?;
        if *size == 0 {
            return Ok(Found { leash: Some(channel), ..found });
        }
        match found.table.epoch == self.config.epoch
            && found.rank == card.rank
            && found.table.cards.len() == *size as usize
        {
            true => Ok(found),
            false => Err(Failure::Final("the rendezvous sent the table of another epoch".into())),
        }
    }

    /// A wrong answer at a place that was named is final. A file may be an earlier job's, and whoever closes early
    /// may be overrun or about to be replaced.
    fn judge(&self, error: ProofError) -> Failure {
        let text = format!("the rendezvous could not be proven: {error}");
        match error {
            ProofError::Closed | ProofError::ClosedAtTls => Failure::Again(text),
            _ if matches!(self.goal, Goal::File(_) | Goal::Shared(_)) => Failure::Again(text),
            _ => Failure::Final(text),
        }
    }
}

fn read(channel: &mut Channel, want: usize, deadline: Instant) -> std::result::Result<&[u8], String> {
    loop {
        channel.flush().map_err(|e| e.to_string())?;
        if channel.fill(want).map_err(|e| e.to_string())?.is_some() {
            break;
        }
        if !channel.wait(deadline).map_err(|e| e.to_string())? {
            return Err("no answer came in time".into());
        }
    }
    Ok(channel.fill(want).map_err(|e| e.to_string())?.expect("all of it is there"))
}

fn read_file(path: &Path) -> std::result::Result<Vec<SocketAddr>, String> {
    use std::io::Read;
    let wrong = |why: &str| format!("{}: {why}", path.display());
    let file = std::fs::File::open(path).map_err(|e| wrong(&format!("rank 0 has not written it: {e}")))?;
    let mut text = String::new();
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(|e| wrong(&e.to_string()))?;
    let mut lines = text.lines();
    if lines.next() != Some(server::FILE_TITLE) {
        return Err(wrong("it is not a rendezvous file of this version"));
    }
    Ok(lines.filter_map(|line| line.strip_prefix("address ")?.parse().ok()).collect())
}

/// Waits for the watched directory to change, at most for a pause.
fn pause(watch: &Option<OwnedFd>, deadline: Instant) {
    let left = deadline.saturating_duration_since(Instant::now()).min(Duration::from_millis(PAUSE_MS));
    let timeout = timespec(left);
    match watch {
        None => {
            let _ = poll(&mut [], Some(&timeout));
        }
        Some(watch) => {
            let _ = poll(&mut [PollFd::new(watch, PollFlags::IN)], Some(&timeout));
            // What changed does not matter: the next attempt looks for itself.
            let mut names = [0u8; 4096];
            while rustix::io::read(watch, &mut names).is_ok_and(|n| n > 0) {}
        }
    }
}
