//! The simulator finds bugs of the kinds it exists for.

use super::cluster::{Order, simulate};
use super::sabotage::Sabotage;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How many of some seeds find a planted bug.
fn found(sabotage: Sabotage) -> usize {
    let fails = |&seed: &u64| {
        let order = Order { seed, sabotage: Some(sabotage), ..Order::default() };
        !matches!(catch_unwind(AssertUnwindSafe(|| simulate(order))), Ok(Ok(_)))
    };
    (1..=40).filter(fails).count()
}

#[test]
fn seeds_pass_without_a_planted_bug() {
    for seed in 1..=40 {
        simulate(Order { seed, ..Order::default() }).unwrap();
    }
}

#[test]
fn planted_bugs_are_found() {
    for (sabotage, least) in [
        (Sabotage::BatchOrder, 5),
        (Sabotage::EndsTwice, 5),
        (Sabotage::DoneLost, 5),
        (Sabotage::NotReduced, 5),
        (Sabotage::AgreementLost, 5),
        (Sabotage::AbortNotFlooded, 1),
        (Sabotage::GoodbyeLost, 1),
    ] {
        let found = found(sabotage);
        println!("{sabotage:?}: found by {found} of 40 seeds");
        assert!(found >= least, "{sabotage:?} was found by {found} of 40 seeds");
    }
}
