//! Starting the ranks of a measurement: the tool runs itself again under the launcher.
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

/// Whether a launcher has already said which rank this process is.
pub(super) fn inside_a_job() -> bool {
    const MARKS: [&str; 5] =
        ["CAROLE_RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "TORCHELASTIC_RUN_ID"];
    MARKS.iter().any(|name| std::env::var_os(name).is_some())
}

/// Runs the same command as a job of its own.
pub(super) fn ranks(args: &[OsString], ranks: u32) -> i32 {
    let mut launch: Vec<OsString> =
        vec!["carolerun".into(), "--plain-output".into(), "-np".into(), ranks.to_string().into()];
    launch.push(program(args.first()));
    launch.extend(args.iter().skip(1).cloned());
    crate::launch::main(launch)
}

/// The file to start ranks from. The wheel installs this tool as a script, whose interpreter is not the tool:
/// so the name that it was called by goes before the running executable.
fn program(called: Option<&OsString>) -> OsString {
    let own =
        || std::env::current_exe().map_or_else(|_| OsString::from("carole-perf"), PathBuf::into_os_string);
    match called {
        Some(name) if std::path::Path::new(name).components().count() > 1 => name.clone(),
        Some(name) if found_in_path(name) => name.clone(),
        _ => own(),
    }
}

fn found_in_path(name: &OsStr) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}
