//! The key-value space of PMI-1, which MPICH's launcher (Hydra) and its kin give their processes on a descriptor:
//! lines of `key=value` words. Ranks on several hosts learn from it where to meet.

use super::client::Announce;
use super::reactor::timespec;
use crate::error::{Error, Result};
use crate::types::Epoch;
use rustix::event::{PollFd, PollFlags, poll};
use std::fmt::Write;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A line of the protocol; values are at most 1 KiB.
const LINE_BYTES_MAX: usize = 4096;
/// Bytes of a value, as hexadecimal digits. Every PMI-1 takes that many.
const VALUE_DIGITS: usize = 512;
/// What is told this way.
const TOLD_BYTES_MAX: usize = 64 << 10;

/// Tells the others through PMI. All ranks of the job take part each time.
#[must_use]
pub fn announce(descriptor: RawFd, rank: u32, epoch: Epoch, limit: Duration) -> Announce {
    Arc::new(move |words| {
        let mut space = Space::open(descriptor, Instant::now() + limit)?;
        let prefix = format!("carole-{}", epoch.0);
        if rank == 0 {
            space.publish(&prefix, &words)?;
        }
        space.barrier()?;
        if rank == 0 { Ok(words) } else { space.read(&prefix) }
    })
}

/// One conversation with the launcher.
struct Space {
    descriptor: RawFd,
    deadline: Instant,
    name: String,
    /// Bytes that were read behind the last line.
    rest: Vec<u8>,
}

fn failed(why: &str) -> Error {
    Error::usage(format!(
        "the ranks could not meet through the PMI of their launcher: {why}; set CAROLE_RENDEZVOUS=HOST:PORT of rank 0 \
         and CAROLE_SECRET_FILE instead"
    ))
}

impl Space {
    fn open(descriptor: RawFd, deadline: Instant) -> Result<Space> {
        let mut space = Space { descriptor, deadline, name: String::new(), rest: Vec::new() };
        space.ask("cmd=init pmi_version=1 pmi_subversion=1", "response_to_init")?;
        let answer = space.ask("cmd=get_my_kvsname", "my_kvsname")?;
        space.name = word(&answer, "kvsname").ok_or_else(|| failed("it has no key-value space"))?.to_owned();
        Ok(space)
    }

    fn publish(&mut self, prefix: &str, bytes: &[u8]) -> Result<()> {
        let digits = bytes.iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").expect("strings take what is written");
            text
        });
        let name = self.name.clone();
        let mut put = |key: &str, value: &str| {
            let line = format!("cmd=put kvsname={name} key={prefix}-{key} value={value}");
            self.ask(&line, "put_result").map(drop)
        };
        put("len", &digits.len().to_string())?;
        for (i, part) in digits.as_bytes().chunks(VALUE_DIGITS).enumerate() {
            put(&i.to_string(), std::str::from_utf8(part).expect("digits"))?;
        }
        Ok(())
    }

    fn read(&mut self, prefix: &str) -> Result<Vec<u8>> {
        let digits: usize = self.get(&format!("{prefix}-len"))?.parse().unwrap_or(usize::MAX);
        if digits > 2 * TOLD_BYTES_MAX {
            return Err(failed("rank 0 has told too much"));
        }
        let mut text = String::new();
        for i in 0..digits.div_ceil(VALUE_DIGITS) {
            text.push_str(&self.get(&format!("{prefix}-{i}"))?);
        }
        if text.len() != digits || !text.is_ascii() {
            return Err(failed("what rank 0 has told is not all there"));
        }
        let byte = |at: usize| u8::from_str_radix(&text[at..at + 2], 16);
        (0..digits / 2)
            .map(|i| byte(2 * i))
            .collect::<std::result::Result<_, _>>()
            .map_err(|e| failed(&e.to_string()))
    }

    fn get(&mut self, key: &str) -> Result<String> {
        let answer = self.ask(&format!("cmd=get kvsname={} key={key}", self.name), "get_result")?;
        word(&answer, "value").map(str::to_owned).ok_or_else(|| failed(&format!("it has no value of {key}")))
    }

    fn barrier(&mut self) -> Result<()> {
        self.ask("cmd=barrier_in", "barrier_out").map(drop)
    }

    /// Says a line, and reads the answer, which must be of this kind and good.
    fn ask(&mut self, line: &str, kind: &str) -> Result<String> {
        let line = format!("{line}\n");
        let mut left = line.as_bytes();
        while !left.is_empty() {
            self.wait(PollFlags::OUT)?;
            let n = rustix::io::write(self.fd(), left).map_err(|e| failed(&e.to_string()))?;
            left = &left[n..];
        }
        let answer = self.line()?;
        let good = word(&answer, "rc").is_none_or(|code| code == "0");
        match word(&answer, "cmd") {
            Some(told) if told == kind && good => Ok(answer),
            _ => Err(failed(&format!("it answers '{answer}'"))),
        }
    }

    fn line(&mut self) -> Result<String> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line).trim().to_owned());
            }
            if self.rest.len() > LINE_BYTES_MAX {
                return Err(failed("it says a line without an end"));
            }
            self.wait(PollFlags::IN)?;
            let mut bytes = [0u8; 1024];
            match rustix::io::read(self.fd(), &mut bytes) {
                Ok(0) => return Err(failed("it has closed the connection")),
                Ok(n) => self.rest.extend_from_slice(&bytes[..n]),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(e) => return Err(failed(&e.to_string())),
            }
        }
    }

    fn wait(&self, what: PollFlags) -> Result<()> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(failed(
                    "some ranks did not come within the start timeout (CAROLE_START_TIMEOUT_S)",
                ));
            }
            let fd = self.fd();
            match poll(&mut [PollFd::from_borrowed_fd(fd, what)], Some(&timespec(left))) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(e) => return Err(failed(&e.to_string())),
            }
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the launcher keeps it open for the life of the process, and says its number for this use. A
        // number that means nothing makes the calls fail.
        unsafe { BorrowedFd::borrow_raw(self.descriptor) }
    }
}

/// The value of a word `key=value` of a line.
fn word<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::io::{BufRead, BufReader};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::sync::{Barrier, Mutex};

    /// A launcher that serves one process.
    fn serve(stream: UnixStream, values: Arc<Mutex<HashMap<String, String>>>, all: Arc<Barrier>) {
        let mut out = stream.try_clone().unwrap();
        for line in BufReader::new(stream).lines().map_while(std::result::Result::ok) {
            let answer = match word(&line, "cmd").unwrap() {
                "init" => "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0".to_owned(),
                "get_my_kvsname" => "cmd=my_kvsname kvsname=kvs_7".to_owned(),
                "put" => {
                    let (key, value) = (word(&line, "key").unwrap(), word(&line, "value").unwrap());
                    assert!(value.len() < 1024 && key.len() < 64 && line.contains("kvsname=kvs_7"));
                    values.lock().unwrap().insert(key.to_owned(), value.to_owned());
                    "cmd=put_result rc=0 msg=success".to_owned()
                }
                "barrier_in" => {
                    all.wait();
                    "cmd=barrier_out".to_owned()
                }
                "get" => match values.lock().unwrap().get(word(&line, "key").unwrap()) {
                    Some(value) => format!("cmd=get_result rc=0 msg=success value={value}"),
                    None => "cmd=get_result rc=-1 msg=key_not_found".to_owned(),
                },
                other => panic!("{other}"),
            };
            std::io::Write::write_all(&mut out, format!("{answer}\n").as_bytes()).unwrap();
        }
    }

    #[test]
    fn what_rank_zero_says_is_heard_by_all() {
        let (values, all) = (Arc::default(), Arc::new(Barrier::new(3)));
        let ranks: Vec<_> = (0..3u32)
            .map(|rank| {
                let (ours, theirs) = UnixStream::pair().unwrap();
                let (values, all) = (Arc::clone(&values), Arc::clone(&all));
                std::thread::spawn(move || serve(theirs, values, all));
                std::thread::spawn(move || {
                    let said = |epoch: u32| -> Vec<u8> { (0..1500).map(|i| (i * 7 + epoch) as u8).collect() };
                    for epoch in [0, 1] {
                        let tell = announce(ours.as_raw_fd(), rank, Epoch(epoch), Duration::from_secs(20));
                        let words = if rank == 0 { said(epoch) } else { Vec::new() };
                        assert_eq!(tell(words).unwrap(), said(epoch));
                    }
                })
            })
            .collect();
        ranks.into_iter().for_each(|rank| rank.join().unwrap());
    }

    #[test]
    fn a_launcher_that_does_not_answer_is_not_waited_for_for_ever() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let tell = announce(ours.as_raw_fd(), 1, Epoch(0), Duration::from_millis(200));
        let error = tell(Vec::new()).unwrap_err().to_string();
        assert!(error.contains("CAROLE_START_TIMEOUT_S"), "{error}");
        drop(theirs);
        assert!(tell(Vec::new()).unwrap_err().to_string().contains("PMI"));
        assert!(announce(987_654, 1, Epoch(0), Duration::from_millis(200))(Vec::new()).is_err());
    }
}
