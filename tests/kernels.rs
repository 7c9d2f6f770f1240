//! The CUDA kernels, compiled as host C++ (`kernels/host_form.cpp`), against the host device, to the bit: every
//! operation, type, length and misalignment, rows of all shapes, threads in both orders. Every access of a kernel
//! is checked against the memory that its order names. And the PTX that is embedded, against its sources.

use carole::device::cuda::launch::{Args, Kernel, Module};
use carole::device::cuda::lower::{Plan, scratch_bytes};
use carole::device::cuda::{source, table};
use carole::device::host::HostDevice;
use carole::device::{Device, DeviceOrder, Finish, Reduction, Token};
use carole::memory::{Memory, Piece, PieceRange, Region, RunId};
use carole::types::{DType, ReduceOp};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

/// Memory that kernels may touch.
#[repr(C)]
struct Lent {
    address: u64,
    bytes: u64,
    writable: u64,
}

type Lend = unsafe extern "C" fn(*const Lent, u64);
type Entry = unsafe extern "C" fn(*const Args, u32, u32);

/// The host form: a library of kernels.
struct HostForm {
    lend: Lend,
    kernels: HashMap<Kernel, Entry>,
}

fn kernels_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

/// Compiled once; none without a C++ compiler, which is said aloud.
fn host_form() -> Option<&'static HostForm> {
    static FORM: OnceLock<Option<HostForm>> = OnceLock::new();
    FORM.get_or_init(|| {
        let library = build(&std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned()))?;
        Some(open(&library))
    })
    .as_ref()
}

/// Compiles the host form where this has not been done; one process at a time, for each test may be one.
fn build(compiler: &str) -> Option<PathBuf> {
    let flags = "-std=c++17 -O1 -Wall -Wextra -Werror -Wno-unknown-pragmas -ffp-contract=off -shared -fPIC";
    let form = std::fs::read_to_string(kernels_folder().join("host_form.cpp")).expect("a source");
    let mut hash = std::hash::DefaultHasher::new();
    (source::SOURCES, form, compiler, flags).hash(&mut hash);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let library = folder.join(format!("kernels-{:016x}.so", hash.finish()));
    let lock = std::fs::File::create(folder.join("kernels.lock")).expect("a file to lock");
    lock.lock().expect("a file can be locked");
    if library.exists() {
        return Some(library);
    }
    let part = library.with_extension("part");
    let mut command = Command::new(compiler);
    command.args(flags.split(' ')).arg("-o").arg(&part).arg("host_form.cpp").current_dir(kernels_folder());
    match command.status() {
        Err(error) => {
            eprintln!("skipped: the host form of the kernels needs a C++ compiler ({compiler}: {error})");
            None
        }
        Ok(status) => {
            assert!(status.success(), "the host form of the kernels compiles");
            std::fs::rename(&part, &library).expect("a file can be renamed");
            Some(library)
        }
    }
}

fn open(library: &Path) -> HostForm {
    let path = CString::new(library.to_str().expect("a path in UTF-8")).expect("a path without zeros");
    // SAFETY: our own library, which does nothing when it is loaded.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!handle.is_null(), "the host form can be loaded");
    let symbol = |name: &str| -> *mut c_void {
        let text = CString::new(name).expect("a name without zeros");
        // SAFETY: an open library and a terminated name.
        let address = unsafe { libc::dlsym(handle, text.as_ptr()) };
        assert!(!address.is_null(), "the host form has the kernel {name}");
        address
    };
    // SAFETY: `form.cuh` declares every kernel so.
    let entry = |kernel: Kernel| unsafe { std::mem::transmute::<*mut c_void, Entry>(symbol(&kernel.name())) };
    let kernels = Kernel::all().into_iter().map(|kernel| (kernel, entry(kernel))).collect();
    // SAFETY: `form.cuh` declares it so.
    let lend = unsafe { std::mem::transmute::<*mut c_void, Lend>(symbol("lend")) };
    HostForm { lend, kernels }
}

impl HostForm {
    /// Runs what was planned. Each launch may touch `lent` and its scratch.
    fn run(&self, plan: &Plan, lent: &[Lent], grid: u32, backwards: bool) {
        let (launches, words) = plan.launches();
        for launch in launches {
            let rows = &words[launch.words.clone()];
            let args = launch.args(words, rows.as_ptr().addr() as u64);
            // SAFETY: the library checks every access against `lent`, which the caller owns.
            unsafe {
                (self.lend)(lent.as_ptr(), lent.len() as u64);
                self.kernels[&launch.kernel](&args, grid, u32::from(backwards));
            }
        }
    }
}

/// A splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Random elements: in floats a quarter is any bits (NaN, infinities, subnormals), the rest is of one size.
fn values(random: &mut Random, dtype: DType, elements: usize) -> Vec<u8> {
    let part = if dtype.is_complex() { dtype.size() / 2 } else { dtype.size() };
    let mut bytes = Vec::new();
    for _ in 0..elements * dtype.size() / part {
        let any = random.next();
        let x = (random.next() >> 40) as f32 / 1e6 - 8.0;
        let float = dtype.is_float() || dtype.is_complex();
        let element = match dtype {
            _ if !float || any.is_multiple_of(4) => random.next(),
            DType::F16 => u64::from(half::f16::from_f32(x).to_bits()),
            DType::BF16 => u64::from(half::bf16::from_f32(x).to_bits()),
            _ if part == 4 => u64::from(x.to_bits()),
            _ => (f64::from(x) * 1.000_000_001).to_bits(),
        };
        // A few zeros, ones and extremes of every type.
        let element = match any >> 8 & 63 {
            0 => 0,
            1 => 1,
            2 => u64::MAX >> (64 - 8 * part),
            3 => 1 << (8 * part - 1),
            _ => element,
        };
        bytes.extend(&element.to_ne_bytes()[..part]);
    }
    bytes
}

/// One buffer of a case: its bytes lie at a misalignment, in pieces of its own.
#[derive(Clone)]
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
    pieces: Arc<[Piece]>,
}

impl Buffer {
    /// `content` at an address that is `shift` above a multiple of 16, in pieces that end at `cuts`.
    fn new(region: u32, content: &[u8], shift: usize, cuts: &[usize]) -> Buffer {
        let mut bytes = vec![0xa5; content.len() + 96];
        let start = bytes.as_ptr().align_offset(16) + 32 + shift;
        bytes[start..start + content.len()].copy_from_slice(content);
        let mut ends: Vec<usize> =
            cuts.iter().copied().filter(|&cut| cut > 0 && cut < content.len()).collect();
        ends.push(content.len());
        ends.sort_unstable();
        ends.dedup();
        let mut from = 0;
        let piece = |end: usize| {
            let piece = Piece { region, offset: from as u64, len: (end - from) as u64 };
            from = end;
            piece
        };
        Buffer { bytes, start, len: content.len(), pieces: ends.into_iter().map(piece).collect() }
    }
    /// The same at the same misalignment, elsewhere.
    fn twin(&self) -> Buffer {
        let shift = self.bytes[self.start..].as_ptr().addr() % 16;
        let mut twin = Buffer::new(0, self.content(), shift, &[]);
        twin.pieces = self.pieces.clone();
        twin
    }
    fn content(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
    fn range(&self) -> PieceRange {
        PieceRange { list: self.pieces.clone(), start: 0, end: self.pieces.len() as u32 }
    }
    fn region(&mut self) -> Region {
        // SAFETY: the bytes outlive the run, and nothing else uses them meanwhile.
        unsafe { Region::new(self.bytes[self.start..].as_mut_ptr(), self.len as u64) }
    }
    fn lent(&mut self, writable: bool) -> Lent {
        let address = self.bytes[self.start..].as_mut_ptr().addr() as u64;
        Lent { address, bytes: self.len as u64, writable: u64::from(writable) }
    }
    /// Whether the bytes around are as they were.
    fn is_intact(&self) -> bool {
        let around = self.bytes[..self.start].iter().chain(&self.bytes[self.start + self.len..]);
        around.copied().all(|byte| byte == 0xa5)
    }
}

/// Runs an order on the host device and as kernels, over buffers of which the first is written, and compares all.
fn compare(form: &HostForm, name: &str, buffers: &[Buffer], order: &DeviceOrder, grid: u32) {
    let mut want: Vec<Buffer> = buffers.iter().map(Buffer::twin).collect();
    let mut memory = Memory::default();
    let run = memory.register(want.iter_mut().map(Buffer::region));
    let token = Token { run, window: 0, step: 0 };
    assert_eq!(HostDevice::new().post(token, order, &memory).ok(), Some(true));
    for backwards in [false, true] {
        let mut got: Vec<Buffer> = buffers.iter().map(Buffer::twin).collect();
        let mut memory = Memory::default();
        let run = memory.register(got.iter_mut().map(Buffer::region));
        let mut scratch = vec![0u64; (scratch_bytes(order) / 8) as usize];
        let address = scratch.as_mut_ptr().addr() as u64;
        let mut lent: Vec<Lent> = got.iter_mut().enumerate().map(|(i, b)| b.lent(i == 0)).collect();
        lent.push(Lent { address, bytes: 8 * scratch.len() as u64, writable: 1 });
        let mut plan = Plan::default();
        plan.lower(order, run, &memory, address);
        form.run(&plan, &lent, grid, backwards);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!(got.is_intact(), "{name}: bytes around buffer {i} changed");
            let differs = got.content().iter().zip(want.content()).position(|(got, want)| got != want);
            assert_eq!(differs, None, "{name}: buffer {i} differs from the host's at this byte");
        }
    }
}

/// Lengths in elements: short ones, around vectors and tiles.
fn lengths(size: usize, random: &mut Random) -> [usize; 8] {
    let tile = 16384 / size;
    let some = random.below(70) as usize;
    [1, 2 + some, 16 / size, 48 / size + 1, 400 / size + some, tile - 1, tile + some, 2 * tile + 80 / size]
}

fn reductions() -> impl Iterator<Item = Reduction> {
    table::reductions().map(|row| Reduction { dtype: row.dtype, op: row.op })
}

fn shift(random: &mut Random, size: usize) -> usize {
    match random.below(4) {
        0 => 0,
        1 => random.below(16) as usize,
        _ => random.below(16) as usize / size * size,
    }
}

fn cuts(random: &mut Random, size: usize, elements: usize) -> Vec<usize> {
    (0..random.below(4)).map(|_| random.below(elements as u64) as usize * size).collect()
}

fn buffer(random: &mut Random, region: usize, dtype: DType, elements: usize) -> Buffer {
    let content = values(random, dtype, elements);
    let cuts = cuts(random, dtype.size(), elements);
    Buffer::new(region as u32, &content, shift(random, dtype.size()), &cuts)
}

#[test]
fn two_operands() {
    let Some(form) = host_form() else { return };
    let mut random = Random(1);
    for reduction in reductions() {
        let size = reduction.dtype.size();
        for elements in lengths(size, &mut random) {
            let dtype = reduction.dtype;
            let buffers: Vec<Buffer> = (0..3).map(|i| buffer(&mut random, i, dtype, elements)).collect();
            let [d, a, b] = [0, 1, 2].map(|i: usize| buffers[i].range());
            // Apart, in place to the left, and in place to the right.
            for (a, b) in [(&a, &b), (&d, &b), (&a, &d)] {
                let order = DeviceOrder::Reduce { dst: d.clone(), a: a.clone(), b: b.clone(), reduction };
                compare(form, &format!("{reduction:?} of {elements}"), &buffers, &order, 2);
            }
        }
    }
}

#[test]
fn every_misalignment() {
    let Some(form) = host_form() else { return };
    let mut random = Random(2);
    for (dtype, op) in [(DType::BF16, ReduceOp::Sum), (DType::F32, ReduceOp::Sum), (DType::U8, ReduceOp::Max)]
    {
        let content: Vec<Vec<u8>> = (0..3).map(|_| values(&mut random, dtype, 77)).collect();
        for shifts in 0..16 * 16 * 16 {
            let at = |i: usize| Buffer::new(i as u32, &content[i], shifts >> (4 * i) & 15, &[]);
            let buffers = [at(0), at(1), at(2)];
            let [dst, a, b] = [0, 1, 2].map(|i: usize| buffers[i].range());
            let order = DeviceOrder::Reduce { dst, a, b, reduction: Reduction { dtype, op } };
            compare(form, &format!("{dtype} at {shifts:x}"), &buffers, &order, 1);
        }
    }
}

#[test]
fn many_operands() {
    let Some(form) = host_form() else { return };
    let mut random = Random(3);
    let finishes = [
        Finish { divisor: 1, post: 1.0 },
        Finish { divisor: 3, post: 1.0 },
        Finish { divisor: 4, post: 1.0 },
        Finish { divisor: 5, post: 0.37 },
    ];
    for reduction in reductions() {
        let dtype = reduction.dtype;
        for count in (1..=19).chain([33, 64, 71]) {
            let average = reduction.op == ReduceOp::Sum && dtype != DType::Bool;
            let finish = if average { finishes[random.below(4) as usize] } else { finishes[0] };
            let pre = [1.0, 1.0, 0.3, -2.5][random.below(4) as usize];
            let elements = if count < 10 { lengths(dtype.size(), &mut random)[count % 8] } else { 50 };
            let buffers: Vec<Buffer> = (0..=count).map(|i| buffer(&mut random, i, dtype, elements)).collect();
            let mut srcs: Vec<PieceRange> = buffers[1..].iter().map(Buffer::range).collect();
            let dst = buffers[0].range();
            if random.below(2) == 0 {
                srcs[count - 1] = dst.clone();
            }
            let order = DeviceOrder::ReduceMany { dst, srcs, reduction, pre, finish };
            compare(form, &format!("{reduction:?} of {count} × {elements}"), &buffers, &order, 2);
        }
    }
}

#[test]
fn one_operand() {
    let Some(form) = host_form() else { return };
    let mut random = Random(4);
    for (dtype, _) in table::types("ELEMENT") {
        for elements in lengths(dtype.size(), &mut random) {
            let buffers: Vec<Buffer> = (0..2).map(|i| buffer(&mut random, i, dtype, elements)).collect();
            let (d, s) = (buffers[0].range(), buffers[1].range());
            let name = format!("{dtype} × {elements}");
            let copy = DeviceOrder::Copy { dst: d.clone(), src: s.clone() };
            compare(form, &format!("copy of {name}"), &buffers, &copy, 2);
            for factor in [1.0, 0.0, -1.0, 1.0 / 3.0, 1e30, f64::NAN] {
                for src in [&s, &d] {
                    let order = DeviceOrder::Scale { dst: d.clone(), src: src.clone(), dtype, factor };
                    compare(form, &format!("{factor} times {name}"), &buffers, &order, 2);
                }
            }
            for (divisor, post) in [(1, 1.0), (2, 1.0), (3, 1.0), (1 << 31, 1.0), (7, 2.5), (1, 0.1)] {
                let finish = Finish { divisor, post };
                let order = DeviceOrder::Finish { dst: d.clone(), dtype, finish };
                compare(form, &format!("{finish:?} of {name}"), &buffers[..1], &order, 2);
            }
        }
    }
    for reduction in reductions() {
        for elements in lengths(reduction.dtype.size(), &mut random) {
            let buffers = [buffer(&mut random, 0, reduction.dtype, elements)];
            let order = DeviceOrder::Identity { dst: buffers[0].range(), reduction };
            compare(form, &format!("identity of {reduction:?} × {elements}"), &buffers, &order, 2);
        }
    }
}

#[test]
fn adasum() {
    let Some(form) = host_form() else { return };
    let mut random = Random(5);
    for (dtype, _) in table::types("REAL") {
        for round in 0..6 {
            let elements = [1, 7, 1024, 1025, 5000, 40_000][round];
            // Several whole tensors in one order, of which one may be nothing but zeros.
            let ends: Vec<usize> = cuts(&mut random, dtype.size(), elements);
            let tensors = |random: &mut Random, region: usize| {
                let mut content: Vec<u8> = (0..elements)
                    .flat_map(|i| {
                        let x = (i % 97) as f64 / 16.0 - 3.0 + random.below(64) as f64 / 256.0;
                        match dtype {
                            DType::F16 => half::f16::from_f64(x).to_ne_bytes().to_vec(),
                            DType::BF16 => half::bf16::from_f64(x).to_ne_bytes().to_vec(),
                            DType::F32 => (x as f32).to_ne_bytes().to_vec(),
                            _ => x.to_ne_bytes().to_vec(),
                        }
                    })
                    .collect();
                if round == 4 && region == 1 {
                    content.fill(0);
                }
                Buffer::new(region as u32, &content, shift(random, dtype.size()), &ends)
            };
            let buffers: Vec<Buffer> = (0..3).map(|region| tensors(&mut random, region)).collect();
            let [d, a, b] = [0, 1, 2].map(|i: usize| buffers[i].range());
            for (a, b) in [(&a, &b), (&d, &b), (&a, &d)] {
                let order = DeviceOrder::Combine { dst: d.clone(), a: a.clone(), b: b.clone(), dtype };
                compare(form, &format!("Adasum of {dtype} × {elements}"), &buffers, &order, 3);
            }
        }
    }
}

/// Packs many tensors into one region and unpacks them again, each way one launch.
#[test]
fn hundreds_of_tensors_in_one_launch() {
    let Some(form) = host_form() else { return };
    let mut random = Random(6);
    let dtype = DType::BF16;
    let tensors: Vec<Buffer> = (0..300)
        .map(|i| {
            let elements = 1 + random.below(if i % 50 == 0 { 20_000 } else { 60 }) as usize;
            Buffer::new(i, &values(&mut random, dtype, elements), shift(&mut random, 2), &[])
        })
        .collect();
    let list: Arc<[Piece]> = tensors.iter().flat_map(|tensor| tensor.pieces.to_vec()).collect();
    let pieces = PieceRange { list, start: 0, end: tensors.len() as u32 };
    let packed = Buffer::new(tensors.len() as u32, &vec![0; pieces.bytes() as usize], 6, &[]);
    for pack in [true, false] {
        let (dst, src) =
            if pack { (packed.range(), pieces.clone()) } else { (pieces.clone(), packed.range()) };
        let order = DeviceOrder::Scale { dst, src, dtype, factor: 0.25 };
        let run_on = |device: &mut dyn FnMut(&mut [Buffer], RunId, &Memory)| {
            let mut buffers: Vec<Buffer> = tensors.iter().chain([&packed]).map(Buffer::twin).collect();
            let mut memory = Memory::default();
            let run = memory.register(buffers.iter_mut().map(Buffer::region));
            device(&mut buffers, run, &memory);
            buffers.iter().for_each(|buffer| assert!(buffer.is_intact()));
            buffers.iter().flat_map(|buffer| buffer.content().to_vec()).collect::<Vec<u8>>()
        };
        let want = run_on(&mut |_, run, memory| {
            let token = Token { run, window: 0, step: 0 };
            assert_eq!(HostDevice::new().post(token, &order, memory).ok(), Some(true));
        });
        let got = run_on(&mut |buffers, run, memory| {
            let lent: Vec<Lent> = buffers.iter_mut().map(|buffer| buffer.lent(true)).collect();
            let mut plan = Plan::default();
            plan.lower(&order, run, memory, 0);
            assert_eq!(plan.launches().0.len(), 1, "all tensors go in one launch");
            assert!(!plan.launches().0[0].is_inline(), "so many rows are a table in memory");
            form.run(&plan, &lent, 3, false);
        });
        assert!(got == want, "pack: {pack}");
    }
}

/// The nearest number with so many bits behind the leading one and exponents from `least` on, ties to even. (The
/// `half` crate forgets the lowest bits of an f64 before it rounds.)
fn nearest(x: f64, bits: i32, least: i32) -> f32 {
    if !x.is_finite() || x == 0.0 {
        return x as f32;
    }
    let exponent = ((x.to_bits() >> 52 & 0x7ff) as i32 - 1023).max(least);
    let last_place = 2f64.powi(exponent - bits);
    let rounded = (x / last_place).round_ties_even() * last_place;
    // An f32 holds it, or is infinite where the narrower type is.
    rounded as f32
}

#[test]
fn what_is_nothing_is_not_launched() {
    let mut random = Random(10);
    let mut buffers = [buffer(&mut random, 0, DType::F32, 100), buffer(&mut random, 1, DType::F32, 100)];
    let [own, other] =
        [0, 1].map(|i: usize| PieceRange { list: buffers[i].pieces.clone(), start: 0, end: 1 });
    let mut memory = Memory::default();
    let run = memory.register(buffers.iter_mut().map(Buffer::region));
    let whole = |region| {
        let piece = Piece { region, offset: 0, len: own.bytes().min(other.bytes()) };
        PieceRange { list: Arc::new([piece]), start: 0, end: 1 }
    };
    let finish = Finish { divisor: 1, post: 1.0 };
    for (order, launches) in [
        (DeviceOrder::Copy { dst: whole(0), src: whole(0) }, 0),
        (DeviceOrder::Scale { dst: whole(0), src: whole(0), dtype: DType::F32, factor: 1.0 }, 0),
        (DeviceOrder::Finish { dst: whole(0), dtype: DType::F32, finish }, 0),
        (DeviceOrder::Copy { dst: whole(0), src: whole(1) }, 1),
    ] {
        let mut plan = Plan::default();
        plan.lower(&order, run, &memory, 0);
        assert_eq!(plan.launches().0.len(), launches, "{order:?}");
    }
}

#[test]
fn a_table_that_is_too_long_is_several_launches() {
    let runs: Vec<(u64, u64, u64)> = (1..=200_000).map(|i| (i << 20, i << 40, i % 40_000 + 1)).collect();
    let mut plan = Plan::default();
    plan.convert(DType::F32, DType::F16, 1.0, runs.iter().copied());
    let (launches, words) = plan.launches();
    assert!(launches.len() > 1, "so many rows are more than one table");
    let mut seen = Vec::new();
    for launch in launches {
        let rows = &words[launch.words.clone()];
        assert!(rows.len() <= carole::device::cuda::launch::TABLE_WORDS_MAX);
        assert_eq!(rows.len(), 4 * launch.head.rows as usize);
        let mut tiles = 0;
        for row in rows.chunks_exact(4) {
            // A tile is 1024 units of 8 elements.
            tiles += row[1].div_ceil(8192);
            assert_eq!(row[0], tiles);
            seen.push((row[2], row[3], row[1]));
        }
        assert_eq!(launch.head.tiles, tiles);
    }
    assert!(seen == runs, "every run is in one row, in order");
}

/// What a conversion gives, one element at a time.
fn converted(from: DType, to: DType, factor: f64, src: &[u8]) -> Vec<u8> {
    let element = |bytes: &[u8]| -> Vec<u8> {
        // In the accumulator of what is read.
        let x = match from {
            DType::F64 => f64::from_ne_bytes(bytes.try_into().expect("8 bytes")) * factor,
            DType::F32 => f64::from(f32::from_ne_bytes(bytes.try_into().expect("4 bytes")) * factor as f32),
            DType::F16 => f64::from(
                half::f16::from_ne_bytes(bytes.try_into().expect("2 bytes")).to_f32() * factor as f32,
            ),
            _ => f64::from(
                half::bf16::from_ne_bytes(bytes.try_into().expect("2 bytes")).to_f32() * factor as f32,
            ),
        };
        match to {
            DType::F64 if x.is_nan() => f64::NAN.to_ne_bytes().to_vec(),
            DType::F64 => x.to_ne_bytes().to_vec(),
            DType::F32 if x.is_nan() => f32::NAN.to_ne_bytes().to_vec(),
            DType::F32 => (x as f32).to_ne_bytes().to_vec(),
            DType::F16 if x.is_nan() => 0x7e00u16.to_ne_bytes().to_vec(),
            DType::F16 => half::f16::from_f32(nearest(x, 10, -14)).to_ne_bytes().to_vec(),
            _ if x.is_nan() => 0x7fc0u16.to_ne_bytes().to_vec(),
            _ => half::bf16::from_f32(nearest(x, 7, -126)).to_ne_bytes().to_vec(),
        }
    };
    src.chunks_exact(from.size()).flat_map(element).collect()
}

#[test]
fn conversions() {
    let Some(form) = host_form() else { return };
    let mut random = Random(7);
    for (from, to) in table::casts() {
        for elements in lengths(from.size().min(to.size()), &mut random) {
            for factor in [1.0, 0.125, 1.0 / 3.0] {
                let mut src = Buffer::new(
                    0,
                    &values(&mut random, from, elements),
                    shift(&mut random, from.size()),
                    &[],
                );
                let mut dst =
                    Buffer::new(1, &vec![0; elements * to.size()], shift(&mut random, to.size()), &[]);
                let lent = [src.lent(false), dst.lent(true)];
                let mut plan = Plan::default();
                plan.convert(from, to, factor, [(lent[1].address, lent[0].address, elements as u64)]);
                form.run(&plan, &lent, 2, true);
                assert!(dst.is_intact());
                let want = converted(from, to, factor, src.content());
                assert!(dst.content() == want, "{factor} times {elements} elements from {from} to {to}");
            }
        }
    }
    // Halfway cases that a second rounding would get wrong.
    let hard = [1.0 + 2f64.powi(-11) + 2f64.powi(-40), 1.0 + 3.0 * 2f64.powi(-11) - 2f64.powi(-40)];
    for to in [DType::F16, DType::BF16] {
        let scale = if to == DType::BF16 { 8.0 } else { 1.0 };
        let content: Vec<u8> = hard.iter().flat_map(|x| (1.0 + (x - 1.0) * scale).to_ne_bytes()).collect();
        let mut src = Buffer::new(0, &content, 0, &[]);
        let mut dst = Buffer::new(1, &[0; 4], 0, &[]);
        let lent = [src.lent(false), dst.lent(true)];
        let mut plan = Plan::default();
        plan.convert(DType::F64, to, 1.0, [(lent[1].address, lent[0].address, 2)]);
        form.run(&plan, &lent, 1, false);
        assert_eq!(dst.content(), converted(DType::F64, to, 1.0, src.content()), "to {to}");
    }
}

/// All ranks' parts, by kernels that read the peers' memory: each rank reads all (one shot), or each reduces its
/// part and copies the others' (two shots). Both give the canonical tree.
#[test]
fn allreduce_out_of_peers_memory() {
    let Some(form) = host_form() else { return };
    let mut random = Random(8);
    let reduction = Reduction { dtype: DType::BF16, op: ReduceOp::Average };
    for ranks in [2usize, 3, 5, 8, 13] {
        let elements = 1000 + random.below(100) as usize;
        let finish = Finish { divisor: ranks as u32, post: 1.0 };
        let inputs: Vec<Vec<u8>> = (0..ranks).map(|_| values(&mut random, DType::BF16, elements)).collect();
        let want = carole::device::host::oracle::reduce_all(
            reduction.op,
            reduction.dtype,
            &inputs,
            1.0,
            1.0,
            finish.divisor,
            carole::device::host::oracle::Order::Tree,
        );
        // Regions: the inputs of all, then the outputs of all.
        let zeros = vec![0; inputs[0].len()];
        let mut buffers: Vec<Buffer> = (0..2 * ranks)
            .map(|i| Buffer::new(i as u32, inputs.get(i).unwrap_or(&zeros), shift(&mut random, 2), &[]))
            .collect();
        let mut memory = Memory::default();
        let run = memory.register(buffers.iter_mut().map(Buffer::region));
        let part = |region: usize, from: usize, to: usize| {
            let piece = Piece { region: region as u32, offset: 2 * from as u64, len: 2 * (to - from) as u64 };
            PieceRange { list: Arc::new([piece]), start: 0, end: 1 }
        };
        let bound = |rank: usize| rank * elements / ranks;
        let mut shots: [Vec<DeviceOrder>; 3] = Default::default();
        for rank in 0..ranks {
            let reduce = |from, to| DeviceOrder::ReduceMany {
                dst: part(ranks + rank, from, to),
                srcs: (0..ranks).map(|peer| part(peer, from, to)).collect(),
                reduction,
                pre: 1.0,
                finish,
            };
            shots[0].push(reduce(0, elements));
            shots[1].push(reduce(bound(rank), bound(rank + 1)));
            for peer in (0..ranks).filter(|&peer| peer != rank) {
                let (from, to) = (bound(peer), bound(peer + 1));
                let (dst, src) = (part(ranks + rank, from, to), part(ranks + peer, from, to));
                shots[2].push(DeviceOrder::Copy { dst, src });
            }
        }
        for two in [false, true] {
            buffers[ranks..].iter_mut().for_each(|output| {
                let range = output.start..output.start + output.len;
                output.bytes[range].fill(0);
            });
            let lent: Vec<Lent> = buffers.iter_mut().map(|buffer| buffer.lent(true)).collect();
            let orders = if two { [&shots[1][..], &shots[2][..]].concat() } else { shots[0].clone() };
            for order in &orders {
                let mut plan = Plan::default();
                plan.lower(order, run, &memory, 0);
                form.run(&plan, &lent, 2, false);
            }
            for output in &buffers[ranks..] {
                assert!(output.is_intact() && output.content() == want, "{ranks} ranks, two shots: {two}");
            }
        }
    }
}

#[test]
fn embedded_ptx_is_made_from_these_sources() {
    let mut breaches = Vec::new();
    for module in Module::all() {
        let path = kernels_folder().join("ptx").join(format!("{}.ptx", module.name()));
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        breaches.extend(source::breach(module, &kept));
        for kernel in Kernel::all().into_iter().filter(|kernel| kernel.module() == module) {
            if !kept.contains(&format!(".entry {}(", kernel.name())) {
                breaches.push(format!("{}.ptx has no kernel {}", module.name(), kernel.name()));
            }
        }
        // What would round otherwise than the host.
        for forbidden in ["fma.", ".ftz", ".approx", "mad.rn.f"] {
            if kept.contains(forbidden) {
                breaches.push(format!("{}.ptx has {forbidden}", module.name()));
            }
        }
    }
    assert!(breaches.is_empty(), "{}", breaches.join("\n"));
}

/// Every reduction on a device, where there is one, over pinned memory that both sides see.
#[cfg(feature = "cuda")]
#[test]
fn on_a_device() {
    use carole::device::cuda::device::CudaDevice;
    use carole::device::cuda::driver::{Context, version};
    use carole::device::cuda::memory::PinnedBytes;

    if let Err(why) = version() {
        eprintln!("skipped, no device: {why}");
        return;
    }
    let context = Arc::new(Context::of_device(0).expect("the first device has a context"));
    let mut device = CudaDevice::new(context.clone()).expect("a device");
    let mut random = Random(9);
    let mut cases = 0;
    for reduction in reductions() {
        let dtype = reduction.dtype;
        for count in [2, 3, 8, 11] {
            let elements = lengths(dtype.size(), &mut random)[count % 8];
            let mut want: Vec<Buffer> =
                (0..=count).map(|i| buffer(&mut random, i, dtype, elements)).collect();
            let pinned: Vec<PinnedBytes> =
                want.iter().map(|b| PinnedBytes::new(&context, b.len + 16).expect("pinned memory")).collect();
            let mut on_device = Memory::default();
            let run = on_device.register(pinned.iter().zip(&want).map(|(bytes, buffer)| {
                let shift = buffer.content().as_ptr().addr() % 16;
                // SAFETY: `len + 16` bytes, of which `len` from the shift on are written and lent to the device.
                unsafe {
                    bytes.host().add(shift).copy_from_nonoverlapping(buffer.content().as_ptr(), buffer.len);
                    Region::new((bytes.device() as usize as *mut u8).wrapping_add(shift), buffer.len as u64)
                }
            }));
            let order = DeviceOrder::ReduceMany {
                dst: want[0].range(),
                srcs: want[1..].iter().map(Buffer::range).collect(),
                reduction,
                pre: 1.0,
                finish: Finish { divisor: 1, post: 1.0 },
            };
            let mut on_host = Memory::default();
            let host_run = on_host.register(want.iter_mut().map(Buffer::region));
            let token = |run| Token { run, window: 0, step: 0 };
            HostDevice::new().post(token(host_run), &order, &on_host).expect("the host's result");
            assert!(!device.post(token(run), &order, &on_device).expect("the kernel is launched"));
            let mut done = Vec::new();
            while done.is_empty() {
                device.progress(&mut done).expect("the kernel ends");
            }
            let shift = want[0].content().as_ptr().addr() % 16;
            // SAFETY: the kernel is over, and nothing else writes the bytes.
            let got = unsafe { std::slice::from_raw_parts(pinned[0].host().add(shift), want[0].len) };
            assert!(got == want[0].content(), "{reduction:?} of {count} × {elements}");
            cases += 1;
        }
    }
    assert!(cases > 0);
}
