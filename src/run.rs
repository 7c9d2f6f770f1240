//! One schedule in flight, over all windows: completions in, orders out. A machine without I/O.
//!
//! Windows start in order, at most [`Program::in_flight`] at a time, so that the scratch of a finished window
//! can be used again.
#![forbid(unsafe_code)]

use crate::schedule::{Schedule, Verb};
use std::sync::Arc;

/// What a schedule's steps wait for, turned around: who waits for each step. Shared by all runs of the schedule.
#[derive(Debug)]
pub struct Program {
    /// Windows.
    pub windows: u32,
    /// Windows at work at the same time.
    pub in_flight: u32,
    waits: Vec<u32>,
    waiters: Vec<u32>,
    waiters_of: Vec<u32>,
    /// The how-manieth message to (or from) its peer a step is; 0 for steps that are no message.
    ordinals: Vec<u32>,
}

impl Program {
    /// Prepares a schedule.
    #[must_use]
    pub fn new(schedule: &Schedule, windows: u32, in_flight: u32) -> Program {
        let steps = schedule.steps.len();
        let waits: Vec<u32> = (0..steps).map(|i| schedule.after(i).len() as u32).collect();
        let mut counts = vec![0u32; steps + 1];
        for i in 0..steps {
            for &d in schedule.after(i) {
                counts[d as usize + 1] += 1;
            }
        }
        for i in 0..steps {
            counts[i + 1] += counts[i];
        }
        let mut next = counts.clone();
        let mut waiters = vec![0u32; schedule.dependencies.len()];
        for i in 0..steps {
            for &d in schedule.after(i) {
                waiters[next[d as usize] as usize] = i as u32;
                next[d as usize] += 1;
            }
        }
        let in_flight = in_flight.clamp(1, windows.max(1));
        Program { windows, in_flight, waits, waiters, waiters_of: counts, ordinals: ordinals(schedule) }
    }

    /// Steps of the schedule.
    #[must_use]
    pub fn steps(&self) -> u32 {
        self.waits.len() as u32
    }

    /// The number of a message among those to (or from) the same peer; the same on both sides.
    #[must_use]
    pub fn ordinal(&self, step: u32) -> u32 {
        self.ordinals[step as usize]
    }

    fn waiters(&self, step: u32) -> &[u32] {
        let (from, to) = (self.waiters_of[step as usize], self.waiters_of[step as usize + 1]);
        &self.waiters[from as usize..to as usize]
    }
}

/// Numbers the messages of each pair and direction in the order in which they stand.
fn ordinals(schedule: &Schedule) -> Vec<u32> {
    let mut sent = vec![0u32; schedule.size as usize];
    let mut received = vec![0u32; schedule.size as usize];
    let number = |counts: &mut Vec<u32>, peer: u32| {
        let n = counts[peer as usize];
        counts[peer as usize] += 1;
        n
    };
    schedule
        .steps
        .iter()
        .map(|step| match step.verb {
            Verb::Send { to, .. } => number(&mut sent, to),
            Verb::Recv { from, .. } | Verb::RecvReduce { from, .. } => number(&mut received, from),
            _ => 0,
        })
        .collect()
}

/// A step of a window that may start now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Order {
    /// The window.
    pub window: u32,
    /// The step.
    pub step: u32,
}

/// A schedule in flight.
#[derive(Debug, Default)]
pub struct Run {
    program: Option<Arc<Program>>,
    /// For each window at work: how many steps each step still waits for.
    waiting: Vec<u32>,
    /// For each window at work: how many steps are left.
    left: Vec<u32>,
    started: u32,
    finished: u32,
}

impl Run {
    /// Begins; appends the first orders. Reuses this run's memory.
    pub fn start(&mut self, program: Arc<Program>, orders: &mut Vec<Order>) {
        let slots = program.in_flight as usize;
        self.waiting.clear();
        self.waiting.resize(slots * program.steps() as usize, 0);
        self.left.clear();
        self.left.resize(slots, 0);
        (self.started, self.finished) = (0, 0);
        if program.steps() == 0 {
            (self.started, self.finished) = (program.windows, program.windows);
        }
        let first = program.in_flight.min(program.windows - self.started);
        self.program = Some(program);
        for _ in 0..first {
            self.start_window(orders);
        }
    }

    fn program(&self) -> &Arc<Program> {
        self.program.as_ref().expect("a run is used after start")
    }

    fn start_window(&mut self, orders: &mut Vec<Order>) {
        let program = Arc::clone(self.program());
        let window = self.started;
        self.started += 1;
        let slot = (window % program.in_flight) as usize;
        let steps = program.steps() as usize;
        self.left[slot] = program.steps();
        self.waiting[slot * steps..(slot + 1) * steps].copy_from_slice(&program.waits);
        orders.extend(
            (0..program.steps())
                .filter(|&s| program.waits[s as usize] == 0)
                .map(|step| Order { window, step }),
        );
    }

    /// A step is complete; appends what may start now.
    pub fn done(&mut self, order: Order, orders: &mut Vec<Order>) {
        let program = Arc::clone(self.program());
        let slot = (order.window % program.in_flight) as usize;
        let base = slot * program.steps() as usize;
        for &waiter in program.waiters(order.step) {
            let waits = &mut self.waiting[base + waiter as usize];
            assert!(*waits > 0, "a step completes once");
            *waits -= 1;
            if *waits == 0 {
                orders.push(Order { window: order.window, step: waiter });
            }
        }
        self.left[slot] -= 1;
        if self.left[slot] == 0 {
            self.finished += 1;
            // Windows may finish out of order; a new one takes the slot of its own number, so it starts only
            // when that very slot is free.
            while self.started < program.windows
                && self.left[(self.started % program.in_flight) as usize] == 0
            {
                self.start_window(orders);
            }
        }
    }

    /// Whether every step of every window is complete.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.finished == self.program().windows
    }

    /// What it runs.
    #[must_use]
    pub fn shared_program(&self) -> Arc<Program> {
        Arc::clone(self.program())
    }
}
