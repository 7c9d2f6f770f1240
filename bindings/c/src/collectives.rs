//! Collectives: each once waited for and once as a handle, on one tensor or a group of them.

use crate::abi::*;
use crate::convert::{self, DEFAULTS, put, sized, slice, text};
use crate::handles::deliver;
use crate::output::carole_output;
use crate::status::enter;
use runtime::error::{Error, Result};
use runtime::runtime::{self as core, Completion, Handle, Persistent, Request, TensorArg};
use runtime::types::{Collective, Rank, Scale, SetId};

/// Fills a struct of options with its defaults and its size. CAROLE_OPTIONS_INIT calls it.
///
/// # Safety
/// `options` holds `struct_size` bytes that can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_options_init(options: *mut carole_options, struct_size: usize) -> i32 {
    enter(|| {
        if options.is_null() || struct_size < size_of::<usize>() {
            return Err(Error::usage("options is NULL, or smaller than its own size field"));
        }
        let defaults = carole_options { struct_size, ..DEFAULTS };
        let bytes = struct_size.min(size_of::<carole_options>());
        // SAFETY: both hold at least `bytes` bytes, and a local does not overlap with the caller's memory.
        unsafe {
            std::ptr::copy_nonoverlapping((&raw const defaults).cast::<u8>(), options.cast::<u8>(), bytes);
        }
        Ok(())
    })
}

/// What a call of C's announces, before it is checked.
pub(crate) struct Call {
    pub(crate) collective: Collective,
    pub(crate) tensors: *const carole_tensor,
    pub(crate) count: usize,
    pub(crate) splits: *const u64,
    pub(crate) split_count: usize,
    pub(crate) options: *const carole_options,
}

impl Call {
    fn new(
        collective: Collective,
        tensors: *const carole_tensor,
        count: usize,
        options: *const carole_options,
    ) -> Call {
        Call { collective, tensors, count, splits: std::ptr::null(), split_count: 0, options }
    }

    /// Submits. What is wrong with the options concerns this rank alone; what is wrong with a tensor is
    /// announced, so that the other ranks do not wait for this one for ever.
    unsafe fn submit(&self) -> Result<Handle> {
        // SAFETY: as of both.
        unsafe { self.announce(|request| core::submit(request, None)) }
    }

    /// Plans; the same holds.
    pub(crate) unsafe fn plan(&self) -> Result<Persistent> {
        // SAFETY: as of both.
        unsafe { self.announce(|request| core::plan(request, None)) }
    }

    unsafe fn announce<T>(&self, submit: impl FnOnce(&Request<'_>) -> Result<T>) -> Result<T> {
        // SAFETY: the caller's promise.
        let options = unsafe { sized(self.options, DEFAULTS, "carole_options") }?;
        // SAFETY: the caller's promise.
        let name = unsafe { text(options.name, "the name of an operation") }?;
        let base = Request {
            name,
            set: SetId(options.process_set),
            collective: self.collective,
            op: convert::op(options.op)?,
            scale: Scale { pre: options.prescale, post: options.postscale },
            root: Rank(options.root),
            join_average: convert::join_average(options.join_average)?,
            stream: convert::stream(&options)?,
            ..Request::default()
        };
        // SAFETY: the caller's promise.
        match unsafe { self.tensors() } {
            Ok((tensors, splits)) => submit(&Request { tensors: &tensors, splits, ..base }),
            // A refused request has no buffers.
            Err(error) => submit(&Request { refused: Some(&error.to_string()), ..base }),
        }
    }

    unsafe fn tensors<'a>(&self) -> Result<(Vec<TensorArg<'a>>, &'a [u64])> {
        // SAFETY: the caller's promise.
        let given = unsafe { slice(self.tensors, self.count, "tensors") }?;
        // SAFETY: the caller's promise.
        let tensors = given.iter().map(|tensor| unsafe { convert::tensor(tensor) }).collect::<Result<_>>()?;
        // SAFETY: the caller's promise.
        Ok((tensors, unsafe { slice(self.splits, self.split_count, "splits") }?))
    }

    unsafe fn start(&self, handle: *mut u64) -> i32 {
        enter(|| {
            if handle.is_null() {
                return Err(Error::usage(
                    "handle is NULL; an operation without a handle cannot be waited for",
                ));
            }
            // SAFETY: the caller's promise.
            let submitted = unsafe { self.submit() }?;
            // SAFETY: the caller's promise.
            unsafe { put(handle, submitted.0, "handle") }
        })
    }

    unsafe fn run(&self, output: *mut *mut carole_output) -> i32 {
        // SAFETY: the caller's promise.
        enter(|| unsafe {
            let running = self.announce(|request| core::run(request, || None))?;
            deliver(Completion { result: running.outcome(), keep: None }, output)
        })
    }
}

/// Every rank gets the reduction of all inputs.
/// Waits for the end. `tensors` is one tensor or a group, which completes or fails as a unit. `options` may
/// be NULL for the defaults. `output` may be NULL when every tensor has a place for its output; else it gets
/// what carole_output_free must be called on.
///
/// # Safety
/// `tensors` holds `count` elements whose pointers are valid; `options` and `output` are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_allreduce(
    tensors: *const carole_tensor,
    count: usize,
    options: *const carole_options,
    output: *mut *mut carole_output,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { Call::new(Collective::Allreduce, tensors, count, options).run(output) }
}

/// As carole_allreduce, but returns at once with a handle, to be given to carole_wait or carole_release. The
/// buffers are the engine's until there is an outcome.
///
/// # Safety
/// As carole_allreduce, until there is an outcome; `handle` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_allreduce_async(
    tensors: *const carole_tensor,
    count: usize,
    options: *const carole_options,
    handle: *mut u64,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { Call::new(Collective::Allreduce, tensors, count, options).start(handle) }
}

/// Every rank gets all inputs, joined along the first dimension, which may differ.
/// Waits for the end. `tensors` is one tensor or a group, which completes or fails as a unit. `options` may
/// be NULL for the defaults. `output` may be NULL when every tensor has a place for its output; else it gets
/// what carole_output_free must be called on.
///
/// # Safety
/// `tensors` holds `count` elements whose pointers are valid; `options` and `output` are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_allgather(
    tensors: *const carole_tensor,
    count: usize,
    options: *const carole_options,
    output: *mut *mut carole_output,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { Call::new(Collective::Allgather, tensors, count, options).run(output) }
}

/// As carole_allgather, but returns at once with a handle, to be given to carole_wait or carole_release. The
/// buffers are the engine's until there is an outcome.
///
/// # Safety
/// As carole_allgather, until there is an outcome; `handle` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_allgather_async(
    tensors: *const carole_tensor,
    count: usize,
    options: *const carole_options,
    handle: *mut u64,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { Call::new(Collective::Allgather, tensors, count, options).start(handle) }
}

/// Every rank gets the root's tensor; all ranks give the same shape.
/// Waits for the end. `tensors` is one tensor or a group, which completes or fails as a unit. `options` may
/// be NULL for the defaults. `output` may be NULL when every tensor has a place for its output; else it gets
/// what carole_output_free must be called on.
///
/// # Safety
/// `tensors` holds `count` elements whose pointers are valid; `options` and `output` are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_broadcast(
    tensors: *const carole_tensor,
    count: usize,
    options: *const carole_options,
    output: *mut *mut carole_output,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { Call::new(Collective::Broadcast, tensors, count, options).run(output) }
}

/// As carole_broadcast, but returns at once with a handle, to be given to carole_wait or carole_release. The
/// buffers are the engine's until there is an outcome.
///
/// # Safety
/// As carole_broadcast, until there is an outcome; `handle` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_broadcast_async(
    tensors: *const carole_tensor,
    count: usize,
    options: *const carole_options,
    handle: *mut u64,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { Call::new(Collective::Broadcast, tensors, count, options).start(handle) }
}

/// Every rank gets its rows of the reduction; the lower ranks get one row more.
/// Waits for the end. `tensors` is one tensor or a group, which completes or fails as a unit. `options` may
/// be NULL for the defaults. `output` may be NULL when every tensor has a place for its output; else it gets
/// what carole_output_free must be called on.
///
/// # Safety
/// `tensors` holds `count` elements whose pointers are valid; `options` and `output` are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_reducescatter(
    tensors: *const carole_tensor,
    count: usize,
    options: *const carole_options,
    output: *mut *mut carole_output,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { Call::new(Collective::Reducescatter, tensors, count, options).run(output) }
}

/// As carole_reducescatter, but returns at once with a handle, to be given to carole_wait or carole_release. The
/// buffers are the engine's until there is an outcome.
///
/// # Safety
/// As carole_reducescatter, until there is an outcome; `handle` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_reducescatter_async(
    tensors: *const carole_tensor,
    count: usize,
    options: *const carole_options,
    handle: *mut u64,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { Call::new(Collective::Reducescatter, tensors, count, options).start(handle) }
}

/// Rank j gets the j-th split of every rank's rows. `splits` holds the rows for each member, for each tensor
/// one after another; `split_count` 0 means equal splits.
/// Waits for the end. `tensors` is one tensor or a group, which completes or fails as a unit. `options` may
/// be NULL for the defaults. `output` may be NULL when every tensor has a place for its output; else it gets
/// what carole_output_free must be called on.
///
/// # Safety
/// `tensors` holds `count` elements whose pointers are valid; `options` and `output` are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_alltoall(
    tensors: *const carole_tensor,
    count: usize,
    splits: *const u64,
    split_count: usize,
    options: *const carole_options,
    output: *mut *mut carole_output,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        (Call { splits, split_count, ..Call::new(Collective::Alltoall, tensors, count, options) }).run(output)
    }
}

/// As carole_alltoall, but returns at once with a handle, to be given to carole_wait or carole_release. The
/// buffers are the engine's until there is an outcome.
///
/// # Safety
/// As carole_alltoall, until there is an outcome; `handle` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_alltoall_async(
    tensors: *const carole_tensor,
    count: usize,
    splits: *const u64,
    split_count: usize,
    options: *const carole_options,
    handle: *mut u64,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        (Call { splits, split_count, ..Call::new(Collective::Alltoall, tensors, count, options) })
            .start(handle)
    }
}

/// The root gets the reduction.
/// Waits for the end. `tensors` is one tensor or a group, which completes or fails as a unit. `options` may
/// be NULL for the defaults. `output` may be NULL when every tensor has a place for its output; else it gets
/// what carole_output_free must be called on.
///
/// # Safety
/// `tensors` holds `count` elements whose pointers are valid; `options` and `output` are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_reduce(
    tensors: *const carole_tensor,
    count: usize,
    options: *const carole_options,
    output: *mut *mut carole_output,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { Call::new(Collective::Reduce, tensors, count, options).run(output) }
}

/// As carole_reduce, but returns at once with a handle, to be given to carole_wait or carole_release. The
/// buffers are the engine's until there is an outcome.
///
/// # Safety
/// As carole_reduce, until there is an outcome; `handle` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_reduce_async(
    tensors: *const carole_tensor,
    count: usize,
    options: *const carole_options,
    handle: *mut u64,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { Call::new(Collective::Reduce, tensors, count, options).start(handle) }
}

/// The root gets all inputs, joined along the first dimension, which may differ.
/// Waits for the end. `tensors` is one tensor or a group, which completes or fails as a unit. `options` may
/// be NULL for the defaults. `output` may be NULL when every tensor has a place for its output; else it gets
/// what carole_output_free must be called on.
///
/// # Safety
/// `tensors` holds `count` elements whose pointers are valid; `options` and `output` are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_gather(
    tensors: *const carole_tensor,
    count: usize,
    options: *const carole_options,
    output: *mut *mut carole_output,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { Call::new(Collective::Gather, tensors, count, options).run(output) }
}

/// As carole_gather, but returns at once with a handle, to be given to carole_wait or carole_release. The
/// buffers are the engine's until there is an outcome.
///
/// # Safety
/// As carole_gather, until there is an outcome; `handle` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_gather_async(
    tensors: *const carole_tensor,
    count: usize,
    options: *const carole_options,
    handle: *mut u64,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { Call::new(Collective::Gather, tensors, count, options).start(handle) }
}

/// Every rank gets its rows of the root's tensor; the lower ranks get one row more. All ranks give the root's
/// shape; only the root's input is read.
/// Waits for the end. `tensors` is one tensor or a group, which completes or fails as a unit. `options` may
/// be NULL for the defaults. `output` may be NULL when every tensor has a place for its output; else it gets
/// what carole_output_free must be called on.
///
/// # Safety
/// `tensors` holds `count` elements whose pointers are valid; `options` and `output` are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_scatter(
    tensors: *const carole_tensor,
    count: usize,
    options: *const carole_options,
    output: *mut *mut carole_output,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { Call::new(Collective::Scatter, tensors, count, options).run(output) }
}

/// As carole_scatter, but returns at once with a handle, to be given to carole_wait or carole_release. The
/// buffers are the engine's until there is an outcome.
///
/// # Safety
/// As carole_scatter, until there is an outcome; `handle` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_scatter_async(
    tensors: *const carole_tensor,
    count: usize,
    options: *const carole_options,
    handle: *mut u64,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { Call::new(Collective::Scatter, tensors, count, options).start(handle) }
}

/// No rank leaves before all members of the process set have entered. Of `options`, which may be NULL, the
/// name and the process set count.
///
/// # Safety
/// `options` is NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_barrier(options: *const carole_options) -> i32 {
    let call = Call::new(Collective::Barrier, std::ptr::null(), 0, options);
    // SAFETY: the caller's promise.
    unsafe { call.run(std::ptr::null_mut()) }
}

/// As carole_barrier, but returns at once with a handle.
///
/// # Safety
/// `options` is NULL or valid; `handle` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_barrier_async(options: *const carole_options, handle: *mut u64) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { Call::new(Collective::Barrier, std::ptr::null(), 0, options).start(handle) }
}

/// Says that this rank has no more data. What the others still run goes on with the identity of each
/// operation in its place; returns when all members have joined. `last` (may be NULL) gets the last rank to
/// join. Of `options`, which may be NULL, the process set counts.
///
/// # Safety
/// `options` is NULL or valid; `last` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_join(options: *const carole_options, last: *mut i64) -> i32 {
    let call = Call::new(Collective::Join, std::ptr::null(), 0, options);
    enter(|| {
        // SAFETY: the caller's promise.
        let handle = unsafe { call.submit() }?;
        let outcome = core::wait(handle, None).result?;
        if last.is_null() {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { put(last, outcome.last_joined.map_or(-1, |rank| i64::from(rank.0)), "last") }
    })
}

/// As carole_join, but returns at once with a handle; carole_output_last_joined tells the last rank.
///
/// # Safety
/// `options` is NULL or valid; `handle` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_join_async(options: *const carole_options, handle: *mut u64) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { Call::new(Collective::Join, std::ptr::null(), 0, options).start(handle) }
}

/// Any of the collectives by its code (CAROLE_ALLREDUCE and so on), for programs that choose at run time.
/// `splits` is for alltoall only.
///
/// # Safety
/// As carole_allreduce_async; `splits` holds `split_count` elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_submit(
    collective: u32,
    tensors: *const carole_tensor,
    count: usize,
    splits: *const u64,
    split_count: usize,
    options: *const carole_options,
    handle: *mut u64,
) -> i32 {
    let mut checked = None;
    let status = enter(|| {
        checked = Some(convert::collective(collective)?);
        Ok(())
    });
    match checked {
        // SAFETY: the caller's promise.
        Some(collective) => unsafe {
            Call { collective, tensors, count, splits, split_count, options }.start(handle)
        },
        None => status,
    }
}
