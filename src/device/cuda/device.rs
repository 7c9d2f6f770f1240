//! The device: orders become launches on a stream of its own, and an event behind each tells of its end.

use super::driver::{Context, Event, Fault, Function, LoadedModule, Stream, is_capturing};
use super::launch::{Kernel, Module};
use super::lower::{Plan, scratch_bytes};
use super::memory::{DeviceBytes, Table};
use super::ptx;
use crate::device::{Device, DeviceOrder, Token};
use crate::error::Cause;
use crate::memory::Memory;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// Blocks for each multiprocessor: as many threads as it holds at once.
const BLOCKS_EACH: u32 = 8;
/// Orders in flight, beyond which the next waits for the first.
const ORDERS_MAX: usize = 1024;
/// Words of a table at first; one that is too small is replaced.
const TABLE_WORDS: usize = 1 << 13;

/// An order that the stream has not been seen to finish.
struct Pending {
    token: Token,
    event: Event,
    tables: Vec<Table>,
}

/// One device, with what is loaded on it. Fields are dropped in order: first what uses, then what is used.
pub struct CudaDevice {
    pending: VecDeque<Pending>,
    /// Orders that were finished while the next one waited for room.
    finished: Vec<Token>,
    stream: Stream,
    functions: HashMap<Kernel, Function>,
    modules: HashMap<Module, LoadedModule>,
    /// Adasum's sums; orders follow one another on the stream, so that one place serves all.
    scratch: Option<DeviceBytes>,
    events: Vec<Event>,
    tables: Vec<Table>,
    plan: Plan,
    blocks: u32,
    context: Arc<Context>,
}

impl CudaDevice {
    /// The device of a context.
    pub fn new(context: Arc<Context>) -> Result<CudaDevice, Cause> {
        Ok(CudaDevice {
            pending: VecDeque::new(),
            finished: Vec::new(),
            stream: Stream::new(&context)?,
            functions: HashMap::new(),
            modules: HashMap::new(),
            scratch: None,
            events: Vec::new(),
            tables: Vec::new(),
            plan: Plan::default(),
            blocks: BLOCKS_EACH * context.multiprocessors()?,
            context,
        })
    }

    /// Orders that follow wait for what the caller's stream has been given so far. The host does not wait.
    ///
    /// # Safety
    /// `stream` must be a live stream of this device's context; 0 is its default stream.
    pub unsafe fn after_stream(&mut self, stream: u64) -> Result<(), Cause> {
        let raw = stream as usize as cudarc::driver::sys::CUstream;
        let current = self.context.enter()?;
        // SAFETY: the caller's promise.
        if unsafe { is_capturing(raw)? } {
            return Err(Cause::System(
                "this stream is being captured into a CUDA graph, which collectives do not support; call them \
                 outside of the capture"
                    .to_owned(),
            ));
        }
        drop(current);
        let event = self.event()?;
        // SAFETY: the caller's promise.
        unsafe { event.record(raw)? };
        self.stream.wait(&event)?;
        self.events.push(event);
        Ok(())
    }

    /// The caller's stream waits for all orders so far. The host does not wait.
    ///
    /// # Safety
    /// As for [`CudaDevice::after_stream`].
    pub unsafe fn before_stream(&mut self, stream: u64) -> Result<(), Cause> {
        let raw = stream as usize as cudarc::driver::sys::CUstream;
        let event = self.event()?;
        let _current = self.context.enter()?;
        // SAFETY: our own stream, and the caller's promise.
        unsafe {
            event.record(self.stream.raw)?;
            super::driver::call!(cuStreamWaitEvent(raw, event.raw, 0))?;
        }
        self.events.push(event);
        Ok(())
    }

    /// The stream that orders run on.
    pub(super) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// The end of the newest order that has not been seen to be over.
    pub(super) fn newest(&self) -> Option<&Event> {
        self.pending.back().map(|pending| &pending.event)
    }

    fn event(&mut self) -> Result<Event, Fault> {
        self.events.pop().map_or_else(|| Event::new(&self.context, false), Ok)
    }

    fn function(&mut self, kernel: Kernel) -> Result<Function, Fault> {
        if let Some(function) = self.functions.get(&kernel) {
            return Ok(*function);
        }
        let module = kernel.module();
        if !self.modules.contains_key(&module) {
            self.modules.insert(module, LoadedModule::load(&self.context, &ptx::of(module))?);
        }
        let function = self.modules[&module].function(&kernel.name())?;
        self.functions.insert(kernel, function);
        Ok(function)
    }

    fn table(&mut self, words: usize) -> Result<Table, Fault> {
        match self.tables.iter().position(|table| table.words() >= words) {
            Some(at) => Ok(self.tables.swap_remove(at)),
            None => Table::new(&self.context, words.next_power_of_two().max(TABLE_WORDS)),
        }
    }

    /// Gives what the plan holds to the stream; the tables that travel with it.
    fn launch(&mut self, plan: &Plan) -> Result<Vec<Table>, Fault> {
        let (launches, words) = plan.launches();
        let mut used = Vec::new();
        for launch in launches {
            let function = self.function(launch.kernel)?;
            let mut address = 0;
            if !launch.is_inline() {
                let mut table = self.table(launch.words.len())?;
                address = table.upload(&self.stream, &words[launch.words.clone()])?;
                used.push(table);
            }
            let mut args = launch.args(words, address);
            let grid = launch.head.tiles.min(u64::from(self.blocks)) as u32;
            // SAFETY: `Memory` vouches for the rows' addresses until the run is over, which the engine does not
            // let it be before the order's token came back; scratch and table are ours.
            unsafe { self.stream.launch(function, grid, &mut args)? };
        }
        Ok(used)
    }

    /// Takes what the stream has finished; blocks for the first with `wait`.
    fn collect(&mut self, wait: bool) -> Result<(), Fault> {
        let mut wait = wait;
        while let Some(first) = self.pending.front() {
            if std::mem::take(&mut wait) {
                first.event.block()?;
            } else if !first.event.is_over()? {
                break;
            }
            if let Some(Pending { token, event, tables }) = self.pending.pop_front() {
                self.finished.push(token);
                self.events.push(event);
                self.tables.extend(tables);
            }
        }
        Ok(())
    }

    fn reserve_scratch(&mut self, bytes: u64) -> Result<u64, Fault> {
        let enough = self.scratch.as_ref().is_some_and(|scratch| scratch.len() as u64 >= bytes);
        if bytes > 0 && !enough {
            // Freeing waits for the kernels that still use the old one.
            self.scratch = None;
            let bytes = bytes.next_power_of_two() as usize;
            self.scratch = Some(DeviceBytes::new(&self.context, bytes)?);
        }
        Ok(self.scratch.as_ref().map_or(0, DeviceBytes::address))
    }
}

impl Device for CudaDevice {
    fn post(&mut self, token: Token, order: &DeviceOrder, memory: &Memory) -> Result<bool, Cause> {
        if self.pending.len() >= ORDERS_MAX {
            self.collect(true)?;
        }
        let scratch = self.reserve_scratch(scratch_bytes(order))?;
        let mut plan = std::mem::take(&mut self.plan);
        plan.clear();
        plan.lower(order, token.run, memory, scratch);
        if plan.launches().0.is_empty() {
            self.plan = plan;
            return Ok(true);
        }
        let context = self.context.clone();
        let current = context.enter()?;
        let tables = self.launch(&plan)?;
        drop(current);
        self.plan = plan;
        let event = self.event()?;
        // SAFETY: our own stream.
        unsafe { event.record(self.stream.raw)? };
        self.pending.push_back(Pending { token, event, tables });
        Ok(false)
    }

    fn progress(&mut self, done: &mut Vec<Token>) -> Result<(), Cause> {
        self.collect(false)?;
        done.append(&mut self.finished);
        Ok(())
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // What kernels still read must outlive them.
        if let Some(last) = self.pending.back() {
            let _ = last.event.block();
        }
    }
}
