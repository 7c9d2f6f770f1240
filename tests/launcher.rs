//! `carolerun` from outside: what users and scripts see. The ranks are shells, so no part of the runtime is
//! needed.

mod launched;

use assert_cmd::cargo::cargo_bin;
use launched::{Job, carolerun, kill, until};
use std::collections::HashSet;
use std::io::{BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

fn run(arguments: &[&str]) -> Output {
    carolerun(arguments).output().expect("carolerun runs")
}

fn ranks(processes: &str, script: &str) -> Output {
    run(&["-np", processes, "sh", "-c", script])
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("carolerun exits, it is not killed")
}

fn sorted_lines(bytes: &[u8]) -> Vec<String> {
    let mut lines: Vec<String> = text(bytes).lines().map(str::to_string).collect();
    lines.sort();
    lines
}

#[test]
fn lines_are_prefixed_and_every_rank_knows_its_place() {
    let script = "echo out $CAROLE_RANK/$CAROLE_SIZE $CAROLE_LOCAL_RANK/$CAROLE_LOCAL_SIZE \
                  $CAROLE_CROSS_RANK/$CAROLE_CROSS_SIZE; echo err $HOROVOD_RANK/$HOROVOD_SIZE >&2; printf 'no end'";
    let output = ranks("3", script);
    assert_eq!(code(&output), 0);
    let expected: Vec<String> = (0..3)
        .flat_map(|r| [format!("[{r}]<stdout>:no end"), format!("[{r}]<stdout>:out {r}/3 {r}/3 0/1")])
        .collect();
    assert_eq!(sorted_lines(&output.stdout), expected);
    assert_eq!(
        sorted_lines(&output.stderr),
        ["[0]<stderr>:err 0/3", "[1]<stderr>:err 1/3", "[2]<stderr>:err 2/3"]
    );
}

#[test]
fn the_secret_comes_by_descriptor_only_and_each_rank_can_reach_the_rendezvous() {
    let script = "wc -c < /proc/self/fd/$CAROLE_SECRET_FD; \
                  s=$(cat /proc/self/fd/$CAROLE_SECRET_FD); \
                  tr '\\0' '\\n' < /proc/self/environ | grep -c \"$s\"; \
                  grep -c \"$s\" /proc/$PPID/cmdline; echo $CAROLE_RENDEZVOUS; echo $s";
    let output = ranks("2", script);
    let out = text(&output.stdout);
    for rank in 0..2 {
        let lines: Vec<&str> =
            out.lines().filter_map(|l| l.strip_prefix(&format!("[{rank}]<stdout>:"))).collect();
        assert_eq!(&lines[..3], ["64", "0", "0"], "{out}");
        assert!(lines[3].starts_with("127.0.0.1:"), "{out}");
        assert_eq!(lines[4].len(), 64);
    }
    let secrets: HashSet<&str> = out.lines().filter(|l| l.len() > 64).map(|l| &l[l.len() - 64..]).collect();
    assert_eq!(secrets.len(), 1, "ranks of a job share a secret");
    assert!(
        !text(&ranks("1", "cat /proc/self/fd/$CAROLE_SECRET_FD").stdout)
            .contains(secrets.iter().next().unwrap())
    );
}

#[test]
fn output_is_binary_safe_and_complete() {
    let output = ranks("1", r"printf 'a\000\377b\n\n\rx\r\ny'");
    assert_eq!(
        output.stdout,
        b"[0]<stdout>:a\x00\xffb\n[0]<stdout>:\n[0]<stdout>:\r[0]<stdout>:x\r\n[0]<stdout>:y\n"
    );
    let output = run(&["-np", "1", "--prefix-output-with-timestamp", "echo", "x"]);
    let line = text(&output.stdout);
    assert!(line.starts_with("20") && line.ends_with("Z[0]<stdout>:x\n"), "{line}");
}

#[test]
fn eight_ranks_that_flood_lose_nothing_and_mix_no_lines() {
    let script = "i=0; while [ $i -lt 20 ]; do seq 1 1000; i=$((i+1)); done";
    let output = ranks("8", script);
    assert_eq!(code(&output), 0);
    let mut counts = [0; 8];
    for line in text(&output.stdout).lines() {
        let rest = line.strip_prefix('[').unwrap_or_else(|| panic!("{line:?}"));
        let (rank, rest) = rest.split_once("]<stdout>:").unwrap_or_else(|| panic!("{line:?}"));
        let rank: usize = rank.parse().unwrap();
        assert_eq!(rest.parse::<u32>().unwrap(), counts[rank] % 1000 + 1, "{line:?}");
        counts[rank] += 1;
    }
    assert_eq!(counts, [20_000; 8]);
}

#[test]
fn a_slow_reader_holds_the_ranks_back_and_a_closed_one_ends_them() {
    let mut job = Job::start("slow", &["-np", "2", "yes"], &[]);
    assert_eq!(&job.line()[3..], "<stdout>:y");
    let launcher = job.pid();
    let resident = || {
        let status = std::fs::read_to_string(format!("/proc/{launcher}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap().to_string();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    // Unread, two floods would be gigabytes within a second.
    std::thread::sleep(Duration::from_secs(1));
    assert!(resident() < 100_000, "{} KiB", resident());
    // Closes our end of its standard output.
    job.lines = {
        let mut other = Command::new("true").stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(other.stdout.take().unwrap());
        other.wait().unwrap();
        lines
    };
    let (code, errors) = job.wait();
    assert_eq!(code, 141, "{errors}");
    assert!(errors.contains("closed by its reader"), "{errors}");
}

#[test]
fn the_first_failure_is_named_with_its_last_words_and_its_code() {
    let script =
        "[ $CAROLE_RANK = 1 ] && { echo early >&2; echo 'the reason' >&2; echo >&2; exit 7; }; sleep 600";
    let output = ranks("3", script);
    assert_eq!(code(&output), 7);
    let errors = text(&output.stderr);
    assert!(errors.contains("rank 1 failed first: it exited with code 7"), "{errors}");
    assert!(errors.contains("last line on stderr: the reason"), "{errors}");
    assert_eq!(errors.matches("carolerun:").count(), 1, "one report, not one per rank: {errors}");
}

/// What the runtime says of a rank, in the words of its errors.
const WORDS: &str = "echo 'epoch 0 is broken: rank 1 has ended; call shutdown() and init()' >&2";

#[test]
fn whoever_names_another_rank_is_not_the_first_that_failed() {
    // Rank 1 fails and says goodbye; the others hear of it, fail, and are sooner gone.
    let script = format!("[ $CAROLE_RANK = 1 ] && {{ sleep 0.5; echo mine >&2; exit 7; }}; {WORDS}; exit 1");
    let output = ranks("3", &script);
    let errors = text(&output.stderr);
    assert_eq!(code(&output), 7, "{errors}");
    assert!(errors.contains("rank 1 failed first: it exited with code 7"), "{errors}");
    assert!(errors.contains("last line on stderr: mine"), "{errors}");
    assert_eq!(errors.matches("carolerun:").count(), 1, "{errors}");
}

#[test]
fn a_rank_that_is_named_and_does_not_end_is_told_with_its_accuser() {
    let script = format!("[ $CAROLE_RANK = 1 ] && kill -STOP $$; {WORDS}; exit 5");
    let job = Job::start("named", &["-np", "3", "sh", "-c", &script], &[]);
    let (code, errors) = job.wait();
    assert_eq!(code, 5, "{errors}");
    assert!(errors.contains("rank 1 failed first, though it still runs"), "{errors}");
    assert!(
        errors.contains("which names it, exited with code 5; its last line on stderr: epoch 0"),
        "{errors}"
    );
}

#[test]
fn what_a_rank_said_of_another_is_heard_while_nobody_reads_the_output() {
    // Rank 0 writes more than the launcher holds for a reader that does not read; then rank 2 fails for rank 1's sake.
    let directory = tempfile::tempdir().unwrap();
    let go = directory.path().join("go");
    let script = format!(
        "case $CAROLE_RANK in 0) head -c 4000000 /dev/zero | tr '\\0' x | fold -w 100 >&2; exec sleep 600;; \
         1) exec sleep 600;; 2) while [ ! -e {0} ]; do sleep 0.05; done; {WORDS}; echo > {0}.done; exit 5;; esac",
        go.display()
    );
    let mut job = Job::start("unread", &["-np", "3", "sh", "-c", &script], &[]);
    std::thread::sleep(Duration::from_millis(1500));
    std::fs::write(&go, "").unwrap();
    until("rank 2 has spoken", || go.with_extension("done").exists());
    // Long enough for the launcher to hear of its end, and less than it waits for rank 1.
    std::thread::sleep(Duration::from_millis(500));
    let mut errors = String::new();
    job.child.stderr.take().expect("stderr is piped").read_to_string(&mut errors).unwrap();
    let said: Vec<&str> = errors.lines().filter(|line| line.starts_with("carolerun: ")).collect();
    assert_eq!(job.child.wait().unwrap().code(), Some(5), "{said:?}");
    assert!(said[0].contains("rank 1 failed first, though it still runs"), "{said:?}");
}

#[test]
fn a_rank_killed_by_a_signal_is_named_with_it() {
    let output = ranks("2", "[ $CAROLE_RANK = 0 ] && kill -SEGV $$; sleep 600");
    assert_eq!(code(&output), 128 + 11);
    assert!(text(&output.stderr).contains("rank 0 failed first: it was killed by SIGSEGV"));
}

#[test]
fn a_rank_that_ends_well_early_disturbs_nobody() {
    let output = ranks("2", "[ $CAROLE_RANK = 0 ] && exit 0; sleep 1; echo done");
    assert_eq!((code(&output), text(&output.stdout)), (0, "[1]<stdout>:done\n".to_string()));
}

#[test]
fn others_may_speak_before_they_are_ended() {
    // As a rank that sees the failure of another one does: it says so and exits by itself.
    let output = ranks("2", "[ $CAROLE_RANK = 1 ] && exit 3; sleep 0.5; echo 'I saw it'; exit 4");
    assert_eq!(code(&output), 3);
    assert!(text(&output.stdout).contains("[0]<stdout>:I saw it"));
}

#[test]
fn ranks_that_ignore_sigterm_or_are_stopped_are_killed() {
    let script = "trap '' TERM INT HUP; [ $CAROLE_RANK = 0 ] && kill -STOP $$; \
                  [ $CAROLE_RANK = 1 ] && { sleep 0.3; exit 9; }; while :; do sleep 1; done";
    let job = Job::start("stubborn", &["-np", "3", "sh", "-c", script], &[]);
    let (code, errors) = job.wait();
    assert_eq!(code, 9, "{errors}");
}

#[test]
fn a_killed_rank_whose_children_hold_its_output_does_not_hang_the_launcher() {
    // A data loader in a session of its own, which even survives signals to the process group.
    let script = "setsid sh -c 'trap \"\" TERM; while :; do sleep 1; done' & [ $CAROLE_RANK = 0 ] && kill -KILL $$; wait";
    let job = Job::start("loader", &["-np", "2", "sh", "-c", script], &[]);
    let (code, errors) = job.wait();
    assert_eq!(code, 137, "{errors}");
    assert!(errors.contains("rank 0 failed first: it was killed by SIGKILL"), "{errors}");
}

#[test]
fn daemons_that_ranks_leave_behind_are_killed_at_a_good_end_too() {
    let job = Job::start("daemon", &["-np", "2", "sh", "-c", "setsid sleep 600 & exit 0"], &[]);
    assert_eq!(job.wait(), (0, String::new()));
}

/// Starts ranks with children in the group, and grandchildren that have left session and parent.
fn start_family(name: &str, more: &[&str]) -> Job {
    let script = "sleep 600 & (setsid sleep 600 &) ; echo ready; wait";
    let mut job = Job::start(name, &[more, &["-np", "2", "sh", "-c", script]].concat(), &[]);
    for _ in 0..2 {
        assert!(job.line().ends_with("ready"));
    }
    job
}

#[test]
fn nothing_is_left_when_the_launcher_is_killed() {
    let mut job = start_family("orphans", &[]);
    // Launcher, guard, and for each rank a shell and two sleeps.
    until("all processes of the job are seen", || job.processes().len() == 8);
    kill(job.pid(), "KILL");
    job.child.wait().unwrap();
    until("all processes of the job are gone", || job.processes().is_empty());
}

#[test]
fn nothing_is_left_when_the_guard_is_killed() {
    let job = start_family("guardless", &[]);
    until("all processes of the job are seen", || job.processes().len() == 8);
    let guard = job.processes().into_iter().find(|pid| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "carole-guard")
    });
    kill(guard.expect("there is a guard"), "KILL");
    let (code, errors) = job.wait();
    assert_eq!(code, 137, "{errors}");
    assert!(errors.contains("guard"), "{errors}");
}

#[test]
fn sigterm_is_passed_on_and_the_ranks_decide() {
    let script = "trap 'echo saved; exit 0' TERM; echo ready; while :; do sleep 0.1; done";
    let mut job = Job::start("term", &["-np", "2", "sh", "-c", script], &[]);
    for _ in 0..2 {
        assert!(job.line().ends_with("ready"));
    }
    kill(job.pid(), "TERM");
    for _ in 0..2 {
        assert!(job.line().ends_with("saved"));
    }
    assert_eq!(job.wait().0, 0);
    let job = start_family("term-default", &[]);
    kill(job.pid(), "TERM");
    assert_eq!(job.wait().0, 143);
}

#[test]
fn sigint_twice_does_not_wait_for_ranks_that_ignore_the_first() {
    let script = "trap 'echo no' INT; echo ready; while :; do sleep 0.1; done";
    let mut job = Job::start("int", &["--kill-after", "3600", "-np", "1", "sh", "-c", script], &[]);
    assert!(job.line().ends_with("ready"));
    kill(job.pid(), "INT");
    assert!(job.line().ends_with("no"));
    kill(job.pid(), "INT");
    assert_eq!(job.wait().0, 143);
}

#[test]
fn stopped_ranks_are_killed_after_sigterm() {
    let job = start_family("stopped", &["--kill-after", "0.5"]);
    for pid in job.processes() {
        if std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sh") {
            kill(pid, "STOP");
        }
    }
    kill(job.pid(), "TERM");
    assert_eq!(job.wait().0, 137);
}

#[test]
fn sigusr1_goes_to_the_ranks_alone() {
    // The sleeping child would die of SIGUSR1.
    let script = "trap 'echo usr; kill $!; exit 0' USR1; sleep 600 & echo ready; wait";
    let mut job = Job::start("usr", &["-np", "1", "sh", "-c", script], &[]);
    assert!(job.line().ends_with("ready"));
    kill(job.pid(), "USR1");
    assert!(job.line().ends_with("usr"));
    assert_eq!(job.wait().0, 0);
}

#[test]
fn output_is_also_written_to_files() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("deep/logs");
    let script = "printf \"out $CAROLE_RANK\"; echo err >&2";
    let output = run(&["-np", "11", "--output-filename", path.to_str().unwrap(), "sh", "-c", script]);
    assert_eq!(code(&output), 0);
    assert!(text(&output.stdout).contains("[10]<stdout>:out 10\n"));
    let read = |name: &str| std::fs::read_to_string(path.join(name)).unwrap();
    assert_eq!(read("rank.03/stdout"), "out 3");
    assert_eq!(read("rank.10/stderr"), "err\n");
    std::fs::write(directory.path().join("file"), "").unwrap();
    let bad = directory.path().join("file/x");
    let output = run(&["-np", "1", "--output-filename", bad.to_str().unwrap(), "true"]);
    assert_eq!(code(&output), 2);
    assert!(text(&output.stderr).contains("file/x"));
}

#[test]
fn standard_input_goes_to_a_single_rank_only() {
    for (processes, expected) in [("1", "[0]<stdout>:hello\n"), ("2", "")] {
        let mut command = carolerun(&["-np", processes, "cat"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // With two ranks nobody reads it, and that is no error.
        let _ = child.stdin.take().unwrap().write_all(b"hello\n");
        let output = child.wait_with_output().unwrap();
        assert_eq!((code(&output), text(&output.stdout)), (0, expected.to_string()));
    }
}

#[test]
fn bad_commands_and_arguments_get_clear_words() {
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("train.py");
    std::fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    let script = script.to_str().unwrap();
    for (arguments, expected_code, words) in [
        (&["-np", "2", "no-such-command-here"][..], 127, "'no-such-command-here' was not found"),
        (&["-np", "2", script], 126, "not executable"),
        (&["-np", "2", script], 126, "did you mean: carolerun ... python"),
        (&["sh", "-c", "true"], 2, "-np N is missing"),
        (&["-np", "0", "true"], 2, "-np 0"),
        (&["-np", "2"], 2, "no command"),
        (&["-np", "x", "true"], 2, "invalid value 'x'"),
        (&["-np", "3", "-H", "localhost:2", "true"], 2, "slots (2: localhost:2)"),
        (
            &["-np", "1", "-H", "no-such-host.invalid:2", "true"],
            2,
            "host 'no-such-host.invalid' cannot be used",
        ),
        (&["-np", "2", "-H", "localhost:1,localhost:1", "true"], 2, "stands twice"),
        (&["-np", "1", "--ssh-prot", "22", "true"], 2, "'--ssh-port'"),
        (&["-np", "1", "--hostfile", "/no/such/file", "true"], 2, "/no/such/file"),
        (&["-np", "1", "--transport", "mpi", "true"], 2, "no MPI"),
        (&["-np", "1", "--config-file", "/no/such/file", "true"], 2, "/no/such/file"),
        (&["-np", "1", "--kill-after=-1", "true"], 2, "kill-after"),
    ] {
        let output = run(arguments);
        let errors = text(&output.stderr);
        assert_eq!(code(&output), expected_code, "{arguments:?}: {errors}");
        assert!(errors.contains(words), "{arguments:?}: {errors}");
        assert_eq!(text(&output.stdout), "", "{arguments:?}");
    }
    make_executable(script);
    let output = run(&["-np", "1", script]);
    assert_eq!(code(&output), 127);
    assert!(text(&output.stderr).contains("interpreter"));
    let output = carolerun(&["-np", "1", "train.py"]).current_dir(directory.path()).output().unwrap();
    let errors = text(&output.stderr);
    assert!(errors.contains("not in PATH") && errors.contains("./train.py"), "{errors}");
}

fn make_executable(path: impl AsRef<Path>) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn flags_become_variables_of_the_ranks_and_unused_ones_are_told_once() {
    let script = "echo $CAROLE_ALGORITHM $CAROLE_FUSION_BYTES $CAROLE_BATCH_WINDOW_US $CAROLE_CACHE_CAPACITY";
    let arguments = [
        "-np",
        "2",
        "--algorithm",
        "tree",
        "--fusion-threshold-mb",
        "32",
        "--cycle-time-ms",
        "2.5",
        "--disable-cache",
        "--autotune",
        "--num-nccl-streams",
        "2",
        "sh",
        "-c",
        script,
    ];
    let output = carolerun(&arguments).env("CAROLE_ALGORITHM", "ring").output().unwrap();
    assert_eq!(sorted_lines(&output.stdout), ["[0]<stdout>:tree 32M 2500 0", "[1]<stdout>:tree 32M 2500 0"]);
    let errors = text(&output.stderr);
    assert_eq!(errors, "carolerun: no effect in this version of Carole: --autotune, --num-nccl-streams\n");
}

#[test]
fn a_job_inside_a_job_has_a_place_of_its_own() {
    let inner = format!("{} -np 1 sh -c 'echo $CAROLE_RANK/$CAROLE_SIZE'", cargo_bin("carolerun").display());
    let output = ranks("2", &inner);
    assert_eq!(code(&output), 0, "{}", text(&output.stderr));
    assert_eq!(sorted_lines(&output.stdout), ["[0]<stdout>:[0]<stdout>:0/1", "[1]<stdout>:[0]<stdout>:0/1"]);
}

#[test]
fn descriptors_of_the_launcher_do_not_leak_into_ranks() {
    // What the test itself inherits, ranks inherit too.
    let outside = Command::new("ls").arg("/proc/self/fd").stdin(Stdio::null()).output().unwrap();
    let outside = text(&outside.stdout).split_whitespace().count();
    let output = ranks("4", "ls /proc/self/fd | tr '\\n' ' '; echo; echo secret $CAROLE_SECRET_FD");
    let out = text(&output.stdout);
    for rank in 0..4 {
        let prefix = format!("[{rank}]<stdout>:");
        let lines: Vec<&str> = out.lines().filter_map(|line| line.strip_prefix(&prefix)).collect();
        let secret = lines[1].strip_prefix("secret ").unwrap();
        let open: Vec<&str> = lines[0].split_whitespace().collect();
        assert!(open.len() == outside + 1 && open.contains(&secret), "{open:?}");
    }
}

#[test]
fn what_only_prints_needs_no_job() {
    let output = run(&["--check-build"]);
    let out = text(&output.stdout);
    assert!(out.contains("[X] Shared memory") && out.contains("[X] TCP"), "{out}");
    assert!(out.contains("[ ] MPI") && out.contains("[ ] NCCL") && out.contains("[ ] TensorFlow"), "{out}");
    // How much memory and how many descriptors are free changes from moment to moment.
    let titles =
        |out: &str| out.lines().map(|line| line.get(..20).unwrap_or(line).to_owned()).collect::<Vec<_>>();
    assert_eq!(titles(&text(&run(&["-cb"]).stdout)), titles(&out));

    let output = carolerun(&["--print-config", "--transport", "tcp"])
        .env("HOROVOD_FUSION_THRESHOLD", "1024")
        .env("CAROLE_ALGORITM", "ring")
        .output()
        .unwrap();
    let out = text(&output.stdout);
    let row = |name: &str| -> Vec<String> {
        let line = out.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {out}"));
        line.split_whitespace().skip(1).map(str::to_string).collect()
    };
    assert_eq!(row("CAROLE_TRANSPORT"), ["tcp", "--transport"]);
    assert_eq!(row("CAROLE_FUSION_BYTES"), ["1K", "HOROVOD_FUSION_THRESHOLD"]);
    assert_eq!(row("CAROLE_ALGORITHM"), ["auto", "default"]);
    assert!(text(&output.stderr).contains("did you mean CAROLE_ALGORITHM?"));
    let strict =
        carolerun(&["--print-config"]).env("CAROLE_ALGORITM", "x").env("CAROLE_STRICT_ENV", "1").output();
    assert_eq!(code(&strict.unwrap()), 2);

    let version = text(&run(&["--version"]).stdout);
    assert!(version.starts_with("carolerun ") && version.trim().ends_with(env!("CARGO_PKG_VERSION")));
    assert!(text(&run(&["--manual"]).stdout).contains("CAROLE_DETERMINISTIC (default 0)"));
}

#[test]
fn help_is_ordered_by_topic_and_hides_what_has_no_effect() {
    let overview = text(&run(&["--help"]).stdout);
    assert!(overview.lines().count() <= 40 && overview.contains("carolerun --help hosts"), "{overview}");
    let hosts = text(&run(&["--help", "hosts"]).stdout);
    assert!(hosts.contains("--ssh-port") && !hosts.contains("--fusion-threshold-mb"), "{hosts}");
    let wrong = run(&["--help", "nonsense"]);
    assert!(code(&wrong) == 2 && text(&wrong.stderr).contains("topics are: job"), "{}", text(&wrong.stderr));
    assert!(!overview.contains('\x1b'), "no colours without a terminal");
    let help = text(&run(&["--help", "all"]).stdout);
    let topics = ["Job:", "Information:", "Hosts:", "Output:", "Settings:"];
    let places: Vec<usize> =
        topics.iter().map(|topic| help.find(topic).unwrap_or_else(|| panic!("{topic}"))).collect();
    assert!(places.is_sorted(), "{help}");
    assert!(!help.contains("nccl"), "{help}");
}
