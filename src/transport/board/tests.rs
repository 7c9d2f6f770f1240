//! Members of one process, turned one after another in every order that matters.

use super::*;
use crate::device::{Finish, Reduction};
use crate::limits::BOARD_SLOT_BYTES;
use crate::memory::{Piece, PieceRange, Region};
use crate::types::{DType, ReduceOp};

/// One member: its seat, and its tensor of f32, reduced in place.
struct Member {
    seat: Seat,
    memory: Memory,
    values: Vec<f32>,
    complete: Vec<RunId>,
}

fn list(from: usize, to: usize) -> PieceRange {
    let piece = Piece { region: 0, offset: 4 * from as u64, len: 4 * (to - from) as u64 };
    let list: Arc<[Piece]> = if from == to { Arc::new([]) } else { Arc::new([piece]) };
    PieceRange { start: 0, end: list.len() as u32, list }
}

/// An allreduce of `n` values over all members.
fn allreduce(me: usize, members: usize, n: usize, lends: bool) -> Arc<Exchange> {
    // Cut at multiples of 16 values, as layouts are.
    let at = |k: usize| (n.div_ceil(16) * k / members * 16).min(n);
    let chunk = |k: usize| list(at(k), at(k + 1));
    let but = |k: usize| if k == me { list(0, 0) } else { chunk(k) };
    let area_bytes = BOARD_SLOT_BYTES / (members - 1) / AREA_UNIT * AREA_UNIT;
    let longest = (0..members).map(|k| 4 * (at(k + 1) - at(k))).max().unwrap();
    Arc::new(Exchange {
        share: Share::Each((0..members).map(but).collect()),
        part: Some(Part {
            reduction: Reduction { dtype: DType::F32, op: ReduceOp::Sum },
            pre: 1.0,
            finish: Finish { divisor: 1, post: 1.0 },
            own: chunk(me),
            dst: chunk(me),
            back: Back::All,
        }),
        takes: Vec::new(),
        results: (0..members).map(but).collect(),
        returns: true,
        keep: None,
        area_bytes,
        ticks: longest.div_ceil(area_bytes) as u64 + u64::from(lends),
        lends,
    })
}

fn members(count: usize) -> Vec<Member> {
    let boards: Vec<_> = (0..count).map(|_| BoardMemory::within_process()).collect();
    // Seats need not have the same number on all boards.
    let places: Vec<Place> =
        boards.iter().enumerate().map(|(m, board)| Place::seat(Arc::clone(board), m % 2)).collect();
    (0..count)
        .map(|me| Member {
            seat: Seat::new(me, places.clone()),
            memory: Memory::default(),
            values: Vec::new(),
            complete: Vec::new(),
        })
        .collect()
}

impl Member {
    fn begin(&mut self, me: usize, members: usize, n: usize) -> RunId {
        self.values = (0..n).map(|i| (i % 1000 + me) as f32).collect();
        // SAFETY: the values are not touched otherwise until the batch is complete.
        let region = unsafe { Region::new(self.values.as_mut_ptr().cast(), 4 * n as u64) };
        let run = self.memory.register([region]);
        self.seat.push(run, &allreduce(me, members, n, false));
        run
    }
    fn turn(&mut self) -> bool {
        self.seat.progress(&self.memory, &mut self.complete).unwrap()
    }
}

#[test]
fn sums_are_right_and_batches_follow_each_other() {
    for count in [2, 3, 5, 8] {
        let mut all = members(count);
        for n in [1, 17, 5000, 300_000] {
            let runs: Vec<RunId> = all.iter_mut().enumerate().map(|(me, m)| m.begin(me, count, n)).collect();
            // The last member comes late: until then nothing of the others' is written.
            let (late, early) = all.split_last_mut().unwrap();
            while early.iter_mut().any(Member::turn) {}
            for (me, member) in early.iter().enumerate() {
                assert!(member.values.iter().enumerate().all(|(i, v)| *v == (i % 1000 + me) as f32));
            }
            late.turn();
            while all.iter_mut().any(Member::turn) {}
            let sum_of_ranks = count * (count - 1) / 2;
            for (member, run) in all.iter_mut().zip(runs) {
                assert_eq!(std::mem::take(&mut member.complete), [run]);
                assert!(member.seat.is_idle());
                member.memory.forget(run);
                let wrong = member.values.iter().enumerate();
                let wrong = wrong.filter(|(i, v)| **v != (i % 1000 * count + sum_of_ranks) as f32).count();
                assert_eq!(wrong, 0, "{count} members, {n} values");
            }
        }
    }
}

/// Tensors in the arenas of the members' boards; with `private` one member's lies elsewhere.
#[test]
fn lent_tensors_are_reduced_where_they_lie() {
    for (count, private) in [(2, false), (3, false), (5, false), (3, true)] {
        let mut all = members(count);
        for n in [17, 5000, 100_000] {
            let mut blocks = Vec::new();
            let mut own: Vec<f32> = Vec::new();
            for (me, member) in all.iter_mut().enumerate() {
                let block = Block::take_for_tensor(member.seat.places[me].board(), 4 * n).unwrap();
                let mut start: *mut f32 = block.as_ptr().cast();
                if private && me == 1 {
                    own.resize(n, 0.0);
                    start = own.as_mut_ptr();
                }
                // SAFETY: the block and the vector have room for `n` values, and live until the batch is complete.
                let region = unsafe {
                    (0..n).for_each(|i| *start.add(i) = (i % 1000 + me) as f32);
                    Region::new(start.cast(), 4 * n as u64)
                };
                let run = member.memory.register([region]);
                member.seat.push(run, &allreduce(me, count, n, true));
                blocks.push((run, start, block));
            }
            while all.iter_mut().any(Member::turn) {}
            for (member, (run, start, _)) in all.iter_mut().zip(&blocks) {
                assert_eq!(std::mem::take(&mut member.complete), [*run]);
                member.memory.forget(*run);
                let expected = |i: usize| (i % 1000 * count + count * (count - 1) / 2) as f32;
                // SAFETY: `n` values lie there, and the batch is complete.
                let wrong = (0..n).filter(|&i| unsafe { *start.add(i) } != expected(i)).count();
                assert_eq!(wrong, 0, "{count} members, {n} values");
            }
        }
    }
}

#[test]
fn a_member_that_tells_an_impossible_place_is_blamed() {
    for (words, told) in [([5, 1 << 20], "5: "), ([1, 1 << 62], "1: "), ([1, 64], "1: ")] {
        let mut all = members(2);
        for (me, member) in all.iter_mut().enumerate() {
            member.values = vec![1.0; 5000];
            // SAFETY: the values are not touched otherwise until the batch is complete.
            let region = unsafe { Region::new(member.values.as_mut_ptr().cast(), 20_000) };
            let run = member.memory.register([region]);
            member.seat.push(run, &allreduce(me, 2, 5000, true));
        }
        // Member 0 has told that its tensor lies elsewhere; the other writes over both cards.
        for member in &mut all {
            let Member { seat, memory, complete, .. } = member;
            let _ = (seat.post(memory), &complete);
        }
        let places = all[0].seat.places.clone();
        for place in &places {
            for (at, word) in words.iter().enumerate() {
                place.slot_word(0, at).unwrap().store(*word, Ordering::Release);
            }
        }
        let Member { seat, memory, complete, .. } = &mut all[0];
        let (_, cause) = seat.progress(memory, complete).unwrap_err();
        assert!(matches!(&cause, Cause::Misbehaved(words) if words.contains(told)), "{cause:?}");
    }
}

#[test]
fn a_member_whose_counters_cannot_be_is_blamed() {
    let mut all = members(2);
    for (me, member) in all.iter_mut().enumerate() {
        member.begin(me, 2, 100);
    }
    let place = all[0].seat.places[1].clone();
    place.taken().store(7, Ordering::Release);
    let Member { seat, memory, complete, .. } = &mut all[0];
    let (member, cause) = seat.progress(memory, complete).unwrap_err();
    assert_eq!(member, 1);
    assert!(matches!(cause, Cause::Misbehaved(_)));
}

#[test]
fn a_board_crosses_as_a_descriptor() {
    let (fd, own) = BoardMemory::create(&crate::transport::shm::Budget::new(1 << 30)).unwrap();
    let theirs = BoardMemory::map(&fd).unwrap();
    own.holder(1).store(5, Ordering::Release);
    assert_eq!(theirs.holder(1).load(Ordering::Acquire), 5);
    let pipe: std::os::fd::OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    assert!(BoardMemory::map(&pipe).is_err(), "a file is no board");
}

#[test]
fn niches_are_reduced_by_each_member_and_withdrawn_from_for_good() {
    for is_aside in [false, true] {
        niches_are_reduced_and_withdrawn_from(is_aside);
    }
}

fn niches_are_reduced_and_withdrawn_from(is_aside: bool) {
    let boards: Vec<Arc<BoardMemory>> = (0..3).map(|_| BoardMemory::within_process()).collect();
    let niche = |me| {
        let places = boards.iter().map(|board| Place::seat(Arc::clone(board), 0).niche(256));
        Niche::new(me, places.collect(), Room { bytes: 12, is_aside })
    };
    let niches: Vec<Niche> = (0..3).map(niche).collect();
    for start in (1 << 32)..(1 << 32) + 5 {
        let mut values = [[start as f32, 1.0, 2.0], [3.0; 3], [0.5; 3]];
        // SAFETY: the values outlive what is done with them here.
        let regions = values.each_mut().map(|v| unsafe { Region::new(v.as_mut_ptr().cast(), 12) });
        niches[0].post(start, regions[0], 12);
        niches[2].post(start, regions[2], 12);
        assert_eq!(niches[0].progress(start), Progress::Waiting);
        assert_eq!(niches[0].missing(start).collect::<Vec<_>>(), [1]);
        niches[1].post(start, regions[1], 12);
        for (member, niche) in niches.iter().enumerate() {
            assert_eq!(niche.progress(start), Progress::Complete);
            let reduction = Reduction { dtype: DType::F32, op: ReduceOp::Sum };
            niche.reduce(
                start,
                0,
                reduction,
                1.0,
                Finish { divisor: 1, post: 1.0 },
                (regions[member], regions[member]),
            );
            let mut some = [0f32; 2];
            // SAFETY: as above.
            let output = unsafe { Region::new(some.as_mut_ptr().cast(), 8) };
            let shown = [Shown { member: 1, from: 4, len: 4 }, Shown { member: 0, from: 0, len: 4 }];
            niche.copy(start, &shown, output);
            assert_eq!(some, [3.0, start as f32], "pieces end to end");
        }
        assert!(values.iter().all(|v| *v == [start as f32 + 3.5, 4.5, 5.5]), "{values:?}");
    }
    let next = (1 << 32) + 5;
    niches[2].withdraw(next);
    assert_eq!(niches[0].progress(next), Progress::Withdrawn);
    assert_eq!(niches[1].progress(next - 1), Progress::Complete, "what was before stays as it was");
    assert!(niches[1].is_withdrawn(next) && !niches[1].is_withdrawn(next + 1));
}
