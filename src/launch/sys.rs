//! The system calls of the launcher for which neither the standard library nor rustix has a safe face.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// What `fork` returns.
pub enum Fork {
    /// In the parent: the child's process id.
    Parent(i32),
    /// In the child.
    Child,
}

/// Copies this process. The child must end by [`exit_now`].
pub fn fork() -> io::Result<Fork> {
    // SAFETY: the launcher forks before it starts threads of its own, so no lock of ours is held by a thread
    // that does not exist in the child; glibc keeps its allocator usable after fork.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(pid)),
    }
}

/// Ends the process without exit hooks: in a forked child these belong to the parent.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Signals that are read from a descriptor instead of being delivered. Dropping it restores the mask of the
/// thread that made it.
pub struct Signals {
    file: File,
    before: libc::sigset_t,
}

impl Signals {
    /// Blocks these signals on this thread (and those that it will start) and opens a descriptor for them.
    pub fn block(signals: &[i32]) -> io::Result<Signals> {
        // SAFETY: an all-zero sigset_t is a valid object for sigemptyset to overwrite, and all pointers are to
        // locals that live through the calls.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in signals {
                libc::sigaddset(&raw mut set, *signal);
            }
            let errno = libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, &raw mut before);
            if errno != 0 {
                return Err(io::Error::from_raw_os_error(errno));
            }
            let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                let error = io::Error::last_os_error();
                libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
                return Err(error);
            }
            Ok(Signals { file: File::from(OwnedFd::from_raw_fd(fd)), before })
        }
    }

    /// The next signal that has arrived, if any.
    pub fn next(&self) -> Option<i32> {
        let mut record = [0; size_of::<libc::signalfd_siginfo>()];
        match (&self.file).read(&mut record) {
            // The number is the first field, ssi_signo.
            Ok(n) if n == record.len() => {
                Some(i32::from_ne_bytes([record[0], record[1], record[2], record[3]]))
            }
            _ => None,
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // Signals that came too late to be read must not be delivered to a caller (Python, say) that never
        // asked for them.
        while self.next().is_some() {}
        // SAFETY: `before` was filled by pthread_sigmask.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut());
        }
    }
}

/// The limit of open files of this process: (soft, hard).
pub fn open_files_limit() -> (u64, u64) {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    (limit.current.unwrap_or(u64::MAX), limit.maximum.unwrap_or(u64::MAX))
}

/// Sets the soft limit of open files, as far as the hard limit allows.
pub fn set_open_files_limit(soft: u64) {
    let (_, hard) = open_files_limit();
    let limit = rustix::process::Rlimit { current: Some(soft.min(hard)), maximum: Some(hard) };
    // When it is refused, the call that needs the descriptors says so.
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
}

/// Prepares a rank: it dies with its parent (this process), leads a process group of its own, has no signal
/// blocked, the given limit of open files, and inherits the descriptor `secret`.
pub fn prepare_rank(command: &mut Command, secret: &OwnedFd, open_files: u64) {
    let parent = rustix::process::getpid().as_raw_nonzero().get();
    let secret: RawFd = secret.as_raw_fd();
    command.process_group(0);
    // SAFETY: the closure only makes system calls that are safe between fork and exec; it allocates nothing
    // and takes no lock.
    unsafe {
        command.pre_exec(move || {
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            // Between fork and prctl the parent may have died, and then no signal will ever come.
            if libc::getppid() != parent {
                libc::_exit(137);
            }
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            check(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit))?;
            limit.rlim_cur = limit.rlim_max.min(open_files);
            check(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit))?;
            check(libc::fcntl(secret, libc::F_SETFD, 0))
        });
    }
}

/// Prepares an ssh client: it dies with its parent (this thread), has no signal blocked, and leads a process group of
/// its own, so that Ctrl-C on a terminal reaches the launcher alone.
pub fn prepare_client(command: &mut Command) {
    let parent = rustix::process::getpid().as_raw_nonzero().get();
    command.process_group(0);
    // SAFETY: the closure only makes system calls that are safe between fork and exec; it allocates nothing
    // and takes no lock.
    unsafe {
        command.pre_exec(move || {
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            if libc::getppid() != parent {
                libc::_exit(137);
            }
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
            Ok(())
        });
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Shows this process under another name in ps and to killall.
pub fn set_process_name(name: &std::ffi::CStr) {
    // SAFETY: the name is a C string; the kernel copies it.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
    }
}

/// Whether orphaned descendants become children of this process (instead of init's).
pub fn set_subreaper(on: bool) {
    // SAFETY: a flag of this process; no memory is involved. Kernels since 3.4 know it.
    unsafe {
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, libc::c_ulong::from(on));
    }
}

/// The name of a signal, with its SIG.
pub fn signal_name(signal: i32) -> String {
    let names = [
        (libc::SIGHUP, "SIGHUP"),
        (libc::SIGINT, "SIGINT"),
        (libc::SIGQUIT, "SIGQUIT"),
        (libc::SIGILL, "SIGILL"),
        (libc::SIGTRAP, "SIGTRAP"),
        (libc::SIGABRT, "SIGABRT"),
        (libc::SIGBUS, "SIGBUS"),
        (libc::SIGFPE, "SIGFPE"),
        (libc::SIGKILL, "SIGKILL"),
        (libc::SIGUSR1, "SIGUSR1"),
        (libc::SIGSEGV, "SIGSEGV"),
        (libc::SIGUSR2, "SIGUSR2"),
        (libc::SIGPIPE, "SIGPIPE"),
        (libc::SIGALRM, "SIGALRM"),
        (libc::SIGTERM, "SIGTERM"),
        (libc::SIGXCPU, "SIGXCPU"),
        (libc::SIGXFSZ, "SIGXFSZ"),
        (libc::SIGSYS, "SIGSYS"),
    ];
    let known = names.iter().find(|(number, _)| *number == signal);
    known.map_or_else(|| format!("signal {signal}"), |(_, name)| (*name).to_string())
}
