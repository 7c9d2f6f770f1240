//! Signatures on the wire.
#![forbid(unsafe_code)]

use super::cursor::{Malformed, Reader, put_varint};
use crate::limits::{DIMENSIONS_MAX, GROUP_TENSORS_MAX, RANKS_MAX, TENSOR_BYTES_MAX};
use crate::types::{
    Collective, DType, JoinAverage, Place, Rank, ReduceOp, Scale, Signature, TensorSignature,
};

/// Whether a signature can be sent at all; the reason when it cannot. Callers check before they submit, and
/// announce what does not fit as *refused*.
pub fn fits(signature: &Signature) -> Result<(), &'static str> {
    if signature.tensors.len() > GROUP_TENSORS_MAX {
        return Err("a group has more tensors than GROUP_TENSORS_MAX (65536); split it");
    }
    if signature.ranks.len() > RANKS_MAX || signature.ranks.iter().any(|rank| rank.0 as usize >= RANKS_MAX) {
        return Err("a process set has more ranks than RANKS_MAX (65536)");
    }
    if signature.root.0 as usize >= RANKS_MAX {
        return Err("the root is no rank of this job");
    }
    signature.tensors.iter().try_for_each(|tensor| tensor_fits(tensor.dtype, &tensor.shape))
}

/// The bytes of all dimensions that are not 0 are bounded, so that no product of a part of them overflows.
fn tensor_fits(dtype: DType, shape: &[u64]) -> Result<(), &'static str> {
    if shape.len() > DIMENSIONS_MAX {
        return Err("a tensor has more dimensions than DIMENSIONS_MAX (64)");
    }
    let mut bytes = dtype.size() as u64;
    for &dimension in shape {
        bytes = bytes
            .checked_mul(dimension.max(1))
            .filter(|&bytes| bytes <= TENSOR_BYTES_MAX)
            .ok_or("a tensor is larger than TENSOR_BYTES_MAX (2^46 bytes)")?;
    }
    Ok(())
}

/// Appends a signature.
pub fn put_signature(out: &mut Vec<u8>, signature: &Signature) {
    out.push(signature.collective.code());
    out.push(signature.op.code());
    out.extend_from_slice(&signature.scale.pre.to_bits().to_le_bytes());
    out.extend_from_slice(&signature.scale.post.to_bits().to_le_bytes());
    put_varint(out, u64::from(signature.root.0));
    out.push(match signature.place {
        Place::Host => 0,
        Place::Cuda => 1,
    });
    out.push(match signature.join_average {
        JoinAverage::Size => 0,
        JoinAverage::Present => 1,
    });
    put_varint(out, signature.tensors.len() as u64);
    for tensor in &signature.tensors {
        out.push(tensor.dtype.code());
        out.push(tensor.shape.len() as u8);
        for &dimension in &tensor.shape {
            put_varint(out, dimension);
        }
    }
    put_varint(out, signature.ranks.len() as u64);
    for rank in &signature.ranks {
        put_varint(out, u64::from(rank.0));
    }
}

/// Reads a signature.
pub fn signature(reader: &mut Reader<'_>) -> Result<Signature, Malformed> {
    let collective =
        Collective::from_code(reader.u8()?).ok_or(Malformed("a collective that does not exist"))?;
    let op = ReduceOp::from_code(reader.u8()?).ok_or(Malformed("a reduction that does not exist"))?;
    let scale = Scale { pre: reader.f64()?, post: reader.f64()? };
    let root = Rank(reader.position()?);
    let place = if reader.bool()? { Place::Cuda } else { Place::Host };
    let join_average = if reader.bool()? { JoinAverage::Present } else { JoinAverage::Size };
    let count = reader.count(GROUP_TENSORS_MAX, 2, "a group above GROUP_TENSORS_MAX")?;
    let mut tensors = Vec::with_capacity(count);
    for _ in 0..count {
        let dtype = DType::from_code(reader.u8()?).ok_or(Malformed("an element type that does not exist"))?;
        let dimensions = reader.u8()? as usize;
        if dimensions > DIMENSIONS_MAX || dimensions > reader.remaining() {
            return Err(Malformed("a tensor above DIMENSIONS_MAX"));
        }
        let mut shape = Vec::with_capacity(dimensions);
        for _ in 0..dimensions {
            shape.push(reader.varint_to(TENSOR_BYTES_MAX, "a dimension above TENSOR_BYTES_MAX")?);
        }
        tensor_fits(dtype, &shape).map_err(Malformed)?;
        tensors.push(TensorSignature { dtype, shape });
    }
    let count = reader.count(RANKS_MAX, 1, "a list of ranks above RANKS_MAX")?;
    let mut ranks = Vec::with_capacity(count);
    for _ in 0..count {
        ranks.push(Rank(reader.position()?));
    }
    Ok(Signature { collective, op, scale, root, place, join_average, tensors, ranks })
}
