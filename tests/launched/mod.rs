//! Jobs of `carolerun` in the background, and what is left of them.

use assert_cmd::cargo::cargo_bin;
use std::collections::HashSet;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Long enough for the most loaded machine; a test that gets here has hung.
const PATIENCE: Duration = Duration::from_secs(180);

/// The launcher with these arguments, and without the settings of whoever runs the tests.
pub fn carolerun(arguments: &[&str]) -> Command {
    let mut command = Command::new(cargo_bin("carolerun"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("CAROLE_") || name.starts_with("HOROVOD_") {
            command.env_remove(name);
        }
    }
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Waits until `holds`, or panics.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A job in the background whose processes all carry a mark in their environment, by which they are found
/// wherever they have gone.
pub struct Job {
    pub child: Child,
    mark: String,
    pub lines: BufReader<std::process::ChildStdout>,
}

impl Job {
    /// Starts a job.
    pub fn start(name: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Job {
        let mark = format!("{name}-{}", std::process::id());
        let mut command = carolerun(arguments);
        command.envs(variables.iter().copied());
        command.env("CAROLE_TEST_MARK", &mark).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("carolerun starts");
        let lines = BufReader::new(child.stdout.take().expect("stdout is piped"));
        Job { child, mark, lines }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("stdout can be read");
        line.trim_end().to_string()
    }

    /// Living processes of the job, the launcher and its guard included.
    pub fn processes(&self) -> HashSet<i32> {
        let wanted = format!("CAROLE_TEST_MARK={}", self.mark);
        let entries = std::fs::read_dir("/proc").expect("/proc").flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let ours = |pid: &i32| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
        };
        pids.filter(ours).collect()
    }

    pub fn wait(mut self) -> (i32, String) {
        let mut rest = String::new();
        self.lines.read_to_string(&mut rest).expect("stdout can be read");
        let mut errors = String::new();
        self.child
            .stderr
            .take()
            .expect("stderr is piped")
            .read_to_string(&mut errors)
            .expect("stderr can be read");
        let status = self.child.wait().expect("carolerun ends");
        assert_eq!(self.processes(), HashSet::new(), "something is left behind");
        (status.code().unwrap_or(-1), errors)
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        for pid in self.processes() {
            kill(pid, "KILL");
        }
    }
}

pub fn kill(pid: i32, signal: &str) {
    let _ = Command::new("kill")
        .args([&format!("-{signal}"), "--", &pid.to_string()])
        .stderr(Stdio::null())
        .status();
}
