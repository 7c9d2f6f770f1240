//! Where this rank can be reached: its listeners, the addresses of its interfaces, and its host's identity.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::fork;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;

/// Connections that the kernel keeps for a listener until they are accepted.
const BACKLOG: i32 = 1024;

/// A rank's open doors.
#[derive(Debug)]
pub struct Doors {
    /// For links by TCP and knocks.
    pub tcp: Vec<TcpListener>,
    /// For shared-memory links.
    pub unix: Option<UnixListener>,
    /// Where the TCP listeners can be reached, best first, loopback last.
    pub addresses: Vec<SocketAddr>,
    /// The name of the unix socket.
    pub socket: Option<[u8; 16]>,
}

impl Doors {
    /// No doors: a job of one.
    #[must_use]
    pub fn none() -> Doors {
        Doors { tcp: Vec::new(), unix: None, addresses: Vec::new(), socket: None }
    }

    /// Opens listeners on ports that the kernel picks. `loopback`: all ranks are on this host. `interfaces`:
    /// names or addresses of the interfaces to listen on, and to tell the peers; empty for all.
    pub fn open(loopback: bool, interfaces: &[String]) -> Result<Doors> {
        let system = |what: &str, e: io::Error| Error::usage(format!("cannot open {what} for links: {e}"));
        let tcp = match loopback {
            true => listen_loopback(0).map_err(|e| system("a loopback port", e))?,
            false if interfaces.is_empty() => listen_everywhere(0).map_err(|e| system("a port", e))?,
            false => listen_on(interfaces, 0).map_err(|e| system("ports on the interfaces named", e))?,
        };
        let mut addresses = Vec::new();
        for listener in &tcp {
            let local = listener.local_addr().map_err(|e| system("a port", e))?;
            addresses.extend(reachable(local, interfaces).map_err(|e| system("the list of interfaces", e))?);
        }
        if addresses.is_empty() {
            return Err(Error::usage(format!(
                "no usable address on interfaces {interfaces:?}; CAROLE_INTERFACES names interfaces that are up on this host"
            )));
        }
        addresses.sort_by_key(|address| address.ip().is_loopback());
        addresses.truncate(super::card::ADDRESSES_MAX);
        let mut socket = [0; 16];
        getrandom::fill(&mut socket)
            .map_err(|e| Error::usage(format!("the kernel gave no random bytes: {e}")))?;
        let unix = std::os::unix::net::SocketAddr::from_abstract_name(socket_name(&socket))
            .and_then(|name| UnixListener::bind_addr(&name))
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .map_err(|e| system("a unix socket", e))?;
        Ok(Doors { tcp, unix: Some(unix), addresses, socket: Some(socket) }.owned())
    }

    /// The same doors once more: who knocks is heard at one of the two, and the doors are open until both are
    /// dropped.
    pub fn try_clone(&self) -> io::Result<Doors> {
        let doors = Doors {
            tcp: self.tcp.iter().map(TcpListener::try_clone).collect::<io::Result<_>>()?,
            unix: self.unix.as_ref().map(UnixListener::try_clone).transpose()?,
            addresses: self.addresses.clone(),
            socket: self.socket,
        };
        Ok(doors.owned())
    }

    /// Closed doors tell that a rank has ended, so no forked child may hold them open.
    fn owned(self) -> Doors {
        self.descriptors().for_each(fork::own);
        self
    }

    fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.tcp.iter().map(AsRawFd::as_raw_fd).chain(self.unix.iter().map(AsRawFd::as_raw_fd))
    }
}

impl Drop for Doors {
    fn drop(&mut self) {
        self.descriptors().for_each(fork::disown);
    }
}

/// The abstract name of a rank's unix socket.
#[must_use]
pub fn socket_name(socket: &[u8; 16]) -> String {
    let hex: String = socket.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("carole-{hex}")
}

/// A listener on all interfaces: one socket for both families where the kernel has IPv6.
pub fn listen_everywhere(port: u16) -> io::Result<Vec<TcpListener>> {
    match listen(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))) {
        Ok(listener) => Ok(vec![listener]),
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => Err(e),
        Err(_) => Ok(vec![listen(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))?]),
    }
}

/// Listeners on loopback and on the addresses of these interfaces; on all, where this host has none of these.
pub fn listen_on_or_everywhere(interfaces: &[String], port: u16) -> io::Result<Vec<TcpListener>> {
    let named = listen_on(interfaces, port)?;
    if named.is_empty() {
        return listen_everywhere(port);
    }
    let has_loopback = |listener: &TcpListener| listener.local_addr().is_ok_and(|at| at.ip().is_loopback());
    let loopback = if named.iter().any(has_loopback) { Vec::new() } else { listen_loopback(port)? };
    Ok(named.into_iter().chain(loopback).collect())
}

/// Listeners on the addresses of these interfaces alone, none where they have none. An address that cannot be listened on
/// (yet) is left out beside others.
fn listen_on(interfaces: &[String], port: u16) -> io::Result<Vec<TcpListener>> {
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let (mut listeners, mut failure) = (Vec::new(), None);
    for address in reachable(any, interfaces)? {
        match listen(address) {
            Ok(listener) => listeners.push(listener),
            Err(e) => failure = Some(e),
        }
    }
    failure.filter(|_| listeners.is_empty()).map_or(Ok(listeners), Err)
}

/// Listeners on the loopback addresses of the families that there are.
pub fn listen_loopback(port: u16) -> io::Result<Vec<TcpListener>> {
    let mut listeners = vec![listen(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?];
    // A host without IPv6 has no ::1, and IPv4 is enough there.
    listeners.extend(listen(SocketAddr::from((Ipv6Addr::LOCALHOST, port))).ok());
    Ok(listeners)
}

/// A nonblocking listener at this address; the unspecified IPv6 address takes IPv4 too.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    if let IpAddr::V6(ip) = address.ip() {
        socket.set_only_v6(!ip.is_unspecified())?;
    }
    // A port that the last job left in TIME_WAIT can be had again; one that is listened on cannot.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// The addresses at which others reach a listener bound to `local`.
pub fn reachable(local: SocketAddr, interfaces: &[String]) -> io::Result<Vec<SocketAddr>> {
    if !local.ip().is_unspecified() {
        return Ok(vec![local]);
    }
    let usable = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => !ip.is_link_local(),
        // A link-local address means nothing without the number of the interface on the host that connects.
        IpAddr::V6(ip) => local.is_ipv6() && !ip.is_unicast_link_local(),
    };
    let found: Vec<(IpAddr, bool)> = if_addrs::get_if_addrs()?
        .into_iter()
        .filter(|i| {
            interfaces.is_empty() || interfaces.iter().any(|n| *n == i.name || *n == i.ip().to_string())
        })
        .map(|i| (i.ip(), i.is_oper_up()))
        .filter(|(ip, _)| usable(ip))
        .collect();
    Ok(worth_telling(&found).map(|ip| SocketAddr::new(ip, local.port())).collect())
}

/// Of the addresses of interfaces (and whether each can carry traffic now), those that peers should try. The kernel
/// may take a second to see the carrier of an interface that has just been set up, so those without are told where
/// nothing better leads off this host; beside others they would only be tried in vain (an idle bridge).
fn worth_telling(found: &[(IpAddr, bool)]) -> impl Iterator<Item = IpAddr> {
    let any_up = found.iter().any(|(ip, up)| *up && !ip.is_loopback());
    found.iter().filter(move |(ip, up)| *up || ip.is_loopback() || !any_up).map(|(ip, _)| *ip)
}

/// Ranks with the same text share memory: the same boot of the same kernel, and the same network namespace,
/// in which abstract unix sockets are reachable. `CAROLE_HOST_ID` says otherwise.
#[must_use]
pub fn host_id() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_else(|_| hostname());
    let namespace = std::fs::metadata("/proc/self/ns/net").map_or(0, |facts| facts.ino());
    format!("{}/{namespace}", boot.trim())
}

/// This host's name, for messages.
#[must_use]
pub fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doors_can_be_reached_at_every_address_told() {
        for loopback in [true, false] {
            let doors = Doors::open(loopback, &[]).unwrap();
            assert!(doors.addresses.iter().any(|a| a.is_ipv4()));
            for address in &doors.addresses {
                assert!(!loopback || address.ip().is_loopback());
                std::net::TcpStream::connect(address).unwrap();
            }
            let first_loopback = doors.addresses.iter().position(|a| a.ip().is_loopback());
            let last_other = doors.addresses.iter().rposition(|a| !a.ip().is_loopback());
            assert!(first_loopback > last_other || last_other.is_none());
        }
    }

    #[test]
    fn an_interface_whose_carrier_is_not_known_yet_is_told_where_there_is_no_other() {
        let (lo, late, up) = ("127.0.0.1", "10.0.0.7", "fd00::3");
        let told = |found: &[(&str, bool)]| -> Vec<String> {
            let found: Vec<(IpAddr, bool)> =
                found.iter().map(|(ip, up)| (ip.parse().unwrap(), *up)).collect();
            worth_telling(&found).map(|ip| ip.to_string()).collect()
        };
        assert_eq!(told(&[(lo, true), (late, false)]), [lo, late]);
        assert_eq!(told(&[(lo, true), (late, false), (up, true)]), [lo, up]);
        assert_eq!(told(&[(late, false)]), [late]);
        assert_eq!(told(&[(lo, false)]), [lo]);
    }

    #[test]
    fn doors_on_named_interfaces_are_open_there_alone() {
        let named = ["lo".to_owned()];
        let doors = Doors::open(false, &named).unwrap();
        assert!(!doors.tcp.is_empty());
        for listener in &doors.tcp {
            let local = listener.local_addr().unwrap();
            assert!(local.ip().is_loopback() && doors.addresses.contains(&local), "{local}");
        }
        for address in &doors.addresses {
            std::net::TcpStream::connect(address).unwrap();
        }
    }

    #[test]
    fn a_service_on_named_interfaces_can_be_reached_there_and_on_loopback() {
        let of = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            listen_on_or_everywhere(&names, 0).unwrap()
        };
        let local = |listener: &TcpListener| listener.local_addr().unwrap().ip();
        assert!(of(&["lo"]).iter().all(|listener| local(listener).is_loopback()));
        assert!(of(&["nosuch7"]).iter().any(|listener| local(listener).is_unspecified()));
        let other =
            if_addrs::get_if_addrs().unwrap().into_iter().find(|i| !i.is_loopback() && i.ip().is_ipv4());
        if let Some(other) = other {
            let listeners = of(&[&other.name]);
            assert!(listeners.iter().any(|listener| local(listener) == other.ip()));
            assert!(listeners.iter().any(|listener| local(listener).is_loopback()));
            assert!(listeners.iter().all(|listener| !local(listener).is_unspecified()));
        }
    }

    #[test]
    fn an_interface_that_does_not_exist_is_named() {
        let error = Doors::open(false, &["nosuch7".into()]).unwrap_err().to_string();
        assert!(error.contains("nosuch7") && error.contains("CAROLE_INTERFACES"), "{error}");
    }

    #[test]
    fn a_host_is_itself() {
        assert_eq!(host_id(), host_id());
        assert!(!hostname().is_empty());
    }
}
