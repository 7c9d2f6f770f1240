//! Fusion: cuts an agreed list into batches, each of which one schedule moves. A pure function of the list and
//! the agreed rules, so every rank makes the same batches.
//!
//! Tensors fuse if one layout and one reduction can serve them: same collective, element type, operation,
//! scales, root, place, join_average and absent members. A batch is closed when the next tensor that would
//! belong to it does not fit; tensors of other kinds in between do not close it (look-ahead), so mixed
//! precision makes two streams of batches, not many small ones.
#![forbid(unsafe_code)]

use crate::coordinator::Agreed;
use crate::types::Collective;
use std::ops::Range;
use std::sync::Arc;

/// What governs fusion; agreed when the epoch starts.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Bytes of one batch, unless a single tensor has more; 0 turns fusion off.
    pub fusion_bytes: u64,
}

/// One tensor of a cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Which operation: an index into the cut.
    pub operation: u32,
    /// Which of its tensors.
    pub tensor: u32,
}

/// What one schedule moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Batch<'a> {
    /// The first operation in it, which says what is to be done.
    pub operation: u32,
    /// The tensors, in agreed order; none for a barrier or a change of process sets.
    pub parts: &'a [Part],
    /// Their bytes (of the larger side: of all members' rows where these differ).
    pub bytes: u64,
}

/// Batches of one cut. Kept from cut to cut, so that its memory is used again.
#[derive(Debug, Default)]
pub struct Fusion {
    parts: Vec<Part>,
    batches: Vec<Open>,
    /// (batch, part) in agreed order.
    assigned: Vec<(u32, Part)>,
    /// Batches that still take tensors, one of each kind.
    open: Vec<u32>,
}

#[derive(Debug)]
struct Open {
    operation: u32,
    tensor: u32,
    bytes: u64,
    parts: Range<u32>,
}

/// Kinds of tensors that are looked ahead for; with more, the oldest batch is closed. Bounds the search.
const OPEN_MAX: usize = 32;

impl Fusion {
    /// Cuts `cut` into batches, which [`Fusion::batches`] then shows.
    pub fn fuse(&mut self, cut: &[Agreed], rules: Rules) {
        self.begin();
        for (operation, agreed) in cut.iter().enumerate() {
            let operation = operation as u32;
            if agreed.is_inline() || agreed.is_plan() {
                continue;
            }
            if agreed.signature.tensors.is_empty() {
                self.batches.push(Open { operation, tensor: 0, bytes: 0, parts: 0..0 });
            }
            for tensor in 0..agreed.signature.tensors.len() as u32 {
                self.place(cut, Part { operation, tensor }, rules);
            }
        }
        self.gather();
    }

    /// Cuts the tensors of one plan into batches, each of which goes at every start.
    pub fn fuse_plan(&mut self, plan: &Agreed, rules: Rules) {
        self.begin();
        for tensor in 0..plan.signature.tensors.len() as u32 {
            self.place(std::slice::from_ref(plan), Part { operation: 0, tensor }, rules);
        }
        self.gather();
    }

    fn begin(&mut self) {
        self.parts.clear();
        self.batches.clear();
        self.assigned.clear();
        self.open.clear();
    }

    /// The batches, in the order in which they are to run.
    pub fn batches(&self) -> impl ExactSizeIterator<Item = Batch<'_>> {
        self.batches.iter().map(|batch| Batch {
            operation: batch.operation,
            parts: &self.parts[batch.parts.start as usize..batch.parts.end as usize],
            bytes: batch.bytes,
        })
    }

    fn place(&mut self, cut: &[Agreed], part: Part, rules: Rules) {
        let agreed = &cut[part.operation as usize];
        let bytes = bytes_of(agreed, part.tensor as usize);
        let kin = self.open.iter().position(|&batch| {
            let first = &self.batches[batch as usize];
            fuses(&cut[first.operation as usize], first.tensor as usize, agreed, part.tensor as usize)
        });
        if let Some(at) = kin {
            let batch = self.open[at];
            let sum = self.batches[batch as usize].bytes.saturating_add(bytes);
            if sum <= rules.fusion_bytes {
                self.batches[batch as usize].bytes = sum;
                self.assigned.push((batch, part));
                return;
            }
            self.open.remove(at);
        }
        let batch = self.batches.len() as u32;
        let Part { operation, tensor } = part;
        self.batches.push(Open { operation, tensor, bytes, parts: 0..0 });
        self.assigned.push((batch, part));
        if may_fuse(agreed.signature.collective) && rules.fusion_bytes > 0 {
            if self.open.len() == OPEN_MAX {
                self.open.remove(0);
            }
            self.open.push(batch);
        }
    }

    /// Sorts the parts by batch, in agreed order within each: count, sum up, put.
    fn gather(&mut self) {
        for (batch, _) in &self.assigned {
            self.batches[*batch as usize].parts.end += 1;
        }
        let mut start = 0;
        for batch in &mut self.batches {
            let count = batch.parts.end;
            batch.parts = start..start;
            start += count;
        }
        self.parts.resize(self.assigned.len(), Part { operation: 0, tensor: 0 });
        for (batch, part) in &self.assigned {
            let place = &mut self.batches[*batch as usize].parts.end;
            self.parts[*place as usize] = *part;
            *place += 1;
        }
    }
}

fn may_fuse(collective: Collective) -> bool {
    matches!(
        collective,
        Collective::Allreduce
            | Collective::Broadcast
            | Collective::Reduce
            | Collective::Allgather
            | Collective::Reducescatter
    )
}

fn fuses(a: &Agreed, i: usize, b: &Agreed, j: usize) -> bool {
    let (x, y) = (&*a.signature, &*b.signature);
    may_fuse(x.collective)
        && x.collective == y.collective
        && x.tensors[i].dtype == y.tensors[j].dtype
        && x.op == y.op
        && x.scale.pre.to_bits() == y.scale.pre.to_bits()
        && x.scale.post.to_bits() == y.scale.post.to_bits()
        && x.root == y.root
        && x.place == y.place
        && x.join_average == y.join_average
        && (Arc::ptr_eq(&a.absent, &b.absent) || a.absent == b.absent)
}

/// Bytes of one tensor, for all members' rows where these differ.
fn bytes_of(agreed: &Agreed, tensor: usize) -> u64 {
    let signature = &agreed.signature.tensors[tensor];
    let elements = if agreed.signature.collective.has_free_rows() && agreed.call.width > tensor {
        let rows = agreed.call.values.iter().skip(tensor).step_by(agreed.call.width);
        let rows = rows.fold(0u64, |sum, &rows| sum.saturating_add(rows));
        signature.row_elements().saturating_mul(rows)
    } else {
        signature.elements()
    };
    elements.saturating_mul(signature.dtype.size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::{CallTable, OpId};
    use crate::types::*;
    use proptest::prelude::*;

    fn agreed(i: u32, signature: Signature, rows: Vec<u64>, absent: Vec<Member>) -> Agreed {
        let width = if signature.collective.has_free_rows() { signature.tensors.len() } else { 0 };
        Agreed {
            op: Some(OpId(i)),
            key: TensorKey(i),
            name: format!("t{i}").into(),
            signature: Arc::new(signature),
            absent: absent.into(),
            call: Arc::new(CallTable { width, values: if width > 0 { rows } else { Vec::new() } }),
        }
    }

    fn signatures() -> impl Strategy<Value = Vec<Agreed>> {
        let one =
            (0..12u8, 0..3u8, 0..2u8, 0..3u32, proptest::collection::vec((0..3u8, 0..40u64), 0..4), 0..4u8);
        proptest::collection::vec(one, 0..60).prop_map(|all| {
            let each =
                all.into_iter().enumerate().map(|(i, (collective, op, scale, root, tensors, absent))| {
                    let collective = Collective::from_code(collective).unwrap();
                    let tensors: Vec<TensorSignature> = tensors
                        .into_iter()
                        .map(|(dtype, n)| TensorSignature {
                            dtype: [DType::F32, DType::F16, DType::F64][dtype as usize],
                            shape: vec![if collective.has_free_rows() { 0 } else { n }, 3],
                        })
                        .collect();
                    let rows = vec![u64::from(root) + 1; tensors.len() * 2];
                    let signature = Signature {
                        collective,
                        op: ReduceOp::from_code(op).unwrap(),
                        scale: Scale { pre: f64::from(scale), post: 1.0 },
                        root: Rank(if collective.has_root() { root } else { 0 }),
                        place: Place::Host,
                        join_average: JoinAverage::Size,
                        tensors,
                        ranks: Vec::new(),
                    };
                    agreed(i as u32, signature, rows, if absent == 0 { vec![Member(1)] } else { Vec::new() })
                });
            each.collect()
        })
    }

    proptest! {
        #[test]
        fn every_tensor_is_in_one_batch_in_order_within_bounds(cut in signatures(), fusion_bytes in 0..2000u64) {
            let mut fusion = Fusion::default();
            fusion.fuse(&[], Rules { fusion_bytes });
            prop_assert_eq!(fusion.batches().len(), 0);
            fusion.fuse(&cut, Rules { fusion_bytes });
            let mut seen: Vec<(u32, u32)> = Vec::new();
            let mut bare = 0;
            let mut last_first = None;
            for batch in fusion.batches() {
                let first = &cut[batch.operation as usize];
                if batch.parts.is_empty() {
                    prop_assert!(first.signature.tensors.is_empty());
                    bare += 1;
                    continue;
                }
                prop_assert!(batch.parts.is_sorted_by(|a, b| (a.operation, a.tensor) < (b.operation, b.tensor)));
                let lead = batch.parts[0];
                prop_assert_eq!(lead.operation, batch.operation);
                prop_assert!(last_first < Some((lead.operation, lead.tensor)));
                last_first = Some((lead.operation, lead.tensor));
                let mut bytes = 0;
                for part in batch.parts {
                    let it = &cut[part.operation as usize];
                    if batch.parts.len() > 1 {
                        prop_assert!(fuses(first, lead.tensor as usize, it, part.tensor as usize));
                    }
                    bytes += bytes_of(it, part.tensor as usize);
                    seen.push((part.operation, part.tensor));
                }
                prop_assert_eq!(bytes, batch.bytes);
                prop_assert!(batch.parts.len() == 1 || bytes <= fusion_bytes);
            }
            seen.sort_unstable();
            let all: Vec<(u32, u32)> = cut
                .iter()
                .enumerate()
                .flat_map(|(i, a)| (0..a.signature.tensors.len()).map(move |t| (i as u32, t as u32)))
                .collect();
            prop_assert_eq!(seen, all);
            prop_assert_eq!(bare, cut.iter().filter(|a| a.signature.tensors.is_empty()).count());
        }
    }

    fn plain(i: u32, dtype: DType, n: u64) -> Agreed {
        let signature = Signature {
            collective: Collective::Allreduce,
            op: ReduceOp::Sum,
            scale: Scale::default(),
            root: Rank(0),
            place: Place::Host,
            join_average: JoinAverage::Size,
            tensors: vec![TensorSignature { dtype, shape: vec![n] }],
            ranks: Vec::new(),
        };
        agreed(i, signature, Vec::new(), Vec::new())
    }

    #[test]
    fn mixed_precision_makes_two_batches_not_many() {
        let cut: Vec<Agreed> =
            (0..100).map(|i| plain(i, if i % 2 == 0 { DType::F32 } else { DType::F16 }, 10)).collect();
        let mut fusion = Fusion::default();
        fusion.fuse(&cut, Rules { fusion_bytes: 1 << 20 });
        assert_eq!(fusion.batches().map(|b| b.parts.len()).collect::<Vec<_>>(), [50, 50]);
    }

    #[test]
    fn a_large_tensor_runs_alone_and_fusion_can_be_turned_off() {
        let cut = [plain(0, DType::F32, 10), plain(1, DType::F32, 1000), plain(2, DType::F32, 10)];
        let mut fusion = Fusion::default();
        fusion.fuse(&cut, Rules { fusion_bytes: 100 });
        assert_eq!(fusion.batches().map(|b| b.bytes).collect::<Vec<_>>(), [40, 4000, 40]);
        fusion.fuse(&cut, Rules { fusion_bytes: 0 });
        assert_eq!(fusion.batches().len(), 3);
    }
}
