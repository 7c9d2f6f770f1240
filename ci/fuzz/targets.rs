//! What is done with the bytes of each target: by libFuzzer (`fuzz_targets/`), and by `ci decoders`, which needs none.
#![allow(dead_code, reason = "a target of libFuzzer uses one of them")]

use carole::coordinator::{Coordinator, Intent, OpId, Rules, Setup, Submission};
use carole::types::{
    Collective, DType, JoinAverage, Member, Place, Rank, ReduceOp, Scale, SetId, Signature, TensorSignature,
    Time,
};
use carole::wire::agreement::{CutItem, UpItem, cut_item, header, query, stalled, up_item};
use carole::wire::signature::{fits, put_signature, signature as read_signature};
use carole::wire::{Message, Reader};

/// Envelopes: whatever decodes, encodes to the same bytes.
pub fn message(bytes: &[u8]) {
    if let Ok(message) = Message::decode(bytes) {
        let mut again = Vec::new();
        message.encode(&mut again);
        assert_eq!(again, bytes);
    }
}

/// Items of agreement: whatever is accepted can be walked to its end.
pub fn agreement(bytes: &[u8]) {
    let _ = header(&mut Reader::new(bytes));
    let _ = query(&mut Reader::new(bytes));
    let _ = stalled(&mut Reader::new(bytes)).map(|(_, _, members)| members.iter().count());
    let mut reader = Reader::new(bytes);
    while let Ok(Some(item)) = up_item(&mut reader) {
        if let UpItem::Ready { absent, call, .. } | UpItem::Announce { absent, call, .. } = item {
            assert_eq!(absent.iter().count(), absent.len());
            let mut visits = 0;
            call.for_each(|_, _, _| visits += 1);
            assert_eq!(visits, call.len() * call.width);
        }
    }
    let mut reader = Reader::new(bytes);
    while let Ok(Some(item)) = cut_item(&mut reader) {
        if let CutItem::Run { absent, .. } = item {
            assert_eq!(absent.iter().count(), absent.len());
        }
    }
}

/// Signatures: whatever decodes fits, and encodes to the same bytes.
pub fn signature(bytes: &[u8]) {
    let mut reader = Reader::new(bytes);
    if let Ok(it) = read_signature(&mut reader) {
        assert_eq!(fits(&it), Ok(()));
        let mut again = Vec::new();
        put_signature(&mut again, &it);
        assert_eq!(again, &bytes[..bytes.len() - reader.remaining()]);
    }
}

/// A coordinator that gets arbitrary bodies from its parent and children, between honest submissions: it
/// blames or obeys, and never panics.
pub fn coordinator(bytes: &[u8]) {
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
}
