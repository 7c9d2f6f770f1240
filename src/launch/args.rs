//! The command line: horovodrun's flags and a few of our own, by topic.
#![forbid(unsafe_code)]

use super::hosts::Source;
use super::remote::ssh;
use clap::{Args, CommandFactory, Parser};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

/// Starts the ranks of a distributed job and looks after them.
#[derive(Parser, Debug)]
#[command(
    name = "carolerun",
    version,
    disable_version_flag = true,
    override_usage = "carolerun -np N [OPTIONS] COMMAND [ARGUMENTS...]\n       carolerun doctor -H HOST:SLOTS,...",
    after_help = super::help::AFTER,
    max_term_width = 100
)]
pub struct Arguments {
    /// How many processes to start (-np also works)
    #[arg(long = "num-proc", alias = "np", value_name = "N", help_heading = "Job")]
    pub num_proc: Option<u32>,
    /// The command that each rank runs
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
    /// A file of settings: `name = value` lines, or horovodrun's YAML
    #[arg(long, value_name = "FILE", help_heading = "Job")]
    pub config_file: Option<PathBuf>,
    /// Seconds that init() waits for all ranks to appear
    #[arg(long, value_name = "SECONDS", help_heading = "Job")]
    pub start_timeout: Option<String>,
    /// Seconds between the first signal to end the job and SIGKILL
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0, help_heading = "Job")]
    pub kill_after: f64,
    /// Say what is done
    #[arg(long, help_heading = "Job")]
    pub verbose: bool,
    /// Pass on what ranks write as it is, without `[rank]<stdout>:` (carole-perf's tables)
    #[arg(long, hide = true)]
    pub plain_output: bool,
    #[command(flatten)]
    pub about: About,
    #[command(flatten)]
    pub hosts: Hosts,
    #[command(flatten)]
    pub elastic: Elastic,
    #[command(flatten)]
    pub native: Native,
    #[command(flatten)]
    pub output: Output,
    #[command(flatten)]
    pub tuning: Tuning,
    #[command(flatten)]
    pub unused: Unused,
}

/// What only prints.
#[derive(Args, Debug)]
#[command(next_help_heading = "Information")]
pub struct About {
    /// Print the version
    #[arg(short = 'v', long = "version")]
    pub version: bool,
    /// Print which frameworks and transports this installation has (-cb also works)
    #[arg(long)]
    pub check_build: bool,
    /// Print the script that completes these flags in bash, zsh, fish, elvish or powershell
    #[arg(long, value_name = "SHELL")]
    pub completion: Option<clap_complete::Shell>,
    /// Print the manual page (carolerun --man-page | man -l -)
    #[arg(long)]
    pub man_page: bool,
    /// Print every setting, its value, and where the value comes from
    #[arg(long)]
    pub print_config: bool,
    /// Print the manual of all settings
    #[arg(long)]
    pub manual: bool,
}

/// Where ranks run.
#[derive(Args, Debug)]
#[command(next_help_heading = "Hosts")]
pub struct Hosts {
    /// Hosts and their slots, as in a:4,b:4; ranks fill them in this order
    #[arg(short = 'H', long = "hosts", value_name = "HOST:SLOTS,...", conflicts_with = "hostfile")]
    pub hosts: Option<String>,
    /// A file with lines `HOST slots=N` or `HOST:N` (-hostfile also works)
    #[arg(long, value_name = "FILE")]
    pub hostfile: Option<PathBuf>,
    /// The port of sshd on the other hosts
    #[arg(short = 'p', long, value_name = "PORT")]
    pub ssh_port: Option<u16>,
    /// The private key for ssh
    #[arg(short = 'i', long, value_name = "FILE")]
    pub ssh_identity_file: Option<PathBuf>,
    /// What to use in place of ssh; {host} and {command} in it stand for what they say
    #[arg(long, value_name = "COMMAND", allow_hyphen_values = true)]
    pub ssh_command: Option<String>,
    /// Where carolerun lies on the other hosts, if neither at the same place as here nor in PATH
    #[arg(long, value_name = "FILE")]
    pub agent_program: Option<PathBuf>,
    /// Network interfaces (or addresses) that ranks may use, on every host
    #[arg(long, alias = "network-interface", value_name = "NAME,...", value_delimiter = ',')]
    pub network_interfaces: Vec<String>,
}

/// Jobs whose workers come and go. Any of the first three flags makes a job elastic.
#[derive(Args, Debug)]
#[command(next_help_heading = "Elastic")]
pub struct Elastic {
    /// The fewest processes that train (--min-num-proc also works); fewer wait for more
    #[arg(long = "min-np", alias = "min-num-proc", value_name = "N")]
    pub min_num_proc: Option<u32>,
    /// The most processes (--max-num-proc also works)
    #[arg(long = "max-np", alias = "max-num-proc", value_name = "N")]
    pub max_num_proc: Option<u32>,
    /// A program that prints the hosts that there are now, each as HOST or HOST:SLOTS; it is run every second. Without
    /// it the hosts are those of -H or --hostfile, or this one
    #[arg(long, value_name = "FILE")]
    pub host_discovery_script: Option<PathBuf>,
    /// Slots of a host for which nothing is said
    #[arg(long, value_name = "N")]
    pub slots_per_host: Option<u32>,
    /// Seconds that there may be too few processes, or that one is waited for that lives
    #[arg(long, value_name = "SECONDS")]
    pub elastic_timeout: Option<String>,
    /// How many times the job may form a new epoch before it is given up
    #[arg(long, value_name = "N")]
    pub reset_limit: Option<u32>,
    /// For how many seconds no process is started on a host where one failed, or that was lost or not reached: the first
    /// time, and at most
    #[arg(long, num_args = 2, value_names = ["LEAST", "MOST"])]
    pub blacklist_cooldown_range: Vec<u64>,
}

/// Starting by another launcher, which carolerun becomes.
#[derive(Args, Debug)]
#[command(next_help_heading = "Other launchers")]
pub struct Native {
    /// By mpirun (Open MPI, MPICH or Intel MPI)
    #[arg(long, conflicts_with_all = ["slurm", "jsrun"])]
    pub mpi: bool,
    /// By srun, inside an allocation or with what --mpi-args asks for
    #[arg(long, conflicts_with = "jsrun")]
    pub slurm: bool,
    /// By jsrun
    #[arg(long)]
    pub jsrun: bool,
    /// More arguments for that launcher
    #[arg(long, value_name = "ARGUMENTS", allow_hyphen_values = true)]
    pub mpi_args: Option<String>,
    /// How that launcher binds ranks to processors, instead of not at all
    #[arg(long, value_name = "ARGUMENTS", allow_hyphen_values = true)]
    pub binding_args: Option<String>,
    /// MPI is called by one thread only
    #[arg(long, overrides_with = "no_mpi_threads_disable")]
    pub mpi_threads_disable: bool,
    /// MPI is called by whichever thread has something to send (the default)
    #[arg(long)]
    pub no_mpi_threads_disable: bool,
}

/// What ranks write.
#[derive(Args, Debug)]
#[command(next_help_heading = "Output")]
pub struct Output {
    /// Also write DIR/rank.R/stdout and DIR/rank.R/stderr
    #[arg(long, value_name = "DIR")]
    pub output_filename: Option<PathBuf>,
    /// Put the time before each line (-prefix-timestamp also works)
    #[arg(long, alias = "prefix-timestamp")]
    pub prefix_output_with_timestamp: bool,
    /// trace, debug, info, warning, error, fatal or off
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// Put the time into log lines
    #[arg(long, alias = "no-log-hide-timestamp", overrides_with = "log_without_timestamp")]
    pub log_with_timestamp: bool,
    /// Leave the time out of log lines
    #[arg(long, alias = "log-hide-timestamp")]
    pub log_without_timestamp: bool,
}

/// Settings that ranks get as CAROLE_ variables.
#[derive(Args, Debug)]
#[command(next_help_heading = "Settings")]
pub struct Tuning {
    /// auto, shm or tcp
    #[arg(long, value_name = "NAME")]
    pub transport: Option<String>,
    /// Encrypt all connections over TCP (TLS 1.3, with keys made of the job's secret)
    #[arg(long)]
    pub encrypt: bool,
    /// auto, ring, tree, doubling, direct or hierarchical
    #[arg(long, value_name = "NAME")]
    pub algorithm: Option<String>,
    /// Sum in one fixed order, so that runs repeat to the bit
    #[arg(long)]
    pub deterministic: bool,
    /// Most that is fused into one batch, in MiB
    #[arg(long, value_name = "MB")]
    pub fusion_threshold_mb: Option<String>,
    /// Longest wait for other tensors to fuse with, in milliseconds
    #[arg(long, value_name = "MS")]
    pub cycle_time_ms: Option<String>,
    /// Tensors whose agreement is remembered
    #[arg(long, value_name = "N", conflicts_with = "disable_cache")]
    pub cache_capacity: Option<String>,
    /// Remember no agreement
    #[arg(long)]
    pub disable_cache: bool,
    /// Processors for the background threads, one for each local rank
    #[arg(long, value_name = "CORE,...")]
    pub thread_affinity: Option<String>,
    /// The same as --start-timeout
    #[arg(long, value_name = "SECONDS")]
    pub gloo_timeout_seconds: Option<String>,
    /// Warn of no stalled tensors
    #[arg(long, conflicts_with = "stall_check")]
    pub no_stall_check: bool,
    /// Warn of stalled tensors (the default)
    #[arg(long)]
    pub stall_check: bool,
    /// Warn when ranks have kept others waiting for so long
    #[arg(long, value_name = "SECONDS")]
    pub stall_check_warning_time_seconds: Option<String>,
    /// Fail when ranks have kept others waiting for so long
    #[arg(long, value_name = "SECONDS")]
    pub stall_check_shutdown_time_seconds: Option<String>,
}

macro_rules! unused {
    ($($(#[$attribute:meta])* $field:ident: $type:ty,)*) => {
        /// horovodrun's flags whose feature does not exist in this version: taken, and said once.
        #[derive(Args, Debug)]
        pub struct Unused {
            $($(#[$attribute])* #[arg(long, hide = true)] pub $field: $type,)*
        }
        impl Unused {
            /// The flags that were given.
            pub fn given(&self) -> Vec<String> {
                let mut names = Vec::new();
                $(if Given::given(&self.$field) {
                    names.push(format!("--{}", stringify!($field).replace('_', "-")));
                })*
                names
            }
        }
    };
}

trait Given {
    fn given(&self) -> bool;
}
impl Given for bool {
    fn given(&self) -> bool {
        *self
    }
}
impl<T> Given for Option<T> {
    fn given(&self) -> bool {
        self.is_some()
    }
}
impl<T> Given for Vec<T> {
    fn given(&self) -> bool {
        !self.is_empty()
    }
}

unused! {
    hierarchical_allreduce: bool,
    no_hierarchical_allreduce: bool,
    hierarchical_allgather: bool,
    no_hierarchical_allgather: bool,
    torus_allreduce: bool,
    no_torus_allreduce: bool,
    autotune: bool,
    no_autotune: bool,
    autotune_log_file: Option<PathBuf>,
    autotune_warmup_samples: Option<String>,
    autotune_steps_per_sample: Option<String>,
    autotune_bayes_opt_max_samples: Option<String>,
    autotune_gaussian_process_noise: Option<String>,
    timeline_filename: Option<PathBuf>,
    timeline_mark_cycles: bool,
    no_timeline_mark_cycles: bool,
    tcp: bool,
    num_nccl_streams: Option<u32>,
    gloo: bool,
}

impl Arguments {
    /// Reads argv.
    pub fn read(argv: Vec<OsString>) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(with_two_dashes(argv))
    }

    /// The flags that are settings: (variable, value, flag).
    pub fn settings(&self) -> Vec<(String, String, String)> {
        let (tuning, output) = (&self.tuning, &self.output);
        let mut settings = Vec::new();
        let mut add = |variable: &str, value: Option<String>, flag: &str| {
            if let Some(value) = value {
                settings.push((variable.to_string(), value, flag.to_string()));
            }
        };
        let on = |flag: bool, value: &str| flag.then(|| value.to_string());
        // Ranks may run in another directory.
        let config_file = self.config_file.as_ref().map(|path| {
            std::path::absolute(path).unwrap_or_else(|_| path.clone()).to_string_lossy().into_owned()
        });
        let interfaces = &self.hosts.network_interfaces;
        add("CAROLE_CONFIG_FILE", config_file, "--config-file");
        add("HOROVOD_GLOO_TIMEOUT_SECONDS", tuning.gloo_timeout_seconds.clone(), "--gloo-timeout-seconds");
        add("CAROLE_START_TIMEOUT_S", self.start_timeout.clone(), "--start-timeout");
        add(
            "CAROLE_INTERFACES",
            (!interfaces.is_empty()).then(|| interfaces.join(",")),
            "--network-interfaces",
        );
        add("CAROLE_MPI_THREADS_DISABLE", on(self.native.mpi_threads_disable, "1"), "--mpi-threads-disable");
        add(
            "CAROLE_MPI_THREADS_DISABLE",
            on(self.native.no_mpi_threads_disable, "0"),
            "--no-mpi-threads-disable",
        );
        add("CAROLE_ELASTIC_TIMEOUT_S", self.elastic.elastic_timeout.clone(), "--elastic-timeout");
        add("CAROLE_LOG_LEVEL", output.log_level.clone(), "--log-level");
        add("CAROLE_LOG_TIMESTAMPS", on(output.log_with_timestamp, "1"), "--log-with-timestamp");
        add("CAROLE_LOG_TIMESTAMPS", on(output.log_without_timestamp, "0"), "--log-without-timestamp");
        add("CAROLE_TRANSPORT", tuning.transport.clone(), "--transport");
        add("CAROLE_ENCRYPT", on(tuning.encrypt, "1"), "--encrypt");
        add("CAROLE_ALGORITHM", tuning.algorithm.clone(), "--algorithm");
        add("CAROLE_DETERMINISTIC", on(tuning.deterministic, "1"), "--deterministic");
        let fusion = tuning.fusion_threshold_mb.as_ref().map(|mb| format!("{mb}M"));
        add("CAROLE_FUSION_BYTES", fusion, "--fusion-threshold-mb");
        add("HOROVOD_CYCLE_TIME", tuning.cycle_time_ms.clone(), "--cycle-time-ms");
        add("CAROLE_CACHE_CAPACITY", tuning.cache_capacity.clone(), "--cache-capacity");
        add("CAROLE_CACHE_CAPACITY", on(tuning.disable_cache, "0"), "--disable-cache");
        add("CAROLE_THREAD_AFFINITY", tuning.thread_affinity.clone(), "--thread-affinity");
        add("CAROLE_STALL_WARN_S", on(tuning.no_stall_check, "0"), "--no-stall-check");
        let warning = tuning.stall_check_warning_time_seconds.clone();
        add("CAROLE_STALL_WARN_S", warning, "--stall-check-warning-time-seconds");
        let shutdown = tuning.stall_check_shutdown_time_seconds.clone();
        add("CAROLE_STALL_FAIL_S", shutdown, "--stall-check-shutdown-time-seconds");
        settings
    }
}

impl Hosts {
    /// Where hosts are named.
    pub fn source(&self) -> Source {
        Source { list: self.hosts.clone(), file: self.hostfile.clone() }
    }

    /// How other hosts are reached.
    pub fn ssh(&self) -> ssh::Settings {
        ssh::Settings {
            command: self.ssh_command.clone(),
            port: self.ssh_port,
            identity: self.ssh_identity_file.clone(),
            program: self.agent_program.clone(),
        }
    }
}

/// horovodrun spells some long flags with one dash. Only what stands before the command is touched, and a
/// `--` is put between the two, so that a flag of ours that does not exist is not taken for the command.
fn with_two_dashes(argv: Vec<OsString>) -> Vec<OsString> {
    let command = Arguments::command();
    let mut out = Vec::with_capacity(argv.len());
    let mut argv = argv.into_iter();
    out.extend(argv.next());
    while let Some(argument) = argv.next() {
        let Some(text) = argument.to_str().filter(|text| text.starts_with('-') && *text != "--") else {
            if argument != "--" {
                out.push(OsString::from("--"));
            }
            out.push(argument);
            break;
        };
        let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
        let name = match name {
            // mpirun takes the short one, too.
            "-np" | "-n" => "--num-proc",
            "-cb" => "--check-build",
            "-hostfile" => "--hostfile",
            "-prefix-timestamp" => "--prefix-output-with-timestamp",
            other => other,
        };
        let values = if value.is_some() { 0 } else { values_of(&command, name) };
        out.push(match value {
            Some(value) => OsString::from(format!("{name}={value}")),
            None => OsString::from(name),
        });
        out.extend(argv.by_ref().take(values));
    }
    out.extend(argv);
    out
}

/// How many arguments follow this flag.
fn values_of(command: &clap::Command, flag: &str) -> usize {
    let long = flag.strip_prefix("--");
    let mut short = flag.strip_prefix('-').unwrap_or_default().chars();
    let short = if long.is_none() { short.next().filter(|_| short.next().is_none()) } else { None };
    let known = command.get_arguments().find(|known| match long {
        Some(long) => {
            known.get_long_and_visible_aliases().is_some_and(|names| names.contains(&long))
                || known.get_all_aliases().is_some_and(|names| names.contains(&long))
        }
        None => short.is_some() && known.get_short() == short,
    });
    let takes = |argument: &&clap::Arg| argument.get_action().takes_values();
    known.filter(takes).map_or(0, |argument| argument.get_num_args().map_or(1, |range| range.min_values()))
}

/// Whether a command looks like a script that was meant for an interpreter.
pub fn looks_like_python(command: &OsStr) -> bool {
    command.to_str().is_some_and(|text| text.ends_with(".py"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Arguments, clap::Error> {
        Arguments::read(line.split_whitespace().map(OsString::from).collect())
    }

    #[test]
    fn the_definition_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn one_dash_works_before_the_command_and_is_left_alone_after_it() {
        let arguments = read("carolerun -np 2 -p 22 -H localhost:2 python x.py -np 3 -cb --verbose").unwrap();
        assert_eq!(arguments.num_proc, Some(2));
        assert_eq!(arguments.command, ["python", "x.py", "-np", "3", "-cb", "--verbose"]);
        assert!(!arguments.verbose && !arguments.about.check_build);
        assert_eq!(arguments.hosts.ssh_port, Some(22));
        for line in
            ["carolerun -np=3 x", "carolerun --num-proc 3 x", "carolerun --np 3 -- x", "carolerun -n 3 x"]
        {
            let arguments = read(line).unwrap();
            assert_eq!((arguments.num_proc, &arguments.command[..]), (Some(3), &["x".into()][..]), "{line}");
        }
        assert!(read("carolerun -cb").unwrap().about.check_build);
        let arguments = read("carolerun --blacklist-cooldown-range 1 2 -np 4 x").unwrap();
        assert_eq!(arguments.num_proc, Some(4));
    }

    #[test]
    fn every_flag_of_horovodrun_is_taken() {
        for line in [
            "-v",
            "-cb",
            "--check-build",
            "--disable-cache",
            "--start-timeout 5",
            "--network-interfaces a,b",
            "--network-interface a --network-interface b",
            "--output-filename d",
            "--verbose",
            "--config-file f",
            "-p 22",
            "--ssh-port 22",
            "-i f",
            "--ssh-identity-file f",
            "--fusion-threshold-mb 1",
            "--cycle-time-ms 1.5",
            "--cache-capacity 1",
            "--hierarchical-allreduce",
            "--no-hierarchical-allreduce",
            "--hierarchical-allgather",
            "--no-hierarchical-allgather",
            "--torus-allreduce",
            "--no-torus-allreduce",
            "--autotune",
            "--no-autotune",
            "--autotune-log-file f",
            "--autotune-warmup-samples 1",
            "--autotune-steps-per-sample 1",
            "--autotune-bayes-opt-max-samples 1",
            "--autotune-gaussian-process-noise 0.5",
            "--min-np 1",
            "--min-num-proc 1",
            "--max-np 1",
            "--max-num-proc 1",
            "--slots-per-host 1",
            "--elastic-timeout 1",
            "--reset-limit 1",
            "--blacklist-cooldown-range 1 2",
            "--host-discovery-script f",
            "--timeline-filename f",
            "--timeline-mark-cycles",
            "--no-timeline-mark-cycles",
            "--no-stall-check",
            "--stall-check",
            "--stall-check-warning-time-seconds 1",
            "--stall-check-shutdown-time-seconds 1",
            "--mpi-threads-disable",
            "--no-mpi-threads-disable",
            "--mpi-args=-x",
            "--tcp",
            "--binding-args=-x",
            "--num-nccl-streams 1",
            "--thread-affinity 0,1",
            "--gloo-timeout-seconds 1",
            "--log-level INFO",
            "--log-with-timestamp",
            "--log-without-timestamp",
            "-prefix-timestamp",
            "--prefix-output-with-timestamp",
            "--log-hide-timestamp",
            "--no-log-hide-timestamp",
            "-H a:1",
            "--hosts a:1",
            "-hostfile f",
            "--hostfile f",
            "--gloo",
            "--mpi",
            "--jsrun",
        ] {
            let arguments =
                read(&format!("carolerun {line} -np 1 x")).unwrap_or_else(|e| panic!("{line}: {e}"));
            assert_eq!((arguments.num_proc, arguments.command.len()), (Some(1), 1), "{line}");
        }
        for line in
            ["carolerun --no-such-flag -np 1 x", "carolerun -np 1 --no-such-flag x", "carolerun -np 1 -z"]
        {
            assert!(read(line).is_err(), "{line}");
        }
        assert_eq!(read("carolerun -np 1 -- -z").unwrap().command, ["-z"]);
    }
}
