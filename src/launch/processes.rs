//! Descendants of a process, from /proc, and their end.
#![forbid(unsafe_code)]

use rustix::process::{Pid, Signal, kill_process};
use std::collections::{HashMap, HashSet};

/// What /proc tells of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its parent.
    pub parent: i32,
    /// Its process group.
    pub group: i32,
    /// Whether it has ended and waits to be reaped.
    pub zombie: bool,
}

/// All descendants of `ancestor`, those that have ended included.
pub fn descendants(ancestor: i32) -> Vec<Process> {
    let mut children: HashMap<i32, Vec<Process>> = HashMap::new();
    for process in all() {
        children.entry(process.parent).or_default().push(process);
    }
    let mut found = Vec::new();
    let mut open = vec![ancestor];
    // A process id that is reused while /proc is read could make a circle.
    let mut seen = HashSet::from([ancestor]);
    while let Some(parent) = open.pop() {
        for child in children.get(&parent).into_iter().flatten() {
            if seen.insert(child.pid) {
                found.push(*child);
                open.push(child.pid);
            }
        }
    }
    found
}

fn all() -> impl Iterator<Item = Process> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        parse(pid, &std::fs::read(format!("/proc/{pid}/stat")).ok()?)
    })
}

/// `pid (name) state parent group ...`; the name may hold anything, parentheses and line ends included.
fn parse(pid: i32, stat: &[u8]) -> Option<Process> {
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    let mut fields = std::str::from_utf8(stat.get(end + 1..)?).ok()?.split_ascii_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    let group = fields.next()?.parse().ok()?;
    Some(Process { pid, parent, group, zombie: matches!(state, "Z" | "X") })
}

/// Sends SIGKILL to all living descendants of `ancestor` that are not in `spared`, and says how many there
/// were. Descendants that start while it works are found by the next call.
pub fn kill_descendants(ancestor: i32, spared: &HashSet<i32>) -> usize {
    let living = descendants(ancestor).into_iter().filter(|p| !p.zombie && !spared.contains(&p.pid));
    let mut count = 0;
    for process in living {
        count += 1;
        if let Some(pid) = Pid::from_raw(process.pid) {
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_forge_the_fields() {
        let stat = b"7 (a) S 1 1 (x\n) Z 42 43 44 0";
        assert_eq!(parse(7, stat), Some(Process { pid: 7, parent: 42, group: 43, zombie: true }));
        assert_eq!(parse(7, b"7 (a"), None);
        assert_eq!(parse(7, b"7 (a) S"), None);
    }

    #[test]
    fn a_child_is_found_and_a_spared_one_is_not_killed() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let me = std::process::id() as i32;
        let pid = child.id() as i32;
        assert!(descendants(me).iter().any(|p| p.pid == pid));
        let others: HashSet<i32> = descendants(me).iter().map(|p| p.pid).collect();
        kill_descendants(me, &others);
        assert!(child.try_wait().unwrap().is_none());
        let mut others = others;
        others.remove(&pid);
        kill_descendants(me, &others);
        assert!(!child.wait().unwrap().success());
    }
}
