//! Memory that processes share: unnamed, committed when it is made, and sealed so that nobody can take it away
//! from under the others.

use crate::error::Cause;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags};
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

fn seals() -> SealFlags {
    SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL
}

fn system(what: &str, error: rustix::io::Errno) -> Cause {
    Cause::System(format!("{what}: {error}"))
}

/// Makes `bytes` bytes of it, zeroed but for `words` in front, and behind them address space for up to `more`, of
/// which only what [`commit`] names is memory. Without the latter where files must not be so long.
pub fn create(name: &str, bytes: usize, more: usize, words: &[u64]) -> Result<OwnedFd, Cause> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create(name, flags).map_err(|e| system("memfd_create", e))?;
    commit(&fd, 0, bytes)?;
    // A file above the limit would end the process with a signal.
    let longest = rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
    if more > 0 && longest.is_none_or(|longest| longest >= (bytes + more) as u64) {
        let length = (bytes + more) as u64;
        rustix::fs::ftruncate(&fd, length).map_err(|e| system("reserving shared memory", e))?;
    }
    let head: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    match rustix::io::pwrite(&fd, &head, 0) {
        Ok(n) if n == head.len() => {}
        Ok(n) => return Err(Cause::System(format!("shared memory took {n} of {} bytes", head.len()))),
        Err(e) => return Err(system("writing shared memory", e)),
    }
    rustix::fs::fcntl_add_seals(&fd, seals()).map_err(|e| system("sealing shared memory", e))?;
    Ok(fd)
}

/// Makes memory of `bytes` bytes from `at` on: here a full memory is an error; later it would be a SIGBUS.
pub fn commit(fd: &OwnedFd, at: usize, bytes: usize) -> Result<(), Cause> {
    rustix::fs::fallocate(fd, FallocateFlags::empty(), at as u64, bytes as u64).map_err(|e| {
        Cause::System(format!(
            "shared memory exhausted: {bytes} bytes could not be committed ({e}); free memory, raise the limit \
             of its control group, or set CAROLE_TRANSPORT=tcp"
        ))
    })
}

/// Gives memory back to the system; it reads as zeros when it is used again.
pub fn discard(fd: &OwnedFd, at: usize, bytes: usize) {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    // Where that cannot be it stays memory, which is used again or ends with the process.
    let _ = rustix::fs::fallocate(fd, flags, at as u64, bytes as u64);
}

/// Makes private memory of a part of a mapping, at the same address and with the same values.
///
/// # Safety
/// The bytes must lie in a mapping of [`map`], in whole pages, and nobody in this process may write them meanwhile.
pub unsafe fn detach(start: *mut u8, bytes: usize) -> Result<(), Cause> {
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let copy = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, prot, flags) }
        .map_err(|e| system("private memory for a tensor", e))?;
    // SAFETY: the copy is as long and apart. Moving it replaces the part of the shared mapping in one step, so that
    // whoever reads it sees its values at any time.
    let moved = unsafe {
        std::ptr::copy_nonoverlapping(start.cast_const(), copy.cast(), bytes);
        rustix::mm::mremap_fixed(copy, bytes, bytes, MremapFlags::MAYMOVE, start.cast())
    };
    moved.map(drop).map_err(|e| {
        // SAFETY: nobody knows the copy.
        let _ = unsafe { rustix::mm::munmap(copy, bytes) };
        system("moving private memory", e)
    })
}

/// Gives the memory of a detached part back to the system.
///
/// # Safety
/// The bytes were given to [`detach`], and nobody uses them any more.
pub unsafe fn empty(start: *mut u8, bytes: usize) {
    // SAFETY: the caller's promise. Where it cannot be it stays memory until the process ends.
    let _ = unsafe { rustix::mm::madvise(start.cast(), bytes, Advice::LinuxDontNeed) };
}

/// Whether forked children get a part of a mapping. Best effort: a child that misses it is told so by its fault.
///
/// # Safety
/// The bytes must lie in a mapping of [`map`], in whole pages.
pub unsafe fn set_inherited(start: *mut u8, bytes: usize, inherited: bool) {
    let advice = if inherited { Advice::LinuxDoFork } else { Advice::LinuxDontFork };
    // SAFETY: it changes no byte.
    let _ = unsafe { rustix::mm::madvise(start.cast(), bytes, advice) };
}

/// Takes the page faults of committed memory at once.
///
/// # Safety
/// The bytes must lie in a mapping of [`map`], at a multiple of the page size, and be nobody else's.
pub unsafe fn populate(start: *mut u8, bytes: usize) {
    // SAFETY: the caller's promise. An older kernel refuses; then the faults come one by one, as they would.
    let _ = unsafe { rustix::mm::madvise(start.cast(), bytes, Advice::LinuxPopulateWrite) };
}

/// A free address for a mapping whose places differ from the same places of other such mappings in bits 12 to 17, and in
/// none of bits 18 to 27; null where there is none.
///
/// The first-level cache of AMD's processors looks a line up by a hash of bits 12 to 27 of its address (Lipp et al., "Take
/// A Way", AsiaCCS 2020, section 3), and keeps one line of each hash in a set. Ranks that take the same tensors of their
/// boards have them at the same places there; where the boards' addresses have the same hash, too, reading two of them in
/// step misses the cache each time: 44 to 74 us instead of 12 for 512 KiB of each (Zen 4).
fn apart(len: usize) -> *mut std::ffi::c_void {
    const HASHED_BYTES: usize = 1 << 28;
    const PLACES: usize = 64;
    const PAGE_BYTES: usize = 4096;
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let (room, flags) = (len + HASHED_BYTES + PLACES * PAGE_BYTES, MapFlags::PRIVATE | MapFlags::NORESERVE);
    // SAFETY: a new mapping at an address of the kernel's choice, which nobody uses before it is given back.
    let found = unsafe {
        let found = rustix::mm::mmap_anonymous(std::ptr::null_mut(), room, ProtFlags::empty(), flags);
        found.and_then(|start| rustix::mm::munmap(start, room).map(|()| start))
    };
    let place = NEXT.fetch_add(1, Ordering::Relaxed) % PLACES * PAGE_BYTES;
    found.map_or(std::ptr::null_mut(), |start| {
        start.with_addr(start.addr().next_multiple_of(HASHED_BYTES) + place)
    })
}

/// Maps it, after making sure that it is as long as it should be (without the address space for `more`, if its maker
/// could not have it) and sealed. Returns what is mapped: all of it, or the first `bytes` where a process may not have
/// so much address space.
pub fn map(fd: &OwnedFd, bytes: usize, more: usize) -> Result<(NonNull<u8>, usize), Cause> {
    let refuse = |why: &str| Err(Cause::Misbehaved(format!("shared memory that {why}")));
    let stat = rustix::fs::fstat(fd).map_err(|e| system("looking at shared memory", e))?;
    let length = stat.st_size as usize;
    if length != bytes && length != bytes + more {
        return refuse(&format!("is {} bytes long instead of {bytes}", stat.st_size));
    }
    // Not sealed (or no memfd at all): it could be truncated under our feet.
    match rustix::fs::fcntl_get_seals(fd) {
        Ok(has) if has.contains(seals()) => {}
        Ok(_) | Err(_) => return refuse("is not sealed"),
    }
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    let hint = if more > 0 { apart(length) } else { std::ptr::null_mut() };
    // SAFETY: a new mapping where there is none, at the hint or an address of the kernel's choice.
    let whole = |len| unsafe { rustix::mm::mmap(hint, len, prot, flags, fd, 0) };
    let (base, len) = match whole(length) {
        Ok(base) => (base, length),
        Err(_) => (whole(bytes).map_err(|e| system("mapping shared memory", e))?, bytes),
    };
    // What is memory already is mapped once more in its place, with all its pages at once.
    let flags = flags | MapFlags::FIXED | MapFlags::POPULATE;
    // SAFETY: it replaces the beginning of the mapping that was just made, which nobody knows yet.
    unsafe { rustix::mm::mmap(base, bytes, prot, flags, fd, 0) }
        .map_err(|e| system("mapping shared memory", e))?;
    // A forked child has no business here, and would keep the memory alive after its parent's end.
    // SAFETY: the whole of the mapping that was just made.
    unsafe { rustix::mm::madvise(base, len, Advice::LinuxDontFork) }
        .map_err(|e| system("keeping shared memory from forked children", e))?;
    let base = NonNull::new(base.cast())
        .ok_or_else(|| Cause::System("shared memory was mapped at address 0".to_owned()))?;
    Ok((base, len))
}

/// Ends a mapping.
///
/// # Safety
/// `base` must come from [`map`] with the same length, and all borrows of it must have ended.
pub unsafe fn unmap(base: NonNull<u8>, bytes: usize) {
    // SAFETY: the caller's promise.
    let _ = unsafe { rustix::mm::munmap(base.as_ptr().cast(), bytes) };
}
