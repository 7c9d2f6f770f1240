//! The short way for tensors of PyTorch: one call from Python looks at them, submits them and returns the handle.
//! What it cannot take (`None`), the general way in `carole.torch.asynchronous` takes or refuses with words.

use crate::errors;
use crate::exchange::Exchange;
use crate::fastcall::text;
use crate::handle::{Finish, Handle, new_tensor, release_finished};
use crate::output::Output;
use carole::runtime::{self, OwnedBytes, Request, Running, TensorArg};
use carole::types::{Collective, DType, Rank, ReduceOp, Scale, SetId};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyInt, PyList, PyString, PyType};
use std::any::Any;
use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, Ordering};

/// What torch is, told once by `carole.torch`.
struct Torch {
    class: Py<PyType>,
    /// torch's types, which are objects that exist once.
    dtypes: Vec<(Py<PyAny>, DType)>,
    strided: Py<PyAny>,
    empty_like: Py<PyAny>,
    /// What makes a tensor of an [`Output`].
    to_torch: Py<PyAny>,
    everyone: Py<PyAny>,
    exchange: Option<Exchange>,
}

static TORCH: PyOnceLock<Torch> = PyOnceLock::new();

/// Tells what torch is: the class of its tensors, its types with their codes, `torch.strided`, `torch.empty_like`,
/// `carole._arrays.to_torch`, and the process set of all ranks.
#[pyfunction]
pub fn learn_torch(
    py: Python<'_>,
    class: Bound<'_, PyType>,
    dtypes: Vec<(Py<PyAny>, u8)>,
    strided: Py<PyAny>,
    empty_like: Py<PyAny>,
    to_torch: Py<PyAny>,
    everyone: Py<PyAny>,
) {
    let exchange = Exchange::of(class.as_any());
    let known = |(object, code)| DType::from_code(code).map(|dtype| (object, dtype));
    let dtypes = dtypes.into_iter().filter_map(known).collect();
    TORCH.get_or_init(py, || Torch {
        class: class.unbind(),
        dtypes,
        strided,
        empty_like,
        to_torch,
        everyone,
        exchange,
    });
}

/// The memory of a tensor.
struct View<'a> {
    data: *mut u8,
    dtype: DType,
    shape: Cow<'a, [u64]>,
}

impl Torch {
    /// Views a dense, contiguous tensor in host memory whose bytes are its values.
    fn view<'a>(&self, object: &'a Bound<'_, PyAny>) -> Option<View<'a>> {
        if !object.is_instance(self.class.bind(object.py()).as_any()).ok()? {
            return None;
        }
        let view = match &self.exchange {
            Some(exchange) => {
                let seen = exchange.view(object)?;
                View { data: seen.data, dtype: seen.dtype, shape: Cow::Borrowed(seen.shape) }
            }
            None => self.view_by_attributes(object)?,
        };
        let py = object.py();
        // Lazy views: the bytes are not yet conjugated or negated. A negated one of more than one element, the
        // imaginary part of a conjugate, has gaps and does not come here.
        let lazy = match view.dtype {
            DType::C64 | DType::C128 => Some(intern!(py, "is_conj")),
            DType::F32 | DType::F64 if view.shape.iter().product::<u64>() <= 1 => Some(intern!(py, "is_neg")),
            _ => None,
        };
        match lazy {
            Some(method) if object.call_method0(method).ok()?.is_truthy().ok()? => None,
            _ => Some(view),
        }
    }

    fn view_by_attributes<'a>(&self, object: &'a Bound<'_, PyAny>) -> Option<View<'a>> {
        let py = object.py();
        let yes =
            |value: PyResult<Bound<'_, PyAny>>| value.and_then(|value| value.is_truthy()).unwrap_or(false);
        let dense = object.getattr(intern!(py, "layout")).is_ok_and(|layout| layout.is(&self.strided));
        if !dense
            || !yes(object.getattr(intern!(py, "is_cpu")))
            || !yes(object.call_method0(intern!(py, "is_contiguous")))
        {
            return None;
        }
        let dtype = object.getattr(intern!(py, "dtype")).ok()?;
        let dtype = self.dtypes.iter().find(|(known, _)| known.is(&dtype))?.1;
        let address: usize = object.call_method0(intern!(py, "data_ptr")).ok()?.extract().ok()?;
        let shape: Vec<u64> = object.getattr(intern!(py, "shape")).ok()?.extract().ok()?;
        Some(View { data: std::ptr::with_exposed_provenance_mut(address), dtype, shape: Cow::Owned(shape) })
    }

    fn set(&self, set: &Bound<'_, PyAny>) -> Option<SetId> {
        if set.is(&self.everyone) || set.is_none() {
            return Some(SetId(0));
        }
        if let Ok(number) = set.extract::<u32>() {
            return Some(SetId(number));
        }
        set.getattr(intern!(set.py(), "process_set_id")).ok()?.extract::<u32>().ok().map(SetId)
    }
}

/// A tensor over a result that the engine has made.
pub fn tensor_over(
    py: Python<'_>,
    memory: OwnedBytes,
    dtype: DType,
    shape: Vec<u64>,
) -> PyResult<Bound<'_, PyAny>> {
    let torch = TORCH.get(py).ok_or_else(|| errors::usage(py, "carole.torch was not imported"))?;
    torch.to_torch.bind(py).call1((Output::new(memory, dtype, shape),))
}

/// Where results go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Results {
    InPlace,
    /// New tensors like the inputs.
    Alike,
    /// The engine makes them.
    Made,
}

/// The arguments of [`start`] and [`run`], as Python gave them.
struct Call<'a, 'py> {
    torch: &'a Torch,
    collective: Collective,
    tensors: &'a Bound<'py, PyAny>,
    results: Results,
    name: Option<String>,
    set: SetId,
    op: ReduceOp,
    scale: Scale,
    root: Rank,
    waits: bool,
}

/// Somebody looks on, so that the general way is to be taken: a timeline, or the search for writes.
static OBSERVED: AtomicBool = AtomicBool::new(false);

/// Tells whether somebody looks on.
#[pyfunction]
pub fn observe(observed: bool) {
    OBSERVED.store(observed, Ordering::Relaxed);
}

/// The arguments of [`start`] and [`run`]: collective, tensors, in_place, prefix, name, set, op, pre, post, root, waits (the
/// caller waits at once, so that nobody is woken; `run` does in any case).
pub type Arguments<'py> = [Bound<'py, PyAny>; 11];

/// Starts a collective of a tensor, or of a list of tensors as one operation: in place (`in_place` is true), into new
/// tensors that are like the inputs (false), or, for one tensor, into one that the engine makes (none). Its name is
/// `prefix.name` (`name` where the prefix is empty). `None` where the general way is to be taken. The handle's result is
/// the tensor, or the list.
pub fn start<'py>(py: Python<'py>, arguments: &Arguments<'py>) -> PyResult<Option<Handle>> {
    release_finished();
    match understand(py, arguments) {
        Some(call) if call.tensors.is_instance_of::<PyList>() => match call.results {
            Results::Made => Ok(None),
            _ => start_list(py, &call),
        },
        Some(call) => start_one(py, call),
        // What is not as it should be, the general way refuses, and tells the other ranks.
        None => Ok(None),
    }
}

/// Does the same for one tensor, waits, and returns the result. `None` where the general way is to be taken.
pub fn run<'py>(py: Python<'py>, arguments: &Arguments<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
    let Some(call) = understand(py, arguments) else { return Ok(None) };
    let Some(one) = call.one(py)? else { return Ok(None) };
    let request = Request { tensors: &[argument(&one.view, one.output)], ..call.request() };
    // SAFETY: as in `post`. Where it is over at once, this call holds the tensors meanwhile.
    match unsafe { runtime::run(&request, || Some(one.keep())) }
        .map_err(|error| errors::to_python(py, &error))?
    {
        Running::Done(outcome) => match one.result {
            Some(result) => Ok(Some(result)),
            None => new_tensor(py, outcome).map(Some),
        },
        started => {
            let finish = one.finish();
            Handle::new(started, call.name, finish).synchronize(py).map(Some)
        }
    }
}

fn understand<'a, 'py>(py: Python<'py>, arguments: &'a Arguments<'py>) -> Option<Call<'a, 'py>> {
    let [collective, tensors, in_place, prefix, name, set, op, pre, post, root, waits] = arguments;
    if OBSERVED.load(Ordering::Relaxed) {
        return None;
    }
    let torch = TORCH.get(py)?;
    let name = match name.cast_exact::<PyString>() {
        Ok(name) => {
            let (prefix, name) = (text(prefix)?, text(name.as_any())?);
            Some(if prefix.is_empty() { name.to_owned() } else { [prefix, ".", name].concat() })
        }
        Err(_) if name.is_none() => None,
        Err(_) => return None,
    };
    Some(Call {
        torch,
        collective: Collective::from_code(collective.extract().ok()?)?,
        tensors,
        results: match in_place.is_none() {
            true => Results::Made,
            false if in_place.is_truthy().ok()? => Results::InPlace,
            false => Results::Alike,
        },
        name,
        set: torch.set(set)?,
        op: ReduceOp::from_code(op.extract().ok()?)?,
        scale: Scale { pre: pre.extract().ok()?, post: post.extract().ok()? },
        root: Rank(root.cast_exact::<PyInt>().ok()?.extract().ok()?),
        waits: waits.is_truthy().ok()?,
    })
}

fn start_one<'py>(py: Python<'py>, call: Call<'_, 'py>) -> PyResult<Option<Handle>> {
    let Some(one) = call.one(py)? else { return Ok(None) };
    let handle = call.post(py, &[argument(&one.view, one.output)], one.keep())?;
    Ok(Some(Handle::new(handle, call.name, one.finish())))
}

/// An operation of one tensor.
struct One<'a, 'py> {
    input: &'a Bound<'py, PyAny>,
    view: View<'a>,
    /// Null where the engine makes the result.
    output: *mut u8,
    result: Option<Bound<'py, PyAny>>,
}

impl<'a, 'py> One<'a, 'py> {
    fn keep(&self) -> Box<dyn Any + Send> {
        let input = self.input.clone().unbind();
        match &self.result {
            Some(result) if !result.is(self.input) => Box::new((input, result.clone().unbind())),
            _ => Box::new(input),
        }
    }

    fn finish(self) -> Finish {
        match self.result {
            Some(result) => Finish::Tensors { result: result.unbind() },
            None => Finish::NewTensor,
        }
    }
}

fn start_list<'py>(py: Python<'py>, call: &Call<'_, 'py>) -> PyResult<Option<Handle>> {
    let inputs: Vec<Bound<'py, PyAny>> = call.tensors.cast::<PyList>()?.iter().collect();
    let view_all = |tensors: &'_ [Bound<'py, PyAny>]| -> Option<Vec<(*mut u8, DType, Vec<u64>)>> {
        let view =
            |tensor| call.torch.view(tensor).map(|view| (view.data, view.dtype, view.shape.into_owned()));
        tensors.iter().map(view).collect()
    };
    let views = match view_all(&inputs) {
        Some(views) if !views.is_empty() => views,
        _ => return Ok(None),
    };
    let made = match call.results == Results::InPlace {
        true => inputs,
        false => {
            let like = |input: &Bound<'py, PyAny>| call.torch.empty_like.bind(py).call1((input,));
            inputs.iter().map(like).collect::<PyResult<_>>()?
        }
    };
    let Some(outputs) = view_all(&made) else { return Ok(None) };
    let views: Vec<View<'_>> = views
        .into_iter()
        .map(|(data, dtype, shape)| View { data, dtype, shape: Cow::Owned(shape) })
        .collect();
    let tensors: Vec<TensorArg<'_>> =
        views.iter().zip(&outputs).map(|(view, output)| argument(view, given(output.0))).collect();
    // A list of its own, which the caller cannot change while the operation needs it.
    let result = PyList::new(py, made)?;
    let keep = (call.tensors.cast::<PyList>()?.as_sequence().to_list()?.unbind(), result.clone().unbind());
    let handle = call.post(py, &tensors, Box::new(keep))?;
    let finish = Finish::Tensors { result: result.into_any().unbind() };
    Ok(Some(Handle::new(handle, call.name.clone(), finish)))
}

/// `output` is null where the engine is to allocate.
fn argument<'a>(view: &'a View<'_>, output: *mut u8) -> TensorArg<'a> {
    TensorArg { input: view.data, output, dtype: view.dtype, shape: &view.shape }
}

/// Where results are to be written: of an empty tensor another address than null.
fn given(output: *mut u8) -> *mut u8 {
    if output.is_null() { std::ptr::NonNull::dangling().as_ptr() } else { output }
}

impl<'a, 'py> Call<'a, 'py> {
    fn one(&self, py: Python<'py>) -> PyResult<Option<One<'a, 'py>>> {
        let input = self.tensors;
        let Some(view) = self.torch.view(input) else { return Ok(None) };
        let (result, output) = match self.results {
            Results::Made => (None, std::ptr::null_mut()),
            Results::InPlace => (Some(input.clone()), given(view.data)),
            Results::Alike => {
                let result = self.torch.empty_like.bind(py).call1((input,))?;
                let Some(output) = self.torch.view(&result).map(|view| given(view.data)) else {
                    return Ok(None);
                };
                (Some(result), output)
            }
        };
        Ok(Some(One { input, view, output, result }))
    }

    fn request(&self) -> Request<'_> {
        Request {
            name: self.name.as_deref(),
            set: self.set,
            collective: self.collective,
            op: self.op,
            scale: self.scale,
            root: self.root,
            ..Request::default()
        }
    }

    fn post(
        &self,
        py: Python<'_>,
        tensors: &[TensorArg<'_>],
        keep: Box<dyn Any + Send>,
    ) -> PyResult<Running> {
        let request = Request { tensors, ..self.request() };
        // SAFETY: `keep` holds inputs and outputs where they are until the operation has an outcome; that Python
        // code does not write inputs, touch outputs or resize either meanwhile is its documented duty.
        let running = unsafe {
            match self.waits {
                true => runtime::run(&request, || Some(keep)),
                false => runtime::submit(&request, Some(keep)).map(Running::Started),
            }
        };
        running.map_err(|error| errors::to_python(py, &error))
    }
}
