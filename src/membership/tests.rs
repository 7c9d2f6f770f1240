use super::*;
use crate::types::SetId;

fn machine(me: u32, neighbours: &[u32]) -> Membership {
    let mut machine =
        Membership::new(Epoch(7), Rank(me), 8, Rules { silence_ns: 3000 * MS, heartbeat_ns: 500 * MS });
    neighbours.iter().for_each(|&rank| machine.link_up(Rank(rank), Time(0)));
    machine
}

fn drain(machine: &mut Membership) -> Vec<Intent> {
    std::iter::from_fn(|| machine.poll()).collect()
}

/// Lets the moment pass in which a graver cause may come.
fn settle(machine: &mut Membership) {
    machine.handle_timeout(Time(20_000 * MS));
    machine.handle_timeout(Time(20_000 * MS + SETTLE_NS));
}

fn verdict(intents: &[Intent]) -> Vec<Arc<Broken>> {
    intents.iter().filter_map(|i| if let Intent::Broke(b) = i { Some(b.clone()) } else { None }).collect()
}

#[test]
fn silence_is_told_in_the_same_words_however_late_it_is_noticed() {
    let mut words = Vec::new();
    for late in [0, 1, 700] {
        let mut m = machine(0, &[1, 2]);
        m.heard(Rank(2), Time((3000 + late) * MS));
        m.handle_timeout(Time((3000 + late) * MS));
        settle(&mut m);
        let intents = drain(&mut m);
        words.push(verdict(&intents)[0].to_string());
        assert!(intents.iter().any(|i| matches!(i, Intent::Abort { to: Rank(2), .. })));
        assert_eq!(m.poll_timeout(), None);
    }
    assert!(words[0].contains("rank 1 has been silent for 3000 ms"), "{}", words[0]);
    assert!(words.iter().all(|w| *w == words[0]));
}

#[test]
fn one_moment_before_the_limit_nobody_is_silent() {
    let mut m = machine(0, &[1]);
    m.handle_timeout(Time(3000 * MS - 1));
    assert!(verdict(&drain(&mut m)).is_empty());
}

#[test]
fn heartbeats_go_only_where_nothing_was_sent() {
    let mut m = machine(0, &[1, 2]);
    assert_eq!(m.poll_timeout(), Some(Time(500 * MS)));
    m.told(Rank(2), Time(400 * MS));
    m.handle_timeout(Time(500 * MS));
    assert_eq!(drain(&mut m), [Intent::Heartbeat(Rank(1))]);
    m.handle_timeout(Time(500 * MS));
    assert_eq!(drain(&mut m), []);
    assert_eq!(m.poll_timeout(), Some(Time(900 * MS)));
}

#[test]
fn the_first_cause_that_was_noticed_here_counts_and_is_told_once() {
    let mut m = machine(3, &[1, 2]);
    m.link_down(Rank(1), Cause::System("connection reset by peer".into()));
    m.link_down(Rank(2), Cause::Exited);
    m.break_here(None, Cause::Aborted("no".into()));
    m.abort(Rank(2), Broken { epoch: Epoch(7), culprit: Some(Rank(5)), cause: Cause::Exited });
    settle(&mut m);
    m.link_down(Rank(2), Cause::Exited);
    m.abort(Rank(2), Broken { epoch: Epoch(7), culprit: Some(Rank(0)), cause: Cause::Exited });
    settle(&mut m);
    let told = verdict(&drain(&mut m));
    assert_eq!(told.len(), 1);
    assert_eq!(*told[0], Broken { epoch: Epoch(7), culprit: Some(Rank(1)), cause: Cause::Exited });
}

#[test]
fn a_death_has_the_same_words_for_those_who_saw_it_and_those_who_were_told() {
    let causes = [Cause::Exited, Cause::System("broken pipe".into()), Cause::System("reset".into())];
    let mut words = Vec::new();
    for cause in causes {
        let mut saw = machine(0, &[1, 2]);
        saw.link_down(Rank(1), cause);
        settle(&mut saw);
        let intents = drain(&mut saw);
        words.push(verdict(&intents)[0].to_string());
        for intent in intents {
            if let Intent::Abort { to, broken } = intent {
                let mut bytes = Vec::new();
                crate::wire::Message::Abort((*broken).clone()).encode(&mut bytes);
                let Ok(crate::wire::Message::Abort(broken)) = crate::wire::Message::decode(&bytes) else {
                    panic!("an abort");
                };
                let mut told = machine(to.0, &[0, 3]);
                told.abort(Rank(0), broken);
                settle(&mut told);
                let intents = drain(&mut told);
                words.push(verdict(&intents)[0].to_string());
                assert!(intents.iter().any(|i| matches!(i, Intent::Abort { to: Rank(3), .. })));
                assert!(!intents.iter().any(|i| matches!(i, Intent::Abort { to: Rank(0), .. })));
            }
        }
    }
    assert!(words.iter().all(|w| *w == words[0]), "{words:?}");
}

#[test]
fn long_words_are_cut_alike_here_and_there() {
    let mut m = machine(0, &[1]);
    m.break_here(Some(Rank(0)), Cause::Aborted("é".repeat(5000)));
    let Cause::Aborted(text) = &m.broken().unwrap().cause else { panic!() };
    assert!(text.len() <= crate::limits::REASON_BYTES_MAX);
}

#[test]
fn who_said_goodbye_does_not_fail() {
    let mut m = machine(0, &[1, 2]);
    m.goodbye(Rank(1), Rank(1), true);
    m.goodbye(Rank(2), Rank(1), true);
    assert_eq!(
        drain(&mut m),
        [
            Intent::Departed { who: Rank(1), clean: true },
            Intent::Goodbye { to: Rank(2), who: Rank(1), clean: true }
        ]
    );
    m.link_down(Rank(1), Cause::Exited);
    m.heard(Rank(2), Time(9000 * MS));
    m.told(Rank(2), Time(9000 * MS));
    m.handle_timeout(Time(9000 * MS));
    assert_eq!(drain(&mut m), []);
    m.link_up(Rank(3), Time(9000 * MS));
    assert_eq!(drain(&mut m), [Intent::Goodbye { to: Rank(3), who: Rank(1), clean: true }]);
}

#[test]
fn an_exit_without_goodbye_is_a_death() {
    let mut m = machine(0, &[1]);
    m.link_down(Rank(1), Cause::Exited);
    settle(&mut m);
    assert_eq!(verdict(&drain(&mut m))[0].culprit, Some(Rank(1)));
}

#[test]
fn an_abort_of_another_epoch_is_late() {
    let mut m = machine(0, &[1]);
    m.abort(Rank(1), Broken { epoch: Epoch(6), culprit: None, cause: Cause::Exited });
    assert!(m.broken().is_none());
    m.goodbye(Rank(1), Rank(800), true);
    settle(&mut m);
    assert_eq!(m.broken().unwrap().culprit, Some(Rank(1)));
}

#[test]
fn who_cannot_be_reached_has_a_moment_to_say_goodbye_and_hides_nobody_else() {
    let unreachable = || Cause::Unreachable("no".into());
    let mut m = machine(0, &[1]);
    m.heard(Rank(1), Time(200 * MS));
    m.unreachable(Rank(2), Rank(2), Cause::Exited, Time(0));
    m.unreachable(Rank(3), Rank(0), unreachable(), Time(50 * MS));
    m.handle_timeout(Time(200 * MS - 1));
    assert!(m.broken().is_none());
    m.goodbye(Rank(1), Rank(2), true);
    m.handle_timeout(Time(200 * MS));
    assert!(m.broken().is_none(), "it has left");
    assert_eq!(m.poll_timeout(), Some(Time(250 * MS)));
    m.handle_timeout(Time(250 * MS));
    settle(&mut m);
    let broken = Broken { epoch: Epoch(7), culprit: Some(Rank(0)), cause: unreachable() };
    assert_eq!(**m.broken().unwrap(), broken);
}

#[test]
fn a_graver_cause_takes_the_place_of_the_first_and_is_passed_on_a_lesser_one_is_not() {
    let mut m = machine(3, &[1, 2]);
    let broken = |rank, cause| Broken { epoch: Epoch(7), culprit: Some(Rank(rank)), cause };
    m.link_up(Rank(5), Time(0));
    m.link_down(Rank(5), Cause::Exited);
    assert_eq!(drain(&mut m).len(), 2, "both neighbours are told, and nobody here");
    assert_eq!(m.poll_timeout(), Some(Time(0)));
    m.handle_timeout(Time(10 * MS));
    assert_eq!(m.poll_timeout(), Some(Time(10 * MS + SETTLE_NS)));
    m.abort(Rank(1), broken(6, Cause::Exited));
    m.abort(Rank(1), broken(0, Cause::Unreachable("no".into())));
    m.break_here(None, Cause::Aborted("too late to be noticed".into()));
    m.goodbye(Rank(1), Rank(1), true);
    assert_eq!(drain(&mut m), []);
    m.abort(Rank(1), broken(4, Cause::Exited));
    let graver = Arc::new(broken(4, Cause::Exited));
    assert_eq!(drain(&mut m), [Intent::Abort { to: Rank(2), broken: graver.clone() }]);
    m.link_up(Rank(7), Time(20 * MS));
    assert_eq!(drain(&mut m), [Intent::Abort { to: Rank(7), broken: graver.clone() }]);
    m.handle_timeout(Time(10 * MS + SETTLE_NS - 1));
    assert_eq!(drain(&mut m), []);
    m.handle_timeout(Time(10 * MS + SETTLE_NS));
    assert_eq!(drain(&mut m), [Intent::Broke(graver)]);
    assert_eq!(m.poll_timeout(), None);
}

#[test]
fn a_rank_that_fails_does_not_wait() {
    let mut m = machine(3, &[1]);
    m.break_here(Some(Rank(3)), Cause::Aborted("a bug".into()));
    assert_eq!(verdict(&drain(&mut m)).len(), 1);
    let mut two = Membership::new(Epoch(7), Rank(0), 2, Rules::default());
    two.link_up(Rank(1), Time(0));
    two.link_down(Rank(1), Cause::Exited);
    assert_eq!(verdict(&drain(&mut two)).len(), 1, "between two there is nobody to wait for");
}

/// Two ranks of eight die at about the same time; the six others' links hang together and are slow.
fn two_deaths(seed: u64) -> Vec<Option<Arc<Broken>>> {
    let mut state = seed;
    let mut below = move |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    let dead = [below(8) as u32, 0].map(Rank);
    let dead = [dead[0], Rank((dead[0].0 + 1 + below(7) as u32) % 8)];
    let live: Vec<Rank> = (0..8).map(Rank).filter(|rank| !dead.contains(rank)).collect();
    let mut machines: BTreeMap<Rank, Membership> =
        live.iter().map(|&rank| (rank, machine(rank.0, &[]))).collect();
    let mut link = |a: Rank, b: Rank| {
        machines.get_mut(&a).unwrap().link_up(b, Time(0));
        machines.get_mut(&b).unwrap().link_up(a, Time(0));
    };
    // Each has a link to one before it, so that all hang together; in a line at worst.
    (1..live.len()).for_each(|i| link(live[i], live[below(i as u64) as usize]));
    // What happens when: an abort that arrives, or the end of a link to a dead rank.
    let mut events: Vec<(u64, Rank, Option<Broken>, Rank)> = Vec::new();
    for (place, &who) in dead.iter().enumerate() {
        for &at in &live {
            if below(2) == 0 {
                continue;
            }
            machines.get_mut(&at).unwrap().link_up(who, Time(0));
            events.push((1 + place as u64 * below(6 * MS) + below(2 * MS), at, None, who));
        }
    }
    let mut now = 0;
    loop {
        for (&at, machine) in &mut machines {
            while let Some(intent) = machine.poll() {
                if let Intent::Abort { to, broken } = intent
                    && !dead.contains(&to)
                {
                    events.push((now + 1 + below(3 * MS), to, Some(Broken::clone(&broken)), at));
                }
            }
        }
        let timeouts =
            machines.values().filter(|m| m.settling.is_some()).filter_map(Membership::poll_timeout);
        let Some(next) = events.iter().map(|event| event.0).chain(timeouts.map(|at| at.0)).min() else {
            break;
        };
        now = now.max(next);
        let (due, later): (Vec<_>, Vec<_>) = events.into_iter().partition(|event| event.0 <= now);
        events = later;
        for (_, at, broken, from) in due {
            let machine = machines.get_mut(&at).unwrap();
            match broken {
                Some(broken) => machine.abort(from, broken),
                None => machine.link_down(from, Cause::Exited),
            }
        }
        for machine in machines.values_mut().filter(|m| m.settling.is_some()) {
            machine.handle_timeout(Time(now));
        }
    }
    machines.into_values().map(|machine| machine.broken).collect()
}

#[test]
fn two_deaths_at_once_have_one_verdict_on_all_survivors() {
    let mut second = 0;
    for seed in 0..2000 {
        let verdicts = two_deaths(seed);
        let Some(first) = &verdicts[0] else {
            assert!(verdicts.iter().all(Option::is_none), "seed {seed}: nobody had a link, or all know");
            continue;
        };
        assert!(verdicts.iter().all(|v| v.as_ref() == Some(first)), "seed {seed}: {verdicts:?}");
        second += 1;
    }
    assert!(second > 1500, "the deaths are noticed");
}

#[test]
fn of_several_deaths_none_is_asked_for_a_verdict() {
    // A host with ranks 0 to 2 is lost; of the other host's, rank 3 has lost its link to rank 1, and hears that rank 4 has
    // lost that to rank 0, which is graver.
    let parents: Arc<[Option<Rank>]> =
        [None, Some(0), Some(0), Some(0), Some(3), Some(3)].map(|parent| parent.map(Rank)).into();
    let mut m = Membership::new(Epoch(1), Rank(3), 6, Rules::default()).with_votes(parents);
    [1, 4, 5].into_iter().for_each(|rank| m.link_up(Rank(rank), Time(0)));
    let broken = Broken { epoch: Epoch(1), culprit: Some(Rank(0)), cause: Cause::Exited };
    m.link_down(Rank(1), Cause::Exited);
    m.abort(Rank(4), broken.clone());
    m.seal(vec![(SetId(3), 2)]);
    settle(&mut m);
    m.ballot(Rank(4), false, broken.clone(), vec![(SetId(3), 1)]);
    m.ballot(Rank(5), false, broken, vec![]);
    let asked: Vec<Rank> = drain(&mut m)
        .iter()
        .filter_map(|i| if let Intent::Ballot { to, .. } = i { Some(*to) } else { None })
        .collect();
    assert_eq!(asked, [Rank(2)], "nothing is known of rank 2; the others have died");
    m.unreachable(Rank(2), Rank(2), Cause::Exited, Time(0));
    let intents = drain(&mut m);
    assert_eq!(verdict(&intents).len(), 1);
    let told = |rank| {
        let is_told = |i: &Intent| matches!(i, Intent::Ballot { to, verdict: true, .. } if *to == Rank(rank));
        intents.iter().any(is_told)
    };
    assert!(told(4) && told(5));
    assert_eq!(m.verdict(), [(SetId(3), 2)]);
}
