"""Times forward, backward and update beside a copy of the same bytes, all in one run.

    python benchmarks/benchmark.py                     # an NVIDIA GPU: everything below
    python benchmarks/benchmark.py --sections models   # one part, of those below
    python benchmarks/benchmark.py --sms 16            # the same on 16 of its SMs
    python benchmarks/benchmark.py --device cpu        # the CPU: benchmark_cpu.py
    python benchmarks/benchmark.py --upstream FILE     # and upstream's causal_conv1d_cuda*.so
    python benchmarks/benchmark.py --list              # what would be timed; needs no GPU

rows: the plain case by shape, type and layout. models: the convolutions of released models
(models.py). options: what states, seq_idx, widths and views cost. packed, gates, dilation: calls
with those (option_rows.py). update: one token. host: the time of a call. write_pages.py makes
tables of the --json.

GPU times are medians of CUDA graph replays over buffers that are rotated so that none is served
from L2, with a pause before each. "of copy" is the time of a copy of x divided by the forward's
time, and 1.5 times that copy divided by the backward's, since it reads x and dout and writes dx.
Other implementations (peers.py) are timed in the same way; upstream's dweight and dbias are fp32
and not zeroed here. One that is missing is named, with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import statistics
import subprocess
import sys
from time import perf_counter, sleep

import models
import option_rows
import peers
import torch

import causal_conv1d
from causal_conv1d import _library
from causal_conv1d.cpp_functions import write_backward, write_forward, write_update

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
OPTIONS_SHAPE = (2, 4096, 8192)
UPSTREAM_WIDTH = 4
SECTIONS = ("rows", "models", "options", "packed", "gates", "dilation", "update", "host")
UPDATE_SHAPES = ((1, 2048), (64, 4096), (256, 8192))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = ("first", "last")
# Seconds before each timing: without them an H200 reaches its power limit after a few rows and
# lowers its clock, by up to a quarter, for those that follow.
PAUSE = 0.15


def time_gpu(calls, seconds=0.05, graph=True):
    """Median microseconds of one of calls, which are run in rotation."""
    torch.cuda.synchronize()
    sleep(PAUSE)
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = max(1, -(-20 // len(calls)))

    def run():
        for _ in range(rounds):
            for call in calls:
                call()

    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        run = captured.replay
    run()
    times = []
    total = 0.0
    while total < seconds or len(times) < 7:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        elapsed = start.elapsed_time(stop)
        times.append(elapsed * 1e3 / (rounds * len(calls)))
        total += elapsed * 1e-3
    return statistics.median(times)


def copies(size_bytes):
    """How many buffers of a size are needed for none to stay in a cache."""
    return max(2, min(64, -(-400_000_000 // size_bytes)))


def tensor(shape, layout, dtype, device):
    """Random numbers; layout: first, last, or one of VIEWS."""
    batch, dim, seqlen = shape
    if layout == "first":
        return torch.randn(batch, dim, seqlen, device=device).to(dtype)
    if layout == "last":
        return torch.randn(batch, seqlen, dim, device=device).to(dtype).transpose(1, 2)
    return VIEWS[layout](batch, dim, seqlen, device, dtype)


# Parts of wider tensors, as models take them.
VIEWS = {
    "first: half of the channels": lambda b, d, n, device, dtype: torch.randn(
        b, 2 * d, n, device=device
    ).to(dtype)[:, :d],
    "first: from step 1 on": lambda b, d, n, device, dtype: torch.randn(
        b, d, n + 1, device=device
    ).to(dtype)[:, :, 1:],
    "last: part of the columns": lambda b, d, n, device, dtype: (
        torch.randn(b, n, d + 264, device=device).to(dtype)[:, :, 128 : 128 + d].transpose(1, 2)
    ),
}


def measure(shape, layout, name, time, device, width=4, options=(), upstream=None):
    """One row: times of a copy, the forward and the backward."""
    dtype = DTYPES[name]
    batch, dim, seqlen = shape
    n = copies(batch * dim * seqlen * dtype.itemsize)
    xs = [tensor(shape, layout, dtype, device) for _ in range(n)]
    outs = [torch.empty_like(x) for x in xs]
    weight = torch.randn(dim, width, device=device).to(dtype)
    bias = None if "no bias" in options else torch.randn(dim, device=device).to(dtype)
    silu = "no activation" not in options
    ids = before = after = None
    if "seq_idx" in options:  # some sequences a row
        ids = (torch.arange(seqlen, device=device) // (seqlen // 5)).int().expand(batch, -1)
        ids = ids.contiguous()
    if "states" in options:
        before, after = (torch.zeros(batch, dim, width - 1, device=device, dtype=dtype),) * 2
        after = torch.empty_like(before)
    row = {"batch": batch, "dim": dim, "seqlen": seqlen, "dtype": name, "layout": layout}
    row |= {"width": width, "options": list(options)}
    # torch has two plain vector kernels; either may fall short for a shape, so the better counts.
    # Views are measured against a copy of as many contiguous bytes.
    ys = xs if layout in LAYOUTS else [torch.empty_like(o) for o in outs]
    copy = time([lambda o=o, y=y: o.copy_(y) for y, o in zip(ys, outs, strict=True)])
    negate = time([lambda o=o, y=y: torch.neg(y, out=o) for y, o in zip(ys, outs, strict=True)])
    row["copy_us"] = min(copy, negate)
    del ys
    row["forward_us"] = time(
        [
            lambda o=o, x=x: write_forward(x, weight, bias, ids, before, o, after, silu)
            for x, o in zip(xs, outs, strict=True)
        ]
    )
    dxs = [torch.empty_like(x) for x in xs]
    dweight, dbias = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
    dbefore = None if before is None else torch.empty_like(before)
    row["backward_us"] = time(
        [
            lambda o=o, x=x, d=d: write_backward(
                x, weight, bias, o, ids, before, after, d, dweight, dbias, dbefore, silu
            )
            for x, o, d in zip(xs, outs, dxs, strict=True)
        ]
    )
    if upstream is not None and width > UPSTREAM_WIDTH:
        row["upstream_missing"] = f"it has no width above {UPSTREAM_WIDTH}"
    elif upstream is not None:
        row["upstream_forward_us"] = time(
            [
                lambda o=o, x=x: upstream.causal_conv1d_fwd(
                    x, weight, bias, ids, before, o, after, silu
                )
                for x, o in zip(xs, outs, strict=True)
            ]
        )
        dweight, dbias = dweight.float(), None if dbias is None else dbias.float()
        row["upstream_backward_us"] = time(
            [
                lambda o=o, x=x, d=d: upstream.causal_conv1d_bwd(
                    x, weight, bias, o, ids, before, after, d, dweight, dbias, dbefore, silu
                )
                for x, o, d in zip(xs, outs, dxs, strict=True)
            ]
        )
    row["forward_of_copy"] = row["copy_us"] / row["forward_us"]
    row["backward_of_copy"] = 1.5 * row["copy_us"] / row["backward_us"]
    return row


def measure_others(row, time, device, names):
    """Adds the times of other implementations, by name, to a row of measure()."""
    shape = row["batch"], row["dim"], row["seqlen"]
    layout, dtype = row["layout"], DTYPES[row["dtype"]]
    xs = [tensor(shape, layout, dtype, device) for _ in range(2)]
    dout = tensor(shape, layout.partition(":")[0], dtype, device)
    weight = torch.randn(row["dim"], row["width"], device=device).to(dtype)
    bias = None if "no bias" in row["options"] else torch.randn(row["dim"], device=device).to(dtype)
    silu = "no activation" not in row["options"]
    found, missing = peers.find()
    missing = {name: reason for name, reason in missing.items() if name in names}
    row |= {"others_us": {}, "others_backward_us": {}, "others_missing": missing}
    for name in (name for name in names if name in found):
        peer = found[name]
        if peer.layout not in (None, layout.partition(":")[0]):
            row["others_missing"][name] = f"it takes channel-{peer.layout} alone"
            continue
        forwards = [lambda x=x, f=peer.forward: f(x, weight, bias, silu) for x in xs]
        backwards = [lambda x=x, f=peer.backward: f(x, dout, weight, bias, silu) for x in xs]
        try:
            with torch.no_grad():
                row["others_us"][name] = time(forwards)
                if peer.backward is not None:
                    row["others_backward_us"][name] = time(backwards)
        except Exception as error:  # a form that it refuses ends no run
            row["others_missing"][name] = peers.one_line(error)
    return row


def measure_update(
    shape, name, time, device, state_layout="contiguous", options=(), upstream=None, width=4
):
    """One row: times of an update with state_len = width, and of a copy of the bytes it reads."""
    dtype = DTYPES[name]
    batch, dim = shape
    n = copies(batch * dim * dtype.itemsize * 2 * (width + 1))
    xs = [torch.randn(batch, dim, device=device).to(dtype) for _ in range(n)]
    if state_layout == "contiguous":
        states = [torch.randn(batch, dim, width, device=device).to(dtype) for _ in range(n)]
    else:
        states = [torch.randn(batch, width, dim, device=device).to(dtype).mT for _ in range(n)]
    weight = torch.randn(dim, width, device=device).to(dtype)
    bias = None if "no bias" in options else torch.randn(dim, device=device).to(dtype)
    silu = "no activation" not in options
    outs = [torch.empty_like(x) for x in xs]
    seqlens = indices = None
    if "ring" in options:
        seqlens = torch.randint(0, 100, (batch,), device=device, dtype=torch.int32)
    if "indices" in options:
        indices = torch.randperm(batch, device=device).int()
    row = {"batch": batch, "dim": dim, "dtype": name, "state": state_layout}
    row["options"] = list(options)
    ys = [torch.randn(batch, dim, width + 1, device=device).to(dtype) for _ in range(n)]
    zs = [torch.empty_like(y) for y in ys]
    row["copy_us"] = time([lambda y=y, z=z: z.copy_(y) for y, z in zip(ys, zs, strict=True)])

    def time_update(update):
        return time(
            [
                lambda x=x, s=s, o=o: update(x, s, weight, bias, o, silu, seqlens, indices)
                for x, s, o in zip(xs, states, outs, strict=True)
            ]
        )

    row["update_us"] = time_update(write_update)
    if upstream is not None and width > UPSTREAM_WIDTH:
        row["upstream_missing"] = f"it has no width above {UPSTREAM_WIDTH}"
    elif upstream is not None:  # it takes three dimensions alone
        row["upstream_us"] = time_update(
            lambda x, s, w, b, o, *rest: upstream.causal_conv1d_update(
                x.unsqueeze(-1), s, w, b, o.unsqueeze(-1), *rest
            )
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


def print_row(row, plain=None):
    label = " ".join([f"W={row['width']}", *row["options"]])
    of_plain = ""
    if plain is not None:
        ratios = (row[k] / plain[k] for k in ("forward_us", "backward_us"))
        of_plain = "  plain row x {:.2f} / {:.2f}".format(*ratios)
    if "upstream_forward_us" in row:
        ratios = (row[f"upstream_{k}"] / row[k] for k in ("forward_us", "backward_us"))
        of_plain += "  upstream / ours {:.2f} / {:.2f}".format(*ratios)
    print(
        f"{row['batch']:5d} {row['dim']:6d} {row['seqlen']:6d} {row['dtype']} {row['layout']:6s}"
        f" {row['copy_us']:8.1f} {row['forward_us']:8.1f} {row['forward_of_copy']:8.3f}"
        f" {row['backward_us']:8.1f} {row['backward_of_copy']:8.3f}  {label}{of_plain}",
        flush=True,
    )


def row_cases(names):
    return [(shape, layout, name) for name in names for shape in SHAPES for layout in LAYOUTS]


def option_cases():
    """Layout, width and options, by what they are compared with."""
    cases = []
    for layout in LAYOUTS:
        cases += [(layout, 4, (option,)) for option in ("seq_idx", "states")]
        cases += [(layout, 4, (option,)) for option in ("no bias", "no activation")]
        cases += [(layout, width, ()) for width in (2, 3, 5, 6, 7, 8)]
        cases += [(view, 4, ()) for view in VIEWS if view.startswith(layout)]
    return cases


def update_cases(names):
    cases = [(shape, name, "contiguous", ()) for shape in UPDATE_SHAPES for name in names]
    for state in ("contiguous", "dim fastest"):
        for options in ((), ("indices",), ("ring",)):
            if state != "contiguous" or options:
                cases.append((UPDATE_SHAPES[-1], names[0], state, options))
    return cases


def measure_rows(args, time, names):
    for shape, layout, name in row_cases(names):
        row = measure(shape, layout, name, time, args.device, upstream=args.upstream)
        if args.others and name == names[0]:
            measure_others(row, time, args.device, args.others)
        print_row(row)
        yield row


def measure_models(args, time, names, seqlen=models.SEQLEN, batch=models.DECODE_BATCH):
    for model in models.MODELS:
        options = models.options(model)
        shape = (1, model.dim, seqlen)
        arguments = (time, args.device, model.width, options, args.upstream)
        row = models.labels(model) | measure(shape, model.layout, model.dtype, *arguments)
        if args.others:
            names = [name for name in args.others if name != "torch.compile"]  # minutes
            measure_others(row, time, args.device, names)
        row["decode"] = measure_update(
            (batch, model.dim),
            model.dtype,
            time,
            args.device,
            "contiguous",
            options,
            args.upstream,
            model.width,
        )
        print_row(row)
        yield row


def measure_options(args, time, names):
    plain = {
        layout: measure(OPTIONS_SHAPE, layout, names[0], time, args.device) for layout in LAYOUTS
    }
    for layout, width, options in option_cases():
        row = measure(OPTIONS_SHAPE, layout, names[0], time, args.device, width, options)
        row["plain"] = plain[layout.partition(":")[0]]
        print_row(row, row["plain"])
        yield row


def measure_updates(args, time, names):
    for shape, name, state, options in update_cases(names):
        row = measure_update(shape, name, time, args.device, state, options, args.upstream)
        print(
            f"update {shape[0]:4d} x {shape[1]:5d} {name} state {state}"
            f" {' '.join(options)}: {row['update_us']:.2f} us, copy {row['copy_us']:.2f}"
            + (f", upstream {row['upstream_us']:.2f}" if "upstream_us" in row else ""),
            flush=True,
        )
        yield row


def print_special(row, base):
    """A row of option_rows.py beside what it is compared with: forward and backward."""
    words = [
        row.get("model", ""),
        *(f"{k} {row[k]}" for k in ("documents", "dilation") if k in row),
    ]
    times = [f"{row[k]:.1f} us, {base[k]:.1f}" for k in ("forward_us", "backward_us")]
    shape = f"{row['batch']} x {row['dim']} x {row['seqlen']}"
    form = f"{row['dtype']} {row['layout']} W={row['width']}"
    print(f"{' '.join(w for w in words if w)}: {shape} {form}: {' / '.join(times)}", flush=True)


def measure_packed(args, time, names):
    for row in option_rows.measure_packed(args, time, names[0], DTYPES[names[0]], tensor, copies):
        print_special(row, row["dense"])
        yield row


def measure_gates(args, time, names):
    for row in option_rows.measure_gates(args, time, DTYPES, tensor, copies):
        copied = {"forward_us": row["copy_us"], "backward_us": row["backward_copy_us"]}
        print_special(row, copied)
        yield row


def measure_dilation(args, time, names):
    for row in option_rows.measure_dilation(args, time, names[0], DTYPES[names[0]], tensor, copies):
        print_special(row, row["dense"])
        yield row


MEASURE = {
    "rows": measure_rows,
    "models": measure_models,
    "options": measure_options,
    "packed": measure_packed,
    "gates": measure_gates,
    "dilation": measure_dilation,
    "update": measure_updates,
}


def measure_gpu(report, args, time):
    """Adds the sections to the report, which is written after each of them."""
    report["peers"] = peers.described(args.others, args.upstream)
    for name, found in report["peers"].items():
        print(f"{name}: {found.get('version') or 'missing: ' + found['missing']}")
    if "models" in args.sections:
        report["models_not_timed"] = models.NOT_TIMED
    print("batch    dim seqlen type layout  copy us   fwd us  of copy   bwd us  of copy")
    for section in args.sections:
        if section in MEASURE:
            report[section] = list(MEASURE[section](args, time, args.dtypes))
            write(report, args.json)
    if "host" in args.sections:
        report["host_us"] = measure_host(args)
        write(report, args.json)


def write(report, path):
    if path:
        with open(path, "w") as file:
            json.dump(report, file, indent=1)


def list_cases(args):
    """What would be timed, a line each."""
    found = {
        "rows": row_cases(args.dtypes),
        "models": models.MODELS,
        "options": option_cases(),
        "packed": option_rows.packed_cases(),
        "gates": option_rows.gated_cases(),
        "dilation": option_rows.dilated_cases(),
        "update": update_cases(args.dtypes),
        "host": ["calls of tiny tensors"],
    }
    for section in args.sections:
        for case in found[section]:
            words = case if isinstance(case, str) else ", ".join(str(w) for w in case if w != "")
            print(f"{section}: {words}")


def measure_host(args):
    times = host_times(args.device)
    for label, microseconds in times.items():
        ratio = microseconds / times["x + x"]
        print(f"host time of {label}: {microseconds:.1f} us, {ratio:.2f} x + x")
    return times


def code_of_library():
    """What the CUDA library has code for: sm_90 is machine code, compute_80 PTX."""
    if _library.cuda.problem is not None:
        return None
    return _library.cuda.text("causal_conv1d_cuda_architectures")


def about(args):
    """On what, with what and when."""
    report = {
        "device": torch.cuda.get_device_name(args.device),
        "sms": args.sms,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "version": causal_conv1d.__version__,
        "code": code_of_library(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(sys.argv),
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split()
        report["driver"] = driver[0] if driver else None
    return report


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="a CUDA device, or cpu")
    parser.add_argument("--dtypes", default="bf16,fp16,fp32", type=lambda text: text.split(","))
    parser.add_argument("--sms", type=int, help="use this many of the GPU's SMs")
    parser.add_argument(
        "--sections",
        type=lambda text: text.split(","),
        help=f"of {','.join(SECTIONS)}; default: all, with --sms rows,options,update",
    )
    parser.add_argument(
        "--others",
        default=",".join(peers.NAMES),
        type=lambda text: [name for name in text.split(",") if name],
        help="other implementations to time; FLA takes 20 s for each dim and width at first",
    )
    parser.add_argument(
        "--upstream",
        type=peers.load_upstream,
        metavar="FILE",
        help="upstream's causal_conv1d_cuda*.so",
    )
    parser.add_argument("--host", action="store_true", help="as --sections host")
    parser.add_argument("--list", action="store_true", help="print what would be timed")
    parser.add_argument("--json", help="file to write the rows to")
    args = parser.parse_args(arguments)
    default = ["rows", "options", "update"] if args.sms else list(SECTIONS)
    args.sections = ["host"] if args.host else args.sections or default
    for option, given, known in (
        ("--sections", args.sections, SECTIONS),
        ("--others", args.others, peers.NAMES),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"{option}: {unknown[0]!r} is none of {', '.join(known)}")
    if args.list:
        return list_cases(args)
    if args.device == "cpu":
        import benchmark_cpu

        return benchmark_cpu.main(["--json", args.json] if args.json else [])
    report = about(args)
    print(f"{report['device']}, torch {torch.__version__}, causal_conv1d {report['version']}")
    if args.sms:
        green = torch.cuda.green_contexts.GreenContext.create(args.sms, 0)
        green.set_context()
        args.others = []  # they are for the whole GPU
        measure_gpu(report, args, lambda calls: time_gpu(calls, 0.05, graph=False))
        green.pop_context()
    else:
        measure_gpu(report, args, time_gpu)


if __name__ == "__main__":
    main()
