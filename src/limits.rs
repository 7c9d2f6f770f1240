//! Every bound of the system, with its reason. What comes from a peer is held against these before
//! anything is allocated.
#![forbid(unsafe_code)]

/// Batches of fewer bytes are packed even where all tensors lie in shared memory: to ask where costs more.
pub const LENT_BYTES_MIN: u64 = 64 << 10;
/// Ranks in a job: fan-in trees and per-rank tables are sized for it.
pub const RANKS_MAX: usize = 1 << 16;
/// Operations in flight per process set; beyond it submit is an error, never a wait (ranks that submit in
/// different orders would deadlock).
pub const IN_FLIGHT_MAX: usize = 1 << 20;
/// Bytes of a tensor's name.
pub const NAME_BYTES_MAX: usize = 4096;
/// Dimensions of a tensor; NumPy allows 64.
pub const DIMENSIONS_MAX: usize = 64;
/// Tensors in one grouped operation.
pub const GROUP_TENSORS_MAX: usize = 1 << 16;
/// Bytes of one tensor: far above any memory, low enough that sums of them cannot overflow.
pub const TENSOR_BYTES_MAX: u64 = 1 << 46;
/// One control message; larger agreements are cut into several.
pub const CONTROL_BYTES_MAX: usize = 1 << 20;
/// Keys in the response cache of a set. Beyond it the least recently agreed key is evicted, in agreed order.
pub const CACHE_KEYS_MAX: usize = 1 << 16;
/// Names that unnamed operations reuse, per set and collective.
pub const UNNAMED_RING: u32 = 1024;
/// Children of one node of a coordinator's tree: latency grows with the depth, load with the width.
pub const TREE_FAN_IN: usize = 8;
/// Payload at or below this many bytes may travel before it is asked for, while landing space lasts.
pub const EAGER_BYTES_MAX: usize = 32 << 10;
/// Landing space for eager payload, per link and direction.
pub const EAGER_CREDIT_BYTES: usize = 256 << 10;
/// Payload is cut into frames of at most this many bytes, so that lanes share and control is not held up.
pub const FRAME_BYTES_MAX: usize = 256 << 10;
/// One direction of a shared-memory link: large enough to stream, small enough to stay in cache.
pub const SHM_RING_BYTES: usize = 1 << 20;
/// The control ring of a shared-memory link.
pub const SHM_CONTROL_BYTES: usize = 64 << 10;
/// An allreduce of at most this many bytes travels with its ready marks: its values are agreed on as row counts are.
pub const INLINE_BYTES_MAX: usize = 64;
/// Members of a set in which that is so: everybody gets everybody's values.
pub const INLINE_MEMBERS_MAX: usize = 8;
/// Process sets of this rank that can have a seat on its board at one time; others use their links.
pub const BOARD_SEATS: usize = 4;
/// Slots of a seat, used in turn: while one is read by the others the next is filled.
pub const BOARD_SLOTS: usize = 4;
/// Bytes of a slot: all slots of a seat together stay in a core's second-level cache.
pub const BOARD_SLOT_BYTES: usize = 128 << 10;
/// Bytes of each seat for niches: a thousand standing operations of 256 bytes fit.
pub const BOARD_NICHES_BYTES: usize = 1 << 20;
/// What a member shows in a niche, at most; how much it is for which collective, `engine::standing` says.
pub const NICHE_BYTES_MAX: usize = 1 << 20;
/// More than this lies aside, in a block of its own.
pub const NICHE_BYTES_WITHIN: usize = 4 << 10;
/// Bytes that lie aside for one process set, on each board.
pub const NICHES_ASIDE_BYTES: usize = 32 << 20;
/// Agreements in a row, with one signature, after which a collective stands: a program that repeats shows it soon.
pub const STANDS_AFTER: u32 = 3;
/// Address space behind a board, of which its owner takes blocks: tensors in shared memory, and what persistent
/// collectives exchange through. Every rank of the host maps it.
pub const BOARD_ARENA_BYTES: usize = 16 << 30;
/// Members of a set that uses boards: each maps the boards of all.
pub const BOARD_MEMBERS_MAX: usize = 8;
/// Slots of a seat in device memory.
pub const DEVICE_SLOTS: usize = 2;
/// TCP connections per link that carry payload, at most.
pub const TCP_LANES_MAX: usize = 16;
/// Blocks of at least this many bytes are kept for later results; smaller ones the allocator keeps well enough.
pub const SPARE_BLOCK_BYTES_MIN: usize = 64 << 10;
/// Bytes of the blocks that are kept: the results of a few large operations.
pub const SPARE_BYTES_MAX: usize = 256 << 20;
/// Blocks that are kept: they are searched one after another.
pub const SPARE_BLOCKS_MAX: usize = 64;
/// Agreement messages kept for process sets that this rank has not made yet.
pub const EARLY_MESSAGES_MAX: usize = 4096;
/// Process sets whose marks a ballot carries when an epoch breaks: the lowest ones.
pub const BALLOT_SETS_MAX: usize = 4096;
/// Windows of one batch.
pub const WINDOWS_MAX: u32 = 256;
/// Reasons and messages that come from a peer are cut to this many bytes.
pub const REASON_BYTES_MAX: usize = 2048;

/// Silence after which a peer is held to be stopped.
pub const SILENCE_MS: u64 = 3000;
/// Heartbeats are sent when a link has been silent this long.
pub const HEARTBEAT_MS: u64 = 500;
/// What an unauthenticated connection may take before it is closed.
pub const HANDSHAKE_MS: u64 = 5000;
/// Unauthenticated connections at one time; further ones are closed at once.
pub const UNAUTHENTICATED_MAX: usize = 64;
/// Bytes of a handshake message.
pub const HANDSHAKE_BYTES_MAX: usize = 4096;
/// Bytes of the table of ranks that the rendezvous sends to each.
pub const TABLE_BYTES_MAX: usize = 64 << 20;
/// Shutdown waits at most this long for goodbyes to leave.
pub const SHUTDOWN_MS: u64 = 2000;

const _: () = {
    assert!(EAGER_BYTES_MAX <= EAGER_CREDIT_BYTES);
    assert!(EAGER_BYTES_MAX <= FRAME_BYTES_MAX);
    assert!(FRAME_BYTES_MAX < SHM_RING_BYTES);
    assert!(NAME_BYTES_MAX * 4 < CONTROL_BYTES_MAX);
    assert!(BALLOT_SETS_MAX * 16 + NAME_BYTES_MAX + RANKS_MAX * 5 < CONTROL_BYTES_MAX);
    assert!(HEARTBEAT_MS * 4 < SILENCE_MS);
    assert!(BOARD_SLOT_BYTES / (BOARD_MEMBERS_MAX - 1) >= 4096);
    assert!(SHM_RING_BYTES.is_power_of_two() && SHM_CONTROL_BYTES.is_power_of_two());
};
