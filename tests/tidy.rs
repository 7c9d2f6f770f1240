//! The rules of the house that a compiler does not check. Each test names every breach that it finds.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where code may be unsafe. Everything else forbids it.
const UNSAFE_ALLOWED: [&str; 19] = [
    "src/fork.rs",
    "src/memory.rs",
    "src/device/accelerator.rs",
    "src/device/cuda/",
    "src/device/host/",
    "src/transport/",
    "src/rendezvous/",
    "src/runtime.rs",
    "src/runtime/",
    "src/engine/",
    "src/launch/",
    "src/perf/calls.rs",
    "bindings/c/",
    "bindings/python/",
    "benches/",
    "ci/fuzz/",
    "ci/src/call.rs",
    "ci/src/sim/",
    "tests/",
];

/// What may stand at the top of the repository.
const TOP: [&str; 17] = [
    ".ci",
    ".config",
    ".gitignore",
    "CHANGELOG.md",
    "SECURITY.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "README.md",
    "benches",
    "bindings",
    "ci",
    "kernels",
    "rustfmt.toml",
    "src",
];

const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 90;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A file of the repository.
struct Source {
    path: String,
    text: String,
}

impl Source {
    fn is_test(&self) -> bool {
        let name = self.path.rsplit('/').next().unwrap_or_default();
        self.path.starts_with("tests/") || self.path.contains("/tests/") || name.contains("test")
    }

    /// Its lines with their numbers, up to the tests at its end; none for a file of tests.
    fn code(&self) -> Vec<(usize, &str)> {
        if self.is_test() {
            return Vec::new();
        }
        let lines: Vec<&str> = self.text.lines().collect();
        let tests =
            lines.windows(2).position(|pair| pair[0] == "#[cfg(test)]" && pair[1].starts_with("mod "));
        let end = tests.filter(|&at| lines[at + 1].ends_with('{')).unwrap_or(lines.len());
        lines[..end].iter().enumerate().map(|(i, line)| (i + 1, *line)).collect()
    }

    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }
}

/// Everything that git tracks or would track; without git (a source archive) everything but build outputs.
fn paths() -> Vec<String> {
    let listed =
        Command::new("git").args(["ls-files", "-co", "--exclude-standard"]).current_dir(root()).output();
    match listed {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
        }
        _ => {
            let mut found = Vec::new();
            walk(root(), &mut found);
            found
        }
    }
}

fn walk(folder: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if ["target", ".git", "__pycache__", ".venv", "dist"].iter().any(|skipped| name == *skipped) {
            continue;
        }
        if path.is_dir() {
            walk(&path, found);
        } else if let Ok(path) = path.strip_prefix(root()) {
            found.push(path.to_string_lossy().into_owned());
        }
    }
}

fn sources(extensions: &[&str]) -> Vec<Source> {
    let wanted = |path: &String| extensions.iter().any(|extension| path.ends_with(extension));
    let read = |path: String| {
        let text = fs::read_to_string(root().join(&path)).ok()?;
        Some(Source { path, text })
    };
    let found: Vec<Source> = paths().into_iter().filter(wanted).filter_map(read).collect();
    assert!(!found.is_empty(), "nothing with {extensions:?} was found, so nothing would be checked");
    found
}

fn no_breach(rule: &str, breaches: Vec<String>) {
    assert!(breaches.is_empty(), "{rule}:\n  {}", breaches.join("\n  "));
}

/// The modules of the library, lowest floor first: the order in which src/lib.rs lists them.
fn floors() -> Vec<String> {
    let text = fs::read_to_string(root().join("src/lib.rs")).expect("src/lib.rs is there");
    let name = |line: &str| Some(line.strip_prefix("pub mod ")?.strip_suffix(';')?.to_owned());
    let floors: Vec<String> = text.lines().filter_map(name).collect();
    assert!(floors.len() > 10, "src/lib.rs lists its modules as `pub mod name;`");
    floors
}

/// The modules that a line names after `crate::`.
fn named_modules(line: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, _) in line.match_indices("crate::") {
        let before = line[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = &line[at + "crate::".len()..];
        let word =
            |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
        match rest.strip_prefix('{') {
            Some(list) => {
                let list = list.split('}').next().unwrap_or(list);
                names.extend(list.split(',').map(|item| word(item.trim())));
            }
            None => names.push(word(rest)),
        }
    }
    names
}

#[test]
fn a_module_uses_only_modules_on_lower_floors() {
    let floors = floors();
    let floor = |name: &str| floors.iter().position(|known| known == name);
    let mut breaches = Vec::new();
    for source in sources(&[".rs"]).iter().filter(|source| source.path.starts_with("src/")) {
        let module = source.path["src/".len()..].split(['/', '.']).next().unwrap_or_default().to_owned();
        let Some(own) = floor(&module) else { continue };
        let mut exempt = false;
        for (number, line) in source.code() {
            let code = line.split("//").next().unwrap_or_default();
            for used in named_modules(code) {
                if !exempt && floor(&used).is_some_and(|used| used > own) {
                    breaches
                        .push(format!("{}:{number}: {module} uses {used}, which is above it", source.path));
                }
            }
            exempt = line.trim() == "#[cfg(test)]";
        }
    }
    no_breach("a module uses only modules that stand before it in src/lib.rs", breaches);
}

fn is_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices("unsafe").any(|(at, word)| {
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        let quoted = code[..at].matches('"').count() % 2 == 1;
        !quoted && !before.is_some_and(is_word) && !after.is_some_and(|c| is_word(c) || c == '(')
    })
}

/// The files whose lint levels a file inherits, itself first.
fn ancestors(path: &str) -> Vec<String> {
    let mut found = vec![path.to_owned()];
    let mut folder = PathBuf::from(path);
    while folder.pop() && !folder.as_os_str().is_empty() {
        let folder = folder.to_string_lossy().into_owned();
        found.push(format!("{folder}/mod.rs"));
        found.push(format!("{folder}.rs"));
    }
    found
}

#[test]
fn code_forbids_unsafe_where_it_needs_none() {
    let all: Vec<Source> =
        sources(&[".rs"]).into_iter().filter(|s| !s.path.starts_with("bindings/")).collect();
    let forbids = |path: &str| {
        all.iter().any(|s| s.path == path && s.text.lines().any(|line| line == "#![forbid(unsafe_code)]"))
    };
    let has_unsafe = |s: &Source| s.text.lines().any(is_unsafe);
    let mut breaches = Vec::new();
    for source in &all {
        let path = &source.path;
        let is_crate = path.ends_with("lib.rs") || path.ends_with("main.rs") || path.ends_with("build.rs");
        let own_folder = path.trim_end_matches("/mod.rs").trim_end_matches(".rs").to_owned() + "/";
        let below = all.iter().any(|s| s.path != *path && s.path.starts_with(&own_folder) && has_unsafe(s));
        let apart = path.starts_with("ci/fuzz/") || path.starts_with("benches/");
        let exempt = is_crate || below || apart || has_unsafe(source) || source.is_test();
        if !exempt && !ancestors(path).iter().any(|ancestor| forbids(ancestor)) {
            breaches.push(format!("{path}: needs no unsafe code and does not forbid it"));
        }
        if has_unsafe(source) && !UNSAFE_ALLOWED.iter().any(|allowed| path.starts_with(allowed)) {
            breaches.push(format!("{path}: has unsafe code, which belongs elsewhere"));
        }
    }
    no_breach("unsafe code is rare and in known places", breaches);
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    let mut breaches = Vec::new();
    for source in sources(&[".rs"]) {
        let lines: Vec<&str> = source.text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let block = is_unsafe(line) && (line.contains("unsafe {") || line.contains("unsafe impl"));
            if block && !lines[i.saturating_sub(6)..=i].iter().any(|near| near.contains("SAFETY:")) {
                breaches.push(format!("{}:{}", source.path, i + 1));
            }
        }
    }
    no_breach("every unsafe block has a SAFETY comment", breaches);
}

#[test]
fn nothing_is_left_unfinished() {
    // Put together here, so that this file does not hold the words itself.
    let marks = [["TO", "DO"], ["FIX", "ME"], ["XX", "X"], ["HA", "CK"]].map(|halves| halves.concat());
    let macros = [["to", "do!("], ["unimpl", "emented!("]].map(|halves| halves.concat());
    let mut breaches = Vec::new();
    for source in sources(&[".rs", ".py", ".pyi", ".c", ".sh", ".toml", ".md", ".cu", ".cuh"]) {
        for (i, line) in source.text.lines().enumerate() {
            let words = || line.split(|c: char| !c.is_alphanumeric() && c != '_');
            let marked = words().any(|word| marks.iter().any(|mark| mark == word));
            if marked || source.is_rust() && macros.iter().any(|name| line.contains(name.as_str())) {
                breaches.push(format!("{}:{}: {}", source.path, i + 1, line.trim()));
            }
        }
    }
    no_breach("work is done, not marked", breaches);
}

#[test]
fn the_library_does_not_sleep() {
    let mut breaches = Vec::new();
    for source in sources(&[".rs"]).iter().filter(|source| source.path.starts_with("src/")) {
        for (number, line) in source.code() {
            if line.contains(&["thread", "::sleep"].concat()) {
                breaches.push(format!("{}:{number}", source.path));
            }
        }
    }
    no_breach("what waits, waits on something that can wake it", breaches);
}

#[test]
fn files_and_functions_are_short() {
    let mut breaches = Vec::new();
    for source in sources(&[".rs", ".py", ".c", ".cu"]).iter().filter(|source| !source.is_test()) {
        let lines = source.text.lines().count();
        if lines > FILE_LINES_MAX {
            breaches.push(format!("{}: {lines} lines; the most is {FILE_LINES_MAX}", source.path));
        }
        if source.is_rust() {
            breaches.extend(long_functions(source));
        }
    }
    no_breach("a file and a function fit into one head", breaches);
}

fn long_functions(source: &Source) -> Vec<String> {
    let mut open: Option<(usize, usize, &str)> = None;
    let mut long = Vec::new();
    for (number, line) in source.code() {
        let code = line.trim_start();
        let indent = line.len() - code.len();
        let words: Vec<&str> = code.split([' ', '(']).take(6).collect();
        let modifiers = ["pub", "const", "async", "unsafe", "extern", "\"C\"", "fn", "super)", "crate)"];
        let head: Vec<&str> = words.iter().copied().take_while(|word| modifiers.contains(word)).collect();
        if head.last() == Some(&"fn") && !code.ends_with(';') {
            open = Some((number, indent, code));
        } else if let Some((start, outer, name)) = open
            && code == "}"
            && indent == outer
        {
            if number - start + 1 > FUNCTION_LINES_MAX {
                long.push(format!("{}:{start}: {} lines: {name}", source.path, number - start + 1));
            }
            open = None;
        }
    }
    long
}

#[test]
fn the_top_of_the_repository_is_as_designed() {
    let allowed: BTreeSet<&str> = TOP.into_iter().chain(["tests"]).collect();
    let found: BTreeSet<String> =
        paths().iter().map(|path| path.split('/').next().unwrap_or_default().to_owned()).collect();
    let breaches = found.into_iter().filter(|name| !allowed.contains(name.as_str())).collect();
    no_breach("the top level holds only what the design names", breaches);
}

#[test]
fn no_file_names_a_place_on_somebodys_machine() {
    let places = ["root", "home", "work", "Users"].map(|folder| format!("/{folder}/"));
    let mut breaches = Vec::new();
    for source in
        sources(&[".rs", ".py", ".pyi", ".c", ".h", ".toml", ".md", ".sh", ".in", "/test", "/demo", "/run"])
    {
        for (i, line) in source.text.lines().enumerate() {
            let named = places.iter().any(|place| {
                line.match_indices(place.as_str()).any(|(at, _)| {
                    !line[..at].ends_with(|c: char| c.is_alphanumeric() || "._-}$".contains(c))
                })
            });
            if named {
                breaches.push(format!("{}:{}: {}", source.path, i + 1, line.trim()));
            }
        }
    }
    no_breach("paths are relative to the repository, or given by the user", breaches);
}

#[test]
fn the_readme_shows_the_two_commands() {
    let text = fs::read_to_string(root().join("README.md")).expect("README.md is there");
    let first: String = text.lines().take(20).collect::<Vec<_>>().join("\n");
    for command in ["ci/demo", "ci/test"] {
        assert!(first.contains(command), "the first lines of README.md show {command}");
        let mode = fs::metadata(root().join(command)).expect("the command is there").permissions();
        assert!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o111 != 0, "{command} can be run");
    }
}

#[test]
fn the_checks_can_fail() {
    assert_eq!(named_modules("use crate::{error, types::Rank};"), ["error", "types"]);
    assert_eq!(named_modules("let x = crate::memory::Piece;"), ["memory"]);
    assert!(is_unsafe("    unsafe { f() }") && is_unsafe("pub unsafe fn f() {"));
    assert!(!is_unsafe("#![forbid(unsafe_code)]") && !is_unsafe("// unsafe {") && !is_unsafe("\"unsafe {\""));
    let mut text = String::from("fn f() {\n");
    text.push_str(&"    g();\n".repeat(FUNCTION_LINES_MAX));
    text.push_str("}\n");
    assert_eq!(long_functions(&Source { path: "src/x.rs".to_owned(), text }).len(), 1);
}
