//! Elastic jobs: `carolerun --min-np 2 --max-np 8 --host-discovery-script ./hosts.sh python train.py`. Workers come and
//! go, those that live train on.
//!
//! [`discovery`] says which hosts there are, [`plan`] who should run on them, [`crew`] looks after those who do, and the
//! rendezvous service ([`crate::rendezvous::server::assembly`]) forms epochs of those who come to it. A worker is
//! started by the guard as a rank of any other job is ([`parcel`]); it has a number in place of a rank. Other hosts are
//! reached when the plan wants workers there ([`sites`]), by the same ssh and agents as those of other jobs, and a new
//! one gets workers only after it was seen to reach the others and to be reached by them ([`exam`]).
#![forbid(unsafe_code)]

mod crew;
mod discovery;
mod exam;
mod maker;
pub(super) mod parcel;
mod plan;
mod sites;

use super::args::Arguments;
use super::guard::{self, JobSpec};
use super::link::Link;
use super::remote::ssh::{self, Ssh};
use super::remote::{Task, common, preamble};
use super::{FORWARDED, PLACE, SPARE_FILES, address, hosts, pipe, sys, system};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::limits;
use crate::log;
use crate::rendezvous::secret::Secret;
use crate::rendezvous::server::{Bind, ElasticOptions, Server, ServerOptions};
use crate::transport::wake::Waker;
use crate::types::Epoch;
use crew::{Crew, Setup};
use crossbeam::channel::bounded;
use discovery::{Discovery, Hosts};
use maker::Maker;
use plan::{Plan, Terms};
use sites::{Reach, Sites};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For how long a host that failed is left alone, where nothing else is said: its first failure, and at most.
const COOLDOWN: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));
/// What may be asked for.
const COOLDOWN_MAX: Duration = Duration::from_secs(3600);
/// Events of the rendezvous that the launcher has not taken yet.
const EVENTS_MAX: usize = 1024;

/// Whether these arguments ask for an elastic job.
pub fn is_elastic(arguments: &Arguments) -> bool {
    let elastic = &arguments.elastic;
    elastic.min_num_proc.is_some()
        || elastic.max_num_proc.is_some()
        || elastic.host_discovery_script.is_some()
}

/// Runs the job to its end and returns the exit code.
pub fn run(arguments: &Arguments, called: &OsStr, config: &Config) -> Result<i32> {
    let terms = terms(arguments, config)?;
    let fixed = fixed_hosts(arguments, &terms)?;
    let ssh = Ssh::new(arguments.hosts.ssh(), called, |name| std::env::var(name).ok())?;
    // Workers that run already must be reached by those that a script may name later.
    let for_others = terms.changing || fixed.slots.iter().any(|(host, _)| !fixed.here.contains(host));
    let (open_files, _) = sys::open_files_limit();
    sys::set_open_files_limit(open_files.max(u64::from(terms.max.min(1 << 14)) * 6 + SPARE_FILES));
    let secret = Secret::mint()?;
    let (order_reader, order_writer) = pipe()?;
    let (report_reader, report_writer) = pipe()?;
    let (parcels, guards_parcels) = parcel::pair().map_err(system)?;
    let signals =
        sys::Signals::block(&[&FORWARDED[..], &[libc::SIGCHLD, libc::SIGTTOU]].concat()).map_err(system)?;
    let job = JobSpec {
        command: arguments.command.clone(),
        ranks: Vec::new(),
        removed: PLACE.to_vec(),
        shared: Vec::new(),
        secret: secret.to_hex(),
        keeps_stdin: false,
        open_files,
        parcels: Some(guards_parcels),
    };
    // Nothing of ours may run between fork and this point in another thread: rendezvous and discovery start later.
    sys::set_subreaper(true);
    let guard = match sys::fork().map_err(system)? {
        sys::Fork::Child => {
            drop((order_writer, report_reader, parcels));
            let life = std::panic::AssertUnwindSafe(|| {
                guard::run(job, File::from(order_reader), File::from(report_writer), &signals);
            });
            sys::exit_now(if std::panic::catch_unwind(life).is_ok() { 0 } else { 101 });
        }
        sys::Fork::Parent(pid) => pid,
    };
    drop((job, order_reader, report_writer));
    let begin = || -> Result<Crew> {
        let bell = Waker::new().map_err(system)?;
        let (tell, events) = bounded(EVENTS_MAX);
        let server = serve(config, &secret, &terms, for_others, (tell, bell.clone()))?;
        let now = Instant::now();
        let mut plan = Plan::new(terms, now, u64::from(std::process::id()));
        let script = arguments.elastic.host_discovery_script.clone();
        let slots = arguments.elastic.slots_per_host.unwrap_or(1);
        let start = |script| Discovery::start(script, slots, bell.clone());
        let discovery = script.map(start).transpose().map_err(system)?;
        if discovery.is_none() {
            plan.discovered(fixed.slots, now);
        }
        let guard = Link::local(guard, order_writer, report_reader, 0..0);
        let sites = Sites::new(reach(arguments, config, ssh, secret, (&server, bell.clone())));
        Crew::new(Setup {
            guard,
            parcels,
            sites,
            signals,
            plan,
            maker: Maker::new(arguments, config, address(&server)),
            server,
            events,
            bell,
            here: fixed.here,
            discovery,
            command: arguments.command[0].clone(),
            kill_after: Duration::from_secs_f64(arguments.kill_after),
            verbose: arguments.verbose,
        })
        .map_err(system)
    };
    // When it cannot begin, the guard sees the end of its orders, and ends.
    let result = begin().map(|mut crew| crew.supervise());
    sys::set_subreaper(false);
    sys::set_open_files_limit(open_files);
    result
}

/// What the user asks for, checked.
fn terms(arguments: &Arguments, config: &Config) -> Result<Terms> {
    let elastic = &arguments.elastic;
    let bad = |words: String| Err(Error::usage(words));
    let min = elastic.min_num_proc.or(arguments.num_proc).unwrap_or(1);
    let max = elastic.max_num_proc.unwrap_or(limits::RANKS_MAX as u32);
    let first = arguments.num_proc.unwrap_or(min);
    if min == 0 || max as usize > limits::RANKS_MAX || min > max {
        return bad(format!(
            "--min-np {min} and --max-np {max}: from 1 to {} processes, and not fewer at most than at least",
            limits::RANKS_MAX
        ));
    }
    if !(min..=max).contains(&first) {
        return bad(format!("-np {first} must be between --min-np {min} and --max-np {max}"));
    }
    if elastic.slots_per_host == Some(0) {
        return bad("--slots-per-host 0: a host has at least one slot".to_owned());
    }
    let cooldown = match &elastic.blacklist_cooldown_range[..] {
        [] => COOLDOWN,
        [least, most] if (1..=*most).contains(least) && Duration::from_secs(*most) <= COOLDOWN_MAX => {
            (Duration::from_secs(*least), Duration::from_secs(*most))
        }
        list => {
            return bad(format!(
                "--blacklist-cooldown-range {list:?}: two numbers of seconds, from 1 to {}, the smaller one first",
                COOLDOWN_MAX.as_secs()
            ));
        }
    };
    Ok(Terms {
        min,
        max,
        first,
        reset_limit: elastic.reset_limit,
        cooldown,
        timeout: Duration::from_secs(config.elastic_timeout_s),
        changing: elastic.host_discovery_script.is_some(),
    })
}

/// Hosts that do not change, where there is no script: those listed, or this one.
fn fixed_hosts(arguments: &Arguments, terms: &Terms) -> Result<Hosts> {
    let listed = arguments.hosts.hosts.is_some() || arguments.hosts.hostfile.is_some();
    if arguments.elastic.host_discovery_script.is_some() {
        return match listed {
            true => {
                Err(Error::usage("--host-discovery-script names the hosts; -H and --hostfile cannot, too"))
            }
            false => Ok(Hosts::default()),
        };
    }
    let hosts = arguments.hosts.source().or_found(|name| std::env::var(name).ok()).read()?;
    if hosts.is_empty() {
        let slots = arguments.elastic.slots_per_host.unwrap_or(terms.max.min(terms.first));
        return Ok(Hosts::new(vec![("localhost".to_owned(), slots)], &mut BTreeMap::new()));
    }
    let slots = hosts.iter().map(|host| (host.name.clone(), host.slots)).collect();
    let found = Hosts::new(slots, &mut BTreeMap::new());
    hosts::assign(&hosts, terms.first, |name| found.here.contains(name))?;
    Ok(found)
}

/// How other hosts are reached, and what each is told.
fn reach(
    arguments: &Arguments,
    config: &Config,
    ssh: Ssh,
    secret: Secret,
    (server, bell): (&Server, Waker),
) -> Reach {
    let directory = std::env::current_dir().unwrap_or_default();
    let shared = ssh::forwarded(std::env::vars_os());
    let task = Task { command: &arguments.command, directory: &directory, shared: &shared };
    Reach {
        ssh,
        preamble: preamble(&secret, &task),
        common: common(&task),
        secret,
        directory: directory.clone(),
        interfaces: arguments.hosts.network_interfaces.clone(),
        limit: Duration::from_secs(config.start_timeout_s),
        serves: server.addresses().to_vec(),
        bell,
    }
}

fn serve(
    config: &Config,
    secret: &Secret,
    terms: &Terms,
    for_others: bool,
    events: (crossbeam::channel::Sender<crate::rendezvous::server::assembly::Event>, Waker),
) -> Result<Server> {
    let options = ServerOptions {
        bind: if for_others { Bind::on(super::interfaces(config), 0) } else { Bind::Loopback(0) },
        secret: secret.clone().encrypting(config.encrypt),
        size: terms.max,
        epoch: Epoch(0),
        once: false,
        start_timeout_ms: config.start_timeout_s.saturating_mul(1000),
        publish: None,
        warn: Arc::new(|words: &str| log::warn(format_args!("{words}"))),
    };
    let elastic = ElasticOptions {
        min: terms.min,
        patience: terms.timeout,
        silence: Duration::from_millis(config.timeout_ms),
        events,
    };
    Server::start_elastic(options, elastic)
}
