use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn terms(min: u32, first: u32, max: u32) -> Terms {
    Terms {
        min,
        max,
        first,
        reset_limit: None,
        cooldown: (10 * SECOND, 60 * SECOND),
        timeout: 600 * SECOND,
        changing: true,
    }
}

struct Scene {
    plan: Plan,
    now: Instant,
}

impl Scene {
    fn new(terms: Terms, slots: &[(&str, u32)]) -> Scene {
        let now = Instant::now();
        let mut scene = Scene { plan: Plan::new(terms, now, 7), now };
        scene.hosts(slots);
        scene
    }

    fn hosts(&mut self, slots: &[(&str, u32)]) {
        self.plan.discovered(slots.iter().map(|(h, n)| ((*h).to_owned(), *n)).collect(), self.now);
    }

    fn ends(&mut self, worker: Worker, code: i32) {
        self.plan.ended(worker, code, "ended", self.now);
    }

    fn later(&mut self, time: Duration) {
        self.now += time;
        self.plan.expire(self.now);
    }

    fn steps(&mut self) -> Vec<Step> {
        std::iter::from_fn(|| self.plan.poll()).filter(|step| !matches!(step, Step::Say(_))).collect()
    }

    /// Who was started where.
    fn started(&mut self) -> Vec<(Worker, String)> {
        let start = |step| match step {
            Step::Start { worker, host } => (worker, host),
            other => panic!("{other:?}"),
        };
        self.steps().into_iter().map(start).collect()
    }

    fn over(&mut self) -> (i32, Option<String>) {
        match self.steps().pop() {
            Some(Step::End { code, why }) => (code, why),
            other => panic!("{other:?}"),
        }
    }
}

fn on(host: &str, workers: &[Worker]) -> Vec<(Worker, String)> {
    workers.iter().map(|worker| (*worker, host.to_owned())).collect()
}

#[test]
fn a_job_begins_when_there_are_slots_enough_and_grows_to_its_most() {
    let mut scene = Scene::new(terms(2, 3, 4), &[("a", 2)]);
    assert_eq!(scene.started(), []);
    scene.hosts(&[("a", 2), ("b", 9)]);
    assert_eq!(scene.started(), [on("a", &[0, 1]), on("b", &[2, 3])].concat());
    scene.plan.formed(&[0, 1, 2, 3]);
    scene.hosts(&[("a", 2), ("b", 9)]);
    assert_eq!(scene.started(), []);
}

#[test]
fn a_host_that_never_comes_ends_the_wait() {
    let mut scene = Scene::new(terms(2, 2, 2), &[("a", 1)]);
    scene.later(599 * SECOND);
    assert_eq!(scene.steps(), []);
    scene.later(2 * SECOND);
    let (code, why) = scene.over();
    assert!(code == 1 && why.unwrap().contains("--elastic-timeout"));
}

#[test]
fn the_place_of_one_that_failed_is_filled_when_its_host_has_cooled_down() {
    let mut scene = Scene::new(terms(1, 2, 2), &[("a", 2)]);
    assert_eq!(scene.started(), on("a", &[0, 1]));
    scene.plan.formed(&[0, 1]);
    scene.ends(1, 137);
    assert_eq!(scene.started(), [], "and the other one goes on");
    scene.plan.formed(&[0]);
    scene.later(9 * SECOND);
    assert_eq!(scene.started(), []);
    scene.later(11 * SECOND);
    assert_eq!(scene.started(), on("a", &[2]));
    scene.plan.formed(&[0, 2]);
    scene.ends(2, 1);
    scene.later(19 * SECOND);
    assert_eq!(scene.started(), [], "twice as long the second time");
    scene.later(11 * SECOND);
    assert_eq!(scene.started(), on("a", &[3]));
    // Another host is not held up.
    scene.ends(3, 1);
    scene.hosts(&[("a", 2), ("b", 1)]);
    assert_eq!(scene.started(), on("b", &[4]));
}

#[test]
fn one_that_fails_at_its_start_is_replaced_and_when_all_do_the_job_ends() {
    let mut scene = Scene::new(terms(2, 2, 2), &[("a", 2)]);
    scene.started();
    scene.ends(0, 3);
    assert_eq!(scene.started(), []);
    scene.later(20 * SECOND);
    assert_eq!(scene.started(), on("a", &[2]));
    scene.ends(2, 3);
    scene.ends(1, 4);
    let (code, why) = scene.over();
    assert!(code == 4 && why.unwrap().contains("all workers have failed"));
    assert_eq!(scene.plan.deadline(), None);
}

#[test]
fn all_workers_of_a_host_may_fail_at_once() {
    let mut scene = Scene::new(terms(1, 4, 4), &[("a", 2), ("b", 2)]);
    scene.started();
    scene.plan.formed(&[0, 1, 2, 3]);
    scene.ends(0, 137);
    scene.ends(1, 137);
    scene.plan.formed(&[2, 3]);
    assert_eq!(scene.started(), []);
    scene.later(40 * SECOND);
    assert_eq!(scene.started(), on("a", &[4, 5]));
}

#[test]
fn workers_of_a_host_that_is_gone_are_let_go() {
    let mut scene = Scene::new(terms(1, 3, 3), &[("a", 1), ("b", 2)]);
    scene.started();
    scene.plan.formed(&[0, 1, 2]);
    scene.hosts(&[("a", 1), ("b", 1)]);
    assert_eq!(scene.steps(), [Step::Dismiss(2)]);
    scene.hosts(&[("a", 3)]);
    assert_eq!(scene.steps()[0], Step::Dismiss(1));
    // Whoever was let go may end as it likes, and its host does not cool down.
    scene.ends(2, 1);
    scene.plan.formed(&[0]);
    scene.ends(1, 0);
    scene.hosts(&[("a", 3), ("b", 2)]);
    assert!(scene.steps().iter().all(|step| matches!(step, Step::Start { .. })));
}

#[test]
fn one_that_was_left_behind_is_given_time_to_end() {
    let mut scene = Scene::new(terms(1, 2, 2), &[("a", 1), ("b", 1)]);
    scene.started();
    scene.plan.formed(&[0, 1]);
    scene.plan.excluded(&[1], scene.now);
    scene.plan.formed(&[0]);
    assert_eq!(scene.steps(), []);
    scene.later(5 * SECOND);
    assert_eq!(scene.steps(), [Step::Kill(1)]);
    scene.ends(1, 137);
    assert_eq!(scene.steps(), [], "its host cools down");
    scene.later(20 * SECOND);
    assert_eq!(scene.started(), on("b", &[2]));
}

#[test]
fn success_ends_the_growth_and_the_last_one_the_job() {
    let mut scene = Scene::new(terms(1, 2, 3), &[("a", 2)]);
    scene.started();
    scene.plan.formed(&[0, 1]);
    scene.ends(0, 0);
    scene.hosts(&[("a", 3)]);
    assert_eq!(scene.started(), []);
    scene.ends(1, 0);
    assert_eq!(scene.over(), (0, None));
    // A failure after the first success counts.
    let mut scene = Scene::new(terms(1, 2, 3), &[("a", 2)]);
    scene.started();
    scene.plan.formed(&[0, 1]);
    scene.ends(0, 0);
    scene.ends(1, 9);
    assert_eq!(scene.over(), (9, None));
}

#[test]
fn one_that_has_just_come_has_not_the_state() {
    // The others end well while it starts.
    let mut scene = Scene::new(terms(1, 2, 3), &[("a", 2)]);
    scene.started();
    scene.plan.formed(&[0, 1]);
    scene.hosts(&[("a", 3)]);
    assert_eq!(scene.started(), on("a", &[2]));
    scene.ends(0, 0);
    assert_eq!(scene.steps(), []);
    scene.ends(1, 0);
    assert_eq!(scene.over(), (0, None));
    // Or they fail.
    let mut scene = Scene::new(terms(1, 2, 3), &[("a", 2)]);
    scene.started();
    scene.plan.formed(&[0, 1]);
    scene.hosts(&[("a", 3)]);
    scene.started();
    scene.ends(0, 1);
    scene.ends(1, 5);
    let (code, why) = scene.over();
    assert!(code == 5 && why.unwrap().contains("all workers have failed"));
}

#[test]
fn resets_are_limited() {
    let mut scene = Scene::new(Terms { reset_limit: Some(1), ..terms(1, 3, 3) }, &[("a", 3)]);
    scene.started();
    scene.plan.formed(&[0, 1, 2]);
    scene.plan.formed(&[0, 1]);
    assert_eq!(scene.steps(), []);
    scene.plan.formed(&[0]);
    let (code, why) = scene.over();
    assert!(code == 1 && why.unwrap().contains("--reset-limit"));
}

const UNREACHED: (i32, bool) = (2, true);

fn fixed(min: u32, first: u32, max: u32) -> Terms {
    Terms { changing: false, ..terms(min, first, max) }
}

#[test]
fn a_host_that_is_lost_fails_once_and_the_others_go_on() {
    let mut scene = Scene::new(terms(2, 4, 4), &[("a", 2), ("b", 2)]);
    scene.started();
    scene.plan.formed(&[0, 1, 2, 3]);
    scene.plan.lost("b", 255, "its connection ended", scene.now);
    assert!(scene.plan.those_on("b").is_empty());
    assert_eq!(scene.steps(), []);
    // From 10 s to 20 s, however many workers it had.
    scene.later(21 * SECOND);
    assert_eq!(scene.started(), on("b", &[4, 5]));
    scene.plan.lost("b", 255, "its connection ended", scene.now);
    scene.later(19 * SECOND);
    assert_eq!(scene.steps(), [], "twice as long the second time");
    scene.later(12 * SECOND);
    assert_eq!(scene.started(), on("b", &[6, 7]));
}

#[test]
fn with_the_last_host_the_job_is_lost() {
    let mut scene = Scene::new(terms(1, 2, 2), &[("b", 2)]);
    scene.started();
    scene.plan.formed(&[0, 1]);
    scene.plan.lost("b", 255, "its connection ended", scene.now);
    let (code, why) = scene.over();
    assert!(code == 255 && why.unwrap().contains("failed"));
}

#[test]
fn a_host_that_is_not_reached_is_left_out_for_a_while() {
    let mut scene = Scene::new(fixed(2, 4, 4), &[("a", 2), ("b", 2)]);
    assert_eq!(scene.started(), [on("a", &[0, 1]), on("b", &[2, 3])].concat());
    scene.plan.unfit("b", &[2, 3], "b is not reached", UNREACHED, scene.now);
    assert_eq!(scene.steps(), []);
    scene.plan.formed(&[0, 1]);
    scene.later(21 * SECOND);
    assert_eq!(scene.started(), on("b", &[4, 5]));
    scene.plan.unfit("b", &[4, 5], "b is not reached", UNREACHED, scene.now);
    assert_eq!(scene.steps(), [], "who trains is not ended by it");
}

#[test]
fn too_few_hosts_that_are_reached_end_a_job_whose_hosts_do_not_change() {
    let mut scene = Scene::new(fixed(3, 4, 4), &[("a", 2), ("b", 2)]);
    scene.started();
    scene.plan.unfit("b", &[2, 3], "b is not reached", UNREACHED, scene.now);
    let (code, why) = scene.over();
    assert!(code == 2 && why.unwrap().contains("--min-np"));
    // Where hosts come and go, others may come.
    let mut scene = Scene::new(terms(3, 4, 4), &[("a", 2), ("b", 2)]);
    scene.started();
    scene.plan.unfit("b", &[2, 3], "b is not reached", UNREACHED, scene.now);
    assert_eq!(scene.steps(), []);
    scene.hosts(&[("a", 2), ("c", 2)]);
    assert_eq!(scene.started(), on("c", &[4, 5]));
}

#[test]
fn a_command_that_no_host_has_ends_the_job_and_one_that_a_host_lacks_does_not() {
    let mut scene = Scene::new(terms(2, 4, 4), &[("a", 2), ("b", 2)]);
    scene.started();
    scene.plan.unfit("b", &[2], "b lacks it", (127, false), scene.now);
    scene.plan.unfit("b", &[3], "b lacks it", (127, false), scene.now);
    scene.plan.unfit("a", &[0], "a lacks it", (127, false), scene.now);
    assert_eq!(scene.steps(), []);
    scene.plan.unfit("a", &[1], "a lacks it", (127, false), scene.now);
    assert_eq!(scene.over().0, 127);
}

#[test]
fn a_host_is_needed_while_it_is_named_or_has_workers() {
    let mut scene = Scene::new(terms(1, 2, 2), &[("a", 1), ("b", 1)]);
    scene.started();
    scene.plan.formed(&[0, 1]);
    scene.hosts(&[("a", 1)]);
    assert!(scene.plan.needs("b"), "its worker has not left yet");
    scene.ends(1, 0);
    assert!(scene.plan.needs("a") && !scene.plan.needs("b"));
}
