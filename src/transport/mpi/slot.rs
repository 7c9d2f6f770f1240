//! Memory that MPI may be reading or writing: a buffer with the request that uses it.

use super::cause_of;
use super::world::{Handle, is_over};
use crate::error::Cause;
use mpi::ffi;
use std::alloc::Layout;
use std::ffi::{c_char, c_int};
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

const PAGE_BYTES: usize = 4096;
const LINE_BYTES: usize = 64;

/// Requests that nobody waits for any more, with the memory that they use.
static ABANDONED: Mutex<Vec<Slot>> = Mutex::new(Vec::new());
static ABANDONED_COUNT: AtomicUsize = AtomicUsize::new(0);

/// A buffer, and perhaps a send or a receive of it.
pub struct Slot {
    /// `size` bytes. Raw, because MPI holds the address while the slot moves.
    buffer: NonNull<u8>,
    size: usize,
    /// Whether they are the slot's own allocation (see [`layout`]).
    owned: bool,
    request: Option<ffi::MPI_Request>,
    receives: bool,
}

// SAFETY: the buffer is owned, and a request is a name that any thread may use which may call MPI at all; who
// that is, `Port` and `World` see to.
unsafe impl Send for Slot {}

impl Slot {
    /// A buffer of so many bytes.
    pub fn new(size: usize) -> Slot {
        let layout = layout(size);
        // SAFETY: the layout is not of size 0.
        let buffer = unsafe { std::alloc::alloc_zeroed(layout) };
        let Some(buffer) = NonNull::new(buffer) else { std::alloc::handle_alloc_error(layout) };
        Slot { buffer, size, owned: true, request: None, receives: false }
    }

    /// A part of a window, which is never sent itself.
    ///
    /// # Safety
    /// So many bytes are there as long as the process, and nobody else writes them while they are this slot's turn.
    pub unsafe fn within(buffer: NonNull<u8>, size: usize) -> Slot {
        Slot { buffer, size, owned: false, request: None, receives: false }
    }

    /// The bytes, which are the owner's as long as no request uses them.
    pub fn bytes(&self) -> &[u8] {
        assert!(self.request.is_none(), "MPI uses these bytes");
        // SAFETY: there are `size` initialised bytes, and no request uses them.
        unsafe { std::slice::from_raw_parts(self.buffer.as_ptr(), self.size) }
    }

    /// The same, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        assert!(self.request.is_none(), "MPI uses these bytes");
        // SAFETY: as above, and the slot is borrowed for as long.
        unsafe { std::slice::from_raw_parts_mut(self.buffer.as_ptr(), self.size) }
    }

    /// Starts to send the first `n` bytes.
    pub fn send(&mut self, comm: &Handle, n: usize, to: i32, tag: i32) -> Result<(), Cause> {
        assert!(self.owned && self.request.is_none() && n <= self.size, "a slot is sent once at a time");
        let mut request = std::mem::MaybeUninit::<ffi::MPI_Request>::uninit();
        // SAFETY: the buffer outlives the request: it is freed only when there is none (see `drop`).
        let code = unsafe {
            let address = self.buffer.as_ptr().cast();
            let kind = ffi::RSMPI_UINT8_T;
            ffi::MPI_Isend(address, n as c_int, kind, to, tag, comm.0, request.as_mut_ptr())
        };
        check(code)?;
        // SAFETY: MPI has written it, for it succeeded.
        self.request = Some(unsafe { request.assume_init() });
        self.receives = false;
        Ok(())
    }

    /// Posts a receive into the whole buffer.
    pub fn receive(&mut self, comm: &Handle, from: i32, tag: i32) -> Result<(), Cause> {
        assert!(self.request.is_none(), "a slot is received into once at a time");
        let mut request = std::mem::MaybeUninit::<ffi::MPI_Request>::uninit();
        // SAFETY: as in `send`; and nobody else looks at the bytes while there is a request.
        let code = unsafe {
            let address = self.buffer.as_ptr().cast();
            let kind = ffi::RSMPI_UINT8_T;
            ffi::MPI_Irecv(address, self.size as c_int, kind, from, tag, comm.0, request.as_mut_ptr())
        };
        check(code)?;
        // SAFETY: MPI has written it, for it succeeded.
        self.request = Some(unsafe { request.assume_init() });
        self.receives = true;
        Ok(())
    }

    /// Whether the request is complete, and then how many bytes were received (0 for a send).
    pub fn test(&mut self) -> Result<Option<usize>, Cause> {
        let Some(request) = &mut self.request else { return Ok(Some(0)) };
        let mut over: c_int = 0;
        let mut status = std::mem::MaybeUninit::<ffi::MPI_Status>::uninit();
        // SAFETY: the request is one that MPI has given and that was not completed.
        let code = unsafe { ffi::MPI_Test(request, &mut over, status.as_mut_ptr()) };
        if let Err(cause) = check(code) {
            // It is over, too: MPI has set it to null.
            self.request = None;
            return Err(cause);
        }
        if over == 0 {
            return Ok(None);
        }
        self.request = None;
        let mut count: c_int = 0;
        if self.receives {
            // SAFETY: a test that found an end has written the status.
            check(unsafe { ffi::MPI_Get_count(status.as_ptr(), ffi::RSMPI_UINT8_T, &mut count) })?;
        }
        // A receive that was cancelled has no count.
        Ok(Some(usize::try_from(count).unwrap_or(0)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(request) = &mut self.request {
            // MPI may still use the bytes. Once it is finalised nobody can ask any more, and they stay.
            if is_over() {
                return;
            }
            if self.receives {
                // SAFETY: an active request. Whether it could be cancelled its completion tells.
                let _ = unsafe { ffi::MPI_Cancel(request) };
            }
            let slot = Slot {
                buffer: self.buffer,
                size: self.size,
                owned: self.owned,
                request: self.request.take(),
                receives: self.receives,
            };
            ABANDONED.lock().unwrap_or_else(PoisonError::into_inner).push(slot);
            ABANDONED_COUNT.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if self.owned {
            // SAFETY: it was allocated with this layout, and neither MPI nor anybody else holds it.
            unsafe { std::alloc::dealloc(self.buffer.as_ptr(), layout(self.size)) };
        }
    }
}

/// How a slot's own memory lies: on as few pages as it can, since MPI copies page by page.
fn layout(size: usize) -> Layout {
    let align = if size >= PAGE_BYTES { PAGE_BYTES } else { LINE_BYTES };
    Layout::from_size_align(size.max(1), align).expect("a slot is far smaller than all memory")
}

/// Frees what abandoned requests have let go.
pub fn sweep() {
    if ABANDONED_COUNT.load(Ordering::Relaxed) == 0 {
        return;
    }
    let mut abandoned = ABANDONED.lock().unwrap_or_else(PoisonError::into_inner);
    // One that failed is over as well.
    abandoned.retain_mut(|slot| matches!(slot.test(), Ok(None)));
    ABANDONED_COUNT.store(abandoned.len(), Ordering::Relaxed);
}

/// An error code of MPI as a cause, in MPI's own words.
pub fn check(code: c_int) -> Result<(), Cause> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut len: c_int = 0;
    // SAFETY: the text has as many bytes as MPI asks for.
    let told = unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &mut len) };
    let len = if told == ffi::MPI_SUCCESS as c_int { len.clamp(0, text.len() as c_int) as usize } else { 0 };
    let words = String::from_utf8_lossy(&text[..len]).trim().to_owned();
    Err(cause_of(if words.is_empty() { "an error without words" } else { &words }))
}
