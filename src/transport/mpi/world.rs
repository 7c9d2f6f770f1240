//! This process in MPI: initialised once, for all epochs, by the thread that will finalise it.

use super::port::Port;
use super::service::Service;
use super::slot::{check, sweep};
use super::window::Window;
use crate::error::{Cause, Error, Result};
use mpi::environment::{
    Universe, initialize_with_threading, is_initialized, library_version, threading_support,
};
use mpi::{Threading, ffi};
use rustix::event::{Timespec, poll};
use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The largest tag that every MPI has.
const TAG_MAX: i32 = 32_767;
/// What rank 0 can tell the others before there are links.
const TOLD_BYTES_MAX: usize = 64 << 10;
/// Between two looks at whether all ranks have come.
const MEETING_NAP_NS: i64 = 200_000;
/// How long a closed port is looked after for the peer's last word.
const CLOSING_KEPT: Duration = Duration::from_secs(30);
/// How long the end of the process waits for such words.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A communicator. MPI's handles are addresses in some implementations and numbers in others.
pub struct Handle(pub ffi::MPI_Comm);

// SAFETY: a handle is a name; who may use it in calls, and when, is `World`'s business.
unsafe impl Send for Handle {}
// SAFETY: as above; it never changes.
unsafe impl Sync for Handle {}

/// How many threads may call MPI.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Threads {
    /// Whoever drives the engine: `MPI_THREAD_MULTIPLE`.
    #[default]
    Many,
    /// One of our own: `MPI_THREAD_FUNNELED`.
    One,
}

/// Who calls MPI.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Callers {
    Anybody,
    OneAtATime,
    /// The thread that initialised it.
    Pinned,
}

/// What was found when MPI was initialised.
struct Started {
    comm: Handle,
    rank: u32,
    size: u32,
    callers: Callers,
}

/// This process's part in `MPI_COMM_WORLD`.
pub struct World {
    started: Started,
    service: Service,
    turn: Mutex<()>,
    /// Memory of the ranks of this host; none where they share none.
    window: OnceLock<Option<Window>>,
    /// Ports that are closed, since when, and whose peers have not closed theirs.
    closing: Mutex<Vec<(Arc<Mutex<Port>>, Instant)>>,
    /// The largest tag.
    pub tag_max: i32,
}

static WORLD: OnceLock<World> = OnceLock::new();
static START: Mutex<()> = Mutex::new(());
/// An epoch broke: `MPI_Finalize` would wait for ranks that are no more.
static BROKE: AtomicBool = AtomicBool::new(false);
/// MPI is finalised, or about to be.
static OVER: AtomicBool = AtomicBool::new(false);
/// Pipes that are open.
static PIPES: AtomicUsize = AtomicUsize::new(0);
/// Ports that are closed and looked after.
static CLOSING: AtomicUsize = AtomicUsize::new(0);
/// The process that initialised MPI; its forked children did not.
static OWNER: AtomicU32 = AtomicU32::new(0);

/// Whether nobody may call MPI any more.
pub fn is_over() -> bool {
    OVER.load(Ordering::SeqCst)
}

/// An epoch has broken: MPI is not finalised when this process ends.
pub fn broke() {
    BROKE.store(true, Ordering::SeqCst);
}

/// The library that this program is linked with, as it calls itself.
#[must_use]
pub fn library() -> String {
    let words = library_version().unwrap_or_else(|_| "MPI".to_owned());
    words.split(['\n', ',']).next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// This process's part in MPI, which is initialised at the first call. All processes of the job must call; `limit`
/// is how long they wait for each other.
///
/// # Errors
/// The program has initialised MPI for fewer threads, or finalised it; the others did not come.
pub fn join(threads: Threads, limit: Duration) -> Result<&'static World> {
    let _start = START.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(world) = WORLD.get() {
        return Ok(world);
    }
    let service = Service::start().map_err(|e| Error::usage(format!("no thread for MPI: {e}")))?;
    let started = service.run(move |ours| start(ours, threads, limit))?;
    let world = World {
        started,
        service,
        turn: Mutex::new(()),
        window: OnceLock::new(),
        closing: Mutex::default(),
        tag_max: TAG_MAX,
    };
    OWNER.store(std::process::id(), Ordering::SeqCst);
    let world = WORLD.get_or_init(|| world);
    world.service.serve(world);
    // SAFETY: the hook is a function that stays, and takes no argument.
    if unsafe { libc::atexit(at_exit) } != 0 {
        return Err(Error::usage("the C library takes no more exit hooks"));
    }
    Ok(world)
}

/// On the thread that calls MPI.
fn start(ours: &mut Option<Universe>, threads: Threads, limit: Duration) -> Result<Started> {
    let mut over: c_int = 0;
    // SAFETY: it may be asked at any time.
    if unsafe { ffi::MPI_Finalized(&mut over) } == ffi::MPI_SUCCESS as c_int && over != 0 {
        return Err(Error::usage(
            "the program has finalised MPI; call init() before that, or use another transport",
        ));
    }
    let wanted = if threads == Threads::One { Threading::Funneled } else { Threading::Multiple };
    let callers = match initialize_with_threading(wanted) {
        Some((universe, level)) => {
            *ours = Some(universe);
            match level {
                Threading::Multiple => Callers::Anybody,
                Threading::Serialized => Callers::OneAtATime,
                Threading::Funneled | Threading::Single => Callers::Pinned,
            }
        }
        None if is_initialized() && threading_support() == Threading::Multiple => Callers::Anybody,
        None => return Err(too_few_threads()),
    };
    let failed = |cause: Cause| Error::usage(format!("MPI does not work here: {cause}"));
    let (mut rank, mut size): (c_int, c_int) = (0, 0);
    let comm = {
        // SAFETY: MPI is initialised, and this thread may call it.
        let (world, codes) = unsafe {
            let world = ffi::RSMPI_COMM_WORLD;
            let codes = [ffi::MPI_Comm_rank(world, &mut rank), ffi::MPI_Comm_size(world, &mut size)];
            (world, codes)
        };
        codes.into_iter().try_for_each(check).map_err(failed)?;
        duplicate(Handle(world), Instant::now() + limit)?
    };
    let count = |n: c_int| u32::try_from(n).map_err(|_| Error::usage("MPI counts ranks below zero"));
    Ok(Started { comm, rank: count(rank)?, size: count(size)?, callers })
}

fn too_few_threads() -> Error {
    Error::usage(format!(
        "the program has initialised MPI with {:?}, but Carole's threads need MPI_THREAD_MULTIPLE: initialise it with \
         MPI_Init_thread(.., MPI_THREAD_MULTIPLE, ..) (in Python: mpi4py.rc.thread_level = \"multiple\" before \
         importing mpi4py.MPI), or call init() of Carole before MPI is initialised",
        threading_support()
    ))
}

/// A communicator of the same processes, on which nobody else sends and whose errors come back.
fn duplicate(of: Handle, deadline: Instant) -> Result<Handle> {
    let failed = |cause: Cause| Error::usage(format!("MPI does not work here: {cause}"));
    let copy = Box::into_raw(Box::new(of.0));
    let mut request = std::mem::MaybeUninit::<ffi::MPI_Request>::uninit();
    // SAFETY: `copy` is freed only when the request is complete; else it stays for ever.
    check(unsafe { ffi::MPI_Comm_idup(of.0, copy, request.as_mut_ptr()) }).map_err(failed)?;
    // SAFETY: MPI has written it, for it succeeded.
    complete(unsafe { request.assume_init() }, deadline)?;
    // SAFETY: it came from a box, and MPI has finished with it.
    let copy = unsafe { *Box::from_raw(copy) };
    // SAFETY: the duplicate is complete.
    check(unsafe { ffi::MPI_Comm_set_errhandler(copy, ffi::RSMPI_ERRORS_RETURN) }).map_err(failed)?;
    Ok(Handle(copy))
}

/// Waits until a collective request is complete. After an error MPI may still use what the request uses.
fn complete(mut request: ffi::MPI_Request, deadline: Instant) -> Result<()> {
    loop {
        let mut over: c_int = 0;
        // SAFETY: an active request; the status is not asked for.
        let code = unsafe { ffi::MPI_Test(&mut request, &mut over, ffi::RSMPI_STATUS_IGNORE) };
        check(code).map_err(|cause| Error::usage(format!("the ranks could not meet over MPI: {cause}")))?;
        if over != 0 {
            return Ok(());
        }
        if Instant::now() >= deadline {
            broke();
            return Err(Error::usage(
                "some ranks of the MPI job did not call init() within the start timeout (CAROLE_START_TIMEOUT_S)",
            ));
        }
        let _ = poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: MEETING_NAP_NS }));
    }
}

impl World {
    /// This process, as MPI counts.
    #[must_use]
    pub fn rank(&self) -> u32 {
        self.started.rank
    }

    /// All processes.
    #[must_use]
    pub fn size(&self) -> u32 {
        self.started.size
    }

    pub(super) fn comm(&self) -> &Handle {
        &self.started.comm
    }

    /// Whether only one thread calls MPI.
    pub(super) fn is_pinned(&self) -> bool {
        self.started.callers == Callers::Pinned
    }

    /// Held around calls of MPI, where they must not overlap.
    pub(super) fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        let needed = self.started.callers == Callers::OneAtATime;
        needed.then(|| self.turn.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// There is something to do for the thread that calls MPI.
    pub(super) fn look(&self) {
        self.service.look();
    }

    /// Opens a port.
    pub(super) fn adopt(&self, port: &Arc<Mutex<Port>>) -> std::result::Result<(), Cause> {
        PIPES.fetch_add(1, Ordering::SeqCst);
        if self.is_pinned() {
            return self.service.adopt(port);
        }
        let _turn = self.turn();
        port.lock().unwrap_or_else(PoisonError::into_inner).open()
    }

    /// Closes a port. `clean`: the peer lives, as far as is known, and will close its own.
    pub(super) fn release(&self, port: &Arc<Mutex<Port>>, clean: bool) {
        port.lock().unwrap_or_else(PoisonError::into_inner).closed = Some(clean);
        if self.is_pinned() {
            self.service.look();
        } else if !is_over() {
            let _turn = self.turn();
            self.close(port);
        }
        PIPES.fetch_sub(1, Ordering::SeqCst);
    }

    /// The calls of MPI that closing a port takes.
    pub(super) fn close(&self, port: &Arc<Mutex<Port>>) {
        let mut open = port.lock().unwrap_or_else(PoisonError::into_inner);
        open.close();
        if open.closed == Some(true) {
            self.closing().push((Arc::clone(port), Instant::now()));
            CLOSING.fetch_add(1, Ordering::Relaxed);
        }
        sweep();
    }

    fn closing(&self) -> MutexGuard<'_, Vec<(Arc<Mutex<Port>>, Instant)>> {
        self.closing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks after ports that are closed here and not at the peer's.
    pub(super) fn tend(&self) {
        if CLOSING.load(Ordering::Relaxed) == 0 || self.is_pinned() {
            return;
        }
        let _turn = self.turn();
        self.tend_closing();
    }

    /// The same, for who may call MPI and has the turn.
    pub(super) fn tend_closing(&self) {
        let mut closing = self.closing();
        closing.retain(|(port, since)| {
            let mut port = port.lock().unwrap_or_else(PoisonError::into_inner);
            !port.pump_closed() && since.elapsed() < CLOSING_KEPT
        });
        CLOSING.store(closing.len(), Ordering::Relaxed);
    }

    /// Lets lanes within a host use memory that its ranks share, from now on; with `writes`, this process's own, too.
    /// All processes of the job must call; `limit` is how long they wait for each other.
    ///
    /// # Errors
    /// The others did not come. Where MPI has no such memory, lanes send messages.
    pub fn share(&'static self, writes: bool, limit: Duration) -> Result<()> {
        if self.window.get().is_some() {
            return Ok(());
        }
        let opened = self.service.run(move |_| {
            let _turn = self.turn();
            let mut request = std::mem::MaybeUninit::<ffi::MPI_Request>::uninit();
            // SAFETY: the communicator lives as long as the process.
            let code = unsafe { ffi::MPI_Ibarrier(self.started.comm.0, request.as_mut_ptr()) };
            check(code)
                .map_err(|cause| Error::usage(format!("the ranks could not meet over MPI: {cause}")))?;
            // What follows blocks: it must not begin before all have come.
            // SAFETY: MPI has written it, for it succeeded.
            complete(unsafe { request.assume_init() }, Instant::now() + limit)?;
            let Started { comm, rank, size, .. } = &self.started;
            Ok(Window::open(comm, *rank as c_int, *size, writes).ok().flatten())
        })?;
        // Only one thread initialises at a time.
        let _ = self.window.set(opened);
        Ok(())
    }

    pub(super) fn window(&self) -> Option<&Window> {
        self.window.get()?.as_ref()
    }

    /// What rank 0 says, on all ranks. All must call; `words` counts on rank 0.
    pub fn tell(&'static self, words: Vec<u8>, limit: Duration) -> Result<Vec<u8>> {
        if words.len() > TOLD_BYTES_MAX {
            return Err(Error::usage("too much to tell over MPI"));
        }
        self.service.run(move |_| {
            let deadline = Instant::now() + limit;
            let _turn = self.turn();
            let len = self.broadcast(&(words.len() as u64).to_le_bytes(), deadline)?;
            let len = <[u8; 8]>::try_from(len).map_or(u64::MAX, u64::from_le_bytes);
            if len > TOLD_BYTES_MAX as u64 {
                return Err(Error::usage(
                    "rank 0 of the MPI job tells too much; do all ranks run the same version?",
                ));
            }
            let mut bytes = words;
            bytes.resize(len as usize, 0);
            self.broadcast(&bytes, deadline)
        })
    }

    /// These bytes, as rank 0 has them.
    fn broadcast(&self, bytes: &[u8], deadline: Instant) -> Result<Vec<u8>> {
        let n = bytes.len();
        let address = Box::into_raw(bytes.to_vec().into_boxed_slice());
        let mut request = std::mem::MaybeUninit::<ffi::MPI_Request>::uninit();
        // SAFETY: the bytes are freed only when the request is complete; else they stay for ever.
        let code = unsafe {
            let (kind, comm) = (ffi::RSMPI_UINT8_T, self.started.comm.0);
            ffi::MPI_Ibcast(address.cast(), n as c_int, kind, 0, comm, request.as_mut_ptr())
        };
        check(code).map_err(|cause| Error::usage(format!("the ranks could not meet over MPI: {cause}")))?;
        // SAFETY: MPI has written it, for it succeeded.
        complete(unsafe { request.assume_init() }, deadline)?;
        // SAFETY: it came from a box, and MPI has finished with it.
        Ok(unsafe { Box::from_raw(address) }.into_vec())
    }
}

/// Finalises MPI, where that is for Carole to do and all went well.
extern "C" fn at_exit() {
    let ours = OWNER.load(Ordering::SeqCst) == std::process::id();
    if !ours || BROKE.load(Ordering::SeqCst) || PIPES.load(Ordering::SeqCst) > 0 {
        return;
    }
    if let Some(world) = WORLD.get() {
        // The panic of a thread that is no more must not leave a C function.
        let _ = std::panic::catch_unwind(|| {
            world.service.run(move |ours| {
                // A message that nobody has taken makes some MPIs complain.
                let deadline = Instant::now() + LAST_WORDS;
                loop {
                    world.tend_closing();
                    if CLOSING.load(Ordering::Relaxed) == 0 || Instant::now() >= deadline {
                        break;
                    }
                    let _ = poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: MEETING_NAP_NS }));
                }
                sweep();
                OVER.store(true, Ordering::SeqCst);
                drop(ours.take());
            })
        });
    }
}
