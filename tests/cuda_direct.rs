//! Tensors that go from device to device within a host (`tests/cuda_driver`): under a stand-in for the driver whose
//! memory other processes can only read, so that who does not wait, or writes what is not its own, is found out.
#![cfg(feature = "cuda")]

mod cuda_driver;

use carole::device::cuda::memory::DeviceBytes;
use carole::runtime::{self, Options, Request, TensorArg, typed};
use carole::types::{Collective, DType, Rank, ReduceOp, Scale};
use cuda_driver::{Device, ROLE, content, dies, ranks, tensor, values, wait};

#[test]
fn rank() {
    let Ok(role) = std::env::var(ROLE) else { return };
    runtime::init(&Options::default()).unwrap();
    let world = runtime::world().unwrap();
    let device = Device::new();
    match role.as_str() {
        "alike" => direct(&device, world.rank, world.size),
        "together" => together(&device, world.rank, world.size),
        "joins" => joins(&device, world.rank, world.size),
        "dies" => {
            meet(&device);
            dies(&device, world.rank);
        }
        "dies anywhere" => dies_anywhere(&device, world.rank),
        "never" => assert!(!(0..20).any(|_| goes_direct(&device)), "it goes by way of the host"),
        other => panic!("no role {other}"),
    }
    if ["alike", "together", "never"].contains(&role.as_str()) {
        // Who leaves ends what the others still need it for.
        typed::barrier("end").unwrap();
    }
    println!("rank {} is content", world.rank);
    runtime::shutdown().unwrap();
}

/// The way of the batch that was started last. (Nobody reads it while the background thread drives.)
fn last_way() -> &'static str {
    loop {
        if let Some(way) = runtime::last_algorithm().unwrap() {
            return way;
        }
    }
}

/// Whether a large tensor goes from device to device: the same answer on all ranks.
fn goes_direct(device: &Device) -> bool {
    let memory = device.make(&[1.0; 5000]);
    let tensors = [tensor(&memory, Some(&memory), &[5000])];
    let request = Request { collective: Collective::Allreduce, tensors: &tensors, ..Request::default() };
    let outcome = wait(device.submit(&request).unwrap());
    let size = runtime::world().unwrap().size as f32;
    assert_eq!(device.read(&outcome, memory.address(), 5000), [size; 5000]);
    last_way() == "devices"
}

/// The devices meet with the first large tensors.
fn meet(device: &Device) {
    assert!((0..1000).any(|_| goes_direct(device)), "the devices have met");
}

/// Small numbers of a type, other ones on each rank.
fn numbers(dtype: DType, rank: u32, count: usize) -> Vec<u8> {
    let number = |i: usize| ((i * 7 + rank as usize * 13) % 11 % 6) as u8;
    let one = |i: usize| -> Vec<u8> {
        let n = number(i);
        let bytes = match dtype {
            DType::Bool => vec![n & 1],
            DType::F16 => [0u16, 0x3C00, 0x4000, 0x4200, 0x4400, 0x4500][n as usize].to_le_bytes().to_vec(),
            DType::BF16 => ((f32::from(n).to_bits() >> 16) as u16).to_le_bytes().to_vec(),
            DType::F32 => (f32::from(n) / 3.0).to_le_bytes().to_vec(),
            DType::F64 => (f64::from(n) / 3.0).to_le_bytes().to_vec(),
            DType::C64 => [f32::from(n), 0.5].map(f32::to_le_bytes).concat(),
            DType::C128 => [f64::from(n), 0.5].map(f64::to_le_bytes).concat(),
            _ => u64::from(n).to_le_bytes()[..dtype.size()].to_vec(),
        };
        assert_eq!(bytes.len(), dtype.size());
        bytes
    };
    (0..count).flat_map(one).collect()
}

/// The result of a collective on the host, which the devices' must be to the bit.
fn on_host(request: &Request<'_>, bytes: &[u8], dtype: DType, shape: &[u64]) -> Vec<u8> {
    let tensors = [TensorArg { input: bytes.as_ptr(), output: std::ptr::null_mut(), dtype, shape }];
    // SAFETY: the bytes live until the operation has ended.
    let handle = unsafe { runtime::submit(&Request { tensors: &tensors, stream: None, ..*request }, None) };
    let outcome = wait(handle.unwrap());
    outcome.tensors[0].memory.as_ref().unwrap().as_slice().to_vec()
}

/// Runs a collective on the devices and on the host, into memory that the runtime allocates, and in place where `place`
/// says so.
fn alike(device: &Device, request: &Request<'_>, bytes: &[u8], dtype: DType, shape: &[u64], place: bool) {
    let want = on_host(request, bytes, dtype, shape);
    let input = device.make_bytes(bytes);
    let output = place.then_some(&input);
    let tensors = [TensorArg { dtype, ..tensor(&input, output, shape) }];
    let outcome = wait(device.submit(&Request { tensors: &tensors, ..*request }).unwrap());
    assert_eq!(last_way(), "devices");
    let made = outcome.tensors[0].on_device.as_ref();
    let address = output.map_or_else(|| made.unwrap().address, DeviceBytes::address);
    let got = device.read_bytes(&outcome, address, want.len());
    let at = got.iter().zip(&want).position(|(got, want)| got != want);
    assert_eq!(at, None, "{} {} of {dtype}, {shape:?}", request.collective, request.op);
    if !place {
        assert_eq!(device.read_bytes(&outcome, input.address(), bytes.len()), bytes, "the input stays");
    }
}

fn direct(device: &Device, me: u32, size: u32) {
    meet(device);
    for (d, &dtype) in DType::ALL.iter().enumerate() {
        for (o, &op) in ReduceOp::ALL.iter().enumerate() {
            if op == ReduceOp::Adasum || op.accepts(dtype).is_err() {
                continue;
            }
            let count = 5001 + 7919 * ((d + o) % 4);
            let bytes = numbers(dtype, me, count);
            let scale = match dtype.is_float() {
                true => Scale { pre: 0.5, post: 1.5 },
                false => Scale::default(),
            };
            let request = Request { collective: Collective::Allreduce, op, scale, ..Request::default() };
            alike(device, &request, &bytes, dtype, &[count as u64], o % 2 == 0);
        }
    }
    for rows in [3000usize, 20_011] {
        let request = |collective| Request { collective, ..Request::default() };
        let mine = |rows: usize| numbers(DType::F32, me, 3 * rows);
        let shape = [rows as u64, 3];
        for place in [false, true] {
            let root = Rank(size - 1);
            let request = Request { root, ..request(Collective::Broadcast) };
            alike(device, &request, &mine(rows), DType::F32, &shape, place);
        }
        alike(device, &request(Collective::Reducescatter), &mine(rows), DType::F32, &shape, false);
        let own = rows - 500 * me as usize;
        alike(device, &request(Collective::Allgather), &mine(own), DType::F32, &[own as u64, 3], false);
        let mut splits = vec![rows as u64 / u64::from(size); size as usize];
        splits[0] += 17;
        splits[size as usize - 1] = rows as u64 - splits[..size as usize - 1].iter().sum::<u64>();
        let request = Request { splits: &splits, ..request(Collective::Alltoall) };
        alike(device, &request, &mine(rows), DType::F32, &shape, false);
    }
}

/// Many tensors of all sizes in flight, alone and in groups, in batches of their own and together.
fn together(device: &Device, me: u32, size: u32) {
    meet(device);
    for round in 0..3 {
        let counts: Vec<usize> = (0..30).map(|i| 1 + (i * 977 + round * 131) % 4000).collect();
        let inputs: Vec<DeviceBytes> = counts.iter().map(|&count| device.make(&values(me, count))).collect();
        let names: Vec<String> = (0..counts.len()).map(|i| format!("tensor.{i}")).collect();
        let submit = |i: usize, all: usize| {
            let shapes: Vec<[u64; 1]> = counts[i..i + all].iter().map(|&count| [count as u64]).collect();
            let tensors: Vec<TensorArg<'_>> =
                (0..all).map(|t| tensor(&inputs[i + t], Some(&inputs[i + t]), &shapes[t])).collect();
            let (collective, name) = (Collective::Allreduce, Some(names[i].as_str()));
            (
                i,
                all,
                device
                    .submit(&Request { collective, name, tensors: &tensors, ..Request::default() })
                    .unwrap(),
            )
        };
        let handles: Vec<_> =
            (0..counts.len()).step_by(3).flat_map(|i| [submit(i, 1), submit(i + 1, 2)]).collect();
        for (i, all, handle) in handles.into_iter().rev() {
            let outcome = wait(handle);
            for t in i..i + all {
                let sums: Vec<Vec<f32>> = (0..size).map(|rank| values(rank, counts[t])).collect();
                let want: Vec<f32> = (0..counts[t]).map(|at| sums.iter().map(|v| v[at]).sum()).collect();
                assert_eq!(
                    device.read(&outcome, inputs[t].address(), counts[t]),
                    want,
                    "tensor {t} of {round}"
                );
            }
        }
    }
}

/// Who has joined gives the identity.
fn joins(device: &Device, me: u32, size: u32) {
    meet(device);
    if me > 0 {
        for _ in 0..5 {
            let memory = device.make(&[2.0; 30_000]);
            let tensors = [tensor(&memory, Some(&memory), &[30_000])];
            let (collective, name) = (Collective::Allreduce, Some("late"));
            let request = Request { collective, name, tensors: &tensors, ..Request::default() };
            let outcome = wait(device.submit(&request).unwrap());
            assert_eq!(device.read(&outcome, memory.address(), 30_000), [2.0 * (size - 1) as f32; 30_000]);
            assert_eq!(last_way(), "devices");
        }
    }
    // SAFETY: a join has no tensor.
    let joined =
        unsafe { runtime::submit(&Request { collective: Collective::Join, ..Request::default() }, None) };
    wait(joined.unwrap());
}

/// A rank dies in the middle of whatever it does, and the others go on without it, from device to device again.
fn dies_anywhere(device: &Device, me: u32) {
    meet(device);
    if me == 2 {
        let pause = std::time::Duration::from_micros(u64::from(std::process::id()) % 50_000);
        std::thread::spawn(move || {
            std::thread::sleep(pause);
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
        });
    }
    dies(device, me + 10);
    assert_eq!(runtime::reform().unwrap().size, 2);
    meet(device);
    let all = numbers(DType::I32, me, 50_000);
    let request = Request { collective: Collective::Allreduce, ..Request::default() };
    alike(device, &request, &all, DType::I32, &[50_000], true);
}

/// Every batch of a page goes from device to device, in small windows.
const DIRECT: [(&str, &str); 2] = [("CAROLE_DIRECT_BYTES", "4096"), ("CAROLE_DIRECT_MEMORY", "96K")];

#[test]
fn devices_give_the_bits_of_the_host() {
    content("alike", 2, &DIRECT);
    content("alike", 3, &DIRECT);
}

#[test]
fn devices_take_many_tensors_together() {
    content("together", 2, &DIRECT);
    content("together", 3, &[DIRECT[0], ("CAROLE_UNIFORM", "1")]);
}

#[test]
fn devices_count_those_that_have_joined() {
    content("joins", 3, &DIRECT);
}

#[test]
fn devices_that_do_not_meet_go_by_way_of_the_host() {
    content("never", 2, &[DIRECT[0], ("STAND_IN_CANNOT_SHARE", "1")]);
    content("never", 2, &[DIRECT[0], ("CAROLE_TRANSPORT", "tcp")]);
    content("never", 2, &[("CAROLE_DIRECT_BYTES", "1M")]);
}

#[test]
fn a_death_is_told_to_those_who_wait() {
    let Some(output) = ranks("dies", 3, &DIRECT) else { return };
    let out = String::from_utf8_lossy(&output.stdout);
    for rank in [0, 1] {
        assert!(out.contains(&format!("rank {rank} was told: epoch 0 is broken: rank 2")), "{out}");
    }
}

#[test]
fn those_that_are_left_go_on() {
    for _ in 0..3 {
        let Some(output) = ranks("dies anywhere", 3, &DIRECT) else { return };
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(out.matches(" is content").count(), 2, "{out}\n{err}");
    }
}
