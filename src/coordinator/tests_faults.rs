//! Joins, stalls, and members that do wrong.
#![expect(clippy::needless_range_loop, reason = "members are indices of several lists at once")]

use super::cluster::*;
use super::tests::{SHAPES, check_all_ran, hosts, rules};
use super::*;

#[test]
fn a_join_waits_for_what_was_held_before_it() {
    let mut cluster = Cluster::new(&hosts(3, 1), rules(), 4);
    let x = signature(Collective::Allreduce, &[1]);
    let join = signature(Collective::Join, &[]);
    let mut ops = vec![Vec::new(); 3];
    for m in [2, 0, 1] {
        for _ in 0..4 {
            ops[m].push(cluster.try_submit(m, "ring.0", true, &x, &[], None).unwrap());
        }
        cluster.submit(m, "join", &join);
        assert_eq!(cluster.try_submit(m, "y", false, &x, &[], None), Err(SubmitError::HasJoined));
        let until = cluster.now.after_ns(300_000);
        cluster.run(until);
    }
    cluster.settle();
    check_all_ran(&cluster, &ops);
    assert!(cluster.logs[0].iter().all(|line| !line.contains("Member")), "nobody is absent");
    cluster.check_finished();
}

#[test]
fn joins_at_random_points() {
    let join = signature(Collective::Join, &[]);
    for seed in 0..150 {
        let n = [1, 2, 3, 5, 8, 12][seed as usize % 6];
        let mut cluster = Cluster::new(&hosts(n, seed as usize / 6), rules(), seed);
        for _ in 0..3 {
            // Member m submits the first counts[m] of the names, then joins.
            let counts: Vec<u64> = (0..n).map(|_| cluster.random.below(12)).collect();
            let mut next = vec![0; n];
            let mut ops = vec![Vec::new(); n];
            let mut joins = vec![OpId(0); n];
            let mut turns: Vec<usize> = (0..n).flat_map(|m| vec![m; counts[m] as usize + 1]).collect();
            cluster.random.shuffle(&mut turns);
            for m in turns {
                if next[m] < counts[m] {
                    let it = if next[m] % 3 == 2 { Collective::Allgather } else { Collective::Allreduce };
                    let call: &[u64] = if it == Collective::Allgather { &[m as u64 + 1] } else { &[] };
                    let (name, it) = (format!("t{}", next[m]), signature(it, &[0, 2]));
                    ops[m].push(cluster.try_submit(m, &name, false, &it, call, None).unwrap());
                    next[m] += 1;
                } else {
                    joins[m] = cluster.submit(m, "", &join);
                }
                let until = cluster.now.after_ns(cluster.random.below(60_000));
                cluster.run(until);
            }
            cluster.settle();
            check_all_ran(&cluster, &ops);
            for m in 0..n {
                for (i, op) in ops[m].iter().enumerate() {
                    let Some(Outcome::Ran { absent, call, .. }) = cluster.outcomes[m].get(op) else {
                        panic!()
                    };
                    let away: Vec<Member> =
                        (0..n).filter(|&o| counts[o] <= i as u64).map(|o| Member(o as u32)).collect();
                    assert_eq!(*absent, away, "exactly those who did not submit");
                    for (o, row) in call.values.iter().enumerate() {
                        assert_eq!(*row, if away.contains(&Member(o as u32)) { 0 } else { o as u64 + 1 });
                    }
                }
                let last = cluster.outcomes[m].get(&joins[m]);
                assert!(matches!(last, Some(Outcome::Joined(_))));
                assert_eq!(last, cluster.outcomes[0].get(&joins[0]), "the same last");
            }
            cluster.check_finished();
        }
    }
}

/// Joins behind marks whose keys the parent has just evicted: those marks come again, and count.
#[test]
fn a_join_does_not_overtake_marks_that_were_refused() {
    let join = signature(Collective::Join, &[]);
    let x = signature(Collective::Allreduce, &[1]);
    let mut refused = 0;
    for seed in 0..400 {
        let n = [2, 3, 5, 9][seed as usize % 4];
        let mut cluster = Cluster::new(&hosts(n, 1), Rules { cache_keys: 2, ..rules() }, seed);
        let mut ops = vec![Vec::new(); n];
        for step in 0..3 {
            let mut turns: Vec<usize> = (0..n).flat_map(|m| vec![m; 5]).collect();
            cluster.random.shuffle(&mut turns);
            let mut next = vec![0; n];
            for m in turns {
                // Names in another order in each step, so that some are evicted when they are marked.
                let name = format!("t{}", (next[m] * (step + 1)) % 5);
                ops[m].push(cluster.try_submit(m, &name, true, &x, &[], None).unwrap());
                next[m] += 1;
                if next[m] == 5 {
                    cluster.submit(m, "", &join);
                }
                let until = cluster.now.after_ns(cluster.random.below(40_000));
                cluster.run(until);
            }
            cluster.settle();
        }
        check_all_ran(&cluster, &ops);
        cluster.check_finished();
        refused += cluster.logs[0].iter().filter(|line| line.contains("Member")).count();
    }
    assert_eq!(refused, 0, "nobody was absent");
}

#[test]
fn a_joined_root_fails_the_operation_in_clear_words() {
    let mut cluster = Cluster::new(&hosts(3, 0), rules(), 4);
    cluster.submit(0, "", &signature(Collective::Join, &[]));
    let broadcast = signature(Collective::Broadcast, &[3]);
    let ops: Vec<OpId> = (1..3).map(|m| cluster.submit(m, "b", &broadcast)).collect();
    cluster.settle();
    for m in 1..3 {
        let Some(Outcome::Failed(text)) = cluster.outcomes[m].get(&ops[m - 1]) else { panic!() };
        assert!(text.contains("its root, rank 1, has joined"), "{text}");
        cluster.submit(m, "", &signature(Collective::Join, &[]));
    }
    cluster.settle();
    cluster.check_finished();
}

#[test]
fn a_root_outside_the_set_and_strict_join_fail_everywhere() {
    let mut cluster = Cluster::new(&hosts(3, 0), Rules { strict_join: true, ..rules() }, 4);
    let mut broadcast = signature(Collective::Broadcast, &[3]);
    broadcast.root = Rank(2);
    let op = (0..3).map(|m| cluster.submit(m, "b", &broadcast)).last().unwrap();
    cluster.submit(0, "", &signature(Collective::Join, &[]));
    let gather = signature(Collective::Barrier, &[]);
    let late = (1..3).map(|m| cluster.submit(m, "c", &gather)).last().unwrap();
    cluster.settle();
    let Some(Outcome::Failed(text)) = cluster.outcomes[2].get(&op) else { panic!() };
    assert!(text.contains("rank 2, is not in the process set, whose ranks are ranks 1, 3, 5"), "{text}");
    let Some(Outcome::Failed(text)) = cluster.outcomes[2].get(&late) else { panic!() };
    assert!(text.contains("HOROVOD_STRICT_COMPAT"), "{text}");
}

#[test]
fn row_counts_beyond_memory_fail_everywhere_instead_of_overflowing() {
    let mut cluster = Cluster::new(&hosts(3, 0), rules(), 4);
    let gather = signature(Collective::Allgather, &[0, 1 << 40]);
    let ops: Vec<OpId> =
        (0..3).map(|m| cluster.try_submit(m, "g", false, &gather, &[1 << 45], None).unwrap()).collect();
    cluster.settle();
    for m in 0..3 {
        let Some(Outcome::Failed(text)) = cluster.outcomes[m].get(&ops[m]) else { panic!() };
        assert!(text.contains("are more than"), "{text}");
    }
}

const SECOND: u64 = 1_000_000_000;

#[test]
fn a_stall_is_warned_of_with_names_and_ranks_once_a_period() {
    for shape in 0..SHAPES.len() {
        let mut cluster = Cluster::new(&hosts(12, shape), rules(), shape as u64);
        let x = signature(Collective::Allreduce, &[1]);
        let mut ops = Vec::new();
        for m in (0..12).filter(|m| ![3, 7, 8].contains(m)) {
            ops.push((m, cluster.submit(m, "grad/12", &x)));
        }
        cluster.run(Time(59 * SECOND));
        assert!(cluster.warnings.is_empty());
        cluster.run(Time(61 * SECOND + SECOND / 2));
        assert_eq!(cluster.warnings.len(), 1);
        // Members 3, 7 and 8.
        assert!(cluster.warnings[0].contains("'grad/12' waits since 60 s for ranks 7, 15, 17"));
        for &(m, op) in &ops {
            let text = cluster.nodes[m].explain(op, cluster.now);
            assert_eq!(text, "waiting for ranks 7, 15, 17 on grad/12 since 61 s");
        }
        cluster.submit(7, "grad/12", &x);
        cluster.run(Time(130 * SECOND));
        assert_eq!(cluster.warnings.len(), 2);
        assert!(cluster.warnings[1].contains("since 120 s for ranks 7, 17"), "{}", cluster.warnings[1]);
        cluster.submit(3, "grad/12", &x);
        cluster.submit(8, "grad/12", &x);
        cluster.run(Time(400 * SECOND));
        assert_eq!(cluster.warnings.len(), 2);
        assert_eq!(cluster.breaks, []);
        cluster.check_finished();
    }
}

#[test]
fn a_stall_beyond_its_limit_ends_the_epoch_naming_the_missing() {
    for warn in [0, 60 * SECOND] {
        let rules = Rules { stall_warn_ns: warn, stall_fail_ns: 90 * SECOND, ..rules() };
        let mut cluster = Cluster::new(&hosts(10, 2), rules, 1);
        // Only a leaf knows of it: its parent and the root have not submitted it.
        cluster.submit(9, "only", &signature(Collective::Allreduce, &[1]));
        cluster.run(Time(300 * SECOND));
        assert_eq!(cluster.warnings.len(), usize::from(warn > 0));
        let missing = (0..9).map(|m| Rank(m * 2 + 1)).collect();
        assert_eq!(cluster.breaks, [(0, Cause::Stalled { tensor: "only".into(), missing })]);
        assert!(cluster.now >= Time(90 * SECOND));
    }
}

#[test]
fn marks_that_come_twice_are_noticed() {
    let mut noticed = 0;
    for seed in 0..50 {
        let mut cluster = Cluster::new(&hosts(6, 2), rules(), seed);
        cluster.duplicate_marks = true;
        for _ in 0..3 {
            let names: Vec<_> =
                (0..5).map(|i| (format!("g{i}"), signature(Collective::Allreduce, &[i]))).collect();
            let clean = cluster.blamed.is_empty();
            if clean {
                let (n, names) = (cluster.size(), &names);
                for m in 0..n {
                    for (name, it) in names {
                        let _ = cluster.try_submit(m, name, true, it, &[], None);
                    }
                }
                cluster.settle();
            }
        }
        noticed += usize::from(!cluster.blamed.is_empty());
    }
    assert!(noticed >= 45, "{noticed} of 50");
}

#[test]
fn words_against_the_direction_of_the_tree_and_nonsense_are_blamed() {
    let mut cluster = Cluster::new(&hosts(4, 0), rules(), 1);
    let bodies: &[(u32, &[u8])] = &[
        (1, &[]),
        (1, &[9, 0]),
        (1, &[2, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (1, &[1, 0, 1, 5, 1]),
        (1, &[1, 0, 4, 1, 2, 1]),
        (1, &[1, 64]),
        (0, &[1, 0]),
    ];
    for (from, body) in bodies {
        let answer = cluster.nodes[0].receive(Member(*from), body, Time(0));
        assert!(matches!(answer, Err(Cause::Misbehaved(_))), "{body:?}: {answer:?}");
    }
    let answer = cluster.nodes[1].receive(Member(0), &[2, 0, 1, 0, 0, 0, 0, 0, 0, 0], Time(0));
    assert!(matches!(answer, Err(Cause::Misbehaved(_))));
    let answer = cluster.nodes[1].receive(Member(2), &[2, 0, 0, 0, 0, 0, 0, 0, 0, 0], Time(0));
    assert!(matches!(answer, Err(Cause::Misbehaved(_))));
}

#[test]
fn corrupted_messages_are_blamed_or_obeyed_but_never_panic() {
    let mut blamed = 0;
    for seed in 0..600 {
        let n = 2 + seed as usize % 8;
        let rules = Rules { cache_keys: 3, stall_warn_ns: 400_000, ..rules() };
        let mut cluster = Cluster::new(&hosts(n, seed as usize / 8), rules, seed);
        cluster.corrupt_one_in = 12;
        for _ in 0..3 {
            for m in 0..n {
                for i in 0..4u64 {
                    let (kind, call): (_, &[u64]) =
                        if i == 3 { (Collective::Allgather, &[7]) } else { (Collective::Allreduce, &[]) };
                    let it = signature(kind, &[0, i]);
                    let refused = (cluster.random.below(30) == 0).then_some("no");
                    let _ = cluster.try_submit(m, &format!("g{i}"), i == 1, &it, call, refused);
                }
                if cluster.random.below(4) == 0 {
                    let _ = cluster.try_submit(m, "", false, &signature(Collective::Join, &[]), &[], None);
                }
            }
            if cluster.blamed.is_empty() {
                cluster.settle();
            }
        }
        blamed += usize::from(!cluster.blamed.is_empty());
    }
    assert!(blamed > 300, "{blamed}");
}
