//! How ranks end, and how that is told.
#![forbid(unsafe_code)]

use super::args;
use super::sys::signal_name;
use std::ffi::OsStr;
use std::path::Path;

/// The code of a job of which a host was lost, as ssh's own for a connection that failed.
pub const LOST: i32 = 255;

/// How a rank ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// By itself, with this code.
    Exited(i32),
    /// By this signal.
    Killed(i32),
    /// Nobody knows: its host is lost.
    Lost,
}

impl Ending {
    /// The exit code that stands for it, as in a shell.
    pub fn code(self) -> i32 {
        match self {
            Ending::Exited(code) => code,
            Ending::Killed(signal) => 128 + signal,
            Ending::Lost => LOST,
        }
    }

    /// What is said of it.
    pub fn words(self) -> String {
        match self {
            Ending::Exited(code) => format!("exited with code {code}"),
            Ending::Killed(signal) => format!("was killed by {}", signal_name(signal)),
            Ending::Lost => "was lost with its host".to_string(),
        }
    }
}

/// Why a command cannot be started (on another host, where one is named), and the exit code that stands for it.
pub fn refusal(command: &OsStr, errno: i32, host: Option<&str>) -> (i32, String) {
    let name = command.to_string_lossy();
    let error = std::io::Error::from_raw_os_error(errno);
    let here = host.is_none() && Path::new(command).is_file();
    let (code, mut words) = match errno {
        libc::ENOENT if here && !name.contains('/') => {
            (127, format!("the command '{name}' is not in PATH; the file in this folder is ./{name}"))
        }
        libc::ENOENT if here => {
            (127, format!("'{name}' cannot be run: the interpreter that its first line names does not exist"))
        }
        libc::ENOENT => (127, format!("the command '{name}' was not found")),
        libc::EACCES | libc::ENOEXEC => (126, format!("the command '{name}' is not executable: {error}")),
        libc::EAGAIN => {
            (126, format!("'{name}' cannot be started: too many processes ({error}); see ulimit -u"))
        }
        _ => (126, format!("'{name}' cannot be started: {error}")),
    };
    if let Some(host) = host {
        words = format!("host '{host}': {words}; it must be there at the same place as here, or in PATH");
    }
    if args::looks_like_python(command) {
        words.push_str(&format!("; did you mean: carolerun ... python {name}?"));
    }
    (code, words)
}
