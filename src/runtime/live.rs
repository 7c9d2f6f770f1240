//! A job that this process takes part in, from init to shutdown.

use super::changes::Changes;
use super::reform::Leash;
use super::staged::Stages;
use super::{Handle, Options, Request, Running, SetInfo, TensorArg, World, request};
use crate::config::{self, Config, SimdLevel, TransportChoice};
use crate::coordinator;
use crate::cost::{Prices, Wire};
use crate::device::host::{self, Level};
use crate::engine::driver::{Driver, Patience, Ran};
use crate::engine::handles::{Handles, Message, Submitted};
use crate::engine::plan::PlanRules;
use crate::engine::{Direct, Engine, EngineSetup, Outcome};
use crate::error::{Error, Result};
use crate::fusion;
use crate::limits;
use crate::log;
use crate::membership::{self, ledger::Uniform};
use crate::memory::Region;
use crate::rendezvous::card::Table;
use crate::rendezvous::client::{Join, Joined, join};
use crate::rendezvous::listen::Doors;
#[cfg(feature = "mpi")]
use crate::rendezvous::over_mpi;
use crate::rendezvous::porter::{self, Porter, PorterOptions};
use crate::rendezvous::secret::Secret;
use crate::transport::Fabric;
use crate::transport::board::BoardMemory;
use crate::transport::shm::Budget;
use crate::transport::tcp::TcpOptions;
use crate::transport::wake::Waker;
use crate::types::{Collective, Epoch, GLOBAL_SET, Rank, SetId, TensorSignature};
use std::any::Any;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

/// How many unnamed operations of each kind were submitted to each set. Rounds of changes of the sets count as
/// [`Collective::AddSet`].
type Unnamed = HashMap<(SetId, Collective), u32>;

/// A job in progress.
pub(super) struct Live {
    pub(super) options: Options,
    pub(super) world: World,
    pub(super) driver: Driver,
    pub(super) config: Config,
    /// This epoch, as the rendezvous described it.
    pub(super) table: Arc<Table>,
    pub(super) secret: Secret,
    /// Open as long as this process takes part in the job.
    pub(super) doors: Mutex<Option<Doors>>,
    pub(super) leash: Mutex<Option<Leash>>,
    pub(super) porter: Mutex<Option<Porter>>,
    sets: RwLock<BTreeMap<SetId, Arc<SetInfo>>>,
    unnamed: Mutex<Unnamed>,
    stages: Stages,
    pub(super) changes: Changes,
    /// The memory that this rank shares with the others of its host.
    pub(super) board: Option<Arc<BoardMemory>>,
    /// Persistent collectives that were not let go of.
    pub(super) plans: AtomicUsize,
}

/// How often this process has joined a job: the number of the next epoch.
pub(super) static EPOCH: AtomicU32 = AtomicU32::new(0);

const MS: u64 = 1_000_000;
/// Shapes whose plans are kept.
const PLANS_MAX: usize = 4096;
/// Warnings about settings that are remembered as said.
const WARNINGS_KEPT_MAX: usize = 64;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An epoch has broken, so that `MPI_Finalize` would wait for ranks that are no more.
fn tell_mpi_of_a_break() {
    #[cfg(feature = "mpi")]
    crate::transport::mpi::broke();
}

/// What is wrong with the settings is said once per process, however often it leaves and joins again.
fn warn_once(message: String) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut said = lock(&SAID);
    // Knobs may differ with each init, so the memory of them is bounded; then it is better to say it again.
    if !said.contains(&message) {
        log::warn(format_args!("{message}"));
        if said.len() < WARNINGS_KEPT_MAX {
            said.insert(message);
        }
    }
}

impl Live {
    /// Finds the others, agrees with them on the knobs, and starts the engine.
    pub(super) fn start(options: &Options, handles: Arc<Handles>) -> Result<Live> {
        let (config, warnings) = Config::load(&options.knobs, config::environment())?;
        log::configure(&config);
        for warning in warnings {
            warn_once(warning.message);
        }
        let epoch = Epoch(EPOCH.load(Ordering::SeqCst));
        let joined = join(&how_to_join(&config, epoch)?)?;
        Live::begin(options, config, joined, handles)
    }

    /// Starts the engine of the epoch that this process has joined.
    pub(super) fn begin(
        options: &Options,
        config: Config,
        mut joined: Joined,
        handles: Arc<Handles>,
    ) -> Result<Live> {
        let epoch = joined.table.epoch;
        EPOCH.store(epoch.0 + 1, Ordering::SeqCst);
        let world = world(&joined);
        log::set_rank(world.rank);
        let level = Level::from_code(joined.table.simd).unwrap_or(Level::Baseline);
        host::set_level(level)?;
        let setup = setup(&config, &joined, epoch);
        let system = |e: std::io::Error| Error::usage(format!("cannot start: {e}"));
        let waker = Waker::new().map_err(system)?;
        joined.warn = Arc::new(|words| log::warn(format_args!("{words}")));
        let doors = joined.doors.try_clone().map_err(system)?;
        let leash = joined.leash.take().map(Leash::new);
        let (table, secret) = (Arc::clone(&joined.table), joined.secret.clone());
        let options_of_porter = porter_options(&config);
        let (porter, fabric) = Porter::start(joined, options_of_porter, waker.clone()).map_err(system)?;
        let board = fabric.board();
        let driver = Driver::start(waker, handles, patience(&config, &world), move || {
            Engine::new(setup, Box::new(fabric))
        })
        .map_err(system)?;
        let stages = Stages::new(driver.wake(), config.direct_bytes);
        let everyone: Vec<Rank> = (0..world.size).map(Rank).collect();
        let live = Live {
            options: options.clone(),
            world,
            driver,
            config,
            table: Arc::clone(&table),
            secret,
            doors: Mutex::new(Some(doors)),
            leash: Mutex::new(leash),
            porter: Mutex::new(Some(porter)),
            sets: RwLock::default(),
            unnamed: Mutex::default(),
            stages,
            changes: Changes::default(),
            board,
            plans: AtomicUsize::new(0),
        };
        live.know_set(GLOBAL_SET, everyone);
        for (id, ranks) in &table.sets.list {
            live.know_set(*id, ranks.clone());
        }
        Ok(live)
    }

    /// Says goodbye, lets it leave, ends the threads. Other threads may still hold this job; their calls end
    /// with errors.
    pub(super) fn stop(&self) {
        if self.driver.stop(|engine| engine.broken().is_some()) {
            tell_mpi_of_a_break();
        }
        if let Some(porter) = lock(&self.porter).take() {
            porter.shutdown();
        }
        *lock(&self.leash) = None;
        *lock(&self.doors) = None;
    }

    pub(super) fn all_sets(&self) -> Vec<SetInfo> {
        let sets = self.sets.read().unwrap_or_else(PoisonError::into_inner);
        sets.values().map(|info| (**info).clone()).collect()
    }

    pub(super) fn set(&self, id: SetId) -> Result<Arc<SetInfo>> {
        let sets = self.sets.read().unwrap_or_else(PoisonError::into_inner);
        sets.get(&id).cloned().ok_or_else(|| {
            Error::usage(format!("process set {} does not exist; add_process_set() makes one", id.0))
        })
    }

    /// Submits a collective, and takes its outcome if it is there at once.
    pub(super) fn run(
        &self,
        request: &Request<'_>,
        keep: impl FnOnce() -> Option<Box<dyn Any + Send>>,
    ) -> Result<Running> {
        let mut keep = Some(keep);
        if let Some(name) = request.name
            && let Some(standing) = self.driver.find_standing(request.set, name)
        {
            let set = self.check_place(request)?;
            let call = request::repeat(request, &set);
            match self.driver.post(&standing, &call, true, || keep.take().and_then(|keep| keep()))? {
                Some(Ran::Done(outcome)) => return Ok(Running::Done(outcome)),
                Some(Ran::Started(handle)) => return Ok(Running::Started(Handle(handle))),
                None => {}
            }
        }
        self.submit(request, keep.and_then(|keep| keep()), true).map(Running::Started)
    }

    /// Submits a collective.
    pub(super) fn submit(
        &self,
        request: &Request<'_>,
        mut keep: Option<Box<dyn Any + Send>>,
        quiet: bool,
    ) -> Result<Handle> {
        let set = self.check_place(request)?;
        if let Some(name) = request.name
            && let Some(standing) = self.driver.find_standing(request.set, name)
            && let Some(Ran::Started(handle)) =
                self.driver.post(&standing, &request::repeat(request, &set), false, || keep.take())?
        {
            return Ok(Handle(handle));
        }
        let plans = self.plans.load(Ordering::SeqCst);
        if request.collective == Collective::Join && plans > 0 {
            return Err(Error::usage(format!(
                "rank {} has persistent collectives ({plans}), which it cannot take part in once it has joined; close \
                 them first",
                self.world.rank
            )));
        }
        // Before any lock is taken: the first copies of a size allocate.
        let staged = request.stream.map(|stream| self.stage(request, &set, stream));
        // The numbers of unnamed operations are their order of submission, so the two happen together.
        let mut unnamed = request.name.is_none().then(|| lock(&self.unnamed));
        let mut refusal = None;
        let fill = |submitted: &mut Submitted| {
            let filled = match staged {
                None => request::fill(request, &set, submitted),
                Some(Ok(staged)) => {
                    *submitted = staged;
                    Ok(())
                }
                Some(Err(reason)) => {
                    request::fill(&Request { refused: Some(&reason), ..*request }, &set, submitted)
                }
            };
            self.name(request, unnamed.as_deref_mut(), &mut submitted.name);
            if let Err(reason) = filled {
                submitted.refused = Some(reason.clone());
                refusal = Some(reason);
            }
        };
        let handle = self.driver.submit(keep, quiet, fill)?;
        drop(unnamed);
        match refusal {
            None => Ok(Handle(handle)),
            Some(reason) => {
                // The other ranks are told; nobody here waits for it.
                self.driver.abandon(handle);
                Err(Error::Usage(reason))
            }
        }
    }

    /// The set of a request, of which this rank must be a member, and its name looked at.
    fn check_place(&self, request: &Request<'_>) -> Result<Arc<SetInfo>> {
        if request
            .name
            .is_some_and(|name| name.starts_with([coordinator::ENGINE_NAMES, coordinator::PLAN_NAMES]))
        {
            return Err(Error::usage("a name does not begin with a control character"));
        }
        let set = self.set(request.set)?;
        if set.me.is_none() {
            return Err(Error::usage(format!(
                "rank {} is not a member of process set {}; only members submit operations to it",
                self.world.rank, set.id.0
            )));
        }
        if let Some(name) = request.name
            && (name.is_empty() || name.len() > limits::NAME_BYTES_MAX)
        {
            return Err(Error::usage(format!(
                "a name has 1 to {} bytes; this one has {}",
                limits::NAME_BYTES_MAX,
                name.len()
            )));
        }
        Ok(set)
    }

    /// The set and the name of a plan.
    pub(super) fn admit(&self, request: &Request<'_>) -> Result<(Arc<SetInfo>, String)> {
        let set = self.check_place(request)?;
        let mut name = String::new();
        let mut unnamed = request.name.is_none().then(|| lock(&self.unnamed));
        self.name(request, unnamed.as_deref_mut(), &mut name);
        Ok((set, name))
    }

    /// How often a wait that goes on is warned of, and after what time the epoch ends instead.
    pub(super) fn stall_limits(&self) -> (Option<Duration>, Option<Duration>) {
        let limit = |seconds: u64| (seconds > 0).then(|| Duration::from_secs(seconds));
        (limit(self.config.stall_warn_s), limit(self.config.stall_fail_s))
    }

    /// What is submitted for tensors of a device, which begin to come to the host.
    fn stage(
        &self,
        request: &Request<'_>,
        set: &SetInfo,
        stream: u64,
    ) -> std::result::Result<Submitted, String> {
        let mut submitted = Submitted::default();
        request::fill(request, set, &mut submitted)?;
        // SAFETY: what the caller of `submit` promised.
        unsafe { self.stages.stage(&mut submitted, stream, request.device) }?;
        Ok(submitted)
    }

    fn name(&self, request: &Request<'_>, counters: Option<&mut Unnamed>, into: &mut String) {
        into.clear();
        match (request.name, counters) {
            (Some(name), _) => into.push_str(name),
            (None, Some(counters)) => {
                let number = next_number(counters, (request.set, request.collective));
                write!(into, "{}.noname.{number}", request.collective).expect("strings take what is written");
            }
            (None, None) => unreachable!("unnamed operations are counted"),
        }
    }

    /// Submits a point-to-point message.
    pub(super) fn message(
        &self,
        set: SetId,
        message: Message,
        tensor: TensorArg<'_>,
        stream: Option<u64>,
        keep: Option<Box<dyn Any + Send>>,
    ) -> Result<Handle> {
        let info = self.set(set)?;
        if info.me.is_none() || message.peer.is_some_and(|peer| !info.ranks.contains(&peer)) {
            let who = message.peer.map_or_else(String::new, |peer| format!(" and {peer}"));
            return Err(Error::usage(format!(
                "send and recv are between members of a process set; rank {}{who} would have to be in set {} ({})",
                self.world.rank,
                set.0,
                coordinator::rank_list(&info.ranks)
            )));
        }
        let elements = tensor.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        let bytes = elements.and_then(|n| n.checked_mul(tensor.dtype.size() as u64));
        let Some(bytes) = bytes.filter(|&b| b <= limits::TENSOR_BYTES_MAX) else {
            return Err(Error::usage(format!(
                "a tensor of shape {:?} is larger than any memory",
                tensor.shape
            )));
        };
        let address = if message.sends { tensor.input.cast_mut() } else { tensor.output };
        if address.is_null() && bytes > 0 {
            return Err(Error::usage("the buffer of a message is a null pointer"));
        }
        // SAFETY: the caller promised that the bytes stay valid until the operation has an outcome.
        let region = unsafe { Region::new(address, bytes) };
        let fill = |submitted: &mut Submitted| {
            submitted.set = set;
            submitted.name.clear();
            submitted.refused = None;
            submitted.message = Some(message);
            submitted.signature.tensors.clear();
            submitted
                .signature
                .tensors
                .push(TensorSignature { dtype: tensor.dtype, shape: tensor.shape.to_vec() });
            submitted.tensors.clear();
            submitted.tensors.push((region, Some(region)));
        };
        let handle = match stream {
            None => self.driver.submit(keep, false, fill)?,
            Some(stream) => {
                let mut staged = Submitted::default();
                fill(&mut staged);
                // SAFETY: as above.
                unsafe { self.stages.stage(&mut staged, stream, None) }.map_err(Error::usage)?;
                self.driver.submit(keep, false, |submitted| *submitted = staged)?
            }
        };
        Ok(Handle(handle))
    }

    /// All ranks have joined. Those that joined early have submitted fewer unnamed operations than the others, so
    /// from here on all count from the beginning again; nor have they seen which sets came and went meanwhile.
    pub(super) fn realign(&self, joined: &Outcome) {
        let Some(set) = joined.set else { return };
        lock(&self.unnamed).retain(|(counted, _), _| *counted != set);
        for (id, ranks) in &joined.sets {
            if self.set(*id).is_err() {
                self.know_set(*id, ranks.to_vec());
            }
        }
        let gone = |id: &SetId| id.0 < joined.sets_made && joined.sets.iter().all(|(known, _)| known != id);
        if set == GLOBAL_SET {
            self.sets.write().unwrap_or_else(PoisonError::into_inner).retain(|id, _| !gone(id));
        }
    }

    /// The number of the next round of changes.
    pub(super) fn next_round(&self) -> u32 {
        next_number(&mut lock(&self.unnamed), (GLOBAL_SET, Collective::AddSet))
    }

    pub(super) fn forget_set(&self, id: SetId) {
        self.sets.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    pub(super) fn know_set(&self, id: SetId, ranks: Vec<Rank>) {
        let me = ranks.binary_search(&Rank(self.world.rank)).ok().map(|m| m as u32);
        let info = Arc::new(SetInfo { id, ranks, me });
        self.sets.write().unwrap_or_else(PoisonError::into_inner).insert(id, info);
    }
}

/// The number of the next operation without a name, out of a ring of names that are cached.
fn next_number(counters: &mut Unnamed, of: (SetId, Collective)) -> u32 {
    let counter = counters.entry(of).or_insert(0);
    let number = *counter % limits::UNNAMED_RING;
    *counter = counter.wrapping_add(1);
    number
}

/// How this process joins an epoch.
pub(super) fn how_to_join(config: &Config, epoch: Epoch) -> Result<Join> {
    let warn = Arc::new(|words: &str| log::warn(format_args!("{words}")));
    let how = Join::from_config(config, config::environment(), epoch, warn);
    #[cfg_attr(not(feature = "mpi"), expect(unused_mut, reason = "MPI completes it"))]
    let mut how = Join { simd: widest(config).code(), ..how };
    #[cfg(feature = "mpi")]
    {
        use crate::transport::mpi::Threads;
        let threads = if config.mpi_threads_disable { Threads::One } else { Threads::Many };
        if config.encrypt && config.transport == TransportChoice::Mpi {
            return Err(Error::usage(
                "CAROLE_ENCRYPT=1 and CAROLE_TRANSPORT=mpi: what MPI carries cannot be encrypted here; use \
                 CAROLE_TRANSPORT=tcp, or a network that is encrypted by itself",
            ));
        }
        let forced = config.transport == TransportChoice::Mpi;
        over_mpi::complete(&mut how, forced, threads, config.mpi_window)?;
    }
    Ok(how)
}

/// The widest instructions that this processor has and the knob allows.
fn widest(config: &Config) -> Level {
    let allowed = match config.simd {
        Some(SimdLevel::Baseline) => Level::Baseline,
        Some(SimdLevel::Avx2) => Level::Avx2,
        Some(SimdLevel::Avx512) | None => Level::Avx512,
    };
    host::available().min(allowed)
}

fn world(joined: &Joined) -> World {
    let topology = &joined.topology;
    let place = topology.ranks[joined.rank.0 as usize];
    World {
        rank: joined.rank.0,
        size: topology.ranks.len() as u32,
        local_rank: place.local_rank,
        local_size: topology.local_size(joined.rank),
        cross_rank: place.cross_rank,
        cross_size: place.cross_size,
        homogeneous: topology.homogeneous,
    }
}

fn setup(config: &Config, joined: &Joined, epoch: Epoch) -> EngineSetup {
    EngineSetup {
        me: joined.rank,
        epoch,
        hosts: joined.topology.ranks.iter().map(|place| place.host).collect(),
        agreement: coordinator::Rules {
            fusion_bytes: config.fusion_bytes,
            window_ns: config.batch_window_us * 1000,
            cache_keys: config.cache_keys as usize,
            stall_warn_ns: config.stall_warn_s * 1000 * MS,
            stall_fail_ns: config.stall_fail_s * 1000 * MS,
            strict_join: config.strict_compat,
        },
        fusion: fusion::Rules { fusion_bytes: config.fusion_bytes },
        plans: PlanRules {
            prices: prices(config),
            forced: config.algorithm.map(|name| name.to_string()),
            strict: config.deterministic,
            window_bytes: config.window_bytes,
            plans_max: PLANS_MAX,
        },
        membership: membership::Rules {
            silence_ns: config.timeout_ms * MS,
            heartbeat_ns: config.timeout_ms * MS / 6,
        },
        direct: Direct {
            bytes: config.direct_bytes,
            // Slots begin where allocations do.
            slot_bytes: config.direct_memory / limits::DEVICE_SLOTS as u64 / 256 * 256,
        },
        lent_bytes: limits::LENT_BYTES_MIN,
        stands_after: limits::STANDS_AFTER,
        niche_bytes_within: limits::NICHE_BYTES_WITHIN as u64,
        uniform: match config.uniform {
            Some(true) => Uniform::Always,
            Some(false) => Uniform::Never,
            None if config.worker.is_some() => Uniform::Always,
            None => Uniform::WithinHosts,
        },
        sets: joined.table.sets.list.clone(),
        next_set: joined.table.sets.next,
    }
}

/// What links cost: those that this job will have, on the network that the knobs describe.
fn prices(config: &Config) -> Prices {
    let network = Wire::network(config.network_gbits as f64, config.network_latency_us as f64);
    let same_host = match config.transport {
        TransportChoice::Tcp => Wire::LOOPBACK,
        TransportChoice::Mpi => Wire::MPI_ON_HOST,
        TransportChoice::Auto | TransportChoice::Shm => Prices::default().same_host,
    };
    Prices { same_host, between_hosts: network, ..Prices::default() }
}

fn porter_options(config: &Config) -> PorterOptions {
    PorterOptions {
        choice: match config.transport {
            TransportChoice::Auto => porter::Choice::Auto,
            TransportChoice::Shm => porter::Choice::Shm,
            TransportChoice::Tcp => porter::Choice::Tcp,
            TransportChoice::Mpi => porter::Choice::Mpi,
        },
        tcp_lanes: if config.transport == TransportChoice::Mpi { 0 } else { config.tcp_lanes as usize },
        // Who names several means them to be used, and the addresses are good.
        spread: config.interfaces.len() > 1,
        memory: Budget::new(config.memory),
        silence_ms: config.timeout_ms,
        tcp: TcpOptions {
            buffer_bytes: config.tcp_buffer_bytes.map(|bytes| bytes as usize),
            congestion: config.tcp_congestion.clone(),
            user_timeout_ms: 2 * config.timeout_ms,
        },
    }
}

/// Spinning pays only where every rank of the host has a processor of its own.
fn patience(config: &Config, world: &World) -> Patience {
    let may_use = |process| rustix::thread::sched_getaffinity(process).map_or(1, |set| set.count() as usize);
    let granted = std::thread::available_parallelism().map_or(1, usize::from);
    // Ranks that are bound to a processor each share the machine and not that processor. What the machine (or the
    // container) has is what its first process may use, unless a quota grants less time than processors.
    let processors = match granted < may_use(None) {
        true => granted,
        false => granted.max(may_use(Some(rustix::process::Pid::INIT))),
    };
    let crowded = world.local_size as usize > processors;
    let processor =
        config.thread_affinity.get(world.local_rank as usize).map(|&processor| processor as usize);
    Patience {
        spin_ns: config.spin_us * 1000,
        yields: crowded,
        processor,
        stall_warn_ns: config.stall_warn_s * 1000 * MS,
        stall_fail_ns: config.stall_fail_s * 1000 * MS,
    }
}
