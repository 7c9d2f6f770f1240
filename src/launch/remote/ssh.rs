//! How a command is run on another host: ssh, or whatever the user or the cluster has in its place.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Seconds that ssh may take to connect.
pub const CONNECT_S: u32 = 10;

/// How to reach hosts.
#[derive(Clone, Debug)]
pub struct Ssh {
    /// The program and its arguments; `{host}` and `{command}` stand for what they say.
    words: Vec<String>,
    port: Option<u16>,
    identity: Option<PathBuf>,
    /// The file of the launcher, which is looked for on the other hosts.
    program: PathBuf,
}

/// What the user and the cluster say.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `--ssh-command`.
    pub command: Option<String>,
    /// `-p`.
    pub port: Option<u16>,
    /// `-i`.
    pub identity: Option<PathBuf>,
    /// `--agent-program`.
    pub program: Option<PathBuf>,
}

impl Ssh {
    /// From the flags; where they say nothing, from `CAROLE_SSH_COMMAND` or what Open MPI is told (Kubeflow's MPIJob
    /// names kubexec.sh there).
    ///
    /// # Errors
    /// A command that cannot be meant, an identity file that does not exist.
    pub fn new(settings: Settings, called: &OsStr, variable: impl Fn(&str) -> Option<String>) -> Result<Ssh> {
        let text = settings.command.or_else(|| {
            ["CAROLE_SSH_COMMAND", "OMPI_MCA_plm_rsh_agent", "PRTE_MCA_plm_ssh_agent"]
                .iter()
                .find_map(|name| variable(name).filter(|text| !text.trim().is_empty()))
        });
        let text = text.unwrap_or_else(|| "ssh".to_owned());
        let mut words = split(&text)
            .ok_or_else(|| Error::usage(format!("--ssh-command '{text}': a quotation mark is missing")))?;
        if words.is_empty() {
            return Err(Error::usage("--ssh-command is empty; it names a program, as in --ssh-command ssh"));
        }
        if let Some(kubectl) = kubectl_of(&words) {
            words = kubectl;
        }
        if let Some(identity) = &settings.identity
            && !identity.is_file()
        {
            return Err(Error::usage(format!(
                "--ssh-identity-file '{}' does not exist on this host",
                identity.display()
            )));
        }
        let program = settings.program.unwrap_or_else(|| program(called));
        Ok(Ssh { words, port: settings.port, identity: settings.identity, program })
    }

    /// The command that starts an agent on `host`.
    #[must_use]
    pub fn agent(&self, host: &str) -> Command {
        self.run(host, &agent_script(&self.program))
    }

    /// The command as a user would type it, for messages.
    #[must_use]
    pub fn shown(&self, host: &str) -> String {
        let command = self.run(host, "true");
        let words: Vec<String> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        words.join(" ")
    }

    fn run(&self, host: &str, script: &str) -> Command {
        let placed = self.words.iter().any(|word| word.contains("{host}") || word.contains("{command}"));
        let fill = |word: &String| word.replace("{host}", host).replace("{command}", script);
        let mut command = Command::new(fill(&self.words[0]));
        command.args(self.words[1..].iter().map(fill));
        if placed {
            return command;
        }
        if Path::new(&self.words[0]).file_name() == Some(OsStr::new("ssh")) {
            // No questions: nobody is there to answer. A host that is not known yet is; one whose key has changed
            // is not.
            command.args(["-T", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=accept-new"]);
            command.args(["-o", &format!("ConnectTimeout={CONNECT_S}"), "-o", "LogLevel=ERROR"]);
            command.args(["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4"]);
            // A connection of its own, which ends with this client.
            command.args(["-o", "ControlMaster=no", "-o", "ControlPath=none", "-o", "ForwardX11=no"]);
            if let Some(port) = self.port {
                command.args(["-p", &port.to_string()]);
            }
            if let Some(identity) = &self.identity {
                command.arg("-i").arg(identity).args(["-o", "IdentitiesOnly=yes"]);
            }
            command.arg("--");
        }
        command.arg(host).arg(script);
        command
    }
}

/// Runs in whatever shell the user has there. The launcher's own file goes before one of that name in PATH, so that a
/// virtual environment at the same place is used without being activated.
fn agent_script(program: &Path) -> String {
    let name = program.file_name().unwrap_or(OsStr::new("carolerun")).to_string_lossy().into_owned();
    let quote = |text: &str| format!("\"{}\"", text.replace(['\\', '"', '$', '`', '\'', '!'], "?"));
    let (path, name) = (quote(&program.to_string_lossy()), quote(&name));
    format!(
        "sh -c 'if [ -x {path} ]; then exec {path} --agent; fi; \
         if command -v {name} >/dev/null 2>&1; then exec {name} --agent; fi; \
         echo {MISSING} >&2; exit 127'"
    )
}

/// What the script says when there is no Carole.
pub const MISSING: &str = "carolerun-is-missing";

/// The file that this process was started as. A script (the wheel's) is known by its name only, since the running
/// executable is its interpreter.
fn program(called: &OsStr) -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    let name = Path::new(called);
    if own.file_name() == name.file_name() || name.file_name().is_none() {
        return own;
    }
    if name.components().count() > 1 {
        return std::path::absolute(name).unwrap_or_else(|_| name.to_path_buf());
    }
    // Beside the interpreter of a virtual environment, else where a shell would find it.
    let beside = std::env::args_os().next().map(PathBuf::from).and_then(|p| Some(p.parent()?.join(name)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(name));
    beside
        .into_iter()
        .chain(found)
        .find(|path| path.is_absolute() && path.is_file())
        .unwrap_or_else(|| name.to_path_buf())
}

/// Kubeflow's kubexec.sh runs `kubectl exec POD -- /bin/sh -c COMMAND` without `-i`, so that the agent would have no
/// standard input; the same with it.
fn kubectl_of(words: &[String]) -> Option<Vec<String>> {
    let script = Path::new(&words[0]);
    if script.file_name() != Some(OsStr::new("kubexec.sh")) {
        return None;
    }
    let text = std::fs::read_to_string(script).unwrap_or_default();
    let named = text.split_whitespace().find(|word| word.ends_with("kubectl") && !word.starts_with('$'));
    let kubectl = named.unwrap_or("kubectl");
    Some([kubectl, "exec", "-i", "{host}", "--", "/bin/sh", "-c", "{command}"].map(str::to_owned).to_vec())
}

/// Splits as a shell does, with single and double quotes.
fn split(text: &str) -> Option<Vec<String>> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for letter in text.chars() {
        match (quote, letter) {
            (Some(open), _) if open == letter => quote = None,
            (None, '\'' | '"') => {
                quote = Some(letter);
                word.get_or_insert_default();
            }
            (None, _) if letter.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(letter),
        }
    }
    words.extend(word);
    quote.is_none().then_some(words)
}

/// Variables of the launcher that ranks on other hosts get: all but what belongs to a host or to a login there.
#[must_use]
pub fn forwarded(own: impl Iterator<Item = (OsString, OsString)>) -> Vec<(OsString, OsString)> {
    const KEPT_BACK: [&str; 20] = [
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "SHLVL",
        "PWD",
        "OLDPWD",
        "_",
        "TERM",
        "TMPDIR",
        "HOSTNAME",
        "MAIL",
        "DISPLAY",
        "LS_COLORS",
        "CUDA_VISIBLE_DEVICES",
        "CAROLE_HOST_ID",
        "CAROLE_SSH_COMMAND",
        "TMUX",
        "STY",
        "_HOROVOD_SECRET_KEY",
    ];
    const STARTS: [&str; 6] = ["SSH_", "XDG_", "DBUS_", "BASH_FUNC_", "CAROLE_SECRET", "KUBERNETES_"];
    let goes = |name: &str| {
        !KEPT_BACK.contains(&name)
            && !STARTS.iter().any(|start| name.starts_with(start))
            && !name.ends_with("CUDA_VISIBLE_DEVICES")
    };
    own.filter(|(name, _)| name.to_str().is_some_and(goes)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(settings: Settings, variable: impl Fn(&str) -> Option<String>) -> String {
        Ssh::new(settings, OsStr::new("carolerun"), variable).unwrap().shown("node1")
    }

    #[test]
    fn ssh_asks_nothing_and_takes_port_and_identity() {
        let identity = tempfile::NamedTempFile::new().unwrap();
        let settings = Settings {
            port: Some(2222),
            identity: Some(identity.path().to_path_buf()),
            ..Settings::default()
        };
        let line = shown(settings, |_| None);
        assert!(line.starts_with("ssh -T -o BatchMode=yes"), "{line}");
        assert!(line.contains("-p 2222 -i ") && line.ends_with(" -- node1 true"), "{line}");
        let missing = Settings { identity: Some("/no/such/key".into()), ..Settings::default() };
        let error = Ssh::new(missing, OsStr::new("carolerun"), |_| None).unwrap_err().to_string();
        assert!(error.contains("/no/such/key"), "{error}");
    }

    #[test]
    fn other_programs_take_the_place_of_ssh() {
        let with = |text: &str| Settings { command: Some(text.to_owned()), ..Settings::default() };
        assert_eq!(shown(with("rsh -x"), |_| None), "rsh -x node1 true");
        assert_eq!(shown(with("env H={host} sh -c {command}"), |_| None), "env H=node1 sh -c true");
        assert!(shown(with("'/a b/ssh' -F \"my config\""), |_| None).starts_with("/a b/ssh -F my config -T"));
        assert!(Ssh::new(with("ssh 'x"), OsStr::new("carolerun"), |_| None).is_err());
        let open_mpi = |name: &str| (name == "OMPI_MCA_plm_rsh_agent").then(|| "lsh".to_owned());
        assert_eq!(shown(Settings::default(), open_mpi), "lsh node1 true");
    }

    #[test]
    fn kubexec_gets_a_standard_input() {
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("kubexec.sh");
        std::fs::write(&script, "#!/bin/sh\nset -x\nPOD_NAME=$1\nshift\n/opt/kube/kubectl exec ${POD_NAME} -- /bin/sh -c \"$*\"\n")
            .unwrap();
        let kubeflow = |name: &str| (name == "OMPI_MCA_plm_rsh_agent").then(|| script.display().to_string());
        assert_eq!(
            shown(Settings::default(), kubeflow),
            "/opt/kube/kubectl exec -i node1 -- /bin/sh -c true"
        );
    }

    #[test]
    fn what_belongs_to_a_host_or_is_secret_stays() {
        let own = [
            "PATH",
            "HOME",
            "SSH_AUTH_SOCK",
            "CAROLE_SECRET_FILE",
            "CAROLE_ALGORITHM",
            "BASH_FUNC_x%%",
            "LD_LIBRARY_PATH",
        ];
        let own = own.map(|name| (OsString::from(name), OsString::from("x")));
        let names: Vec<OsString> = forwarded(own.into_iter()).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["PATH", "CAROLE_ALGORITHM", "LD_LIBRARY_PATH"]);
    }
}
