//! The readable form of a schedule: what reviews compare and `carole-perf explain` shows.
#![forbid(unsafe_code)]

use super::{Schedule, Space, Span, Verb};
use std::fmt;

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.space {
            Space::Input => "in",
            Space::Output => "out",
            Space::Scratch => "tmp",
        };
        write!(f, "{name}[")?;
        range(f, self.chunks.start, self.chunks.end)?;
        if self.space == Space::Scratch {
            f.write_str(" of ")?;
            range(f, self.of, self.of + self.count())?;
        }
        f.write_str("]")
    }
}

fn range(f: &mut fmt::Formatter<'_>, start: u32, end: u32) -> fmt::Result {
    if end == start + 1 { write!(f, "{start}") } else { write!(f, "{start}..{end}") }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verb::Send { to, src } => write!(f, "send to {to}: {src}"),
            Verb::Recv { from, dst } => write!(f, "recv from {from}: {dst}"),
            Verb::RecvReduce { from, dst, with } => {
                write!(f, "recv-reduce from {from}: {dst} = {with} with received")
            }
            Verb::Copy { dst, src } => write!(f, "copy {dst} = {src}"),
            Verb::Prepare { dst, src } => write!(f, "prepare {dst} = {src}"),
            Verb::Reduce { dst, a, b } => write!(f, "reduce {dst} = {a} with {b}"),
            Verb::ReduceMany { dst, srcs } => {
                write!(f, "reduce-many {dst} =")?;
                srcs.iter().try_for_each(|src| write!(f, " {src}"))
            }
            Verb::Combine { dst, a, b } => write!(f, "adasum {dst} = {a} with {b}"),
            Verb::Finish { span } => write!(f, "finish {span}"),
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "member {} of {}: {} chunks, {} of scratch",
            self.me, self.size, self.chunks, self.scratch
        )?;
        for (i, step) in self.steps.iter().enumerate() {
            match &step.verb {
                // The operand of the lower member stands first, which the verb alone cannot show.
                Verb::RecvReduce { from, dst, with } if *from < self.me => {
                    write!(f, "{i:>4}  recv-reduce from {from}: {dst} = received with {with}")?;
                }
                verb => write!(f, "{i:>4}  {verb}")?,
            }
            let after = self.after(i);
            if !after.is_empty() {
                write!(f, "  after {after:?}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
