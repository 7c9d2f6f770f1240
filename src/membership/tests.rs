use super::*;

fn machine(me: u32, neighbours: &[u32]) -> Membership {
    let mut machine =
        Membership::new(Epoch(7), Rank(me), 8, Rules { silence_ns: 3000 * MS, heartbeat_ns: 500 * MS });
    neighbours.iter().for_each(|&rank| machine.link_up(Rank(rank), Time(0)));
    machine
}

fn drain(machine: &mut Membership) -> Vec<Intent> {
    std::iter::from_fn(|| machine.poll()).collect()
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
fn the_first_cause_wins_and_is_told_once() {
    let mut m = machine(3, &[1, 2]);
    m.link_down(Rank(1), Cause::System("connection reset by peer".into()));
    m.link_down(Rank(2), Cause::Exited);
    m.break_here(None, Cause::Aborted("no".into()));
    m.abort(Rank(2), Broken { epoch: Epoch(7), culprit: Some(Rank(5)), cause: Cause::Exited });
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
    assert_eq!(verdict(&drain(&mut m))[0].culprit, Some(Rank(1)));
}

#[test]
fn an_abort_of_another_epoch_is_late() {
    let mut m = machine(0, &[1]);
    m.abort(Rank(1), Broken { epoch: Epoch(6), culprit: None, cause: Cause::Exited });
    assert!(m.broken().is_none());
    m.goodbye(Rank(1), Rank(800), true);
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
    let broken = Broken { epoch: Epoch(7), culprit: Some(Rank(0)), cause: unreachable() };
    assert_eq!(**m.broken().unwrap(), broken);
}
