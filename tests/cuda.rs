//! Tensors on a CUDA device, on real ranks: under the driver where there is one, else under a stand-in for it
//! (`cuda_driver/driver.cpp`). Producers dawdle on their streams, and results are read by streams that were told to wait.
#![cfg(feature = "cuda")]

mod cuda_driver;

use carole::device::cuda::memory::DeviceBytes;
use carole::runtime::{self, Handle, Options, Request, TensorArg, typed};
use carole::types::{Collective, DType, GLOBAL_SET, Rank, ReduceOp};
use cuda_driver::{Device, ROLE, content, dies, ranks, tensor, values, wait};
use std::time::{Duration, Instant};

#[test]
fn rank() {
    let Ok(role) = std::env::var(ROLE) else { return };
    runtime::init(&Options::default()).unwrap();
    let world = runtime::world().unwrap();
    let device = Device::new();
    match role.as_str() {
        "collectives" => collectives(&device, world.rank, world.size),
        "messages" => messages(&device, world.rank, world.size),
        "mixed" => mixed(&device, world.rank),
        "given up" => given_up(&device, world.size),
        "dies" => dies(&device, world.rank),
        "joins" => joins(&device, world.rank, world.size),
        other => panic!("no role {other}"),
    }
    if !["dies", "joins"].contains(&role.as_str()) {
        // Who leaves ends what the others still need it for.
        typed::barrier("end").unwrap();
    }
    println!("rank {} is content", world.rank);
    runtime::shutdown().unwrap();
}

fn collectives(device: &Device, me: u32, size: u32) {
    let sum = |count: usize| {
        let all: Vec<Vec<f32>> = (0..size).map(|rank| values(rank, count)).collect();
        (0..count).map(|i| all.iter().map(|v| v[i]).sum()).collect::<Vec<f32>>()
    };
    for count in [1usize, 7, 1000, 100_000] {
        let shape = [count as u64];
        let mine = values(me, count);
        // Into other memory, in place, and into memory that the runtime allocates.
        for way in 0..3 {
            let input = device.make(&mine);
            let other = device.memory(count);
            let output = [Some(&other), Some(&input), None][way];
            let tensors = [tensor(&input, output, &shape)];
            let request =
                Request { collective: Collective::Allreduce, tensors: &tensors, ..Request::default() };
            let outcome = wait(device.submit(&request).unwrap());
            let made = outcome.tensors[0].on_device.as_ref();
            let address = output.map_or_else(|| made.unwrap().address, DeviceBytes::address);
            assert_eq!(device.read(&outcome, address, count), sum(count), "allreduce {count} {way}");
        }
        let input = device.make(&mine);
        let root = Rank(size - 1);
        let tensors = [tensor(&input, Some(&input), &shape)];
        let request =
            Request { collective: Collective::Broadcast, root, tensors: &tensors, ..Request::default() };
        let outcome = wait(device.submit(&request).unwrap());
        assert_eq!(device.read(&outcome, input.address(), count), values(root.0, count), "broadcast");
        for collective in [Collective::Allgather, Collective::Reducescatter, Collective::Alltoall] {
            let rows = count.next_multiple_of(size as usize);
            let mine = values(me, rows);
            let input = device.make(&mine);
            let shape = [rows as u64];
            let tensors = [tensor(&input, None, &shape)];
            let request = Request { collective, tensors: &tensors, ..Request::default() };
            let outcome = wait(device.submit(&request).unwrap());
            let part = rows / size as usize;
            let at = me as usize * part;
            let want: Vec<f32> = match collective {
                Collective::Allgather => (0..size).flat_map(|rank| values(rank, rows)).collect(),
                Collective::Reducescatter => sum(rows)[at..at + part].to_vec(),
                _ => (0..size).flat_map(|rank| values(rank, rows)[at..at + part].to_vec()).collect(),
            };
            let address = outcome.tensors[0].on_device.as_ref().unwrap().address;
            assert_eq!(device.read(&outcome, address, want.len()), want, "{collective}");
        }
    }
    // Many at once, in flight together.
    let inputs: Vec<DeviceBytes> = (0..50).map(|i| device.make(&values(me + i, 300))).collect();
    let names: Vec<String> = (0..50).map(|i| format!("tensor.{i}")).collect();
    let handles: Vec<Handle> = (0..50)
        .map(|i| {
            let tensors = [tensor(&inputs[i], Some(&inputs[i]), &[300])];
            let (collective, op, name) = (Collective::Allreduce, ReduceOp::Max, Some(names[i].as_str()));
            device.submit(&Request { collective, op, name, tensors: &tensors, ..Request::default() }).unwrap()
        })
        .collect();
    for (i, handle) in handles.into_iter().enumerate().rev() {
        let outcome = wait(handle);
        let all: Vec<Vec<f32>> = (0..size).map(|rank| values(rank + i as u32, 300)).collect();
        let want: Vec<f32> =
            (0..300).map(|at| all.iter().map(|v| v[at]).fold(f32::NEG_INFINITY, f32::max)).collect();
        assert_eq!(device.read(&outcome, inputs[i].address(), 300), want, "tensor {i}");
    }
}

/// Messages of one tag meet in order, although the first one's producer takes its time and the second is the host's.
fn messages(device: &Device, me: u32, size: u32) {
    let (to, from) = (Rank((me + 1) % size), Rank((me + size - 1) % size));
    let stream = Some(device.stream as usize as u64);
    let shape = [500];
    let sent = device.make(&values(me, 500));
    let second: Vec<f32> = values(me + 50, 500);
    let (got, mut got_second) = (device.memory(500), vec![0f32; 500]);
    let bytes = |values: &[f32]| values.as_ptr().cast::<u8>();
    let host =
        TensorArg { input: bytes(&second), output: std::ptr::null_mut(), dtype: DType::F32, shape: &shape };
    let into = TensorArg { input: std::ptr::null(), output: got_second.as_mut_ptr().cast(), ..host };
    // SAFETY: all memory lives until the messages are over.
    let handles = unsafe {
        [
            runtime::send(GLOBAL_SET, to, 0, tensor(&sent, None, &shape), stream, None),
            runtime::send(GLOBAL_SET, to, 0, host, None, None),
            runtime::recv(GLOBAL_SET, from, 0, tensor(&got, Some(&got), &shape), stream, None),
            runtime::recv(GLOBAL_SET, from, 0, into, None, None),
        ]
    };
    let outcomes = handles.map(|handle| wait(handle.unwrap()));
    assert_eq!(device.read(&outcomes[2], got.address(), 500), values(from.0, 500));
    assert_eq!(got_second, values(from.0 + 50, 500));
}

fn mixed(device: &Device, me: u32) {
    let memory = device.make(&[1.0; 4]);
    let mut here = [1.0f32; 4];
    let host: *mut u8 = here.as_mut_ptr().cast();
    let there = tensor(&memory, Some(&memory), &[4]);
    let tensors = [if me == 0 { there } else { TensorArg { input: host, output: host, ..there } }];
    let name = Some("mixed");
    let request =
        Request { name, collective: Collective::Allreduce, tensors: &tensors, ..Request::default() };
    let handle = match me {
        0 => device.submit(&request),
        // SAFETY: the values live until the operation has ended.
        _ => unsafe { runtime::submit(&request, None) },
    };
    let words = runtime::wait(handle.unwrap(), None).result.unwrap_err().to_string();
    for part in ["host memory", "CUDA", "rank 0", "rank 1"] {
        assert!(words.contains(part), "{words}");
    }
    // Memory of the host that is said to be on a device.
    let tensors = [TensorArg { input: host, output: host, ..there }];
    let request = Request { name: Some("no device"), ..request };
    let error = device.submit(&Request { tensors: &tensors, ..request }).unwrap_err().to_string();
    assert!(error.contains("no CUDA device"), "{error}");
}

fn given_up(device: &Device, size: u32) {
    for step in 0..20 {
        let name = format!("lost.{step}");
        let memory = device.make(&[1.0; 5000]);
        let tensors = [tensor(&memory, Some(&memory), &[5000])];
        let collective = Collective::Allreduce;
        let stream = Some(device.stream as usize as u64);
        let request =
            Request { collective, name: Some(&name), stream, tensors: &tensors, ..Request::default() };
        // SAFETY: the memory is kept by the operation.
        let handle = unsafe { runtime::submit(&request, Some(Box::new(memory))) };
        runtime::abandon(handle.unwrap());
        drop(runtime::released());
    }
    let memory = device.make(&[1.0; 8]);
    let tensors = [tensor(&memory, Some(&memory), &[8])];
    let request = Request { collective: Collective::Allreduce, tensors: &tensors, ..Request::default() };
    let outcome = wait(device.submit(&request).unwrap());
    assert_eq!(device.read(&outcome, memory.address(), 8), [size as f32; 8]);
    let until = Instant::now() + Duration::from_secs(20);
    let mut released = 0;
    while released < 20 && Instant::now() < until {
        released += runtime::released().len();
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn joins(device: &Device, me: u32, size: u32) {
    if me > 0 {
        let memory = device.make(&[2.0; 9]);
        let tensors = [tensor(&memory, Some(&memory), &[9])];
        let (collective, name) = (Collective::Allreduce, Some("late"));
        let outcome = wait(
            device.submit(&Request { collective, name, tensors: &tensors, ..Request::default() }).unwrap(),
        );
        assert_eq!(device.read(&outcome, memory.address(), 9), [2.0 * (size - 1) as f32; 9]);
    }
    // SAFETY: a join has no tensor.
    let joined =
        unsafe { runtime::submit(&Request { collective: Collective::Join, ..Request::default() }, None) };
    wait(joined.unwrap());
}

#[test]
fn every_collective_over_every_transport() {
    for (size, transport) in [(1, "shm"), (2, "shm"), (3, "shm"), (2, "tcp"), (3, "tcp")] {
        content("collectives", size, &[("CAROLE_TRANSPORT", transport)]);
    }
}

#[test]
fn messages_keep_their_order() {
    content("messages", 2, &[]);
    content("messages", 3, &[("CAROLE_TRANSPORT", "tcp")]);
}

#[test]
fn host_and_device_do_not_meet() {
    content("mixed", 2, &[]);
}

#[test]
fn handles_may_be_given_up() {
    content("given up", 2, &[]);
}

#[test]
fn a_rank_that_has_joined_needs_no_device() {
    content("joins", 3, &[]);
}

#[test]
fn all_settle_alike_with_uniform_completion() {
    content("collectives", 2, &[("CAROLE_UNIFORM", "1")]);
}

#[test]
fn a_death_is_told_to_those_who_wait() {
    let Some(output) = ranks("dies", 3, &[]) else { return };
    let out = String::from_utf8_lossy(&output.stdout);
    for rank in [0, 1] {
        assert!(out.contains(&format!("rank {rank} was told: epoch 0 is broken: rank 2")), "{out}");
    }
}
