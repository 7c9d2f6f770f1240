//! Steps and bytes of an algorithm, as its file states them: enough for a price at any size.
#![forbid(unsafe_code)]

use super::Query;

/// What passes over one kind of wire.
#[derive(Clone, Copy, Default, Debug, PartialEq)]
pub struct Leg {
    /// Messages that wait for each other, one after another.
    pub steps: f64,
    /// Bytes that pass one after another, from the first to the last step.
    pub path_bytes: f64,
    /// Bytes through the busiest port in one direction. A member has one port to its host; all members of a
    /// host share one port to other hosts.
    pub port_bytes: f64,
}

/// The load of one run over the whole buffer.
#[derive(Clone, Copy, Default, Debug, PartialEq)]
pub struct Load {
    /// Within a host.
    pub near: Leg,
    /// Between hosts.
    pub far: Leg,
    /// Messages that the busiest member sends or receives.
    pub messages: f64,
    /// Bytes of operands that are reduced one after another.
    pub path_reduced: f64,
    /// Bytes of operands that the busiest member reduces.
    pub port_reduced: f64,
}

/// The numbers that all formulas use.
pub(super) struct Shape {
    /// Bytes.
    pub(super) n: f64,
    /// Members.
    pub(super) p: f64,
    /// Hosts.
    pub(super) h: f64,
    /// Members of the largest host.
    pub(super) l: f64,
}

impl Shape {
    pub(super) fn of(query: &Query) -> Shape {
        let hosts = query.members_by_host();
        let largest = hosts.iter().map(Vec::len).max().unwrap_or(1);
        Shape { n: query.bytes as f64, p: f64::from(query.size()), h: hosts.len() as f64, l: largest as f64 }
    }
    pub(super) fn is_far(&self) -> bool {
        self.h > 1.0
    }
    /// What every member sends to every other: `part` bytes each, once.
    pub(super) fn spread(&self, part: f64) -> Load {
        let (near, far) = (self.l - 1.0, self.p - self.l);
        let leg = |used: bool, bytes: f64| Leg {
            steps: if used { 1.0 } else { 0.0 },
            path_bytes: bytes,
            port_bytes: bytes,
        };
        Load {
            near: leg(!self.is_far() && near > 0.0, near * part),
            far: leg(self.is_far(), self.l * far * part),
            messages: self.p - 1.0,
            ..Load::default()
        }
    }
}

/// The smallest `k` with `2^k >= n`.
pub(super) fn log2_ceil(n: f64) -> f64 {
    f64::from((n as u64).max(1).next_power_of_two().trailing_zeros())
}

impl std::ops::Add for Leg {
    type Output = Leg;
    fn add(self, other: Leg) -> Leg {
        Leg {
            steps: self.steps + other.steps,
            path_bytes: self.path_bytes + other.path_bytes,
            port_bytes: self.port_bytes + other.port_bytes,
        }
    }
}

/// One after the other.
impl std::ops::Add for Load {
    type Output = Load;
    fn add(self, other: Load) -> Load {
        Load {
            near: self.near + other.near,
            far: self.far + other.far,
            messages: self.messages + other.messages,
            path_reduced: self.path_reduced + other.path_reduced,
            port_reduced: self.port_reduced + other.port_reduced,
        }
    }
}
