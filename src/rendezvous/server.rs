//! The rendezvous service: it collects one card per rank and sends everybody the table of all. The launcher
//! runs it for the whole job; where there is no launcher, rank 0 runs it for one epoch.
#![forbid(unsafe_code)]

use super::Warn;
use super::approach::Caller;
use super::card::{Knob, Table};
use super::channel::Traffic;
use super::listen::{self, Doors};
use super::secret::Secret;
use crate::error::{Error, Result};
use crate::membership::regroup::Authority;
use crate::transport::wake::Waker;
use crate::types::Epoch;
use assembly::{Assembly, Terms};
use crossbeam::channel::{Sender, bounded};
use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

pub mod assembly;
mod book;
mod probes;
mod rounds;
mod service;

/// Where the service can be reached.
#[derive(Clone, Debug)]
pub enum Bind {
    /// All interfaces, this port (0: the kernel picks one).
    Everywhere(u16),
    /// Loopback and these interfaces (names or addresses), this port (0: the kernel picks one for each); all interfaces
    /// where this host has none of them.
    Interfaces(Vec<String>, u16),
    /// The loopback interface, this port (0: the kernel picks one).
    Loopback(u16),
    /// This address.
    Address(SocketAddr),
    /// A unix socket in this directory, which is made private to the user. Whoever connects is the same user
    /// and is handed the secret.
    Private(PathBuf),
}

impl Bind {
    /// The interfaces that a job may use, all where none are named.
    #[must_use]
    pub fn on(interfaces: Vec<String>, port: u16) -> Bind {
        if interfaces.is_empty() { Bind::Everywhere(port) } else { Bind::Interfaces(interfaces, port) }
    }
}

/// How to serve.
#[derive(Clone)]
pub struct ServerOptions {
    /// Where.
    pub bind: Bind,
    /// What everybody must prove.
    pub secret: Secret,
    /// How many ranks there are.
    pub size: u32,
    /// The first epoch that may be registered for.
    pub epoch: Epoch,
    /// End after the first table has been sent (rank 0's own service), or go on with later epochs.
    pub once: bool,
    /// An epoch whose ranks have not all registered this long after the first of them is refused.
    pub start_timeout_ms: u64,
    /// The addresses are written to this file, which is removed at the end.
    pub publish: Option<Publish>,
    /// Where warnings go.
    pub warn: Warn,
}

/// Who has arrived in the epoch that is being waited for; shared with whoever wants to know.
#[derive(Clone, Default)]
pub struct Arrivals(Arc<Mutex<Arrived>>);

#[derive(Default)]
struct Arrived {
    ranks: BTreeSet<u32>,
    complete: bool,
    traffic: Traffic,
}

impl Arrivals {
    fn lock(&self) -> std::sync::MutexGuard<'_, Arrived> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The ranks, ascending.
    #[must_use]
    pub fn list(&self) -> Vec<u32> {
        self.lock().ranks.iter().copied().collect()
    }

    /// Whether an epoch has begun: all its ranks had arrived.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.lock().complete
    }

    /// What has passed on the connections that are closed again.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.lock().traffic
    }

    /// A connection has closed.
    pub fn add(&self, traffic: Traffic) {
        let total = &mut self.lock().traffic;
        total.parts += traffic.parts;
        total.bytes += traffic.bytes;
    }

    /// One more has arrived.
    pub fn insert(&self, rank: u32) {
        self.lock().ranks.insert(rank);
    }

    /// These have arrived, and no others.
    pub fn set(&self, ranks: Vec<u32>) {
        self.lock().ranks = ranks.into_iter().collect();
    }

    /// All have.
    pub fn finish(&self) {
        self.lock().complete = true;
    }
}

/// A file for the addresses.
#[derive(Clone, Debug)]
pub struct Publish {
    /// The file.
    pub file: PathBuf,
    /// What else is removed at the end, the innermost last.
    pub litter: Vec<PathBuf>,
}

/// A running service; its thread ends with it.
pub struct Server {
    words: Option<Sender<Word>>,
    bell: Waker,
    addresses: Vec<SocketAddr>,
    arrivals: Arrivals,
    stop: Waker,
    thread: Option<JoinHandle<()>>,
}

/// The name of the socket in a private directory.
pub const PRIVATE_SOCKET: &str = "rendezvous";
/// What an unauthenticated connection has to greet, when others want its place.
pub(super) const GREETING_MS: u64 = 250;
/// The first line of a rendezvous file.
pub const FILE_TITLE: &str = "carole rendezvous 1";

/// Words of the launcher, which looks after the workers of an elastic job, to its rendezvous service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Word {
    /// This worker was started.
    Started(assembly::Worker),
    /// This worker's process has ended.
    Ended(assembly::Worker),
    /// This worker is to leave at the next change of epochs.
    Dismissed(assembly::Worker),
}

/// What an elastic job's service is told and tells.
#[derive(Clone, Debug)]
pub struct ElasticOptions {
    /// The fewest ranks of an epoch.
    pub min: u32,
    /// How long those who are there wait for others.
    pub patience: Duration,
    /// Silence after which somebody is held to be stopped.
    pub silence: Duration,
    /// Where events go, and who is woken for them.
    pub events: (Sender<assembly::Event>, Waker),
}

/// Words that wait for the service's thread; the launcher waits when there are more.
const WORDS_MAX: usize = 1024;

enum Door {
    Tcp(TcpListener),
    /// Whoever connects is handed the secret.
    Private(UnixListener),
    /// As by TCP.
    Host(UnixListener),
}

impl Server {
    /// Opens the doors and starts to serve.
    pub fn start(options: ServerOptions) -> Result<Server> {
        let mut litter = Litter(options.publish.as_ref().map_or_else(Vec::new, |p| p.litter.clone()));
        let (doors, addresses) = open(&options.bind, &mut litter)?;
        if let Some(Publish { file: path, .. }) = &options.publish {
            publish(path, &options, &addresses)?;
            litter.0.push(path.clone());
        }
        let book = book::Book::fixed(&options);
        Server::run(options, doors, litter, addresses, |_| Ok(book))
    }

    /// As [`Server::start`], for a job whose workers come and go.
    pub fn start_elastic(options: ServerOptions, elastic: ElasticOptions) -> Result<Server> {
        let mut litter = Litter(Vec::new());
        let (doors, addresses) = open(&options.bind, &mut litter)?;
        let terms = Terms {
            authority: Authority::Launcher,
            min: elastic.min,
            patience: elastic.patience,
            shortage: elastic.patience,
        };
        let assembly = Assembly::new(options.secret.job(), terms, None);
        let caller = Caller {
            card: super::found::bare_card(),
            epoch: Epoch(0),
            secret: options.secret.clone(),
            silence: elastic.silence,
        };
        let (words, heard) = bounded(WORDS_MAX);
        let mut server = Server::run(options, doors, litter, addresses, |bell| {
            let probes = probes::Probes::new(caller, bell.clone());
            Ok(book::Book::open(assembly, probes, Some(heard), Some(elastic.events)))
        })?;
        server.words = Some(words);
        Ok(server)
    }

    /// Lets the ranks of an epoch meet at the doors of one of them.
    pub fn start_at(
        doors: Doors,
        last: &Table,
        caller: Caller,
        patience: Duration,
        warn: Warn,
    ) -> Result<Server> {
        let terms = Terms { authority: Authority::Majority, min: 1, patience, shortage: patience };
        let options = ServerOptions {
            // Its doors are open already.
            bind: Bind::Loopback(0),
            secret: caller.secret.clone(),
            size: last.cards.len() as u32,
            epoch: Epoch(last.epoch.0 + 1),
            once: true,
            start_timeout_ms: patience.as_millis() as u64,
            publish: None,
            warn,
        };
        let assembly = Assembly::new(options.secret.job(), terms, Some(last));
        let list = Server::listeners(doors)?;
        Server::run(options, list, Litter(Vec::new()), Vec::new(), |bell| {
            Ok(book::Book::open(assembly, probes::Probes::new(caller, bell.clone()), None, None))
        })
    }

    fn listeners(doors: Doors) -> Result<Vec<Door>> {
        let copy = |e| Error::usage(format!("this rank's doors cannot be used for the meeting: {e}"));
        let mut list = Vec::new();
        for listener in &doors.tcp {
            list.push(Door::Tcp(listener.try_clone().map_err(copy)?));
        }
        if let Some(listener) = &doors.unix {
            list.push(Door::Host(listener.try_clone().map_err(copy)?));
        }
        Ok(list)
    }

    fn run(
        options: ServerOptions,
        doors: Vec<Door>,
        litter: Litter,
        addresses: Vec<SocketAddr>,
        book: impl FnOnce(&Waker) -> Result<book::Book>,
    ) -> Result<Server> {
        let system = |e| Error::usage(format!("cannot start the rendezvous service: {e}"));
        let (stop, bell) = (Waker::new().map_err(system)?, Waker::new().map_err(system)?);
        let book = book(&bell)?;
        let arrivals = Arrivals::default();
        let wakers = [stop.clone(), bell.clone()];
        let mut service =
            service::Service::new(options, doors, litter, wakers, book, arrivals.clone()).map_err(system)?;
        let thread = std::thread::Builder::new()
            .name("carole-rendezvous".into())
            .spawn(move || service.serve())
            .map_err(system)?;
        Ok(Server { words: None, bell, addresses, arrivals, stop, thread: Some(thread) })
    }

    /// Tells an elastic job's service what the launcher knows.
    pub fn tell(&self, word: Word) {
        if let Some(words) = &self.words {
            // A service that has ended needs to know nothing.
            let _ = words.send(word);
            self.bell.wake();
        }
    }

    /// Where it can be reached, best first; empty for a private socket.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Who has arrived.
    #[must_use]
    pub fn arrivals(&self) -> Arrivals {
        self.arrivals.clone()
    }

    /// Ends it: what is waiting to be sent gets a moment to leave. Bounded by `SHUTDOWN_MS`.
    pub fn shutdown(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// Files and directories that go when the service ends.
struct Litter(Vec<PathBuf>);

impl Drop for Litter {
    fn drop(&mut self) {
        for path in self.0.drain(..).rev() {
            // Somebody else may have removed it; a directory with somebody's files in it stays.
            let _ = std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir(&path));
        }
    }
}

fn open(bind: &Bind, litter: &mut Litter) -> Result<(Vec<Door>, Vec<SocketAddr>)> {
    let (listeners, port) = match bind {
        Bind::Private(directory) => return Ok((vec![open_private(directory, litter)?], Vec::new())),
        Bind::Everywhere(port) => (listen::listen_everywhere(*port), *port),
        Bind::Interfaces(names, port) => (listen::listen_on_or_everywhere(names, *port), *port),
        Bind::Loopback(port) => (listen::listen_loopback(*port), *port),
        Bind::Address(address) => (listen::listen(*address).map(|l| vec![l]), address.port()),
    };
    let listeners = listeners.map_err(|e| match e.kind() {
        std::io::ErrorKind::AddrInUse => Error::usage(format!(
            "port {port} is in use on this host, so the rendezvous cannot be served there: end the program that uses \
             it (ss -tlnp), or choose another port in CAROLE_RENDEZVOUS (under torchrun: CAROLE_RENDEZVOUS_PORT)"
        )),
        _ => Error::usage(format!("the rendezvous cannot be served at {bind:?}: {e}")),
    })?;
    let mut addresses = Vec::new();
    for listener in &listeners {
        let reachable = listener.local_addr().and_then(|local| listen::reachable(local, &[]));
        addresses
            .extend(reachable.map_err(|e| Error::usage(format!("cannot list this host's addresses: {e}")))?);
    }
    addresses.sort_by_key(|address| address.ip().is_loopback());
    Ok((listeners.into_iter().map(Door::Tcp).collect(), addresses))
}

fn open_private(directory: &Path, litter: &mut Litter) -> Result<Door> {
    let refuse =
        |why: String| Error::usage(format!("the rendezvous directory {}: {why}", directory.display()));
    match std::fs::DirBuilder::new().mode(0o700).create(directory) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(refuse(format!("cannot be made: {e}")));
        }
        _ => check_private(directory).map_err(refuse)?,
    }
    let path = directory.join(PRIVATE_SOCKET);
    let bound = match UnixListener::bind(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
            if UnixStream::connect(&path).is_ok() {
                return Err(refuse(
                    "another job is meeting there; give each job its own name in CAROLE_JOB".to_owned(),
                ));
            }
            // Left behind by a process that was killed: nobody listens.
            let _ = std::fs::remove_file(&path);
            UnixListener::bind(&path)
        }
        bound => bound,
    };
    let listener = bound.and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
    let listener = listener.map_err(|e| refuse(format!("no socket can be made in it: {e}")))?;
    litter.0.extend([directory.to_owned(), path]);
    Ok(Door::Private(listener))
}

/// A directory is private when it is a real one, ours, and closed to all others.
pub fn check_private(directory: &Path) -> std::result::Result<(), String> {
    let facts = std::fs::symlink_metadata(directory).map_err(|e| format!("cannot be examined: {e}"))?;
    is_private(&facts)
}

/// Whether what was found at a path is a private directory; the reason when it is not.
pub fn is_private(facts: &std::fs::Metadata) -> std::result::Result<(), String> {
    let me = rustix::process::geteuid().as_raw();
    if !facts.is_dir() || facts.uid() != me || facts.mode() & 0o077 != 0 {
        return Err(format!(
            "is not a directory of mode 0700 that belongs to user {me} (mode {:o}, user {}); remove it or set CAROLE_JOB",
            facts.mode() & 0o7777,
            facts.uid()
        ));
    }
    Ok(())
}

/// Writes the file beside its place and moves it there, so that no reader sees half of it.
fn publish(path: &Path, options: &ServerOptions, addresses: &[SocketAddr]) -> Result<()> {
    let mut text = format!("{FILE_TITLE}\njob {}\nepoch {}\n", options.secret.job(), options.epoch.0);
    for address in addresses {
        text.push_str(&format!("address {address}\n"));
    }
    let beside = path.with_extension(format!("{}.new", std::process::id()));
    let _ = std::fs::remove_file(&beside);
    let write = || {
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        std::io::Write::write_all(&mut file, text.as_bytes())?;
        std::fs::rename(&beside, path)
    };
    write().map_err(|e| {
        let _ = std::fs::remove_file(&beside);
        Error::usage(format!("CAROLE_RENDEZVOUS=file://{}: the file cannot be written: {e}", path.display()))
    })
}

/// What differs between the ranks' knobs, in words that are the same for everybody: the first knob by name,
/// and for each value the ranks that have it.
fn disagreement(registered: &[(u32, &[Knob])]) -> Option<String> {
    use std::collections::BTreeMap;
    let mut values: BTreeMap<&str, BTreeMap<&str, Vec<u32>>> = BTreeMap::new();
    for (rank, knobs) in registered {
        for (name, value) in *knobs {
            values.entry(name).or_default().entry(value).or_default().push(*rank);
        }
    }
    for (name, by_value) in values {
        let said: usize = by_value.values().map(Vec::len).sum();
        if by_value.len() == 1 && said == registered.len() {
            continue;
        }
        let mut parts: Vec<String> = by_value
            .iter()
            .map(|(value, ranks)| format!("{} on {}", quote(value), name_ranks(ranks)))
            .collect();
        if said < registered.len() {
            let silent: Vec<u32> = registered
                .iter()
                .filter(|(rank, _)| !by_value.values().any(|ranks| ranks.contains(rank)))
                .map(|(rank, _)| *rank)
                .collect();
            parts.push(format!("unknown on {}", name_ranks(&silent)));
        }
        return Some(format!(
            "{name} must be the same on all ranks, but it is {}; set it alike",
            parts.join(", ")
        ));
    }
    None
}

fn quote(value: &str) -> String {
    format!("'{value}'")
}

/// "rank 3" or "ranks 3, 4, 7 and 20 more".
fn name_ranks(ranks: &[u32]) -> String {
    const NAMED: usize = 16;
    let mut text = String::from(if ranks.len() == 1 { "rank " } else { "ranks " });
    let named: Vec<String> = ranks.iter().take(NAMED).map(u32::to_string).collect();
    text.push_str(&named.join(", "));
    if ranks.len() > NAMED {
        text.push_str(&format!(" and {} more", ranks.len() - NAMED));
    }
    text
}
