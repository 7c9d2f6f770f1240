//! A cluster of Slurm on this machine: munged, slurmctld and a slurmd for each of two nodes, with keys, configuration
//! and spool in a temporary directory; nothing of the machine's own Slurm is used or changed. All of it, and all
//! tasks, have process ids of their own, so that whatever is started ends with the first process.
#![forbid(unsafe_code)]

use crate::hosts::network::output;
use crate::ssh::{Ended, PATIENCE, Running, program, start};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub const NODES: u32 = 2;
/// Of each node, whatever the machine has.
pub const CPUS: u32 = 4;
/// Until the nodes are there.
const START: Duration = Duration::from_secs(30);
/// The programs that belong to the cluster itself.
const DAEMONS: [&str; 6] = ["sh", "munged", "slurmctld", "slurmscriptd", "slurmd", "sleep"];

/// A cluster that runs. Dropping it ends it, with all jobs.
pub struct Cluster {
    directory: tempfile::TempDir,
    /// Its first process is this one's child.
    shell: Child,
}

/// Where the daemons lie, for those who have no such folder in PATH.
fn daemon(name: &str) -> Option<String> {
    let folders = std::env::var("PATH").unwrap_or_default();
    let all = folders.split(':').chain(["/usr/sbin", "/usr/local/sbin"]);
    all.map(|folder| format!("{folder}/{name}")).find(|path| Path::new(path).is_file())
}

impl Cluster {
    /// Why there can be none here, if so.
    pub fn missing() -> Option<String> {
        if !rustix::process::geteuid().is_root() {
            return Some("slurmd takes root".into());
        }
        if let Some(name) =
            ["munged", "slurmctld", "slurmd", "srun"].iter().find(|name| daemon(name).is_none())
        {
            return Some(format!("no {name} (Debian: slurm-wlm, munge)"));
        }
        let contained =
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--mount-proc", "true"];
        let tried = output(contained[0], &contained[1..]);
        tried.err().map(|words| format!("process ids of its own cannot be had here: {words}"))
    }

    /// Starts all daemons. `Err(words)` that begin with "skipped" where Slurm itself does not work here.
    pub fn new() -> Result<Cluster, String> {
        let directory = tempfile::tempdir().map_err(|e| format!("no temporary directory: {e}"))?;
        let path = |name: &str| directory.path().join(name).display().to_string();
        for folder in ["state", "home", "spool-node0", "spool-node1"] {
            std::fs::create_dir(path(folder)).map_err(|e| format!("{folder}: {e}"))?;
        }
        write_key(&path("munge.key")).map_err(|e| format!("munge.key: {e}"))?;
        let config = configuration(directory.path())?;
        std::fs::write(path("slurm.conf"), config).map_err(|e| format!("slurm.conf: {e}"))?;
        let log = File::create(path("daemons.log")).map_err(|e| format!("daemons.log: {e}"))?;
        let copy = log.try_clone().map_err(|e| e.to_string())?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]);
        command.args(["sh", "-c", &script(directory.path())]);
        command.env("SLURM_CONF", path("slurm.conf"));
        command.stdin(Stdio::null()).stdout(log).stderr(copy);
        let shell = command.spawn().map_err(|e| format!("the daemons do not start: {e}"))?;
        let cluster = Cluster { directory, shell };
        cluster.wait_for_nodes()?;
        Ok(cluster)
    }

    fn wait_for_nodes(&self) -> Result<(), String> {
        let until = Instant::now() + START;
        let idle = vec!["idle"; NODES as usize].join(" ");
        loop {
            let found = self.ask("sinfo", &["--noheader", "--Node", "--format", "%T"]);
            let found = found.map(|text| text.split_whitespace().collect::<Vec<_>>().join(" "));
            if found.as_ref().is_ok_and(|states| *states == idle) {
                return Ok(());
            }
            if Instant::now() >= until {
                let log = std::fs::read_to_string(self.path("daemons.log")).unwrap_or_default();
                let errors: Vec<&str> = log.lines().filter(|line| line.contains("error")).collect();
                return Err(format!("skipped, Slurm does not start here: {found:?}; {}", errors.join("; ")));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A file of the cluster.
    pub fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    pub fn write(&self, name: &str, text: &str) -> Result<String, String> {
        std::fs::write(self.path(name), text).map_err(|e| format!("{name}: {e}"))?;
        Ok(self.path(name))
    }

    /// A program that belongs to the cluster, as a user calls it.
    pub fn command(&self, words: &[&str]) -> Result<Command, String> {
        let (name, arguments) = words.split_first().ok_or("no command")?;
        let mut command = match *name {
            "carolerun" | "ci" => Command::new(program(name)?),
            name => Command::new(name),
        };
        for (name, _) in std::env::vars_os().filter(|(name, _)| crate::job::is_knob(name)) {
            command.env_remove(name);
        }
        command.args(arguments).env("SLURM_CONF", self.path("slurm.conf")).env("HOME", self.path("home"));
        command.env("CAROLE_TIMEOUT_MS", "20000").env("CAROLE_START_TIMEOUT_S", "60");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command)
    }

    /// Runs it to its end.
    pub fn run(&self, words: &[&str]) -> Result<Ended, String> {
        start(self.command(words)?)?.finish(PATIENCE)
    }

    pub fn start(&self, words: &[&str]) -> Result<Running, String> {
        start(self.command(words)?)
    }

    fn ask(&self, name: &str, arguments: &[&str]) -> Result<String, String> {
        let mut command = self.command(&[name])?;
        let output = command.args(arguments).output().map_err(|e| format!("{name}: {e}"))?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        }
    }

    /// Processes of jobs, with what they are.
    fn of_jobs(&self) -> Result<BTreeMap<String, String>, String> {
        let space = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let children = format!("/proc/{0}/task/{0}/children", self.shell.id());
        let first = std::fs::read_to_string(&children).map_err(|e| format!("{children}: {e}"))?;
        let own = space(first.trim()).ok_or("the daemons have ended")?;
        let mut found = BTreeMap::new();
        for entry in std::fs::read_dir("/proc").map_err(|e| e.to_string())?.flatten() {
            let pid = entry.file_name().to_string_lossy().into_owned();
            if !pid.bytes().all(|byte| byte.is_ascii_digit()) || space(&pid).as_ref() != Some(&own) {
                continue;
            }
            let read = |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            let line = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
            let name = String::from_utf8_lossy(&read("comm")).trim().to_owned();
            // Who has no command line has ended.
            if !line.is_empty() && !DAEMONS.contains(&name.as_str()) {
                found.insert(pid, line);
            }
        }
        Ok(found)
    }

    /// Waits until no job and no process of one is left.
    pub fn nothing_left(&self, within: Duration) -> Result<(), String> {
        let until = Instant::now() + within;
        loop {
            let (jobs, left) = (self.ask("squeue", &["--noheader"])?, self.of_jobs()?);
            if jobs.trim().is_empty() && left.is_empty() {
                break;
            }
            if Instant::now() >= until {
                return Err(format!("left after {within:?}: jobs '{}', processes {left:?}", jobs.trim()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let meetings = std::fs::read_dir(self.path("home/.carole")).into_iter().flatten().flatten();
        let meetings: Vec<_> = meetings.map(|entry| entry.file_name()).collect();
        match meetings.is_empty() {
            true => Ok(()),
            false => Err(format!("meeting places are left in ~/.carole: {meetings:?}")),
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The first process of its own ids dies with it, and so do all others.
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

fn write_key(path: &str) -> std::io::Result<()> {
    let mut key = [0u8; 128];
    File::open("/dev/urandom")?.read_exact(&mut key)?;
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    std::io::Write::write_all(&mut file, &key)
}

/// Ports below those that the kernel gives to whoever connects.
fn ports(count: usize) -> Result<Vec<u16>, String> {
    let mut random = crate::random::Random::new(&[u64::from(std::process::id())]);
    let mut held: Vec<TcpListener> = Vec::new();
    for _ in 0..1000 {
        let port = 10_000 + (random.next() % 22_000) as u16;
        held.extend(TcpListener::bind(("0.0.0.0", port)));
        if held.len() == count {
            let port = |listener: &TcpListener| listener.local_addr().map(|address| address.port());
            return held.iter().map(port).collect::<Result<_, _>>().map_err(|e| e.to_string());
        }
    }
    Err("no port is free".into())
}

fn configuration(directory: &Path) -> Result<String, String> {
    let name = output("hostname", &["-s"])?;
    let (name, here, ports) = (name.trim(), directory.display(), ports(1 + NODES as usize)?);
    let mut text = format!(
        "ClusterName=carole\nSlurmctldHost={name}(127.0.0.1)\nSlurmctldPort={}\nSlurmUser=root\nSlurmdUser=root\n\
         AuthType=auth/munge\nAuthInfo=socket={here}/munge.socket\nStateSaveLocation={here}/state\n\
         SlurmdSpoolDir={here}/spool-%n\nSlurmctldPidFile={here}/slurmctld.pid\nSlurmdPidFile={here}/slurmd-%n.pid\n\
         ReturnToService=2\nKillWait=2\nEnforcePartLimits=ALL\nSelectType=select/cons_tres\n\
         SelectTypeParameters=CR_CPU\n",
        ports[0]
    );
    // In a container there may be no cgroups; and more processors are claimed than there are.
    text += "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nSlurmdParameters=config_overrides\n";
    for node in 0..NODES {
        text += &format!(
            "NodeName=node{node} NodeHostname={name} NodeAddr=127.0.0.1 Port={} CPUs={CPUS}\n",
            ports[1 + node as usize]
        );
    }
    Ok(text + "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n")
}

/// Starts the daemons, munged first, which the others ask for their credentials as they start.
fn script(directory: &Path) -> String {
    let here = directory.display();
    let at = |name: &str| daemon(name).unwrap_or_else(|| name.to_owned());
    let mut text = format!(
        "{} --foreground --force --num-threads=2 --socket={here}/munge.socket --key-file={here}/munge.key \
         --pid-file={here}/munged.pid --seed-file={here}/munged.seed --log-file={here}/munged.log &\n\
         n=0; until munge --socket={here}/munge.socket --no-input >/dev/null 2>&1; do\n\
         n=$((n + 1)); [ $n -lt 500 ] || exit 1; sleep 0.02; done\n{} -D -c &\n",
        at("munged"),
        at("slurmctld")
    );
    for node in 0..NODES {
        text += &format!("{} -D -N node{node} &\n", at("slurmd"));
    }
    text + "wait\n"
}
