use super::*;
use crate::rendezvous::card::tests::card;

fn rounds(size: u32) -> (Rounds, Instant) {
    (Rounds::new(size, JobId::default(), Epoch(0), Duration::from_secs(60)), Instant::now())
}

fn registration(rank: u32, size: u32) -> Registration {
    Registration { card: card(rank), size, knobs: Vec::new(), past: None }
}

fn reason(verdict: &Verdict) -> &str {
    match &verdict.answer {
        Answer::Refused(reason) => reason,
        _ => panic!("a refusal was expected"),
    }
}

#[test]
fn the_last_rank_completes_the_round() {
    let (mut rounds, now) = rounds(2);
    assert!(rounds.register(10, Epoch(0), registration(1, 2), now, |_| true).is_none());
    let verdict = rounds.register(11, Epoch(0), registration(0, 2), now, |_| true).unwrap();
    assert_eq!(verdict.to, [11, 10]);
    let Answer::Table(table) = verdict.answer else { panic!("a table was expected") };
    assert_eq!(table.cards, [card(0), card(1)]);
    assert!(rounds.has_begun(Epoch(0)) && rounds.deadline().is_none());
}

#[test]
fn a_rank_that_died_is_replaced_and_one_that_lives_is_not() {
    let (mut rounds, now) = rounds(2);
    rounds.register(10, Epoch(0), registration(1, 2), now, |_| true);
    let verdict = rounds.register(11, Epoch(0), registration(1, 2), now, |_| true).unwrap();
    assert!(verdict.to == [11] && reason(&verdict).contains("two processes claim rank 1"));
    assert!(rounds.register(12, Epoch(0), registration(1, 2), now, |_| false).is_none());
    // The old connection's end does not take the new one with it.
    rounds.forget(10);
    assert_eq!(rounds.register(13, Epoch(0), registration(0, 2), now, |_| true).unwrap().to, [13, 12]);
}

#[test]
fn the_missing_are_named_with_what_failed_and_may_come_to_a_new_round() {
    let (mut rounds, now) = rounds(3);
    rounds.note_failure("10.0.0.9:1: protocol versions differ".into());
    rounds.register(10, Epoch(0), registration(1, 3), now, |_| true);
    assert!(rounds.expire(now).is_empty());
    let verdicts = rounds.expire(now + Duration::from_secs(60));
    assert_eq!(verdicts[0].to, [10]);
    let text = reason(&verdicts[0]).to_owned();
    assert!(
        text.contains("ranks 0, 2 of 3 did not arrive") && text.contains("protocol versions differ"),
        "{text}"
    );
    let late = rounds.register(11, Epoch(0), registration(2, 3), now, |_| true).unwrap();
    assert_eq!(reason(&late), text);
    assert!(
        rounds.register(12, Epoch(0), registration(2, 3), now, |_| true).is_none(),
        "a second try is a new round"
    );
}

#[test]
fn sizes_builds_and_knobs_must_agree() {
    let (mut rounds, now) = rounds(2);
    let verdict = rounds.register(10, Epoch(0), registration(1, 3), now, |_| true).unwrap();
    assert!(reason(&verdict).contains("has 3 ranks") && reason(&verdict).contains("expects 2"));
    let mut other = registration(1, 2);
    other.card.build = "carole 9".into();
    rounds.register(11, Epoch(0), other, now, |_| true);
    let verdict = rounds.register(12, Epoch(0), registration(0, 2), now, |_| true).unwrap();
    assert!(verdict.to == [12, 11] && reason(&verdict).contains("rank 1 runs carole 9"), "{verdict:?}");
    let mut other = registration(1, 2);
    other.knobs.push(("CAROLE_X".into(), "1".into()));
    rounds.register(13, Epoch(0), other, now, |_| true);
    let verdict = rounds.register(14, Epoch(0), registration(0, 2), now, |_| true).unwrap();
    assert!(reason(&verdict).contains("'1' on rank 1, unknown on rank 0"), "{verdict:?}");
    assert!(!rounds.has_begun(Epoch(0)));
}

#[test]
fn epochs_are_bounded_and_go_forward() {
    let (mut rounds, now) = rounds(2);
    for epoch in 0..8 {
        assert!(rounds.register(epoch.into(), Epoch(epoch), registration(0, 2), now, |_| true).is_none());
    }
    let verdict = rounds.register(99, Epoch(8), registration(0, 2), now, |_| true).unwrap();
    assert!(reason(&verdict).contains("different epochs"));
    rounds.register(20, Epoch(3), registration(1, 2), now, |_| true).unwrap();
    let verdict = rounds.register(21, Epoch(2), registration(1, 2), now, |_| true).unwrap();
    assert!(reason(&verdict).contains("epoch 2 of this job has already begun"));
}
