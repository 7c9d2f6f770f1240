//! Carole: collective communication for distributed training. What Horovod set out to be, made anew in Rust.
//! (A *carole* is the medieval ring dance: one leader calls, the ring answers.)
//!
//! Ranks submit tensors by name, in any order. A *coordinator* agrees which tensors are ready on all ranks;
//! what is agreed is fused into *batches*; a batch runs a *schedule* (ring, tree, doubling, direct, hierarchical)
//! over shared memory or TCP; every rank gets the same bits, or the same error that names the rank at fault.
//! Python, C and the launcher `carolerun` stand on [`runtime`].
//!
//! # The idea, in five lines
//! 1. What the ranks agree to do is decided by a coordinator that has no socket and no clock ([`coordinator`]).
//! 2. What is agreed is cut into batches by a pure function that every rank computes alike ([`fusion`]).
//! 3. How a collective runs is a schedule: chunks and peers only; no bytes, no type, no transport ([`schedule`]).
//! 4. A run (schedule × layout × window) turns completions into orders, and is again a machine ([`run`]).
//! 5. Transports (bytes between ranks) and devices (bytes within one) alone touch the world.
//!
//! # The floors
//! The modules below stand in one list, and **a module uses only modules earlier in the list** (its own
//! children excepted). `tests/tidy.rs` enforces it.
//!
//! | floor | modules | what they are |
//! | --- | --- | --- |
//! | words | [`types`] [`hash`] [`limits`] [`error`] [`config`] [`log`] | the nouns, the bounds, what can go wrong, every knob |
//! | pure | [`schedule`] [`algorithm`] [`cost`] [`select`] [`layout`] [`wire`] | collectives as data, the table of algorithms, the priced choice, chunks to bytes, messages |
//! | machines | [`coordinator`] [`fusion`] [`membership`] [`run`] | facts in, intents out; the time is an argument |
//! | doers | [`fork`] [`memory`] [`device`] [`transport`] [`rendezvous`] | addresses, reductions, bytes between ranks, how ranks find and prove each other |
//! | engine | [`engine`] | one per process: owns the machines, drives the doers |
//! | faces | [`runtime`] [`launch`] [`perf`] | init and the collectives; `carolerun`; `carole-perf` |
//!
//! # The way of a tensor
//! 1. [`runtime::submit`] checks the call (`runtime/request.rs`) and leaves it in a slot (`engine/handles.rs`).
//! 2. Whoever drives (`engine/driver.rs`) hands it to [`engine::Engine::submit`], and so to the coordinator,
//!    which marks it ready, up a tree of hosts and ranks.
//! 3. The agreed log comes down the tree; `Engine::run_cut` (`engine/sets.rs`) fuses each cut into batches.
//! 4. `Engine::start_batch` (`engine/batch.rs`) finds the batch's plan (`engine/plan.rs`: query, choice, schedule,
//!    layout, made once per shape), registers its memory and starts its run. Within one host the batch goes over
//!    the members' boards instead (`engine/boards.rs`, [`transport::board`]): no messages, a few counters.
//! 5. `Engine::follow` gives orders to links and device; `Engine::step_done` takes their completions back to
//!    the run until it is finished.
//! 6. `Engine::end` reports the outcome; the handle's waiter takes it.
//!
//! # To add something
//! * An algorithm: its own file in `algorithm/` and one row of [`algorithm::TABLE`]; the ladder of tests finds it there.
//! * A transport: a folder in `transport/` that implements [`transport::Pipe`], a row in the conformance suite,
//!   and how to connect it in `rendezvous/porter`.
//! * An operation or a type: one row in `device/host/table.rs`, its bodies, and the oracle.
//! * A knob: one row in `config/knobs.rs`; the manual, `--print-config` and the errors come from it.
//! * A device: the trait [`device::Device`], and [`schedule::lower`] for what its links cannot do.
//!
//! # Architecture invariants
//! * Everything above the doers is deterministic and `forbid(unsafe_code)`; the simulator (`ci/src/sim`) runs whole
//!   engines, many ranks in one thread, from a seed.
//! * All that `fuse` and `select` read is agreed when the epoch starts; two ranks never choose apart.
//! * Payload travels only against credit: a receive that is posted, or landing space that is reserved. So
//!   process sets that overlap cannot deadlock. Control never waits for payload.
//! * What passes between hosts carries checksums, and nobody is told of a message before its own is right
//!   ([`transport::flow`]); within a host memory's checks must do.
//! * No byte of a connection is believed before it has proven (job, rank, epoch); no length is believed
//!   before it was held against [`limits`]. Where encryption is asked for, all that is inside TLS
//!   ([`transport::tls`]), with keys made of the same secret.
//! * A failure ends the *epoch*: everybody gets the same [`error::Broken`], the gravest cause of those that were
//!   noticed at once ([`membership`]), and those that are left form the next one ([`membership::regroup`]). Where
//!   completion is uniform they have the same outcome for every collective ([`membership::ledger`]): what goes over boards
//!   is complete for nobody before all can complete it, what goes by messages is told when all hold it. Only a rank to
//!   which there is a link is missed, so the ranks hang together from the first traffic on.
//! * After a shape is first seen nothing is allocated.
//! * [`memory`] is the one place where a name of memory becomes an address.
//!
//! Deliberately absent: callbacks into user code, a cycle time, a full mesh of connections, pickle on any
//! control path, a class per (collective × backend).
//!
//! # Where the code departs from the first design
//! * *Messages instead of shared counters.* Agreement within a host uses the same tree and messages as between
//!   hosts; over shared memory a message is a cache line or two. Arrival counters may replace the leaves
//!   of the tree later, without a change of the log.
//! * *Links instead of transports match messages.* A transport only supplies byte streams ([`transport::Pipe`]);
//!   [`transport::flow`] makes of them links that match, grant and reduce on receipt, once for all transports.
//!   A TCP link reduces out of a small staging buffer that stays in cache, so host memory needs no lowering.
//! * *No fusion region.* A batch of many tensors is a list of extents; a send gathers straight into the ring or
//!   the socket, a receive scatters from it. Packing *is* sending without a buffer in between. On boards the
//!   slots, which all members map, are the region, a window at a time so that they stay in cache.
//! * *A direct exchange beside the schedules.* On a board `direct` is carried out as a whole, not lowered to
//!   verbs: its reduction writes to where its operands lay, which no verb can say.
//! * *Values with the marks.* An allreduce of a few bytes is agreed on together with its values (`engine/inline.rs`):
//!   what is left to do is to reduce them.
//! * *Tensors of a device come to the host, or stay among devices.* Links and boards see host memory alone; orders are not
//!   lowered to device × link. Small tensors, and all between hosts, are copied when they are submitted
//!   ([`engine::passage`], `runtime/staged.rs`). Large batches of a set on one host go from device to device as a whole
//!   (`engine/direct.rs`, [`transport::board::device`]): each rank packs into memory that the others have opened by
//!   IPC, and kernels read it when the host has seen that it is there. That a set does so is agreed as its seats on
//!   boards are. Tensors' own allocations are not opened, so that nobody must know when a framework frees one; that
//!   costs a copy on each side. Events are not shared either: a kernel waits for nothing.
//! * *A closing order.* A rank that leaves may not make what was agreed before fail; see `engine/departure.rs`.
//! * *Doors instead of votes by message.* After an epoch the ranks come together at one place, whose machine
//!   ([`membership::regroup`]) decides: the launcher's rendezvous in an elastic job, else the doors of the lowest rank
//!   that lives ([`rendezvous::reform`]). Open doors tell that a rank lives, closed ones that it has ended.
//! * *Uniform completion without marks on boards.* There is no mark of what is held on a board: counters that are there
//!   anyway tell the same ([`membership::ledger`], `engine/uniform.rs`). Only what goes by messages is marked by messages
//!   of the tree, which a small operation that is waited for alone feels (2 us more for a barrier of two ranks).
//! * *One death at a time is settled for certain.* In the verdict round ([`membership::vote`]) a rank that has heard nothing
//!   for a second goes by what it knows. Nobody compares verdicts when the next epoch forms, so where several ranks die in
//!   the same moment two survivors may differ about the last operations; the meeting should exclude the fewer.
//! * *Persistent collectives beside the log.* A plan is agreed on (`engine/persistent.rs`), its starts are not: within a
//!   host each has a [`engine::channel`] to itself, which waiters turn without the engine's baton. Between hosts a start
//!   is an ordinary operation of the plan's name.
//! * *Standing operations instead of step plans.* A collective that repeats and stays in cache is done without the
//!   coordinator and without the engine, each by itself, through niches on the members' boards ([`engine::standing`]);
//!   whoever deviates withdraws, and the start becomes an ordinary operation on all members. Groups, larger tensors and
//!   whole steps are not planned; their seam is described in [`coordinator`].
//! * *Tensors lent by their owners.* Memory for tensors can be taken of a board's arena ([`runtime::allocate`]); where all
//!   members of a set have, an allreduce reads and writes the tensors themselves ([`transport::board`]). That members ask
//!   each other is agreed once (`engine/lending.rs`); where the tensors lie is told in a batch's first tick. What stands in
//!   a batch that fails becomes private memory at the same address, since who was lost may still write.
//!
//! # Vocabulary
//! *rank* a process; *process set* ranks that agree among themselves; *member* a rank's place in a set;
//! *collective* a kind of operation; *tensor*; *batch* fused tensors; *chunk* of a schedule; *window* of a buffer;
//! *extent* and *piece* runs of memory; *lane* of a link; *stream* what matches a send with its receive; *cut* a
//! portion of the agreed log; *epoch* an agreement about who takes part; *handle* an operation in flight;
//! *board* memory of one rank that all ranks of its host map, with *seats* for process sets and an *arena* of *blocks*;
//! *lend* to let the others read and write a tensor where it lies; *card* where a member's lie;
//! *tick* a window's turn there; *plan* how a shape is run: kept for batches, made beforehand for
//! a persistent collective, whose starts go through a *channel*; an operation *stands* that has repeated, and its starts go
//! through a *niche*, until a member *withdraws*;
//! *rendezvous*; *porter* the thread that connects; *slot* a place for a rank on a host; *worker* a process of an
//! elastic job, whose rank changes with the epochs; *re-form* to begin the epoch that follows.

pub mod types;
pub mod hash;
pub mod limits;
pub mod error;
pub mod config;
pub mod log;
pub mod schedule;
pub mod algorithm;
pub mod cost;
pub mod select;
pub mod layout;
pub mod wire;
pub mod coordinator;
pub mod fusion;
pub mod membership;
pub mod run;
pub mod fork;
pub mod memory;
pub mod device;
pub mod transport;
pub mod rendezvous;
pub mod engine;
pub mod runtime;
pub mod launch;
pub mod perf;

/// The README's program, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
