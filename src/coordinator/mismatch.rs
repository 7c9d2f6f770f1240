//! The words of mismatches. They are made once, at the root, and every member reports them as they are.
#![forbid(unsafe_code)]

use super::shown;
use super::table::Said;
use crate::limits::{NAME_BYTES_MAX, TENSOR_BYTES_MAX};
use crate::types::{Collective, Member, Place, Rank, Signature, TensorSignature};
use crate::wire::cursor::cut_text;
use std::fmt::Write;

/// What two members that differ about `name` are told.
#[must_use]
pub fn difference(name: &str, ranks: &[Rank], a: &Said, b: &Said) -> String {
    let (what, value_a, value_b, remedy) = first_difference(a, b);
    let (rank_a, rank_b) = (ranks[a.member.0 as usize], ranks[b.member.0 as usize]);
    format!(
        "'{}' does not match: {rank_a} submitted {what} {value_a}, {rank_b} submitted {what} {value_b}; {remedy}",
        cut_text(shown(name), NAME_BYTES_MAX)
    )
}

type Difference = (String, String, String, String);

fn first_difference(a: &Said, b: &Said) -> Difference {
    let (x, y) = (&*a.signature, &*b.signature);
    let same = |what: &str| format!("every rank must submit the same {what}");
    let differ = |what: &str, x: String, y: String| (what.to_owned(), x, y, same(what));
    if x.collective != y.collective {
        return (
            "the collective".into(),
            x.collective.to_string(),
            y.collective.to_string(),
            "give different operations different names".into(),
        );
    }
    if x.tensors.len() != y.tensors.len() {
        let groups = (x.tensors.len().to_string(), y.tensors.len().to_string());
        return differ("number of tensors", groups.0, groups.1);
    }
    for (i, (s, t)) in x.tensors.iter().zip(&y.tensors).enumerate() {
        if s != t {
            return tensor_difference(x.collective, i, x.tensors.len(), s, t);
        }
    }
    if x.op != y.op {
        return differ("reduction", x.op.to_string(), y.op.to_string());
    }
    if x.scale.pre.to_bits() != y.scale.pre.to_bits() {
        return differ("prescale factor", format!("{:?}", x.scale.pre), format!("{:?}", y.scale.pre));
    }
    if x.scale.post.to_bits() != y.scale.post.to_bits() {
        return differ("postscale factor", format!("{:?}", x.scale.post), format!("{:?}", y.scale.post));
    }
    if x.ranks != y.ranks {
        // Long lists are shortened, so the place where they differ is named, too.
        let place = x.ranks.iter().zip(&y.ranks).position(|(r, s)| r != s);
        let place = place.unwrap_or(x.ranks.len().min(y.ranks.len()));
        let list = |ranks: &[Rank]| format!("{} ({} in all)", rank_list(ranks), ranks.len());
        let remedy = format!("every rank must submit the same list of ranks (entry {place} differs)");
        return ("the list".into(), list(&x.ranks), list(&y.ranks), remedy);
    }
    if x.root != y.root {
        return differ("root", x.root.to_string(), y.root.to_string());
    }
    if x.place != y.place {
        let remedy = "move the tensor to the same kind of device on every rank".into();
        return ("a tensor on".into(), place(x.place).into(), place(y.place).into(), remedy);
    }
    if x.join_average != y.join_average {
        return differ("join_average", format!("{:?}", x.join_average), format!("{:?}", y.join_average));
    }
    let what = "number of splits or row counts";
    (what.into(), a.width.to_string(), b.width.to_string(), same(what))
}

fn tensor_difference(
    collective: Collective,
    i: usize,
    of: usize,
    s: &TensorSignature,
    t: &TensorSignature,
) -> Difference {
    let at = if of > 1 { format!(" of tensor {i} of the group") } else { String::new() };
    if s.dtype != t.dtype {
        let remedy = "convert the tensor to the same type on every rank".into();
        return (format!("dtype{at}"), s.dtype.to_string(), t.dtype.to_string(), remedy);
    }
    let place = if s.shape.len() == t.shape.len() {
        let dimension = s.shape.iter().zip(&t.shape).position(|(x, y)| x != y).unwrap_or(0);
        format!(" (dimension {dimension} differs)")
    } else {
        format!(" ({} and {} dimensions)", s.shape.len(), t.shape.len())
    };
    let remedy = format!("every rank must submit the same shape{place}");
    (format!("shape{at}"), shape(collective, &s.shape), shape(collective, &t.shape), remedy)
}

/// A shape in words; `*` stands for rows of which each rank may have its own number.
fn shape(collective: Collective, dimensions: &[u64]) -> String {
    let dimension = |(i, size): (usize, &u64)| match i == 0 && collective.has_free_rows() {
        true => "*".to_owned(),
        false => size.to_string(),
    };
    format!("[{}]", dimensions.iter().enumerate().map(dimension).collect::<Vec<_>>().join(", "))
}

/// What all are told when a member refused its call.
#[must_use]
pub fn refusal(name: &str, rank: Rank, reason: &str) -> String {
    format!("'{}' cannot run: {rank} refused it: {reason}", cut_text(shown(name), NAME_BYTES_MAX))
}

/// What is wrong with an operation that all members submitted alike, given who is absent; `None` if nothing.
#[must_use]
pub fn impossible(
    name: &str,
    ranks: &[Rank],
    signature: &Signature,
    absent: &[Member],
    strict_join: bool,
) -> Option<String> {
    let name = cut_text(shown(name), NAME_BYTES_MAX);
    let collective = signature.collective;
    if collective.has_root() {
        let Ok(root) = ranks.binary_search(&signature.root) else {
            return Some(format!(
                "{collective} '{name}' cannot run: its root, {}, is not in the process set, whose ranks are {}; \
                 name a root by its global rank",
                signature.root,
                rank_list(ranks)
            ));
        };
        if absent.contains(&Member(root as u32)) {
            return Some(format!(
                "{collective} '{name}' cannot run: its root, {}, has joined and has no data; choose a root that \
                 joins last, or let the root join after its last operation",
                signature.root
            ));
        }
    }
    if strict_join
        && collective != Collective::Allreduce
        && let Some(first) = absent.first()
    {
        return Some(format!(
            "{collective} '{name}' cannot run: {} has joined, and HOROVOD_STRICT_COMPAT refuses every \
             collective but allreduce then; unset it, or join after the last {collective}",
            ranks[first.0 as usize]
        ));
    }
    None
}

/// What all are told when row counts add up to more than can be.
#[must_use]
pub fn too_large(name: &str, signature: &Signature, rows: u64) -> String {
    format!(
        "{} '{}' cannot run: {rows} rows are more than {TENSOR_BYTES_MAX} bytes; split it",
        signature.collective,
        cut_text(name, NAME_BYTES_MAX)
    )
}

/// "ranks 3, 7": at most 16 are named.
#[must_use]
pub fn rank_list(ranks: &[Rank]) -> String {
    const NAMED: usize = 16;
    let mut text = String::from(if ranks.len() == 1 { "rank " } else { "ranks " });
    for (i, rank) in ranks.iter().take(NAMED).enumerate() {
        let _ = write!(text, "{}{}", if i > 0 { ", " } else { "" }, rank.0);
    }
    if ranks.len() > NAMED {
        let _ = write!(text, " and {} more", ranks.len() - NAMED);
    }
    text
}

fn place(place: Place) -> &'static str {
    match place {
        Place::Host => "host memory",
        Place::Cuda => "a CUDA device",
    }
}
