//! The kernels' speed on a device, beside the device's own copy in the same run:
//! `cargo bench --features cuda --bench cuda`. Every figure is bytes read and written over wall time, the median
//! of several rounds of many launches. Says so and ends where there is no device.

use carole::device::cuda::device::CudaDevice;
use carole::device::cuda::driver::version;
use carole::device::cuda::home::Home;
use carole::device::cuda::memory::DeviceBytes;
use carole::device::{Device, DeviceOrder, Finish, Reduction, Token};
use carole::memory::{Memory, Piece, PieceRange, Region};
use carole::types::{DType, ReduceOp};
use cudarc::driver::sys;
use std::sync::Arc;
use std::time::Instant;

const MIB: u64 = 1 << 20;
const ROUNDS: usize = 7;
const LAUNCHES: u32 = 20;

fn main() {
    if let Err(why) = version() {
        println!("skipped, no device: {why}");
        return;
    }
    let home = Home::of_device(0).expect("the first device has a context");
    let mut bench = Bench::new(&home);
    let _current = home.context.enter().expect("the context can be this thread's");
    let copy = bench.driver_copy(256 * MIB);
    println!("| work | GB/s | of the driver's copy |\n| --- | --- | --- |");
    println!("| the driver's copy, 256 MiB | {copy:.0} | 1.00 |");
    for (name, bytes, speed) in bench.all() {
        println!("| {name}, {} MiB | {speed:.0} | {:.2} |", bytes / MIB, speed / copy);
    }
    for (name, seconds) in bench.latencies(&home) {
        println!("{name}: {:.1} us", seconds * 1e6);
    }
}

struct Bench {
    device: CudaDevice,
    memory: Memory,
    run: carole::memory::RunId,
    // Freed last.
    blocks: Vec<DeviceBytes>,
}

/// Blocks of memory: one that is written, and operands.
const BLOCKS: usize = 9;

impl Bench {
    fn new(home: &Arc<Home>) -> Bench {
        let device = CudaDevice::new(Arc::clone(&home.context)).expect("a device");
        let blocks: Vec<DeviceBytes> =
            (0..BLOCKS).map(|_| DeviceBytes::new(&home.context, 256 << 20).expect("device memory")).collect();
        let mut memory = Memory::default();
        // SAFETY: the blocks live as long as the bench; nobody else uses them.
        let region = |block: &DeviceBytes| unsafe {
            Region::new(block.address() as usize as *mut u8, block.len() as u64)
        };
        let run = memory.register(blocks.iter().map(region));
        let mut bench = Bench { device, memory, run, blocks };
        for region in 0..BLOCKS as u32 {
            let reduction = Reduction { dtype: DType::F32, op: ReduceOp::Product };
            bench.time(1, &DeviceOrder::Identity { dst: range(region, 256 * MIB), reduction });
        }
        bench
    }

    fn all(&mut self) -> Vec<(String, u64, f64)> {
        let mut out = Vec::new();
        let full = 256 * MIB;
        let finish = Finish { divisor: 1, post: 1.0 };
        let mut add = |bench: &mut Bench, name: String, bytes: u64, moved: u64, order: DeviceOrder| {
            let seconds = bench.median(&order);
            out.push((name, bytes, moved as f64 / seconds / 1e9));
        };
        let copy = DeviceOrder::Copy { dst: range(0, full), src: range(1, full) };
        add(self, "copy".into(), full, 2 * full, copy);
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let reduction = Reduction { dtype, op: ReduceOp::Sum };
            let order =
                DeviceOrder::Reduce { dst: range(0, full), a: range(1, full), b: range(2, full), reduction };
            add(self, format!("reduce {dtype}"), full, 3 * full, order);
            for count in [2u32, 4, 8] {
                let srcs = (1..=count).map(|region| range(region, full)).collect();
                let finish = Finish { divisor: count, ..finish };
                let order =
                    DeviceOrder::ReduceMany { dst: range(0, full), srcs, reduction, pre: 1.0, finish };
                add(self, format!("average of {count} {dtype}"), full, u64::from(count + 1) * full, order);
            }
            let scale = DeviceOrder::Scale { dst: range(0, full), src: range(1, full), dtype, factor: 0.5 };
            add(self, format!("scale {dtype}"), full, 2 * full, scale);
        }
        for (tensors, shift) in [(400u64, 0u64), (400, 4), (4000, 0)] {
            let each = full / tensors / 256 * 256 - 256;
            let spread = pieces(1, (0..tensors).map(|t| (t * (each + 256) + shift, each)));
            let packed = pieces(0, [(0, tensors * each)]);
            let (name, bytes) = (format!("{tensors} tensors, {shift} bytes off"), tensors * each);
            let order = DeviceOrder::Copy { dst: packed.clone(), src: spread.clone() };
            add(self, format!("pack {name}"), bytes, 2 * bytes, order);
            let order = DeviceOrder::Copy { dst: spread, src: packed };
            add(self, format!("unpack {name}"), bytes, 2 * bytes, order);
        }
        out
    }

    /// What a small order takes until the host knows that it is over, and what its launch takes the host.
    fn latencies(&mut self, home: &Arc<Home>) -> Vec<(&'static str, f64)> {
        let reduction = Reduction { dtype: DType::F32, op: ReduceOp::Sum };
        let (dst, a, b) = (range(0, 4096), range(1, 4096), range(2, 4096));
        let order = DeviceOrder::Reduce { dst, a, b, reduction };
        let mut alone: Vec<f64> = (0..200).map(|_| self.time(1, &order)).collect();
        let mut many: Vec<f64> = (0..20).map(|_| self.time(200, &order) / 200.0).collect();
        let mut loads = Vec::new();
        for dtype in [DType::F32, DType::BF16, DType::I64] {
            let mut fresh = CudaDevice::new(Arc::clone(&home.context)).expect("a device");
            let reduction = Reduction { dtype, op: ReduceOp::Max };
            let (dst, a, b) = (range(0, 4096), range(1, 4096), range(2, 4096));
            let order = DeviceOrder::Reduce { dst, a, b, reduction };
            let start = Instant::now();
            post(&mut fresh, self.run, &order, &self.memory, 1);
            loads.push(start.elapsed().as_secs_f64());
        }
        vec![
            ("4 KiB, launched and waited for", middle(&mut alone)),
            ("4 KiB, each of 200 in a row", middle(&mut many)),
            ("first use of a module (translated by the driver)", middle(&mut loads)),
        ]
    }

    fn median(&mut self, order: &DeviceOrder) -> f64 {
        self.time(2, order);
        let mut rounds: Vec<f64> =
            (0..ROUNDS).map(|_| self.time(LAUNCHES, order) / f64::from(LAUNCHES)).collect();
        middle(&mut rounds)
    }

    fn time(&mut self, launches: u32, order: &DeviceOrder) -> f64 {
        let start = Instant::now();
        post(&mut self.device, self.run, order, &self.memory, launches);
        start.elapsed().as_secs_f64()
    }

    fn driver_copy(&mut self, bytes: u64) -> f64 {
        let (to, from) = (self.blocks[0].address(), self.blocks[1].address());
        let mut rounds: Vec<f64> = (0..ROUNDS)
            .map(|_| {
                let start = Instant::now();
                // SAFETY: both blocks have as many bytes; the default stream is waited for.
                unsafe {
                    for _ in 0..LAUNCHES {
                        sys::cuMemcpyDtoDAsync_v2(to, from, bytes as usize, std::ptr::null_mut())
                            .result()
                            .expect("a copy");
                    }
                    sys::cuStreamSynchronize(std::ptr::null_mut()).result().expect("the copies end");
                }
                start.elapsed().as_secs_f64() / f64::from(LAUNCHES)
            })
            .collect();
        2.0 * bytes as f64 / middle(&mut rounds) / 1e9
    }
}

fn post(
    device: &mut CudaDevice,
    run: carole::memory::RunId,
    order: &DeviceOrder,
    memory: &Memory,
    launches: u32,
) {
    let (token, mut done) = (Token { run, window: 0, step: 0 }, Vec::new());
    for _ in 0..launches {
        device.post(token, order, memory).expect("a launch");
    }
    while done.len() < launches as usize {
        device.progress(&mut done).expect("the launches end");
    }
}

fn middle(seconds: &mut [f64]) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn range(region: u32, len: u64) -> PieceRange {
    pieces(region, [(0, len)])
}

fn pieces(region: u32, runs: impl IntoIterator<Item = (u64, u64)>) -> PieceRange {
    let list: Arc<[Piece]> = runs.into_iter().map(|(offset, len)| Piece { region, offset, len }).collect();
    PieceRange { start: 0, end: list.len() as u32, list }
}
