//! Hosts, their slots, and which ranks run where.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use std::net::{IpAddr, ToSocketAddrs};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Variables by which job systems name the hostfile that they have made (Kubeflow's MPIJob: the first two).
const HOSTFILES: [&str; 4] = [
    "OMPI_MCA_orte_default_hostfile",
    "PRTE_MCA_prte_default_hostfile",
    "I_MPI_HYDRA_HOST_FILE",
    "HYDRA_HOST_FILE",
];

/// A host, and how many ranks may run there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Host {
    /// As the user wrote it; ssh understands it.
    pub name: String,
    /// Places for ranks.
    pub slots: u32,
}

/// The ranks of one host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Placement {
    /// The host.
    pub host: String,
    /// Whether it is the one on which the launcher runs.
    pub local: bool,
    /// Its ranks.
    pub ranks: Range<u32>,
}

/// Where hosts may be named.
#[derive(Clone, Debug, Default)]
pub struct Source {
    /// `-H`.
    pub list: Option<String>,
    /// `--hostfile`.
    pub file: Option<PathBuf>,
}

impl Source {
    /// What the flags say; without any, the hostfile that a job system has made, if it has made one.
    #[must_use]
    pub fn or_found(mut self, variable: impl Fn(&str) -> Option<String>) -> Source {
        if self.list.is_none() && self.file.is_none() {
            self.file = HOSTFILES.iter().find_map(|name| variable(name)).map(PathBuf::from);
        }
        self
    }

    /// The hosts; none when none are named.
    ///
    /// # Errors
    /// What cannot be read, and a host that stands there twice.
    pub fn read(&self) -> Result<Vec<Host>> {
        let (hosts, place) = match (&self.list, &self.file) {
            (Some(list), _) => (read_list(list)?, "-H".to_owned()),
            (None, Some(path)) => (read_file(path)?, format!("the hostfile '{}'", path.display())),
            (None, None) => return Ok(Vec::new()),
        };
        if hosts.is_empty() {
            return Err(Error::usage(format!("{place} names no host")));
        }
        for (i, host) in hosts.iter().enumerate() {
            if let Some(earlier) = hosts[..i].iter().find(|earlier| earlier.name == host.name) {
                return Err(Error::usage(format!(
                    "host '{0}' stands twice in {place}; name it once, as in {0}:{1}",
                    host.name,
                    u64::from(earlier.slots) + u64::from(host.slots)
                )));
            }
        }
        Ok(hosts)
    }
}

fn read_list(list: &str) -> Result<Vec<Host>> {
    list.split(',').map(|item| split_slots(item.trim(), "-H")).collect()
}

/// Lines `HOST slots=N` (Horovod, Open MPI) or `HOST:N` (MPICH); `#` begins a comment.
fn read_file(path: &Path) -> Result<Vec<Host>> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| Error::usage(format!("the hostfile '{}' cannot be read: {e}", path.display())))?;
    let mut hosts = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let place = format!("{}:{}", path.display(), index + 1);
        let bad = || Error::usage(format!("{place}: '{line}' is neither 'HOST slots=N' nor 'HOST:N'"));
        // "slots = 4" is read as "slots=4".
        let joined = line.replace(" = ", "=").replace("= ", "=").replace(" =", "=");
        let mut words = joined.split_whitespace();
        let mut host = split_slots(words.next().ok_or_else(bad)?, &place)?;
        for word in words {
            match word.split_once('=') {
                Some(("slots", n)) => host.slots = n.parse().ok().filter(|n| *n > 0).ok_or_else(bad)?,
                // Open MPI's other words about a host mean nothing here.
                Some(_) => {}
                None => return Err(bad()),
            }
        }
        hosts.push(host);
    }
    Ok(hosts)
}

fn split_slots(item: &str, place: &str) -> Result<Host> {
    let bad =
        || Error::usage(format!("'{item}' in {place} is not HOST:SLOTS; write, for instance, localhost:4"));
    // An IPv6 address has colons of its own; with slots it stands in brackets.
    let colon = item.rfind(':').filter(|at| {
        let host = &item[..*at];
        !host.contains(':') || (host.ends_with(']') && host.contains('['))
    });
    let (name, slots) = match colon {
        None => (item, 1),
        Some(at) => {
            let slots = item[at + 1..].parse::<u32>().ok().filter(|slots| *slots > 0);
            (&item[..at], slots.ok_or_else(bad)?)
        }
    };
    let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    // A name that begins with a dash would be an option of ssh.
    let sound = !name.is_empty() && !name.starts_with('-') && !name.contains(|c: char| c.is_whitespace());
    if sound { Ok(Host { name: name.to_owned(), slots }) } else { Err(bad()) }
}

/// Gives each host as many ranks as it has slots, in the order of the hosts, until all are placed. Several names of this
/// host are one. Without hosts all ranks are here.
///
/// # Errors
/// Too few slots.
pub fn assign(hosts: &[Host], processes: u32, is_local: impl Fn(&str) -> bool) -> Result<Vec<Placement>> {
    if hosts.is_empty() {
        return Ok(vec![Placement { host: "localhost".to_owned(), local: true, ranks: 0..processes }]);
    }
    let mut wanted: Vec<(&str, bool, u64)> = Vec::new();
    for host in hosts {
        let local = is_local(&host.name);
        match wanted.iter_mut().find(|(_, known_local, _)| local && *known_local) {
            Some((_, _, slots)) => *slots += u64::from(host.slots),
            None => wanted.push((&host.name, local, host.slots.into())),
        }
    }
    let slots: u64 = wanted.iter().map(|(_, _, slots)| slots).sum();
    if u64::from(processes) > slots {
        let list: Vec<String> = hosts.iter().map(|host| format!("{}:{}", host.name, host.slots)).collect();
        return Err(Error::usage(format!(
            "-np {processes} asks for more processes than the hosts have slots ({slots}: {}); give more slots or \
             fewer processes",
            list.join(", ")
        )));
    }
    let mut placed = 0;
    let mut placements = Vec::new();
    for (host, local, slots) in wanted {
        let here = slots.min(u64::from(processes - placed)) as u32;
        if here > 0 {
            placements.push(Placement { host: host.to_owned(), local, ranks: placed..placed + here });
            placed += here;
        }
    }
    Ok(placements)
}

/// Whether a name means the host that this process runs on.
#[must_use]
pub fn is_this_host(name: &str) -> bool {
    let this_host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let own: Vec<IpAddr> =
        if_addrs::get_if_addrs().into_iter().flatten().map(|interface| interface.ip()).collect();
    is_named(name, &this_host, &own)
}

fn is_named(name: &str, this_host: &str, own: &[IpAddr]) -> bool {
    if name == "localhost" {
        return true;
    }
    if let Ok(address) = name.parse::<IpAddr>() {
        return address.is_loopback() || own.contains(&address);
    }
    let (name_lower, this_lower) = (name.to_ascii_lowercase(), this_host.to_ascii_lowercase());
    let short = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
    // A bare name and its long form are one; two long forms must be the same.
    let one_is_bare = !name_lower.contains('.') || !this_lower.contains('.');
    if name_lower == this_lower || (one_is_bare && short(&name_lower) == short(&this_lower)) {
        return true;
    }
    // `user@host` is for ssh, whoever the host is.
    if name.contains('@') {
        return false;
    }
    // Names that only ssh knows (its Host lines) do not resolve.
    let mut addresses = (name, 0).to_socket_addrs().into_iter().flatten().peekable();
    addresses.peek().is_some() && addresses.all(|a| a.ip().is_loopback() || own.contains(&a.ip()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Result<Vec<Host>> {
        Source { list: Some(text.to_owned()), file: None }.read()
    }

    fn words(text: &str) -> String {
        list(text).expect_err(text).to_string()
    }

    fn local(name: &str) -> bool {
        is_named(name, "node7.example.org", &["10.1.2.3".parse().unwrap()])
    }

    #[test]
    fn this_host_has_several_names() {
        for name in ["localhost", "127.0.0.1", "node7", "NODE7.example.org", "::1", "10.1.2.3"] {
            assert!(local(name), "{name}");
        }
        for name in ["10.1.2.4", "node8", "me@node7", "node7.example.com", "no-such-host.invalid"] {
            assert!(!local(name), "{name}");
        }
        let placed = assign(&list("localhost:1,127.0.0.1:3").unwrap(), 4, local).unwrap();
        assert_eq!(placed, [Placement { host: "localhost".to_owned(), local: true, ranks: 0..4 }]);
    }

    #[test]
    fn ranks_fill_the_hosts_in_order() {
        let placed = assign(&list("a:2,[fd00::2]:3,b,c:9").unwrap(), 7, local).unwrap();
        let found: Vec<_> = placed.iter().map(|p| (p.host.as_str(), p.local, p.ranks.clone())).collect();
        assert_eq!(
            found,
            [("a", false, 0..2), ("fd00::2", false, 2..5), ("b", false, 5..6), ("c", false, 6..7)]
        );
        // A host without ranks is left alone.
        assert_eq!(assign(&list("a:2,b:2").unwrap(), 2, local).unwrap().len(), 1);
        assert_eq!(assign(&[], 3, local).unwrap()[0].ranks, 0..3);
        let error = assign(&list("a:2,b").unwrap(), 4, local).unwrap_err().to_string();
        assert!(error.contains("slots (3: a:2, b:1)"), "{error}");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_words() {
        assert!(words("a:2,b:1,a:2").contains("'a' stands twice in -H; name it once, as in a:4"));
        for bad in
            ["localhost:0", "localhost:99999999999", "", "a:x", "-oProxyCommand=x:1", "a b:2", "a:2,,b"]
        {
            assert!(words(bad).contains("HOST:SLOTS"), "{bad}");
        }
        assert_eq!(list("fd00::2").unwrap(), [Host { name: "fd00::2".to_owned(), slots: 1 }]);
    }

    #[test]
    fn a_hostfile_is_read_in_every_common_form() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Source { list: None, file: Some(path.clone()) }.read()
        };
        let hosts = read("# mine\na slots=2\n\nb\nc:3 # MPICH\nd slots = 4 max_slots=8\n").unwrap();
        let found: Vec<_> = hosts.iter().map(|host| (host.name.as_str(), host.slots)).collect();
        assert_eq!(found, [("a", 2), ("b", 1), ("c", 3), ("d", 4)]);
        for bad in ["a slots=many\n", "a slots=0\n", "a b\n"] {
            assert!(read(bad).unwrap_err().to_string().contains("hosts:1"), "{bad}");
        }
        assert!(read("a\nb\na\n").unwrap_err().to_string().contains("stands twice"));
        assert!(read("# nobody\n").unwrap_err().to_string().contains("names no host"));
    }

    #[test]
    fn the_hostfile_of_a_job_system_counts_where_no_flag_does() {
        let kubeflow =
            |name: &str| (name == "OMPI_MCA_orte_default_hostfile").then(|| "/etc/mpi/hostfile".into());
        assert_eq!(Source::default().or_found(kubeflow).file, Some(PathBuf::from("/etc/mpi/hostfile")));
        let given = Source { list: Some("a".into()), file: None }.or_found(kubeflow);
        assert_eq!(given.file, None);
    }
}
