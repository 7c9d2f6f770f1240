//! What a batch exchanges over the boards, and the copies and reductions of one tick.

use super::Blame;
use super::lent::Lent;
use super::memory::{BOARD_BYTES, BoardMemory, LINE_BYTES};
use crate::device::{Finish, Reduction, host};
use crate::limits::{BOARD_SLOT_BYTES, BOARD_SLOTS};
use crate::memory::{Memory, PieceRange, RunId};
use crate::transport::flow::pieces::Cursor;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Bytes that are reduced before the result is copied to where else it is wanted: it lies in the first-level
/// cache then.
const REDUCE_BYTES: usize = 8 << 10;
/// What is reduced in one tick where tensors lie. Later ticks have nothing left to do then.
const LENT_WINDOW_BYTES: usize = 1 << 20;
/// Areas of a slot begin at multiples of it.
pub const AREA_UNIT: usize = LINE_BYTES;

/// Where on a member's board the counters and the slots of a set lie.
#[derive(Clone, Debug)]
pub struct Place {
    board: Arc<BoardMemory>,
    words_at: usize,
    slots_at: usize,
    slot_bytes: usize,
    /// Where niches begin; 0 where there are none.
    niches_at: usize,
}

impl Place {
    /// A seat of a board.
    #[must_use]
    pub fn seat(board: Arc<BoardMemory>, seat: usize) -> Place {
        let (words_at, slots_at) = BoardMemory::seat_at(seat);
        let niches_at = BoardMemory::niches_at(seat);
        Place { board, words_at, slots_at, slot_bytes: BOARD_SLOT_BYTES, niches_at }
    }

    /// Where the niche lies that begins `offset` bytes behind the first of its seat.
    #[must_use]
    pub fn niche(&self, offset: usize) -> (Arc<BoardMemory>, usize) {
        assert!(self.niches_at > 0, "seats have niches, blocks not");
        (Arc::clone(&self.board), self.niches_at + offset)
    }

    /// Bytes of a block with slots of this size.
    #[must_use]
    pub fn block_bytes(slot_bytes: usize) -> usize {
        2 * LINE_BYTES + BOARD_SLOTS * slot_bytes
    }

    /// A block of the board's arena; none where it does not lie there.
    #[must_use]
    pub fn block(board: Arc<BoardMemory>, at: u64, slot_bytes: usize) -> Option<Place> {
        let words_at =
            usize::try_from(at).ok().filter(|at| *at >= BOARD_BYTES && at.is_multiple_of(LINE_BYTES))?;
        board.bytes_at(words_at, Place::block_bytes(slot_bytes))?;
        Some(Place { board, words_at, slots_at: words_at + 2 * LINE_BYTES, slot_bytes, niches_at: 0 })
    }

    /// The board.
    #[must_use]
    pub fn board(&self) -> &Arc<BoardMemory> {
        &self.board
    }

    /// Ticks whose payload the owner has put into its slots.
    pub fn posted(&self) -> &AtomicU64 {
        self.board.word_at(self.words_at).expect("a place lies on its board")
    }

    /// Ticks for which the owner needs nothing more of the others' slots.
    pub fn taken(&self) -> &AtomicU64 {
        self.board.word_at(self.words_at + LINE_BYTES).expect("a place lies on its board")
    }

    /// A word of what a seat tells of the owner's device, on lines behind its counters.
    pub(super) fn device_word(&self, line: usize, word: usize) -> &AtomicU64 {
        assert!(
            self.words_at < BOARD_BYTES && line < 4 && word < LINE_BYTES / 8,
            "seats have such lines, blocks not"
        );
        let at = self.words_at + (2 + line) * LINE_BYTES + 8 * word;
        self.board.word_at(at).expect("a place lies on its board")
    }

    /// A word of the slot of a tick; none behind its end.
    pub(super) fn slot_word(&self, tick: u64, word: usize) -> Option<&AtomicU64> {
        let slot = (tick % BOARD_SLOTS as u64) as usize;
        let fits = word < self.slot_bytes / 8;
        fits.then(|| self.board.word_at(self.slots_at + slot * self.slot_bytes + 8 * word))?
    }

    /// An area of the slot of a tick.
    fn area(&self, tick: u64, area: usize, area_bytes: usize) -> *mut u8 {
        assert!((area + 1) * area_bytes <= self.slot_bytes, "areas lie in their slot");
        let slot = (tick % BOARD_SLOTS as u64) as usize;
        let at = self.slots_at + slot * self.slot_bytes + area * area_bytes;
        self.board.bytes_at(at, area_bytes).expect("a place lies on its board")
    }
}

/// What this member puts into its slots.
#[derive(Clone, Debug)]
pub enum Share {
    /// Something else for each member, in member order (nothing for itself).
    Each(Vec<PieceRange>),
    /// The same for all. Empty where this member has nothing to give.
    All(PieceRange),
}

/// Where the result of a reduction goes besides the output of the member that has reduced it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Back {
    /// Nowhere.
    Nowhere,
    /// To every member.
    All,
    /// To this one.
    To(u32),
}

/// The reduction of this member's part.
#[derive(Clone, Debug)]
pub struct Part {
    /// Operation and type.
    pub reduction: Reduction,
    /// Factor of every operand.
    pub pre: f64,
    /// The last multiplication.
    pub finish: Finish,
    /// The operand that is here.
    pub own: PieceRange,
    /// The result.
    pub dst: PieceRange,
    /// Who else gets it.
    pub back: Back,
}

/// One batch, as a member exchanges it. All lists are cut into windows of `area_bytes`, one for each tick.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// What is put into the own slots.
    pub share: Share,
    /// What is reduced out of the others' slots.
    pub part: Option<Part>,
    /// What is copied out of the others' slots, by member.
    pub takes: Vec<PieceRange>,
    /// What is copied out of the own slots when all have taken, by member: the results that each has reduced.
    pub results: Vec<PieceRange>,
    /// Whether members reduce for others, so that it is complete for nobody before all have.
    pub returns: bool,
    /// What is copied within this member: from, to.
    pub keep: Option<(PieceRange, PieceRange)>,
    /// Bytes of an area in a slot: what one member gets in one tick.
    pub area_bytes: usize,
    /// Windows, and the tick of the cards: the same number on all members.
    pub ticks: u64,
    /// Whether the members tell each other in the first tick where their tensors lie, so as to reduce them there.
    pub lends: bool,
}

impl Exchange {
    /// Areas of a slot.
    #[must_use]
    pub fn areas(&self, members: usize) -> usize {
        if matches!(self.share, Share::Each(_)) { (members - 1).max(1) } else { 1 }
    }

    /// Which area of its slots `owner` fills for `member`.
    fn area_of(&self, owner: usize, member: usize) -> usize {
        match self.share {
            Share::All(_) => 0,
            Share::Each(_) => member - usize::from(member > owner),
        }
    }
}

/// A list, and how far it has been walked.
#[derive(Clone, Debug, Default)]
struct Walk {
    cursor: Cursor,
    left: u64,
}

impl Walk {
    fn new(range: &PieceRange) -> Walk {
        Walk { cursor: Cursor::default(), left: range.bytes() }
    }

    /// The address of the next bytes, at most `limit` in a row.
    fn next(&self, memory: &Memory, run: RunId, range: &PieceRange, limit: usize) -> (*mut u8, usize) {
        self.cursor.chunk(memory, run, range, limit)
    }

    fn advance(&mut self, range: &PieceRange, n: usize) {
        self.cursor.advance(range, n as u64);
        self.left -= n as u64;
    }
}

/// A batch on its way over the boards.
#[derive(Debug)]
pub struct Job {
    pub run: RunId,
    pub exchange: Arc<Exchange>,
    /// The number of its first tick.
    pub first: u64,
    shares: Vec<Walk>,
    takes: Vec<Walk>,
    results: Vec<Walk>,
    own: Walk,
    dst: Walk,
    kept: (Walk, Walk),
    sources: Vec<*const u8>,
    /// Where the tensors of all members lie, if all have told that.
    lent: Lent,
}

// SAFETY: `sources` is only a buffer that is empty whenever nobody is inside `reduce`, and what is lent lies in boards
// that outlive the job.
unsafe impl Send for Job {}

impl Job {
    pub fn new(run: RunId, exchange: Arc<Exchange>, first: u64) -> Job {
        let mut job = Job {
            run,
            exchange: Arc::clone(&exchange),
            first,
            shares: Vec::new(),
            takes: Vec::new(),
            results: Vec::new(),
            own: Walk::default(),
            dst: Walk::default(),
            kept: Default::default(),
            sources: Vec::new(),
            lent: Lent::default(),
        };
        job.renew(run, exchange, first);
        job
    }

    /// Begins anew with another batch, in the same memory.
    pub fn renew(&mut self, run: RunId, exchange: Arc<Exchange>, first: u64) {
        let fill = |walks: &mut Vec<Walk>, ranges: &[PieceRange]| {
            walks.clear();
            walks.extend(ranges.iter().map(Walk::new));
        };
        match &exchange.share {
            Share::Each(ranges) => fill(&mut self.shares, ranges),
            Share::All(range) => fill(&mut self.shares, std::slice::from_ref(range)),
        }
        fill(&mut self.takes, &exchange.takes);
        fill(&mut self.results, &exchange.results);
        if let Some(part) = &exchange.part {
            (self.own, self.dst) = (Walk::new(&part.own), Walk::new(&part.dst));
        }
        if let Some((src, dst)) = &exchange.keep {
            self.kept = (Walk::new(src), Walk::new(dst));
        }
        self.lent.clear();
        (self.run, self.exchange, self.first) = (run, exchange, first);
    }

    /// Whether a tick is the one in which the members tell where their tensors lie.
    fn is_for_cards(&self, tick: u64) -> bool {
        self.exchange.lends && tick == self.first
    }

    /// Whether what is done in a tick is not known before all cards have been read, and they were not.
    pub fn awaits_cards(&self, tick: u64, taken: u64) -> bool {
        self.exchange.lends && tick > self.first && taken <= self.first
    }

    /// Whether members reduce for others.
    pub fn returns(&self) -> bool {
        self.exchange.returns
    }

    /// Puts the window of a tick into the own slot.
    pub fn post(&mut self, tick: u64, me: usize, place: &Place, memory: &Memory) {
        if self.is_for_cards(tick) {
            return Lent::tell(place, tick, memory.regions(self.run));
        }
        if self.lent.is_known() {
            return;
        }
        let exchange = &*self.exchange;
        let ranges = match &exchange.share {
            Share::Each(ranges) => ranges.as_slice(),
            Share::All(range) => std::slice::from_ref(range),
        };
        for (to, (range, walk)) in ranges.iter().zip(&mut self.shares).enumerate() {
            let mut left = walk.left.min(exchange.area_bytes as u64) as usize;
            if left == 0 {
                continue;
            }
            let mut area = place.area(tick, exchange.area_of(me, to), exchange.area_bytes);
            while left > 0 {
                let (src, n) = walk.next(memory, self.run, range, left);
                // SAFETY: `n` bytes lie at `src`, as Memory vouches; the area has room for `left`, and its bytes
                // are this rank's until it counts them as posted.
                unsafe {
                    std::ptr::copy_nonoverlapping(src, area, n);
                    area = area.add(n);
                }
                walk.advance(range, n);
                left -= n;
            }
        }
    }

    /// Takes the window of a tick out of the others' slots.
    pub fn take(&mut self, tick: u64, me: usize, places: &[Place], memory: &Memory) -> Result<(), Blame> {
        if self.is_for_cards(tick) {
            return self.lent.learn(places, tick, memory.regions(self.run));
        }
        self.reduce(tick, me, places, memory);
        if self.lent.is_known() {
            return Ok(());
        }
        let exchange = Arc::clone(&self.exchange);
        for (from, (range, walk)) in exchange.takes.iter().zip(&mut self.takes).enumerate() {
            let left = walk.left.min(exchange.area_bytes as u64) as usize;
            if left > 0 {
                let area = places[from].area(tick, exchange.area_of(from, me), exchange.area_bytes);
                copy_out(area, left, range, walk, memory, self.run);
            }
        }
        if let Some((src, dst)) = &exchange.keep {
            let (from, to) = &mut self.kept;
            let mut left = from.left.min(exchange.area_bytes as u64) as usize;
            while left > 0 {
                let (address, n) = from.next(memory, self.run, src, left);
                copy_out(address, n, dst, to, memory, self.run);
                from.advance(src, n);
                left -= n;
            }
        }
        Ok(())
    }

    /// Reduces the window of this member's part: of the others' slots and into them, or, where all have lent their
    /// tensors, of these and into these.
    fn reduce(&mut self, tick: u64, me: usize, places: &[Place], memory: &Memory) {
        let exchange = &*self.exchange;
        let Some(part) = &exchange.part else { return };
        // Windows are as large as slots allow; without slots they only let the links have their turn now and then.
        let window = if self.lent.is_known() { LENT_WINDOW_BYTES } else { exchange.area_bytes };
        let bytes = self.dst.left.min(window as u64) as usize;
        // The result of two goes to both places at once; of more it is copied while it lies in the first-level cache.
        let most = if places.len() == 2 { bytes } else { REDUCE_BYTES };
        let mut done = 0;
        while done < bytes {
            let limit = (bytes - done).min(most);
            let (dst, n) = self.dst.next(memory, self.run, &part.dst, limit);
            let (own, n) = self.own.next(memory, self.run, &part.own, n);
            let (from, to) = (self.own.cursor.region(&part.own), self.dst.cursor.region(&part.dst));
            self.sources.clear();
            for (member, place) in places.iter().enumerate() {
                self.sources.push(match self.lent.is_known() {
                    _ if member == me => own.cast_const(),
                    true => self.lent.like((me, from, own.cast_const()), member).cast_const(),
                    false => {
                        let area = place.area(tick, exchange.area_of(member, me), exchange.area_bytes);
                        // SAFETY: `done` < `bytes` <= the area's length.
                        unsafe { area.add(done).cast_const() }
                    }
                });
            }
            // SAFETY: `n` bytes lie at each address: pieces as Memory vouches, areas as just said, and what is lent at
            // the same place of a region as long (`Lent::learn`), which its owner leaves alone before all members have
            // counted the last tick. `n` is a multiple of the element's size, since lists hold whole elements and
            // windows are cut at multiples of AREA_UNIT. `dst` is `own` or apart from it, and the slots are nobody's
            // own memory.
            let theirs = |member: usize| match self.lent.is_known() {
                true => self.lent.like((me, to, dst.cast_const()), member),
                false => self.sources[member].cast_mut(),
            };
            let is_wanted = |member: usize| match part.back {
                Back::Nowhere => false,
                Back::All => member != me,
                Back::To(root) => root as usize == member && member != me,
            };
            // SAFETY: as just said; and the bytes in an owner's slot or tensor to which the result goes are this
            // member's until it counts them as taken.
            unsafe {
                match self.sources[..] {
                    [a, b] if part.pre == 1.0 => {
                        let back = if is_wanted(1 - me) { theirs(1 - me) } else { dst };
                        host::reduce_pair(part.reduction, (dst, back), a, b, n, part.finish);
                    }
                    _ => {
                        host::reduce_many(part.reduction, dst, &self.sources, n, part.pre, part.finish);
                        for member in (0..places.len()).filter(|member| is_wanted(*member)) {
                            theirs(member).copy_from_nonoverlapping(dst, n);
                        }
                    }
                }
            }
            self.own.advance(&part.own, n);
            self.dst.advance(&part.dst, n);
            done += n;
        }
        self.sources.clear();
    }

    /// Copies the results of a tick out of the own slot.
    pub fn settle(&mut self, tick: u64, me: usize, place: &Place, memory: &Memory) {
        if self.is_for_cards(tick) || self.lent.is_known() {
            return;
        }
        let exchange = &*self.exchange;
        for (by, (range, walk)) in exchange.results.iter().zip(&mut self.results).enumerate() {
            let left = walk.left.min(exchange.area_bytes as u64) as usize;
            if left > 0 {
                let area = place.area(tick, exchange.area_of(me, by), exchange.area_bytes);
                copy_out(area, left, range, walk, memory, self.run);
            }
        }
    }
}

/// Copies `len` bytes to the next bytes of a list.
fn copy_out(mut src: *mut u8, len: usize, range: &PieceRange, walk: &mut Walk, memory: &Memory, run: RunId) {
    let mut left = len;
    while left > 0 {
        let (dst, n) = walk.next(memory, run, range, left);
        // SAFETY: the caller's `src` has `len` bytes; `n` bytes lie at `dst`, as Memory vouches. Both may be the
        // same memory (what stays in place), but never overlap otherwise.
        unsafe {
            host::copy(dst, src.cast_const(), n);
            src = src.add(n);
        }
        walk.advance(range, n);
        left -= n;
    }
}
