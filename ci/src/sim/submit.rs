//! How a rank of a simulated cluster hands an operation of the program to its engine.
#![forbid(unsafe_code)]

use super::buffer::Buffer;
use super::check;
use super::node::Node;
use super::program::{Kind, Planned, Program, Wrong};
use carole::coordinator::OpId;
use carole::engine::standing::{Posted, Repeat};
use carole::engine::{Ended, Engine, MessageSubmission, Submission, TensorMemory};
use carole::error::Error;
use carole::limits::IN_FLIGHT_MAX;
use carole::memory::Region;
use carole::types::{Collective, DType, Place, Rank, ReduceOp, SetId, Signature, TensorSignature, Time};

/// Added to an operation's number for a second one of its name, which must be refused. The sum stays below
/// `IN_FLIGHT_MAX`, as users' numbers do: from there on they are the engine's own.
const TWICE: u32 = IN_FLIGHT_MAX as u32 / 2;

/// Submits operation `op`. With `twice`, submits its name once more, which must be refused.
pub fn submit(node: &mut Node, program: &Program, op: usize, twice: bool, now: Time) -> Result<(), String> {
    let planned = &program.ops[op];
    let set = node.sets[planned.set].expect("a set is made before it is used");
    if let Kind::Message { .. } = planned.kind {
        submit_message(node, planned, op, set);
        return Ok(());
    }
    let wrong = planned.wrong.filter(|(rank, _)| *rank == node.rank).map(|(_, w)| w);
    let tensors = buffers(node, program, op);
    let mut signature = signature(program, planned, wrong);
    if let Kind::RemoveSet(set) = planned.kind {
        signature.root = Rank(node.sets[set].map_or(0, |id| id.0));
    }
    let member = program.sets[planned.set].iter().position(|&m| m == node.rank.0).expect("members submit");
    let call: Vec<u64> = match planned.collective {
        Collective::Allgather | Collective::Gather => {
            planned.tensors.iter().map(|(_, rows)| rows[member]).collect()
        }
        Collective::Alltoall => planned.splits.iter().flat_map(|m| m[member].clone()).collect(),
        _ => Vec::new(),
    };
    let submission = Submission {
        op: OpId(op as u32),
        set,
        name: &planned.name,
        hold: planned.hold,
        signature: &signature,
        call: &call,
        tensors: &tensors,
        refused: (wrong == Some(Wrong::Refused)).then_some("the buffer is read-only"),
        on_device: None,
    };
    let engine = node.engine.as_mut().expect("live nodes submit");
    if start(engine, &mut node.done, &submission, twice, now)? {
        return Ok(());
    }
    match engine.submit(&submission, now) {
        Err(error) => node.results[op] = Some(Err(error)),
        // What completes the agreement at once frees its name at once; a refused call leaves it to the next.
        Ok(())
            if twice
                && submission.refused.is_none()
                && planned.kind == Kind::Collective
                && !planned.hold
                && engine.explain(submission.op, now).is_some_and(|why| !why.starts_with("it is not")) =>
        {
            let again = Submission { op: OpId(TWICE + op as u32), ..submission };
            match engine.submit(&again, now) {
                Err(Error::Usage(words)) if words.to_string().contains("in flight") => {}
                other => {
                    return Err(format!("'{}' twice in flight was not refused: {other:?}", planned.name));
                }
            }
        }
        Ok(()) => {}
    }
    Ok(())
}

/// Starts an operation that stands once more; whether it is one.
fn start(
    engine: &mut Engine,
    done: &mut Vec<Ended>,
    submission: &Submission<'_>,
    twice: bool,
    now: Time,
) -> Result<bool, String> {
    let standings = engine.standings();
    let Some(standing) = standings.find(submission.set, submission.name) else { return Ok(false) };
    let (signature, memory) = (submission.signature, submission.tensors.first());
    let (what, call) = (signature.collective, submission.call);
    let tensor = signature.tensors.first().filter(|_| signature.tensors.len() == 1);
    let mut shape = tensor.map_or(Vec::new(), |tensor| tensor.shape.clone());
    if what.has_free_rows() && !shape.is_empty() {
        shape[0] = call.iter().sum();
    }
    let call = Repeat {
        collective: what,
        op: signature.op,
        scale: signature.scale,
        join_average: signature.join_average,
        root: signature.root,
        tensor: tensor.filter(|_| submission.refused.is_none()).map(|tensor| (tensor.dtype, &shape[..])),
        splits: if what == Collective::Alltoall { call } else { &[] },
        input: memory.map_or(Region::none(), |memory| memory.input),
        output: memory.and_then(|memory| memory.output),
    };
    // Some callers wait at once: who comes last has the outcome then and there.
    let looks = submission.op.0.is_multiple_of(2);
    let post = |op: OpId| standings.post(&standing, &call, |is_over| looks && is_over(), || op);
    match post(submission.op) {
        Posted::Started => {}
        Posted::Done(outcome) => {
            done.push(Ended { op: submission.op, result: Ok(outcome) });
            return Ok(true);
        }
        Posted::Ordinary | Posted::Busy => return Ok(false),
    }
    if twice && !matches!(post(OpId(TWICE + submission.op.0)), Posted::Busy) {
        return Err(format!("'{}' was started twice", submission.name));
    }
    standings.watch(&standing);
    engine.turn_standings(now);
    Ok(true)
}

/// Whether this is a join that must wait for what was started before it.
pub fn joins_too_early(node: &mut Node, planned: &Planned, now: Time) -> bool {
    let (Kind::Join, Some(engine), Some(set)) = (planned.kind, &mut node.engine, node.sets[planned.set])
    else {
        return false;
    };
    !engine.may_join(set, now)
}

fn submit_message(node: &mut Node, planned: &Planned, op: usize, set: SetId) {
    let Kind::Message { from, to, tag, bytes, room, any } = planned.kind else {
        unreachable!("only messages come here")
    };
    let sends = node.rank.0 == from;
    let buffer = Buffer::own(if sends { message_bytes(planned, bytes) } else { vec![0xEE; room as usize] });
    let memory = buffer.region();
    node.buffers[op] = vec![buffer];
    let submission = MessageSubmission {
        op: OpId(op as u32),
        set,
        peer: (sends || !any).then_some(Rank(if sends { to } else { from })),
        tag,
        sends,
        memory,
        dtype: DType::U8,
    };
    let engine = node.engine.as_mut().expect("live nodes submit");
    if let Err(error) = engine.submit_message(&submission, &[memory.len()]) {
        node.results[op] = Some(Err(error));
    }
}

/// What a message says.
pub fn message_bytes(planned: &Planned, bytes: u64) -> Vec<u8> {
    (0..bytes).map(|i| (i.wrapping_mul(31) + planned.salt) as u8).collect()
}

/// Fills the node's buffers of an operation: outputs that the caller supplies first, then inputs.
fn buffers(node: &mut Node, program: &Program, op: usize) -> Vec<TensorMemory> {
    let planned = &program.ops[op];
    let members = &program.sets[planned.set];
    // Of some operations all ranks have the tensors in shared memory, of some only a part of the ranks.
    let lends = match planned.salt % 3 {
        0 => true,
        1 => node.rank.0.is_multiple_of(2),
        _ => false,
    };
    let board = node.engine.as_ref().and_then(Engine::own_board).filter(|_| lends);
    let own_output = matches!(planned.collective, Collective::Allreduce | Collective::Broadcast);
    let (mut inputs, mut outputs, mut tensors) = (Vec::new(), Vec::new(), Vec::new());
    for t in 0..planned.tensors.len() {
        let input = Buffer::new(board, check::input(planned, members, node.rank.0, t));
        let region = input.region();
        let output = match (own_output, planned.in_place) {
            (false, _) => None,
            (true, true) => Some(region),
            (true, false) => {
                let buffer = Buffer::new(board, vec![0xEE; input.bytes().len()]);
                let to = buffer.region();
                outputs.push(buffer);
                Some(to)
            }
        };
        inputs.push(input);
        tensors.push(TensorMemory { input: region, output });
    }
    outputs.append(&mut inputs);
    node.buffers[op] = outputs;
    tensors
}

fn signature(program: &Program, planned: &Planned, wrong: Option<Wrong>) -> Signature {
    let free = planned.collective.has_free_rows();
    let shape = |row: u64, rows: &[u64]| match planned.scalar {
        true => Vec::new(),
        false => vec![if free { 0 } else { rows[0] }, row + u64::from(wrong == Some(Wrong::Shape))],
    };
    let other = if planned.dtype == DType::U64 { DType::I64 } else { DType::U64 };
    let tensors = planned
        .tensors
        .iter()
        .map(|(row, rows)| TensorSignature {
            dtype: if wrong == Some(Wrong::DType) { other } else { planned.dtype },
            shape: shape(*row, rows),
        })
        .collect();
    let ranks = match planned.kind {
        Kind::AddSet(set) | Kind::RemoveSet(set) => program.sets[set].iter().map(|&r| Rank(r)).collect(),
        _ => Vec::new(),
    };
    let other_op = if planned.op == ReduceOp::Sum { ReduceOp::Product } else { ReduceOp::Sum };
    Signature {
        collective: if wrong == Some(Wrong::Collective) { Collective::Reduce } else { planned.collective },
        op: if wrong == Some(Wrong::Op) { other_op } else { planned.op },
        scale: planned.scale,
        root: if planned.collective.has_root() { planned.root } else { Rank(0) },
        place: Place::Host,
        join_average: planned.join_average,
        tensors,
        ranks,
    }
}
