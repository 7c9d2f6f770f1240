//! Ranks that run the runtime, as real processes: how they begin, fail and leave, and whom the survivors and
//! `carolerun` name. The ranks are this test program again.

mod launched;

use carole::rendezvous::proof::{Handshake, Hello, Purpose, SERVICE};
use carole::rendezvous::secret::Secret;
use carole::runtime::{self, Options, typed};
use carole::types::{Epoch, Rank, ReduceOp};
use carole::wire::PROTOCOL;
use launched::{Job, kill, until};
use rustix::process::{Signal, getpid, kill_process};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// Says to the program that it is a rank, and what it shall do.
const ROLE: &str = "CAROLE_TEST_ROLE";
/// The silence that a stopped rank is allowed.
const STOPPED_MS: &str = "6000";
/// Where the survivors wait for each other.
const MEETING: &str = "CAROLE_TEST_MEETING";
/// The rank that does it.
const VICTIM: &str = "CAROLE_TEST_VICTIM";

#[test]
fn rank() {
    let Ok(role) = std::env::var(ROLE) else { return };
    if role == "other version" {
        return other_version();
    }
    if let Err(error) = runtime::init(&Options::default()) {
        println!("refused: {error}");
        std::process::exit(1);
    }
    let me = runtime::world().unwrap().rank;
    let victim = std::env::var(VICTIM).ok().and_then(|text| text.parse().ok());
    match role.as_str() {
        "join" => println!("joined"),
        "busy" => busy(me),
        "leaves, and others for its sake" => leave_one_by_one(me),
        "stops while busy" => stop_while_busy(victim == Some(me)),
        _ if victim == Some(me) => blow(&role),
        _ => survive(&role),
    }
}

/// What happens to the victim.
fn blow(role: &str) {
    if role == "fails" {
        typed::barrier("start").unwrap();
        eprintln!("my own trouble");
        // As at the exit of Python: the goodbye leaves, then the interpreter is torn down.
        runtime::shutdown().unwrap();
        std::thread::sleep(Duration::from_millis(500));
        std::process::exit(7);
    }
    match role {
        "is killed" => kill_process(getpid(), Signal::KILL).unwrap(),
        "exits" => std::process::exit(3),
        "stops" => kill_process(getpid(), Signal::STOP).unwrap(),
        "leaves" => runtime::shutdown().unwrap(),
        other => panic!("{other}"),
    }
}

/// The others wait for the victim, and say what becomes of that.
fn survive(role: &str) {
    if role == "fails" {
        typed::barrier("start").unwrap();
    } else {
        // What is to happen shall have happened before there is a link.
        std::thread::sleep(Duration::from_millis(400));
    }
    let error = loop {
        if let Err(error) = typed::allreduce("sum", &mut [1.0f32; 100], ReduceOp::Sum) {
            break error;
        }
    };
    everybody_knows();
    println!("ended: {error}");
    eprintln!("{error}");
    std::process::exit(1);
}

/// Waits until all survivors have their error: one that ends before would be news of its own to the others.
fn everybody_knows() {
    let world = runtime::world().unwrap();
    let meeting = PathBuf::from(std::env::var(MEETING).unwrap());
    std::fs::write(meeting.join(world.rank.to_string()), "").unwrap();
    until("all survivors know", || std::fs::read_dir(&meeting).unwrap().count() as u32 == world.size - 1);
}

fn busy(me: u32) {
    for step in 0u64.. {
        typed::allreduce("sum", &mut vec![1.0f32; 1 << 16], ReduceOp::Sum).unwrap();
        if step == 3 && me == 0 {
            println!("running");
        }
    }
}

/// As a program that does not look at its errors: it ends with them at once.
fn stop_while_busy(victim: bool) {
    for step in 0u64.. {
        if victim && step == 50 {
            kill_process(getpid(), Signal::STOP).unwrap();
        }
        if let Err(error) = typed::allreduce("sum", &mut vec![1.0f32; 1 << 12], ReduceOp::Sum) {
            eprintln!("{error}");
            std::process::exit(1);
        }
    }
}

/// Rank 1 leaves; rank 0, its only neighbour, fails for its sake and leaves; rank 2 meets nobody until then.
fn leave_one_by_one(me: u32) {
    let meeting = PathBuf::from(std::env::var(MEETING).unwrap());
    match me {
        1 => {
            until("rank 2 stops", || meeting.join("2").exists());
            runtime::shutdown().unwrap();
            std::fs::write(meeting.join("1"), "").unwrap();
        }
        0 => {
            until("rank 1 leaves", || meeting.join("1").exists());
            let error = loop {
                if let Err(error) = typed::allreduce("sum", &mut [1.0f32; 4], ReduceOp::Sum) {
                    break error;
                }
            };
            println!("ended: {error}");
            std::fs::write(meeting.join("0"), "").unwrap();
            runtime::shutdown().unwrap();
            std::process::exit(1);
        }
        _ => {
            std::fs::write(meeting.join("2"), getpid().as_raw_nonzero().to_string()).unwrap();
            kill_process(getpid(), Signal::STOP).unwrap();
            println!("ended: {}", typed::allreduce("sum", &mut [1.0f32; 4], ReduceOp::Sum).unwrap_err());
        }
    }
}

/// A rank of a later version comes to the rendezvous.
fn other_version() {
    let text = std::fs::read_to_string(std::env::var("CAROLE_SECRET_FILE").unwrap()).unwrap();
    let secret = Secret::from_hex(&text).unwrap();
    let hello = Hello {
        build: "carole 99.0".into(),
        job: secret.job(),
        epoch: Epoch(0),
        rank: Rank(1),
        peer: SERVICE,
        purpose: Purpose::Register,
        link: 0,
        refuses_clear: false,
        nonce: [7; 32],
    };
    let mut bytes = Handshake::connector(&secret, hello).take_output();
    // The protocol's number stands behind the eight bytes that name it.
    bytes[8..12].copy_from_slice(&(PROTOCOL + 1).to_le_bytes());
    let address = std::env::var("CAROLE_RENDEZVOUS").unwrap();
    let mut stream = None;
    until("rank 0 listens", || {
        // Where nobody listens yet, a connection can meet itself.
        let made = TcpStream::connect(&address).ok();
        stream = made.filter(|s| s.local_addr().unwrap() != s.peer_addr().unwrap());
        stream.is_some()
    });
    let mut stream = stream.unwrap();
    stream.write_all(&bytes).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    println!("heard: {}", String::from_utf8_lossy(&answer));
}

fn under_launcher(name: &str, size: u32, before: &[&str], role: &str, more: &[(&str, &str)]) -> Job {
    let me = std::env::current_exe().unwrap();
    let size = size.to_string();
    let program = [me.to_str().unwrap(), "--exact", "rank", "--nocapture"];
    let arguments = [&["-np", &size][..], before, &program].concat();
    Job::start(name, &arguments, &[&[(ROLE, role)][..], more].concat())
}

/// The survivors' words; the launcher's code and words.
fn strike(role: &str, size: u32, victim: u32) -> (Vec<String>, i32, String) {
    let name = format!("{}-{size}-{victim}", role.replace(' ', "-"));
    let victim = victim.to_string();
    // The living must not seem silent on a busy machine; only one that stops is waited for so long.
    let silence = if role == "stops" { STOPPED_MS } else { "20000" };
    // Survivors that come late to their words are not cut short by the launcher's SIGTERM.
    let deaf = "trap '' TERM; exec \"$0\" \"$@\"";
    let meeting = tempfile::tempdir().unwrap();
    let place = meeting.path().to_str().unwrap();
    let more = [(VICTIM, victim.as_str()), (MEETING, place), ("CAROLE_TIMEOUT_MS", silence)];
    let mut job = under_launcher(&name, size, &["sh", "-c", deaf], role, &more);
    let mut words = Vec::new();
    loop {
        let line = job.line();
        if line.is_empty() {
            break;
        }
        words.extend(line.split_once("ended: ").map(|(_, words)| words.to_owned()));
    }
    let (code, errors) = job.wait();
    assert_eq!(words.len(), size as usize - 1, "{role}, rank {victim}: {words:?}\n{errors}");
    assert!(words.iter().all(|w| *w == words[0]), "{role}, rank {victim}: {words:?}");
    (words, code, errors)
}

#[test]
fn a_rank_that_ends_before_there_is_a_link_is_named_by_all() {
    for (role, code, ending) in
        [("is killed", 137, "was killed by SIGKILL"), ("exits", 3, "exited with code 3")]
    {
        for victim in 0..3 {
            let (words, got, errors) = strike(role, 3, victim);
            let expected = format!("epoch 0 is broken: rank {victim} has ended");
            assert!(words[0].starts_with(&expected), "{words:?}");
            assert_eq!(got, code, "{errors}");
            assert!(errors.contains(&format!("rank {victim} failed first: it {ending}")), "{errors}");
        }
    }
}

#[test]
fn a_rank_that_stops_before_there_is_a_link_is_silent_as_any_other() {
    for victim in 0..3 {
        let (words, code, errors) = strike("stops", 3, victim);
        let expected = format!("epoch 0 is broken: rank {victim} has been silent for {STOPPED_MS} ms");
        assert!(words[0].starts_with(&expected), "{words:?}");
        assert_eq!(code, 1, "{errors}");
        assert!(errors.contains(&format!("rank {victim} failed first, though it still runs")), "{errors}");
    }
}

#[test]
fn a_rank_that_stops_while_all_are_busy_is_the_one_that_failed_first() {
    for victim in 0..4 {
        let victim = victim.to_string();
        let more = [(VICTIM, victim.as_str()), ("CAROLE_TIMEOUT_MS", STOPPED_MS)];
        let job = under_launcher(&format!("stops-busy-{victim}"), 4, &[], "stops while busy", &more);
        let (code, errors) = job.wait();
        assert_eq!(code, 1, "{errors}");
        assert!(errors.contains(&format!("rank {victim} failed first, though it still runs")), "{errors}");
    }
}

#[test]
fn a_rank_that_leaves_before_there_is_a_link_has_shut_down() {
    for victim in 0..3 {
        let (words, _, errors) = strike("leaves", 3, victim);
        assert!(words[0].starts_with(&format!("rank {victim} has shut down")), "{words:?}\n{errors}");
    }
}

#[test]
fn who_leaves_because_another_left_is_not_blamed() {
    let meeting = tempfile::tempdir().unwrap();
    let more = [(MEETING, meeting.path().to_str().unwrap()), ("CAROLE_TIMEOUT_MS", "20000")];
    let mut job = under_launcher("one-by-one", 3, &[], "leaves, and others for its sake", &more);
    until("rank 0 leaves", || meeting.path().join("0").exists());
    let stopped = std::fs::read_to_string(meeting.path().join("2")).unwrap();
    // Long enough for rank 0 to say goodbye, and less than it lingers.
    std::thread::sleep(Duration::from_millis(200));
    kill(stopped.parse().unwrap(), "CONT");
    let mut words = Vec::new();
    loop {
        let line = job.line();
        if line.is_empty() {
            break;
        }
        words.extend(line.split_once("ended: ").map(|(_, words)| words.to_owned()));
    }
    assert_eq!(words.len(), 2, "{words:?}");
    assert!(words.iter().all(|words| words.starts_with("rank 1 has shut down")), "{words:?}");
    assert_eq!(job.wait().0, 1);
}

#[test]
fn a_rank_that_fails_and_says_goodbye_is_the_one_that_failed_first() {
    for victim in 0..3 {
        let (words, code, errors) = strike("fails", 3, victim);
        assert!(words[0].starts_with(&format!("rank {victim} has shut down")), "{words:?}");
        assert_eq!(code, 7, "{errors}");
        assert!(errors.contains(&format!("rank {victim} failed first: it exited with code 7")), "{errors}");
        assert!(errors.contains("its last line on stderr: my own trouble"), "{errors}");
    }
}

fn carole_names(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.to_string_lossy().contains("carole")).collect()
}

#[test]
fn a_running_job_leaves_nothing_when_its_launcher_is_killed() {
    let shm = Path::new("/dev/shm");
    let before = carole_names(shm);
    let (temporary, runtime) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let directories = [temporary.path(), runtime.path()].map(|path| path.to_str().unwrap().to_owned());
    let more = [("TMPDIR", directories[0].as_str()), ("XDG_RUNTIME_DIR", directories[1].as_str())];
    let mut job = under_launcher("launcher-killed", 3, &[], "busy", &more);
    until("the job runs", || {
        let line = job.line();
        assert!(!line.is_empty(), "the job has ended");
        line.contains("running")
    });
    kill(job.pid(), "KILL");
    job.child.wait().unwrap();
    until("all processes of the job are gone", || job.processes().is_empty());
    assert_eq!(carole_names(shm), before);
    for directory in directories {
        assert_eq!(std::fs::read_dir(directory).unwrap().count(), 0);
    }
}

/// A rank with plain variables and no launcher.
fn plain(rank: u32, role: &str, rendezvous: &str, secret: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "rank", "--nocapture"]).env(ROLE, role);
    command.env("CAROLE_RANK", rank.to_string()).env("CAROLE_SIZE", "2");
    command.env("CAROLE_RENDEZVOUS", rendezvous).env("CAROLE_SECRET_FILE", secret);
    command.env("CAROLE_START_TIMEOUT_S", "15");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn both(ranks: [Child; 2]) -> [String; 2] {
    ranks.map(|rank| {
        let Output { stdout, .. } = rank.wait_with_output().unwrap();
        String::from_utf8_lossy(&stdout).into_owned()
    })
}

fn secret(directory: &Path, name: &str, digits: &str) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, digits.repeat(32)).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
    path
}

fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

#[test]
fn a_port_in_use_is_told_by_the_rank_that_wants_it() {
    let directory = tempfile::tempdir().unwrap();
    let secret = secret(directory.path(), "secret", "ab");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let [zero, one] = both([0, 1].map(|rank| plain(rank, "join", &address.to_string(), &secret)));
    let words = format!("port {} is in use on this host", address.port());
    assert!(zero.contains("refused: ") && zero.contains(&words), "{zero}");
    assert!(one.contains("refused: rank 1 of 2 could not join the job"), "{one}");
}

#[test]
fn ranks_with_two_secrets_do_not_meet_and_say_why() {
    let directory = tempfile::tempdir().unwrap();
    let secrets = [("one", "ab"), ("other", "cd")].map(|(name, text)| secret(directory.path(), name, text));
    let address = free_address();
    let ranks = [0, 1].map(|rank| plain(rank, "join", &address, &secrets[rank as usize]));
    let [zero, one] = both(ranks);
    assert!(one.contains("refused: ") && one.contains("its secret differs"), "{one}");
    assert!(zero.contains("rank 1 of 2 did not arrive") && zero.contains("its secret differs"), "{zero}");
}

#[test]
fn a_peer_of_another_version_is_named_on_both_sides() {
    let directory = tempfile::tempdir().unwrap();
    let secret = secret(directory.path(), "secret", "ab");
    let address = free_address();
    let [zero, one] =
        both([plain(0, "join", &address, &secret), plain(1, "other version", &address, &secret)]);
    let ours = concat!("carole ", env!("CARGO_PKG_VERSION"));
    assert!(one.contains("heard: ") && one.contains(ours), "{one}");
    assert!(zero.contains("rank 1 of 2 did not arrive"), "{zero}");
    assert!(zero.contains("protocol versions differ") && zero.contains(ours), "{zero}");
    assert!(zero.contains("carole 99.0"), "{zero}");
}
