//! Whether the outcomes of a cluster are what they must be.
#![forbid(unsafe_code)]

use super::check;
use super::cluster::{Cluster, END_NS, Report};
use super::node::Node;
use super::program::{Fault, Kind, Planned};
use super::submit::message_bytes;
use carole::coordinator::OpId;
use carole::engine::Outcome;
use carole::error::{Cause, Error};
use carole::membership::ledger::Uniform;
use carole::types::{Collective, Rank, Time};

impl Cluster {
    /// Checks every operation on every live rank.
    pub fn judge(&self) -> Result<Report, String> {
        let injected = self.injected();
        let mut report = Report {
            faulty: injected.is_some(),
            trace: self.trace,
            uniform: self.uniform != Uniform::Never,
            ..Report::default()
        };
        for (i, planned) in self.program.ops.iter().enumerate() {
            let mut verdicts: Vec<String> = Vec::new();
            let mut reference = check::Reference::new(planned, &self.program.sets[planned.set]);
            for node in self.nodes.iter().filter(|n| self.is_live(n) && n.takes(planned)) {
                if node.skipped[i] {
                    continue;
                }
                if node.results[i].is_none() && (self.is_half_made(planned) || self.may_still_come(planned)) {
                    continue;
                }
                let Some(result) = &node.results[i] else { return Err(self.never_ended(planned, node, i)) };
                report.operations += 1;
                match result {
                    Ok(outcome) => {
                        self.check_outcome((planned, &mut reference), node, i, outcome)?;
                        verdicts.push("ok".into());
                    }
                    Err(error) => {
                        self.check_error(planned, node, error)?;
                        verdicts.push(error.to_string());
                    }
                }
            }
            verdicts.sort();
            verdicts.dedup();
            let errors = verdicts.iter().filter(|v| *v != "ok").count();
            match (errors, verdicts.len()) {
                (0, 0) | (0 | 1, 1) => {}
                (1, 2) if self.may_be_split(planned) => {
                    report.split += 1;
                    report.uniform_split += u64::from(self.is_promised(planned));
                }
                // Who died first differs where no news pass between those who saw it.
                (_, n) if n == errors && matches!(injected, Some(Fault::KillHost(_))) => {}
                // Failed everywhere: on some with what the ranks disagreed about, before the epoch broke.
                (2, 2) if injected.is_some() => {}
                // Two ranks may be at fault where one direction of a link is lost: each end blames the other.
                _ if matches!(injected, Some(Fault::HalfOpen(..))) => {}
                // Who finds the changed bytes ends the link; who sent them sees it end.
                _ if matches!(injected, Some(Fault::Flip(..))) => {}
                _ if planned.may_be_eager(self.eager_bytes_max) => {}
                _ => {
                    return Err(format!(
                        "'{}' has several verdicts on live ranks: {verdicts:?}",
                        planned.name
                    ));
                }
            }
        }
        self.check_joins()?;
        Ok(report)
    }

    /// Whether some members have made this set and others were told instead that a rank has left, without having
    /// finished: their operations on it wait for those who have no set. (A weakness of such departures that is known.)
    fn is_half_made(&self, waits: &Planned) -> bool {
        let set = if let Kind::RemoveSet(set) = waits.kind { set } else { waits.set };
        let made = |planned: &Planned| planned.kind == Kind::AddSet(set);
        let Some(add) = self.program.ops.iter().position(made) else { return false };
        let told = |node: &Node| matches!(node.results[add], Some(Err(Error::Shutdown(Some(_)))));
        matches!(self.injected(), Some(Fault::Leave(_))) && self.nodes.iter().any(told)
    }

    /// Whether this is a receive from any rank whose sender has left: others that could send are still there.
    fn may_still_come(&self, planned: &Planned) -> bool {
        let (Kind::Message { from, any: true, .. }, Some(Fault::Leave(leaver))) =
            (planned.kind, self.injected())
        else {
            return false;
        };
        leaver.0 == from && self.program.sets[planned.set].len() > 2 && !self.was_sent(planned, leaver)
    }

    /// Whether an operation that one live rank finishes is finished by all.
    fn is_promised(&self, planned: &Planned) -> bool {
        // Operations that need a rank that leaves end with `Shutdown`, and no epoch breaks.
        let breaks = !matches!(self.injected(), Some(Fault::Leave(_)));
        let hosts: Vec<u32> =
            self.program.sets[planned.set].iter().map(|&rank| self.hosts[rank as usize]).collect();
        self.uniform.covers(&hosts) && breaks && !matches!(planned.kind, Kind::Message { .. })
    }

    /// Whether some live ranks may have finished an operation that others could not when the epoch broke.
    fn may_be_split(&self, planned: &Planned) -> bool {
        match self.injected() {
            None => false,
            // Whoever is blamed lives, and may not hear the verdict: it is counted.
            Some(Fault::HalfOpen(..) | Fault::Flip(..)) => true,
            Some(_) => !self.is_promised(planned),
        }
    }

    fn never_ended(&self, planned: &Planned, node: &Node, i: usize) -> String {
        let op = OpId(i as u32);
        let why = node.engine.as_ref().and_then(|e| e.explain(op, Time(END_NS))).unwrap_or_default();
        let others: Vec<String> = self
            .nodes
            .iter()
            .filter(|n| n.takes(planned))
            .map(|n| match &n.results[i] {
                None if n.submitted[i] => format!("{} waits", n.rank),
                None => format!("{} has not submitted", n.rank),
                Some(Ok(_)) => format!("{} ok", n.rank),
                Some(Err(e)) => format!("{}: {e}", n.rank),
            })
            .collect();
        format!("'{}' never ended on {}: {why}; {others:?}; {planned:?}", planned.name, node.rank)
    }

    /// The last rank to join is the same everywhere.
    fn check_joins(&self) -> Result<(), String> {
        for (i, planned) in self.program.ops.iter().enumerate().filter(|(_, p)| p.kind == Kind::Join) {
            let mut last: Vec<_> = self
                .nodes
                .iter()
                .filter_map(|n| n.results[i].as_ref()?.as_ref().ok())
                .map(|outcome| outcome.last_joined)
                .collect();
            last.dedup();
            let is_member = |rank: Rank| self.program.sets[planned.set].contains(&rank.0);
            if last.len() > 1 || last.iter().any(|rank| !rank.is_some_and(is_member)) {
                return Err(format!("the last rank to join is {last:?}"));
            }
        }
        Ok(())
    }

    fn check_outcome(
        &self,
        (planned, reference): (&Planned, &mut check::Reference<'_>),
        node: &Node,
        i: usize,
        outcome: &Outcome,
    ) -> Result<(), String> {
        if let Kind::Message { from, bytes, room, .. } = planned.kind {
            let received = node.rank.0 != from;
            if bytes != room && (received || !planned.may_be_eager(self.eager_bytes_max)) {
                return Err(format!("'{}' of two lengths succeeded on {}", planned.name, node.rank));
            }
            if received && node.buffers[i][0].bytes() != message_bytes(planned, bytes) {
                return Err(format!("'{}' arrived wrong on {}", planned.name, node.rank));
            }
            return Ok(());
        }
        if planned.wrong.is_some() {
            return Err(format!("'{}' is wrong on one rank and succeeded on {}", planned.name, node.rank));
        }
        if self.has_absent_root(planned) {
            return Err(format!("'{}' has an absent root and succeeded on {}", planned.name, node.rank));
        }
        let members = &self.program.sets[planned.set];
        for t in 0..planned.tensors.len() {
            let Some(expected) = reference.of(node.rank.0, t) else { continue };
            let got = match outcome.tensors.get(t).map(|o| &o.memory) {
                Some(Some(owned)) => owned.as_slice(),
                Some(None) => node.buffers[i][t].bytes(),
                None => return Err(format!("'{}' has no output {t} on {}", planned.name, node.rank)),
            };
            if !check::same(planned, got, &expected) {
                return Err(format!(
                    "'{}' tensor {t} is wrong on {}: {:?}... instead of {:?}...: {planned:?}",
                    planned.name,
                    node.rank,
                    &got[..got.len().min(16)],
                    &expected[..expected.len().min(16)]
                ));
            }
        }
        if planned.collective == Collective::Alltoall {
            let me = members.iter().position(|&m| m == node.rank.0).expect("a member");
            let rows = planned.splits.iter().flat_map(|m| {
                (0..members.len())
                    .map(|from| if planned.present[members[from] as usize] { m[from][me] } else { 0 })
            });
            if !rows.eq(outcome.received_splits.iter().copied()) {
                return Err(format!("'{}' tells wrong received splits on {}", planned.name, node.rank));
            }
        }
        Ok(())
    }

    /// Whether this is a message that a rank has sent before it left, with nothing else under way: it can be received.
    fn was_sent(&self, planned: &Planned, leaver: Rank) -> bool {
        let sender = &self.nodes[leaver.0 as usize];
        let i = self.program.ops.iter().position(|op| std::ptr::eq(op, planned)).expect("one of the program");
        matches!(planned.kind, Kind::Message { from, bytes, room, .. } if from == leaver.0 && bytes == room)
            && sender.left_idle
            && matches!(sender.results[i], Some(Ok(_)))
    }

    fn has_absent_root(&self, planned: &Planned) -> bool {
        planned.collective.has_root() && !planned.present[planned.root.0 as usize]
    }

    fn check_error(&self, planned: &Planned, node: &Node, error: &Error) -> Result<(), String> {
        let injected = self.injected();
        let members = &self.program.sets[planned.set];
        let fits = match (error, injected) {
            (Error::Mismatch(m), _) => match planned.kind {
                Kind::Message { bytes, room, .. } => bytes != room,
                _ => {
                    (planned.wrong.is_some() || self.has_absent_root(planned))
                        && m.message.contains(&planned.name)
                }
            },
            (Error::Usage(_), _) => planned.wrong.is_some(),
            (Error::Broken(b), Some(Fault::Kill(_) | Fault::KillHost(_))) => {
                b.culprit.is_some_and(|rank| self.killed().contains(&rank))
                    && matches!(b.cause, Cause::Exited | Cause::Unreachable(_))
            }
            (Error::Broken(b), Some(Fault::Stop(rank))) => {
                b.culprit == Some(rank) && matches!(b.cause, Cause::Silent { .. })
            }
            (Error::Broken(_), Some(Fault::HalfOpen(..))) => true,
            (Error::Broken(b), Some(Fault::Flip(from, to))) => match b.cause {
                Cause::Corrupted(_) => b.culprit == Some(from),
                Cause::Exited => b.culprit == Some(to),
                _ => false,
            },
            (Error::Shutdown(who), Some(Fault::Leave(rank))) => {
                let ends = match planned.kind {
                    Kind::Message { from, to, .. } => vec![from, to],
                    _ => members.clone(),
                };
                *who == Some(rank) && ends.contains(&rank.0) && !self.was_sent(planned, rank)
            }
            _ => false,
        };
        match fits {
            true => Ok(()),
            false => Err(format!(
                "'{}' on {} ended with: {error} (fault {injected:?}): {planned:?}",
                planned.name, node.rank
            )),
        }
    }
}

impl Planned {
    /// Whether the sender may have been told Done before the lengths met.
    fn may_be_eager(&self, eager_bytes_max: usize) -> bool {
        matches!(self.kind, Kind::Message { bytes, room, .. }
            if bytes != room && bytes > 0 && bytes <= eager_bytes_max as u64)
    }
}
