//! Probes between hosts: who reaches whom at which address, how fast a message is there, and how many bytes a second
//! pass. Both ends prove that they hold the job's secret, and the one that answers says which host it is, because
//! an address that is used twice (a container bridge's, say) leads to somebody else.
#![forbid(unsafe_code)]

use crate::rendezvous::listen;
use crate::rendezvous::secret::Secret;
use crate::transport::wake::Waker;
use rustix::event::{PollFd, PollFlags, poll};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an address may take to answer. A first packet that is lost is sent again after a second.
const ANSWER_MS: u64 = 2500;
/// Answers that are being given at one time; more than the addresses of all neighbours.
const ANSWERS_MAX: usize = 256;
/// Round trips of a measurement of latency.
const ROUND_TRIPS: usize = 50;
/// For how long bytes are sent to measure the rate.
const SENDING_MS: u64 = 400;
const BLOCK_BYTES: usize = 256 << 10;

const NONCE_BYTES: usize = 16;
const PROOF_BYTES: usize = 32;
/// To be answered only.
const ASK: u8 = b'P';
/// Each byte that follows is echoed.
const ECHO: u8 = b'L';
/// What follows is counted up to its end.
const COUNT: u8 = b'B';

/// Answers probes until it is dropped.
pub struct Answerer {
    addresses: Vec<SocketAddr>,
    stop: Waker,
    thread: Option<JoinHandle<()>>,
}

impl Answerer {
    /// Answers as the host `name` at all addresses of these interfaces (all where there are none).
    pub fn start(secret: Secret, name: String, interfaces: &[String]) -> std::io::Result<Answerer> {
        let listeners = listen::listen_everywhere(0)?;
        let mut addresses = Vec::new();
        for listener in &listeners {
            addresses.extend(listen::reachable(listener.local_addr()?, interfaces)?);
        }
        addresses.sort_by_key(|address| address.ip().is_loopback());
        let stop = Waker::new()?;
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name("carole-probe".into())
            .spawn(move || answer_all(&listeners, &stopped, &secret, &name))?;
        Ok(Answerer { addresses, stop, thread: Some(thread) })
    }

    /// Where it may be reached, loopback last.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }
}

impl Drop for Answerer {
    fn drop(&mut self) {
        self.stop.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn answer_all(listeners: &[TcpListener], stop: &Waker, secret: &Secret, name: &str) {
    std::thread::scope(|scope| {
        let mut answers: Vec<std::thread::ScopedJoinHandle<'_, ()>> = Vec::new();
        loop {
            let mut fds = vec![PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN)];
            fds.extend(listeners.iter().map(|listener| PollFd::new(listener, PollFlags::IN)));
            if poll(&mut fds, None).is_err() {
                continue;
            }
            if !fds[0].revents().is_empty() {
                return;
            }
            for listener in listeners {
                while let Ok((stream, _)) = listener.accept() {
                    answers.retain(|answer| !answer.is_finished());
                    if answers.len() < ANSWERS_MAX {
                        // Whoever does not behave is left alone; it is bounded by time.
                        answers.push(scope.spawn(move || drop(answer(stream, secret, name))));
                    }
                }
            }
        }
    });
}

fn answer(mut stream: TcpStream, secret: &Secret, name: &str) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    prepare(&stream)?;
    let mut head = [0; 1 + NONCE_BYTES];
    stream.read_exact(&mut head)?;
    let (kind, nonce) = (head[0], &head[1..]);
    let mut proof = [0; PROOF_BYTES];
    stream.read_exact(&mut proof)?;
    if !secret.verify(&[b"carole probe", &[kind], nonce, name.as_bytes()], &proof) {
        return Ok(());
    }
    stream.write_all(&secret.mac(&[b"carole probed", &[kind], nonce, name.as_bytes()]))?;
    match kind {
        ECHO => {
            let mut byte = [0];
            for _ in 0..ROUND_TRIPS {
                stream.read_exact(&mut byte)?;
                stream.write_all(&byte)?;
            }
            Ok(())
        }
        COUNT => count(stream),
        _ => Ok(()),
    }
}

/// Counts bytes from the first to the end, and says how many there were and how long they took.
fn count(mut stream: TcpStream) -> std::io::Result<()> {
    let mut block = vec![0; BLOCK_BYTES];
    let (mut bytes, mut start) = (0u64, Instant::now());
    let limit = start + 4 * Duration::from_millis(SENDING_MS) + Duration::from_millis(ANSWER_MS);
    loop {
        let n = stream.read(&mut block)?;
        if bytes == 0 {
            start = Instant::now();
        }
        bytes += n as u64;
        if n == 0 || Instant::now() >= limit {
            break;
        }
    }
    let took_us = start.elapsed().as_micros() as u64;
    stream.write_all(&bytes.to_le_bytes())?;
    stream.write_all(&took_us.to_le_bytes())
}

fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_millis(ANSWER_MS)))?;
    stream.set_write_timeout(Some(Duration::from_millis(ANSWER_MS)))
}

/// Opens a proven connection to the host `name`.
fn open(secret: &Secret, name: &str, address: SocketAddr, kind: u8) -> Result<TcpStream, String> {
    let failed = |e: std::io::Error| words_of(&e);
    let mut stream =
        TcpStream::connect_timeout(&address, Duration::from_millis(ANSWER_MS)).map_err(failed)?;
    prepare(&stream).map_err(failed)?;
    let mut nonce = [0; NONCE_BYTES];
    getrandom::fill(&mut nonce).map_err(|e| e.to_string())?;
    let mut ask = vec![kind];
    ask.extend(nonce);
    ask.extend(secret.mac(&[b"carole probe", &[kind], &nonce, name.as_bytes()]));
    stream.write_all(&ask).map_err(failed)?;
    let mut proof = [0; PROOF_BYTES];
    let elsewhere = || "somebody else answers there".to_owned();
    stream.read_exact(&mut proof).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset => elsewhere(),
        _ => words_of(&e),
    })?;
    if secret.verify(&[b"carole probed", &[kind], &nonce, name.as_bytes()], &proof) {
        Ok(stream)
    } else {
        Err(elsewhere())
    }
}

fn words_of(error: &std::io::Error) -> String {
    use std::io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable, TimedOut, WouldBlock};
    match error.kind() {
        TimedOut | WouldBlock => "no answer".to_owned(),
        ConnectionRefused => "refused".to_owned(),
        HostUnreachable | NetworkUnreachable => "no route".to_owned(),
        _ => error.to_string(),
    }
}

/// Tries all addresses of the host `name` at once: which answered, in their order, and why the others did not.
#[must_use]
pub fn reach(secret: &Secret, name: &str, addresses: &[SocketAddr]) -> Vec<(SocketAddr, Result<(), String>)> {
    std::thread::scope(|scope| {
        let attempts: Vec<_> = addresses
            .iter()
            .map(|&address| (address, scope.spawn(move || open(secret, name, address, ASK).map(drop))))
            .collect();
        attempts
            .into_iter()
            .map(|(address, attempt)| {
                (address, attempt.join().unwrap_or_else(|_| Err("the probe failed".to_owned())))
            })
            .collect()
    })
}

/// What passes between two hosts.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Measure {
    /// Half of the median round trip of one byte, in microseconds.
    pub latency_us: f64,
    /// Bytes a second in the direction of the host that was probed.
    pub bytes_per_s: f64,
    /// The largest segment that a packet carries; the path's MTU less its headers.
    pub segment_bytes: u32,
}

/// Measures the way to the host `name` at an address that answers.
pub fn measure(secret: &Secret, name: &str, address: SocketAddr) -> Result<Measure, String> {
    let failed = |e: std::io::Error| words_of(&e);
    let mut stream = open(secret, name, address, ECHO)?;
    let mut trips = Vec::with_capacity(ROUND_TRIPS);
    for _ in 0..ROUND_TRIPS {
        let start = Instant::now();
        stream.write_all(&[0]).map_err(failed)?;
        stream.read_exact(&mut [0]).map_err(failed)?;
        trips.push(start.elapsed());
    }
    trips.sort_unstable();
    let latency_us = trips[ROUND_TRIPS / 2].as_secs_f64() * 1e6 / 2.0;
    let mut stream = open(secret, name, address, COUNT)?;
    let block = vec![0; BLOCK_BYTES];
    let until = Instant::now() + Duration::from_millis(SENDING_MS);
    while Instant::now() < until {
        stream.write_all(&block).map_err(|e| {
            format!("large packets do not pass ({}): are the MTUs of both hosts the same?", words_of(&e))
        })?;
    }
    let segment_bytes = socket2::SockRef::from(&stream).tcp_mss().unwrap_or(0);
    stream.shutdown(Shutdown::Write).map_err(failed)?;
    // What is still on its way must arrive before it is counted.
    stream.set_read_timeout(Some(Duration::from_millis(4 * ANSWER_MS))).map_err(failed)?;
    let (mut bytes, mut took_us) = ([0; 8], [0; 8]);
    stream.read_exact(&mut bytes).map_err(failed)?;
    stream.read_exact(&mut took_us).map_err(failed)?;
    let seconds = u64::from_le_bytes(took_us).max(1) as f64 / 1e6;
    Ok(Measure { latency_us, bytes_per_s: u64::from_le_bytes(bytes) as f64 / seconds, segment_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_reached_by_its_own_name_and_secret_only() {
        let secret = Secret::mint().unwrap();
        let answerer = Answerer::start(secret.clone(), "a".to_owned(), &[]).unwrap();
        let loopback: Vec<SocketAddr> =
            answerer.addresses().iter().copied().filter(|a| a.ip().is_loopback()).collect();
        assert!(reach(&secret, "a", &loopback).iter().all(|(_, reached)| reached.is_ok()));
        for (secret, name) in [(&secret, "b"), (&Secret::mint().unwrap(), "a")] {
            let reached = reach(secret, name, &loopback[..1]);
            assert_eq!(reached[0].1, Err("somebody else answers there".to_owned()));
        }
        drop(answerer);
        assert_eq!(reach(&secret, "a", &loopback[..1])[0].1, Err("refused".to_owned()));
    }

    #[test]
    fn a_way_is_measured() {
        let secret = Secret::mint().unwrap();
        let answerer = Answerer::start(secret.clone(), "a".to_owned(), &[]).unwrap();
        let address = *answerer.addresses().iter().find(|a| a.ip().is_loopback()).unwrap();
        let found = measure(&secret, "a", address).unwrap();
        assert!(found.latency_us > 0.0 && found.bytes_per_s > 1e6 && found.segment_bytes > 500, "{found:?}");
    }

    #[test]
    fn one_that_says_nothing_holds_nobody_up() {
        let secret = Secret::mint().unwrap();
        let answerer = Answerer::start(secret.clone(), "a".to_owned(), &[]).unwrap();
        let address = *answerer.addresses().iter().find(|a| a.ip().is_loopback()).unwrap();
        let _silent = TcpStream::connect(address).unwrap();
        let start = Instant::now();
        assert!(reach(&secret, "a", &[address])[0].1.is_ok());
        drop(answerer);
        assert!(start.elapsed() < Duration::from_millis(3 * ANSWER_MS));
    }
}
