//! The memory of the long suite, and the page that it writes.
#![forbid(unsafe_code)]

use super::{Ending, Row, describe};
use crate::Count;
use crate::install_c::repository;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;

/// Steps that passed at this commit, in a file under target. Only the long suite remembers.
pub struct State {
    path: Option<PathBuf>,
    commit: String,
}

impl State {
    pub fn open(long: bool) -> State {
        State { path: long.then(|| repository().join("target/ci/long-state")), commit: commit() }
    }

    /// What an earlier run found, if it passed at this commit with such a share of the counts; the greatest.
    pub fn known(&self, name: &str, least: u64) -> Option<Row> {
        let text = fs::read_to_string(self.path.as_ref()?).ok()?;
        let rows = text.lines().filter_map(|line| {
            let fields: Vec<&str> = line.split('\t').collect();
            let &[commit, found, passed, skipped, seconds, share, remark] = fields.as_slice() else {
                return None;
            };
            if commit != self.commit || found != name {
                return None;
            }
            let count = Count { passed: passed.parse().ok()?, skipped: skipped.parse().ok()? };
            Some(Row {
                name: name.to_owned(),
                ending: Ending::Passed(count),
                seconds: seconds.parse().ok()?,
                share: share.parse().ok()?,
                remark: remark.to_owned(),
            })
        });
        rows.filter(|row| row.share >= least).max_by_key(|row| row.share)
    }

    /// Notes a step that passed. A tree with changes is no commit, so nothing is noted there.
    pub fn remember(&self, row: &Row) {
        let (Some(path), Ending::Passed(count)) = (&self.path, &row.ending) else { return };
        if self.commit.ends_with("changed") {
            return;
        }
        let line = format!(
            "{}\t{}\t{}\t{}\t{:.0}\t{}\t{}\n",
            self.commit, row.name, count.passed, count.skipped, row.seconds, row.share, row.remark
        );
        let opened = fs::OpenOptions::new().create(true).append(true).open(path);
        if let Err(error) = opened.and_then(|mut file| file.write_all(line.as_bytes())) {
            eprintln!("{}: {error}; the next run begins again", path.display());
        }
    }
}

fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).current_dir(repository()).output();
    output.map_or_else(|_| String::new(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn commit() -> String {
    // But for what this program itself has written.
    let args = ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!ci/EVIDENCE.md"];
    let changed = !output("git", &args).is_empty();
    format!("{}{}", output("git", &["rev-parse", "HEAD"]), if changed { " changed" } else { "" })
}

/// Writes `ci/EVIDENCE.md`.
pub fn write(rows: &[Row]) -> std::io::Result<()> {
    let processor = fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| text.lines().find(|l| l.starts_with("model name")).map(str::to_owned))
        .and_then(|line| line.split_once(": ").map(|(_, name)| name.to_owned()))
        .unwrap_or_else(|| "unknown processor".to_owned());
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let mut text = String::from("# Evidence\n\nWritten by `ci/long`; not edited by hand.\n\n");
    let _ = writeln!(text, "- commit: {}", commit());
    let _ = writeln!(text, "- date: {}", output("date", &["-u", "+%Y-%m-%d %H:%M UTC"]));
    let _ = writeln!(text, "- machine: {cores} cores, {processor}");
    let _ = writeln!(text, "- compiler: {}\n", output("rustc", &["--version"]));
    text.push_str("| kind | result |\n| --- | --- |\n");
    for row in rows {
        let share =
            if row.share < 100 { format!(" ({} % of the full counts)", row.share) } else { String::new() };
        let _ = writeln!(text, "| {} | {}{share} |", row.name, describe(row).replace('|', "\\|"));
    }
    text.push('\n');
    for row in rows.iter().filter(|row| !row.remark.is_empty()) {
        let _ = writeln!(text, "- {}", row.remark);
    }
    fs::write(repository().join("ci/EVIDENCE.md"), text)
}
