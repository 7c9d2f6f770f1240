#![expect(clippy::needless_range_loop, reason = "members are indices of several lists at once")]

use super::cluster::*;
use super::*;
use crate::types::{DType, JoinAverage, Place, ReduceOp};

pub(super) const SHAPES: &[fn(u32) -> u32] = &[|_| 0, |i| i, |i| i / 2, |i| i % 3, |i| i / 4];

fn sizes() -> impl Iterator<Item = usize> {
    (1..=9).chain([33])
}

pub(super) fn hosts(n: usize, shape: usize) -> Vec<u32> {
    (0..n as u32).map(SHAPES[shape % SHAPES.len()]).collect()
}

pub(super) fn rules() -> Rules {
    Rules { window_ns: 50_000, ..Rules::default() }
}

/// Submits `names` on all members, each in its own order, with other things happening in between.
fn step(cluster: &mut Cluster, names: &[(String, Signature)]) -> Vec<Vec<OpId>> {
    let n = cluster.size();
    let mut orders: Vec<Vec<usize>> = Vec::new();
    for _ in 0..n {
        let mut order: Vec<usize> = (0..names.len()).collect();
        cluster.random.shuffle(&mut order);
        orders.push(order);
    }
    let mut ops = vec![Vec::new(); n];
    let mut turns: Vec<usize> = (0..n).flat_map(|m| vec![m; names.len()]).collect();
    cluster.random.shuffle(&mut turns);
    for member in turns {
        let i = orders[member].pop().unwrap();
        let op = cluster.submit(member, &names[i].0, &names[i].1);
        ops[member].push(op);
        if cluster.random.below(20) == 0 {
            cluster.wait_for(member, op);
        }
        if cluster.random.below(10) == 0 {
            let until = cluster.now.after_ns(cluster.random.below(30_000));
            cluster.run(until);
        }
    }
    ops
}

pub(super) fn check_all_ran(cluster: &Cluster, ops: &[Vec<OpId>]) {
    for (member, ops) in ops.iter().enumerate() {
        for op in ops {
            assert!(matches!(cluster.outcomes[member].get(op), Some(Outcome::Ran { .. })), "{op:?}");
        }
    }
}

#[test]
fn every_size_and_shape_of_hosts_agrees_step_after_step() {
    for (seed, n) in sizes().enumerate() {
        for shape in 0..SHAPES.len() {
            let mut cluster = Cluster::new(&hosts(n, shape), rules(), seed as u64 * 100 + shape as u64);
            for _ in 0..5 {
                let names: Vec<_> =
                    (0..20).map(|i| (format!("g{i}"), signature(Collective::Allreduce, &[i, 4]))).collect();
                let ops = step(&mut cluster, &names);
                cluster.settle();
                check_all_ran(&cluster, &ops);
                cluster.check_finished();
            }
            assert!(n > 1 || cluster.messages == 0, "one member sends nothing");
        }
    }
}

#[test]
fn a_thousand_tensors_in_random_order_for_fifty_steps() {
    let mut cluster = Cluster::new(&hosts(5, 2), rules(), 11);
    let names: Vec<_> =
        (0..1000).map(|i| (format!("layer.{i}"), signature(Collective::Allreduce, &[i]))).collect();
    for _ in 0..50 {
        let ops = step(&mut cluster, &names);
        cluster.settle();
        check_all_ran(&cluster, &ops);
        cluster.logs.iter().for_each(|log| assert_eq!(log.len(), cluster.logs[0].len()));
    }
    cluster.check_finished();
}

#[test]
fn a_cached_step_is_one_message_each_way_and_few_bytes() {
    let mut cluster = Cluster::new(&[0, 0, 1, 1], rules(), 1);
    let names: Vec<_> =
        (0..1000).map(|i| (format!("w{i}"), signature(Collective::Allreduce, &[8]))).collect();
    for round in 0..2 {
        let before = cluster.messages;
        for member in 0..4 {
            for (name, signature) in &names {
                cluster.submit(member, name, signature);
            }
        }
        cluster.settle();
        assert_eq!(cluster.messages - before, 6, "3 links, up and down, in round {round}");
    }
    cluster.check_finished();
}

#[test]
fn a_tiny_cache_evicts_alike_and_refused_keys_are_announced_again() {
    for capacity in [0, 1, 4] {
        for seed in 0..20 {
            let rules = Rules { cache_keys: capacity, ..rules() };
            let mut cluster = Cluster::new(&hosts(7, 2), rules, seed);
            for round in 0..12 {
                let mut names: Vec<_> =
                    (0..6).map(|i| (format!("n{i}"), signature(Collective::Allreduce, &[3]))).collect();
                names.push((format!("step{round}"), signature(Collective::Allreduce, &[3])));
                let ops = step(&mut cluster, &names);
                // Without a pause: the next step meets evictions under way.
                let until = cluster.now.after_ns(cluster.random.below(2) * 5_000_000 + 200_000);
                cluster.run(until);
                cluster.settle();
                check_all_ran(&cluster, &ops);
                assert!(cluster.nodes.iter().all(|node| node.table.len() <= capacity));
                assert!(cluster.nodes.iter().all(|node| node.table.rows.len() <= 7 + capacity));
            }
            cluster.check_finished();
        }
    }
}

/// Each member goes on as soon as its own operation has an outcome, so that members are in different steps.
#[test]
fn members_run_ahead_of_each_other_while_keys_are_evicted() {
    for seed in 0..60 {
        let rules = Rules { cache_keys: 4, ..rules() };
        let mut cluster = Cluster::new(&hosts(6, seed as usize), rules, seed);
        let mut at = vec![0usize; 6];
        let mut waiting: Vec<Vec<OpId>> = vec![Vec::new(); 6];
        for _ in 0..4000 {
            let member = cluster.random.below(6) as usize;
            let done = waiting[member].iter().all(|op| cluster.outcomes[member].contains_key(op));
            if done && at[member] < 20 {
                let step = at[member] as u64;
                at[member] += 1;
                waiting[member] = (0..3)
                    .map(|i| {
                        let name = format!("n{}", (step * (i + 1) + i) % 5 + 5 * i);
                        cluster.submit(member, &name, &signature(Collective::Allreduce, &[step % 2 + 1]))
                    })
                    .collect();
                let last = waiting[member][2];
                cluster.wait_for(member, last);
            }
            let until = cluster.now.after_ns(cluster.random.below(8000));
            cluster.run(until);
        }
        cluster.settle();
        assert!(at.iter().all(|&steps| steps == 20), "{at:?} in seed {seed}");
        cluster.check_finished();
    }
}

#[test]
fn names_that_change_at_each_step_stay_bounded() {
    let rules = Rules { cache_keys: 8, ..rules() };
    let mut cluster = Cluster::new(&hosts(4, 1), rules, 3);
    for round in 0..200 {
        let names = [(format!("loss.{round}"), signature(Collective::Allreduce, &[]))];
        step(&mut cluster, &names);
        cluster.settle();
    }
    cluster.check_finished();
    assert!(cluster.nodes.iter().all(|node| node.table.rows.len() <= 9));
}

#[test]
fn a_change_on_all_ranks_is_a_new_key_and_the_old_one_is_kept() {
    let mut cluster = Cluster::new(&hosts(3, 1), rules(), 3);
    let mut keys = Vec::new();
    for round in 0..6u64 {
        let ops: Vec<OpId> =
            (0..3).map(|m| cluster.submit(m, "x", &signature(Collective::Allreduce, &[round % 2]))).collect();
        cluster.settle();
        let Some(Outcome::Ran { key, .. }) = cluster.outcomes[0].get(&ops[0]) else { panic!() };
        keys.push(key.0);
    }
    assert_eq!(keys, [0, 1, 0, 1, 0, 1]);
    cluster.check_finished();
}

fn mismatches() -> Vec<(&'static str, Signature, Signature, &'static [&'static str])> {
    let base = signature(Collective::Allreduce, &[2, 3]);
    let with = |change: &dyn Fn(&mut Signature)| {
        let mut other = base.clone();
        change(&mut other);
        other
    };
    let broadcast = signature(Collective::Broadcast, &[2]);
    let mut other_root = broadcast.clone();
    other_root.root = Rank(3);
    let set = |ranks: &[u32]| {
        let mut it = signature(Collective::AddSet, &[]);
        it.tensors.clear();
        it.ranks = ranks.iter().map(|&r| Rank(r)).collect();
        it
    };
    vec![
        ("collective", base.clone(), signature(Collective::Allgather, &[0, 3]), &["allreduce", "allgather"]),
        ("dtype", base.clone(), with(&|s| s.tensors[0].dtype = DType::F64), &["float32", "float64"]),
        (
            "shape",
            base.clone(),
            signature(Collective::Allreduce, &[2, 4]),
            &["[2, 3]", "[2, 4]", "dimension 1"],
        ),
        (
            "rank",
            base.clone(),
            signature(Collective::Allreduce, &[2]),
            &["[2, 3]", "[2]", "2 and 1 dimensions"],
        ),
        (
            "shape with rows of its own",
            signature(Collective::Allgather, &[0, 3]),
            signature(Collective::Allgather, &[0, 4]),
            &["[*, 3]", "[*, 4]", "dimension 1"],
        ),
        ("op", base.clone(), with(&|s| s.op = ReduceOp::Max), &["sum", "max"]),
        ("root", broadcast, other_root, &["rank 1", "rank 3"]),
        ("prescale", base.clone(), with(&|s| s.scale.pre = 0.5), &["1.0", "0.5", "prescale"]),
        ("postscale", base.clone(), with(&|s| s.scale.post = 2.0), &["1.0", "2.0", "postscale"]),
        ("group", base.clone(), with(&|s| s.tensors.push(s.tensors[0].clone())), &["number of tensors"]),
        ("place", base.clone(), with(&|s| s.place = Place::Cuda), &["host memory", "CUDA"]),
        ("join", base.clone(), with(&|s| s.join_average = JoinAverage::Present), &["Size", "Present"]),
        ("ranks", set(&[0, 1]), set(&[0, 2]), &["ranks 0, 1", "ranks 0, 2"]),
    ]
}

#[test]
fn every_mismatch_has_the_same_words_on_all_members_and_the_run_goes_on() {
    for (what, good, bad, words) in mismatches() {
        for cached in [false, true] {
            let mut texts = std::collections::BTreeSet::new();
            for seed in 0..8 {
                let n = 7;
                let mut cluster = Cluster::new(&hosts(n, seed as usize), rules(), seed);
                if cached {
                    for m in 0..n {
                        cluster.submit(m, "grad/1", &good);
                    }
                    cluster.settle();
                }
                let mut order: Vec<usize> = (0..n).collect();
                cluster.random.shuffle(&mut order);
                let mut ops = vec![OpId(0); n];
                for m in order {
                    let signature = if m == 4 || m == 6 { &bad } else { &good };
                    ops[m] = cluster.submit(m, "grad/1", signature);
                    let until = cluster.now.after_ns(cluster.random.below(100_000));
                    cluster.run(until);
                }
                cluster.settle();
                for m in 0..n {
                    let Some(Outcome::Failed(text)) = cluster.outcomes[m].get(&ops[m]) else {
                        panic!("{what}: member {m} has {:?}", cluster.outcomes[m].get(&ops[m]));
                    };
                    texts.insert(text.clone());
                }
                let again: Vec<OpId> = (0..n).map(|m| cluster.submit(m, "grad/1", &good)).collect();
                cluster.settle();
                check_all_ran(&cluster, &again.into_iter().map(|op| vec![op]).collect::<Vec<_>>());
                cluster.check_finished();
            }
            assert_eq!(texts.len(), 1, "{what}: {texts:?}");
            let text = texts.first().unwrap();
            // Members 0 and 4 have the global ranks 1 and 9.
            for word in ["grad/1", "rank 1 ", "rank 9 "].iter().chain(words) {
                assert!(text.contains(word), "{what}: {text} lacks {word}");
            }
        }
    }
}

#[test]
fn a_refusal_fails_the_operation_everywhere_with_rank_and_reason() {
    let mut cluster = Cluster::new(&hosts(5, 1), rules(), 5);
    let good = signature(Collective::Alltoall, &[0, 2]);
    let mut ops = Vec::new();
    for m in 0..5 {
        let refused = (m >= 3).then(|| format!("splits sum to {m}, but there are 2 rows"));
        let call: &[u64] = if m >= 3 { &[] } else { &[1, 2, 3, 4, 5] };
        ops.push(cluster.try_submit(m, "a2a", false, &good, call, refused.as_deref()).unwrap());
    }
    cluster.settle();
    for m in 0..5 {
        let Some(Outcome::Failed(text)) = cluster.outcomes[m].get(&ops[m]) else { panic!() };
        assert_eq!(text, "'a2a' cannot run: rank 7 refused it: splits sum to 3, but there are 2 rows");
    }
    cluster.check_finished();
}

#[test]
fn row_counts_and_splits_reach_all_members_without_a_cache_miss() {
    for n in [1, 2, 5, 9] {
        let mut cluster = Cluster::new(&hosts(n, 2), rules(), 2);
        for round in 0..4u64 {
            let before = cluster.nodes[0].table.len();
            let gather = signature(Collective::Allgather, &[0, 4]);
            let alltoall = signature(Collective::Alltoall, &[0, 4]);
            let mut ops = Vec::new();
            for m in 0..n {
                let rows = [m as u64 * 10 + round];
                let splits: Vec<u64> = (0..n as u64).map(|to| to + m as u64 * 100 + round).collect();
                let a = cluster.try_submit(m, "g", false, &gather, &rows, None).unwrap();
                let b = cluster.try_submit(m, "a", false, &alltoall, &splits, None).unwrap();
                ops.push((a, b));
            }
            cluster.settle();
            for m in 0..n {
                let Some(Outcome::Ran { call, .. }) = cluster.outcomes[m].get(&ops[m].0) else { panic!() };
                assert_eq!(call.values, (0..n as u64).map(|i| i * 10 + round).collect::<Vec<_>>());
                let Some(Outcome::Ran { call, .. }) = cluster.outcomes[m].get(&ops[m].1) else { panic!() };
                for i in 0..n {
                    let splits: Vec<u64> = (0..n as u64).map(|to| to + i as u64 * 100 + round).collect();
                    assert_eq!(call.of(Member(i as u32)), splits);
                }
            }
            assert!(round == 0 || cluster.nodes[0].table.len() == before);
        }
        cluster.check_finished();
    }
}

#[test]
fn too_many_splits_on_one_rank_is_a_mismatch() {
    let mut cluster = Cluster::new(&hosts(3, 0), rules(), 2);
    let alltoall = signature(Collective::Alltoall, &[0, 4]);
    let calls: [&[u64]; 3] = [&[1, 1, 1], &[1, 1, 1, 1], &[1, 1, 1]];
    let ops: Vec<OpId> =
        (0..3).map(|m| cluster.try_submit(m, "a", false, &alltoall, calls[m], None).unwrap()).collect();
    cluster.settle();
    for m in 0..3 {
        let Some(Outcome::Failed(text)) = cluster.outcomes[m].get(&ops[m]) else { panic!() };
        assert!(text.contains("rank 1 submitted number of splits or row counts 3, rank 3"), "{text}");
    }
    cluster.check_finished();
}

#[test]
fn a_call_table_larger_than_a_message_is_continued() {
    // 12 members with 3000 tensors of 12 splits of four bytes each: more than a mebibyte.
    let n = 12;
    let mut cluster = Cluster::new(&hosts(n, 4), rules(), 2);
    let mut alltoall = signature(Collective::Alltoall, &[0, 4]);
    alltoall.tensors = vec![alltoall.tensors[0].clone(); 3000];
    let small = signature(Collective::Allreduce, &[1]);
    let splits: Vec<u64> = (0..3000 * n as u64).map(|i| (1 << 22) + i).collect();
    for _ in 0..2 {
        let mut ops = vec![Vec::new(); n];
        for (m, ops) in ops.iter_mut().enumerate() {
            ops.push(cluster.try_submit(m, "a", false, &alltoall, &splits, None).unwrap());
            ops.push(cluster.submit(m, "b", &small));
        }
        cluster.settle();
        check_all_ran(&cluster, &ops);
        let Some(Outcome::Ran { call, .. }) = cluster.outcomes[n - 1].get(&ops[n - 1][0]) else { panic!() };
        assert!(
            call.values.len() == n * splits.len() && call.values.chunks(splits.len()).all(|r| r == splits)
        );
    }
    assert!(cluster.largest > CONTROL_BYTES_MAX / 2 && cluster.largest <= CONTROL_BYTES_MAX);
    cluster.check_finished();
}

#[test]
fn announcements_beyond_a_message_are_split() {
    let mut cluster = Cluster::new(&hosts(3, 1), rules(), 2);
    let names: Vec<_> = (0..700)
        .map(|i| (format!("{i}{}", "x".repeat(4000)), signature(Collective::Allreduce, &[1])))
        .collect();
    for _ in 0..2 {
        let ops = step(&mut cluster, &names);
        cluster.settle();
        check_all_ran(&cluster, &ops);
    }
    cluster.check_finished();
}

#[test]
fn a_refused_call_can_be_repeated_at_once() {
    let mut cluster = Cluster::new(&hosts(3, 0), rules(), 4);
    let x = signature(Collective::Allreduce, &[1]);
    for _ in 0..2 {
        cluster.try_submit(1, "x", false, &x, &[], Some("no memory")).unwrap();
    }
    let again = cluster.try_submit(1, "x", false, &x, &[], None).unwrap();
    assert_eq!(cluster.try_submit(1, "x", false, &x, &[], None), Err(SubmitError::DuplicateName));
    let mut ops = vec![Vec::new(), vec![again], Vec::new()];
    let mut refused = vec![Vec::new(); 3];
    for m in [0, 2] {
        for _ in 0..2 {
            let op = cluster.try_submit(m, "x", true, &x, &[], None).unwrap();
            refused[m].push(op);
        }
        ops[m].push(cluster.try_submit(m, "x", true, &x, &[], None).unwrap());
    }
    cluster.settle();
    for (m, refused) in refused.iter().enumerate() {
        for op in refused {
            let Some(Outcome::Failed(text)) = cluster.outcomes[m].get(op) else { panic!() };
            assert!(text.contains("refused it: no memory"), "{text}");
        }
    }
    check_all_ran(&cluster, &ops);
    cluster.check_finished();
}

#[test]
fn duplicate_names_are_refused_and_unnamed_ones_are_held_in_order() {
    let mut cluster = Cluster::new(&hosts(3, 0), rules(), 4);
    let x = signature(Collective::Allreduce, &[1]);
    cluster.submit(0, "x", &x);
    assert_eq!(cluster.try_submit(0, "x", false, &x, &[], None), Err(SubmitError::DuplicateName));
    let mut ops = vec![Vec::new(); 3];
    for m in 0..3 {
        for i in 0..10 {
            let it = signature(Collective::Allreduce, &[i]);
            ops[m].push(cluster.try_submit(m, "ring.0", true, &it, &[], None).unwrap());
        }
    }
    cluster.submit(1, "x", &x);
    cluster.submit(2, "x", &x);
    cluster.settle();
    check_all_ran(&cluster, &ops);
    let shapes: Vec<&String> = cluster.logs[0].iter().filter(|line| line.contains("ring")).collect();
    assert_eq!(shapes.len(), 10);
    assert!(shapes.iter().enumerate().all(|(i, line)| line.contains(&format!("shape: [{i}]"))), "{shapes:?}");
    cluster.check_finished();
}
