//! Mutation testing of the protocol core: small changes of meaning in the coordinator, the membership and the wire
//! format, a random sample from a seed, each in a copy of the tree. The unit tests of the library or else the
//! simulator must fail. A mutant that does not compile is none and another is drawn; one that hangs is caught.
//!
//! The changes are made in the text: comparisons and arithmetic turned, conditions negated, statements left out. Tests,
//! comments and assertions are left alone (an assertion that is gone changes nothing that may happen).
#![forbid(unsafe_code)]

use crate::install_c::repository;
use crate::random::Random;
use crate::{Count, Verdict};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process_group};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    /// Mutants that compile.
    #[arg(long, default_value_t = 150)]
    sample: u64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seeds of the simulator for those that the unit tests miss.
    #[arg(long, default_value_t = 300)]
    seeds: u64,
    /// Of a hundred, how many must be caught.
    #[arg(long, default_value_t = 90)]
    percent: u64,
    /// Prints the mutants instead of trying them.
    #[arg(long)]
    list: bool,
}

const FOLDERS: [&str; 3] = ["src/coordinator", "src/membership", "src/wire"];
/// Whoever tests that long hangs.
const LIMIT: Duration = Duration::from_secs(240);

/// What is put in the place of what; the first that a place allows is not preferred.
const TURNS: [(&str, &str); 16] = [
    (" < ", " <= "),
    (" <= ", " < "),
    (" > ", " >= "),
    (" >= ", " > "),
    (" == ", " != "),
    (" != ", " == "),
    (" && ", " || "),
    (" || ", " && "),
    (" + ", " - "),
    (" - ", " + "),
    (" += ", " -= "),
    ("true", "false"),
    ("false", "true"),
    ("if !", "if "),
    (".min(", ".max("),
    (".max(", ".min("),
];

struct Mutant {
    file: PathBuf,
    line: usize,
    was: String,
    text: String,
}

impl Mutant {
    fn describe(&self) -> String {
        let place = format!("{}:{}", self.file.display(), self.line + 1);
        match self.text.as_str() {
            "" => format!("{place}: without {}", self.was.trim()),
            text => format!("{place}: {} -> {}", self.was.trim(), text.trim()),
        }
    }
}

enum Fate {
    Caught(&'static str),
    Missed,
    None,
}

pub fn run(settings: &Settings) -> Verdict {
    let mut all = Vec::new();
    for file in sources()? {
        all.extend(mutants_of(&file)?);
    }
    println!("mutants: {} changes are possible in {}", all.len(), FOLDERS.join(", "));
    let mut random = Random::new(&[settings.seed, 0x3017]);
    let (mut tried, mut caught, mut missed) = (0, 0, Vec::new());
    // Always at the same place, so that what was built of it is found again.
    let tree = repository().join("target/mutants/tree");
    if !settings.list {
        copy_tree(&tree)?;
    }
    while tried < settings.sample && !all.is_empty() {
        let mutant = all.swap_remove(random.below(all.len() as u64) as usize);
        let what = mutant.describe();
        if settings.list {
            println!("{what}");
            tried += 1;
            continue;
        }
        match fate(&mutant, &tree, settings)? {
            Fate::None => continue,
            Fate::Caught(by) => {
                println!("caught by {by}: {what}");
                caught += 1;
            }
            Fate::Missed => {
                println!("MISSED: {what}");
                missed.push(what);
            }
        }
        tried += 1;
    }
    if settings.list {
        return Ok(Count { passed: tried, skipped: 0 });
    }
    println!("mutants: {caught} of {tried} caught (seed {}); missed: {}", settings.seed, missed.len());
    match 100 * caught >= settings.percent * tried {
        true => Ok(Count { passed: caught, skipped: 0 }),
        false => Err(format!("only {caught} of {tried} mutants are caught")),
    }
}

/// The files of the protocol core, tests left out, relative to the repository.
fn sources() -> Result<Vec<PathBuf>, String> {
    let mut files = Vec::new();
    for folder in FOLDERS {
        let entries = std::fs::read_dir(repository().join(folder)).map_err(|e| format!("{folder}: {e}"))?;
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            // The cluster is a harness of tests.
            if name.ends_with(".rs") && !name.starts_with("tests") && name != "cluster.rs" {
                files.push(Path::new(folder).join(name));
            }
        }
    }
    files.sort();
    Ok(files)
}

fn mutants_of(file: &Path) -> Result<Vec<Mutant>, String> {
    let text =
        std::fs::read_to_string(repository().join(file)).map_err(|e| format!("{}: {e}", file.display()))?;
    let mut found = Vec::new();
    for (line, words) in text.lines().enumerate() {
        if words.trim() == "#[cfg(test)]" && text.lines().nth(line + 1).is_some_and(|l| l.contains("mod ")) {
            // Tests of the module itself stand at its end; a declaration is followed by more.
            if text.lines().nth(line + 1).is_some_and(|l| l.ends_with('{')) {
                break;
            }
        }
        let code = words.trim_start();
        let plain = ["//", "#", "assert", "debug_assert", "use ", "const ", "pub const ", "f.write_str"];
        if plain.iter().any(|start| code.starts_with(start)) || code.contains('"') {
            continue;
        }
        for (from, to) in TURNS {
            for (at, _) in words.match_indices(from) {
                // Arrows of matches and functions, generics, and words that only contain the other.
                let text = format!("{}{to}{}", &words[..at], &words[at + from.len()..]);
                let whole = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric() && c != '_');
                let word = !from.starts_with(char::is_alphabetic)
                    || from.starts_with("if ")
                    || (whole(words[..at].chars().last()) && whole(words[at + from.len()..].chars().next()));
                if word {
                    found.push(Mutant { file: file.to_owned(), line, was: words.to_owned(), text });
                }
            }
        }
        // A statement that does something is left out.
        let calls = code.ends_with(");") && !code.starts_with("let ") && !code.starts_with("return");
        if calls && code.contains('(') && !code.starts_with(')') && balanced(code) {
            found.push(Mutant { file: file.to_owned(), line, was: words.to_owned(), text: String::new() });
        }
    }
    Ok(found)
}

fn balanced(code: &str) -> bool {
    let count = |c: char| code.matches(c).count();
    count('(') == count(')') && count('{') == count('}')
}

/// What cargo needs, and nothing that was there before.
fn copy_tree(to: &Path) -> Result<(), String> {
    let copied = Command::new("sh")
        .arg("-c")
        .arg("rm -rf \"$0\" && mkdir -p \"$0\" && git ls-files -z | xargs -0 tar cf - | tar xf - -C \"$0\"")
        .arg(to)
        .current_dir(repository())
        .status();
    match copied {
        Ok(status) if status.success() => Ok(()),
        other => Err(format!("the tree cannot be copied: {other:?}")),
    }
}

fn fate(mutant: &Mutant, tree: &Path, settings: &Settings) -> Result<Fate, String> {
    let path = tree.join(&mutant.file);
    let whole = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut lines: Vec<&str> = whole.lines().collect();
    lines[mutant.line] = &mutant.text;
    let write = |text: &str| std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()));
    write(&(lines.join("\n") + "\n"))?;
    let fate = examine(tree, settings);
    write(&whole)?;
    fate
}

fn examine(tree: &Path, settings: &Settings) -> Result<Fate, String> {
    let seeds = settings.seeds.to_string();
    let names = ["coordinator", "membership", "wire", "engine"];
    // Beside the other tests, whose dependencies are built; nothing that has a name there is made.
    let target = repository().join("target");
    if !cargo(tree, &target, &["test", "--quiet", "-p", "carole", "--lib", "--no-run"])? {
        return Ok(Fate::None);
    }
    let unit = [&["test", "--quiet", "-p", "carole", "--lib", "--"], names.as_slice()].concat();
    if !cargo(tree, &target, &unit)? {
        return Ok(Fate::Caught("unit tests"));
    }
    let own = target.join("mutants");
    if !cargo(tree, &own, &["run", "--quiet", "--release", "-p", "ci", "--", "sim", "--seeds", &seeds])? {
        return Ok(Fate::Caught("the simulator"));
    }
    Ok(Fate::Missed)
}

/// Whether it succeeded in time. What it prints is of no interest.
fn cargo(tree: &Path, target: &Path, args: &[&str]) -> Result<bool, String> {
    // A change may let memory grow without end. The group is one, so that what hangs is ended with its children.
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -v 12582912; exec cargo \"$@\"", "cargo"]).args(args).process_group(0);
    command.current_dir(tree).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.env("CARGO_TARGET_DIR", target);
    command.env("CARGO_PROFILE_RELEASE_LTO", "off").env("CARGO_PROFILE_RELEASE_INCREMENTAL", "true");
    command.env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
    let mut child = command.spawn().map_err(|e| format!("cargo: {e}"))?;
    let deadline = Instant::now() + LIMIT;
    loop {
        match child.try_wait().map_err(|e| e.to_string())? {
            Some(status) => return Ok(status.success()),
            None if Instant::now() >= deadline => {
                // One that has just ended cannot be killed, and need not be.
                let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
                let _ = child.wait();
                return Ok(false);
            }
            None => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_found_and_the_tests_are_not_changed() {
        let mut count = 0;
        for file in sources().unwrap() {
            let text = std::fs::read_to_string(repository().join(&file)).unwrap();
            let tests = text.lines().position(|line| line == "mod tests {").unwrap_or(usize::MAX);
            for mutant in mutants_of(&file).unwrap() {
                assert!(mutant.line < tests && text.lines().nth(mutant.line) != Some(&mutant.text));
                count += 1;
            }
        }
        assert!(count > 300, "{count}");
    }
}
