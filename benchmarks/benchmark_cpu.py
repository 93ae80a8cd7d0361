"""Times forward, backward and update on the CPU beside a copy of the same bytes, all in one run.

    python benchmarks/benchmark_cpu.py --json cpu.json

Shapes first, then the convolutions of released models (models.py), one token, and what gates, a
residual, dilation and packed sequences cost; --sections chooses.

Each row interleaves its contestants, round by round, and takes the least time of each, so that
other load on the machine falls on all alike. "copies" is the forward's time divided by that of a
copy of x (torch's copy_), and the backward's divided by 1.5 such copies, since it reads x and dout
and writes dx. With --clock thread and one thread, the time is the thread's own, without what others
took.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time

import models
import peers
import torch
import torch.nn.functional as F

import causal_conv1d
from causal_conv1d import _library
from causal_conv1d._ops import ops
from causal_conv1d.cpp_functions import write_backward, write_forward, write_update

# batch, dim, seqlen
SHAPES = ((2, 4096, 4096), (1, 2048, 2048))
UPDATE_SHAPES = ((1, 2048), (64, 4096), (256, 8192))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = ("first", "last")
SECTIONS = ("rows", "models", "update", "forms")
# Of x (1, dim, seqlen), beside the plain form of the same shape.
FORM_SHAPE = (1, 2048, 8192)
FORMS = {
    "32 sequences": {"sequences": 32},
    "128 sequences": {"sequences": 128},
    "two gates": {"gates": True},
    "two gates, width 3, no activation": {"gates": True, "width": 3, "silu": False},
    "residual": {"residual": True},
    "dilation 2": {"dilation": 2},
}


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
    """Random numbers; after "first:" or "last:" comes a view of a wider tensor."""
    wider = dim * 2 if ":" in layout else dim
    if layout.startswith("first"):
        return torch.randn(batch, wider, seqlen).to(dtype)[:, :dim]
    return torch.randn(batch, seqlen, wider).to(dtype).transpose(1, 2)[:, :dim]


def unrolled(x, weight, bias, silu):
    """Pad, multiply, add: what torch.compile makes one loop of."""
    width, seqlen = weight.shape[1], x.shape[-1]
    padded = F.pad(x, (width - 1, 0))
    total = 0.0 if bias is None else bias[:, None]
    for k in range(width):
        total = total + weight[:, k, None] * padded[..., k : k + seqlen]
    return F.silu(total) if silu else total


def compiled(*arguments):
    """torch.compile of unrolled, or the reason why there is none."""
    torch.compiler.reset()
    try:
        function = torch.compile(unrolled, dynamic=False)
        function(*arguments)
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return function, None


@torch.no_grad()
def row(
    shape,
    name,
    layout,
    threads,
    rounds=15,
    with_compile=True,
    clock=time.perf_counter,
    width=4,
    options=(),
):
    """One row of the table as a dict, times in milliseconds; None where something did not run."""
    torch.set_num_threads(threads)
    batch, dim, seqlen = shape
    dtype = DTYPES[name]
    x, dout = (make(*shape, layout, dtype) for _ in range(2))
    weight = torch.randn(dim, width).to(dtype)
    bias = None if "no bias" in options else torch.randn(dim).to(dtype)
    silu = "no activation" not in options
    out, dx = torch.empty_like(x), torch.empty_like(x)
    dweight, dbias = torch.empty(dim, width), None if bias is None else torch.empty(dim)
    arguments = (x, weight, bias, silu)
    contestants = {
        "copy": lambda: out.copy_(x),
        "forward": lambda: write_forward(x, weight, bias, None, None, out, None, silu),
        "backward": lambda: write_backward(
            x, weight, bias, dout, None, None, None, dx, dweight, dbias, None, silu
        ),
        "conv1d_silu": lambda: peers.conv1d_and_silu(*arguments),
    }
    reason = "left out"
    if with_compile:
        function, reason = compiled(*arguments)
        if function is not None:
            contestants["torch_compile"] = lambda: function(*arguments)
    best = least_times(contestants, rounds, ("conv1d_silu", "torch_compile"), clock)
    result = {"batch": batch, "dim": dim, "seqlen": seqlen, "dtype": name, "layout": layout}
    result |= {"threads": threads, "width": width, "options": list(options)}
    for key in ("copy", "forward", "backward", "conv1d_silu", "torch_compile"):
        result[f"{key}_ms"] = best[key] * 1e3 if key in best else None
    if reason is not None:
        result["torch_compile_missing"] = reason
    result["forward_copies"] = best["forward"] / best["copy"]
    result["backward_copies"] = best["backward"] / (1.5 * best["copy"])
    result["conv1d_silu_over_forward"] = best["conv1d_silu"] / best["forward"]
    return result


@torch.no_grad()
def update_row(shape, name, threads, rounds=200, clock=time.perf_counter, width=4, options=()):
    """One token, state_len = width."""
    torch.set_num_threads(threads)
    batch, dim = shape
    dtype = DTYPES[name]
    x, state = torch.randn(batch, dim).to(dtype), torch.randn(batch, dim, width).to(dtype)
    weight = torch.randn(dim, width).to(dtype)
    bias = None if "no bias" in options else torch.randn(dim).to(dtype)
    silu = "no activation" not in options
    out = torch.empty_like(x)

    def in_torch():
        state.copy_(torch.roll(state, -1, -1))
        state[..., -1] = x
        z = (state * weight).sum(-1)
        z = z if bias is None else z + bias
        return F.silu(z) if silu else z

    best = least_times(
        {
            "update": lambda: write_update(x, state, weight, bias, out, silu, None, None),
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


def model_rows(
    threads=(1, 2),
    rounds=15,
    with_compile=False,
    clock=time.perf_counter,
    seqlen=models.CPU_SEQLEN,
    batch=models.CPU_DECODE_BATCH,
):
    """Yields the rows of models.py."""
    for count in threads:
        for model in models.MODELS:
            form = {"clock": clock, "width": model.width, "options": models.options(model)}
            shape = (1, model.dim, seqlen)
            found = row(shape, model.dtype, model.layout, count, rounds, with_compile, **form)
            decode = update_row((batch, model.dim), model.dtype, count, 10 * rounds, **form)
            yield models.labels(model) | found | {"decode": decode}


@torch.no_grad()
def form_row(shape, name, layout, form, threads, rounds=15, clock=time.perf_counter):
    """One of FORMS beside the plain form and a copy. "of a copy" is the speed at which it moves its
    bytes, over that of a copy; the residual is x and adds none."""
    torch.set_num_threads(threads)
    _, dim, seqlen = shape
    dtype, how = DTYPES[name], FORMS[form]
    width, silu = how.get("width", 4), how.get("silu", True)
    x, dout, out, dx, gate, gate2, dgate, dgate2 = (make(*shape, layout, dtype) for _ in range(8))
    weight, bias = torch.randn(dim, width).to(dtype), torch.randn(dim).to(dtype)
    dweight, dbias = torch.empty(dim, width), torch.empty(dim)
    bounds = None
    if "sequences" in how:
        bounds = torch.arange(0, seqlen + 1, seqlen // how["sequences"], dtype=torch.int32)
    gates = (gate, gate2) if "gates" in how else (None, None)
    dgates = (dgate, dgate2) if "gates" in how else (None, None)
    residual, dilation = (x if "residual" in how else None), how.get("dilation", 1)

    def forward():
        tensors = (None, bounds, None, *gates, residual, out, None)
        ops.conv_forward_out(x, weight, bias, *tensors, dilation, silu)

    def backward():
        tensors = (None, bounds, None, None, *gates, dx, dweight, dbias, None, *dgates)
        is_x = residual is not None
        ops.conv_backward_out(x, weight, bias, dout, *tensors, dilation, is_x, silu)

    contestants = {
        "copy": lambda: out.copy_(x),
        "plain_forward": lambda: write_forward(x, weight, bias, None, None, out, None, silu),
        "plain_backward": lambda: write_backward(
            x, weight, bias, dout, None, None, None, dx, dweight, dbias, None, silu
        ),
        "forward": forward,
        "backward": backward,
    }
    best = least_times(contestants, rounds, (), clock)
    result = {"dim": dim, "seqlen": seqlen, "dtype": name, "layout": layout, "form": form}
    result |= {"threads": threads} | {f"{key}_ms": best[key] * 1e3 for key in contestants}
    more = 2 if "gates" in how else 0
    result["forward_of_a_copy"] = (2 + more) / 2 * best["copy"] / best["forward"]
    result["backward_of_a_copy"] = (3 + 2 * more) / 2 * best["copy"] / best["backward"]
    return result


def form_rows(
    dtypes=("bf16",), layouts=LAYOUTS, threads=(1, 2), rounds=15, clock=time.perf_counter
):
    for count in threads:
        for name in dtypes:
            for layout in layouts:
                for form in FORMS:
                    yield form_row(FORM_SHAPE, name, layout, form, count, rounds, clock)


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
        f" {'-' if compile_ms is None else format(compile_ms, '.1f'):>17s}  {r.get('model', '')}"
    )


def update_line(r):
    return (
        f"update {r['batch']:4d} x {r['dim']:5d} {r['dtype']}, {r['threads']} threads:"
        f" {r['update_us']:9.1f} us, in torch {r['torch_us']:9.1f}"
    )


def form_line(r):
    return (
        f"{r['form']:33s} {r['dim']} x {r['seqlen']} {r['dtype']} {r['layout']:5s}, {r['threads']}"
        f" threads: forward {r['forward_ms']:6.2f} ms, {r['forward_of_a_copy']:.2f} of a copy"
        f" (plain {r['plain_forward_ms']:.2f}), backward {r['backward_ms']:6.2f} ms,"
        f" {r['backward_of_a_copy']:.2f} (plain {r['plain_backward_ms']:.2f})"
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


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--shapes", default=",".join("x".join(map(str, s)) for s in SHAPES))
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--clock", choices=("wall", "thread"), default="wall")
    parser.add_argument("--json", help="file to write the rows to")
    args = parser.parse_args(arguments)
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
        "date": datetime.date.today().isoformat(),
        "clock": args.clock,
        "command": " ".join(sys.argv),
    }
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    with_compile = not args.no_compile
    measured = {
        "rows": rows(
            shapes, dtypes, args.layouts.split(","), threads, args.rounds, with_compile, clock
        ),
        "models": model_rows(threads, args.rounds, with_compile, clock),
        "update": update_rows(dtypes=dtypes, threads=threads, clock=clock),
        "forms": form_rows(layouts=args.layouts.split(","), threads=threads, rounds=args.rounds),
    }
    lines = {"update": update_line, "forms": form_line}
    for section in args.sections.split(","):
        if section not in measured:
            parser.error(f"--sections: {section!r} is none of {', '.join(SECTIONS)}")
        report[section] = []
        for r in measured[section]:
            report[section].append(r)
            print(lines.get(section, line)(r), flush=True)
    if "models" in report:
        report["models_not_timed"] = models.NOT_TIMED
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
