//! `carolerun` with other hosts, which are pretended: in place of ssh a shell runs the agent on this machine, with an
//! identity of its own. (`ci ssh` does the same with namespaces and a real sshd; that takes root.)

mod launched;

use assert_cmd::cargo::cargo_bin;
use launched::{Job, carolerun, kill, until};
use std::collections::HashSet;
use std::path::Path;
use std::process::Output;

/// Stands for ssh.
const SHELL: &str = "env CAROLE_HOST_ID={host} sh -c {command}";

fn run(arguments: &[&str]) -> Output {
    let more = [&["--ssh-command", SHELL], arguments].concat();
    carolerun(&more).output().expect("carolerun runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn sorted(bytes: &[u8]) -> Vec<String> {
    let mut lines: Vec<String> = text(bytes).lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

fn refused(arguments: &[&str], code: i32, words: &[&str]) {
    let output = run(arguments);
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {errors}");
    assert!(words.iter().all(|word| errors.contains(word)), "{arguments:?}: {words:?} in {errors}");
}

#[test]
fn ranks_know_their_places_on_uneven_hosts() {
    let script = "echo $CAROLE_RANK/$CAROLE_SIZE $CAROLE_LOCAL_RANK/$CAROLE_LOCAL_SIZE \
                  $CAROLE_CROSS_RANK/$CAROLE_CROSS_SIZE $HOROVOD_HOSTNAME $CAROLE_HOST_ID $CAROLE_ALGORITHM $OWN";
    let list = ["-np", "5", "-H", "a:2,b:1,c:4", "--algorithm", "ring", "sh", "-c", script];
    let more = [&["--ssh-command", SHELL][..], &list].concat();
    let output = carolerun(&more).env("OWN", "with space").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let expected = [
        "[0]<stdout>:0/5 0/2 0/3 a a ring with space",
        "[1]<stdout>:1/5 1/2 0/2 a a ring with space",
        "[2]<stdout>:2/5 0/1 1/3 b b ring with space",
        "[3]<stdout>:3/5 0/2 2/3 c c ring with space",
        "[4]<stdout>:4/5 1/2 1/2 c c ring with space",
    ];
    assert_eq!(sorted(&output.stdout), expected);
}

#[test]
fn this_host_and_another_share_a_job() {
    let script = "echo $CAROLE_RANK; pwd >&2; cat /proc/self/fd/$CAROLE_SECRET_FD";
    let output = run(&["-np", "3", "-H", "localhost:1,b:2", "sh", "-c", script]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let lines = sorted(&output.stdout);
    let secrets: HashSet<&str> = lines.iter().filter(|l| l.len() > 64).map(|l| &l[l.len() - 64..]).collect();
    assert_eq!((lines.len(), secrets.len()), (6, 1), "{lines:?}");
    let folder = std::env::current_dir().unwrap().display().to_string();
    assert_eq!(text(&output.stderr).matches(&folder).count(), 3);
}

#[test]
fn output_from_other_hosts_is_complete_and_whole() {
    let script = "i=0; while [ $i -lt 20 ]; do seq 1 1000; i=$((i+1)); done; printf 'a\\000\\377no end'";
    let output = run(&["-np", "4", "-H", "a:2,b:2", "sh", "-c", script]);
    let mut counts = [0u32; 4];
    for line in output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let line = text(line);
        let (rank, rest) = line[1..].split_once("]<stdout>:").unwrap_or_else(|| panic!("{line:?}"));
        let count = &mut counts[rank.parse::<usize>().unwrap()];
        if rest.starts_with("a\0") {
            assert_eq!(*count, 20_000);
        } else {
            assert_eq!(rest.parse::<u32>().unwrap(), *count % 1000 + 1, "{line:?}");
        }
        *count += 1;
    }
    assert_eq!(counts, [20_001; 4]);
}

#[test]
fn a_failure_is_named_with_its_host() {
    let script = "if [ $CAROLE_RANK = 3 ]; then echo why >&2; exit 5; fi; sleep 600";
    refused(
        &["-np", "4", "-H", "a:2,b:2", "sh", "-c", script],
        5,
        &["rank 3 (host 'b') failed first: it exited with code 5", "why"],
    );
    refused(&["-np", "2", "-H", "a,b", "no-such-command-here"], 127, &["was not found", "host '"]);
}

#[test]
fn what_cannot_start_says_why() {
    let job = |list: &'static str| ["-np", "2", "-H", list, "true"];
    refused(&job("a:1"), 2, &["slots (1: a:1)"]);
    refused(&job("a:1,a:1"), 2, &["'a' stands twice", "a:2"]);
    refused(
        &["--ssh-command", "sh -c {command}", "-np", "2", "-H", "a,b", "true"],
        2,
        &["cannot be used multiple"],
    );
    let with = |command: &str, words: &[&str]| {
        let output =
            carolerun(&["--ssh-command", command, "-np", "2", "-H", "a,b", "true"]).output().unwrap();
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{errors}");
        assert!(words.iter().all(|word| errors.contains(word)), "{words:?} in {errors}");
    };
    with("sh -c {command}", &["'a' and 'b' are the same host", "CAROLE_HOST_ID"]);
    with("no-such-program-here", &["'no-such-program-here'", "host 'a'", "--ssh-command"]);
    with("echo carole-agent 1 carole%200.0.1 x y", &["versions differ", "carole 0.0.1"]);
    with("echo carole-agent nonsense", &["versions differ"]);
    with("sh -c 'echo Permission denied >&2; exit 255'", &["Permission denied", "ssh-copy-id"]);
    with("yes", &["prints without end"]);
    with(
        "env CAROLE_HOST_ID={host} PATH=/usr/bin:/bin sh -c 'exec carolerun-is-not-here'",
        &["no carolerun"],
    );
}

#[test]
fn the_folder_may_be_missing_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    let remove = format!(
        "env CAROLE_HOST_ID={{host}} sh -c 'rmdir {}; exec $0 --agent' {}",
        folder.path().display(),
        cargo_bin("carolerun").display()
    );
    let output =
        carolerun(&["--ssh-command", &format!("{remove} {{command}}"), "-np", "1", "-H", "a", "true"])
            .current_dir(folder.path())
            .output()
            .unwrap();
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{errors}");
    assert!(errors.contains("host 'a': the folder") && errors.contains("cannot be entered"), "{errors}");
}

fn start(name: &str) -> Job {
    let script = "trap '' TERM HUP; echo up; (sleep 600 & sleep 600); sleep 600";
    let mut job =
        Job::start(name, &["--ssh-command", SHELL, "-np", "4", "-H", "a:2,b:2", "sh", "-c", script], &[]);
    (0..4).for_each(|_| assert!(job.line().ends_with("up")));
    job
}

/// Whose command line ends so.
fn find(job: &Job, end: &str) -> i32 {
    let of = |pid: i32| {
        std::fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).unwrap_or_default()
    };
    let ends = |pid: &i32| text(&of(*pid)).replace('\0', " ").trim_end().ends_with(end);
    job.processes().into_iter().filter(|&pid| pid != job.pid()).find(ends).expect("it is there")
}

#[test]
fn nothing_is_left_when_the_launcher_or_an_agent_is_killed() {
    let job = start("remote-launcher");
    kill(job.pid(), "KILL");
    until("all are gone", || job.processes().is_empty());
    let job = start("remote-agent");
    kill(find(&job, "--agent"), "KILL");
    let (code, errors) = job.wait();
    assert!(code == 255 && errors.contains("is lost, and with it 2 ranks"), "{code}: {errors}");
}

#[test]
fn ranks_that_ignore_sigterm_end_on_every_host() {
    let job = start("remote-term");
    kill(job.pid(), "TERM");
    kill(job.pid(), "TERM");
    let (code, errors) = job.wait();
    assert_eq!(code, 137, "{errors}");
}

#[test]
fn a_preflight_measures_every_pair() {
    let output = carolerun(&["doctor", "-H", "a,b", "--ssh-command", SHELL]).output().unwrap();
    let out = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{out} {}", text(&output.stderr));
    assert!(out.contains("a -> b (") && out.contains("b -> a (") && out.contains("Gbit/s"), "{out}");
    assert!(out.contains("verdict: the 2 hosts can work together"), "{out}");
}
