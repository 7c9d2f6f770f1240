"""Allreduce of tensors that two ranks have on one GPU, beside torch's Gloo in the same run:
`python benches/cuda_allreduce.py` (it starts its ranks by itself). Medians of the slower rank, in microseconds."""

import os
import statistics
import sys
import time

import torch


def rank_main():
    import torch.distributed as dist

    import carole.torch as hvd

    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["GLOO_PORT"])
    dist.init_process_group("gloo", rank=rank, world_size=size)

    def ours(x):
        hvd.allreduce_(x, op=hvd.Sum, name="x")

    def gloo(x):
        dist.all_reduce(x)

    def measure(call, x, rounds):
        times = []
        for _ in range(rounds + 2):
            hvd.barrier()
            torch.cuda.synchronize()
            start = time.perf_counter()
            call(x)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        slowest = hvd.allreduce(torch.tensor(times[2:], dtype=torch.float64), op=hvd.Max)
        return statistics.median(slowest.tolist()) * 1e6

    if rank == 0:
        print("| bytes | carole us | gloo us | ratio | carole GB/s |\n| --- | --- | --- | --- | --- |", flush=True)
    for power in (12, 16, 20, 22, 24, 26, 28):
        x = torch.ones((1 << power) // 4, device="cuda")
        rounds = 30 if power < 24 else 7
        a, b = measure(ours, x, rounds), measure(gloo, x, max(rounds // 3, 3))
        if rank == 0:
            print(f"| {1 << power} | {a:.0f} | {b:.0f} | {b / a:.2f} | {(1 << power) / a / 1e3:.2f} |", flush=True)
    dist.destroy_process_group()
    hvd.shutdown()


if __name__ == "__main__":
    if "CAROLE_RANK" in os.environ:
        rank_main()
    else:
        import socket

        from carole import _native

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["GLOO_PORT"] = str(free.getsockname()[1])
        ranks = sys.argv[1] if len(sys.argv) > 1 else "2"
        sys.exit(_native.launch(["carolerun", "-np", ranks, sys.executable, __file__]))
