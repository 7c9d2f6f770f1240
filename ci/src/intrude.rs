//! Garbage, scans and half-open connections on the listening ports of a running job do not disturb it.
#![forbid(unsafe_code)]

use crate::job::{Job, Plan, over};
use crate::random::Random;
use crate::{Count, Verdict};
use clap::Args;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    #[arg(long, default_value_t = 3)]
    ranks: u32,
    /// Connections of each kind to each port.
    #[arg(long, default_value_t = 20)]
    connections: u64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

pub fn run(settings: &Settings) -> Verdict {
    let mut count = Count::default();
    for transport in ["tcp", "tls"] {
        count.passed += intrude(settings, transport)?;
    }
    Ok(count)
}

/// Of one job; how many connections were made to it.
fn intrude(settings: &Settings, transport: &str) -> Result<u64, String> {
    let mut args = ["chaos", "--for-ms", "8000", "--seed"].map(str::to_owned).to_vec();
    args.push(settings.seed.to_string());
    let plan = Plan {
        args,
        size: settings.ranks,
        hosts: 1,
        places: Vec::new(),
        knobs: over(transport),
        limit: Duration::from_secs(300),
    };
    let job = plan.start()?;
    let until = Instant::now() + Duration::from_secs(120);
    for _ in 0..settings.ranks {
        match job.line(until) {
            Some((_, line)) if line == "running" => {}
            other => return Err(format!("before the intrusion: {other:?}")),
        }
    }
    let ports = listening(&job, settings.ranks)?;
    let mut random = Random::new(&[settings.seed]);
    let mut open = Vec::new();
    let mut made = 0;
    for &port in &ports {
        for _ in 0..settings.connections {
            made += knock(port, &mut random, &mut open);
        }
    }
    let ended = job.finish()?;
    for (rank, lines) in ended.lines.iter().enumerate() {
        if lines.last().map(String::as_str) != Some("finished") || !ended.status[rank].success() {
            return Err(format!("rank {rank} was disturbed: {lines:?}, {}", ended.status[rank]));
        }
    }
    println!(
        "intrude: {made} connections to {} listening ports; the job on {} ranks over {transport} went on",
        ports.len(),
        settings.ranks
    );
    Ok(made)
}

/// The addresses on which the job's processes listen, from the kernel's tables.
pub fn listening(job: &Job, ranks: u32) -> Result<BTreeSet<SocketAddr>, String> {
    let mut inodes = BTreeSet::new();
    for rank in 0..ranks {
        let folder = format!("/proc/{}/fd", job.pid(rank).as_raw_nonzero());
        let entries = std::fs::read_dir(&folder).map_err(|e| format!("{folder}: {e}"))?;
        for entry in entries.flatten() {
            let target = std::fs::read_link(entry.path()).unwrap_or_default();
            let inode = target.to_string_lossy().strip_prefix("socket:[").map(|rest| rest.replace(']', ""));
            inodes.extend(inode);
        }
    }
    let mut found = BTreeSet::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        for line in std::fs::read_to_string(table).unwrap_or_default().lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // Fields: slot, local address, remote address, state (0A is listening), ..., inode.
            if fields.get(3) == Some(&"0A") && fields.get(9).is_some_and(|inode| inodes.contains(*inode)) {
                let port = fields[1].rsplit(':').next().and_then(|port| u16::from_str_radix(port, 16).ok());
                let host = if table.ends_with('6') {
                    Ipv6Addr::LOCALHOST.into()
                } else {
                    Ipv4Addr::LOCALHOST.into()
                };
                found.extend(port.map(|port| SocketAddr::new(host, port)));
            }
        }
    }
    if found.is_empty() {
        Err("the job listens on no port, so nothing was tried".to_owned())
    } else {
        Ok(found)
    }
}

/// One connection that is closed at once, one that stays open and silent, one that talks nonsense, one that
/// begins like a peer of another protocol, and some that begin like TLS.
fn knock(address: SocketAddr, random: &mut Random, open: &mut Vec<TcpStream>) -> u64 {
    let connect = || TcpStream::connect_timeout(&address, Duration::from_secs(2));
    let mut made = 0;
    if connect().is_ok() {
        made += 1;
    }
    if let Ok(stream) = connect() {
        open.push(stream);
        made += 1;
    }
    let garbage: Vec<u8> = (0..random.below(70_000)).map(|_| random.next() as u8).collect();
    let record = [&[0x16, 3, 1, 0x3f, 0xff][..], &garbage].concat();
    for words in [
        garbage.as_slice(),
        b"GET / HTTP/1.1\r\nHost: carole\r\n\r\n",
        b"carole\0\xff\xff\xff\xff\xff\xff",
        b"\x16\x03\x01",
        &record,
    ] {
        if let Ok(mut stream) = connect() {
            made += 1;
            // A peer that closes in the middle is what we hope for.
            let _ = stream.set_write_timeout(Some(Duration::from_millis(50)));
            let _ = stream.set_read_timeout(Some(Duration::from_millis(5)));
            let _ = stream.write_all(words);
            let _ = stream.read(&mut [0; 64]);
            open.push(stream);
        }
    }
    made
}
