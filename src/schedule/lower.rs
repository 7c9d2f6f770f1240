//! Rewrites a schedule for a link that cannot do all that the author wrote. The result is again a schedule,
//! so the same verifier checks it.
#![forbid(unsafe_code)]

use super::hazard::Hazards;
use super::{Schedule, Space, Span, Verb};

/// What the link under a run can do with the memory that the run is on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caps {
    /// Whether it can read and write that memory itself (not so: device memory over TCP).
    pub touches_data: bool,
    /// Whether it can reduce what it receives into that memory.
    pub reduces_on_receipt: bool,
}

/// The schedule with every verb split that the link cannot do. Payload then passes through bounce buffers:
/// the scratch chunks from `schedule.scratch` on, `slots` for sends and as many for receives, each of the
/// widest message. The pools are separate because a member that holds its only buffer for a send that
/// nobody has posted for must still be able to receive.
#[must_use]
pub fn lower(schedule: &Schedule, caps: Caps, slots: u32) -> Schedule {
    assert!(slots > 0, "a pool of bounce buffers holds at least one");
    let mut bounce = Bounce { first: schedule.scratch, widest: widest(schedule), slots, turns: [0, 0] };
    let mut out = Hazards::new(schedule.chunks, schedule.aliased);
    for step in &schedule.steps {
        match step.verb.clone() {
            Verb::Send { to, src } if !caps.touches_data => {
                let via = bounce.take(Pool::Send, &src);
                out.push(Verb::Copy { dst: via.clone(), src });
                out.push(Verb::Send { to, src: via });
            }
            Verb::Recv { from, dst } if !caps.touches_data => {
                let via = bounce.take(Pool::Recv, &dst);
                out.push(Verb::Recv { from, dst: via.clone() });
                out.push(Verb::Copy { dst, src: via });
            }
            Verb::RecvReduce { from, dst, with } if !(caps.touches_data && caps.reduces_on_receipt) => {
                let via = bounce.take(Pool::Recv, &dst);
                out.push(Verb::Recv { from, dst: via.clone() });
                let (a, b) = if from < schedule.me { (via, with) } else { (with, via) };
                out.push(Verb::Reduce { dst, a, b });
            }
            other => out.push(other),
        }
    }
    let scratch = schedule.scratch + bounce.used();
    Schedule { scratch, steps: out.steps, dependencies: out.dependencies, ..*schedule }
}

#[derive(Clone, Copy)]
enum Pool {
    Send = 0,
    Recv = 1,
}

struct Bounce {
    first: u32,
    widest: u32,
    slots: u32,
    turns: [u32; 2],
}

impl Bounce {
    fn take(&mut self, pool: Pool, like: &Span) -> Span {
        let turn = self.turns[pool as usize] % self.slots;
        self.turns[pool as usize] += 1;
        let at = self.first + (pool as u32 * self.slots + turn) * self.widest;
        Span { space: Space::Scratch, chunks: at..at + like.count(), of: like.of }
    }
    fn used(&self) -> u32 {
        if self.turns == [0, 0] { 0 } else { 2 * self.slots * self.widest }
    }
}

/// Chunks of the widest message.
fn widest(schedule: &Schedule) -> u32 {
    let message = |verb: &Verb| match verb {
        Verb::Send { src, .. } => src.count(),
        Verb::Recv { dst, .. } | Verb::RecvReduce { dst, .. } => dst.count(),
        _ => 0,
    };
    schedule.steps.iter().map(|step| message(&step.verb)).max().unwrap_or(0)
}
