//! A coordinator that gets arbitrary bodies from its parent and children, between honest submissions: it
//! blames or obeys, and never panics.
#![no_main]

use carole::coordinator::{Coordinator, Intent, OpId, Rules, Setup, Submission};
use carole::types::{
    Collective, DType, JoinAverage, Member, Place, Rank, ReduceOp, Scale, SetId, Signature, TensorSignature, Time,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let [me, rest @ ..] = bytes else { return };
    let signature = Signature {
        collective: Collective::Allreduce,
        op: ReduceOp::Sum,
        scale: Scale::default(),
        root: Rank(0),
        place: Place::Host,
        join_average: JoinAverage::Size,
        tensors: vec![TensorSignature { dtype: DType::F32, shape: vec![2] }],
        ranks: Vec::new(),
    };
    let mut node = Coordinator::new(Setup {
        set: SetId(0),
        me: Member(u32::from(*me) % 12),
        ranks: (0..12).map(Rank).collect(),
        hosts: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1].into(),
        rules: Rules { cache_keys: 2, ..Rules::default() },
    });
    let mut op = 0;
    let mut now = Time(0);
    // Chunks: sender, length, body.
    let mut rest = rest;
    while let [from, length, more @ ..] = rest {
        let (body, after) = more.split_at((*length as usize).min(more.len()));
        rest = after;
        let name = ["a", "b", "c"][op as usize % 3];
        let submission = Submission {
            op: OpId(op),
            name,
            hold_if_busy: op % 2 == 0,
            signature: &signature,
            call: &[],
            refused: None,
        };
        let _ = node.submit(submission, now);
        op += 1;
        now = now.after_ns(40_000_000_000);
        node.handle_timeout(now);
        if node.receive(Member(u32::from(*from) % 12), body, now).is_err() {
            return;
        }
        while let Some(intent) = node.poll() {
            if let Intent::Run(cut) = intent {
                node.recycle_cut(cut);
            }
        }
    }
});
