//! Waiting on many descriptors: epoll, with numbers of our own for them.
#![forbid(unsafe_code)]

use rustix::event::{Timespec, epoll};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// What is watched. Level-triggered.
pub struct Reactor {
    epoll: OwnedFd,
}

/// Events taken at one time; the rest come with the next wait.
const EVENTS_MAX: usize = 64;

impl Reactor {
    /// Watches nothing yet.
    pub fn new() -> io::Result<Reactor> {
        Ok(Reactor { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)? })
    }

    /// Watches `source` under this number. Hang-ups are always told.
    pub fn add(&self, source: &impl AsFd, number: u64, write: bool) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, source, epoll::EventData::new_u64(number), interest(write))?)
    }

    /// Changes whether room to write matters.
    pub fn change(&self, source: &impl AsFd, number: u64, write: bool) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, source, epoll::EventData::new_u64(number), interest(write))?)
    }

    /// Watches `source` no longer. (Closing the last descriptor of it does the same.)
    pub fn remove(&self, source: &impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, source)?)
    }

    /// Waits until something is ready or `deadline` has come, and lists the numbers of what is ready.
    pub fn wait(&self, deadline: Option<Instant>, numbers: &mut Vec<u64>) -> io::Result<()> {
        numbers.clear();
        let mut ready = [MaybeUninit::<epoll::Event>::uninit(); EVENTS_MAX];
        let timeout = deadline.map(|deadline| timespec(deadline.saturating_duration_since(Instant::now())));
        match epoll::wait(&self.epoll, &mut ready, timeout.as_ref()) {
            Ok((ready, _)) => numbers.extend(ready.iter().map(|event| event.data.u64())),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }
}

fn interest(write: bool) -> epoll::EventFlags {
    if write { epoll::EventFlags::IN | epoll::EventFlags::OUT } else { epoll::EventFlags::IN }
}

/// A time to wait, rounded up to a millisecond so that a deadline has passed when the wait ends, and bounded
/// so that no kernel refuses it.
#[must_use]
pub fn timespec(wait: Duration) -> Timespec {
    let ms = wait.as_micros().div_ceil(1000).min(60_000) as i64;
    Timespec { tv_sec: ms / 1000, tv_nsec: (ms % 1000) * 1_000_000 }
}
