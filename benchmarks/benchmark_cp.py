"""Times causal_conv1d_cp on the ranks that torchrun starts, beside one with the whole sequence.

    torchrun --nproc-per-node 2 benchmarks/benchmark_cp.py [--json FILE] [--small]

NCCL where there are GPUs, a GPU for each rank, else Gloo. Medians, of the slowest rank:
one: causal_conv1d_fn of the whole, on one rank while the others wait; many: causal_conv1d_cp of the
shards; shard: causal_conv1d_fn of a shard, which sends nothing; exchange: its messages alone.
hidden is the share of the exchange that many does not take longer than shard, with the few small
calls at the ends of a shard counted as exchange.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch
import torch.distributed as dist

import causal_conv1d
from causal_conv1d import causal_conv1d_cp, causal_conv1d_fn
from causal_conv1d.distributed.exchange import Halos
from causal_conv1d.distributed.parts import make_parts

WIDTH = 4
CALLS = 4  # that a GPU does one after the other, so that the host is ahead of it as in training
# dim, seqlen, documents
ROWS = ((8192, 131072, 1), (10240, 65536, 128))
SMALL = ((64, 4096, 1), (64, 4096, 8))


def timed(function, device, repeats):
    """The median time in ms of a call of a function, of the slowest rank."""
    times = []
    for _ in range(repeats + 3):
        dist.barrier()
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(CALLS):
                function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / CALLS)
        else:
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
    found = torch.tensor(statistics.median(times[3:]), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def alone(function, device, repeats):
    """As timed, of rank 0 while the others wait."""

    def call():
        if dist.get_rank() == 0:
            function()

    return timed(call, device, repeats)


def make(dim, seqlen, layout, device):
    shape = (1, dim, seqlen) if layout == "channel_first" else (1, seqlen, dim)
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    return (x if layout == "channel_first" else x.mT).requires_grad_()


def measure(dim, seqlen, documents, layout, device, repeats):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    weight = torch.randn(dim, WIDTH, device=device, requires_grad=True)
    bias = torch.randn(dim, device=device, requires_grad=True)
    bounds = torch.arange(0, seqlen + 1, seqlen // documents, device=device)
    ids = None
    if documents > 1:
        ids = torch.arange(seqlen, device=device, dtype=torch.int32)[None] // (seqlen // documents)
    size = seqlen // ranks
    own = None if ids is None else ids[:, rank * size : (rank + 1) * size]
    shard = make(dim, size, layout, device)
    parts = make_parts("benchmark", "contiguous", size, None, rank, ranks)

    def cp():
        cu_seqlens = bounds if documents > 1 else None
        return causal_conv1d_cp(shard, weight, bias, "silu", cu_seqlens=cu_seqlens, check=False)

    def exchange(*sides):
        for route, fields in sides:
            Halos(route, fields, dist.group.WORLD).wait()

    def both(forward, x):
        dout = torch.ones_like(x)
        return lambda: torch.autograd.grad(forward(), (x, weight, bias), dout)

    def fn(x, seq_idx):
        return lambda: causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")

    before = parts.before(WIDTH - 1), (shard.detach(),)
    after = parts.after(WIDTH - 1), (shard.detach(), shard.detach())
    whole = make(dim, seqlen, layout, device) if rank == 0 else shard
    found = {}
    with torch.no_grad():
        found["forward"] = {
            "one": alone(fn(whole, ids), device, repeats),
            "many": timed(cp, device, repeats),
            "shard": timed(fn(shard, own), device, repeats),
            "exchange": timed(lambda: exchange(before), device, repeats),
        }
    found["forward and backward"] = {
        "one": alone(both(fn(whole, ids), whole), device, repeats),
        "many": timed(both(cp, shard), device, repeats),
        "shard": timed(both(fn(shard, own), shard), device, repeats),
        "exchange": timed(lambda: exchange(before, after), device, repeats),
    }
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json")
    parser.add_argument("--small", action="store_true", help="small shapes, to try the script")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    results = []
    for dim, seqlen, documents in SMALL if options.small else ROWS:
        for layout in ("channel_first", "channel_last"):
            row = measure(dim, seqlen, documents, layout, device, 3 if options.small else 20)
            for what, times in row.items():
                exposed = times["many"] - times["shard"]
                hidden = 1 - exposed / times["exchange"] if ranks > 1 else float("nan")
                shape = f"1 x {dim} x {seqlen}, {documents} documents, {layout}"
                result = {"shape": shape, "what": what, "ms": times, "hidden": hidden}
                results.append(result | {"speedup": times["one"] / times["many"]})
                if rank == 0:
                    text = "  ".join(f"{name} {ms:.3f}" for name, ms in times.items())
                    print(f"{shape}, {what}: {text} ms", end="  ")
                    print(f"{times['one'] / times['many']:.2f} times one, hidden {hidden:.2f}")
    if rank == 0 and options.json:
        about = {
            "device": torch.cuda.get_device_name() if on_gpu else "CPU",
            "ranks": ranks,
            "torch": torch.__version__,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
            "causal_conv1d": causal_conv1d.__version__,
            "dtype": "bf16",
            "width": WIDTH,
        }
        with open(options.json, "w") as file:
            json.dump(about | {"rows": results}, file, indent=1)
            file.write("\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
