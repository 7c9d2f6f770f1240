//! Agreement on cached operations allocates nothing: a step of cached tensors, with and without call data, on
//! the root, an interior member and a leaf. Alone in its file, because it counts every allocation.

use carole::coordinator::{Coordinator, Intent, OpId, Rules, Setup, Submission};
use carole::types::{
    Collective, DType, JoinAverage, Member, Place, Rank, ReduceOp, Scale, SetId, Signature, TensorSignature,
    Time,
};
use carole::wire::Message;
use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(address, layout) }
    }
    unsafe fn realloc(&self, address: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(address, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const MEMBERS: u32 = 12;

#[test]
fn a_cached_step_allocates_nothing() {
    let signature = |collective| Signature {
        collective,
        op: ReduceOp::Sum,
        scale: Scale::default(),
        root: Rank(0),
        place: Place::Host,
        join_average: JoinAverage::Size,
        tensors: vec![TensorSignature { dtype: DType::F32, shape: vec![0, 4] }],
        ranks: Vec::new(),
    };
    let (reduce, gather) = (signature(Collective::Allreduce), signature(Collective::Allgather));
    let names: Vec<String> = (0..100).map(|i| format!("t{i}")).collect();
    let mut nodes: Vec<Coordinator> = (0..MEMBERS)
        .map(|me| {
            Coordinator::new(Setup {
                set: SetId(0),
                me: Member(me),
                ranks: (0..MEMBERS).map(Rank).collect(),
                hosts: (0..MEMBERS).map(|i| i / 10).collect(),
                rules: Rules::default(),
            })
        })
        .collect();
    let mut flights: VecDeque<(u32, Member, Vec<u8>)> = VecDeque::new();
    for step in 0..20u64 {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        let mut ran = 0;
        for me in 0..MEMBERS {
            for (i, name) in names.iter().enumerate() {
                let gathers = i % 10 == 0;
                let rows = [step * 100 + u64::from(me)];
                let submission = Submission {
                    op: OpId(i as u32),
                    name,
                    hold_if_busy: false,
                    signature: if gathers { &gather } else { &reduce },
                    call: if gathers { &rows } else { &[] },
                    refused: None,
                };
                nodes[me as usize].submit(submission, Time(step)).expect("accepted");
            }
            nodes[me as usize].wait_for(OpId(0), Time(step));
            drain(&mut nodes[me as usize], me, &mut flights, &mut ran);
        }
        while let Some((from, to, bytes)) = flights.pop_front() {
            let Ok(Message::Coordination { body, .. }) = Message::decode(&bytes) else { panic!("a message") };
            nodes[to.0 as usize].receive(Member(from), body, Time(step)).expect("a correct peer");
            nodes[from as usize].recycle(bytes);
            drain(&mut nodes[to.0 as usize], to.0, &mut flights, &mut ran);
        }
        assert_eq!(ran, MEMBERS as usize * names.len());
        let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
        assert!(step > 0 || allocations > 0, "the count counts");
        assert!(step < 5 || allocations == 0, "{allocations} allocations in step {step}");
    }
}

fn drain(node: &mut Coordinator, me: u32, flights: &mut VecDeque<(u32, Member, Vec<u8>)>, ran: &mut usize) {
    while let Some(intent) = node.poll() {
        match intent {
            Intent::Tell { to, message } => flights.push_back((me, to, message)),
            Intent::Run(cut) => {
                *ran += cut.len();
                node.recycle_cut(cut);
            }
            other => panic!("{other:?}"),
        }
    }
}
