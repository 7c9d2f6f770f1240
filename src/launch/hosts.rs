//! Hosts and slots.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use std::path::Path;

/// Checks that `processes` ranks fit on the hosts given (`-H`), all of which must be this one.
///
/// # Errors
/// A host that is not this one, a list that cannot be read, too few slots.
pub fn check_hosts(list: &str, processes: u32, this_host: &str) -> Result<()> {
    let mut slots = 0;
    for item in list.split(',') {
        let (host, count) = split_slots(item.trim())?;
        check_local(host, this_host)?;
        slots += count;
    }
    check_slots(slots, processes, "-H")
}

/// The same for a file with lines `HOST slots=N`.
///
/// # Errors
/// As for [`check_hosts`], and a file that cannot be read.
pub fn check_hostfile(path: &Path, processes: u32, this_host: &str) -> Result<()> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| Error::usage(format!("the hostfile '{}' cannot be read: {e}", path.display())))?;
    let mut slots = 0;
    for (index, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let bad =
            || Error::usage(format!("{}:{}: '{line}' is not 'HOST slots=N'", path.display(), index + 1));
        let mut words = line.split_whitespace();
        let host = words.next().ok_or_else(bad)?;
        let count = match words.next() {
            None => 1,
            Some(word) => word.strip_prefix("slots=").and_then(|n| n.parse::<u64>().ok()).ok_or_else(bad)?,
        };
        check_local(host, this_host)?;
        slots += count;
    }
    check_slots(slots, processes, &format!("the hostfile '{}'", path.display()))
}

fn split_slots(item: &str) -> Result<(&str, u64)> {
    // An IPv6 address stands in brackets, or has no slots.
    let colon = item
        .rfind(':')
        .filter(|at| item.ends_with(|c: char| c.is_ascii_digit()) && !item[..*at].ends_with(':'));
    let Some(at) = colon else { return Ok((item, 1)) };
    let count = item[at + 1..].parse::<u32>().ok().filter(|count| *count > 0);
    let count = count.ok_or_else(|| {
        Error::usage(format!("'{item}' in -H is not HOST:SLOTS; write, for instance, localhost:4"))
    })?;
    Ok((&item[..at], count.into()))
}

fn check_local(host: &str, this_host: &str) -> Result<()> {
    let short = |name: &str| name.split('.').next().unwrap_or_default().to_ascii_lowercase();
    let local = matches!(host, "localhost" | "127.0.0.1" | "::1" | "[::1]")
        || (!host.is_empty() && short(host) == short(this_host) && host.parse::<std::net::IpAddr>().is_err());
    if local {
        return Ok(());
    }
    Err(Error::usage(format!(
        "ranks cannot be started on '{host}': this version of carolerun starts processes on this host only \
         (localhost, 127.0.0.1 or {this_host}); starting over ssh is not there yet. Use -H localhost:N, or start \
         one process per rank by other means with CAROLE_RANK, CAROLE_SIZE and CAROLE_RENDEZVOUS set"
    )))
}

fn check_slots(slots: u64, processes: u32, source: &str) -> Result<()> {
    if u64::from(processes) <= slots {
        return Ok(());
    }
    Err(Error::usage(format!(
        "-np {processes} asks for more processes than {source} has slots ({slots}); give more slots or fewer \
         processes"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &str, processes: u32) -> String {
        check_hosts(list, processes, "node7.example.org").expect_err(list).to_string()
    }

    #[test]
    fn this_host_has_several_names() {
        for list in [
            "localhost:4",
            "127.0.0.1:4",
            "localhost:1,127.0.0.1:3",
            "node7:4",
            "NODE7.example.org:4",
            "[::1]:4",
        ] {
            check_hosts(list, 4, "node7.example.org").unwrap_or_else(|e| panic!("{list}: {e}"));
        }
        check_hosts("localhost", 1, "x").unwrap();
        check_hosts("::1", 1, "x").unwrap();
    }

    #[test]
    fn what_does_not_fit_is_refused_with_words() {
        assert!(words("localhost:2", 3).contains("slots (2)"));
        assert!(words("other:4", 4).contains("'other'") && words("other:4", 4).contains("ssh"));
        assert!(words("10.0.0.1:4", 4).contains("10.0.0.1"));
        assert!(words("localhost:0", 1).contains("HOST:SLOTS"));
        assert!(words("localhost:99999999999", 1).contains("HOST:SLOTS"));
        assert!(words("", 1).contains("''"));
    }

    #[test]
    fn a_hostfile_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        std::fs::write(&path, "# mine\nlocalhost slots=2\n\n127.0.0.1\n").unwrap();
        check_hostfile(&path, 3, "x").unwrap();
        assert!(check_hostfile(&path, 4, "x").is_err());
        std::fs::write(&path, "localhost slots=many\n").unwrap();
        assert!(check_hostfile(&path, 1, "x").unwrap_err().to_string().contains("hosts:1"));
    }
}
