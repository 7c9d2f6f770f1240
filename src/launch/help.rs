//! Help by topic, the manual page, and completion: all from the definition of the flags.
#![forbid(unsafe_code)]

use super::args::Arguments;
use super::{USAGE, print};
use clap::CommandFactory;
use clap_complete::Shell;
use std::ffi::OsString;
use std::io::IsTerminal;

/// What stands below every help.
pub const AFTER: &str = "\
Exit code: that of the rank that failed first (128 and the signal, if one killed it).
    2  wrong arguments, or a start that is not possible
  126  a command that is not executable; 127: one that was not found
  141  nobody reads the output any more
  255  a host was lost
Every CAROLE_ variable is described by: carolerun --manual";

/// Whether help is asked for, and about which topic.
pub fn asked(argv: &[OsString]) -> Option<Option<String>> {
    let asks = argv.get(1).is_some_and(|first| first == "--help" || first == "-h");
    asks.then(|| argv.get(2).map(|topic| topic.to_string_lossy().into_owned()))
}

/// Prints the help of one topic; without one, the topics and what is needed most. Returns the exit code.
pub fn show(topic: Option<&str>) -> i32 {
    let topics = topics();
    let text = match topic {
        None => overview(&topics),
        Some("all") => with_style(Arguments::command()),
        Some(topic) => {
            let known = topics.iter().find(|known| known.eq_ignore_ascii_case(topic));
            let Some(known) = known else {
                let list = topics.join(", ").to_lowercase();
                super::complain(&format!("there is no help about '{topic}'; topics are: {list}, all"));
                return USAGE;
            };
            let hides = |a: clap::Arg| {
                let other = a.get_help_heading() != Some(known.as_str());
                a.hide(other)
            };
            with_style(Arguments::command().mut_args(hides).after_help(""))
        }
    };
    print(&text)
}

/// Colours only where somebody sees them.
fn with_style(mut command: clap::Command) -> String {
    let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let styled = command.render_help();
    if colours { styled.ansi().to_string() } else { styled.to_string() }
}

/// The topics, in the order of the definition.
fn topics() -> Vec<String> {
    let mut topics: Vec<String> = Vec::new();
    for argument in Arguments::command().get_arguments().filter(|argument| !argument.is_hide_set()) {
        if let Some(heading) = argument.get_help_heading().filter(|h| !topics.iter().any(|t| t == h)) {
            topics.push(heading.to_owned());
        }
    }
    topics
}

fn overview(topics: &[String]) -> String {
    let mut text = String::from(
        "Starts the ranks of a distributed job and looks after them.\n\n\
         carolerun -np 4 python train.py                  four ranks on this machine\n\
         carolerun -np 8 -H a:4,b:4 python train.py       four on each of two hosts, over ssh\n\
         carolerun -np 8 --hostfile hosts python train.py\n\
         carolerun doctor -H a:4,b:4                      whether these hosts can work together\n\
         carolerun --check-build                          what this installation can do\n\n\
         Flags by topic:\n",
    );
    for topic in topics {
        let flags: Vec<String> = Arguments::command()
            .get_arguments()
            .filter(|a| a.get_help_heading() == Some(topic.as_str()) && !a.is_hide_set())
            .filter_map(|a| Some(format!("--{}", a.get_long()?)))
            .collect();
        let command = format!("carolerun --help {}", topic.to_lowercase());
        text.push_str(&format!("  {command:<30} "));
        let mut width = 33;
        for (i, flag) in flags.iter().enumerate() {
            let comma = if i + 1 < flags.len() { "," } else { "" };
            if width + flag.len() + 2 > 100 {
                text.push_str(&format!("\n{:33}", ""));
                width = 33;
            }
            text.push_str(&format!("{flag}{comma} "));
            width += flag.len() + 2;
        }
        text.push('\n');
    }
    text.push_str("  carolerun --help all             everything\n\n");
    text.push_str(AFTER);
    text.push('\n');
    text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// The manual page, in roff.
pub fn man_page() -> String {
    let mut page = Vec::new();
    // Writing to memory cannot fail.
    let _ = clap_mangen::Man::new(Arguments::command()).render(&mut page);
    String::from_utf8_lossy(&page).into_owned()
}

/// The completion script of a shell.
pub fn completion(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "carolerun", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_overview_fits_a_screen_and_names_every_visible_flag() {
        let text = overview(&topics());
        assert!(text.lines().count() <= 40, "{} lines", text.lines().count());
        for argument in Arguments::command().get_arguments().filter(|a| !a.is_hide_set()) {
            if let Some(long) = argument.get_long().filter(|long| *long != "help") {
                assert!(text.contains(&format!("--{long}")), "{long}");
            }
        }
    }

    #[test]
    fn page_and_completion_know_the_flags() {
        assert!(man_page().contains(".TH carolerun") && man_page().contains("ssh\\-identity\\-file"));
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            assert!(completion(shell).contains("ssh-identity-file"), "{shell}");
        }
    }
}
