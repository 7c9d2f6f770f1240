//! The sleep handshake of the driver under every interleaving and reordering that C11 allows:
//! `RUSTFLAGS="--cfg loom" cargo test --lib loom`.
#![forbid(unsafe_code)]

use super::driver::Drowsy;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

struct World {
    drowsy: Drowsy,
    /// What the producers publish, as the driver's mail.
    mail: [AtomicBool; 2],
    /// The eventfd.
    rung: AtomicBool,
}

/// Whether a sleeper finds mail or is woken, with `producers` that publish at any moment.
fn handshake(producers: usize) {
    loom::model(move || {
        let world = Arc::new(World {
            drowsy: Drowsy::default(),
            mail: [AtomicBool::new(false), AtomicBool::new(false)],
            rung: AtomicBool::new(false),
        });
        let threads: Vec<_> = (0..producers)
            .map(|i| {
                let world = Arc::clone(&world);
                thread::spawn(move || {
                    // As `Shared::send` and `Shared::wake_driver` do.
                    world.mail[i].store(true, Ordering::SeqCst);
                    if world.drowsy.must_wake() {
                        assert!(!world.rung.swap(true, Ordering::SeqCst), "one wake for one sleep");
                    }
                })
            })
            .collect();
        // As the sleeper does: lie down, look once more, sleep.
        world.drowsy.lie_down();
        let seen = (0..producers).all(|i| world.mail[i].load(Ordering::SeqCst));
        threads.into_iter().for_each(|t| t.join().unwrap());
        let rung = world.rung.load(Ordering::SeqCst);
        assert!(seen || rung, "a sleeper that has not seen the mail is woken");
        world.drowsy.rise();
        assert!(!world.drowsy.must_wake(), "who is awake is not woken");
    });
}

#[test]
fn loom_no_wake_of_the_driver_is_lost() {
    handshake(1);
}

#[test]
fn loom_two_submitters_wake_the_driver_once() {
    handshake(2);
}
