//! Every kind of test, one after another, with a table at the end. `ci/test` and `ci/long` set up what is
//! needed and call this. Each step's whole output goes to `target/ci/logs`; what fails shows its end at once,
//! and the rest of the suite runs all the same.
#![forbid(unsafe_code)]

mod evidence;
mod steps;

use crate::Count;
use crate::install_c::repository;
use clap::Args;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use steps::Step;

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    /// Full counts; resumes where an earlier run of the same commit ended, and writes ci/EVIDENCE.md.
    #[arg(long)]
    long: bool,
    /// With --long: of a hundred parts of the counts of faults, seeds and mutants, so many.
    #[arg(long, default_value_t = 100)]
    share: u64,
    /// Only the steps whose names contain this; with --long those that have passed stay on the page.
    #[arg(long)]
    only: Option<String>,
}

/// How a step ended.
#[derive(Clone, Debug)]
enum Ending {
    Passed(Count),
    /// With the reason.
    Skipped(String),
    Failed(String),
}

/// A row of the table.
#[derive(Clone, Debug)]
struct Row {
    name: String,
    ending: Ending,
    seconds: f64,
    /// What the step said about itself.
    remark: String,
    /// Of a hundred parts of the full counts, how many.
    share: u64,
}

pub fn run(settings: &Settings) -> i32 {
    let begin = Instant::now();
    let state = evidence::State::open(settings.long);
    let full = steps::all(steps::Scale { long: settings.long, share: 100 });
    let mut rows = Vec::new();
    for (step, whole) in
        steps::all(steps::Scale { long: settings.long, share: settings.share }).iter().zip(&full)
    {
        let share = if step.commands == whole.commands { 100 } else { settings.share };
        let wanted = settings.only.as_ref().is_none_or(|only| step.name.contains(only.as_str()));
        // What has passed with more counts need not be run again; what is not asked for stays as it is.
        let row = match state.known(step.name, if wanted { share } else { 0 }) {
            Some(row) => row,
            None if !wanted => continue,
            None => {
                println!("=== {}", step.name);
                let row = Row { share, ..run_step(step) };
                println!("    {}", describe(&row));
                state.remember(&row);
                row
            }
        };
        rows.push(row);
    }
    print_table(&rows, begin.elapsed());
    if settings.long
        && let Err(error) = evidence::write(&rows)
    {
        eprintln!("the evidence cannot be written: {error}");
        return 1;
    }
    i32::from(rows.iter().any(|row| matches!(row.ending, Ending::Failed(_))))
}

fn run_step(step: &Step) -> Row {
    let begin = Instant::now();
    let (ending, remark) = match step.missing() {
        Some(reason) => (Ending::Skipped(reason), String::new()),
        None => match run_commands(step) {
            Ok(output) => (Ending::Passed(count(&output)), remark(&output)),
            Err(words) => (Ending::Failed(words), String::new()),
        },
    };
    Row { name: step.name.to_owned(), ending, seconds: begin.elapsed().as_secs_f64(), remark, share: 100 }
}

/// Runs the commands of a step, all output to its log, and gives the log back.
fn run_commands(step: &Step) -> Result<String, String> {
    let root = repository();
    let logs = root.join("target/ci/logs");
    fs::create_dir_all(&logs).map_err(|e| format!("{}: {e}", logs.display()))?;
    let path = logs.join(format!("{}.log", step.name.replace(' ', "-")));
    let log = File::create(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    for line in &step.commands {
        let copy = || log.try_clone().map_err(|e| format!("{}: {e}", path.display()));
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]).current_dir(&root).envs(step.env.iter().cloned());
        command.stdin(Stdio::null()).stdout(copy()?).stderr(copy()?);
        let mut child = command.spawn().map_err(|e| format!("{}: {e}", line[0]))?;
        let deadline = Instant::now() + step.limit;
        let status = loop {
            match child.try_wait().map_err(|e| e.to_string())? {
                Some(status) => break status,
                None if Instant::now() >= deadline => {
                    // One that has just ended cannot be killed, and need not be.
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(format!(
                        "{} took longer than {:?}; log: {}",
                        line.join(" "),
                        step.limit,
                        show(&path)
                    ));
                }
                None => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        if !status.success() {
            print_end(&path);
            return Err(format!("{}: {status}; log: {}", line.join(" "), show(&path)));
        }
    }
    fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))
}

fn show(path: &Path) -> String {
    path.strip_prefix(repository()).unwrap_or(path).display().to_string()
}

fn print_end(path: &Path) {
    let text = String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    for line in &lines[lines.len().saturating_sub(60)..] {
        println!("    | {line}");
    }
}

/// Adds up what test runners say: cargo test, nextest, pytest and our own tasks.
fn count(output: &str) -> Count {
    let mut count = Count::default();
    for line in output.lines() {
        let line = line.trim();
        let own = line.starts_with("passed=");
        let summary = line.starts_with("Summary [") || line.starts_with("test result:");
        let pytest = line.starts_with('=') && line.ends_with('=') && line.contains(" in ");
        // Behind a minute it adds the time in brackets.
        let bare_pytest = line.ends_with(['s', ')']) && line.contains(" passed") && line.contains(" in ");
        if own {
            for word in line.split_whitespace() {
                let number = |name: &str| word.strip_prefix(name).and_then(|n| n.parse::<u64>().ok());
                count.passed += number("passed=").unwrap_or(0);
                count.skipped += number("skipped=").unwrap_or(0);
            }
        } else if summary || pytest || bare_pytest {
            count.passed += before(line, "passed");
            count.skipped += before(line, "skipped") + before(line, "ignored");
        }
    }
    count
}

/// The number that stands before a word.
fn before(line: &str, word: &str) -> u64 {
    let words: Vec<&str> =
        line.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    words.windows(2).filter(|pair| pair[1] == word).find_map(|pair| pair[0].parse().ok()).unwrap_or(0)
}

/// The lines in which our own tasks say what they found.
fn remark(output: &str) -> String {
    const TASKS: [&str; 16] = [
        "matrix: ",
        "strict: ",
        "order: ",
        "chaos: ",
        "intrude: ",
        "flood: ",
        "sim: ",
        "slurm: ",
        "agreement: ",
        "figures: ",
        "huge: ",
        "fuzz: ",
        "churn: ",
        "scarce: ",
        "decoders: ",
        "mutants: ",
    ];
    let told = output.lines().filter(|line| TASKS.iter().any(|task| line.starts_with(task)));
    told.collect::<Vec<_>>().join("; ")
}

fn describe(row: &Row) -> String {
    match &row.ending {
        Ending::Passed(count) if count.skipped > 0 => {
            format!("{} passed, {} skipped, {:.0} s", count.passed, count.skipped, row.seconds)
        }
        Ending::Passed(count) => format!("{} passed, {:.0} s", count.passed, row.seconds),
        Ending::Skipped(reason) => format!("skipped, {reason}"),
        Ending::Failed(words) => format!("FAILED: {words}"),
    }
}

fn print_table(rows: &[Row], took: Duration) {
    println!("\n{:<34} {:>9} {:>9} {:>8}", "kind", "passed", "skipped", "seconds");
    let mut total = Count::default();
    let mut failed = 0;
    for row in rows {
        let (passed, skipped, note) = match &row.ending {
            Ending::Passed(count) => (count.passed, count.skipped, String::new()),
            Ending::Skipped(reason) => (0, 1, format!("  skipped, {reason}")),
            Ending::Failed(words) => {
                failed += 1;
                (0, 0, format!("  FAILED: {words}"))
            }
        };
        total.passed += passed;
        total.skipped += skipped;
        println!("{:<34} {passed:>9} {skipped:>9} {:>8.0}{note}", row.name, row.seconds);
    }
    println!("{:<34} {:>9} {:>9} {:>8.0}", "all", total.passed, total.skipped, took.as_secs_f64());
    for row in rows.iter().filter(|row| !row.remark.is_empty()) {
        println!("{}", row.remark);
    }
    println!("{}", if failed == 0 { "ok".to_owned() } else { format!("{failed} kinds FAILED") });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_runner_is_understood() {
        let output = "\
     Summary [   1.234s] 12 tests run: 11 passed (1 slow), 1 skipped
test result: ok. 3 passed; 0 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.1s
======== 7 passed, 4 skipped in 1.23s ========
5 passed in 0.11s
161 passed, 16 skipped in 86.15s (0:01:26)
passed=100 skipped=20
error: 4 passed this by
";
        let count = count(output);
        assert_eq!((count.passed, count.skipped), (11 + 3 + 7 + 5 + 161 + 100, 1 + 2 + 4 + 16 + 20));
    }
}
