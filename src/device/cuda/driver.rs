//! The CUDA driver as owned objects. It is loaded when it is first asked for; where there is none, that is an
//! error value with the reason.

use super::launch::{Args, THREADS};
use crate::error::Cause;
use cudarc::driver::sys::{self, CUresult};
use std::ffi::{CStr, CString, c_void};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;
use std::sync::{Arc, OnceLock};

/// Why there is no driver to work with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Unavailable {
    /// No libcuda.
    NoLibrary,
    /// It is there, but does not start.
    NotStarted(String),
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unavailable::NoLibrary => f.write_str(
                "CUDA tensors need the NVIDIA driver, whose libcuda.so.1 is not found; in a container, start it \
                 with its GPUs (--gpus all)",
            ),
            Unavailable::NotStarted(words) => {
                write!(f, "the NVIDIA driver does not start ({words}); nvidia-smi tells more")
            }
        }
    }
}

/// A call of the driver that failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    call: &'static str,
    code: Option<CUresult>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            Some(code) => write!(f, "{}: {code:?}", self.call),
            None => write!(f, "{}: this driver does not have it; one of CUDA 12.0 (525) does", self.call),
        }
    }
}

impl From<Fault> for Cause {
    fn from(fault: Fault) -> Cause {
        Cause::System(format!("CUDA: {fault}"))
    }
}

/// Calls the driver; whatever is not success is a [`Fault`], a missing function too, for which the bindings
/// panic. The caller's `unsafe` vouches for the arguments.
macro_rules! call {
    ($name:ident($($argument:expr),* $(,)?)) => {
        $crate::device::cuda::driver::guarded(stringify!($name), || cudarc::driver::sys::$name($($argument),*))
    };
}
pub(super) use call;

pub(super) fn guarded(call: &'static str, f: impl FnOnce() -> CUresult) -> Result<(), Fault> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(CUresult::CUDA_SUCCESS) => Ok(()),
        Ok(code) => Err(Fault { call, code: Some(code) }),
        Err(_) => Err(Fault { call, code: None }),
    }
}

/// The driver's version (12040 is 12.4), or why there is none. Loads it; makes no context on any device.
pub fn version() -> Result<i32, Unavailable> {
    static FOUND: OnceLock<Result<i32, Unavailable>> = OnceLock::new();
    FOUND
        .get_or_init(|| {
            // SAFETY: looks for a library by name; loading libcuda runs nothing but its initialisers.
            if !catch_unwind(|| unsafe { sys::is_culib_present() }).unwrap_or(false) {
                return Err(Unavailable::NoLibrary);
            }
            let mut version = 0;
            // SAFETY: takes flags that must be 0, and a place for a number.
            let started = unsafe { call!(cuInit(0)).and_then(|()| call!(cuDriverGetVersion(&mut version))) };
            started.map(|()| version).map_err(|fault| Unavailable::NotStarted(fault.to_string()))
        })
        .clone()
}

/// The primary context of one device, which CUDA's runtime (and so torch) uses too. Made only for a device that
/// already holds the user's memory, so that none is made on another by accident.
#[derive(Debug)]
pub struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
}

// SAFETY: the driver's objects may be used from any thread.
unsafe impl Send for Context {}
// SAFETY: as above; a context is made current for each use.
unsafe impl Sync for Context {}

/// While it lives, a context is this thread's current one; afterwards what was current is again.
#[derive(Debug)]
pub struct Entered<'a>(std::marker::PhantomData<(&'a Context, *const ())>);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut popped = null_mut();
        // SAFETY: pops what `enter` pushed on this thread, which the guard cannot leave. A driver that has shut
        // down refuses, and then nothing is current.
        let _ = unsafe { call!(cuCtxPopCurrent_v2(&mut popped)) };
    }
}

impl Context {
    /// The number of the device that `address` lies on; none when it is no device memory.
    pub fn number_of(address: u64) -> Result<Option<i32>, Cause> {
        version().map_err(|why| Cause::System(why.to_string()))?;
        let (mut kind, mut ordinal) = (0u32, 0i32);
        // SAFETY: each attribute is written to a variable of its type; any address may be asked about.
        let found = unsafe {
            let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
            let asked = call!(cuPointerGetAttribute((&raw mut kind).cast(), attribute, address));
            match asked {
                // What the driver has never heard of is ordinary memory.
                Err(Fault { code: Some(CUresult::CUDA_ERROR_INVALID_VALUE), .. }) => return Ok(None),
                other => other?,
            }
            let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
            call!(cuPointerGetAttribute((&raw mut ordinal).cast(), attribute, address))
        };
        if kind != sys::CUmemorytype_enum::CU_MEMORYTYPE_DEVICE as u32 {
            return Ok(None);
        }
        found?;
        Ok(Some(ordinal))
    }

    /// The number of the device whose context this thread has entered; none where it has entered none.
    pub fn current_number() -> Option<i32> {
        version().ok()?;
        let mut number = 0;
        // SAFETY: the result is written to a variable of ours.
        unsafe { call!(cuCtxGetDevice(&mut number)) }.ok()?;
        Some(number)
    }

    /// The context of a device that the user has named; makes it where nobody has yet.
    pub fn of_device(ordinal: i32) -> Result<Context, Cause> {
        version().map_err(|why| Cause::System(why.to_string()))?;
        let (mut device, mut raw) = (0, null_mut());
        // SAFETY: results are written to variables of ours; the context is released in `drop`.
        unsafe {
            call!(cuDeviceGet(&mut device, ordinal))?;
            call!(cuDevicePrimaryCtxRetain(&mut raw, device))?;
        }
        Ok(Context { device, raw })
    }

    /// Makes it this thread's current context for a while.
    pub fn enter(&self) -> Result<Entered<'_>, Fault> {
        // SAFETY: the context is retained for as long as `self` lives.
        unsafe { call!(cuCtxPushCurrent_v2(self.raw))? };
        Ok(Entered(std::marker::PhantomData))
    }

    /// The device's multiprocessors.
    pub fn multiprocessors(&self) -> Result<u32, Fault> {
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let mut count = 0;
        // SAFETY: a number of this device.
        unsafe { call!(cuDeviceGetAttribute(&mut count, attribute, self.device))? };
        Ok(count.max(1) as u32)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once in `of_device`.
        let _ = unsafe { call!(cuDevicePrimaryCtxRelease_v2(self.device)) };
    }
}

/// A stream of our own, which does not wait for the default stream.
#[derive(Debug)]
pub struct Stream {
    pub(super) raw: sys::CUstream,
    context: Arc<Context>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Stream {}

impl Stream {
    /// A stream of the highest priority: collectives are what others wait for.
    pub fn new(context: &Arc<Context>) -> Result<Stream, Fault> {
        let _current = context.enter()?;
        let (mut least, mut greatest, mut raw) = (0, 0, null_mut());
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: results are written to variables of ours; the stream is destroyed in `drop`.
        unsafe {
            call!(cuCtxGetStreamPriorityRange(&mut least, &mut greatest))?;
            call!(cuStreamCreateWithPriority(&mut raw, flags, greatest))?;
        }
        Ok(Stream { raw, context: context.clone() })
    }

    /// The stream waits for what `event` has recorded; the host does not.
    pub fn wait(&self, event: &Event) -> Result<(), Fault> {
        // SAFETY: both are alive.
        unsafe { call!(cuStreamWaitEvent(self.raw, event.raw, 0)) }
    }

    /// Launches a kernel; the context must be current.
    ///
    /// # Safety
    /// The addresses in `args` must be the device's to read and write until the launch is over.
    pub unsafe fn launch(&self, function: Function, grid: u32, args: &mut Args) -> Result<(), Fault> {
        let mut parameters = [(args as *mut Args).cast::<c_void>()];
        let parameters = parameters.as_mut_ptr();
        // SAFETY: every kernel takes one `Args`, which is copied before the call returns; the rest is the
        // caller's promise.
        unsafe {
            call!(cuLaunchKernel(function.0, grid, 1, 1, THREADS, 1, 1, 0, self.raw, parameters, null_mut()))
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let Ok(_current) = self.context.enter() else { return };
        // SAFETY: created in `new`; what it still has to do is done all the same.
        let _ = unsafe { call!(cuStreamDestroy_v2(self.raw)) };
    }
}

/// A point of a stream.
#[derive(Debug)]
pub struct Event {
    pub(super) raw: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Event {}
// SAFETY: as for `Context`; recording, asking and waiting leave the handle as it is.
unsafe impl Sync for Event {}

impl Event {
    /// An event; with `shared`, one that another process can open.
    pub fn new(context: &Arc<Context>, shared: bool) -> Result<Event, Fault> {
        let _current = context.enter()?;
        let mut flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        if shared {
            flags |= sys::CUevent_flags::CU_EVENT_INTERPROCESS as u32;
        }
        let mut raw = null_mut();
        // SAFETY: the result is written to a variable of ours; the event is destroyed in `drop`.
        unsafe { call!(cuEventCreate(&mut raw, flags))? };
        Ok(Event { raw, context: context.clone() })
    }

    /// Takes over an event that the driver gave for `context`.
    pub(super) fn adopt(context: &Arc<Context>, raw: sys::CUevent) -> Event {
        Event { raw, context: context.clone() }
    }

    /// Marks what the stream has been given so far.
    ///
    /// # Safety
    /// `stream` must be alive; 0 is the default stream.
    pub unsafe fn record(&self, stream: sys::CUstream) -> Result<(), Fault> {
        let _current = self.context.enter()?;
        // SAFETY: the caller's promise.
        unsafe { call!(cuEventRecord(self.raw, stream)) }
    }

    /// Whether the stream has come past the mark.
    pub fn is_over(&self) -> Result<bool, Fault> {
        // SAFETY: the event is alive.
        match unsafe { call!(cuEventQuery(self.raw)) } {
            Ok(()) => Ok(true),
            Err(Fault { code: Some(CUresult::CUDA_ERROR_NOT_READY), .. }) => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    /// Blocks the host until the stream has come past the mark.
    pub fn block(&self) -> Result<(), Fault> {
        // SAFETY: the event is alive.
        unsafe { call!(cuEventSynchronize(self.raw)) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let Ok(_current) = self.context.enter() else { return };
        // SAFETY: created or opened once.
        let _ = unsafe { call!(cuEventDestroy_v2(self.raw)) };
    }
}

/// A kernel of a module that stays loaded for as long as its device is used.
#[derive(Clone, Copy, Debug)]
pub struct Function(sys::CUfunction);

// SAFETY: a name within the context.
unsafe impl Send for Function {}

/// A module, translated by the driver for this device when it is loaded.
#[derive(Debug)]
pub struct LoadedModule {
    raw: sys::CUmodule,
    context: Arc<Context>,
}

// SAFETY: as for `Context`.
unsafe impl Send for LoadedModule {}

impl LoadedModule {
    /// Loads PTX.
    pub fn load(context: &Arc<Context>, ptx: &CStr) -> Result<LoadedModule, Fault> {
        let _current = context.enter()?;
        let mut raw = null_mut();
        // SAFETY: a terminated text; the module is unloaded in `drop`.
        unsafe { call!(cuModuleLoadData(&mut raw, ptx.as_ptr().cast()))? };
        Ok(LoadedModule { raw, context: context.clone() })
    }

    /// One of its kernels.
    pub fn function(&self, name: &str) -> Result<Function, Fault> {
        let name = CString::new(name).expect("kernels are named by the table");
        let mut raw = null_mut();
        // SAFETY: an open module and a terminated name.
        unsafe { call!(cuModuleGetFunction(&mut raw, self.raw, name.as_ptr()))? };
        Ok(Function(raw))
    }
}

impl Drop for LoadedModule {
    fn drop(&mut self) {
        let Ok(_current) = self.context.enter() else { return };
        // SAFETY: loaded once; the owner drops it after the stream that ran its kernels.
        let _ = unsafe { call!(cuModuleUnload(self.raw)) };
    }
}

/// Whether a stream is being captured into a graph, where our events and queries are not allowed.
///
/// # Safety
/// `stream` must be alive; 0 is the default stream.
pub(super) unsafe fn is_capturing(stream: sys::CUstream) -> Result<bool, Fault> {
    let mut status = sys::CUstreamCaptureStatus_enum::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: the caller's promise.
    unsafe { call!(cuStreamIsCapturing(stream, &mut status))? };
    Ok(status != sys::CUstreamCaptureStatus_enum::CU_STREAM_CAPTURE_STATUS_NONE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absence_is_an_error_value() {
        if std::path::Path::new("/dev/nvidiactl").exists() {
            eprintln!("skipped: this machine has a driver, whose absence cannot be tried");
            return;
        }
        let why = version().expect_err("no driver is here");
        assert!(why.to_string().contains("driver"), "{why}");
        let cause = Context::number_of(0x1000).expect_err("no driver is here");
        assert!(cause.to_string().contains("driver"), "{cause}");
    }

    #[test]
    fn a_missing_function_is_a_fault() {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let fault = guarded("cuNew", || panic!("Missing symbol")).expect_err("it panicked");
        std::panic::set_hook(hook);
        assert!(fault.to_string().contains("does not have it"), "{fault}");
        let fault = guarded("cuOld", || CUresult::CUDA_ERROR_OUT_OF_MEMORY).expect_err("it failed");
        assert_eq!(fault.to_string(), "cuOld: CUDA_ERROR_OUT_OF_MEMORY");
    }
}
