"""Times the selective scan and the update of its state on the CPU, beside the formula in torch's
operations, a step at a time, as mamba_ssm's selective_scan_ref has it, and copies of the states.

    python benchmarks/benchmark_scan.py --device cpu --json docs/benchmark_scan_cpu.json

Contestants are called in turn, and the least time of each counts. The backward includes all
gradients. CAUSAL_CONV1D_CPU_ISA=avx2 takes the kernels of machines without AVX-512. With --clock
thread and one thread, the time is the thread's own, without what others took.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from pathlib import Path

import torch
from benchmark_cpu import cpu_name, least_times

import causal_conv1d
from causal_conv1d import _library, selective_scan_fn, selective_state_update
from causal_conv1d.reference import selective_scan_ref

# batch, dim, seqlen; with one group, 16 states and a gate
SHAPES = ((1, 1536, 512), (1, 1536, 2048), (1, 5120, 256))
DSTATE = 16
# batch, dim
UPDATES = ((1, 1536), (64, 4096))
NAMES = "u delta A B C D z delta_bias".split()


def scan_inputs(batch, dim, seqlen):
    return {
        "u": torch.randn(batch, dim, seqlen),
        "delta": torch.randn(batch, dim, seqlen) / 2,
        "A": -torch.randn(dim, DSTATE).exp(),
        "B": torch.randn(batch, 1, DSTATE, seqlen),
        "C": torch.randn(batch, 1, DSTATE, seqlen),
        "D": torch.randn(dim),
        "z": torch.randn(batch, dim, seqlen),
        "delta_bias": torch.randn(dim) - 3,
    }


@torch.no_grad()
def scan_row(shape, threads, rounds, clock=time.perf_counter):
    torch.set_num_threads(threads)
    inputs = scan_inputs(*shape)
    given, dout = [inputs[name] for name in NAMES], torch.randn(shape)
    needed = (1 << len(NAMES)) - 1
    contestants = {
        "forward": lambda: selective_scan_fn(*given, delta_softplus=True),
        "plain_forward": lambda: selective_scan_ref(*given, delta_softplus=True),
        "backward": lambda: torch.ops.causal_conv1d.scan_backward(
            *given, None, None, True, dout, None, needed
        ),
    }
    ours, plain = contestants["forward"](), contestants["plain_forward"]()
    assert (ours - plain).norm() < 1e-5 * plain.norm()
    best = least_times(contestants, rounds, ("plain_forward",), clock)
    return {
        "batch x dim x seqlen": " x ".join(map(str, shape)),
        "dstate": DSTATE,
        "dtype": "fp32",
        "threads": threads,
        "forward_ms": 1e3 * best["forward"],
        "plain_forward_ms": 1e3 * best["plain_forward"],
        "plain over forward": best["plain_forward"] / best["forward"],
        "backward_ms": 1e3 * best["backward"],
    }


@torch.no_grad()
def update_row(shape, dtype, threads, rounds, clock=time.perf_counter):
    torch.set_num_threads(threads)
    batch, dim = shape
    state = torch.randn(batch, dim, DSTATE).to(dtype)
    room = torch.empty_like(state)
    x, dt, z = (torch.randn(shape).to(dtype) for _ in range(3))
    B, C = (torch.randn(batch, DSTATE).to(dtype) for _ in range(2))
    A, D, bias = -torch.rand(dim, DSTATE), torch.randn(dim), torch.randn(dim)
    best = least_times(
        {
            "update": lambda: selective_state_update(state, x, dt, A, B, C, D, z, bias, True),
            "copy": lambda: room.copy_(state),
        },
        rounds,
        clock=clock,
    )
    return {
        "batch x dim": f"{batch} x {dim}",
        "dstate": DSTATE,
        "dtype": str(dtype)[6:],
        "threads": threads,
        "update_us": 1e6 * best["update"],
        "copy of the state us": 1e6 * best["copy"],
        "copies": best["update"] / best["copy"],
    }


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=("wall", "thread"), default="wall")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    threads = [int(count) for count in args.threads.split(",")]
    if args.clock == "thread" and threads != [1]:
        parser.error("--clock thread needs --threads 1: it sees one thread")
    clock = time.thread_time if args.clock == "thread" else time.perf_counter
    report = {
        "cpu": cpu_name(),
        "isa": _library.cpu.text("causal_conv1d_cpu_isa"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "version": causal_conv1d.__version__,
        "date": datetime.date.today().isoformat(),
        "clock": args.clock,
        "command": " ".join(sys.argv),
        "scan": [],
        "state_update": [],
    }
    torch.manual_seed(0)
    for count in threads:
        for shape in SHAPES:
            report["scan"].append(scan_row(shape, count, args.rounds, clock))
            print(report["scan"][-1], flush=True)
        for shape in UPDATES:
            for dtype in (torch.float32, torch.bfloat16):
                row = update_row(shape, dtype, count, 20 * args.rounds, clock)
                report["state_update"].append(row)
                print(row, flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
