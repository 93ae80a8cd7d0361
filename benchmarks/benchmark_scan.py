"""Times the selective scan and the update of its state on a GPU, beside a copy and, with
``--compiled``, mamba_ssm's own kernels.

    python benchmarks/benchmark_scan.py [--compiled FILE] [--json docs/benchmark_scan_h200.json]
    python benchmarks/benchmark_scan.py --sms 16     # the same on 16 of the GPU's SMs
    python benchmarks/benchmark_scan.py --device cpu --json docs/benchmark_scan_cpu.json

FILE is what benchmarks/mamba_kernels/build.sh makes of mamba_ssm's sources. Medians of CUDA graph
replays (with --sms of plain calls) over buffers in turn, so that none is served from L2 where there
are several; both kernels are timed in turn. The backward includes all gradients. "copy" is one of
u, for the update one of the state, to other buffers in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import statistics
import sys
from pathlib import Path

import torch

import causal_conv1d
from causal_conv1d import selective_scan_fn, selective_state_update

sys.path.insert(0, str(Path(__file__).resolve().parent))

# batch, dim, seqlen, dstate, groups, dtype, with z
ROWS = (
    (1, 1536, 2048, 16, 1, "bf16", True),
    (8, 2048, 2048, 16, 1, "bf16", True),
    (8, 2048, 2048, 16, 1, "fp32", False),
    (1, 2048, 16384, 16, 1, "bf16", True),
    (2, 5120, 4096, 16, 1, "bf16", True),
    (8, 768, 3136, 1, 4, "fp32", False),
    (8, 768, 3136, 16, 4, "fp32", False),
    (1, 512, 1600, 16, 4, "fp32", False),
)
# batch, dim, dstate, dtype of the state; the token is bf16
UPDATES = (
    (1, 1536, 16, "fp32"),
    (64, 4096, 16, "fp32"),
    (256, 8192, 16, "fp32"),
    (64, 4096, 16, "bf16"),
    (256, 8192, 16, "bf16"),
    (64, 4096, 128, "fp32"),
)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = "u delta A B C D z delta_bias".split()
BYTES = 300e6  # of the buffers that take turns: several times L2
MOST_SETS = 8
AHEAD = 4_000_000  # clocks for the host to start calls in, so that it is not what is timed


def graph_of(function):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def medians(functions, repeats, calls, graph=True):
    """Times in ms of one of the calls that each function makes, measured in turn."""
    if graph:
        functions = {name: graph_of(function).replay for name, function in functions.items()}
    times = {name: [] for name in functions}
    for _ in range(repeats + 2):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if not graph:
                torch.cuda._sleep(AHEAD)
            start.record()
            function()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / calls)
    return {name: statistics.median(found[2:]) for name, found in times.items()}


def scan_inputs(batch, dim, seqlen, dstate, groups, dtype, z):
    def rand(*shape, dtype=DTYPES[dtype]):
        return torch.randn(*shape, device="cuda", dtype=dtype)

    return {
        "u": rand(batch, dim, seqlen),
        "delta": rand(batch, dim, seqlen) / 2,
        "A": -rand(dim, dstate, dtype=torch.float32).exp(),
        "B": rand(batch, groups, dstate, seqlen),
        "C": rand(batch, groups, dstate, seqlen),
        "D": rand(dim, dtype=torch.float32),
        "z": rand(batch, dim, seqlen) if z else None,
        "delta_bias": rand(dim, dtype=torch.float32) - 3,
    }


def over_sets(sets, call):
    return lambda: [call(one) for one in sets]


def scan_row(case, compiled, repeats, graph=True):
    batch, dim, seqlen, dstate, groups, dtype, z = case
    size = batch * dim * seqlen * DTYPES[dtype].itemsize * (7 if z else 5)
    sets = [scan_inputs(*case) for _ in range(max(1, min(MOST_SETS, int(BYTES / size))))]
    for one in sets:
        one["dout"], one["copy"] = torch.randn_like(one["u"]), torch.empty_like(one["u"])

    def forward(one):
        return selective_scan_fn(*(one[name] for name in NAMES), delta_softplus=True)

    # A bit for each gradient: see docs/selective_scan.md.
    needed = sum(1 << i for i, name in enumerate(NAMES) if sets[0][name] is not None)

    def backward(one):
        return torch.ops.causal_conv1d.scan_backward(
            *(one[name] for name in NAMES), None, None, True, one["dout"], None, needed
        )

    copy = {"copy": over_sets(sets, lambda one: one["copy"].copy_(one["u"]))}
    ways = {"forward": {"ours": forward}, "backward": {"ours": backward}}
    if compiled:
        ways["forward"]["mamba_ssm"] = compiled.forward
        ways["backward"]["mamba_ssm"] = compiled.backward
    row = {
        "batch x dim x seqlen": f"{batch} x {dim} x {seqlen}",
        "dstate": dstate,
        "groups": groups,
        "dtype": dtype,
        "z": "yes" if z else "no",
    }
    for way, calls in ways.items():
        if compiled and way == "backward":
            for one in sets:
                compiled.forward(one)
        if compiled:
            same(way, *(calls[name](sets[0]) for name in ("ours", "mamba_ssm")), dtype)
        functions = {name: over_sets(sets, call) for name, call in calls.items()}
        functions |= copy if way == "forward" else {}
        found = medians(functions, repeats, len(sets), graph)
        row |= {f"{way}_us": 1e3 * found["ours"]}
        if compiled:
            row[f"mamba_ssm_{way}_us"] = 1e3 * found["mamba_ssm"]
        if way == "forward":
            row["copy_us"] = 1e3 * found["copy"]
    return row


def same(way, ours, theirs, dtype):
    """What is timed has to be the same computation."""
    ours, theirs = (t if isinstance(t, torch.Tensor) else t[0] for t in (ours, theirs))
    error = (ours - theirs).float().norm() / theirs.float().norm()
    assert error < (1e-2 if dtype == "bf16" else 1e-4), (way, error.item())


def update_row(case, repeats, graph=True):
    batch, dim, dstate, dtype = case

    def rand(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device="cuda", dtype=dtype)

    count = max(1, min(3 * MOST_SETS, int(BYTES / (batch * dim * dstate * DTYPES[dtype].itemsize))))
    states = [rand(batch, dim, dstate, dtype=DTYPES[dtype]) for _ in range(count)]
    rooms = [torch.empty_like(state) for state in states]
    x, dt, z, B, C = (rand(batch, size) for size in (dim, dim, dim, dstate, dstate))
    A = -torch.rand(dim, dstate, device="cuda")
    D, bias = (rand(dim, dtype=torch.float32) for _ in range(2))

    def update(state):
        return selective_state_update(state, x, dt, A, B, C, D, z, bias, True)

    functions = {"ours": over_sets(states, update)}
    functions["copy"] = lambda: [a.copy_(b) for a, b in zip(rooms, states, strict=True)]
    found = medians(functions, repeats, count, graph)
    # What has to be moved besides the state, which is read and written.
    more = sum(t.numel() * t.itemsize for t in (x, dt, z, x, A, D, bias, B, C))
    bytes_of_copy = 2 * states[0].numel() * states[0].itemsize
    return {
        "batch x dim x dstate": f"{batch} x {dim} x {dstate}",
        "state": dtype,
        "update_us": 1e3 * found["ours"],
        "copy_us": 1e3 * found["copy"],
        "of the copy's rate": found["copy"] / found["ours"] * (1 + more / bytes_of_copy),
    }


@contextlib.contextmanager
def confined(sms):
    """Everything runs on this many SMs, if any."""
    if not sms:
        yield
        return
    green = torch.cuda.green_contexts.GreenContext.create(sms, 0)
    green.set_context()
    yield
    green.pop_context()


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--compiled", metavar="FILE", help="mamba_ssm's kernels")
    parser.add_argument("--sms", type=int, help="use this many of the GPU's SMs")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if args.device == "cpu":
        import benchmark_scan_cpu

        return benchmark_scan_cpu.main(["--json", str(args.json)] if args.json else [])
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    compiled = None
    peer = {"missing": "no --compiled FILE was given"}
    if args.compiled:
        from mamba_kernels.kernels import Kernels

        compiled = Kernels(args.compiled)
        peer = {"version": compiled.version}
    report = {
        "device": torch.cuda.get_device_name(),
        "sms": args.sms,
        "torch": torch.__version__,
        "version": causal_conv1d.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(sys.argv),
        "peers": {"mamba_ssm": peer},
        "scan": [],
        "state_update": [],
    }
    torch.manual_seed(0)
    graph = not args.sms  # graphs do not keep to them
    with torch.no_grad(), confined(args.sms):
        for section, cases, measure in (
            ("scan", ROWS, lambda case: scan_row(case, compiled, args.repeats, graph)),
            ("state_update", UPDATES, lambda case: update_row(case, args.repeats, graph)),
        ):
            for case in cases:
                row = measure(case)
                report[section].append(row)
                print(*(number(value) for value in row.values()), sep="  ", flush=True)
    if compiled:
        for way in ("forward", "backward"):
            ratios = [row[f"mamba_ssm_{way}_us"] / row[f"{way}_us"] for row in report["scan"]]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            print(f"{way}: mamba_ssm's time over ours, geometric mean {mean:.2f}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def number(value):
    return f"{value:.4g}" if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
