//! Which rank failed first. The launcher sees processes end, but not in the order of what happened: a rank that
//! only learns of a failure may end sooner than the one that failed and still says goodbye. What each wrote
//! last tells: the errors of the runtime name the rank at fault, and whoever names another was not the first.
#![forbid(unsafe_code)]

/// How ranks ended so far, and whom they named.
pub struct Verdict {
    ranks: Vec<Option<End>>,
    /// Ranks that failed, in the order in which it was seen.
    failed: Vec<usize>,
}

#[derive(Clone, Copy)]
struct End {
    failed: bool,
    names: Option<usize>,
}

/// What is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Finding {
    /// No rank has failed.
    Nobody,
    /// This rank failed first.
    First(usize),
    /// A rank is named by one that has failed, but runs itself.
    Named {
        /// The rank that still runs.
        culprit: usize,
        /// The rank that failed and names it.
        by: usize,
    },
}

impl Verdict {
    /// All of `size` ranks run.
    pub fn new(size: usize) -> Verdict {
        Verdict { ranks: vec![None; size], failed: Vec::new() }
    }

    /// A rank has ended; its last error named another rank, or not.
    pub fn ended(&mut self, rank: usize, failed: bool, names: Option<usize>) {
        assert!(self.ranks[rank].replace(End { failed, names }).is_none(), "a rank ends once");
        if failed {
            self.failed.push(rank);
        }
    }

    /// Follows from the first failure that was seen who named whom.
    pub fn first(&self) -> Finding {
        let Some(&seen) = self.failed.first() else { return Finding::Nobody };
        let mut by = seen;
        let mut passed = vec![by];
        loop {
            let names = self.ranks[by].and_then(|end| end.names);
            // Ranks that name each other have lost each other; then the first seen is as good as any.
            let Some(culprit) = names.filter(|&rank| rank < self.ranks.len()) else {
                return Finding::First(by);
            };
            if culprit == by {
                return Finding::First(by);
            }
            if passed.contains(&culprit) {
                return Finding::First(seen);
            }
            match self.ranks[culprit] {
                None => return Finding::Named { culprit, by },
                // It left in an orderly way; those who still needed it failed.
                Some(End { failed: false, .. }) => return Finding::First(by),
                Some(End { failed: true, .. }) => {
                    passed.push(culprit);
                    by = culprit;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(ends: &[(usize, bool, Option<usize>)]) -> Finding {
        let mut verdict = Verdict::new(4);
        ends.iter().for_each(|&(rank, failed, names)| verdict.ended(rank, failed, names));
        verdict.first()
    }

    #[test]
    fn whoever_names_another_was_not_the_first() {
        assert_eq!(verdict(&[]), Finding::Nobody);
        assert_eq!(verdict(&[(0, false, None)]), Finding::Nobody);
        assert_eq!(verdict(&[(2, true, None), (1, true, None)]), Finding::First(2));
        assert_eq!(verdict(&[(2, true, Some(2))]), Finding::First(2));
        assert_eq!(verdict(&[(0, true, Some(3))]), Finding::Named { culprit: 3, by: 0 });
        assert_eq!(verdict(&[(0, true, Some(3)), (3, true, None)]), Finding::First(3));
        assert_eq!(verdict(&[(0, true, Some(3)), (3, true, Some(1))]), Finding::Named { culprit: 1, by: 3 });
        assert_eq!(verdict(&[(0, true, Some(3)), (3, true, Some(1)), (1, true, None)]), Finding::First(1));
    }

    #[test]
    fn one_that_ended_well_or_does_not_exist_is_not_waited_for() {
        assert_eq!(verdict(&[(0, true, Some(3)), (3, false, None)]), Finding::First(0));
        assert_eq!(verdict(&[(0, true, Some(4))]), Finding::First(0));
    }

    #[test]
    fn ranks_that_name_each_other_end_the_search() {
        assert_eq!(verdict(&[(1, true, Some(0)), (0, true, Some(1))]), Finding::First(1));
        let circle = [(1, true, Some(0)), (0, true, Some(2)), (2, true, Some(0))];
        assert_eq!(verdict(&circle), Finding::First(1));
    }
}
