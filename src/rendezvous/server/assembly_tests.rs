use super::*;
use crate::rendezvous::card::tests::card;
use crate::types::SetId;

const SECOND: Duration = Duration::from_secs(1);

fn terms(min: u32) -> Terms {
    Terms { authority: Authority::Launcher, min, patience: 60 * SECOND, shortage: 60 * SECOND }
}

/// An assembly and the time; connection numbers are worker numbers and 100 more for each epoch.
struct Scene {
    assembly: Assembly,
    now: Instant,
}

impl Scene {
    fn new(min: u32, started: &[Worker]) -> Scene {
        let mut assembly = Assembly::new(JobId::default(), terms(min), None);
        started.iter().for_each(|&worker| assembly.expect(worker));
        Scene { assembly, now: Instant::now() }
    }

    fn come(&mut self, worker: Worker, past: Option<Past>) -> Vec<Verdict> {
        let number = u64::from(worker) + 100 * past.as_ref().map_or(0, |past| u64::from(past.epoch.0) + 1);
        let registration = Registration { card: card(worker), size: 0, knobs: Vec::new(), past };
        self.assembly.register(number, worker, registration, self.now)
    }

    /// A member of an epoch comes again; it knows of the end of these.
    fn back(&mut self, worker: Worker, epoch: u32, rank: u32, dead: &[u32]) -> Vec<Verdict> {
        let dead = dead.iter().copied().map(Rank).collect();
        let sets = Sets { list: vec![(SetId(1), vec![Rank(0), Rank(1)])], next: 2 };
        self.come(worker, Some(Past { epoch: Epoch(epoch), rank: Rank(rank), dead, sets, ..Past::default() }))
    }
}

/// The workers of the table in these verdicts, in order of their ranks, and its epoch.
fn formed(verdicts: &[Verdict]) -> (u32, Vec<u32>) {
    let tables = verdicts.iter().find_map(|verdict| match &verdict.answer {
        Answer::Table(table) => Some(table),
        _ => None,
    });
    let table = tables.unwrap_or_else(|| panic!("a table was expected: {verdicts:?}"));
    for (rank, card) in table.cards.iter().enumerate() {
        assert_eq!(card.rank, Rank(rank as u32));
    }
    // The test's cards tell who they are by their process numbers.
    (table.epoch.0, table.cards.iter().map(|card| card.pid - 100).collect())
}

#[test]
fn the_first_epoch_waits_for_all_that_were_started() {
    let mut scene = Scene::new(1, &[3, 5, 9]);
    assert!(scene.come(9, None).is_empty());
    assert!(scene.come(3, None).is_empty());
    assert_eq!(formed(&scene.come(5, None)), (0, vec![3, 5, 9]));
    assert_eq!(scene.assembly.event(), Some(Event::Formed { epoch: Epoch(0), workers: vec![3, 5, 9] }));
}

#[test]
fn one_that_fails_at_its_start_is_not_waited_for() {
    let mut scene = Scene::new(2, &[0, 1, 2]);
    scene.come(0, None);
    scene.come(2, None);
    assert_eq!(formed(&scene.assembly.ended(1, scene.now)), (0, vec![0, 2]));
    // Nor is one that never comes.
    let mut scene = Scene::new(2, &[0, 1, 2]);
    scene.come(0, None);
    scene.come(2, None);
    scene.now += 60 * SECOND;
    assert_eq!(formed(&scene.assembly.expire(scene.now)), (0, vec![0, 2]));
}

#[test]
fn survivors_keep_their_order_and_newcomers_follow() {
    let mut scene = Scene::new(1, &[0, 1, 2, 3]);
    (0..4).for_each(|worker| drop(scene.come(worker, None)));
    scene.assembly.expect(7);
    assert!(scene.come(7, None).is_empty());
    assert_eq!(scene.assembly.news(), News { added: true, removed: false });
    assert!(scene.back(3, 0, 3, &[1]).is_empty());
    assert!(scene.back(0, 0, 0, &[]).is_empty());
    // The launcher's own word comes last, and is not needed.
    let verdicts = scene.back(2, 0, 2, &[]);
    assert_eq!(formed(&verdicts), (1, vec![0, 2, 3, 7]));
    let Answer::Table(table) = &verdicts[0].answer else { panic!() };
    assert_eq!(table.sets, Sets { list: vec![(SetId(1), vec![Rank(0)])], next: 2 });
    assert!(scene.assembly.ended(1, scene.now).is_empty());
    assert_eq!(scene.assembly.news(), News::default());
    let events: Vec<Event> = std::iter::from_fn(|| scene.assembly.event()).collect();
    assert_eq!(events[1], Event::Excluded(vec![1]));
    // It had only been stopped.
    let answer = &scene.back(1, 0, 1, &[])[0].answer;
    assert_eq!(*answer, Answer::Excluded(Epoch(1)));
}

#[test]
fn the_launchers_word_is_enough() {
    let mut scene = Scene::new(1, &[0, 1, 2]);
    (0..3).for_each(|worker| drop(scene.come(worker, None)));
    scene.back(2, 0, 2, &[]);
    scene.back(0, 0, 0, &[]);
    assert_eq!(formed(&scene.assembly.ended(1, scene.now)), (1, vec![0, 2]));
}

#[test]
fn one_that_lives_is_waited_for_and_one_that_is_silent_is_not() {
    let mut scene = Scene::new(1, &[0, 1, 2]);
    (0..3).for_each(|worker| drop(scene.come(worker, None)));
    assert_eq!(scene.assembly.awaited().count(), 0, "nobody meets yet");
    scene.back(0, 0, 0, &[]);
    scene.back(1, 0, 1, &[]);
    assert_eq!(scene.assembly.awaited().map(|(rank, _)| rank).collect::<Vec<_>>(), [Rank(2)]);
    assert!(scene.assembly.found(Epoch(0), Rank(2), Found::Alive, scene.now).is_empty());
    assert!(scene.assembly.found(Epoch(7), Rank(2), Found::Dead, scene.now).is_empty(), "another epoch's");
    assert_eq!(formed(&scene.assembly.found(Epoch(0), Rank(2), Found::Silent, scene.now)), (1, vec![0, 1]));
}

#[test]
fn a_goodbye_is_no_absence_until_the_doors_are_closed() {
    let mut scene = Scene::new(1, &[0, 1]);
    (0..2).for_each(|worker| drop(scene.come(worker, None)));
    let past = Past { left: vec![Rank(1)], sets: Sets { next: 1, ..Sets::default() }, ..Past::default() };
    assert!(scene.come(0, Some(past.clone())).is_empty());
    assert_eq!(formed(&scene.back(1, 0, 1, &[])), (1, vec![0, 1]));
    assert!(scene.come(0, Some(Past { epoch: Epoch(1), ..past })).is_empty());
    assert_eq!(formed(&scene.assembly.found(Epoch(1), Rank(1), Found::Dead, scene.now)), (2, vec![0]));
}

#[test]
fn too_few_wait_for_more_but_not_for_ever() {
    let mut scene = Scene::new(2, &[0, 1]);
    (0..2).for_each(|worker| drop(scene.come(worker, None)));
    assert!(scene.back(0, 0, 0, &[1]).is_empty());
    scene.now += SECOND;
    assert_eq!(formed(&scene.come(2, None)), (1, vec![0, 2]));
    assert!(scene.back(2, 1, 1, &[0]).is_empty());
    scene.now += 61 * SECOND;
    let verdicts = scene.assembly.expire(scene.now);
    assert!(matches!(&verdicts[0].answer, Answer::Refused(why) if why.contains("--min-np")), "{verdicts:?}");
    let last = std::iter::from_fn(|| scene.assembly.event()).last();
    assert_eq!(last, Some(Event::TooFew { here: 1 }));
}

#[test]
fn whoever_is_let_go_hears_it_when_the_others_go_on() {
    let mut scene = Scene::new(1, &[0, 1, 2]);
    (0..3).for_each(|worker| drop(scene.come(worker, None)));
    scene.assembly.dismiss(1);
    assert_eq!(scene.assembly.news(), News { added: false, removed: true });
    assert!(scene.back(0, 0, 0, &[]).is_empty());
    let verdicts = scene.back(1, 0, 1, &[]);
    assert_eq!(verdicts[0].answer, Answer::Excluded(Epoch(0)), "at once: it is not needed");
    assert!(scene.assembly.ended(1, scene.now).is_empty());
    assert_eq!(formed(&scene.back(2, 0, 2, &[])), (1, vec![0, 2]));
    assert_eq!(scene.assembly.news(), News::default());
}

#[test]
fn one_that_does_not_fit_is_refused_alone() {
    let mut scene = Scene::new(1, &[0]);
    scene.come(0, None);
    let mut other = Registration { card: card(4), size: 0, knobs: Vec::new(), past: None };
    other.knobs.push(("CAROLE_X".into(), "1".into()));
    let verdicts = scene.assembly.register(9, 4, other, scene.now);
    assert!(verdicts[0].to == [9] && matches!(verdicts[0].answer, Answer::Refused(_)), "{verdicts:?}");
    assert_eq!(scene.assembly.news(), News::default());
}

#[test]
fn a_connection_that_ends_takes_its_worker_with_it() {
    let mut scene = Scene::new(1, &[0, 1]);
    (0..2).for_each(|worker| drop(scene.come(worker, None)));
    scene.back(0, 0, 0, &[]);
    scene.assembly.forget(100);
    scene.assembly.forget(100);
    assert!(scene.back(1, 0, 1, &[]).is_empty());
    assert_eq!(formed(&scene.assembly.found(Epoch(0), Rank(0), Found::Dead, scene.now)), (1, vec![1]));
}

#[test]
fn ranks_among_themselves_need_a_majority() {
    let mut first = Scene::new(1, &[0, 1, 2]);
    first.come(0, None);
    first.come(1, None);
    let verdicts = first.come(2, None);
    let Answer::Table(table) = &verdicts[0].answer else { panic!() };
    let terms = Terms { authority: Authority::Majority, ..terms(1) };
    let mut scene = Scene { assembly: Assembly::new(JobId::default(), terms, Some(table)), now: first.now };
    assert!(scene.back(2, 0, 2, &[]).is_empty());
    assert!(scene.assembly.found(Epoch(0), Rank(1), Found::Silent, scene.now).is_empty());
    let verdicts = scene.assembly.found(Epoch(0), Rank(0), Found::Silent, scene.now);
    assert_eq!(verdicts[0].answer, Answer::Minority { here: 1, of: 3 });
    // Whoever finds that others have gone on goes nowhere.
    scene.back(1, 0, 1, &[]);
    let verdicts = scene.assembly.found(Epoch(0), Rank(2), Found::GoneOn(Epoch(1)), scene.now);
    assert_eq!(verdicts[0].answer, Answer::Excluded(Epoch(1)));
}
