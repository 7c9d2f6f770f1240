//! Calls of the engine's own: barriers that members of a set submit among the users' operations, so that what they
//! agree on has its place in the log. Users' names and numbers are others.
#![forbid(unsafe_code)]

use crate::coordinator::{Agreed, Coordinator, ENGINE_NAMES, OpId, Submission};
use crate::limits::IN_FLIGHT_MAX;
use crate::types::{Collective, JoinAverage, Place, Rank, ReduceOp, Scale, Signature, Time};

/// What is called for, in the set whose coordinator is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Call {
    /// The set exchanges over boards from here on.
    Boards,
    /// Large tensors of devices go from device to device from here on.
    Devices,
    /// Members tell each other where large tensors lie from here on.
    Lend,
    /// The plan of this number was given up by all.
    Free(u64),
}

impl Call {
    /// The call that an agreed operation is, if it is one.
    pub(super) fn of(agreed: &Agreed) -> Option<Call> {
        match agreed.name.strip_prefix(ENGINE_NAMES)? {
            "boards" => Some(Call::Boards),
            "devices" => Some(Call::Devices),
            "lend" => Some(Call::Lend),
            other => other.strip_prefix("free ")?.parse().ok().map(Call::Free),
        }
    }

    /// Makes the call on this rank. Whether it could: a rank that has joined cannot.
    pub(super) fn make(self, coordinator: &mut Coordinator, now: Time) -> bool {
        let (name, number) = match self {
            Call::Boards => (format!("{ENGINE_NAMES}boards"), 0),
            Call::Devices => (format!("{ENGINE_NAMES}devices"), 1),
            Call::Lend => (format!("{ENGINE_NAMES}lend"), 2),
            Call::Free(plan) => (format!("{ENGINE_NAMES}free {plan}"), 3 + (plan as u32 & 0xFFF_FFFF)),
        };
        let submission = Submission {
            op: OpId(IN_FLIGHT_MAX as u32 + number),
            name: &name,
            hold_if_busy: false,
            signature: &signature(),
            call: &[],
            refused: None,
        };
        coordinator.submit(submission, now).is_ok()
    }
}

/// What every call looks like to the coordinator.
fn signature() -> Signature {
    Signature {
        collective: Collective::Barrier,
        op: ReduceOp::Sum,
        scale: Scale::default(),
        root: Rank(0),
        place: Place::Host,
        join_average: JoinAverage::Size,
        tensors: Vec::new(),
        ranks: Vec::new(),
    }
}
