//! Ranks that `carolerun` starts find each other through its rendezvous server, with its secret. The ranks are
//! this test program again.

use carole::config::{Config, environment};
use carole::rendezvous::client::{Join, join};
use carole::rendezvous::place;
use carole::types::Epoch;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

/// Says to the program that it is a rank, and which one shall fail to register.
const ROLE: &str = "CAROLE_TEST_ROLE";

#[test]
fn rank() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let (config, _) = Config::load(&[], environment()).unwrap();
    let mut variables = place::environment(environment(), &config);
    if role == "thief" {
        // Another user of this machine knows the port, which is no secret, but not the secret.
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("secret");
        std::fs::write(&path, "ab".repeat(32)).unwrap();
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&path, private).unwrap();
        variables.remove("CAROLE_SECRET_FD");
        variables.insert("CAROLE_SECRET_FILE".into(), path.to_str().unwrap().into());
        let address = format!("tcp://{}", variables["CAROLE_RENDEZVOUS"]);
        variables.insert("CAROLE_RENDEZVOUS".into(), address);
        match join(&Join::new(variables, Epoch(0), Arc::new(|_| ()))) {
            Ok(_) => println!("joined without the secret"),
            Err(error) => println!("refused: {error}"),
        }
        return;
    }
    let mut last = None;
    for epoch in 0..2 {
        let joined =
            join(&Join::new(variables.clone(), Epoch(epoch), Arc::new(|_| ()))).expect("the ranks meet");
        assert_eq!(joined.table.cards.len(), 3);
        last = Some(joined);
    }
    println!("job {}", last.expect("two epochs").table.job);
}

fn start(processes: &str, role: &str) -> Output {
    let me = std::env::current_exe().unwrap();
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("carolerun"));
    command.args(["-np", processes]).arg(me).args(["--exact", "rank", "--nocapture"]);
    command.env(ROLE, role).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn ranks_meet_again_and_again_and_hold_the_same_table() {
    let output = start("3", "rank");
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{out}{}", String::from_utf8_lossy(&output.stderr));
    let jobs: Vec<&str> = out.lines().filter_map(|line| Some(line.split_once("job ")?.1)).collect();
    assert_eq!(jobs.len(), 3, "{out}");
    assert!(jobs.iter().all(|job| *job == jobs[0]), "{out}");
}

#[test]
fn a_rank_with_another_secret_is_refused() {
    let output = start("2", "thief");
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let refusals: Vec<&str> = out.lines().filter_map(|line| Some(line.split_once("refused: ")?.1)).collect();
    assert_eq!(refusals.len(), 2, "{out}");
    assert!(refusals.iter().all(|words| words.contains("secret")), "{refusals:?}");
}
