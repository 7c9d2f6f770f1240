//! Operations that own their buffers, so that the tests above need no unsafe code.

use carole::error::Result;
use carole::runtime::{self, Handle, Outcome, Request, TensorArg};
use carole::types::{DType, Rank, SetId};
use std::time::Duration;

/// Where the output goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// Into the input.
    InPlace,
    /// Into memory of the caller's, as large as the input.
    Apart,
    /// Into memory that the engine allocates.
    Engine,
}

/// One tensor to give.
pub struct Tensor {
    pub dtype: DType,
    pub shape: Vec<u64>,
    pub input: Vec<u8>,
    pub place: Target,
}

/// An operation in flight, with its buffers.
pub struct Operation {
    handle: Option<Handle>,
    tensors: Vec<Tensor>,
    outputs: Vec<Vec<u8>>,
}

/// The end of an operation: the bytes of each output, and the rest of what it produced.
#[derive(Debug)]
pub struct Finished {
    pub outputs: Vec<Vec<u8>>,
    /// The inputs as they are afterwards (in place: the outputs).
    pub inputs: Vec<Vec<u8>>,
    pub outcome: Outcome,
}

impl Operation {
    /// Submits; `request.tensors` is filled in from `tensors`.
    pub fn submit(request: &Request<'_>, mut tensors: Vec<Tensor>) -> Result<Operation> {
        let mut outputs: Vec<Vec<u8>> = tensors
            .iter()
            .map(
                |tensor| {
                    if tensor.place == Target::Apart { vec![0xA5; tensor.input.len()] } else { Vec::new() }
                },
            )
            .collect();
        let args: Vec<TensorArg<'_>> = tensors
            .iter_mut()
            .zip(&mut outputs)
            .map(|(tensor, output)| TensorArg {
                input: tensor.input.as_mut_ptr(),
                output: match tensor.place {
                    Target::InPlace => tensor.input.as_mut_ptr(),
                    Target::Apart => output.as_mut_ptr(),
                    Target::Engine => std::ptr::null_mut(),
                },
                dtype: tensor.dtype,
                shape: &tensor.shape,
            })
            .collect();
        // SAFETY: the vectors lie on the heap, so they stay where they are when `Operation` moves; it neither
        // touches nor drops them before there is an outcome (see `wait` and `drop`).
        let handle = unsafe { runtime::submit(&Request { tensors: &args, ..*request }, None) }?;
        Ok(Operation { handle: Some(handle), tensors, outputs })
    }

    /// Starts to send.
    pub fn send(set: SetId, to: Rank, tag: u32, tensor: Tensor) -> Result<Operation> {
        let arg = TensorArg {
            input: tensor.input.as_ptr(),
            output: std::ptr::null_mut(),
            dtype: tensor.dtype,
            shape: &tensor.shape,
        };
        // SAFETY: as in `submit`.
        let handle = unsafe { runtime::send(set, to, tag, arg, None, None) }?;
        Ok(Operation { handle: Some(handle), tensors: vec![tensor], outputs: vec![Vec::new()] })
    }

    /// Starts to receive into the tensor's input, whose shape tells how much.
    pub fn recv(set: SetId, from: Rank, tag: u32, mut tensor: Tensor) -> Result<Operation> {
        tensor.place = Target::InPlace;
        let arg = TensorArg {
            input: std::ptr::null(),
            output: tensor.input.as_mut_ptr(),
            dtype: tensor.dtype,
            shape: &tensor.shape,
        };
        // SAFETY: as in `submit`.
        let handle = unsafe { runtime::recv(set, from, tag, arg, None, None) }?;
        Ok(Operation { handle: Some(handle), tensors: vec![tensor], outputs: vec![Vec::new()] })
    }

    /// Waits for the end of an operation in place; gives the tensors back without a copy.
    pub fn wait_in_place(mut self) -> Result<Vec<Vec<u8>>> {
        let handle = self.handle.take().expect("an operation is waited for once");
        runtime::wait(handle, None).result?;
        Ok(std::mem::take(&mut self.tensors).into_iter().map(|tensor| tensor.input).collect())
    }

    /// Waits for the end.
    pub fn wait(mut self) -> Result<Finished> {
        let handle = self.handle.take().expect("an operation is waited for once");
        let outcome = runtime::wait(handle, None).result?;
        let mut inputs = Vec::new();
        let mut outputs = Vec::new();
        for (i, tensor) in std::mem::take(&mut self.tensors).into_iter().enumerate() {
            let handed = outcome.tensors.get(i).and_then(|tensor| tensor.memory.as_ref());
            outputs.push(match (handed, tensor.place) {
                (Some(memory), _) => memory.as_slice().to_vec(),
                (None, Target::InPlace) => tensor.input.clone(),
                (None, Target::Apart) => std::mem::take(&mut self.outputs[i]),
                (None, Target::Engine) => Vec::new(),
            });
            inputs.push(tensor.input);
        }
        Ok(Finished { outputs, inputs, outcome })
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take() {
            // The buffers are the engine's until there is an outcome, so they cannot be dropped before.
            let completion = runtime::wait(handle, Some(Duration::from_secs(180)));
            if matches!(completion.result, Err(carole::error::Error::Timeout(_))) {
                eprintln!("an operation did not end within 60 s; its buffers cannot be freed");
                std::process::abort();
            }
        }
    }
}

/// Runs an operation to its end.
pub fn run(request: &Request<'_>, tensors: Vec<Tensor>) -> Result<Finished> {
    Operation::submit(request, tensors)?.wait()
}

/// No rank leaves before all have entered.
pub fn barrier() -> Result<()> {
    run(&Request::default(), Vec::new()).map(drop)
}
