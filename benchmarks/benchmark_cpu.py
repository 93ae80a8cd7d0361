"""Times forward, backward and update on the CPU beside a copy of the same bytes, all in one run.

    python benchmarks/benchmark_cpu.py --json cpu.json

Each row interleaves its contestants, round by round, and takes the least time of each, so that
other load on the machine falls on all alike. "copies" is the forward's time divided by that of a
copy of x (torch's copy_), and the backward's divided by 1.5 such copies, since it reads x and dout
and writes dx. With --clock thread and one thread, the time is the thread's own, without what others
took.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time

import torch
import torch.nn.functional as F

import causal_conv1d
from causal_conv1d import _library
from causal_conv1d.cpp_functions import write_backward, write_forward, write_update

# batch, dim, seqlen
SHAPES = ((2, 4096, 4096), (1, 2048, 2048))
UPDATE_SHAPES = ((1, 2048), (64, 4096), (256, 8192))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = ("first", "last")
WIDTH = 4


def least_times(contestants, rounds, slow=(), clock=time.perf_counter):
    """The least seconds of each of contestants, a dict of functions, called in turn `rounds` times;
    those named in slow a third as often."""
    best = {}
    for name, call in contestants.items():
        call()
        best[name] = float("inf")
    for i in range(rounds):
        for name, call in contestants.items():
            if name in slow and i % 3:
                continue
            start = clock()
            call()
            best[name] = min(best[name], clock() - start)
    return best


def make(batch, dim, seqlen, layout, dtype):
    if layout == "first":
        return torch.randn(batch, dim, seqlen).to(dtype)
    return torch.randn(batch, seqlen, dim).to(dtype).transpose(1, 2)


def conv1d_silu(x, weight, bias):
    dim, width = weight.shape
    out = F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=dim)
    return F.silu(out[..., : x.shape[-1]])


def unrolled(x, weight, bias):
    """Pad, multiply, add: what torch.compile makes one loop of."""
    width, seqlen = weight.shape[1], x.shape[-1]
    padded = F.pad(x, (width - 1, 0))
    total = bias[:, None]
    for k in range(width):
        total = total + weight[:, k, None] * padded[..., k : k + seqlen]
    return F.silu(total)


def compiled(x, weight, bias):
    """torch.compile of unrolled, or the reason why there is none."""
    torch.compiler.reset()
    try:
        function = torch.compile(unrolled, dynamic=False)
        function(x, weight, bias)
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return function, None


@torch.no_grad()
def row(shape, name, layout, threads, rounds=15, with_compile=True, clock=time.perf_counter):
    """One row of the table as a dict, times in milliseconds; None where something did not run."""
    torch.set_num_threads(threads)
    batch, dim, seqlen = shape
    dtype = DTYPES[name]
    x, dout = (make(*shape, layout, dtype) for _ in range(2))
    weight, bias = torch.randn(dim, WIDTH).to(dtype), torch.randn(dim).to(dtype)
    out, dx = torch.empty_like(x), torch.empty_like(x)
    dweight, dbias = torch.empty(dim, WIDTH), torch.empty(dim)
    contestants = {
        "copy": lambda: out.copy_(x),
        "forward": lambda: write_forward(x, weight, bias, None, None, out, None, True),
        "backward": lambda: write_backward(
            x, weight, bias, dout, None, None, None, dx, dweight, dbias, None, True
        ),
        "conv1d_silu": lambda: conv1d_silu(x, weight, bias),
    }
    reason = "left out"
    if with_compile:
        function, reason = compiled(x, weight, bias)
        if function is not None:
            contestants["torch_compile"] = lambda: function(x, weight, bias)
    best = least_times(contestants, rounds, ("conv1d_silu", "torch_compile"), clock)
    result = {"batch": batch, "dim": dim, "seqlen": seqlen, "dtype": name, "layout": layout}
    result["threads"] = threads
    for key in ("copy", "forward", "backward", "conv1d_silu", "torch_compile"):
        result[f"{key}_ms"] = best[key] * 1e3 if key in best else None
    if reason is not None:
        result["torch_compile_missing"] = reason
    result["forward_copies"] = best["forward"] / best["copy"]
    result["backward_copies"] = best["backward"] / (1.5 * best["copy"])
    result["conv1d_silu_over_forward"] = best["conv1d_silu"] / best["forward"]
    return result


@torch.no_grad()
def update_row(shape, name, threads, rounds=200, clock=time.perf_counter):
    """One token, width and state_len 4."""
    torch.set_num_threads(threads)
    batch, dim = shape
    dtype = DTYPES[name]
    x, state = torch.randn(batch, dim).to(dtype), torch.randn(batch, dim, WIDTH).to(dtype)
    weight, bias = torch.randn(dim, WIDTH).to(dtype), torch.randn(dim).to(dtype)
    out = torch.empty_like(x)

    def in_torch():
        state.copy_(torch.roll(state, -1, -1))
        state[..., -1] = x
        return F.silu((state * weight).sum(-1) + bias)

    best = least_times(
        {
            "update": lambda: write_update(x, state, weight, bias, out, True, None, None),
            "torch": in_torch,
        },
        rounds,
        ("torch",),
        clock,
    )
    result = {"batch": batch, "dim": dim, "dtype": name, "threads": threads}
    return result | {f"{key}_us": seconds * 1e6 for key, seconds in best.items()}


def rows(
    shapes=SHAPES,
    dtypes=tuple(DTYPES),
    layouts=LAYOUTS,
    threads=(1, 2),
    rounds=15,
    with_compile=True,
    clock=time.perf_counter,
):
    """Yields the rows of forward and backward, one after the other as they are measured."""
    for count in threads:
        for shape in shapes:
            for name in dtypes:
                for layout in layouts:
                    yield row(shape, name, layout, count, rounds, with_compile, clock)


def update_rows(
    shapes=UPDATE_SHAPES, dtypes=tuple(DTYPES), threads=(1, 2), clock=time.perf_counter
):
    for count in threads:
        for shape in shapes:
            for name in dtypes:
                yield update_row(shape, name, count, clock=clock)


HEADER = (
    "threads batch    dim seqlen type layout  copy ms   fwd ms  copies   bwd ms  copies"
    "  conv1d+silu ms  / fwd  torch.compile ms"
)


def line(r):
    compile_ms = r["torch_compile_ms"]
    return (
        f"{r['threads']:7d} {r['batch']:5d} {r['dim']:6d} {r['seqlen']:6d} {r['dtype']}"
        f" {r['layout']:6s} {r['copy_ms']:8.2f} {r['forward_ms']:8.2f} {r['forward_copies']:7.2f}"
        f" {r['backward_ms']:8.2f} {r['backward_copies']:7.2f} {r['conv1d_silu_ms']:15.1f}"
        f" {r['conv1d_silu_over_forward']:6.1f}"
        f" {'-' if compile_ms is None else format(compile_ms, '.1f'):>17s}"
    )


def cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            for text in file:
                if text.startswith("model name"):
                    return text.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--shapes", default=",".join("x".join(map(str, s)) for s in SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--clock", choices=("wall", "thread"), default="wall")
    parser.add_argument("--json", help="file to write the rows to")
    args = parser.parse_args()
    threads = [int(count) for count in args.threads.split(",")]
    if args.clock == "thread" and threads != [1]:
        parser.error("--clock thread needs --threads 1: it sees one thread")
    clock = time.thread_time if args.clock == "thread" else time.perf_counter
    dtypes = args.dtypes.split(",")
    isa = _library.cpu.text("causal_conv1d_cpu_isa")
    cpu = cpu_name()
    print(f"{cpu}, {isa} kernels, torch {torch.__version__}, {causal_conv1d.__version__}")
    print(HEADER)
    report = {
        "cpu": cpu,
        "isa": isa,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "version": causal_conv1d.__version__,
        "clock": args.clock,
        "command": " ".join(sys.argv),
        "rows": [],
        "update": [],
    }
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    for r in rows(
        shapes,
        dtypes,
        args.layouts.split(","),
        threads,
        args.rounds,
        not args.no_compile,
        clock,
    ):
        report["rows"].append(r)
        print(line(r), flush=True)
    for r in update_rows(dtypes=dtypes, threads=threads, clock=clock):
        report["update"].append(r)
        print(
            f"update {r['batch']:4d} x {r['dim']:5d} {r['dtype']}, {r['threads']} threads:"
            f" {r['update_us']:9.1f} us, in torch {r['torch_us']:9.1f}",
            flush=True,
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
