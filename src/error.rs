//! Errors, sorted by what the caller can do about them.
#![forbid(unsafe_code)]

use crate::types::{Epoch, Rank};
use std::fmt;
use std::sync::Arc;

/// What a call that failed says.
#[derive(Clone, Debug, PartialEq)]
pub enum Error {
    /// Fix the program: this can never work. Nothing was sent.
    Usage(String),
    /// Fix the tensor: ranks disagree about it. Every rank gets this error for it; the group goes on.
    Mismatch(Arc<Mismatch>),
    /// Re-form the group: it is broken. Every operation in flight gets the same error.
    Broken(Arc<Broken>),
    /// The group was shut down in an orderly way, here or by the rank named.
    Shutdown(Option<Rank>),
    /// The time allowed for this wait is over; the operation stays in flight and can be waited for again.
    Timeout(String),
}

/// What the caller can do; bindings map this, and only this, to exception classes and codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// Correct the call.
    FixProgram,
    /// Correct the tensor on one of the ranks named.
    FixTensor,
    /// Call `reform()`, which goes on among the survivors.
    ReformGroup,
    /// The job is over.
    Stop,
    /// Wait again.
    WaitAgain,
}

/// Two ranks that disagree about one operation.
#[derive(Clone, Debug, PartialEq)]
pub struct Mismatch {
    /// The operation's name.
    pub tensor: String,
    /// What differs, in words that name both ranks and both values, and the remedy.
    pub message: String,
}

/// Why an epoch ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// The epoch that ended.
    pub epoch: Epoch,
    /// The rank at fault, where it is known.
    pub culprit: Option<Rank>,
    /// What happened to it.
    pub cause: Cause,
}

/// What happened to a peer, or to this process. The words do not depend on which rank tells, so that every
/// rank reports the same error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Its connections were closed by its kernel: the process has ended.
    Exited,
    /// It has sent nothing, not even a heartbeat, for this many milliseconds: stopped, swapped out or cut off.
    Silent {
        /// The silence, in milliseconds.
        for_ms: u64,
    },
    /// It sent something that no correct peer sends.
    Misbehaved(String),
    /// Its bytes did not arrive as it had sent them: the checksum is wrong.
    Corrupted(String),
    /// It (or every rank) waited longer than the limit for these ranks to submit a tensor.
    Stalled {
        /// The tensor.
        tensor: String,
        /// Ranks that did not submit it.
        missing: Vec<Rank>,
    },
    /// A call of its operating system failed.
    System(String),
    /// It could not be reached.
    Unreachable(String),
    /// It asked for the end of the epoch; its words.
    Aborted(String),
    /// The others have gone on in this later epoch without it: it was silent for too long, or was let go.
    Excluded {
        /// Their epoch; 0 where it is not known yet.
        epoch: Epoch,
    },
    /// The ranks that are not known to be dead, but were not there, may go on by themselves; so those that were
    /// there must not.
    Minority {
        /// Ranks that were there.
        here: u32,
        /// Ranks of the last epoch that may live.
        of: u32,
    },
}

impl Error {
    /// What the caller can do about it.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Error::Usage(_) => Remedy::FixProgram,
            Error::Mismatch(_) => Remedy::FixTensor,
            Error::Broken(_) => Remedy::ReformGroup,
            Error::Shutdown(_) => Remedy::Stop,
            Error::Timeout(_) => Remedy::WaitAgain,
        }
    }
    /// A usage error with these words.
    pub fn usage(message: impl Into<String>) -> Error {
        Error::Usage(message.into())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Usage(message) => f.write_str(message),
            Error::Mismatch(m) => write!(f, "{}", m.message),
            Error::Broken(broken) => broken.fmt(f),
            Error::Shutdown(Some(rank)) => {
                write!(f, "{rank}{HAS_SHUT_DOWN}; submit no operation after a rank's last one")
            }
            Error::Shutdown(None) => {
                f.write_str("Carole has been shut down on this rank; call init() again to go on")
            }
            Error::Timeout(message) => f.write_str(message),
        }
    }
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.culprit {
            Some(rank) => write!(f, "epoch {}{IS_BROKEN}{rank} {}", self.epoch.0, self.cause)?,
            None => write!(f, "epoch {}{IS_BROKEN}{}", self.epoch.0, self.cause)?,
        }
        f.write_str(match self.cause {
            Cause::Excluded { .. } | Cause::Minority { .. } => {
                "; this process cannot go on with them: end it, or call init() in a new job"
            }
            _ => "; call reform() to go on with the ranks that are left",
        })
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Exited => f.write_str("has ended (its connections were closed)"),
            Cause::Silent { for_ms } => {
                write!(f, "has been silent for {for_ms} ms (stopped, swapped out or cut off)")
            }
            Cause::Misbehaved(what) => write!(f, "sent what no correct peer sends: {what}"),
            Cause::Corrupted(what) => write!(
                f,
                "sent bytes that were changed on the way: {what}; a network card, a cable, a switch or memory is \
                 faulty between the two hosts"
            ),
            Cause::Stalled { tensor, missing } => {
                write!(f, "stalled: '{tensor}' was not submitted by ")?;
                let mut separator = "";
                for rank in missing {
                    write!(f, "{separator}{rank}")?;
                    separator = ", ";
                }
                Ok(())
            }
            Cause::System(what) => write!(f, "failed in its operating system: {what}"),
            Cause::Unreachable(what) => write!(f, "cannot be reached: {what}"),
            Cause::Aborted(what) => write!(f, "ended the epoch: {what}"),
            Cause::Excluded { epoch: Epoch(0) } => f.write_str("is excluded from the next epoch"),
            Cause::Excluded { epoch } => {
                write!(f, "is excluded: the others have gone on without it in epoch {}", epoch.0)
            }
            Cause::Minority { here, of } => write!(
                f,
                "is in a minority: {here} of {of} ranks that may be alive came together, and the others may have \
                 gone on without them"
            ),
        }
    }
}

impl std::error::Error for Error {}

/// The result of a call.
pub type Result<T> = std::result::Result<T, Error>;

const IS_BROKEN: &str = " is broken: ";
const HAS_SHUT_DOWN: &str = " has shut down, and this operation needs it";

/// The rank at fault by the words of [`Broken`] or [`Error::Shutdown`], wherever they stand in a line. So the
/// launcher tells the first cause from those who report it, whatever language they report it in. A Rust program that
/// unwraps them writes their fields instead.
#[must_use]
pub fn named_culprit(line: &str) -> Option<Rank> {
    let number = |text: &str| text.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok().map(Rank);
    for fields in ["culprit: Some(Rank(", "Shutdown(Some(Rank("] {
        if let Some((_, tail)) = line.rsplit_once(fields) {
            return number(tail);
        }
    }
    if let Some((head, tail)) = line.rsplit_once(IS_BROKEN) {
        return head.contains("epoch ").then(|| number(tail.strip_prefix("rank ")?)).flatten();
    }
    let (head, _) = line.rsplit_once(HAS_SHUT_DOWN)?;
    number(head.rsplit_once("rank ")?.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_culprit_is_read_from_the_words_of_the_error() {
        let broken = |culprit| {
            Error::Broken(Arc::new(Broken {
                epoch: Epoch(3),
                culprit,
                cause: Cause::Silent { for_ms: 3000 },
            }))
        };
        for (error, culprit) in [
            (broken(Some(Rank(12))), Some(Rank(12))),
            (broken(None), None),
            (Error::Shutdown(Some(Rank(7))), Some(Rank(7))),
            (Error::Shutdown(None), None),
            (Error::usage("the pipe is broken: rank 3"), None),
        ] {
            assert_eq!(named_culprit(&error.to_string()), culprit, "{error}");
            for words in
                [format!("carole.CaroleError: {error} (see above)"), format!("`Err` value: {error:?}")]
            {
                assert_eq!(named_culprit(&words), culprit, "{words}");
            }
        }
    }
}
