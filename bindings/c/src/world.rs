//! Life cycle, and who this process is.

use crate::abi::*;
use crate::convert::{sized, slice, text};
use crate::status::enter;
use runtime::error::{Error, Result};
use runtime::runtime as core;
use runtime::types::Rank;
use std::ffi::c_char;

/// The version of the interface that this library offers; compare it with CAROLE_ABI_VERSION.
#[unsafe(no_mangle)]
pub extern "C" fn carole_abi_version() -> u32 {
    CAROLE_ABI_VERSION
}

/// The version of the library, "0.1.0" say.
#[unsafe(no_mangle)]
pub extern "C" fn carole_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// Joins the job, or starts one of size 1 when no variables are set. `options` may be NULL: everything then
/// comes from the environment. Does nothing when called again with the same options. Waits until all ranks
/// have come. Calls of carole_init and carole_shutdown from several threads are taken one after another.
///
/// # Safety
/// `options` is NULL or as its declaration says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_init(options: *const carole_init_options) -> i32 {
    enter(|| {
        // SAFETY: the caller's promise.
        let options = unsafe { start_options(options) }?;
        core::init(&options)
    })
}

unsafe fn start_options(given: *const carole_init_options) -> Result<core::Options> {
    let none = carole_init_options {
        struct_size: size_of::<carole_init_options>(),
        knobs: std::ptr::null(),
        knob_count: 0,
        process_sets: std::ptr::null(),
        process_set_count: 0,
    };
    // SAFETY: the caller's promise.
    let given = unsafe { sized(given, none, "carole_init_options") }?;
    let mut options = core::Options::default();
    // SAFETY: the caller's promise.
    for knob in unsafe { slice(given.knobs, given.knob_count, "knobs") }? {
        // SAFETY: the caller's promise.
        let (name, value) =
            unsafe { (text(knob.name, "a knob's name")?, text(knob.value, "a knob's value")?) };
        let (Some(name), Some(value)) = (name, value) else {
            return Err(Error::usage("a knob has a NULL name or value"));
        };
        options.knobs.push((name.to_owned(), value.to_owned()));
    }
    // SAFETY: the caller's promise.
    for set in unsafe { slice(given.process_sets, given.process_set_count, "process_sets") }? {
        // SAFETY: the caller's promise.
        let ranks = unsafe { slice(set.ranks, set.count, "the ranks of a process set") }?;
        options.process_sets.push(ranks.iter().copied().map(Rank).collect());
    }
    quiet_unless_asked(&mut options);
    Ok(options)
}

/// A library that a C program links against does not write to its standard error by itself.
fn quiet_unless_asked(options: &mut core::Options) {
    const LEVEL: &str = "CAROLE_LOG_LEVEL";
    let asked = options.knobs.iter().any(|(name, _)| name == LEVEL)
        || [LEVEL, "HOROVOD_LOG_LEVEL"].iter().any(|name| std::env::var_os(name).is_some());
    if !asked {
        options.knobs.push((LEVEL.to_owned(), "off".to_owned()));
    }
}

/// Says goodbye and leaves; bounded in time. Operations in flight end with CAROLE_ERROR_SHUTDOWN. carole_init
/// may be called again afterwards, any number of times.
#[unsafe(no_mangle)]
pub extern "C" fn carole_shutdown() -> i32 {
    enter(core::shutdown)
}

/// Forms the next epoch with the ranks that are left: after a call has failed with CAROLE_ERROR_BROKEN, or whenever
/// all ranks call it. No process is restarted. Ranks keep their order and count from 0 again, process sets keep
/// their numbers and lose the members that are gone (a set that has lost all is gone, too), and in an elastic job
/// processes that wait to be let in come last; carole_get_world tells the new place. Operations in flight have
/// ended with an error. Waits for ranks that live, up to CAROLE_ELASTIC_TIMEOUT_S. CAROLE_ERROR_BROKEN means that this
/// process must not go on: the others have gone on without it, or too few came together. After any error it is in
/// no job. Taken in turn with carole_init and carole_shutdown.
#[unsafe(no_mangle)]
pub extern "C" fn carole_reform() -> i32 {
    enter(|| core::reform().map(drop))
}

/// The number of the present epoch: how often the ranks have come together before; -1 when not initialized.
#[unsafe(no_mangle)]
pub extern "C" fn carole_epoch() -> i64 {
    let mut epoch = -1;
    enter(|| {
        epoch = i64::from(core::epoch()?);
        Ok(())
    });
    epoch
}

/// 1 when carole_init has succeeded and carole_shutdown has not been called since, else 0.
#[unsafe(no_mangle)]
pub extern "C" fn carole_is_initialized() -> i32 {
    let mut initialized = false;
    enter(|| {
        initialized = core::is_initialized();
        Ok(())
    });
    i32::from(initialized)
}

/// Fills in who this process is. Set `struct_size` before the call.
///
/// # Safety
/// `world` points to a struct of at least `struct_size` bytes that can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_get_world(world: *mut carole_world) -> i32 {
    enter(|| {
        if world.is_null() {
            return Err(Error::usage("world is NULL; give a struct to fill in"));
        }
        let now = core::world()?;
        let full = carole_world {
            struct_size: size_of::<carole_world>(),
            rank: now.rank,
            size: now.size,
            local_rank: now.local_rank,
            local_size: now.local_size,
            cross_rank: now.cross_rank,
            cross_size: now.cross_size,
            homogeneous: u32::from(now.homogeneous),
        };
        // SAFETY: the caller's struct begins with its size.
        let announced = unsafe { world.cast::<usize>().read_unaligned() };
        if announced < size_of::<usize>() || announced > 4096 {
            return Err(Error::Usage(format!(
                "carole_world: struct_size is {announced}; set it to sizeof the struct before the call"
            )));
        }
        let bytes = announced.min(size_of::<carole_world>()) - size_of::<usize>();
        // SAFETY: both hold the size and at least `bytes` more; the caller's size stays as it is.
        unsafe {
            let from = (&raw const full).cast::<u8>().add(size_of::<usize>());
            std::ptr::copy_nonoverlapping(from, world.cast::<u8>().add(size_of::<usize>()), bytes);
        }
        Ok(())
    })
}

fn ask(what: fn(core::World) -> u32) -> i64 {
    let mut answer = -1;
    enter(|| {
        answer = i64::from(what(core::world()?));
        Ok(())
    });
    answer
}

/// This process, among all; -1 (and a last error) before carole_init.
#[unsafe(no_mangle)]
pub extern "C" fn carole_rank() -> i64 {
    ask(|world| world.rank)
}

/// All processes; -1 before carole_init.
#[unsafe(no_mangle)]
pub extern "C" fn carole_size() -> i64 {
    ask(|world| world.size)
}

/// This process, among those on its host; -1 before carole_init.
#[unsafe(no_mangle)]
pub extern "C" fn carole_local_rank() -> i64 {
    ask(|world| world.local_rank)
}

/// Processes on this host; -1 before carole_init.
#[unsafe(no_mangle)]
pub extern "C" fn carole_local_size() -> i64 {
    ask(|world| world.local_size)
}

/// This host, among those that have this local rank; -1 before carole_init.
#[unsafe(no_mangle)]
pub extern "C" fn carole_cross_rank() -> i64 {
    ask(|world| world.cross_rank)
}

/// Hosts that have this local rank; -1 before carole_init.
#[unsafe(no_mangle)]
pub extern "C" fn carole_cross_size() -> i64 {
    ask(|world| world.cross_size)
}

/// 1 when all hosts have equally many processes, else 0; -1 before carole_init.
#[unsafe(no_mangle)]
pub extern "C" fn carole_is_homogeneous() -> i64 {
    ask(|world| u32::from(world.homogeneous))
}

/// Bytes of one element of this type; 0 for a code that is no type.
#[unsafe(no_mangle)]
pub extern "C" fn carole_dtype_size(dtype: u32) -> usize {
    crate::convert::dtype(dtype).map_or(0, |dtype| dtype.size())
}
