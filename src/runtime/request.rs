//! A request, checked and turned into what the engine takes. Everything that one rank can know to be wrong is
//! found here, before anything is sent.

use super::{Request, SetInfo, TensorArg};
use crate::engine::handles::Submitted;
use crate::engine::standing::Repeat;
use crate::limits;
use crate::memory::Region;
use crate::types::{Collective, Place, ReduceOp, Signature, TensorSignature};

/// Fills in a submission. The error is the reason why the call cannot be accepted; what the submission holds
/// then is enough to tell the other ranks.
pub(super) fn fill(request: &Request<'_>, set: &SetInfo, into: &mut Submitted) -> Result<(), String> {
    into.set = request.set;
    into.call.clear();
    into.tensors.clear();
    into.refused = None;
    into.message = None;
    into.hold = request.name.is_none();
    let signature = &mut into.signature;
    signature.collective = request.collective;
    signature.op = if request.collective.reduces() { request.op } else { ReduceOp::Sum };
    signature.scale = if request.collective.reduces() { request.scale } else { Default::default() };
    signature.root = if request.collective.has_root() { request.root } else { Default::default() };
    signature.place = Place::Host;
    signature.join_average = request.join_average;
    signature.ranks.clear();
    signature.tensors.clear();
    if let Some(reason) = request.refused {
        return Err(reason.to_string());
    }
    check_call(request, set)?;
    for (t, tensor) in request.tensors.iter().enumerate() {
        check_tensor(request, tensor, t)?;
        push_tensor(request, tensor, &mut into.signature);
        let bytes = bytes_of(tensor).expect("checked before");
        into.tensors.push(memory_of(request, set, tensor, bytes)?);
    }
    push_call(request, set, into)
}

/// A request as a start of what stands, if it can be one at all.
pub(super) fn repeat<'a>(request: &Request<'a>, set: &SetInfo) -> Repeat<'a> {
    let splits_fit = request.splits.is_empty() || request.collective == Collective::Alltoall;
    let plain = request.refused.is_none() && request.stream.is_none() && splits_fit;
    let tensor = match request.tensors {
        [tensor] if plain => bytes_of(tensor).and_then(|bytes| {
            let memory = memory_of(request, set, tensor, bytes).ok()?;
            Some(((tensor.dtype, tensor.shape), memory))
        }),
        _ => None,
    };
    let (input, output) = tensor.map_or((Region::none(), None), |(_, memory)| memory);
    Repeat {
        collective: request.collective,
        op: request.op,
        scale: request.scale,
        join_average: request.join_average,
        root: request.root,
        tensor: tensor.map(|(tensor, _)| tensor),
        splits: request.splits,
        input,
        output,
    }
}

fn check_call(request: &Request<'_>, set: &SetInfo) -> Result<(), String> {
    let what = request.collective;
    let tensorless = matches!(what, Collective::Barrier | Collective::Join);
    if tensorless != request.tensors.is_empty() && !(request.tensors.is_empty() && request.name.is_some()) {
        return Err(match tensorless {
            true => format!("{what} takes no tensor"),
            false => format!("{what} needs at least one tensor"),
        });
    }
    if request.tensors.len() > limits::GROUP_TENSORS_MAX {
        return Err(format!(
            "a group of {} tensors; at most {} go in one group",
            request.tensors.len(),
            limits::GROUP_TENSORS_MAX
        ));
    }
    if what.has_root() && !set.ranks.contains(&request.root) {
        return Err(format!(
            "{what} names {} as its root, which is not in process set {} ({}); a root is a global rank, also in a process set",
            request.root,
            set.id.0,
            ranks_in_words(set)
        ));
    }
    if what.reduces() {
        let finite = request.scale.pre.is_finite() && request.scale.post.is_finite();
        if !finite {
            return Err(format!(
                "prescale_factor {} and postscale_factor {} must be finite numbers",
                request.scale.pre, request.scale.post
            ));
        }
    }
    if !request.splits.is_empty() && what != Collective::Alltoall {
        return Err(format!("{what} takes no splits"));
    }
    Ok(())
}

fn ranks_in_words(set: &SetInfo) -> String {
    let list: Vec<String> = set.ranks.iter().take(16).map(|r| r.0.to_string()).collect();
    format!("ranks {}{}", list.join(", "), if set.ranks.len() > 16 { ", ..." } else { "" })
}

fn check_tensor(request: &Request<'_>, tensor: &TensorArg<'_>, t: usize) -> Result<(), String> {
    if request.collective.reduces() {
        request.op.accepts(tensor.dtype).map_err(|why| {
            format!(
                "{} of a {} tensor (number {t}) with {}: {why}",
                request.collective, tensor.dtype, request.op
            )
        })?;
        crate::algorithm::supports(request.collective, request.op)
            .map_err(|why| format!("{} with {}: {why}", request.collective, request.op))?;
        if tensor.dtype == crate::types::DType::Bool
            && (request.scale.pre != 1.0 || request.scale.post != 1.0)
        {
            return Err("bool tensors have no scale; leave prescale_factor and postscale_factor at 1".into());
        }
    }
    if tensor.shape.len() > limits::DIMENSIONS_MAX {
        return Err(format!(
            "tensor {t} has {} dimensions; at most {} are possible",
            tensor.shape.len(),
            limits::DIMENSIONS_MAX
        ));
    }
    let bytes = bytes_of(tensor).filter(|&b| b <= limits::TENSOR_BYTES_MAX);
    if bytes.is_none() {
        return Err(format!("tensor {t} of shape {:?} is larger than any memory", tensor.shape));
    }
    Ok(())
}

/// Bytes of the input; `None` when they cannot be counted.
fn bytes_of(tensor: &TensorArg<'_>) -> Option<u64> {
    tensor.shape.iter().try_fold(tensor.dtype.size() as u64, |bytes, &d| bytes.checked_mul(d))
}

fn push_tensor(request: &Request<'_>, tensor: &TensorArg<'_>, signature: &mut Signature) {
    let mut shape = tensor.shape.to_vec();
    if shape.is_empty() && request.collective.has_rows() {
        shape.push(1);
    }
    if request.collective.has_free_rows() {
        shape[0] = 0;
    }
    signature.tensors.push(TensorSignature { dtype: tensor.dtype, shape });
}

/// The input of a tensor of so many bytes, and the output that the caller supplies.
fn memory_of(
    request: &Request<'_>,
    set: &SetInfo,
    tensor: &TensorArg<'_>,
    bytes: u64,
) -> Result<(Region, Option<Region>), String> {
    let me = set.me.map(|m| set.ranks[m as usize]);
    let gives = match request.collective {
        Collective::Broadcast | Collective::Scatter => me == Some(request.root),
        _ => true,
    };
    if gives && bytes > 0 && tensor.input.is_null() {
        return Err("the input is a null pointer".into());
    }
    let free_output = request.collective.has_free_rows();
    if free_output && !tensor.output.is_null() {
        return Err(format!("{} allocates its own output; pass none", request.collective));
    }
    let output_bytes = match request.collective {
        Collective::Reducescatter | Collective::Scatter => {
            let rows = tensor.shape.first().copied().unwrap_or(1);
            let mine =
                crate::layout::dealt_rows(rows, u64::from(set.me.unwrap_or(0)), set.ranks.len() as u64);
            bytes.checked_div(rows).unwrap_or(0) * (mine.end - mine.start)
        }
        _ => bytes,
    };
    let (from, to) = (tensor.input as usize, tensor.output as usize);
    let apart = from + bytes as usize <= to || to + output_bytes as usize <= from;
    if gives && to != 0 && bytes > 0 && output_bytes > 0 && !apart && !(from == to && bytes == output_bytes) {
        return Err("the output overlaps the input without being the same memory".into());
    }
    let input_bytes = if gives { bytes } else { 0 };
    // SAFETY: the caller of `submit` promised that both stay valid until the operation has an outcome.
    let (input, output) = unsafe {
        (
            Region::new(tensor.input.cast_mut(), input_bytes),
            (!tensor.output.is_null()).then(|| Region::new(tensor.output, output_bytes)),
        )
    };
    Ok((input, output))
}

fn push_call(request: &Request<'_>, set: &SetInfo, into: &mut Submitted) -> Result<(), String> {
    let size = set.ranks.len();
    match request.collective {
        Collective::Allgather | Collective::Gather => {
            into.call.extend(request.tensors.iter().map(|t| t.shape.first().copied().unwrap_or(1)));
        }
        Collective::Alltoall if request.splits.is_empty() => {
            for (t, tensor) in request.tensors.iter().enumerate() {
                let rows = tensor.shape.first().copied().unwrap_or(1);
                if rows % size as u64 != 0 {
                    return Err(format!(
                        "alltoall of tensor {t}: its first dimension {rows} is not a multiple of the {size} ranks; give splits"
                    ));
                }
                into.call.extend(std::iter::repeat_n(rows / size as u64, size));
            }
        }
        Collective::Alltoall => {
            if request.splits.len() != size * request.tensors.len() {
                return Err(format!(
                    "alltoall got {} splits; it needs {size} for each of its {} tensors (one per rank of the set)",
                    request.splits.len(),
                    request.tensors.len()
                ));
            }
            for (t, (tensor, splits)) in request.tensors.iter().zip(request.splits.chunks(size)).enumerate() {
                let rows = tensor.shape.first().copied().unwrap_or(1);
                let sum = splits.iter().try_fold(0u64, |sum, &s| sum.checked_add(s));
                if sum.is_none_or(|sum| sum > rows) {
                    return Err(format!(
                        "alltoall of tensor {t}: the splits {splits:?} add up to more than its first dimension, {rows}"
                    ));
                }
            }
            into.call.extend_from_slice(request.splits);
        }
        _ => {}
    }
    Ok(())
}
