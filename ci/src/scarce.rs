//! Jobs on machines that have too little: few file descriptors, a `/dev/shm` that is full. They do their work, or
//! end on all ranks with an error that says what is missing; nobody hangs and nothing crashes.
#![forbid(unsafe_code)]

use crate::job::Plan;
use crate::{Count, Verdict, chaos};
use clap::Args;
use std::process::Command;
use std::time::Duration;

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    #[arg(long, default_value_t = 3)]
    ranks: u32,
    /// Files that a rank may have open, one job each.
    #[arg(long, value_delimiter = ',', default_values_t = [8, 10, 12, 14, 16, 20, 24, 32, 64])]
    descriptors: Vec<u64>,
}

pub fn run(settings: &Settings) -> Verdict {
    let mut count = Count::default();
    let mut worked = 0;
    for (turn, most) in settings.descriptors.iter().enumerate() {
        let transport = ["shm", "tcp"][turn % 2];
        worked += u64::from(few_descriptors(settings.ranks, transport, *most)?);
        count.passed += 1;
    }
    println!(
        "scarce: {} jobs with {:?} descriptors a rank: {worked} worked, the others ended with an error on all ranks",
        count.passed, settings.descriptors
    );
    let full = "mount -t tmpfs -o size=4k none /dev/shm && exec \"$0\" chaos --kills 1 --stops 0 --starts 0 --teardowns 1";
    let own = std::env::current_exe().map_err(|e| format!("this program cannot find itself: {e}"))?;
    let can = Command::new("unshare").args(["-m", "true"]).status().is_ok_and(|status| status.success());
    if !can {
        println!("scarce: a full /dev/shm: skipped, no mount namespace can be made here");
        count.skipped += 1;
        return Ok(count);
    }
    let status = Command::new("unshare").args(["-m", "sh", "-c", full]).arg(own).status();
    match status {
        Ok(status) if status.success() => count.passed += 1,
        other => return Err(format!("with a full /dev/shm: {other:?}")),
    }
    println!("scarce: with a /dev/shm of 4 KiB a job runs as ever");
    Ok(count)
}

/// Whether a job of ranks with so few descriptors did its work.
fn few_descriptors(ranks: u32, transport: &str, most: u64) -> Result<bool, String> {
    let args = ["chaos", "--seed", "1", "--for-ms", "200", "--descriptors"];
    let plan = Plan {
        args: args.iter().map(|&arg| arg.to_owned()).chain([most.to_string()]).collect(),
        size: ranks,
        hosts: 1,
        places: Vec::new(),
        knobs: vec![
            ("CAROLE_TRANSPORT", transport.to_owned()),
            ("CAROLE_START_TIMEOUT_S", "5".to_owned()),
            chaos::silence(),
        ],
        limit: Duration::from_secs(60),
    };
    let ended = plan.start()?.finish()?;
    let last = |rank: usize| ended.lines[rank].last().cloned().unwrap_or_default();
    let fine =
        (0..ranks as usize).filter(|&rank| last(rank) == "finished" && ended.status[rank].success()).count();
    for rank in 0..ranks as usize {
        let words = last(rank);
        let told = words.starts_with("error ") || words.starts_with("broken ") || words == "finished";
        // Code 101 is a panic, none a signal.
        if !told || !matches!(ended.status[rank].code(), Some(0 | 1)) {
            return Err(format!(
                "{most} descriptors, {transport}: rank {rank} ended with {} and '{words}'",
                ended.status[rank]
            ));
        }
    }
    if fine != 0 && fine != ranks as usize {
        return Err(format!(
            "{most} descriptors, {transport}: only {fine} of {ranks} ranks finished: {:?}",
            ended.lines
        ));
    }
    Ok(fine > 0)
}
