//! Who this process is and how it finds the others, read from variables. A pure function of them.
#![forbid(unsafe_code)]

use super::train_job;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::limits::RANKS_MAX;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The variables that count: the process's own, with what the configuration has settled laid over them.
pub type Environment = BTreeMap<String, String>;

/// The variables that count. A knob says what the configuration has settled, from whatever source; the
/// process's own variables say the rest (other launchers' names, the user's directories).
#[must_use]
pub fn environment(own: impl Iterator<Item = (String, String)>, config: &Config) -> Environment {
    let mut environment: Environment = own.collect();
    for (name, value) in config.settled() {
        match value {
            Some(value) => drop(environment.insert(name.to_owned(), value)),
            // It may stand there empty, or as "auto".
            None => drop(environment.remove(name)),
        }
    }
    environment
}

/// Who this process is, as the one that started it says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// This process, among all.
    pub rank: u32,
    /// All processes.
    pub size: u32,
    /// What else was said.
    pub hints: Hints,
    /// Whose variables these are, for messages.
    pub origin: &'static str,
}

/// What the variables say about hosts. It is checked against what the ranks find out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Hints {
    /// This process, among those on its host.
    pub local_rank: Option<u32>,
    /// Processes on its host.
    pub local_size: Option<u32>,
    /// Its host, among the hosts that have this local rank.
    pub cross_rank: Option<u32>,
    /// Hosts that have this local rank.
    pub cross_size: Option<u32>,
}

/// How the ranks find each other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Meeting {
    /// Alone: there is nobody to find.
    Alone,
    /// A service that somebody else (the launcher) runs at these addresses, tried in order.
    Service(Vec<String>),
    /// Rank 0 serves at this address, which all ranks were told.
    RankZero(String),
    /// Rank 0 serves and writes its addresses to this file.
    File(PathBuf),
    /// Rank 0 serves on a unix socket in a private directory, named after this key. One host, one user.
    Private(String),
    /// Rank 0 serves and leaves its addresses and a new secret in this directory of the user's, which is private and
    /// which all hosts see.
    Shared(PathBuf),
    /// Rank 0 serves and tells the others where, and a new secret, by the way that the launcher gives them.
    Announced,
}

struct Family {
    origin: &'static str,
    rank: &'static str,
    size: &'static str,
    local_rank: &'static str,
    local_size: &'static str,
    cross_rank: &'static str,
    cross_size: &'static str,
    /// Counts only where this variable is set too.
    only_with: &'static str,
    /// The names are Carole's alone, so that any of them without the rank is a mistake.
    ours: bool,
    /// They are set by a launcher of MPI programs.
    mpi: bool,
}

const fn family(origin: &'static str, names: [&'static str; 4]) -> Family {
    let [rank, size, local_rank, local_size] = names;
    Family {
        origin,
        rank,
        size,
        local_rank,
        local_size,
        cross_rank: "",
        cross_size: "",
        only_with: "",
        ours: false,
        mpi: false,
    }
}

const fn of_mpi(origin: &'static str, names: [&'static str; 4]) -> Family {
    Family { mpi: true, ..family(origin, names) }
}

/// In order of precedence. Slurm's stand also in shells that srun did not start, hence the condition; and
/// PMIX_RANK is not here because no size comes with it.
const FAMILIES: [Family; 8] = [
    Family {
        cross_rank: "CAROLE_CROSS_RANK",
        cross_size: "CAROLE_CROSS_SIZE",
        ours: true,
        ..family("carolerun", ["CAROLE_RANK", "CAROLE_SIZE", "CAROLE_LOCAL_RANK", "CAROLE_LOCAL_SIZE"])
    },
    Family {
        cross_rank: "HOROVOD_CROSS_RANK",
        cross_size: "HOROVOD_CROSS_SIZE",
        ours: true,
        ..family("Horovod", ["HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"])
    },
    family("torchrun", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]),
    of_mpi(
        "Open MPI",
        [
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        ],
    ),
    of_mpi(
        "MVAPICH",
        [
            "MV2_COMM_WORLD_RANK",
            "MV2_COMM_WORLD_SIZE",
            "MV2_COMM_WORLD_LOCAL_RANK",
            "MV2_COMM_WORLD_LOCAL_SIZE",
        ],
    ),
    of_mpi("PMI", ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"]),
    of_mpi(
        "JSM",
        ["JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"],
    ),
    Family {
        only_with: "SLURM_STEP_ID",
        ..family("Slurm", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"])
    },
];

/// What tells one job from another, where nothing was said: the first of these that is set.
const JOB_NAMES: [&str; 9] = [
    "CAROLE_JOB",
    "TORCHELASTIC_RUN_ID",
    "PMIX_NAMESPACE",
    "OMPI_MCA_ess_base_jobid",
    "OMPI_MCA_orte_ess_jobid",
    "PMI_JOBID",
    "SLURM_JOB_ID",
    "LSB_JOBID",
    "HOROVOD_JOB",
];
/// Where ranks on several hosts meet, when nothing else was said: below the user's home.
const SHARED_DIRECTORY: &str = ".carole";

/// The origin of a process of which no variable says anything.
const ALONE: &str = "no variables";

/// The port that rank 0 serves on under torchrun, above `MASTER_PORT`, which torch's own store occupies.
const PORT_ABOVE_TORCH: u16 = 17;

impl Place {
    /// Whether a launcher of MPI programs says so.
    #[must_use]
    pub fn is_from_mpi(&self) -> bool {
        FAMILIES.iter().any(|family| family.mpi && family.origin == self.origin)
    }

    /// Whether not all ranks are on this host, as far as is known.
    #[must_use]
    pub fn spans_hosts(&self) -> bool {
        self.size > 1 && self.hints.local_size.is_some_and(|local| local != self.size)
    }

    /// Whether no variable says anything.
    #[must_use]
    pub fn is_alone_by_default(&self) -> bool {
        self.origin == ALONE
    }

    /// Reads the first family of variables that is set; without any, this process is alone.
    pub fn read(environment: &Environment) -> Result<Place> {
        for family in &FAMILIES {
            if let Some(place) = family.read(environment)? {
                return Ok(place);
            }
        }
        if let Some(place) = train_job::place(environment)? {
            return Ok(place);
        }
        Ok(Place { rank: 0, size: 1, hints: Hints::default(), origin: ALONE })
    }
}

impl Family {
    fn read(&self, environment: &Environment) -> Result<Option<Place>> {
        if !self.only_with.is_empty() && !environment.contains_key(self.only_with) {
            return Ok(None);
        }
        let rank = number(environment, self.rank)?;
        let size = number(environment, self.size)?;
        let (rank, size) = match (rank, size) {
            (Some(rank), Some(size)) => (rank, size),
            (Some(_), None) => return Err(self.incomplete(self.rank, self.size)),
            (None, Some(_)) => return Err(self.incomplete(self.size, self.rank)),
            (None, None) => {
                let others = [self.local_rank, self.local_size, self.cross_rank, self.cross_size];
                return match others.iter().find(|name| environment.contains_key(**name)) {
                    Some(name) if self.ours => Err(self.incomplete(name, self.rank)),
                    _ => Ok(None),
                };
            }
        };
        if size == 0 || size as usize > RANKS_MAX {
            return Err(Error::usage(format!("{}={size}: a job has 1 to {RANKS_MAX} ranks", self.size)));
        }
        if rank >= size {
            return Err(Error::usage(format!(
                "{}={rank} with {}={size}: ranks count from 0 and stay below the size",
                self.rank, self.size
            )));
        }
        let of_slurm = !self.only_with.is_empty();
        let local_size = match of_slurm {
            true => tasks_on_this_node(environment),
            false => number(environment, self.local_size)?,
        };
        // A PMI that srun serves says nothing of nodes; Slurm does, where the ranks are its own tasks.
        let by_slurm = self.mpi && number(environment, "SLURM_PROCID").is_ok_and(|task| task == Some(rank));
        let local_rank = match number(environment, self.local_rank)? {
            None if by_slurm && local_size.is_none() => number(environment, "SLURM_LOCALID")?,
            told => told,
        };
        let hints = Hints {
            local_rank,
            local_size: local_size.or_else(|| tasks_on_this_node(environment).filter(|_| by_slurm)),
            cross_rank: number(environment, self.cross_rank)?,
            cross_size: number(environment, self.cross_size)?,
        };
        self.check(self.local_rank, hints.local_rank, self.local_size, hints.local_size, size)?;
        self.check(self.cross_rank, hints.cross_rank, self.cross_size, hints.cross_size, size)?;
        Ok(Some(Place { rank, size, hints, origin: self.origin }))
    }

    fn incomplete(&self, there: &str, missing: &str) -> Error {
        Error::usage(format!(
            "{there} is set but {missing} is not: set {missing} too (or unset the variables of {} to run alone)",
            self.origin
        ))
    }

    fn check(
        &self,
        rank_name: &str,
        rank: Option<u32>,
        size_name: &str,
        part: Option<u32>,
        size: u32,
    ) -> Result<()> {
        if let (Some(rank), Some(part)) = (rank, part)
            && rank >= part
        {
            return Err(Error::usage(format!(
                "{rank_name}={rank} with {size_name}={part}: it must be below"
            )));
        }
        if let Some(part) = part
            && (part == 0 || part > size)
        {
            return Err(Error::usage(format!(
                "{size_name}={part} with {}={size}: it must be 1 to {size}",
                self.size
            )));
        }
        Ok(())
    }
}

/// How many tasks of this step Slurm has put on this node: its list ("2(x3),1") counts them node by node.
fn tasks_on_this_node(environment: &Environment) -> Option<u32> {
    environment.get("SLURM_STEP_ID")?;
    let list = environment.get("SLURM_STEP_TASKS_PER_NODE")?;
    let mut node: u32 = match environment.get("SLURM_NODEID") {
        Some(text) => text.parse().ok()?,
        // One number is the same for all nodes.
        None if list.contains(',') => return None,
        None => 0,
    };
    for part in list.split(',') {
        let (tasks, nodes) = match part.split_once("(x") {
            Some((tasks, nodes)) => (tasks, nodes.strip_suffix(')')?.parse().ok()?),
            None => (part, 1),
        };
        if node < nodes {
            return tasks.parse().ok();
        }
        node -= nodes;
    }
    None
}

fn number(environment: &Environment, name: &str) -> Result<Option<u32>> {
    let Some(text) = environment.get(name) else { return Ok(None) };
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse() {
        Ok(number) if digits => Ok(Some(number)),
        _ => Err(Error::usage(format!("{name}={text}: a whole number from 0 is needed"))),
    }
}

/// The number of this process, if it is a worker of an elastic job: ranks are given to it as epochs begin.
pub fn worker(environment: &Environment) -> Result<Option<u32>> {
    number(environment, "CAROLE_WORKER")
}

/// Whether a variable that is on or off is on.
#[must_use]
pub fn is_on(environment: &Environment, name: &str) -> bool {
    environment.get(name).is_some_and(|v| matches!(v.as_str(), "1" | "true" | "yes" | "on"))
}

impl Meeting {
    /// How the ranks of `place` find each other. `secret`: whether one is given. `parent`: the process that
    /// started this one, which tells jobs apart where nothing else does.
    pub fn read(environment: &Environment, place: &Place, secret: bool, parent: u32) -> Result<Meeting> {
        if place.size == 1 {
            return Ok(Meeting::Alone);
        }
        let insecure = is_on(environment, "CAROLE_INSECURE");
        let one_host = place.hints.local_size.is_none_or(|local| local == place.size);
        if let Some(text) = environment.get("CAROLE_RENDEZVOUS").filter(|t| !t.is_empty()) {
            return Meeting::parse(text, environment, secret || insecure, one_host);
        }
        if one_host {
            let key = match job_name(environment) {
                Some(job) => job,
                None => match environment.get("MASTER_PORT") {
                    Some(port) => format!("port-{port}"),
                    None => format!("parent-{parent}"),
                },
            };
            return Ok(Meeting::Private(key));
        }
        let environment = &train_job::with_master(environment);
        let Some(host) = environment.get("MASTER_ADDR") else {
            if let Some(directory) = shared_directory(environment) {
                return Ok(Meeting::Shared(directory));
            }
            return Err(Error::usage(format!(
                "the {} ranks ({}) are on several hosts, but CAROLE_RENDEZVOUS is not set: set it to HOST:PORT of rank 0 \
                 or to file:///PATH on a shared file system, or start the job by carolerun",
                place.size, place.origin
            )));
        };
        if !secret && !insecure {
            return Err(no_secret(host));
        }
        Ok(Meeting::RankZero(join(host, port_from_torch(environment)?)))
    }

    fn parse(text: &str, environment: &Environment, secret: bool, one_host: bool) -> Result<Meeting> {
        if let Some(path) = text.strip_prefix("file://") {
            if !path.starts_with('/') {
                return Err(Error::usage(format!(
                    "CAROLE_RENDEZVOUS={text}: a file is named as file:///PATH"
                )));
            }
            return match (secret, one_host) {
                (true, _) => Ok(Meeting::File(PathBuf::from(path))),
                // Without a secret only one host is safe; the path then only names the job.
                (false, true) => Ok(Meeting::Private(path.to_owned())),
                (false, false) => Err(no_secret(text)),
            };
        }
        let (service, list) = match text.strip_prefix("tcp://") {
            Some(list) => (true, list),
            None => (environment.contains_key("CAROLE_SECRET_FD"), text),
        };
        let addresses: Vec<String> = list.split(',').map(|a| a.trim().to_owned()).collect();
        for address in &addresses {
            check_address(address)?;
        }
        if service {
            return if secret { Ok(Meeting::Service(addresses)) } else { Err(no_secret(text)) };
        }
        let [address] = addresses.as_slice() else {
            return Err(Error::usage(format!(
                "CAROLE_RENDEZVOUS={text}: rank 0 serves at one HOST:PORT, not at several"
            )));
        };
        match secret {
            true => Ok(Meeting::RankZero(address.clone())),
            false if is_loopback(address) => Ok(Meeting::Private(address.clone())),
            false => Err(no_secret(address)),
        }
    }
}

/// The name of the job. A step of Slurm is a job of its own.
fn job_name(environment: &Environment) -> Option<String> {
    let (name, job) = JOB_NAMES.iter().find_map(|name| Some((*name, environment.get(*name)?)))?;
    let step = environment.get("SLURM_STEP_ID").filter(|_| name == "SLURM_JOB_ID");
    Some(step.map_or_else(|| job.clone(), |step| format!("{job}.{step}")))
}

/// Where the ranks of a named job on several hosts meet: a directory of its own below the user's home, which clusters
/// share between their hosts.
fn shared_directory(environment: &Environment) -> Option<PathBuf> {
    let home = environment.get("HOME").map(PathBuf::from).filter(|home| home.is_absolute())?;
    let job = job_name(environment)?;
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let name: String = job.chars().map(plain).take(100).collect();
    Some(home.join(SHARED_DIRECTORY).join(format!("job-{name}")))
}

fn no_secret(place: &str) -> Error {
    Error::usage(format!(
        "a rendezvous beyond this host ({place}) needs a secret: put the same 64 hexadecimal digits on every host into \
         a file of mode 0600 and name it in CAROLE_SECRET_FILE (openssl rand -hex 32), or start the job by \
         carolerun; CAROLE_INSECURE=1 goes without, and then anybody who reaches the port can join"
    ))
}

fn port_from_torch(environment: &Environment) -> Result<u16> {
    if let Some(text) = environment.get("CAROLE_RENDEZVOUS_PORT") {
        return parse_port("CAROLE_RENDEZVOUS_PORT", text);
    }
    let Some(text) = environment.get("MASTER_PORT") else {
        return Err(Error::usage(
            "MASTER_ADDR is set but MASTER_PORT is not: set MASTER_PORT too, or CAROLE_RENDEZVOUS=HOST:PORT",
        ));
    };
    let port = parse_port("MASTER_PORT", text)?;
    port.checked_add(PORT_ABOVE_TORCH).ok_or_else(|| {
        Error::usage(format!(
            "MASTER_PORT={port}: Carole uses the port {PORT_ABOVE_TORCH} above it, which does not exist; set CAROLE_RENDEZVOUS_PORT"
        ))
    })
}

fn parse_port(name: &str, text: &str) -> Result<u16> {
    match text.parse::<u16>() {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(Error::usage(format!("{name}={text}: a port is a number from 1 to 65535"))),
    }
}

fn join(host: &str, port: u16) -> String {
    if host.contains(':') && !host.starts_with('[') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

pub(super) fn check_address(address: &str) -> Result<()> {
    let parts = address.rsplit_once(':').filter(|(host, _)| !host.is_empty());
    let Some((host, port)) = parts.filter(|(host, _)| !host.contains(':') || host.starts_with('[')) else {
        return Err(Error::usage(format!(
            "CAROLE_RENDEZVOUS={address}: use HOST:PORT ([ADDRESS]:PORT for IPv6), tcp://HOST:PORT or file:///PATH"
        )));
    };
    if host.starts_with('[') != host.ends_with(']') {
        return Err(Error::usage(format!("CAROLE_RENDEZVOUS={address}: the brackets do not match")));
    }
    parse_port("CAROLE_RENDEZVOUS port", port).map(|_| ())
}

/// Whether this HOST:PORT names the loopback interface.
#[must_use]
pub fn is_loopback(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
#[path = "place_tests.rs"]
mod tests;
