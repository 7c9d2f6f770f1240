//! Ranks with tensors on a CUDA device: under the driver where there is one, else under a stand-in for it (`driver.cpp`).
//! Producers dawdle on their streams, and results are read by streams that were told to wait.
#![allow(dead_code, reason = "each file of tests uses what it needs")]

use assert_cmd::cargo::cargo_bin;
use carole::device::cuda::home::Home;
use carole::device::cuda::memory::DeviceBytes;
use carole::device::cuda::source;
use carole::error::Result;
use carole::runtime::{self, Handle, Outcome, Request, TensorArg};
use carole::types::{Collective, DType};
use cudarc::driver::sys;
use std::ffi::c_void;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

/// Says to the program that it is a rank, and what it shall do.
pub const ROLE: &str = "CAROLE_TEST_ROLE";

/// The device, and a stream of the program's own.
pub struct Device {
    pub home: Arc<Home>,
    pub stream: sys::CUstream,
}

impl Device {
    pub fn new() -> Device {
        let home = Home::of_device(0).unwrap();
        let mut stream = std::ptr::null_mut();
        let _current = home.context.enter().unwrap();
        // SAFETY: the result is written to a variable of ours.
        unsafe { sys::cuStreamCreate(&mut stream, 1).result().unwrap() };
        Device { home: Arc::clone(&home), stream }
    }

    pub fn memory(&self, count: usize) -> DeviceBytes {
        DeviceBytes::new(&self.home.context, 4 * count).unwrap()
    }

    /// Memory that will hold these values, after a while.
    pub fn make(&self, values: &[f32]) -> DeviceBytes {
        self.make_bytes(&values.iter().flat_map(|value| value.to_ne_bytes()).collect::<Vec<u8>>())
    }

    pub fn make_bytes(&self, bytes: &[u8]) -> DeviceBytes {
        let memory = DeviceBytes::new(&self.home.context, bytes.len()).unwrap();
        let _current = self.home.context.enter().unwrap();
        let source: &'static [u8] = Box::leak(bytes.into());
        // SAFETY: the function takes no argument; source and memory live until the stream is past the copy.
        unsafe {
            sys::cuLaunchHostFunc(self.stream, Some(dawdle), std::ptr::null_mut()).result().unwrap();
            let bytes = size_of_val(source);
            sys::cuMemcpyHtoDAsync_v2(memory.address(), source.as_ptr().cast(), bytes, self.stream)
                .result()
                .unwrap();
        }
        memory
    }

    /// What is in memory when the stream, which waits for the outcome, has come to it.
    pub fn read(&self, outcome: &Outcome, address: u64, count: usize) -> Vec<f32> {
        let bytes = self.read_bytes(outcome, address, 4 * count);
        bytes.as_chunks::<4>().0.iter().map(|value| f32::from_ne_bytes(*value)).collect()
    }

    pub fn read_bytes(&self, outcome: &Outcome, address: u64, bytes: usize) -> Vec<u8> {
        let mut values = vec![0xA5u8; bytes];
        let _current = self.home.context.enter().unwrap();
        let arrives = outcome.arrives.as_ref().expect("results on a device are on their way");
        // SAFETY: our stream; the values live until it is past the copy.
        unsafe {
            arrives.0.hold(self.stream as usize as u64).unwrap();
            sys::cuMemcpyDtoHAsync_v2(values.as_mut_ptr().cast(), address, bytes, self.stream)
                .result()
                .unwrap();
            sys::cuStreamSynchronize(self.stream).result().unwrap();
        }
        values
    }

    pub fn submit(&self, request: &Request<'_>) -> Result<Handle> {
        let stream = Some(self.stream as usize as u64);
        // SAFETY: the tests keep memory until they have read the results.
        unsafe { runtime::submit(&Request { stream, ..*request }, None) }
    }
}

unsafe extern "C" fn dawdle(_: *mut c_void) {
    std::thread::sleep(Duration::from_millis(2));
}

pub fn tensor<'a>(input: &DeviceBytes, output: Option<&DeviceBytes>, shape: &'a [u64]) -> TensorArg<'a> {
    let output = output.map_or(std::ptr::null_mut(), |bytes| bytes.address() as usize as *mut u8);
    TensorArg { input: input.address() as usize as *const u8, output, dtype: DType::F32, shape }
}

pub fn wait(handle: Handle) -> Outcome {
    runtime::wait(handle, None).result.unwrap()
}

pub fn values(rank: u32, count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7 + rank as usize * 13) % 100) as f32).collect()
}

/// Runs until a rank dies: the third one, at the tenth step.
pub fn dies(device: &Device, me: u32) {
    for step in 0.. {
        if step == 10 && me == 2 {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
        }
        let memory = device.make(&[1.0; 20_000]);
        let tensors = [tensor(&memory, Some(&memory), &[20_000])];
        let request = Request { collective: Collective::Allreduce, tensors: &tensors, ..Request::default() };
        let ended = device.submit(&request).and_then(|handle| runtime::wait(handle, None).result);
        if let Err(error) = ended {
            println!("rank {me} was told: {error}");
            return;
        }
    }
}

/// The folder of the stand-in, which is compiled once; none where there is a real driver. The reason why neither is there.
pub fn driver() -> std::result::Result<Option<PathBuf>, String> {
    if Path::new("/dev/nvidiactl").exists() {
        return Ok(None);
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = [root.join("tests/cuda_driver/driver.cpp"), root.join("kernels/host_form.cpp")];
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let flags =
        "-std=c++17 -O1 -Wall -Wextra -Werror -Wno-unknown-pragmas -ffp-contract=off -shared -fPIC -pthread";
    let mut hash = std::hash::DefaultHasher::new();
    let texts = sources.each_ref().map(|path| std::fs::read_to_string(path).expect("a source"));
    (source::SOURCES, texts, &compiler, flags).hash(&mut hash);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let lock = std::fs::File::create(folder.join("driver.lock")).expect("a file to lock");
    lock.lock().expect("a file can be locked");
    let place = folder.join(format!("driver-{:016x}", hash.finish()));
    let library = place.join("libcuda.so");
    if library.exists() {
        return Ok(Some(place));
    }
    std::fs::create_dir_all(&place).expect("a folder can be made");
    let part = place.join("part");
    let mut command = Command::new(&compiler);
    let built = command.args(flags.split(' ')).arg("-o").arg(&part).args(&sources).output();
    let output =
        built.map_err(|_| format!("skipped: no device, and no C++ compiler ({compiler}) for a stand-in"))?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::rename(part, library).expect("a file can be renamed");
    Ok(Some(place))
}

pub fn ranks(role: &str, size: u32, knobs: &[(&str, &str)]) -> Option<Output> {
    let place = match driver() {
        Ok(place) => place,
        Err(why) => {
            eprintln!("{why}");
            return None;
        }
    };
    let mut command = Command::new(cargo_bin("carolerun"));
    command.args(["-np", &size.to_string()]).arg(std::env::current_exe().unwrap());
    command.args(["--exact", "rank", "--nocapture"]).env(ROLE, role).envs(knobs.iter().copied());
    command.envs(place.map(|place| ("LD_LIBRARY_PATH", place)));
    Some(command.env("CAROLE_TIMEOUT_MS", "20000").output().unwrap())
}

pub fn content(role: &str, size: u32, knobs: &[(&str, &str)]) {
    let Some(output) = ranks(role, size, knobs) else { return };
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    assert_eq!(out.matches(" is content").count(), size as usize, "{out}\n{err}");
}
