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
    let directory = format!("directory {}\n", escape(task.directory.as_os_str().as_bytes()));
    let secret = format!("secret {}\n", secret.to_hex());
    let answers = crew.exchange(|_| vec![secret.clone() + &directory], ANSWER)?;
    let mut warnings = Vec::new();
    for (agent, answers) in crew.agents.iter().zip(answers) {
        if let Some(why) = answers[0].strip_prefix("absent ") {
            warnings.push(format!(
                "host '{}': the folder '{}' cannot be entered there ({}); the ranks run in the home folder",
                agent.host,
                task.directory.display(),
                unescape_text(why).unwrap_or_default()
            ));
        }
    }
    let pairs = |list: &[(OsString, OsString)]| -> String {
        let word = |text: &OsStr| escape(text.as_bytes());
        list.iter().map(|(name, value)| format!("variable {} {}\n", word(name), word(value))).collect()
    };
    let command: Vec<String> = task.command.iter().map(|word| escape(word.as_bytes())).collect();
    let common = format!("command {}\n{}", command.join(" "), pairs(task.shared));
    for (agent, placement) in crew.agents.iter_mut().zip(placements.iter().filter(|p| !p.local)) {
        let mut orders = common.clone();
        for rank in placement.ranks.clone() {
            let words: Vec<String> = variables(rank)
                .iter()
                .map(|(name, value)| format!("{} {}", escape(name.as_bytes()), escape(value.as_bytes())))
                .collect();
            orders.push_str(&format!("rank {}\n", words.join(" ")));
        }
        agent.link.orders.push(&[orders.as_bytes()]);
    }
    Ok(warnings)
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
