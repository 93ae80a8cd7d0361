"""Times forward, backward and update on a GPU beside a copy of the same bytes, all in one run.

    python scripts/benchmark.py

GPU times are medians of CUDA graph replays over buffers that are rotated so that none is served
from L2. "of copy" is the time of a copy of x divided by the forward's time, and 1.5 times that copy
divided by the backward's, since it reads x and dout and writes dx.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from time import perf_counter

import torch

import causal_conv1d
from causal_conv1d.causal_conv1d_interface import _backward, _forward, _update

# batch, dim, seqlen
SHAPES = (
    (1, 2048, 2048),
    (8, 2048, 2048),
    (2, 4096, 8192),
    (8, 4096, 4096),
    (1, 8192, 16384),
    (64, 1536, 512),
    (8, 5120, 1003),
)
UPDATE_SHAPES = ((1, 2048), (64, 4096), (256, 8192))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def make(shape, layout, dtype, device):
    batch, dim, seqlen = shape
    if layout == "first":
        return torch.randn(batch, dim, seqlen, device=device).to(dtype)
    return torch.randn(batch, seqlen, dim, device=device).to(dtype).transpose(1, 2)


def time_gpu(calls, seconds=0.05):
    """Median microseconds of one of calls, which are run in rotation."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = max(1, -(-20 // len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = []
    total = 0.0
    while total < seconds or len(times) < 7:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        elapsed = start.elapsed_time(stop)
        times.append(elapsed * 1e3 / (rounds * len(calls)))
        total += elapsed * 1e-3
    return statistics.median(times)


def copies(size_bytes, device):
    """How many buffers of a size are needed for none to stay in a cache."""
    return max(2, min(64, -(-400_000_000 // size_bytes)))


def measure(shape, layout, name, args, time):
    dtype, device = DTYPES[name], args.device
    batch, dim, seqlen = shape
    size = batch * dim * seqlen * dtype.itemsize
    n = copies(size, device)
    xs = [make(shape, layout, dtype, device) for _ in range(n)]
    outs = [torch.empty_like(x) for x in xs]
    weight = torch.randn(dim, args.width, device=device).to(dtype)
    bias = torch.randn(dim, device=device).to(dtype)
    row = {"batch": batch, "dim": dim, "seqlen": seqlen, "dtype": name, "layout": layout}
    # torch has two plain vector kernels; either may fall short for a shape, so the better counts.
    copy = time([lambda o=o, x=x: o.copy_(x) for x, o in zip(xs, outs, strict=True)])
    negate = time([lambda o=o, x=x: torch.neg(x, out=o) for x, o in zip(xs, outs, strict=True)])
    row["copy_us"] = min(copy, negate)
    row["forward_us"] = time(
        [
            lambda o=o, x=x: _forward(x, weight, bias, None, None, o, None, True)
            for x, o in zip(xs, outs, strict=True)
        ]
    )
    dxs = [torch.empty_like(x) for x in xs]
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    row["backward_us"] = time(
        [
            lambda o=o, x=x, d=d: _backward(
                x, weight, bias, o, None, None, None, d, dweight, dbias, None, True
            )
            for x, o, d in zip(xs, outs, dxs, strict=True)
        ]
    )
    row["forward_of_copy"] = row["copy_us"] / row["forward_us"]
    row["backward_of_copy"] = 1.5 * row["copy_us"] / row["backward_us"]
    return row


def measure_update(shape, name, args, time):
    dtype, device = DTYPES[name], args.device
    batch, dim = shape
    n = copies(batch * dim * dtype.itemsize * 10, device)
    xs = [torch.randn(batch, dim, device=device).to(dtype) for _ in range(n)]
    states = [torch.randn(batch, dim, args.width, device=device).to(dtype) for _ in range(n)]
    weight = torch.randn(dim, args.width, device=device).to(dtype)
    bias = torch.randn(dim, device=device).to(dtype)
    outs = [torch.empty_like(x) for x in xs]
    row = {"batch": batch, "dim": dim, "dtype": name}
    row["update_us"] = time(
        [
            lambda x=x, s=s, o=o: _update(x, s, weight, bias, o, True, None, None)
            for x, s, o in zip(xs, states, outs, strict=True)
        ]
    )
    return row


def host_times(device):
    """Microseconds of host time a call, tiny tensors, nothing waits for the GPU within a round."""
    x = torch.randn(1, 64, 16, device=device)
    weight, bias = torch.randn(64, 4, device=device), torch.randn(64, device=device)
    token, state = torch.randn(1, 64, device=device), torch.zeros(1, 64, 4, device=device)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]

    def forward_backward():
        out = causal_conv1d.causal_conv1d_fn(*leaves, activation="silu")
        torch.autograd.grad(out, leaves, x)

    calls = {
        "torch.empty_like": lambda: torch.empty_like(x),
        "x + x": lambda: x + x,
        "causal_conv1d_fn": lambda: causal_conv1d.causal_conv1d_fn(
            x, weight, bias, activation="silu"
        ),
        "causal_conv1d_update": lambda: causal_conv1d.causal_conv1d_update(
            token, state, weight, bias, "silu"
        ),
        "forward and backward": forward_backward,
    }
    times = {}
    for name, call in calls.items():
        rounds = []
        for _ in range(15):
            torch.cuda.synchronize()
            start = perf_counter()
            for _ in range(200):
                call()
            rounds.append((perf_counter() - start) / 200 * 1e6)
        times[name] = min(rounds)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="a CUDA device")
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--dtypes", default="bf16,fp16,fp32")
    parser.add_argument("--layouts", default="first,last")
    parser.add_argument("--json", help="file to write the rows to")
    args = parser.parse_args()
    time = time_gpu
    gpu = torch.cuda.get_device_name()
    rows, updates = [], []
    print(f"{gpu}, torch {torch.__version__}, causal_conv1d {causal_conv1d.__version__}")
    print("batch    dim seqlen type layout  copy us   fwd us  of copy   bwd us  of copy")
    for name in args.dtypes.split(","):
        for shape in SHAPES:
            for layout in args.layouts.split(","):
                row = measure(shape, layout, name, args, time)
                rows.append(row)
                print(
                    f"{row['batch']:5d} {row['dim']:6d} {row['seqlen']:6d} {name} {layout:6s}"
                    f" {row['copy_us']:8.1f} {row['forward_us']:8.1f} {row['forward_of_copy']:8.2f}"
                    f" {row['backward_us']:8.1f} {row['backward_of_copy']:8.2f}",
                    flush=True,
                )
    for shape in UPDATE_SHAPES:
        for name in args.dtypes.split(","):
            row = measure_update(shape, name, args, time)
            updates.append(row)
            print(f"update {row['batch']:4d} x {row['dim']:5d} {name}: {row['update_us']:.2f} us")
    host = host_times(args.device)
    for name, microseconds in host.items():
        print(f"host time of {name}: {microseconds:.1f} us")
    if args.json:
        report = {
            "device": gpu,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "version": causal_conv1d.__version__,
            "command": " ".join(sys.argv),
            "rows": rows,
            "update": updates,
            "host_us": host,
        }
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
