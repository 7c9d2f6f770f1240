//! Elastic jobs: `carolerun --min-np 2 --max-np 8 --host-discovery-script ./hosts.sh python train.py`. Workers come and
//! go, those that live train on.
//!
//! [`discovery`] says which hosts there are, [`plan`] who should run on them, [`crew`] looks after those who do, and the
//! rendezvous service ([`crate::rendezvous::server::assembly`]) forms epochs of those who come to it. A worker is
//! started by the guard as a rank of any other job is ([`parcel`]); it has a number in place of a rank.
#![forbid(unsafe_code)]

mod crew;
mod discovery;
pub(super) mod parcel;
mod plan;

use super::args::Arguments;
use super::guard::{self, JobSpec, RankSpec};
use super::output::Stream;
use super::{FORWARDED, PLACE, SPARE_FILES, address, copy_to_files, hosts, pipe, sys, system};
use crate::config::{Config, Layer};
use crate::error::{Error, Result};
use crate::limits;
use crate::log;
use crate::rendezvous::secret::Secret;
use crate::rendezvous::server::{Bind, ElasticOptions, Server, ServerOptions};
use crate::transport::wake::Waker;
use crate::types::Epoch;
use crew::{Crew, MakeWorker, Setup};
use crossbeam::channel::bounded;
use discovery::{Discovery, Slots};
use plan::{Plan, Terms};
use std::fs::File;
use std::os::fd::AsFd;
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
pub fn run(arguments: &Arguments, config: &Config) -> Result<i32> {
    let terms = terms(arguments, config)?;
    let fixed = fixed_hosts(arguments, &terms)?;
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
        let server = serve(config, secret, &terms, (tell, bell.clone()))?;
        let now = Instant::now();
        let mut plan = Plan::new(terms, now, u64::from(std::process::id()));
        let script = arguments.elastic.host_discovery_script.clone();
        let slots = arguments.elastic.slots_per_host.unwrap_or(1);
        let start = |script| Discovery::start(script, slots, bell.clone());
        let discovery = script.map(start).transpose().map_err(system)?;
        if discovery.is_none() {
            plan.discovered(fixed, now);
        }
        Crew::new(Setup {
            guard,
            orders: File::from(order_writer),
            parcels,
            reports: File::from(report_reader),
            signals,
            plan,
            make: make_worker(arguments, config, address(&server)),
            server,
            events,
            bell,
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
    let timeout = Duration::from_secs(config.elastic_timeout_s);
    Ok(Terms { min, max, first, reset_limit: elastic.reset_limit, cooldown, timeout })
}

/// Hosts that do not change, where there is no script: those listed, or this one.
fn fixed_hosts(arguments: &Arguments, terms: &Terms) -> Result<Slots> {
    let listed = arguments.hosts.hosts.is_some() || arguments.hosts.hostfile.is_some();
    if arguments.elastic.host_discovery_script.is_some() {
        return match listed {
            true => {
                Err(Error::usage("--host-discovery-script names the hosts; -H and --hostfile cannot, too"))
            }
            false => Ok(Slots::new()),
        };
    }
    let hosts = arguments.hosts.source().read()?;
    if !hosts.is_empty() {
        hosts::assign(&hosts, terms.first, hosts::is_this_host)?;
        for host in &hosts {
            check_local(&host.name)?;
        }
        return Ok(hosts.into_iter().map(|host| (host.name, host.slots)).collect());
    }
    Ok(vec![("localhost".to_owned(), arguments.elastic.slots_per_host.unwrap_or(terms.max.min(terms.first)))])
}

/// Workers that come and go are started on this host only, so far.
fn check_local(host: &str) -> Result<()> {
    if hosts::is_this_host(host) {
        return Ok(());
    }
    Err(Error::usage(format!(
        "workers of an elastic job cannot be started on '{host}': this version of carolerun starts them on its own host \
         only. Name this host (localhost:4), or leave the elastic flags (--min-np, --max-np, --host-discovery-script) out"
    )))
}

fn serve(
    config: &Config,
    secret: Secret,
    terms: &Terms,
    events: (crossbeam::channel::Sender<crate::rendezvous::server::assembly::Event>, Waker),
) -> Result<Server> {
    let options = ServerOptions {
        bind: Bind::Loopback(0),
        secret,
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

/// How workers are made: each with pipes of its own, and variables that say where it is to come.
fn make_worker(arguments: &Arguments, config: &Config, rendezvous: String) -> MakeWorker {
    let timestamps = arguments.output.prefix_output_with_timestamp;
    let settings: Vec<(String, String)> =
        config.set_by(Layer::Flag).into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let (plain, folder) = (arguments.plain_output, arguments.output.output_filename.clone());
    Box::new(move |worker, host| {
        // Where workers are started on other hosts, they are started from here.
        check_local(host.split(':').next().unwrap_or(host))?;
        let (out_reader, stdout) = pipe()?;
        let (err_reader, stderr) = pipe()?;
        let prefix = |name: &str| if plain { String::new() } else { format!("[worker {worker}]<{name}>:") };
        let mut pair = [
            Stream::new(out_reader, prefix("stdout"), timestamps),
            Stream::new(err_reader, prefix("stderr"), timestamps),
        ];
        if let Some(folder) = &folder {
            copy_to_files(&mut pair, folder, worker as u32, 1)?;
        }
        for stream in &pair {
            let pipe = stream.pipe().expect("a new stream has its pipe");
            rustix::io::ioctl_fionbio(pipe.as_fd(), true).map_err(|e| system(e.into()))?;
        }
        let mut variables = vec![
            ("CAROLE_WORKER".to_owned(), worker.to_string()),
            ("CAROLE_RENDEZVOUS".to_owned(), rendezvous.clone()),
            // Scripts that were written for Horovod read these.
            ("HOROVOD_ELASTIC".to_owned(), "1".to_owned()),
            ("HOROVOD_HOSTNAME".to_owned(), host.to_owned()),
        ];
        if std::env::var_os("PYTHONUNBUFFERED").is_none() {
            variables.push(("PYTHONUNBUFFERED".to_owned(), "1".to_owned()));
        }
        variables.extend(settings.iter().cloned());
        Ok((RankSpec { variables, stdout, stderr }, pair))
    })
}
