//! Which hosts there are, again and again: by a script of the user's, or from a list that does not change.
#![forbid(unsafe_code)]

use super::super::hosts::is_this_host;
use super::super::processes::kill_descendants;
use crate::transport::wake::Waker;
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Hosts and their slots, in the order in which they were seen first, so that old hosts are preferred.
pub type Slots = Vec<(String, u32)>;

/// Between two looks.
const PAUSE: Duration = Duration::from_secs(1);
/// A script that takes longer is killed.
const SCRIPT: Duration = Duration::from_secs(30);
/// What a script may write.
const OUTPUT_BYTES_MAX: u64 = 1 << 20;

/// Hosts, and which of their names mean this one.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Hosts {
    /// The hosts and their slots.
    pub slots: Slots,
    /// Names of this host.
    pub here: BTreeSet<String>,
}

/// What came of a look.
pub type Found = Result<Hosts, String>;

impl Hosts {
    /// Looks at the names of hosts that are not known yet, which may take seconds where a name server does not answer.
    pub fn new(slots: Slots, known: &mut BTreeMap<String, bool>) -> Hosts {
        known.retain(|name, _| slots.iter().any(|(host, _)| host == name));
        for (host, _) in &slots {
            known.entry(host.clone()).or_insert_with(|| is_this_host(host));
        }
        let here = known.iter().filter(|(_, here)| **here).map(|(name, _)| name.clone()).collect();
        Hosts { slots, here }
    }
}

/// Looks again and again, in a thread of its own.
pub struct Discovery {
    found: Receiver<Found>,
    /// Dropped in order to stop.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Discovery {
    /// Runs `script` at once and then each second. `bell` is rung when there is something new.
    pub fn start(script: PathBuf, default_slots: u32, bell: Waker) -> std::io::Result<Discovery> {
        let (tell, found) = bounded(1);
        let (stop, stopped) = bounded(1);
        let thread = std::thread::Builder::new().name("carole-discovery".into()).spawn(move || {
            let mut last: Option<Found> = None;
            let (mut order, mut known) = (Vec::new(), BTreeMap::new());
            loop {
                let new = look(&script, default_slots, &stopped);
                let new = new.map(|slots| Hosts::new(by_age(slots, &mut order), &mut known));
                if last.as_ref() != Some(&new) {
                    last = Some(new.clone());
                    // The launcher takes one at a time; it is told of the next change when it has taken this.
                    if tell.send(new).is_err() {
                        return;
                    }
                    bell.wake();
                }
                if stopped.recv_timeout(PAUSE) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        })?;
        Ok(Discovery { found, stop: Some(stop), thread: Some(thread) })
    }

    /// What is new.
    pub fn poll(&self) -> Option<Found> {
        self.found.try_recv().ok()
    }
}

impl Drop for Discovery {
    fn drop(&mut self) {
        self.stop = None;
        // It may wait to be rid of what it has found.
        let _ = self.found.try_recv();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Hosts that were there before go before those that are new.
fn by_age(slots: Slots, order: &mut Vec<String>) -> Slots {
    order.retain(|host| slots.iter().any(|(h, _)| h == host));
    for (host, _) in &slots {
        if !order.contains(host) {
            order.push(host.clone());
        }
    }
    let count = |host: &String| slots.iter().find(|(h, _)| h == host).map_or(0, |(_, slots)| *slots);
    order.iter().map(|host| (host.clone(), count(host))).collect()
}

fn look(script: &Path, default_slots: u32, stopped: &Receiver<()>) -> Result<Slots, String> {
    let failed = |why: String| format!("the host discovery '{}' {why}", script.display());
    let mut child = Command::new(script)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(|e| failed(format!("cannot be run: {e}; it must be executable")))?;
    let pipe = child.stdout.take().expect("it is piped");
    // Read beside, so that neither a full pipe nor a script that ends late holds up the other.
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        pipe.take(OUTPUT_BYTES_MAX).read_to_string(&mut text).map(|_| text)
    });
    let status = wait(&mut child, stopped);
    let text = reader.join().unwrap_or_else(|_| Ok(String::new()));
    match (status, text) {
        (None, _) => Err(failed(format!("did not end within {} s", SCRIPT.as_secs()))),
        (Some(status), _) if !status.success() => Err(failed(format!("failed ({status})"))),
        (_, Err(e)) => Err(failed(format!("wrote what is not text: {e}"))),
        (_, Ok(text)) => parse(&text, default_slots).map_err(failed),
    }
}

/// Waits for a bounded time, and then kills it and what it has started.
fn wait(child: &mut Child, stopped: &Receiver<()>) -> Option<std::process::ExitStatus> {
    let deadline = Instant::now() + SCRIPT;
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        // A script takes milliseconds; its end cannot be waited for together with the word to stop.
        let stop = stopped.recv_timeout(Duration::from_millis(10));
        if stop != Err(RecvTimeoutError::Timeout) || Instant::now() >= deadline {
            kill_descendants(child.id() as i32, &HashSet::new());
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
    }
}

/// Lines `HOST` or `HOST:SLOTS`.
pub fn parse(text: &str, default_slots: u32) -> Result<Slots, String> {
    let mut slots = Slots::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (host, count) = match line.rsplit_once(':') {
            // An IPv6 address without slots.
            Some((head, _)) if head.contains(':') && !head.ends_with(']') => (line, default_slots),
            Some((host, count)) => {
                let count = count.parse().map_err(|_| format!("wrote '{line}', which is not HOST:SLOTS"))?;
                (host, count)
            }
            None => (line, default_slots),
        };
        // As in -H: ssh knows no brackets, and a name that begins with a dash would be an option of it.
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        if host.is_empty() || host.starts_with('-') || host.contains(char::is_whitespace) {
            return Err(format!("wrote '{line}', which is not HOST:SLOTS"));
        }
        match slots.iter_mut().find(|(known, _)| known == host) {
            Some((_, known)) => *known += count,
            None => slots.push((host.to_owned(), count)),
        }
    }
    Ok(slots.into_iter().filter(|(_, count)| *count > 0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn script(folder: &Path, text: &str) -> PathBuf {
        let path = folder.join("discover");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn hosts_are_read() {
        let read = |text| parse(text, 2).unwrap();
        let slots = |list: &[(&str, u32)]| list.iter().map(|(h, n)| ((*h).to_owned(), *n)).collect::<Slots>();
        assert_eq!(read("a:4\n b \n\nc:0\na:1\n"), slots(&[("a", 5), ("b", 2)]));
        assert_eq!(read("[::1]:3\nfd00::1"), slots(&[("::1", 3), ("fd00::1", 2)]));
        for wrong in ["a:x", "a b", ":3", "a:-1", "-oProxyCommand=x:1", "[]:1"] {
            assert!(parse(wrong, 1).is_err(), "{wrong}");
        }
    }

    #[test]
    fn old_hosts_go_before_new_ones() {
        let mut order = Vec::new();
        let mut seen = |text| by_age(parse(text, 1).unwrap(), &mut order);
        seen("b\nc");
        assert_eq!(seen("a\nc:2\nb"), parse("b\nc:2\na", 1).unwrap());
        assert_eq!(seen("a\nb"), parse("b\na", 1).unwrap());
    }

    #[test]
    fn what_changes_is_told_once() {
        let folder = tempfile::tempdir().unwrap();
        let list = folder.path().join("hosts");
        std::fs::write(&list, "localhost:1\n").unwrap();
        let bell = Waker::new().unwrap();
        let script = script(folder.path(), &format!("cat {}", list.display()));
        let discovery = Discovery::start(script, 1, bell).unwrap();
        let next = || discovery.found.recv_timeout(Duration::from_secs(60)).unwrap();
        let here = |count| Hosts {
            slots: vec![("localhost".to_owned(), count)],
            here: ["localhost".to_owned()].into(),
        };
        assert_eq!(next(), Ok(here(1)));
        std::fs::write(&list, "localhost:2\n").unwrap();
        assert_eq!(next(), Ok(here(2)));
        std::fs::remove_file(&list).unwrap();
        assert!(next().unwrap_err().contains("failed"));
    }

    #[test]
    fn a_script_that_cannot_run_is_an_error_and_one_that_hangs_is_killed_in_the_end() {
        let (_never, stopped) = bounded(1);
        let missing = look(Path::new("/nonexistent/discover"), 1, &stopped).unwrap_err();
        assert!(missing.contains("/nonexistent/discover") && missing.contains("cannot be run"), "{missing}");
        let folder = tempfile::tempdir().unwrap();
        let bell = Waker::new().unwrap();
        let hangs = Discovery::start(script(folder.path(), "sleep 600"), 1, bell).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let start = Instant::now();
        drop(hangs);
        assert!(start.elapsed() < SCRIPT, "it is not waited for");
    }
}
