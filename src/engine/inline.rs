//! Allreduces of a few bytes: the values travel with the ready marks, as row counts do. When the operation is agreed,
//! every member has everybody's values, and reduces them itself in member order: one exchange of messages less, which
//! is most of the time that so small an operation takes. The order and the rounding are those of the direct
//! algorithm in one step.

use super::Engine;
use super::batch::divisor;
use super::{Submission, operation};
use crate::coordinator::Agreed;
use crate::device::{Finish, Reduction, host};
use crate::limits::{INLINE_BYTES_MAX, INLINE_MEMBERS_MAX};
use crate::types::{Collective, Member, ReduceOp, SetId};

/// Bytes of a tensor in one value of the call: values are bounded as row counts are.
const WORD_BYTES: usize = 4;
/// Values of the call of one member.
pub(super) const WORDS_MAX: usize = INLINE_BYTES_MAX / WORD_BYTES;

/// The bytes of one member, aligned as the vector instructions like them.
#[repr(align(64))]
#[derive(Clone, Copy)]
struct Bytes([u8; INLINE_BYTES_MAX]);

impl Engine {
    /// The values of an operation that travels with its marks, as words; `None` if it does not. Whether it does is
    /// a function of what all members agree on.
    pub(super) fn inline_values<'a>(
        &self,
        submission: &Submission<'_>,
        words: &'a mut [u64; WORDS_MAX],
    ) -> Option<&'a [u64]> {
        let signature = submission.signature;
        let ([tensor], [memory]) = (&signature.tensors[..], submission.tensors) else { return None };
        let bytes = tensor.elements().saturating_mul(tensor.dtype.size() as u64) as usize;
        let members = self.sets.get(&submission.set)?.ranks.len();
        let small = signature.collective == Collective::Allreduce
            && signature.op != ReduceOp::Adasum
            && (1..=INLINE_BYTES_MAX).contains(&bytes)
            && (2..=INLINE_MEMBERS_MAX).contains(&members);
        let free = self.plans.forced().is_none_or(|name| name == "direct");
        // Memory that is shorter than its shape says fits no other member's either: that is found out in agreement.
        if !small || !free || submission.refused.is_some() || memory.input.len() < bytes as u64 {
            return None;
        }
        let mut copy = [0u8; INLINE_BYTES_MAX];
        // SAFETY: the submitter keeps the input alive and unwritten until the operation has ended, `bytes` bytes of
        // it as just checked; the copy has room for INLINE_BYTES_MAX.
        unsafe {
            std::ptr::copy_nonoverlapping(memory.input.as_ptr().cast_const(), copy.as_mut_ptr(), bytes)
        };
        for (word, part) in words.iter_mut().zip(copy.as_chunks::<WORD_BYTES>().0) {
            *word = u64::from(u32::from_le_bytes(*part));
        }
        Some(&words[..bytes.div_ceil(WORD_BYTES)])
    }

    /// An operation whose values came with its marks is agreed: reduces them.
    pub(super) fn finish_inline(&mut self, id: SetId, agreed: &Agreed) {
        let Some(op) = agreed.op else { return };
        let set = &self.sets[&id];
        let (me, size) = (set.me(), set.size());
        let tensor = &agreed.signature.tensors[0];
        let reduction = Reduction { dtype: tensor.dtype, op: agreed.signature.op };
        let bytes = (tensor.elements() * tensor.dtype.size() as u64) as usize;
        let mut regions = std::mem::take(&mut self.inline_regions);
        let sizes = operation::sizes(agreed, 0, me, size, 0);
        self.take_tensor(op, 0, tensor, sizes, &mut regions);
        let output = regions[1];
        regions.clear();
        self.inline_regions = regions;
        assert!(agreed.call.width == bytes.div_ceil(WORD_BYTES), "all members sent as many values");
        assert!(output.len() == bytes as u64 && size as usize <= INLINE_MEMBERS_MAX);
        let finish = Finish { divisor: divisor(agreed, size), post: agreed.signature.scale.post };
        let mut operands = [Bytes([0; INLINE_BYTES_MAX]); INLINE_MEMBERS_MAX];
        let mut sources = [std::ptr::null(); INLINE_MEMBERS_MAX];
        for (at, operand) in operands.iter_mut().enumerate().take(size as usize) {
            let member = Member(at as u32);
            if agreed.absent.contains(&member) {
                // SAFETY: the operand has room for `bytes`.
                unsafe { host::identity(reduction, operand.0.as_mut_ptr(), bytes) };
            } else {
                for (part, word) in
                    operand.0.as_chunks_mut::<WORD_BYTES>().0.iter_mut().zip(agreed.call.of(member))
                {
                    *part = (*word as u32).to_le_bytes();
                }
            }
            sources[at] = operand.0.as_ptr();
        }
        let (pre, sources) = (agreed.signature.scale.pre, &sources[..size as usize]);
        // SAFETY: `bytes` bytes lie at each operand and at the output, which the submitter has given away until the
        // operation has ended; the operands are this function's own.
        unsafe { host::reduce_many(reduction, output.as_ptr(), sources, bytes, pre, finish) };
        self.last_algorithm = Some("direct");
        self.tensor_done(op);
    }
}
