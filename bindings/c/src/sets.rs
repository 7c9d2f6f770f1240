//! Process sets.

use crate::convert::{put, slice};
use crate::status::enter;
use runtime::error::{Error, Result};
use runtime::runtime as core;
use runtime::types::{Rank, SetId};

/// Makes a process set of these ranks and gives its number. Collective over all ranks, which must name the
/// same ranks; waits for their agreement.
///
/// # Safety
/// `ranks` holds `count` elements; `process_set` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_add_process_set(
    ranks: *const u32,
    count: usize,
    process_set: *mut u32,
) -> i32 {
    enter(|| {
        if process_set.is_null() {
            return Err(Error::usage("process_set is NULL; give a place for the result"));
        }
        // SAFETY: the caller's promise.
        let ranks: Vec<Rank> = unsafe { slice(ranks, count, "ranks") }?.iter().copied().map(Rank).collect();
        let set = core::add_process_set(&ranks)?;
        // SAFETY: the caller's promise.
        unsafe { put(process_set, set.0, "process_set") }
    })
}

/// Ends a process set. Collective over all ranks. `removed` (may be NULL) gets 1, or 0 for the set of all
/// ranks and for sets that do not exist.
///
/// # Safety
/// `removed` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_remove_process_set(process_set: u32, removed: *mut i32) -> i32 {
    enter(|| {
        let done = core::remove_process_set(SetId(process_set))?;
        if removed.is_null() {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { put(removed, i32::from(done), "removed") }
    })
}

/// The number of ranks in a process set; -1 (and a last error) where it does not exist.
#[unsafe(no_mangle)]
pub extern "C" fn carole_process_set_size(process_set: u32) -> i64 {
    let mut size = -1;
    enter(|| {
        size = core::process_set(SetId(process_set))?.ranks.len() as i64;
        Ok(())
    });
    size
}

/// This rank's position in a process set; -1 where it is no member (with no error) or the set does not exist
/// (with a last error).
#[unsafe(no_mangle)]
pub extern "C" fn carole_process_set_rank(process_set: u32) -> i64 {
    let mut position = -1;
    enter(|| {
        position = core::process_set(SetId(process_set))?.me.map_or(-1, i64::from);
        Ok(())
    });
    position
}

/// Writes up to `capacity` ranks of a process set, ascending, and tells in `count` how many there are.
///
/// # Safety
/// `ranks` has room for `capacity` elements (may be NULL when that is 0); `count` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_process_set_ranks(
    process_set: u32,
    ranks: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> i32 {
    enter(|| {
        let info = core::process_set(SetId(process_set))?;
        let all: Vec<u32> = info.ranks.iter().map(|rank| rank.0).collect();
        // SAFETY: the caller's promise.
        unsafe { put_list(&all, ranks, capacity, count) }
    })
}

/// Writes up to `capacity` numbers of process sets, that of all ranks first, and tells in `count` how many
/// there are.
///
/// # Safety
/// `process_sets` has room for `capacity` elements (may be NULL when that is 0); `count` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_process_sets(
    process_sets: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> i32 {
    enter(|| {
        let all: Vec<u32> = core::process_sets()?.iter().map(|set| set.id.0).collect();
        // SAFETY: the caller's promise.
        unsafe { put_list(&all, process_sets, capacity, count) }
    })
}

unsafe fn put_list(all: &[u32], to: *mut u32, capacity: usize, count: *mut usize) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { put(count, all.len(), "count") }?;
    let fitting = all.len().min(capacity);
    if fitting == 0 {
        return Ok(());
    }
    if to.is_null() {
        return Err(Error::usage("the list is NULL, but its capacity is not 0"));
    }
    // SAFETY: `to` has room for `capacity` elements, and memory of ours does not overlap with it.
    unsafe { std::ptr::copy_nonoverlapping(all.as_ptr(), to, fitting) };
    Ok(())
}
