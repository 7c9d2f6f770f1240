//! Epochs after failures, among real processes without a launcher: who goes on, with whom, and who is told that it
//! must not. The ranks are this test program again.

use carole::error::Error;
use carole::runtime::{self, Options, Request, TensorArg, typed};
use carole::types::{Collective, DType, Rank, ReduceOp, SetId};
use rustix::process::{Pid, Signal, getpid, kill_process};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Says to the program that it is a rank, and what it shall do.
const ROLE: &str = "CAROLE_TEST_ROLE";
/// Where a file named "end" tells the ranks to end.
const FOLDER: &str = "CAROLE_TEST_FOLDER";
/// The rank that does something else.
const VICTIM: &str = "CAROLE_TEST_VICTIM";
/// Ranks that stand for one host, where it is not all of them.
const HOSTS: &str = "CAROLE_TEST_HOSTS";
/// Only a hang comes here.
const PATIENCE: Duration = Duration::from_secs(180);

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

#[test]
fn rank() {
    let role = variable(ROLE);
    if role.is_empty() {
        return;
    }
    runtime::init(&Options::default()).unwrap();
    match role.as_str() {
        "sets" => sets(),
        "leaves" => leaves(),
        _ => train(&role),
    }
}

fn say(words: &str) {
    println!("> {words}");
}

/// Adds ones, over and over, until all are told to end. After a failure it goes on with those that are left.
fn train(role: &str) {
    let started_as = runtime::world().unwrap().rank;
    let folder = variable(FOLDER);
    let mut steps = 0u64;
    say(&format!("runs as {}", std::process::id()));
    loop {
        let end = f32::from(u8::from(Path::new(&folder).join("end").exists()));
        let size = runtime::world().unwrap().size as f32;
        let mut values = vec![1.0f32; 1 << 14];
        values[0] = end;
        match typed::allreduce("step", &mut values, ReduceOp::Sum) {
            Ok(()) => {
                assert!(values[1..].iter().all(|&v| v == size), "{} instead of {size}", values[1]);
                if values[0] > 0.0 {
                    break;
                }
                steps += 1;
                if steps == 20 {
                    say("is under way");
                }
            }
            Err(error) => {
                assert!(matches!(error, Error::Broken(_)), "{error}");
                if !go_on(role, started_as, &error) {
                    return;
                }
            }
        }
    }
    let world = runtime::world().unwrap();
    say(&format!("ends as {} of {} in epoch {}", world.rank, world.size, runtime::epoch().unwrap()));
    runtime::shutdown().unwrap();
}

/// Forms the next epoch; false when there is none for this rank.
fn go_on(role: &str, started_as: u32, error: &Error) -> bool {
    if variable(VICTIM) == started_as.to_string() && role == "dies when it hears" {
        kill_process(getpid(), Signal::KILL).unwrap();
    }
    if variable(VICTIM) == started_as.to_string() && role == "dies while it waits" {
        std::thread::spawn(|| {
            std::thread::sleep(Duration::from_millis(3));
            kill_process(getpid(), Signal::KILL).unwrap();
        });
    }
    let start = Instant::now();
    match runtime::reform() {
        Ok(world) => {
            let (ms, epoch) = (start.elapsed().as_millis(), runtime::epoch().unwrap());
            say(&format!("is {} of {} in epoch {epoch} after {ms} ms; {error}", world.rank, world.size));
            if variable(HOSTS).is_empty() {
                assert_eq!((world.local_rank, world.local_size), (world.rank, world.size));
            }
            true
        }
        Err(error) => {
            assert!(!runtime::is_initialized());
            say(&format!("must not go on: {error}"));
            false
        }
    }
}

fn sum_in(set: SetId) -> f32 {
    let mut value = [1.0f32];
    let tensor = TensorArg {
        input: value.as_ptr().cast(),
        output: value.as_mut_ptr().cast(),
        dtype: DType::F32,
        shape: &[1],
    };
    let request =
        Request { set, collective: Collective::Allreduce, tensors: &[tensor], ..Request::default() };
    // SAFETY: the value outlives the wait.
    let handle = unsafe { runtime::submit(&request, None) }.unwrap();
    runtime::wait(handle, None).result.unwrap();
    value[0]
}

/// Process sets from epoch to epoch.
fn sets() {
    let ranks = |list: &[u32]| list.iter().copied().map(Rank).collect::<Vec<Rank>>();
    let [a, b, c] = [&[0, 1][..], &[1, 2], &[3]].map(|list| runtime::add_process_set(&ranks(list)).unwrap());
    runtime::remove_process_set(b).unwrap();
    let d = runtime::add_process_set(&ranks(&[1, 2, 3])).unwrap();
    let me = runtime::world().unwrap().rank;
    if me == 3 {
        typed::barrier("all").unwrap();
        // With a goodbye, and its doors closed.
        runtime::shutdown().unwrap();
        return say("has left");
    }
    typed::barrier("all").unwrap();
    let world = runtime::reform().unwrap();
    assert_eq!((world.rank, world.size, runtime::epoch().unwrap()), (me, 3, 1));
    let found: Vec<(SetId, Vec<Rank>)> =
        runtime::process_sets().unwrap().into_iter().map(|set| (set.id, set.ranks)).collect();
    assert_eq!(found, [(SetId(0), ranks(&[0, 1, 2])), (a, ranks(&[0, 1])), (d, ranks(&[1, 2]))]);
    assert!(runtime::process_set(c).is_err(), "it has lost everybody");
    if me < 2 {
        assert_eq!(sum_in(a), 2.0);
    }
    if me > 0 {
        assert_eq!(sum_in(d), 2.0);
    }
    // All of them again, and rank 2 not: sets that come to have the same ranks are told apart.
    assert_eq!(runtime::reform().unwrap().size, 3);
    if me == 2 {
        runtime::shutdown().unwrap();
        return say("has left");
    }
    assert_eq!(runtime::reform().unwrap().size, 2);
    let e = runtime::add_process_set(&ranks(&[0])).unwrap();
    assert!(e > d, "numbers are not given again");
    assert!(runtime::remove_process_set(a).unwrap());
    assert_eq!(runtime::process_set(SetId(0)).unwrap().ranks, ranks(&[0, 1]));
    assert_eq!(sum_in(SetId(0)), 2.0);
    runtime::shutdown().unwrap();
    say("has left");
}

/// The victim leaves for good; the others hear `Shutdown` and go on.
fn leaves() {
    let me = runtime::world().unwrap().rank;
    typed::barrier("start").unwrap();
    if variable(VICTIM) == me.to_string() {
        runtime::shutdown().unwrap();
        return say("has left");
    }
    let error = typed::barrier("after").unwrap_err();
    assert!(matches!(error, Error::Shutdown(Some(_))), "{error}");
    let world = runtime::reform().unwrap();
    typed::barrier("last").unwrap();
    say(&format!("is {} of {}", world.rank, world.size));
    runtime::shutdown().unwrap();
}

struct Ranks {
    children: Vec<Child>,
    lines: Vec<Receiver<String>>,
    folder: tempfile::TempDir,
}

impl Ranks {
    fn start(size: u32, role: &str, more: &[(&str, &str)]) -> Ranks {
        let folder = tempfile::tempdir().unwrap();
        let mut ranks = Ranks { children: Vec::new(), lines: Vec::new(), folder };
        for rank in 0..size {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", "rank", "--nocapture"]).env(ROLE, role);
            command.env("CAROLE_RANK", rank.to_string()).env("CAROLE_SIZE", size.to_string());
            command.env(FOLDER, ranks.folder.path());
            command.env("CAROLE_JOB", ranks.folder.path()).env("CAROLE_TIMEOUT_MS", "20000");
            command.envs(more.iter().copied());
            if let Some((_, ranks)) = more.iter().find(|(name, _)| *name == HOSTS) {
                let host = rank / ranks.parse::<u32>().unwrap();
                command.env("CAROLE_HOST_ID", format!("host {host}"));
            }
            let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
            let (sender, receiver) = channel();
            let stdout = BufReader::new(child.stdout.take().unwrap());
            std::thread::spawn(move || {
                for line in stdout.lines().map_while(Result::ok) {
                    if let Some((_, words)) = line.split_once("> ") {
                        let _ = sender.send(words.to_owned());
                    }
                }
            });
            ranks.children.push(child);
            ranks.lines.push(receiver);
        }
        ranks
    }

    /// The next words of a rank; they must begin with these.
    fn hear(&self, rank: u32, beginning: &str) -> String {
        let words = self.lines[rank as usize].recv_timeout(PATIENCE);
        let words = words.unwrap_or_else(|_| panic!("rank {rank} says nothing instead of '{beginning}'"));
        assert!(words.starts_with(beginning), "rank {rank} says '{words}' instead of '{beginning}'");
        words
    }

    fn under_way(&self) {
        for rank in 0..self.children.len() as u32 {
            self.hear(rank, "runs as");
            self.hear(rank, "is under way");
        }
    }

    fn signal(&self, rank: u32, signal: Signal) {
        kill_process(Pid::from_child(&self.children[rank as usize]), signal).unwrap();
    }

    /// All of `who` end as the ranks of an epoch, in order.
    fn end(&self, who: &[u32], epoch: u32) {
        std::fs::write(self.folder.path().join("end"), "").unwrap();
        for (place, &rank) in who.iter().enumerate() {
            self.hear(rank, &format!("ends as {place} of {} in epoch {epoch}", who.len()));
        }
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn survivors_of_a_killed_rank_go_on() {
    for victim in 0..4 {
        let ranks = Ranks::start(4, "train", &[]);
        ranks.under_way();
        ranks.signal(victim, Signal::KILL);
        let survivors: Vec<u32> = (0..4).filter(|&rank| rank != victim).collect();
        for (place, &rank) in survivors.iter().enumerate() {
            let words = ranks.hear(rank, &format!("is {place} of 3 in epoch 1 after"));
            assert!(words.contains(&format!("epoch 0 is broken: rank {victim} has ended")), "{words}");
            println!("rank {victim} was killed; rank {rank} {words}");
        }
        ranks.end(&survivors, 1);
    }
}

#[test]
fn survivors_go_on_over_other_transports_and_between_hosts() {
    for more in [&[("CAROLE_TRANSPORT", "tcp")][..], &[(HOSTS, "2")], &[(HOSTS, "1")]] {
        for victim in [0, 3] {
            let ranks = Ranks::start(4, "train", more);
            ranks.under_way();
            ranks.signal(victim, Signal::KILL);
            let survivors: Vec<u32> = (0..4).filter(|&rank| rank != victim).collect();
            for (place, &rank) in survivors.iter().enumerate() {
                ranks.hear(rank, &format!("is {place} of 3 in epoch 1 after"));
            }
            ranks.end(&survivors, 1);
        }
    }
}

/// `TEST_KILLS` says how often.
#[test]
fn killed_at_any_moment() {
    let trials = variable("TEST_KILLS").parse().unwrap_or(10u64);
    for trial in 0..trials {
        let ranks = Ranks::start(4, "train", &[]);
        ranks.under_way();
        let (victim, other) = (trial % 4, (trial / 4 + trial % 4 + 1) % 4);
        let both = trial % 3 == 0 && other != victim;
        std::thread::sleep(Duration::from_micros(trial * 7919 % 20_000));
        ranks.signal(victim as u32, Signal::KILL);
        if both {
            std::thread::sleep(Duration::from_micros(trial * 104_729 % 15_000));
            ranks.signal(other as u32, Signal::KILL);
        }
        let lost = |rank: &u64| *rank == victim || (both && *rank == other);
        let survivors: Vec<u32> = (0..4).filter(|rank| !lost(rank)).map(|rank| rank as u32).collect();
        let left = survivors.len();
        let mut epochs = Vec::new();
        for (place, &rank) in survivors.iter().enumerate() {
            let mut words = ranks.hear(rank, "is ");
            if !words.starts_with(&format!("is {place} of {left} in")) {
                // The second was killed when the first epoch had been formed with it.
                words = ranks.hear(rank, &format!("is {place} of {left} in epoch 2"));
            }
            epochs.push(if words.contains("in epoch 1 ") { 1 } else { 2 });
        }
        assert!(epochs.iter().all(|epoch| *epoch == epochs[0]), "{epochs:?}");
        ranks.end(&survivors, epochs[0]);
    }
}

#[test]
fn two_killed_at_once_and_then_one_more() {
    let ranks = Ranks::start(5, "train", &[]);
    ranks.under_way();
    ranks.signal(0, Signal::KILL);
    ranks.signal(3, Signal::KILL);
    for (place, rank) in [1, 2, 4].into_iter().enumerate() {
        println!("{}", ranks.hear(rank, &format!("is {place} of 3 in epoch 1 after")));
    }
    ranks.signal(2, Signal::KILL);
    for (place, rank) in [1, 4].into_iter().enumerate() {
        ranks.hear(rank, &format!("is {place} of 2 in epoch 2 after"));
    }
    ranks.signal(1, Signal::KILL);
    ranks.hear(4, "is 0 of 1 in epoch 3 after");
    ranks.end(&[4], 3);
}

#[test]
fn killed_while_the_others_come_together() {
    for role in ["dies when it hears", "dies while it waits"] {
        for victim in [0, 1, 3] {
            let ranks = Ranks::start(4, role, &[(VICTIM, &victim.to_string())]);
            ranks.under_way();
            ranks.signal(2, Signal::KILL);
            let survivors: Vec<u32> = [0, 1, 3].into_iter().filter(|&rank| rank != victim).collect();
            let mut epoch = 0;
            for (place, &rank) in survivors.iter().enumerate() {
                let mut words = ranks.hear(rank, "is ");
                if words.contains(" of 3 in epoch 1") {
                    // It died only after the epoch had been formed with it.
                    words = ranks.hear(rank, "is ");
                }
                assert!(words.starts_with(&format!("is {place} of 2")), "{words}");
                epoch = if words.contains("in epoch 1") { 1 } else { 2 };
            }
            ranks.end(&survivors, epoch);
        }
    }
}

#[test]
fn one_that_was_stopped_finds_that_the_others_have_gone_on() {
    for victim in [0, 2] {
        let ranks = Ranks::start(3, "train", &[("CAROLE_TIMEOUT_MS", "6000")]);
        ranks.under_way();
        ranks.signal(victim, Signal::STOP);
        let survivors: Vec<u32> = (0..3).filter(|&rank| rank != victim).collect();
        for (place, &rank) in survivors.iter().enumerate() {
            let words = ranks.hear(rank, &format!("is {place} of 2 in epoch 1 after"));
            assert!(words.contains(&format!("rank {victim} has been silent for 6000 ms")), "{words}");
            println!("rank {victim} was stopped; rank {rank} {words}");
        }
        ranks.signal(victim, Signal::CONT);
        let words = ranks.hear(victim, "must not go on");
        assert!(
            words.contains(&format!("rank {victim} is excluded")) && words.contains("epoch 1"),
            "{words}"
        );
        ranks.end(&survivors, 1);
    }
}

#[test]
fn the_smaller_part_does_not_go_on() {
    let ranks = Ranks::start(2, "train", &[("CAROLE_TIMEOUT_MS", "6000")]);
    ranks.under_way();
    ranks.signal(0, Signal::STOP);
    let words = ranks.hear(1, "must not go on");
    assert!(words.contains("minority: 1 of 2"), "{words}");
    // The other one may: it holds the lowest rank.
    ranks.signal(0, Signal::CONT);
    ranks.hear(0, "is 0 of 1 in epoch 1 after");
    ranks.end(&[0], 1);
}

#[test]
fn sets_are_rebuilt_from_those_who_remain() {
    let ranks = Ranks::start(4, "sets", &[]);
    (0..4).for_each(|rank| drop(ranks.hear(rank, "has left")));
}

#[test]
fn a_rank_that_leaves_is_not_waited_for() {
    for victim in [0, 2] {
        let ranks = Ranks::start(3, "leaves", &[(VICTIM, &victim.to_string())]);
        ranks.hear(victim, "has left");
        let survivors: Vec<u32> = (0..3).filter(|&rank| rank != victim).collect();
        for (place, &rank) in survivors.iter().enumerate() {
            ranks.hear(rank, &format!("is {place} of 2"));
        }
    }
}
