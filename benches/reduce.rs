//! GB/s of the host device's kernels, per SIMD level: `cargo bench --bench reduce [-- FILTER] [--kib N]`.

use carole::device::host::{self, Level};
use carole::device::{Finish, Reduction};
use carole::types::{DType, ReduceOp};
use std::time::{Duration, Instant};

/// Timings per figure; the median is printed.
const TIMINGS: usize = 15;
/// One timing lasts at least this long, so that the clock's own cost does not matter.
const TIMING_MIN: Duration = Duration::from_millis(4);

fn main() {
    let mut filter = String::new();
    let mut kib = 256;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            // cargo itself passes this to every bench.
            "--bench" => {}
            "--kib" => {
                match arguments.next().and_then(|n| n.parse().ok()).filter(|n| (1..=1 << 20).contains(n)) {
                    Some(n) => kib = n,
                    None => {
                        eprintln!("--kib takes the size of one buffer in KiB, 1 to 1048576");
                        std::process::exit(2);
                    }
                }
            }
            _ => filter = argument,
        }
    }
    let bytes = kib << 10;
    println!("median GB/s (bytes of the result per second), {kib} KiB buffers; in place, unless apart");
    print!("{:28}", "kernel");
    let levels: Vec<Level> = Level::ALL.iter().copied().filter(|level| level.is_available()).collect();
    for level in &levels {
        print!("{:>10}", level.name());
    }
    println!();
    for (name, mut kernel) in kernels(bytes) {
        if !name.contains(&filter) {
            continue;
        }
        print!("{name:28}");
        for &level in &levels {
            host::set_level(level).expect("only levels that are available are timed");
            print!("{:>10.1}", bytes as f64 / median_ns(&mut *kernel));
        }
        println!();
    }
}

/// The median time of one call, in nanoseconds.
fn median_ns(kernel: &mut dyn FnMut()) -> f64 {
    let mut calls = 1u32;
    let mut once = |calls: u32| {
        let start = Instant::now();
        (0..calls).for_each(|_| kernel());
        start.elapsed()
    };
    while once(calls) < TIMING_MIN {
        calls *= 2;
    }
    let mut times: Vec<f64> =
        (0..TIMINGS).map(|_| once(calls).as_nanos() as f64 / f64::from(calls)).collect();
    times.sort_by(f64::total_cmp);
    times[TIMINGS / 2]
}

/// A buffer of small ones, so that sums and products stay ordinary numbers: bytes of 1.0 (or 1) of the type.
fn ones(dtype: DType, bytes: usize) -> Vec<u8> {
    let mut buffer = vec![0u8; bytes];
    let reduction = Reduction { dtype, op: ReduceOp::Product };
    // SAFETY: the vector holds `bytes` bytes.
    unsafe { host::identity(reduction, buffer.as_mut_ptr(), bytes) };
    buffer
}

type Kernel = (String, Box<dyn FnMut()>);

fn kernels(bytes: usize) -> Vec<Kernel> {
    let mut list: Vec<Kernel> = Vec::new();
    let (mut dst, src) = (vec![0u8; bytes], vec![1u8; bytes]);
    list.push((
        "copy".into(),
        // SAFETY: the buffers hold `bytes` bytes each, and move into the closure.
        Box::new(move || unsafe { host::copy(dst.as_mut_ptr(), src.as_ptr(), bytes) }),
    ));
    for &dtype in DType::ALL {
        for op in [ReduceOp::Sum, ReduceOp::Product, ReduceOp::Min] {
            if op.accepts(dtype).is_err() {
                continue;
            }
            let reduction = Reduction { dtype, op };
            let (mut a, b) = (ones(dtype, bytes), ones(dtype, bytes));
            let (mut out, c, d) = (ones(dtype, bytes), ones(dtype, bytes), ones(dtype, bytes));
            list.push((
                format!("reduce {dtype} {op}"),
                Box::new(move || {
                    let dst = a.as_mut_ptr();
                    // SAFETY: as above.
                    unsafe { host::reduce(reduction, dst, dst, b.as_ptr(), bytes) }
                }),
            ));
            if op == ReduceOp::Sum {
                list.push((
                    format!("reduce {dtype} {op} apart"),
                    // SAFETY: as above.
                    Box::new(move || unsafe {
                        host::reduce(reduction, out.as_mut_ptr(), c.as_ptr(), d.as_ptr(), bytes);
                    }),
                ));
            }
        }
        list.extend(scaled(dtype, bytes));
    }
    list
}

/// Kernels that multiply, divide, or take many operands.
fn scaled(dtype: DType, bytes: usize) -> Vec<Kernel> {
    let mut list: Vec<Kernel> = Vec::new();
    let (mut out, src) = (ones(dtype, bytes), ones(dtype, bytes));
    list.push((
        format!("scale {dtype}"),
        // SAFETY: the buffers hold `bytes` bytes each, and move into the closure.
        Box::new(move || unsafe { host::scale(dtype, out.as_mut_ptr(), src.as_ptr(), bytes, 0.999) }),
    ));
    let mut data = ones(dtype, bytes);
    let thirds = Finish { divisor: 3, post: 1.0 };
    list.push((
        format!("finish {dtype} / 3"),
        // SAFETY: as above.
        Box::new(move || unsafe { host::finish(dtype, data.as_mut_ptr(), bytes, thirds) }),
    ));
    for n in [2usize, 4, 8] {
        let sources: Vec<Vec<u8>> = (0..n).map(|_| ones(dtype, bytes)).collect();
        let mut out = ones(dtype, bytes);
        let reduction = Reduction { dtype, op: ReduceOp::Sum };
        let finish = Finish { divisor: if dtype == DType::Bool { 1 } else { n as u32 }, post: 1.0 };
        list.push((
            format!("reduce_many {dtype} x{n}"),
            Box::new(move || {
                let srcs: [*const u8; 8] =
                    std::array::from_fn(|i| sources.get(i).map_or(std::ptr::null(), |s| s.as_ptr()));
                // SAFETY: as above; the first `n` pointers are sources.
                unsafe { host::reduce_many(reduction, out.as_mut_ptr(), &srcs[..n], bytes, 1.0, finish) }
            }),
        ));
    }
    if dtype.is_float() {
        let (mut out, a, b) = (ones(dtype, bytes), ones(dtype, bytes), ones(dtype, bytes));
        list.push((
            format!("adasum {dtype}"),
            // SAFETY: as above.
            Box::new(move || unsafe {
                host::combine(dtype, out.as_mut_ptr(), a.as_ptr(), b.as_ptr(), bytes);
            }),
        ));
    }
    list
}
