//! The eventfd that ends a process's sleep.
#![forbid(unsafe_code)]

use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

/// One eventfd per process, watched together with the sockets; peers on the same host hold a copy of it.
#[derive(Clone, Debug)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    /// A new one, closed on exec.
    pub fn new() -> io::Result<Waker> {
        Ok(Waker(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }
    /// What to watch for readability.
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.0.as_raw_fd()
    }
    /// Ends the sleep, or the next one.
    pub fn wake(&self) {
        wake(self.0.as_fd());
    }
    /// Forgets earlier wakes.
    pub fn clear(&self) {
        let mut count = [0u8; 8];
        // The only error is that there was no wake to forget.
        let _ = rustix::io::read(&*self.0, &mut count);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Wakes whoever watches this eventfd.
pub(crate) fn wake(eventfd: BorrowedFd<'_>) {
    // A counter that is full (EAGAIN) wakes as well as any other.
    let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    fn readable(waker: &Waker) -> bool {
        let mut fds = [PollFd::new(waker, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    #[test]
    fn wakes_and_clears() {
        let waker = Waker::new().unwrap();
        assert!(!readable(&waker));
        waker.clone().wake();
        waker.wake();
        assert!(readable(&waker));
        waker.clear();
        assert!(!readable(&waker));
        waker.clear();
    }
}
