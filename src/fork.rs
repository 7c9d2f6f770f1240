//! What a forked child must not inherit. A data loader that is forked from a rank would keep the rank's
//! connections open, and the rank's death would go unseen; so a child closes them, and learns that it is one.

use std::os::fd::RawFd;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, Ordering};

const NONE: i32 = -1;
/// Descriptors that can be known at a time; those beyond are left to the child.
const KNOWN_MAX: usize = 4096;

static KNOWN: [AtomicI32; KNOWN_MAX] = [const { AtomicI32::new(NONE) }; KNOWN_MAX];
static FLAG: AtomicPtr<AtomicBool> = AtomicPtr::new(std::ptr::null_mut());
static ONCE: Once = Once::new();

/// Sets `flag` in every child that this process forks from now on, and closes there what [`own`] knows.
pub fn watch(flag: &'static AtomicBool) {
    FLAG.store(std::ptr::from_ref(flag).cast_mut(), Ordering::SeqCst);
    ONCE.call_once(|| {
        // SAFETY: the handler only touches atomics and calls close, which is async-signal-safe.
        let code = unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        assert_eq!(code, 0, "only a lack of memory makes pthread_atfork fail");
    });
}

/// This descriptor is closed in forked children.
pub fn own(fd: RawFd) {
    for slot in &KNOWN {
        if slot.compare_exchange(NONE, fd, Ordering::SeqCst, Ordering::Relaxed).is_ok() {
            return;
        }
    }
}

/// This descriptor is about to be closed here; its number may come to stand for something else.
pub fn disown(fd: RawFd) {
    for slot in &KNOWN {
        if slot.compare_exchange(fd, NONE, Ordering::SeqCst, Ordering::Relaxed).is_ok() {
            return;
        }
    }
}

extern "C" fn in_child() {
    let flag = FLAG.load(Ordering::SeqCst);
    if !flag.is_null() {
        // SAFETY: `watch` was given a static.
        unsafe { (*flag).store(true, Ordering::SeqCst) };
    }
    for slot in &KNOWN {
        let fd = slot.swap(NONE, Ordering::SeqCst);
        if fd != NONE {
            // SAFETY: the child's copy of a descriptor that no code runs on in the child.
            unsafe { libc::close(fd) };
        }
    }
}
