//! Where the ranks meet: what rank 0 sets up for the others, and where each of them goes.
#![forbid(unsafe_code)]

use super::client::{Join, interfaces};
use super::place::{Environment, Meeting, Place};
use super::secret::{SECRET_BYTES, Secret};
use super::server::{self, Bind, Publish, Server, ServerOptions};
use crate::error::{Error, Result};
use std::io::Write;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Where the service is, from this rank's point of view.
pub enum Goal {
    /// Names with ports, which are resolved at each attempt.
    Names(Vec<String>),
    /// Addresses.
    Addresses(Vec<SocketAddr>),
    /// Addresses in a file.
    File(PathBuf),
    /// A unix socket in this directory.
    Socket(PathBuf),
    /// Addresses and the secret in files of this directory.
    Shared(PathBuf),
}

/// Rank 0 starts its service where there is no other; everybody learns where to go.
pub fn prepare(
    config: &Join,
    place: &Place,
    meeting: Meeting,
    secret: Option<Secret>,
) -> Result<(Option<Server>, Option<Secret>, Goal)> {
    let (bind, goal, publish) = match meeting {
        Meeting::Alone => unreachable!("a job of one meets nobody"),
        Meeting::Service(addresses) => return Ok((None, secret, Goal::Names(addresses))),
        Meeting::RankZero(address) => (bind_for(&address)?, Goal::Names(vec![address]), None),
        Meeting::File(path) => (Bind::on(interfaces(config), 0), Goal::File(path.clone()), Some(path)),
        Meeting::Private(key) => {
            let directory = private_directory(&config.environment, &key);
            (Bind::Private(directory.clone()), Goal::Socket(directory), None)
        }
        Meeting::Shared(directory) => {
            let addresses = shared_files(&directory).addresses;
            (Bind::on(interfaces(config), 0), Goal::Shared(directory), Some(addresses))
        }
        Meeting::Announced => return announced(config, place, secret),
    };
    if place.rank != 0 {
        return Ok((None, secret, goal));
    }
    let secret = match secret {
        Some(secret) => secret,
        None => Secret::mint()?,
    };
    let litter = match &goal {
        Goal::Shared(directory) => leave_secret(directory, &secret)?,
        _ => Vec::new(),
    };
    let publish = publish.map(|file| Publish { file, litter });
    let server = Server::start(ServerOptions { publish, ..serve(config, place, bind, &secret) })?;
    let goal = match goal {
        // Rank 0 knows where it serves.
        Goal::File(_) | Goal::Shared(_) => {
            Goal::Addresses(server.addresses().iter().rev().copied().collect())
        }
        goal => goal,
    };
    Ok((Some(server), Some(secret), goal))
}

/// Rank 0's own service: it ends when all have the table.
fn serve(config: &Join, place: &Place, bind: Bind, secret: &Secret) -> ServerOptions {
    ServerOptions {
        bind,
        secret: secret.clone().encrypting(config.encrypts),
        size: place.size,
        epoch: config.epoch,
        once: true,
        start_timeout_ms: config.start_timeout_ms,
        publish: None,
        warn: config.warn.clone(),
    }
}

/// What an announcement begins with.
const HERE: u8 = 1;
/// Or with this, and the reason follows.
const NOWHERE: u8 = 0;

/// Rank 0 serves, and tells the others by the launcher's own way.
fn announced(
    config: &Join,
    place: &Place,
    secret: Option<Secret>,
) -> Result<(Option<Server>, Option<Secret>, Goal)> {
    let announce = config.announce.as_ref().expect("there is such a way, or they would meet elsewhere");
    if place.rank != 0 {
        let (told, addresses) = heard(&announce(Vec::new())?)?;
        return Ok((None, Some(secret.unwrap_or(told)), Goal::Addresses(addresses)));
    }
    let one_host = place.hints.local_size == Some(place.size);
    let bind = if one_host { Bind::Loopback(0) } else { Bind::on(interfaces(config), 0) };
    let started = secret.map_or_else(Secret::mint, Ok).and_then(|secret| {
        let server = Server::start(serve(config, place, bind, &secret))?;
        Ok((server, secret))
    });
    let (server, secret) = match started {
        Ok(started) => started,
        Err(error) => {
            // The others wait for a word.
            announce([&[NOWHERE], error.to_string().as_bytes()].concat())?;
            return Err(error);
        }
    };
    let list: Vec<String> = server.addresses().iter().map(ToString::to_string).collect();
    announce([&[HERE], &secret.expose()[..], list.join(",").as_bytes()].concat())?;
    let goal = Goal::Addresses(server.addresses().iter().rev().copied().collect());
    Ok((Some(server), Some(secret), goal))
}

fn heard(words: &[u8]) -> Result<(Secret, Vec<SocketAddr>)> {
    let malformed = || Error::usage("rank 0 told where to meet in words that this version does not know");
    match words.split_first() {
        Some((&HERE, rest)) if rest.len() > SECRET_BYTES => {
            let (secret, list) = rest.split_at(SECRET_BYTES);
            let secret = Secret::from_bytes(secret.try_into().expect("that many bytes"));
            let list = std::str::from_utf8(list).map_err(|_| malformed())?;
            let addresses: std::result::Result<Vec<SocketAddr>, _> =
                list.split(',').map(str::parse).collect();
            Ok((secret, addresses.map_err(|_| malformed())?))
        }
        Some((&NOWHERE, reason)) => Err(Error::usage(format!(
            "rank 0 could not set up the meeting: {}",
            String::from_utf8_lossy(reason)
        ))),
        _ => Err(malformed()),
    }
}

/// The files of a shared directory.
pub struct SharedFiles {
    /// Where rank 0 serves.
    pub addresses: PathBuf,
    /// The job's secret.
    pub secret: PathBuf,
}

/// The files of this directory.
pub fn shared_files(directory: &Path) -> SharedFiles {
    SharedFiles { addresses: directory.join("address"), secret: directory.join("secret") }
}

/// Makes the directory, and leaves the secret in it for the user's own processes. Says what is to be removed.
fn leave_secret(directory: &Path, secret: &Secret) -> Result<Vec<PathBuf>> {
    let refuse = |why: String| Error::usage(format!("the meeting place {}: {why}", directory.display()));
    for folder in directory.parent().into_iter().chain([directory]) {
        match std::fs::DirBuilder::new().mode(0o700).create(folder) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(refuse(format!(
                    "cannot be made: {e}; set CAROLE_RENDEZVOUS and CAROLE_SECRET_FILE"
                )));
            }
            _ => server::check_private(folder).map_err(refuse)?,
        }
    }
    let files = shared_files(directory);
    // An earlier job of this name may have been killed.
    let _ = std::fs::remove_file(&files.addresses);
    let _ = std::fs::remove_file(&files.secret);
    let options = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&files.secret);
    let written = options.and_then(|mut file| file.write_all(secret.to_hex().as_bytes()));
    written.map_err(|e| refuse(format!("cannot be written to: {e}")))?;
    Ok(vec![directory.to_owned(), files.secret])
}

fn bind_for(address: &str) -> Result<Bind> {
    let port: u16 =
        address.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).expect("checked when read");
    let addresses = resolve(address).map_err(Error::Usage)?;
    Ok(if addresses.iter().all(|a| a.ip().is_loopback()) {
        Bind::Address(addresses[0])
    } else {
        // The others go where the name leads them, which need not be an interface that the job uses for more.
        Bind::Everywhere(port)
    })
}

pub fn resolve(name: &str) -> std::result::Result<Vec<SocketAddr>, String> {
    match name.to_socket_addrs() {
        Ok(addresses) => Some(addresses.collect::<Vec<_>>())
            .filter(|list| !list.is_empty())
            .ok_or_else(|| format!("{name} has no address")),
        Err(e) => Err(format!("{name} cannot be resolved: {e}")),
    }
}

/// `$XDG_RUNTIME_DIR` is private to the user already; elsewhere the user's number keeps names apart. The key is
/// hashed, because it may be long or hold slashes and a socket's path is short.
fn private_directory(environment: &Environment, key: &str) -> PathBuf {
    let me = rustix::process::geteuid().as_raw();
    let runtime = environment.get("XDG_RUNTIME_DIR").map(PathBuf::from);
    let base = runtime.filter(|path| {
        path.is_absolute() && server::check_private(path).is_ok() && path.as_os_str().len() < 40
    });
    let name = Secret::insecure(key).job();
    base.unwrap_or_else(|| PathBuf::from("/tmp")).join(format!("carole-{me}-{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_is_heard_as_it_was_told() {
        let secret = Secret::mint().unwrap();
        let words = [&[HERE], &secret.expose()[..], b"127.0.0.1:7,[::1]:8"].concat();
        let (told, addresses) = heard(&words).unwrap();
        assert_eq!(told.expose(), secret.expose());
        assert_eq!(addresses, ["127.0.0.1:7".parse().unwrap(), "[::1]:8".parse().unwrap()]);
        let error = heard(b"\0no port is free").unwrap_err().to_string();
        assert!(error.contains("rank 0") && error.contains("no port is free"), "{error}");
        for words in [&b""[..], b"\x01short", b"\x07what", &[&words[..40], b"nonsense"].concat()] {
            assert!(heard(words).is_err());
        }
    }

    #[test]
    fn what_is_left_in_a_shared_directory_is_the_users_alone() {
        let base = tempfile::tempdir().unwrap();
        let directory = base.path().join("meetings/job7");
        let secret = Secret::mint().unwrap();
        for _ in 0..2 {
            let litter = leave_secret(&directory, &secret).unwrap();
            assert_eq!(litter.len(), 2);
            let read = Secret::from_file(&shared_files(&directory).secret).unwrap();
            assert_eq!(read.expose(), secret.expose());
        }
        std::fs::set_permissions(&directory, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        assert!(leave_secret(&directory, &secret).is_err());
    }
}
