//! Memory that the ranks of one host share, as MPI gives it: a window of `MPI_Win_allocate_shared`, made once for each
//! process. Each rank's part is cut into areas; a lane to a rank of the same host takes one for what it sends, and only
//! words about it travel as messages. Neither side copies with the kernel's help then, which is what a large message
//! within a host costs most, and what MPI's own collectives spend nearly all their time on.
//!
//! The window is not freed: that is collective, and who has died would be waited for. It ends with the process.

use super::slot::{Slot, check};
use super::world::Handle;
use super::{WINDOW_SLOT_BYTES, WINDOW_SLOTS};
use crate::error::Cause;
use mpi::ffi;
use rustix::mm::Advice;
use std::collections::VecDeque;
use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes of an area: the slots of one lane, in one direction.
const AREA_BYTES: usize = WINDOW_SLOTS * WINDOW_SLOT_BYTES;
/// Areas beyond one for each peer of the host: those of links that have ended are taken again when the peer has said
/// its last word, and a new epoch may begin before that.
const AREAS_SPARE: usize = 3;
/// Areas of one rank. Links are few (trees and rings); what finds none left sends messages.
const AREAS_MAX: usize = 16;
/// What all ranks of a host may take together.
const HOST_BYTES_MAX: usize = 512 << 20;
const PAGE_BYTES: usize = 4096;

/// One rank's part, as it lies here.
#[derive(Clone, Copy)]
struct Part {
    base: NonNull<u8>,
    bytes: usize,
}

/// The window, with this rank's areas.
pub struct Window {
    /// By rank, as MPI counts: those of this host.
    parts: Vec<Option<Part>>,
    /// Where in this rank's part its first area begins.
    first: usize,
    taken: Mutex<Vec<bool>>,
}

// SAFETY: the window stays as long as the process, and who reads or writes which bytes of it, and when, is agreed by
// messages (`port`).
unsafe impl Send for Window {}
// SAFETY: as above; what changes is behind a lock.
unsafe impl Sync for Window {}

/// Where a lane's slots lie, as its owner tells the peer. All 0: nowhere, messages carry the bytes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Place {
    /// From where the sender's part begins.
    pub offset: u64,
    pub slots: u64,
    pub slot_bytes: u64,
}

/// An area that was taken.
pub struct Area {
    window: &'static Window,
    index: usize,
}

impl Window {
    /// Makes the window. All ranks must call. `writes`: lanes take areas of this rank's part, too; what the others write
    /// is read in any case. `None`: this rank is alone on its host.
    pub fn open(comm: &Handle, rank: c_int, world_size: u32, writes: bool) -> Result<Option<Window>, Cause> {
        let mut node = MaybeUninit::<ffi::MPI_Comm>::uninit();
        // SAFETY: MPI is initialised, this thread may call it, and all ranks do the same.
        let node = unsafe {
            let (kind, info) = (ffi::RSMPI_COMM_TYPE_SHARED, ffi::RSMPI_INFO_NULL);
            check(ffi::MPI_Comm_split_type(comm.0, kind, rank, info, node.as_mut_ptr()))?;
            let node = node.assume_init();
            check(ffi::MPI_Comm_set_errhandler(node, ffi::RSMPI_ERRORS_RETURN))?;
            Handle(node)
        };
        let ranks = ranks_of(&node, comm)?;
        // The only rank of a job may have links to itself, in tests.
        if ranks.len() == 1 && world_size > 1 {
            return Ok(None);
        }
        let areas =
            (ranks.len() - 1 + AREAS_SPARE).min(AREAS_MAX).min(HOST_BYTES_MAX / AREA_BYTES / ranks.len());
        let bytes = areas * AREA_BYTES + PAGE_BYTES;
        let mut base = std::ptr::null_mut::<u8>();
        let mut window = MaybeUninit::<ffi::MPI_Win>::uninit();
        // SAFETY: as above, for the ranks of this host, which know the same number of them; both are written to.
        let window = unsafe {
            let to = (&raw mut base).cast();
            let info = ffi::RSMPI_INFO_NULL;
            check(ffi::MPI_Win_allocate_shared(bytes as _, 1, info, node.0, to, window.as_mut_ptr()))?;
            window.assume_init()
        };
        let mut parts = vec![None; world_size as usize];
        for (at, &of) in ranks.iter().enumerate() {
            let (mut size, mut unit): (ffi::MPI_Aint, c_int) = (0, 0);
            let mut base = std::ptr::null_mut::<u8>();
            // SAFETY: a window that was just made, and a rank of it; all three are written to.
            let code = unsafe {
                ffi::MPI_Win_shared_query(window, at as c_int, &mut size, &mut unit, (&raw mut base).cast())
            };
            check(code)?;
            let part = parts.get_mut(of).ok_or_else(|| Cause::System("MPI names an unknown rank".into()))?;
            *part = NonNull::new(base).map(|base| Part { base, bytes: usize::try_from(size).unwrap_or(0) });
        }
        let Some(Some(mine)) = parts.get(rank as usize) else { return Ok(None) };
        let first = mine.base.as_ptr().align_offset(PAGE_BYTES);
        let room = if writes { mine.bytes.saturating_sub(first) / AREA_BYTES } else { 0 };
        Ok(Some(Window { first, taken: Mutex::new(vec![false; areas.min(room)]), parts }))
    }

    fn taken(&self) -> MutexGuard<'_, Vec<bool>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An area for what `rank` sends to `peer`, and its slots, if they share a host and one is left.
    pub fn take(&'static self, rank: u32, peer: i32) -> Option<(Area, Vec<Slot>)> {
        self.part(peer)?;
        let mine = (*self.parts.get(rank as usize)?)?;
        let index = {
            let mut taken = self.taken();
            let index = taken.iter().position(|taken| !taken)?;
            taken[index] = true;
            index
        };
        let area = Area { window: self, index };
        let at = self.first + index * AREA_BYTES;
        // SAFETY: `open` has made only as many areas as the part has room for.
        let start = unsafe { mine.base.add(at) };
        // Here memory that is full is an answer; at the first store it would be the end of the process.
        // SAFETY: pages of this rank's part, which are mapped; what they hold stays.
        if unsafe { rustix::mm::madvise(start.as_ptr().cast(), AREA_BYTES, Advice::LinuxPopulateWrite) }
            .is_err()
        {
            area.give_back();
            return None;
        }
        let slot = |k: usize| {
            // SAFETY: inside the area, which is this one's alone until it is given back, and stays mapped.
            unsafe { Slot::within(start.add(k * WINDOW_SLOT_BYTES), WINDOW_SLOT_BYTES) }
        };
        Some((area, (0..WINDOW_SLOTS).map(slot).collect()))
    }

    fn part(&self, rank: i32) -> Option<Part> {
        *self.parts.get(usize::try_from(rank).ok()?)?
    }

    /// The slots of a peer, in the order in which it fills them, after making sure that they are its own.
    pub fn slots(&self, peer: i32, place: Place) -> Result<VecDeque<Slot>, Cause> {
        let wrong = || Cause::Misbehaved(format!("it says that it writes to {place:?} of its memory"));
        let part = self.part(peer).ok_or_else(wrong)?;
        let fits = place.slots == WINDOW_SLOTS as u64 && place.slot_bytes == WINDOW_SLOT_BYTES as u64;
        let offset = usize::try_from(place.offset).map_err(|_| wrong())?;
        if !fits || offset.checked_add(AREA_BYTES).is_none_or(|end| end > part.bytes) {
            return Err(wrong());
        }
        let slot = |k: usize| {
            // SAFETY: inside the peer's part, as just checked, which stays mapped. The peer leaves a slot alone from
            // when it says that it is full until it is told that it was read. One that does not can only spoil the
            // payload that it sends anyway: all are bytes, and headers are copied out before they are believed.
            unsafe { Slot::within(part.base.add(offset + k * WINDOW_SLOT_BYTES), WINDOW_SLOT_BYTES) }
        };
        Ok((0..WINDOW_SLOTS).map(slot).collect())
    }
}

/// The ranks of `node`, as `comm` counts them.
fn ranks_of(node: &Handle, comm: &Handle) -> Result<Vec<usize>, Cause> {
    let (mut ours, mut all) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    let mut size: c_int = 0;
    // SAFETY: both communicators live, and what is written has room.
    let (ours, all) = unsafe {
        check(ffi::MPI_Comm_size(node.0, &mut size))?;
        check(ffi::MPI_Comm_group(node.0, ours.as_mut_ptr()))?;
        check(ffi::MPI_Comm_group(comm.0, all.as_mut_ptr()))?;
        (ours.assume_init(), all.assume_init())
    };
    let from: Vec<c_int> = (0..size).collect();
    let mut to = vec![0; from.len()];
    // SAFETY: both lists have `size` entries. The two groups stay, for there is one such call in a process.
    check(unsafe { ffi::MPI_Group_translate_ranks(ours, size, from.as_ptr(), all, to.as_mut_ptr()) })?;
    let known = |rank: &c_int| {
        usize::try_from(*rank).map_err(|_| Cause::System("MPI does not know its ranks".into()))
    };
    to.iter().map(known).collect()
}

impl Area {
    /// What the peer is told.
    pub fn place(&self) -> Place {
        Place {
            offset: (self.window.first + self.index * AREA_BYTES) as u64,
            slots: WINDOW_SLOTS as u64,
            slot_bytes: WINDOW_SLOT_BYTES as u64,
        }
    }

    /// Nobody reads it any more. (One that is dropped instead is not taken again.)
    pub fn give_back(self) {
        self.window.taken()[self.index] = false;
    }
}

impl Place {
    /// Bytes of the word that says it.
    pub const BYTES: usize = 24;

    pub fn encode(&self) -> [u8; Place::BYTES] {
        let mut bytes = [0; Place::BYTES];
        for (to, from) in bytes.chunks_exact_mut(8).zip([self.offset, self.slots, self.slot_bytes]) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        bytes
    }

    pub fn decode(bytes: &[u8; Place::BYTES]) -> Place {
        let word = |k: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[8 * k + i]));
        Place { offset: word(0), slots: word(1), slot_bytes: word(2) }
    }
}
