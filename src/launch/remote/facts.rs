//! What a host says of itself in a preflight.
#![forbid(unsafe_code)]

use super::words::{escape, unescape_text};
use crate::launch::sys;
use std::time::{SystemTime, UNIX_EPOCH};

/// Facts by name, in the order in which they were told.
pub type Facts = Vec<(String, String)>;

/// The facts of this host, as words.
#[must_use]
pub fn encode() -> String {
    let words: Vec<String> =
        gather().iter().map(|(name, value)| format!("{name} {}", escape(value.as_bytes()))).collect();
    words.join(" ")
}

/// Reads the words of another host.
#[must_use]
pub fn decode(words: &str) -> Option<Facts> {
    let words: Vec<&str> = words.split(' ').collect();
    let pairs = words.chunks(2).map(|pair| Some(((*pair.first()?).to_owned(), unescape_text(pair.get(1)?)?)));
    pairs.collect()
}

/// The facts of this host.
#[must_use]
pub fn gather() -> Facts {
    let mut facts = Facts::new();
    let mut add = |name: &str, value: String| facts.push((name.to_owned(), value));
    let (soft, hard) = sys::open_files_limit();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    add("clock_ms", now.as_millis().to_string());
    add("kernel", rustix::system::uname().release().to_string_lossy().into_owned());
    add("processors", std::thread::available_parallelism().map_or(0, usize::from).to_string());
    add("memory_free", memory("MemAvailable:").to_string());
    add("shm_free", shm_free().to_string());
    add("open_files", soft.to_string());
    add("open_files_hard", hard.to_string());
    add("processes", process_limit().to_string());
    add("simd", crate::device::host::available().name().to_owned());
    let mut interfaces: Vec<String> = if_addrs::get_if_addrs()
        .into_iter()
        .flatten()
        .filter(|interface| !interface.is_loopback())
        .map(|interface| {
            let mtu = std::fs::read_to_string(format!("/sys/class/net/{}/mtu", interface.name));
            format!("{}={}/mtu{}", interface.name, interface.ip(), mtu.unwrap_or_default().trim())
        })
        .collect();
    interfaces.sort();
    add("interfaces", interfaces.join(" "));
    facts
}

/// A line of /proc/meminfo, in bytes.
fn memory(line: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text.lines().find_map(|l| l.strip_prefix(line)?.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// Bytes that are free in /dev/shm. Carole takes none there, but frameworks' data loaders do.
fn shm_free() -> u64 {
    rustix::fs::statvfs("/dev/shm").map_or(0, |facts| facts.f_bavail * facts.f_frsize)
}

fn process_limit() -> u64 {
    rustix::process::getrlimit(rustix::process::Resource::Nproc).current.unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_read_as_they_were_told() {
        let facts = decode(&encode()).unwrap();
        let names = |facts: &Facts| facts.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&facts), names(&gather()));
        let value = |name: &str| facts.iter().find(|(n, _)| n == name).unwrap().1.clone();
        assert!(value("clock_ms").parse::<u64>().unwrap() > 1_600_000_000_000);
        assert!(value("memory_free").parse::<u64>().unwrap() > 0);
        assert_eq!(decode("clock_ms"), None);
    }
}
