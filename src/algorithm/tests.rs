//! Every row of the table, at every size, on every shape of hosts, in random orders.

use super::*;
use crate::schedule::{Caps, Fault, Space, Span, Step, Verb, lower, verify};

fn hosts(shape: usize, size: u32) -> Arc<[u32]> {
    let host = |m: u32| match shape {
        0 => 0,
        1 => m,
        2 => m / 2,
        3 => m % 3,
        4 => m.ilog2_or_zero(),
        _ => m % 2,
    };
    let names: Vec<u32> = (0..size).map(host).collect();
    // In order of first appearance, as the engine numbers them.
    let mut seen = vec![];
    names
        .into_iter()
        .map(|h| {
            let at = seen.iter().position(|&s| s == h).unwrap_or(seen.len());
            if at == seen.len() {
                seen.push(h);
            }
            at as u32
        })
        .collect()
}
const SHAPES: usize = 6;

trait Log2 {
    fn ilog2_or_zero(self) -> u32;
}
impl Log2 for u32 {
    fn ilog2_or_zero(self) -> u32 {
        if self == 0 { 0 } else { self.ilog2() }
    }
}

fn query(row: &Algorithm, size: u32, shape: usize) -> Query {
    let op = if row.name == "adasum" { ReduceOp::Adasum } else { ReduceOp::Sum };
    Query {
        collective: row.collective,
        op,
        dtype: DType::F32,
        bytes: 1 << 20,
        hosts: hosts(shape, size),
        root: 0,
        prescaled: false,
        strict: false,
    }
}

fn build(row: &Algorithm, query: &Query) -> Vec<Schedule> {
    (0..query.size()).map(|me| row.schedule(me, query)).collect()
}

fn check(row: &Algorithm, query: &Query, all: &[Schedule], seeds: u64) -> usize {
    let mut steps = 0;
    for in_place in [false, true] {
        if in_place && !all[0].aliased {
            continue;
        }
        // Rendezvous is the hardest; of large sets the others take turns.
        let buffered = if query.size() & 1 == 0 { 1 } else { 3 };
        let slots = if query.size() <= 12 { vec![0, 1, 3] } else { vec![0, buffered] };
        for slots in slots {
            for seed in 0..seeds {
                match verify(all, &query.goal(in_place), seed, slots) {
                    Ok(n) => steps += n,
                    Err(fault) => {
                        let dump: String = all.iter().map(|s| s.to_string()).collect();
                        panic!(
                            "{row:?}: {fault}\n{query:?}\nin place {in_place}, slots {slots}, seed {seed}\n{dump}"
                        )
                    }
                }
            }
        }
    }
    steps
}

/// All variants of a query that make a difference to this row.
fn variants(row: &Algorithm, size: u32) -> Vec<Query> {
    let mut out = vec![];
    for shape in 0..SHAPES {
        let base = query(row, size, shape);
        let roots = if row.collective.has_root() { vec![0, size / 2, size - 1] } else { vec![0] };
        for root in roots {
            for (prescaled, strict) in [(false, false), (true, false), (false, true), (true, true)] {
                for bytes in [16, 1 << 20] {
                    for dtype in [DType::F32, DType::BF16] {
                        let q = Query { root, prescaled, strict, bytes, dtype, ..base.clone() };
                        let reduces = row.collective.reduces();
                        let matters = (reduces || !(prescaled || strict))
                            && (strict || dtype == DType::F32)
                            && (bytes > 16 || matches!(row.name, "direct" | "hierarchical"));
                        if matters && (row.fits)(&q).is_ok() && !out.iter().any(|o| same(row, o, &q)) {
                            out.push(q);
                        }
                    }
                }
            }
        }
    }
    out
}

/// Whether two queries give the same schedules for the same goal.
fn same(row: &Algorithm, a: &Query, b: &Query) -> bool {
    let alike = match row.name {
        "hierarchical" => a.hosts == b.hosts,
        // Only the order around the circle counts.
        "ring" => a.members_by_host().concat() == b.members_by_host().concat(),
        _ => true,
    };
    a.goal(false) == b.goal(false) && (row.chunks)(a) == (row.chunks)(b) && alike
}

#[test]
fn every_algorithm_verifies_at_every_size() {
    let mut steps = 0;
    for row in TABLE {
        for size in 1..=33 {
            for q in variants(row, size) {
                let seeds = if size <= 9 { 4 } else { 1 };
                steps += check(row, &q, &build(row, &q), seeds);
            }
        }
    }
    assert!(steps > 1_000_000, "only {steps} steps were run");
}

#[test]
fn lowered_schedules_verify_too() {
    let weak = Caps { touches_data: true, reduces_on_receipt: false };
    let blind = Caps { touches_data: false, reduces_on_receipt: false };
    for row in TABLE {
        for size in [1, 2, 3, 5, 6, 8, 13] {
            for q in variants(row, size).iter().filter(|q| !q.prescaled) {
                for (caps, slots) in [(weak, 1), (weak, 3), (blind, 1), (blind, 2)] {
                    let all: Vec<Schedule> = build(row, q).iter().map(|s| lower(s, caps, slots)).collect();
                    check(row, q, &all, 1);
                }
            }
        }
    }
}

#[test]
fn a_link_that_can_do_all_needs_no_lowering() {
    let caps = Caps { touches_data: true, reduces_on_receipt: true };
    for row in TABLE {
        let q = query(row, 4, 2);
        if (row.fits)(&q).is_ok() {
            let all = build(row, &q);
            assert!(all.iter().all(|s| *s == lower(s, caps, 2)), "{row:?}");
        }
    }
}

/// Whether any of many orders shows the fault.
fn caught(q: &Query, all: &[Schedule]) -> Option<Fault> {
    (0..200).find_map(|seed| verify(all, &q.goal(all[0].aliased), seed, seed as usize % 4).err())
}

fn ring_of_four() -> (Query, Vec<Schedule>) {
    let row = find("ring", Collective::Allreduce).expect("a row");
    let q = query(row, 4, 0);
    let all = build(row, &q);
    (q, all)
}

fn verbs(schedule: &Schedule, wanted: fn(&Verb) -> bool) -> Vec<usize> {
    (0..schedule.steps.len()).filter(|&i| wanted(&schedule.steps[i].verb)).collect()
}

#[test]
fn swapped_sends_are_caught() {
    let (q, mut all) = ring_of_four();
    let sends = verbs(&all[2], |v| matches!(v, Verb::Send { .. }));
    let verb = all[2].steps[sends[0]].verb.clone();
    all[2].steps[sends[0]].verb = std::mem::replace(&mut all[2].steps[sends[1]].verb, verb);
    assert!(caught(&q, &all).is_some());
}

#[test]
fn a_lost_receive_is_caught() {
    let (q, mut all) = ring_of_four();
    let last = *verbs(&all[1], |v| matches!(v, Verb::Recv { .. })).last().expect("a receive");
    assert_eq!(last, all[1].steps.len() - 1, "nothing depends on it");
    all[1].steps.pop();
    let fault = (0..20).find_map(|seed| verify(&all, &q.goal(false), seed, 1).err()).expect("a fault");
    assert_eq!(fault, Fault::Undelivered { from: 0, to: 1 });
    let fault = verify(&all, &q.goal(false), 1, 0).expect_err("nobody takes the message");
    assert!(matches!(fault, Fault::Deadlock { .. }), "{fault}");
}

#[test]
fn erased_dependencies_are_caught() {
    for row in TABLE {
        let q = query(row, 6, 2);
        if (row.fits)(&q).is_err() {
            continue;
        }
        let mut all = build(row, &q);
        let any = all.iter().any(|schedule| !schedule.dependencies.is_empty());
        for step in all.iter_mut().flat_map(|schedule| &mut schedule.steps) {
            step.after = 0..0;
        }
        // Sends that read the input and receives into the output need no order: then there is nothing to catch.
        let harmless =
            ["exchange alltoall", "direct gather", "direct allgather", "direct broadcast", "direct scatter"];
        let name = format!("{row:?}");
        assert_eq!(caught(&q, &all).is_some(), any && !harmless.contains(&name.as_str()), "{name}");
    }
}

#[test]
fn one_erased_dependency_is_caught() {
    let (q, good) = ring_of_four();
    // A member's receive-reduce must be complete before it passes the sum on.
    for victim in 0..4 {
        let mut all = good.clone();
        let second = verbs(&all[victim], |v| matches!(v, Verb::Send { .. }))[1];
        assert!(!all[victim].after(second).is_empty());
        all[victim].steps[second].after = 0..0;
        assert!(caught(&q, &all).is_some(), "member {victim}");
    }
}

#[test]
fn a_wrong_order_of_operands_is_caught_in_strict_mode() {
    let row = find("direct", Collective::Allreduce).expect("a row");
    let q = Query { strict: true, ..query(row, 4, 0) };
    let mut all = build(row, &q);
    for step in &mut all[3].steps {
        if let Verb::ReduceMany { srcs, .. } = &mut step.verb {
            srcs.swap(0, 1);
        }
    }
    assert!(matches!(caught(&q, &all), Some(Fault::Wrong { .. })));
    assert_eq!(caught(&Query { strict: false, ..q.clone() }, &all), None, "the sum is right all the same");

    let row = find("adasum", Collective::Allreduce).expect("a row");
    let q = query(row, 4, 0);
    let mut all = build(row, &q);
    for step in &mut all[0].steps {
        if let Verb::Combine { a, b, .. } = &mut step.verb {
            std::mem::swap(a, b);
        }
    }
    assert!(matches!(caught(&q, &all), Some(Fault::Wrong { .. })));
}

#[test]
fn a_wrong_order_of_two_operands_is_caught_in_strict_mode() {
    let row = find("doubling", Collective::Allreduce).expect("a row");
    let q = Query { strict: true, ..query(row, 6, 0) };
    let weak = Caps { touches_data: true, reduces_on_receipt: false };
    let mut all: Vec<Schedule> = build(row, &q).iter().map(|s| lower(s, weak, 1)).collect();
    assert_eq!(caught(&q, &all), None);
    let at = verbs(&all[5], |v| matches!(v, Verb::Reduce { .. }))[0];
    if let Verb::Reduce { a, b, .. } = &mut all[5].steps[at].verb {
        std::mem::swap(a, b);
    }
    assert!(matches!(caught(&q, &all), Some(Fault::Wrong { .. })));
}

/// Whether two steps of one member must not change places, by the plain rule.
fn conflict(schedule: &Schedule, a: &Step, b: &Step) -> bool {
    let cell = |s: Space| if s == Space::Input && schedule.aliased { Space::Output } else { s };
    let meet = |x: &Span, y: &Span| {
        cell(x.space) == cell(y.space) && x.chunks.start < y.chunks.end && y.chunks.start < x.chunks.end
    };
    let write_meets = |x: &Step, y: &Step| {
        x.verb.writes().is_some_and(|w| y.verb.reads().chain(y.verb.writes()).any(|s| meet(w, s)))
    };
    write_meets(a, b) || write_meets(b, a)
}

#[test]
fn dependencies_are_all_conflicts_and_nothing_but_conflicts() {
    for row in TABLE {
        for size in [2, 3, 6, 8] {
            let q = query(row, size, 2);
            if (row.fits)(&q).is_err() {
                continue;
            }
            for s in build(row, &q) {
                // For each step, the set of those that must be complete before it.
                let mut before: Vec<u128> = vec![];
                for (i, step) in s.steps.iter().enumerate() {
                    let mut set = 0;
                    for &d in s.after(i) {
                        let d = d as usize;
                        assert!(conflict(&s, &s.steps[d], step), "{row:?}: {d} before {i}\n{s}");
                        set |= before[d] | 1 << d;
                    }
                    for (d, earlier) in s.steps[..i].iter().enumerate() {
                        let ordered = set >> d & 1 == 1 || !conflict(&s, earlier, step);
                        assert!(ordered, "{row:?}: {d} and {i} are not ordered\n{s}");
                    }
                    before.push(set);
                }
                assert!(before.len() <= 128, "sets are one word");
            }
        }
    }
}

#[test]
fn large_sets_verify() {
    for row in TABLE {
        for (size, shape) in [(64, 2), (100, 4), (129, 3)] {
            // Quadratic rows are the same at any size.
            let heavy = matches!(row.name, "ring" | "direct" | "exchange");
            for strict in [false, true] {
                let q = Query { strict, ..query(row, size, shape) };
                if !heavy && (row.fits)(&q).is_ok() {
                    verify(&build(row, &q), &q.goal(true), 7, 0).unwrap_or_else(|e| panic!("{row:?}: {e}"));
                }
            }
        }
    }
}

#[test]
fn passing_parts_use_little_scratch() {
    let row = find("ring", Collective::Reducescatter).expect("a row");
    let q = query(row, 33, 0);
    assert!(build(row, &q).iter().all(|s| s.scratch <= 4), "33 members need no 33 slots");
    let row = find("tree", Collective::Allreduce).expect("a row");
    assert!(build(row, &query(row, 33, 0)).iter().all(|s| s.scratch == 0), "the output serves");
}

#[test]
fn names_of_the_knob_are_in_the_table() {
    for name in ["ring", "tree", "doubling", "direct", "hierarchical"] {
        assert!(find(name, Collective::Allreduce).is_some());
        assert!(find(name, Collective::Alltoall).is_none());
    }
    for (i, a) in TABLE.iter().enumerate() {
        assert!(TABLE[..i].iter().all(|b| (a.name, a.collective) != (b.name, b.collective)), "{a:?} twice");
    }
}

#[test]
fn only_canonical_orders_pass_for_canonical() {
    // The same schedules that pass without strict mode do not reduce in the canonical tree.
    let row = find("ring", Collective::Allreduce).expect("a row");
    let q = Query { strict: true, ..query(row, 5, 0) };
    assert!((row.fits)(&q).is_err());
    assert!(matches!(caught(&q, &build(row, &q)), Some(Fault::Wrong { .. })));
}

#[test]
fn a_missing_or_repeated_final_scale_is_caught() {
    let (q, good) = ring_of_four();
    let at = verbs(&good[1], |v| matches!(v, Verb::Finish { .. }))[0];
    let mut all = good.clone();
    let Verb::Finish { span } = all[1].steps[at].verb.clone() else { unreachable!() };
    all[1].steps[at].verb = Verb::Copy { dst: span.clone(), src: span };
    assert!(matches!(caught(&q, &all), Some(Fault::Wrong { .. })));
    let mut all = good.clone();
    let twice = all[1].steps[at].clone();
    let end = all[1].dependencies.len() as u32;
    all[1].dependencies.push(at as u32);
    all[1].steps.push(Step { after: end..end + 1, ..twice });
    assert!(matches!(caught(&q, &all), Some(Fault::Nonsense { .. })));
}

#[test]
fn writing_the_input_or_reading_garbage_is_caught() {
    let (q, good) = ring_of_four();
    let at = verbs(&good[0], |v| matches!(v, Verb::RecvReduce { .. }))[0];
    let mut all = good.clone();
    if let Verb::RecvReduce { dst, .. } = &mut all[0].steps[at].verb {
        dst.space = Space::Input;
    }
    assert!(matches!(caught(&q, &all), Some(Fault::Nonsense { reason: "it writes the input", .. })));
    let mut all = good;
    if let Verb::RecvReduce { with, .. } = &mut all[0].steps[at].verb {
        with.space = Space::Output;
    }
    let fault = verify(&all, &q.goal(false), 1, 1).expect_err("nobody wrote the output yet");
    assert!(fault.to_string().contains("nobody has written"), "{fault}");
}

#[test]
fn golden_schedules() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/algorithm/golden");
    let mut wrong = vec![];
    for row in TABLE {
        let mut text = String::new();
        for (size, shape, strict) in [(1, 0, false), (3, 0, true), (4, 2, false), (5, 3, false)] {
            let root = if row.collective.has_root() { size - 1 } else { 0 };
            let q = Query { root, strict, prescaled: size == 1, ..query(row, size, shape) };
            let note = format!("# {size} members on hosts {:?}, root {root}, strict {strict}\n", q.hosts);
            match (row.fits)(&q) {
                Ok(()) => {
                    text.push_str(&note);
                    build(row, &q).iter().for_each(|s| text.push_str(&s.to_string()));
                }
                Err(reason) => text.push_str(&format!("{note}does not fit: {reason}\n")),
            }
        }
        let path = folder.join(format!("{}_{}.txt", row.collective, row.name));
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::create_dir_all(&folder).expect("the folder can be made");
            std::fs::write(&path, &text).expect("the file can be written");
        } else if std::fs::read_to_string(&path).ok().as_ref() != Some(&text) {
            wrong.push(path);
        }
    }
    assert!(wrong.is_empty(), "schedules changed; look at them with UPDATE_GOLDEN=1 and git diff: {wrong:?}");
}

#[test]
fn many_members_are_built_in_little_time() {
    // Linear in the steps: a quadratic derivation would take minutes here.
    for row in TABLE.iter().filter(|row| (row.fits)(&query(row, 4096, 0)).is_ok()) {
        let schedule = row.schedule(1, &query(row, 4096, 0));
        assert!(schedule.steps.len() < 5 * 4096, "{row:?}: {}", schedule.steps.len());
        assert!(schedule.dependencies.len() < 20 * 4096, "{row:?}: {}", schedule.dependencies.len());
    }
}

#[test]
fn schedules_depend_on_bytes_only_through_their_chunks() {
    for row in TABLE {
        for size in [3, 6, 7] {
            for shape in 0..SHAPES {
                let a = query(row, size, shape);
                for bytes in [0, 100, 64 << 10, 1 << 40] {
                    let b = Query { bytes, dtype: DType::F64, ..a.clone() };
                    let comparable = (row.fits)(&a).is_ok() && (row.chunks)(&a) == (row.chunks)(&b);
                    assert!(!comparable || build(row, &a) == build(row, &b), "{row:?}: {b:?}");
                }
            }
        }
    }
}
