//! A step that repeats allocates nothing in the engine: two engines over simulated pipes, a hundred tensors by
//! names that are known, after a warm-up. Alone in its file, because it counts every allocation.

use carole::coordinator::{self, OpId};
use carole::cost::Prices;
use carole::engine::plan::PlanRules;
use carole::engine::{Engine, EngineSetup, Submission, TensorMemory};
use carole::fusion;
use carole::membership::{self, ledger::Uniform};
use carole::memory::Region;
use carole::transport::flow::FlowOptions;
use carole::transport::sim::{Fabric, Network, SimOptions};
use carole::types::{
    Collective, DType, Epoch, GLOBAL_SET, JoinAverage, Place, Rank, ReduceOp, Scale, Signature,
    TensorSignature, Time,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    ALLOCATIONS.with(|n| n.set(n.get() + 1));
}

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(address, layout) }
    }
    unsafe fn realloc(&self, address: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(address, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const TENSORS: usize = 100;
const ELEMENTS: usize = 25;

fn engine(network: &Network, me: u32) -> Engine {
    let setup = EngineSetup {
        me: Rank(me),
        epoch: Epoch(1),
        hosts: Arc::new([0, 0]),
        agreement: coordinator::Rules::default(),
        fusion: fusion::Rules { fusion_bytes: 2000 },
        plans: PlanRules {
            prices: Prices::default(),
            forced: None,
            strict: false,
            window_bytes: 1 << 20,
            plans_max: 64,
        },
        membership: membership::Rules::default(),
        direct: carole::engine::Direct { bytes: u64::MAX, slot_bytes: 0 },
        lent_bytes: carole::limits::LENT_BYTES_MIN,
        stands_after: carole::limits::STANDS_AFTER,
        niche_bytes_within: 4 << 10,
        uniform: Uniform::WithinHosts,
        sets: Vec::new(),
        next_set: 1,
    };
    Engine::new(setup, Box::new(Fabric::new(network.clone(), Rank(me), FlowOptions::default())))
}

/// Allocations of one step, by the engines alone: the network's own are taken off by the caller, who measures
/// a step in which nothing is submitted.
fn repeat_a_step(boards: bool) {
    let network = Network::new(SimOptions {
        seed: 1,
        delay_min_ns: 1000,
        delay_max_ns: 1000,
        capacity_bytes: 1 << 20,
        fragments: false,
        boards,
    });
    let mut engines = [engine(&network, 0), engine(&network, 1)];
    let signature = Signature {
        collective: Collective::Allreduce,
        op: ReduceOp::Sum,
        scale: Scale::default(),
        root: Rank(0),
        place: Place::Host,
        join_average: JoinAverage::Size,
        tensors: vec![TensorSignature { dtype: DType::F32, shape: vec![ELEMENTS as u64] }],
        ranks: Vec::new(),
    };
    let names: Vec<String> = (0..TENSORS).map(|i| format!("grad/{i}")).collect();
    let mut buffers = vec![vec![vec![1f32; ELEMENTS]; TENSORS]; 2];
    let mut now = Time(0);
    let mut outcomes = Vec::with_capacity(TENSORS);
    let mut last = u64::MAX;
    for step in 0..200 {
        for list in &mut buffers {
            list.iter_mut().for_each(|buffer| buffer.fill(1.0));
        }
        let before = ALLOCATIONS.get();
        for (engine, list) in engines.iter_mut().zip(&mut buffers) {
            for (i, buffer) in list.iter_mut().enumerate() {
                // SAFETY: the buffers outlive the engines' use of them, which ends within the step.
                let region = unsafe { Region::new(buffer.as_mut_ptr().cast(), (ELEMENTS * 4) as u64) };
                let submission = Submission {
                    op: OpId(i as u32),
                    set: GLOBAL_SET,
                    name: &names[i],
                    hold: false,
                    signature: &signature,
                    call: &[],
                    tensors: &[TensorMemory { input: region, output: Some(region) }],
                    refused: None,
                    on_device: None,
                };
                engine.submit(&submission, now).expect("accepted");
            }
            engine.wait_for(OpId(0), now);
        }
        let mut ended = 0;
        while ended < 2 * TENSORS {
            let mut moved = false;
            for engine in &mut engines {
                moved |= engine.turn(now);
                outcomes.extend(engine.ended().map(|end| end.result.expect("it succeeds")));
                ended += outcomes.len();
                outcomes.drain(..).for_each(|outcome| engine.recycle(outcome));
            }
            if !moved {
                now = now.after_ns(1000);
                network.advance(now);
            }
        }
        last = ALLOCATIONS.get() - before;
        assert!(buffers.iter().flatten().flatten().all(|x| *x == 2.0), "the sum is right");
        assert!(step > 0 || last > 0, "the count counts");
    }
    assert_eq!(last, 0, "allocations in the last of 200 steps");
}

#[test]
fn a_repeated_step_allocates_nothing() {
    repeat_a_step(false);
}

#[test]
fn a_repeated_step_over_boards_allocates_nothing() {
    repeat_a_step(true);
}
