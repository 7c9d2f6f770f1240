//! Jobs: this program started once per rank, with plain variables and no launcher.
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// How to start a job.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// What each rank runs: the arguments after `ci rank`.
    pub args: Vec<String>,
    /// Ranks.
    pub size: u32,
    /// Hosts to pretend, each with a run of ranks; 1 means the truth.
    pub hosts: u32,
    /// The network namespace of each host; none means this one.
    pub places: Vec<String>,
    /// Knobs of all ranks.
    pub knobs: Vec<(&'static str, String)>,
    /// Longer than this, and it hangs.
    pub limit: Duration,
}

/// The knobs that make a job use this transport: shm, tcp, or tls, which is TCP with encryption.
pub fn over(transport: &str) -> Vec<(&'static str, String)> {
    let (name, encrypted) = if transport == "tls" { ("tcp", "1") } else { (transport, "0") };
    vec![("CAROLE_TRANSPORT", name.to_owned()), ("CAROLE_ENCRYPT", encrypted.to_owned())]
}

/// A running job. Dropping it kills what still runs.
pub struct Job {
    ranks: Vec<Child>,
    lines: Receiver<(u32, String)>,
    deadline: Instant,
    describe: String,
    /// Where the ranks meet; removed with the job.
    _meeting: tempfile::TempDir,
}

/// A job that has ended.
pub struct Ended {
    /// What each rank printed.
    pub lines: Vec<Vec<String>>,
    /// How each rank ended.
    pub status: Vec<ExitStatus>,
}

impl Plan {
    /// The variables that rank `rank` is started with.
    fn variables(&self, rank: u32, meeting: &str) -> Vec<(String, String)> {
        let hosts = self.hosts.clamp(1, self.size);
        let host = |rank: u32| self.host(rank);
        let local = (0..rank).filter(|&r| host(r) == host(rank)).count();
        let on_host = (0..self.size).filter(|&r| host(r) == host(rank)).count();
        let mut variables = vec![
            ("CAROLE_RANK".to_owned(), rank.to_string()),
            ("CAROLE_SIZE".to_owned(), self.size.to_string()),
            ("CAROLE_LOCAL_RANK".to_owned(), local.to_string()),
            ("CAROLE_LOCAL_SIZE".to_owned(), on_host.to_string()),
        ];
        if hosts == 1 {
            // The directory's name is nobody else's, so it names the job.
            variables.push(("CAROLE_JOB".to_owned(), meeting.replace('/', "-")));
        } else {
            // Pretended hosts meet as real ones do, which takes a secret.
            variables.push(("CAROLE_RENDEZVOUS".to_owned(), format!("file://{meeting}/address")));
            variables.push(("CAROLE_SECRET_FILE".to_owned(), format!("{meeting}/secret")));
            variables.push(("CAROLE_HOST_ID".to_owned(), format!("host-{}", host(rank))));
        }
        // A rank that gets no processor for some seconds is not dead; what tests silence sets its own limits.
        variables.push(("CAROLE_TIMEOUT_MS".to_owned(), "20000".to_owned()));
        variables.push(("CAROLE_START_TIMEOUT_S".to_owned(), "120".to_owned()));
        variables.extend(self.knobs.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
        variables
    }

    fn host(&self, rank: u32) -> u32 {
        rank * self.hosts.clamp(1, self.size) / self.size
    }

    /// This program, where the rank belongs.
    fn command(&self, rank: u32) -> Result<Command, String> {
        let program = std::env::current_exe().map_err(|e| format!("this program cannot find itself: {e}"))?;
        let Some(place) = self.places.get(self.host(rank) as usize) else { return Ok(Command::new(program)) };
        // It becomes the program, so signals reach it.
        let mut command = Command::new("ip");
        command.args(["netns", "exec", place]).arg(program);
        Ok(command)
    }

    /// Starts all ranks.
    pub fn start(&self) -> Result<Job, String> {
        let meeting = tempfile::tempdir().map_err(|e| format!("no temporary directory: {e}"))?;
        write_secret(&meeting.path().join("secret")).map_err(|e| format!("no secret can be written: {e}"))?;
        let (sender, lines) = channel();
        let mut job = Job {
            ranks: Vec::new(),
            lines,
            deadline: Instant::now() + self.limit,
            describe: format!("{self:?}"),
            _meeting: meeting,
        };
        for rank in 0..self.size {
            let mut command = self.command(rank)?;
            command.arg("rank").args(&self.args).stdin(Stdio::null()).stdout(Stdio::piped());
            for (name, _) in std::env::vars_os().filter(|(name, _)| is_knob(name)) {
                command.env_remove(name);
            }
            command.envs(self.variables(rank, &job._meeting.path().to_string_lossy()));
            let mut child = command.spawn().map_err(|e| format!("rank {rank} does not start: {e}"))?;
            let stdout = child.stdout.take().expect("piped");
            job.ranks.push(child);
            let sender = sender.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    if sender.send((rank, line)).is_err() {
                        return;
                    }
                }
            });
        }
        Ok(job)
    }

    /// Starts the job, waits for its end, and asks for success of every rank.
    pub fn run(&self) -> Result<Vec<Vec<String>>, String> {
        let ended = self.start()?.finish()?;
        for (rank, status) in ended.status.iter().enumerate() {
            if !status.success() {
                let last = ended.lines[rank].last().map_or("no output", String::as_str);
                return Err(format!("rank {rank} ended with {status}: {last}\n  job: {self:?}"));
            }
        }
        Ok(ended.lines)
    }
}

/// A secret that protects nothing but a test, in a file as a user would make it.
fn write_secret(path: &std::path::Path) -> std::io::Result<()> {
    let mut file = std::fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(path)?;
    let mut random = crate::random::Random::new(&[u64::from(std::process::id())]);
    (0..4).try_for_each(|_| write!(file, "{:016x}", random.next()))
}

/// Whether a variable says something to a rank.
pub fn is_knob(name: &std::ffi::OsStr) -> bool {
    let name = name.to_string_lossy();
    ["CAROLE_", "HOROVOD_", "OMPI_", "PMI_", "PMIX_", "SLURM_"].iter().any(|start| name.starts_with(start))
}

impl Job {
    /// The process of a rank.
    pub fn pid(&self, rank: u32) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.ranks[rank as usize])
    }

    /// Sends a signal to a rank.
    pub fn signal(&self, rank: u32, signal: rustix::process::Signal) -> Result<(), String> {
        rustix::process::kill_process(self.pid(rank), signal)
            .map_err(|e| format!("no signal to rank {rank}: {e}"))
    }

    /// The next line that a rank prints; `None` when all have closed their output or `until` has come.
    pub fn line(&self, until: Instant) -> Option<(u32, String)> {
        let left = until.min(self.deadline).saturating_duration_since(Instant::now());
        self.lines.recv_timeout(left).ok()
    }

    /// Waits for the end of all ranks.
    pub fn finish(mut self) -> Result<Ended, String> {
        let mut lines = vec![Vec::new(); self.ranks.len()];
        while let Some((rank, line)) = self.line(self.deadline) {
            lines[rank as usize].push(line);
        }
        let mut status = Vec::new();
        for rank in 0..self.ranks.len() {
            match self.wait_until_deadline(rank) {
                Some(exit) => status.push(exit),
                None => return Err(format!("rank {rank} hangs; job: {}", self.describe)),
            }
        }
        Ok(Ended { lines, status })
    }

    fn wait_until_deadline(&mut self, rank: usize) -> Option<ExitStatus> {
        loop {
            if let Ok(Some(status)) = self.ranks[rank].try_wait() {
                return Some(status);
            }
            if Instant::now() >= self.deadline {
                return None;
            }
            // The outputs are closed, so this is the short time between the last line and the end.
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        for rank in &mut self.ranks {
            // One that has ended already cannot be killed, and need not be.
            let _ = rank.kill();
            let _ = rank.wait();
        }
    }
}
