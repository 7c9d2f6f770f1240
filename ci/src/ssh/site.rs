//! Hosts with an sshd each, on one machine: network namespaces, each with process ids, host name and `CAROLE_HOST_ID`
//! of its own. Keys and configuration are made in a temporary directory; nothing of the machine's own ssh is
//! used or changed.
#![forbid(unsafe_code)]

use crate::hosts::network::{Family, Network, inside, output};
use std::collections::{BTreeMap, HashSet};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// What ends only when it hangs.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// Hosts that can be reached by ssh from each other.
pub struct Site {
    /// The hosts' network.
    pub network: Network,
    /// Keys, configuration, and whatever a scene puts there.
    pub directory: tempfile::TempDir,
    family: Family,
    daemons: Vec<Child>,
    /// Processes in the hosts' namespaces that are no job's.
    residents: HashSet<i32>,
}

/// How a job ended.
pub struct Ended {
    /// The launcher's exit code; 128 and its signal if it was killed.
    pub code: i32,
    /// What each rank wrote to standard output.
    pub lines: BTreeMap<usize, Vec<String>>,
    /// The launcher's standard error.
    pub errors: String,
    /// How long it took.
    pub took: Duration,
}

/// A job that runs.
pub struct Running {
    child: Child,
    started: Instant,
}

impl Site {
    /// Why there can be none here, if so.
    pub fn missing() -> Option<&'static str> {
        if let Some(reason) = Network::missing() {
            return Some(reason);
        }
        if !Path::new(SSHD).exists() || Command::new("ssh").arg("-V").output().is_err() {
            return Some("no sshd and ssh (Debian: openssh-server, openssh-client)");
        }
        if Command::new("unshare").arg("--version").output().is_err() {
            return Some("no program unshare (Debian: util-linux)");
        }
        None
    }

    /// Makes hosts and starts their sshd. `hidden`: a folder that does not exist on the last host.
    pub fn new(hosts: u32, family: Family, hidden: Option<&Path>) -> Result<Site, String> {
        let directory = tempfile::tempdir().map_err(|e| format!("no temporary directory: {e}"))?;
        let network = Network::new(hosts, family)?;
        let mut site = Site { network, directory, family, daemons: Vec::new(), residents: HashSet::new() };
        site.make_keys()?;
        for n in 0..hosts {
            site.start_daemon(n, hidden.filter(|_| n + 1 == hosts))?;
        }
        site.residents = site.processes()?;
        Ok(site)
    }

    fn make_keys(&self) -> Result<(), String> {
        for name in ["host_key", "user_key", "other_key"] {
            let path = self.path(name);
            output("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-C", name, "-f", &path])?;
        }
        let copy = |from: &str, to: &str| {
            std::fs::copy(self.path(from), self.path(to)).map(drop).map_err(|e| format!("{to}: {e}"))
        };
        copy("user_key.pub", "authorized_keys")?;
        let mut config = String::from("Host *\n");
        let known = self.path("known_hosts");
        config += &format!("  IdentityFile {}\n  UserKnownHostsFile {known}\n", self.path("user_key"));
        config += "  GlobalKnownHostsFile none\n  User root\n";
        let mut names = String::new();
        for n in 0..self.network.all().len() {
            names += &format!("Host node{n} alias{n}\n  HostName {}\n", self.address(n as u32));
        }
        self.write("ssh_config", &(names + &config))?;
        self.write("ssh_config_other", &config.replace("user_key", "other_key"))
    }

    fn start_daemon(&mut self, n: u32, hidden: Option<&Path>) -> Result<(), String> {
        let config = format!(
            "Port 22\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nUsePAM no\nStrictModes no\n\
             PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
             SetEnv CAROLE_HOST_ID=node{n}\nMaxStartups 200\nMaxSessions 100\nUseDNS no\n",
            self.path("host_key"),
            self.path("authorized_keys"),
        );
        self.write(&format!("sshd_{n}"), &config)?;
        let hide =
            hidden.map_or(String::new(), |path| format!("mount -t tmpfs none '{}' && ", path.display()));
        // sshd keeps a folder of its own empty, which a package's start script would make.
        let script = format!(
            "{hide}mkdir -p /run/sshd && hostname node{n} && exec {SSHD} -D -e -f '{}'",
            self.path(&format!("sshd_{n}"))
        );
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.network.host(n), "unshare", "--uts", "--pid", "--fork"]);
        command.args(["--mount-proc", "--kill-child", "sh", "-c", &script]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| format!("sshd does not start: {e}"))?;
        let errors = BufReader::new(child.stderr.take().expect("piped"));
        self.daemons.push(child);
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            // Read to the end, or sshd would block.
            errors.lines().map_while(Result::ok).for_each(|line| drop(sender.send(line)));
        });
        let until = Instant::now() + Duration::from_secs(20);
        let mut said = Vec::new();
        while let Ok(line) = lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            if line.contains("Server listening") {
                return Ok(());
            }
            said.push(line);
        }
        Err(format!("sshd of host {n} does not listen: {}", said.join("; ")))
    }

    /// A file of this site.
    pub fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    pub fn write(&self, name: &str, text: &str) -> Result<(), String> {
        std::fs::write(self.path(name), text).map_err(|e| format!("{name}: {e}"))
    }

    /// The address of a host.
    pub fn address(&self, n: u32) -> String {
        match self.family {
            Family::Both => format!("10.77.{n}.2"),
            Family::V6 => format!("fd77:{n}::2"),
        }
    }

    /// `-H` for all hosts, by address, with these slots each.
    pub fn list(&self, slots: u32) -> String {
        let host = |n: u32| match self.family {
            Family::Both => format!("{}:{slots}", self.address(n)),
            Family::V6 => format!("[{}]:{slots}", self.address(n)),
        };
        (0..self.network.all().len() as u32).map(host).collect::<Vec<_>>().join(",")
    }

    /// `carolerun` on the first host, with the site's keys.
    pub fn carolerun(&self, arguments: &[&str]) -> Result<Command, String> {
        self.carolerun_with("ssh_config", arguments)
    }

    pub fn carolerun_with(&self, config: &str, arguments: &[&str]) -> Result<Command, String> {
        let mut command = Command::new("ip");
        // The launcher is alone with its process ids, too, so that whoever is killed is found by name.
        command.args(["netns", "exec", &self.network.host(0)]).arg(program("carolerun")?);
        let (first, rest) = match arguments.split_first() {
            Some((&"doctor", rest)) => (Some("doctor"), rest),
            _ => (None, arguments),
        };
        command.args(first).args(["--ssh-command", &format!("ssh -F {}", self.path(config))]).args(rest);
        for (name, _) in std::env::vars_os().filter(|(name, _)| crate::job::is_knob(name)) {
            command.env_remove(name);
        }
        command.env("CAROLE_HOST_ID", "node0").env("CAROLE_TIMEOUT_MS", "20000");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command)
    }

    /// Runs a job to its end and sees that nothing of it is left.
    pub fn run(&self, arguments: &[&str]) -> Result<Ended, String> {
        let ended = start(self.carolerun(arguments)?)?.finish(PATIENCE)?;
        self.nothing_left(Duration::from_secs(10))?;
        Ok(ended)
    }

    /// All processes in the hosts' namespaces.
    pub fn processes(&self) -> Result<HashSet<i32>, String> {
        let mut found = HashSet::new();
        for host in self.network.all() {
            let pids = output("ip", &["netns", "pids", &host])?;
            found.extend(pids.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
        }
        Ok(found)
    }

    /// Those of jobs, with what they are.
    pub fn of_jobs(&self) -> Result<BTreeMap<i32, String>, String> {
        let strangers = self.processes()?.into_iter().filter(|pid| !self.residents.contains(pid));
        let command = |pid: i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).replace('\0', " ").trim().to_owned()
        };
        Ok(strangers.map(|pid| (pid, command(pid))).filter(|(_, line)| !line.is_empty()).collect())
    }

    /// Waits until nothing of any job is left.
    pub fn nothing_left(&self, within: Duration) -> Result<(), String> {
        let until = Instant::now() + within;
        loop {
            // sshd's own processes for a connection that was cut off end when TCP gives it up.
            let mut left = self.of_jobs()?;
            left.retain(|_, line| !line.starts_with("sshd"));
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(format!(
                    "{} processes are left after {} s: {left:?}",
                    left.len(),
                    within.as_secs()
                ));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends a host at once, with all that runs there: its first process is killed.
    pub fn kill_host(&mut self, n: u32) -> Result<(), String> {
        let daemon = &mut self.daemons[n as usize];
        daemon.kill().and_then(|()| daemon.wait()).map(drop).map_err(|e| format!("host {n}: {e}"))
    }

    /// From now on a host takes no new connections but those for ssh, as behind NAT.
    pub fn hide_behind_firewall(&self, n: u32) -> Result<(), String> {
        let host = self.network.host(n);
        let rules = "table inet wall { chain in { type filter hook input priority 0; \
                     iif lo accept; ct state established,related accept; tcp dport 22 accept; drop; }; }";
        inside(&host, &["nft", rules])
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for daemon in &mut self.daemons {
            // One that has ended already need not be killed.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

const SSHD: &str = "/usr/sbin/sshd";

/// A program that was built beside this one.
pub fn program(name: &str) -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|e| format!("this program cannot find itself: {e}"))?;
    let path = own.with_file_name(name);
    match path.exists() {
        true => Ok(path),
        false => Err(format!("{} is missing; run: cargo build --release -p carole --bins", path.display())),
    }
}

/// Starts a launcher.
pub fn start(mut command: Command) -> Result<Running, String> {
    let child = command.spawn().map_err(|e| format!("carolerun does not start: {e}"))?;
    Ok(Running { child, started: Instant::now() })
}

impl Running {
    /// The launcher.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// The next line of its standard output that has these words.
    pub fn wait_for(&mut self, words: &str) -> Result<(), String> {
        let stdout = self.child.stdout.as_mut().expect("piped");
        let mut line = Vec::new();
        let mut byte = [0];
        loop {
            match stdout.read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => {
                    if String::from_utf8_lossy(&line).contains(words) {
                        return Ok(());
                    }
                    line.clear();
                }
                Ok(1) => line.push(byte[0]),
                _ => {
                    let mut errors = String::new();
                    let _ = self.child.stderr.take().map(|mut stderr| stderr.read_to_string(&mut errors));
                    return Err(format!("the job ended before it said '{words}': {errors}"));
                }
            }
        }
    }

    /// Waits for its end.
    pub fn finish(mut self, limit: Duration) -> Result<Ended, String> {
        let read = |from: Option<Box<dyn Read + Send>>| {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                let _ = from.map(|mut from| from.read_to_end(&mut bytes));
                String::from_utf8_lossy(&bytes).into_owned()
            })
        };
        let out = read(self.child.stdout.take().map(|s| Box::new(s) as Box<dyn Read + Send>));
        let errors = read(self.child.stderr.take().map(|s| Box::new(s) as Box<dyn Read + Send>));
        let until = self.started + limit;
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                _ if Instant::now() >= until => {
                    let _ = self.child.kill();
                    return Err(format!("the launcher hangs: {}", errors.join().unwrap_or_default()));
                }
                _ => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        let took = self.started.elapsed();
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        let code = status.code().unwrap_or_else(|| 128 + signal.unwrap_or_default());
        let (out, errors) = (out.join().unwrap_or_default(), errors.join().unwrap_or_default());
        let mut lines: BTreeMap<usize, Vec<String>> = BTreeMap::new();
        for line in out.lines() {
            let parts = line.strip_prefix('[').and_then(|rest| rest.split_once("]<stdout>:"));
            if let Some((rank, text)) = parts.and_then(|(rank, text)| Some((rank.parse().ok()?, text))) {
                lines.entry(rank).or_default().push(text.to_owned());
            } else {
                lines.entry(usize::MAX).or_default().push(line.to_owned());
            }
        }
        Ok(Ended { code, lines, errors, took })
    }
}

impl Ended {
    /// It must have ended well.
    pub fn well(self) -> Result<Ended, String> {
        match self.code {
            0 => Ok(self),
            code => Err(format!("carolerun ended with {code}: {}", self.errors.trim())),
        }
    }

    /// It must have failed with this code and all these words, within some seconds.
    pub fn refused(&self, code: i32, words: &[&str], within_s: u64) -> Result<(), String> {
        let missing: Vec<&&str> = words.iter().filter(|word| !self.errors.contains(**word)).collect();
        if self.code != code || !missing.is_empty() || self.took > Duration::from_secs(within_s) {
            return Err(format!(
                "expected code {code} within {within_s} s and the words {missing:?}; it ended with {} after {:.1} s: {}",
                self.code,
                self.took.as_secs_f64(),
                self.errors.trim()
            ));
        }
        Ok(())
    }
}
