//! What a user gets wrong: an error that names the host and the remedy within seconds, and nothing left.
#![forbid(unsafe_code)]

use super::site::{PATIENCE, Site, program, start};
use super::{Scene, Settings, size_of};
use crate::hosts::network::Family;
use std::time::Duration;

pub const SCENES: [(&str, Scene); 11] = [
    ("a host that does not exist", wrong_host),
    ("a key that is not let in", wrong_key),
    ("a host key that has changed", changed_host),
    ("no sshd", no_sshd),
    ("no carolerun on one host", no_agent),
    ("another version on one host", other_version),
    ("a command that one host lacks", no_command),
    ("too few slots, and one host under two names", slots),
    ("an interface that does not exist", no_interface),
    ("a firewall that lets connections pass in one direction", one_direction),
    ("a shell that talks before the agent", noisy_shell),
];

fn two() -> Result<Site, String> {
    Site::new(2, Family::Both, None)
}

/// A job of `true` with these flags.
fn flags<'a>(size: &'a str, before: &[&'a str]) -> Vec<&'a str> {
    [&["-np", size], before, &["true"]].concat()
}

fn wrong_host(_: &Settings) -> Result<(), String> {
    let ended = two()?.run(&flags("4", &["-H", "node0:2,nod1.invalid:2"]))?;
    ended.refused(2, &["host 'nod1.invalid'", "no host of this name", "spelt"], 20)
}

fn wrong_key(_: &Settings) -> Result<(), String> {
    let site = two()?;
    let list = site.list(2);
    let ended =
        start(site.carolerun_with("ssh_config_other", &flags("4", &["-H", &list]))?)?.finish(PATIENCE)?;
    ended.refused(2, &["host '10.77.1.2'", "ssh-copy-id", "--ssh-identity-file"], 20)?;
    // The right one can be named.
    let key = site.path("user_key");
    start(site.carolerun_with("ssh_config_other", &flags("4", &["-H", &list, "-i", &key]))?)?
        .finish(PATIENCE)?
        .well()?;
    site.nothing_left(Duration::from_secs(10))
}

fn changed_host(_: &Settings) -> Result<(), String> {
    let site = two()?;
    let key = std::fs::read_to_string(site.path("other_key.pub")).map_err(|e| e.to_string())?;
    site.write("known_hosts", &format!("10.77.1.2 {key}"))?;
    let list = site.list(2);
    site.run(&flags("4", &["-H", &list]))?.refused(2, &["host '10.77.1.2'", "ssh-keygen -R"], 20)
}

fn no_sshd(_: &Settings) -> Result<(), String> {
    let site = two()?;
    let list = site.list(2);
    site.run(&flags("4", &["-H", &list, "-p", "2222"]))?.refused(
        2,
        &["host '10.77.1.2'", "Connection refused", "(-p)", "waiting for host 10.77.1.2"],
        30,
    )
}

/// A folder with programs that the last host lacks.
fn hidden_folder() -> Result<tempfile::TempDir, String> {
    tempfile::tempdir().map_err(|e| e.to_string())
}

fn no_agent(_: &Settings) -> Result<(), String> {
    let folder = hidden_folder()?;
    let copy = folder.path().join("carolerun-copy");
    std::fs::copy(program("carolerun")?, &copy).map_err(|e| e.to_string())?;
    let site = Site::new(2, Family::Both, Some(folder.path()))?;
    let (list, copy) = (site.list(2), copy.display().to_string());
    let ended = site.run(&flags("4", &["-H", &list, "--agent-program", &copy]))?;
    ended.refused(2, &["host '10.77.1.2'", "no carolerun", "--agent-program"], 20)
}

fn other_version(_: &Settings) -> Result<(), String> {
    let site = two()?;
    site.write("old", "#!/bin/sh\necho carole-agent 1 carole%200.0.9 x y\nexec cat >/dev/null\n")?;
    let old = site.path("old");
    crate::hosts::network::output("chmod", &["755", &old])?;
    let list = site.list(2);
    let ended = site.run(&flags("4", &["-H", &list, "--agent-program", &old]))?;
    ended.refused(2, &["versions differ", "host '10.77.1.2' has carole 0.0.9"], 20)
}

fn no_command(_: &Settings) -> Result<(), String> {
    let folder = hidden_folder()?;
    let command = folder.path().join("train");
    std::fs::write(&command, "#!/bin/sh\nsleep 600\n").map_err(|e| e.to_string())?;
    let command = command.display().to_string();
    crate::hosts::network::output("chmod", &["755", &command])?;
    let site = Site::new(2, Family::Both, Some(folder.path()))?;
    let list = site.list(2);
    site.run(&["-np", "4", "-H", &list, &command])?.refused(
        127,
        &["host '10.77.1.2'", "was not found", "at the same place"],
        20,
    )
}

fn slots(_: &Settings) -> Result<(), String> {
    let site = two()?;
    let list = site.list(2);
    site.run(&flags("5", &["-H", &list]))?.refused(2, &["slots (4", "10.77.1.2:2"], 5)?;
    site.run(&flags("2", &["-H", "node1:1,node1:1"]))?.refused(2, &["'node1' stands twice", "node1:2"], 5)?;
    site.run(&flags("2", &["-H", "node1:1,alias1:1"]))?.refused(
        2,
        &["'node1' and 'alias1' are the same host"],
        20,
    )
}

fn no_interface(settings: &Settings) -> Result<(), String> {
    let site = two()?;
    let (size, list) = (size_of(settings, &site).to_string(), site.list(settings.per_host));
    site.run(&flags(&size, &["-H", &list, "--network-interfaces", "eth7"]))?.refused(
        2,
        &["eth7", "--network-interfaces", "host"],
        20,
    )
}

fn one_direction(settings: &Settings) -> Result<(), String> {
    if std::process::Command::new("nft").arg("--version").output().is_err() {
        return Err("skipped, no program nft (Debian: nftables)".to_owned());
    }
    let site = two()?;
    let (size, list) = (size_of(settings, &site).to_string(), site.list(settings.per_host));
    site.hide_behind_firewall(1)?;
    site.run(&flags(&size, &["-H", &list]))?.refused(
        2,
        &["cannot connect to host '10.77.1.2'", "10.77.1.2: no answer", "NAT", "--network-interfaces"],
        30,
    )
}

/// A login shell that prints something is no reason to fail.
fn noisy_shell(_: &Settings) -> Result<(), String> {
    let site = two()?;
    let agent = program("carolerun")?.display().to_string();
    site.write("noisy", &format!("#!/bin/sh\necho Welcome; echo to this host >&2\nexec {agent} \"$@\"\n"))?;
    let noisy = site.path("noisy");
    crate::hosts::network::output("chmod", &["755", &noisy])?;
    let list = site.list(2);
    site.run(&flags("4", &["-H", &list, "--agent-program", &noisy]))?.well().map(drop)
}
