//! Memory that processes share: unnamed, committed when it is made, and sealed so that nobody can take it away
//! from under the others.

use crate::error::Cause;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

fn seals() -> SealFlags {
    SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL
}

fn system(what: &str, error: rustix::io::Errno) -> Cause {
    Cause::System(format!("{what}: {error}"))
}

/// Makes `bytes` bytes of it, zeroed but for `words` in front.
pub fn create(name: &str, bytes: usize, words: &[u64]) -> Result<OwnedFd, Cause> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create(name, flags).map_err(|e| system("memfd_create", e))?;
    // Committed here, where a full memory is an error; later it would be a SIGBUS.
    rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, bytes as u64).map_err(|e| {
        Cause::System(format!(
            "shared memory exhausted: {bytes} bytes could not be committed ({e}); free memory, raise the limit \
             of its control group, or set CAROLE_TRANSPORT=tcp"
        ))
    })?;
    let head: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    match rustix::io::pwrite(&fd, &head, 0) {
        Ok(n) if n == head.len() => {}
        Ok(n) => return Err(Cause::System(format!("shared memory took {n} of {} bytes", head.len()))),
        Err(e) => return Err(system("writing shared memory", e)),
    }
    rustix::fs::fcntl_add_seals(&fd, seals()).map_err(|e| system("sealing shared memory", e))?;
    Ok(fd)
}

/// Maps it, after making sure that it is as long as it should be and sealed.
pub fn map(fd: &OwnedFd, bytes: usize) -> Result<NonNull<u8>, Cause> {
    let refuse = |why: &str| Err(Cause::Misbehaved(format!("shared memory that {why}")));
    let stat = rustix::fs::fstat(fd).map_err(|e| system("looking at shared memory", e))?;
    if stat.st_size != bytes as i64 {
        return refuse(&format!("is {} bytes long instead of {bytes}", stat.st_size));
    }
    // Not sealed (or no memfd at all): it could be truncated under our feet.
    match rustix::fs::fcntl_get_seals(fd) {
        Ok(has) if has.contains(seals()) => {}
        Ok(_) | Err(_) => return refuse("is not sealed"),
    }
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::POPULATE);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, prot, flags, fd, 0) };
    let base = base.map_err(|e| system("mapping shared memory", e))?;
    // A forked child has no business here, and would keep the memory alive after its parent's end.
    // SAFETY: the whole of the mapping that was just made.
    unsafe { rustix::mm::madvise(base, bytes, Advice::LinuxDontFork) }
        .map_err(|e| system("keeping shared memory from forked children", e))?;
    NonNull::new(base.cast()).ok_or_else(|| Cause::System("shared memory was mapped at address 0".to_owned()))
}

/// Ends a mapping.
///
/// # Safety
/// `base` must come from [`map`] with the same length, and all borrows of it must have ended.
pub unsafe fn unmap(base: NonNull<u8>, bytes: usize) {
    // SAFETY: the caller's promise.
    let _ = unsafe { rustix::mm::munmap(base.as_ptr().cast(), bytes) };
}
