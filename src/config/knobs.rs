//! The table of knobs. A new knob is one row: its field, kind, default, variable, scope, documentation and
//! the Horovod variables that set it. [`Config`], the manual, `--print-config` and the errors come from it.

use super::horovod::{Convert, as_is, inverted, milliseconds_to_us, zero_when_on};
use super::value::*;
use crate::limits;

/// Whether all ranks must hold the same value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// The same on all ranks: what every rank computes alike depends on it. Ranks that differ are refused.
    Agreed,
    /// Each rank may have its own.
    Local,
}

/// One row of the table.
pub struct Knob {
    /// The name of the field of [`Config`], which is also its name in a configuration file.
    pub field: &'static str,
    /// The environment variable.
    pub name: &'static str,
    /// The default, as a user would write it.
    pub default: &'static str,
    /// What it does, one line of the source per item.
    pub doc: &'static [&'static str],
    /// Whether all ranks must agree.
    pub scope: Scope,
    /// What may be written.
    pub allowed: fn() -> String,
    /// Horovod's variables that set it; an earlier one goes before a later one.
    pub aliases: &'static [(&'static str, Convert)],
}

macro_rules! knobs {
    ($(
        $(#[doc = $doc:literal])+
        $field:ident: $kind:ty = $default:literal, $name:literal, $scope:ident
            $(, $alias:literal => $convert:ident)*;
    )*) => {
        /// The value of every knob. The fields are the rows of the table; see [`KNOBS`].
        #[derive(Clone, Debug)]
        pub struct Config {
            $($(#[doc = $doc])+ pub $field: <$kind as Kind>::Output,)*
            pub(super) origins: Vec<super::Origin>,
        }

        /// Every knob, in the order in which the manual shows them.
        pub const KNOBS: &[Knob] = &[$(Knob {
            field: stringify!($field),
            name: $name,
            default: $default,
            doc: &[$($doc),+],
            scope: Scope::$scope,
            allowed: <$kind as Kind>::allowed,
            aliases: &[$(($alias, $convert)),*],
        }),*];

        impl Default for Config {
            fn default() -> Config {
                Config {
                    $($field: <$kind as Kind>::parse($default)
                        .expect(concat!("the default of ", $name, " is a value that it allows")),)*
                    origins: vec![super::Origin::default(); KNOBS.len()],
                }
            }
        }

        impl Config {
            /// Sets one knob from text.
            pub(super) fn assign(&mut self, field: &str, text: &str) -> Result<(), String> {
                match field {
                    $(stringify!($field) => self.$field = <$kind as Kind>::parse(text)?,)*
                    _ => unreachable!("field names come from the table"),
                }
                Ok(())
            }
            /// The value of one knob, as a user would write it.
            pub(super) fn show(&self, field: &str) -> String {
                match field {
                    $(stringify!($field) => <$kind as Kind>::show(&self.$field),)*
                    _ => unreachable!("field names come from the table"),
                }
            }
        }
    };
}

const RANK_MAX: u32 = limits::RANKS_MAX as u32 - 1;
const RANKS_MAX: u32 = limits::RANKS_MAX as u32;
const SECONDS_MAX: u64 = 30 * 24 * 3600;

knobs! {
    /// Which transport carries payload: `shm` (shared memory, within a host), `tcp`, `mpi` (where it was built, and
    /// under MPI's launcher), or `auto`, which takes shared memory where two ranks share a host and TCP elsewhere.
    transport: Choice<TransportChoice> = "auto", "CAROLE_TRANSPORT", Agreed;
    /// The algorithm that every collective must use, where it has one of that name. `auto` chooses for each
    /// size by price; `carole-perf explain` prints the choice and its reason.
    algorithm: Maybe<Choice<AlgorithmName>> = "auto", "CAROLE_ALGORITHM", Agreed;
    /// Strict mode: every element is reduced in one fixed order of ranks, whatever the fusion, algorithm,
    /// transport and order of submission, so that runs repeat to the bit. Costs some bandwidth.
    deterministic: Switch = "0", "CAROLE_DETERMINISTIC", Agreed;
    /// Small tensors that are ready together travel as one batch of at most this many bytes. 0 fuses nothing.
    fusion_bytes: Bytes<0, { 1 << 40 }> = "64M", "CAROLE_FUSION_BYTES", Agreed,
        "HOROVOD_FUSION_THRESHOLD" => as_is;
    /// A batch is cut into windows of at most this many bytes that run side by side (pipelining).
    window_bytes: Bytes<4096, { 1 << 40 }> = "4M", "CAROLE_WINDOW_BYTES", Agreed;
    /// Tensors on CUDA devices go from device to device, within a host whose ranks can open each other's device memory,
    /// in batches of at least this many bytes; smaller ones go through the host's memory, which takes less time where
    /// ranks share a device.
    direct_bytes: Bytes<4096, { 1 << 60 }> = "4M", "CAROLE_DIRECT_BYTES", Agreed;
    /// Device memory that a process set takes on each rank for that, in halves: what one round moves.
    direct_memory: Bytes<{ 1 << 16 }, { 1 << 40 }> = "128M", "CAROLE_DIRECT_MEMORY", Agreed;
    /// How long, in microseconds, the first tensor that is ready waits for others to travel with it. The
    /// window closes at once when somebody waits for a result. HOROVOD_CYCLE_TIME, in milliseconds, sets it:
    /// there is no cycle here, so it is an upper bound on the delay and not a period.
    batch_window_us: Count<0, 1_000_000> = "100", "CAROLE_BATCH_WINDOW_US", Agreed,
        "HOROVOD_CYCLE_TIME" => milliseconds_to_us;
    /// Tensors of a process set whose agreement is remembered, so that the next time costs one bit. The
    /// least recently used is forgotten first. 0 remembers none.
    cache_keys: Count<0, { limits::CACHE_KEYS_MAX as u64 }> = "16384", "CAROLE_CACHE_CAPACITY", Agreed,
        "HOROVOD_CACHE_CAPACITY" => as_is;
    /// A warning names the ranks that have not submitted a tensor which others wait for since this many
    /// seconds. 0 warns never.
    stall_warn_s: Count<0, SECONDS_MAX> = "60", "CAROLE_STALL_WARN_S", Agreed,
        "HOROVOD_STALL_CHECK_DISABLE" => zero_when_on,
        "HOROVOD_STALL_CHECK_TIME_SECONDS" => as_is;
    /// The epoch is broken, naming the missing ranks, when a tensor has waited for them this many seconds.
    /// 0 waits for ever.
    stall_fail_s: Count<0, SECONDS_MAX> = "0", "CAROLE_STALL_FAIL_S", Agreed,
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS" => as_is;
    /// Silence, in milliseconds, after which a peer is held to be dead. Heartbeats and all other time limits
    /// between ranks derive from it.
    timeout_ms: Count<500, { 24 * 3600 * 1000 }> = "3000", "CAROLE_TIMEOUT_MS", Agreed;
    /// How long, in seconds, init() waits for the other ranks to appear.
    start_timeout_s: Count<1, SECONDS_MAX> = "30", "CAROLE_START_TIMEOUT_S", Local,
        "HOROVOD_START_TIMEOUT" => as_is,
        "HOROVOD_GLOO_TIMEOUT_SECONDS" => as_is;
    /// How long, in seconds, ranks that live wait for each other when they re-form after a failure, and in an elastic
    /// job for so many that there are enough. One that is silent is waited for CAROLE_TIMEOUT_MS only.
    elastic_timeout_s: Count<1, SECONDS_MAX> = "600", "CAROLE_ELASTIC_TIMEOUT_S", Local,
        "HOROVOD_ELASTIC_TIMEOUT" => as_is;
    /// Uniform completion: an operation ends on a rank when it is complete on all, or all can complete it, so that
    /// whoever is left when the epoch breaks has the same outcome for it. Costs a message up and one down the tree for
    /// each operation that is waited for alone and does not go through shared memory. `auto`: in process sets within
    /// one host, and in all of elastic jobs.
    uniform: Maybe<Switch> = "auto", "CAROLE_UNIFORM", Agreed;
    /// TCP connections that carry payload between two ranks.
    tcp_lanes: Small<1, { limits::TCP_LANES_MAX as u32 }> = "2", "CAROLE_TCP_LANES", Agreed;
    /// The congestion control of TCP connections, by the kernel's name for it (`cubic`, `bbr`, `dctcp`).
    tcp_congestion: Maybe<Text> = "auto", "CAROLE_TCP_CONGESTION", Local;
    /// Bytes that the kernel buffers for a TCP connection in each direction. `auto` leaves it to the kernel, which
    /// follows the path; on loopback it is 4M.
    tcp_buffer_bytes: Maybe<Bytes<4096, { 1 << 30 }>> = "auto", "CAROLE_TCP_BUFFER_BYTES", Local;
    /// MPI is called by one thread of Carole's own only, and asked for no more than `MPI_THREAD_FUNNELED`.
    mpi_threads_disable: Switch = "0", "CAROLE_MPI_THREADS_DISABLE", Local,
        "HOROVOD_MPI_THREADS_DISABLE" => as_is;
    /// Over MPI within a host, payload lies in memory that MPI lets its ranks share (`MPI_Win_allocate_shared`), and
    /// messages only tell of it. 0 lets messages carry all of it.
    mpi_window: Switch = "1", "CAROLE_MPI_WINDOW", Local;
    /// What the network between two hosts can do, in Gbit/s in each direction. Algorithms are chosen by it.
    network_gbits: Count<1, 100_000> = "10", "CAROLE_NETWORK_GBITS", Agreed;
    /// How long a small message takes from one host to another, in microseconds, with the wake of the receiver.
    /// Algorithms are chosen by it.
    network_latency_us: Count<0, 1_000_000> = "25", "CAROLE_NETWORK_LATENCY_US", Agreed;
    /// Network interfaces (names or addresses) that TCP may use. `none` leaves the choice to a probe. Where several are
    /// named, the lanes of each link (CAROLE_TCP_LANES) are spread over them, so that they are used together.
    interfaces: List<Text> = "none", "CAROLE_INTERFACES", Local,
        "HOROVOD_GLOO_IFACE" => as_is;
    /// How long, in microseconds, a thread that waits spins before it sleeps. 0 sleeps at once, which the
    /// engine also does by itself where a host has more ranks than processors.
    spin_us: Count<0, 1_000_000> = "50", "CAROLE_SPIN_US", Local;
    /// The widest vector instructions that reductions may use; `auto` takes the best that the processor has.
    simd: Maybe<Choice<SimdLevel>> = "auto", "CAROLE_SIMD", Local;
    /// Shared memory that one process may take. Each link to a rank of the same host takes a fixed 2.2 MiB or so,
    /// from the first traffic on; what would exceed this goes by TCP, or is an error with CAROLE_TRANSPORT=shm. The
    /// board, through which the ranks of a host exchange faster than by links, takes 2 MiB, if that much is left.
    memory: Bytes<{ 1 << 20 }, { 1 << 46 }> = "2G", "CAROLE_MEMORY", Local;
    /// What is logged to standard error: messages of this level and above.
    log_level: Choice<LogLevel> = "warning", "CAROLE_LOG_LEVEL", Local,
        "HOROVOD_LOG_LEVEL" => as_is;
    /// Whether log lines begin with the time.
    log_timestamps: Switch = "0", "CAROLE_LOG_TIMESTAMPS", Local,
        "HOROVOD_LOG_HIDE_TIME" => inverted;
    /// Ranks with the same text here share memory. `auto` finds out by probing; tests that stand for several
    /// hosts set it.
    host_id: Maybe<Text> = "auto", "CAROLE_HOST_ID", Local;
    /// For each local rank, the processor on which its background thread runs. A thread that waits for a
    /// result drives the engine itself, where it is.
    thread_affinity: List<Small<0, 65535>> = "none", "CAROLE_THREAD_AFFINITY", Local,
        "HOROVOD_THREAD_AFFINITY" => as_is;
    /// Refuses what Horovod refuses, even where Carole can do it.
    strict_compat: Switch = "0", "CAROLE_STRICT_COMPAT", Agreed,
        "HOROVOD_STRICT_COMPAT" => as_is;
    /// Makes an unknown CAROLE_ variable an error instead of a warning.
    strict_env: Switch = "0", "CAROLE_STRICT_ENV", Local;
    /// Allows connections off the loopback interface without a secret. Anyone who reaches the port can then
    /// read and change the job's data.
    insecure: Switch = "0", "CAROLE_INSECURE", Agreed;
    /// Encrypts all connections over TCP, by TLS 1.3 with keys made of the job's secret, and takes no others. Memory that
    /// ranks of one host share is not encrypted.
    encrypt: Switch = "0", "CAROLE_ENCRYPT", Agreed;
    /// Where ranks find each other: `HOST:PORT` of the launcher's rendezvous server or of rank 0, or
    /// `file:///PATH` on a file system that all ranks see (`CAROLE_RENDEZVOUS=file:///shared/job7`).
    rendezvous: Maybe<Text> = "auto", "CAROLE_RENDEZVOUS", Local;
    /// The port of rank 0's rendezvous when only its host is known (torchrun's MASTER_ADDR).
    rendezvous_port: Maybe<Small<1, 65535>> = "auto", "CAROLE_RENDEZVOUS_PORT", Local;
    /// Tells jobs of one user on one host apart when nothing else does (no launcher, no rendezvous).
    job: Maybe<Text> = "auto", "CAROLE_JOB", Local;
    /// A file with the job's secret, readable by its owner only.
    secret_file: Maybe<FilePath> = "auto", "CAROLE_SECRET_FILE", Local;
    /// The number of an inherited descriptor from which the job's secret is read; the launcher sets it.
    secret_fd: Maybe<Small<3, 65535>> = "auto", "CAROLE_SECRET_FD", Local;
    /// This process among all, from 0; the launcher sets it, and the five below.
    rank: Maybe<Small<0, RANK_MAX>> = "auto", "CAROLE_RANK", Local, "HOROVOD_RANK" => as_is;
    /// All processes of the job.
    size: Maybe<Small<1, RANKS_MAX>> = "auto", "CAROLE_SIZE", Local, "HOROVOD_SIZE" => as_is;
    /// This process among those of its host.
    local_rank: Maybe<Small<0, RANK_MAX>> = "auto", "CAROLE_LOCAL_RANK", Local, "HOROVOD_LOCAL_RANK" => as_is;
    /// The processes on its host.
    local_size: Maybe<Small<1, RANKS_MAX>> = "auto", "CAROLE_LOCAL_SIZE", Local,
        "HOROVOD_LOCAL_SIZE" => as_is;
    /// Its host among the hosts that have this local rank.
    cross_rank: Maybe<Small<0, RANK_MAX>> = "auto", "CAROLE_CROSS_RANK", Local, "HOROVOD_CROSS_RANK" => as_is;
    /// The hosts that have this local rank.
    cross_size: Maybe<Small<1, RANKS_MAX>> = "auto", "CAROLE_CROSS_SIZE", Local,
        "HOROVOD_CROSS_SIZE" => as_is;
    /// The number of this process in an elastic job, in which ranks come and go; carolerun sets it in place of the
    /// six above.
    worker: Maybe<Count<0, { u32::MAX as u64 - 2 }>> = "auto", "CAROLE_WORKER", Local;
    /// A file of knobs: `name = value` lines, or the YAML of `horovodrun --config-file`. It goes before the
    /// defaults only.
    config_file: Maybe<FilePath> = "auto", "CAROLE_CONFIG_FILE", Local;
}

const _: () = assert!(limits::SILENCE_MS == 3000, "the default of CAROLE_TIMEOUT_MS is SILENCE_MS");
