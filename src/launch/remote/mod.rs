//! Ranks on other hosts. `ssh` (or what stands for it) starts an [`agent`] on each; [`gather`] waits for them, [`ways`]
//! finds out who reaches whom, and then each agent gets its part of the job. The secret and all variables travel over
//! the agent's standard input: never in an argument that others on the host could read.
//!
//! Whatever is killed, nothing is left: when the launcher goes, its ssh clients go with it; when a client goes, sshd
//! closes the agent's standard input; and then the agent ends its ranks. Where a network fails in silence,
//! both ends notice by the pings that they exchange.
#![forbid(unsafe_code)]

pub mod agent;
pub mod candidate;
pub mod facts;
pub mod gather;
pub mod probe;
mod relay;
pub mod ssh;
pub mod ways;
pub mod words;

use super::hosts::Placement;
use crate::error::{Error, Result};
use crate::rendezvous::secret::Secret;
use gather::Crew;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;
use words::{escape, unescape_text};

/// Between two pings.
pub const PING_EVERY: Duration = Duration::from_secs(5);
/// An agent that has heard nothing for so long ends its ranks and itself. A launcher that is suspended (Ctrl-Z) for
/// longer loses them.
pub const SILENCE_AGENT: Duration = Duration::from_secs(60);
/// An agent that has said nothing for so long is lost.
pub const SILENCE_LAUNCHER: Duration = Duration::from_secs(30);
/// How long an agent may take to answer what takes no time.
const ANSWER: Duration = Duration::from_secs(20);

/// What the ranks of all hosts have in common.
pub struct Task<'a> {
    /// The command and its arguments.
    pub command: &'a [OsString],
    /// The folder to run it in, if it exists there.
    pub directory: &'a Path,
    /// Variables on top of those that the agents have.
    pub shared: &'a [(OsString, OsString)],
}

/// Tells every agent its part of the job; `variables` gives those of a rank. Returns what the user should know.
pub fn send(
    crew: &mut Crew<'_>,
    placements: &[Placement],
    secret: &Secret,
    task: &Task<'_>,
    variables: impl Fn(u32) -> Vec<(String, String)>,
) -> Result<Vec<String>> {
    let preamble = preamble(secret, task);
    let answers = crew.exchange(|_| vec![preamble.clone()], ANSWER)?;
    let mut warnings = Vec::new();
    for (agent, answers) in crew.agents.iter().zip(answers) {
        warnings.extend(absent(&agent.host, &answers[0], task.directory));
    }
    let common = common(task);
    for (agent, placement) in crew.agents.iter_mut().zip(placements.iter().filter(|p| !p.local)) {
        let mut orders = common.clone();
        for rank in placement.ranks.clone() {
            orders.push_str(&format!("rank {}\n", pairs(&variables(rank))));
        }
        agent.link.orders.push(&[orders.as_bytes()]);
    }
    Ok(warnings)
}

/// What an agent is told first: the secret, and the folder, to which it answers.
#[must_use]
pub fn preamble(secret: &Secret, task: &Task<'_>) -> String {
    format!("secret {}\ndirectory {}\n", secret.to_hex(), escape(task.directory.as_os_str().as_bytes()))
}

/// What the user should know of the folder, by an agent's answer.
#[must_use]
pub fn absent(host: &str, answer: &str, directory: &Path) -> Option<String> {
    let why = answer.strip_prefix("absent ")?;
    Some(format!(
        "host '{host}': the folder '{}' cannot be entered there ({}); the ranks run in the home folder",
        directory.display(),
        unescape_text(why).unwrap_or_default()
    ))
}

/// What all ranks have in common.
#[must_use]
pub fn common(task: &Task<'_>) -> String {
    let word = |text: &OsStr| escape(text.as_bytes());
    let command: Vec<String> = task.command.iter().map(|text| word(text)).collect();
    let shared = task.shared.iter().map(|(name, value)| format!("variable {} {}\n", word(name), word(value)));
    format!("command {}\n{}", command.join(" "), shared.collect::<String>())
}

/// The variables of one rank, as words.
#[must_use]
pub fn pairs(variables: &[(String, String)]) -> String {
    let pair = |(name, value): &(String, String)| {
        format!("{} {}", escape(name.as_bytes()), escape(value.as_bytes()))
    };
    variables.iter().map(pair).collect::<Vec<_>>().join(" ")
}

/// Two names of one host are refused: their ranks would share memory and have the same local ranks.
pub fn check_distinct(crew: &Crew<'_>, local: Option<&str>) -> Result<()> {
    let own = local.map(|name| (name.to_owned(), agent::host_id()));
    let known: Vec<(String, String)> = own
        .into_iter()
        .chain(crew.agents.iter().map(|agent| (agent.host.clone(), agent.host_id.clone())))
        .collect();
    for (i, (name, id)) in known.iter().enumerate() {
        if let Some((earlier, _)) = known[..i].iter().find(|(_, other)| other == id) {
            return Err(Error::usage(format!(
                "'{earlier}' and '{name}' are the same host; name it once, with the slots of both (where containers of \
                 one machine stand for hosts, CAROLE_HOST_ID tells them apart)"
            )));
        }
    }
    Ok(())
}
