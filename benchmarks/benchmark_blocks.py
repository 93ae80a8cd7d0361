"""Times Mamba and Mamba2 blocks of mamba_ssm and of transformers, forward and backward, with this
library and without.

    python benchmarks/benchmark_blocks.py [mamba_ssm] [transformers] [--dtype bf16]

It needs CUDA, and mamba_ssm or transformers. Of mamba_ssm "fused" is the block as it is, on this
library; "slow path" has mamba_ssm's fused forward and backward switched off; "nn.Conv1d" is what
mamba_ssm does where causal_conv1d is not installed; "nn.Conv1d, ref. scan" has its
selective_scan_ref as well, so no kernel but PyTorch's (on the smallest shape only).

Of transformers "library and mamba_ssm" is the block with both installed, "plain PyTorch" with
neither, and with one of them the other's part is in plain PyTorch; "library alone, its scan" is
after causal_conv1d.use_in_transformers(). In evaluation mode, as in training transformers takes
mamba_ssm's fused function, which needs both ("fused"). The calls of this library's operators are
counted, so that no row is about another path than it says. Without mamba_ssm its rows are left out.

Medians of CUDA events around one call each.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import statistics
import sys
from contextlib import nullcontext, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest import mock

import torch

import causal_conv1d

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "ecosystem"))

# (batch, seqlen, d_model); the inner width is twice d_model.
SHAPES = ((1, 2048, 768), (8, 2048, 1024), (1, 16384, 1024))
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def milliseconds(function, repeats):
    function()
    function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def forward_backward(function, inputs, repeats):
    """Times of function() and of its gradient with respect to inputs."""
    with torch.no_grad():
        forward = milliseconds(function, repeats)
    grad = torch.randn_like(function())

    def both():
        torch.autograd.grad(function(), inputs, grad)

    return forward, milliseconds(both, repeats)


def as_row(what, shape, forward, both, first):
    """Times in ms; first is what the time with backward is told relative to."""
    return {
        "what": what,
        "shape": " x ".join(map(str, shape)),
        "forward_ms": forward,
        "forward_backward_ms": both,
        "relative": both / first,
    }


def blocks(dtype, shapes, repeats):
    import mamba_ssm
    from mamba_ssm.modules import mamba2, mamba_simple
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    no_conv1d = {"causal_conv1d_fn": None}
    # Variant: is the fused path on, and what is replaced in which module.
    variants = {
        "Mamba": {
            "fused": (True, mamba_simple, {}),
            "slow path": (False, mamba_simple, {}),
            "nn.Conv1d": (False, mamba_simple, no_conv1d),
            "nn.Conv1d, ref. scan": (
                False,
                mamba_simple,
                no_conv1d | {"selective_scan_fn": selective_scan_ref},
            ),
        },
        "Mamba2": {
            "fused": (True, mamba2, {}),
            "slow path": (False, mamba2, {}),
            "nn.Conv1d": (False, mamba2, no_conv1d),
        },
    }
    for batch, seqlen, width in shapes:
        for kind, rows in variants.items():
            torch.manual_seed(0)
            layer = getattr(mamba_ssm, kind)(width, device="cuda", dtype=dtype)
            u = torch.randn(batch, seqlen, width, device="cuda", dtype=dtype, requires_grad=True)
            inputs, fused_time = [u, *layer.parameters()], None
            for name, (fused, module, replaced) in rows.items():
                if "ref. scan" in name and batch * seqlen > 2048:
                    continue  # minutes: it keeps all states, and its backward is worse
                layer.use_fast_path = layer.use_mem_eff_path = fused
                with mock.patch.multiple(module, **replaced) if replaced else nullcontext():
                    forward, both = forward_backward(partial(layer, u), inputs, repeats)
                fused_time = fused_time or both
                yield as_row(f"{kind}, {name}", (batch, seqlen, width), forward, both, fused_time)


def transformers_blocks(dtype, shapes, repeats):
    import transformers
    from operator_calls import OperatorCalls
    from test_transformers import import_model

    from causal_conv1d import _transformers

    library, kernels, own_scan = "causal_conv1d", "mamba_ssm", "library alone, its scan"
    # Variant: what is hidden, in training mode or not, and forward calls of the library in a step
    # of training; the fused one computes the convolution again.
    variants = {
        "fused": ((), True, 2),
        "library and mamba_ssm": ((), False, 1),
        "mamba_ssm alone": ((library,), False, 0),
        own_scan: ((kernels,), False, 1),
        "library alone": ((kernels,), False, 1),
        "plain PyTorch": ((library, kernels), False, 0),
    }
    if importlib.util.find_spec(kernels) is None:
        variants = {name: what for name, what in variants.items() if kernels in what[0]}
    for batch, seqlen, width in shapes:
        configs = {
            "Mamba2": transformers.Mamba2Config(
                hidden_size=width,
                num_hidden_layers=1,
                num_heads=2 * width // 64,
                head_dim=64,
                n_groups=1,
            ),
            "Mamba": transformers.MambaConfig(hidden_size=width, num_hidden_layers=1),
        }
        for kind, config in configs.items():
            fused_time = None
            for name, (hidden, training, calls) in variants.items():
                # The scan is then a Python loop over seqlen.
                is_loop = kind == "Mamba" and kernels in hidden and name != own_scan
                if is_loop and batch * seqlen > 2048:
                    continue
                module = import_model(kind.lower(), ("fla", "mambapy", *hidden))
                if name == own_scan:
                    _transformers._replace(module)
                torch.manual_seed(0)
                layer = getattr(module, f"{kind}Mixer")(config, layer_idx=0)
                layer = layer.to("cuda", dtype).train(training)
                u = torch.randn(batch, seqlen, width, device="cuda", dtype=dtype)
                u.requires_grad_()
                with OperatorCalls() as counted:
                    torch.autograd.grad(layer(u).sum(), u)
                found = (counted.forward, counted.backward)
                assert found == (calls, min(calls, 1)), (kind, name, found)
                inputs = [u, *(p for p in layer.parameters())]
                forward, both = forward_backward(
                    partial(layer, u), inputs, 2 if is_loop else repeats
                )
                fused_time = fused_time or both
                what = f"transformers {kind}, {name}"
                yield as_row(what, (batch, seqlen, width), forward, both, fused_time)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("parts", nargs="*", help="of mamba_ssm, transformers; default: all")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    dtype = DTYPES[arguments.dtype]
    report = about(arguments)
    print(f"{report['device']}, torch {torch.__version__}, {arguments.dtype}")
    print(f"{'':42}{'shape':>18}{'forward, ms':>14}{'with backward':>15}{'times':>8}")
    parts = {"mamba_ssm": blocks, "transformers": transformers_blocks}
    for part in arguments.parts or parts:
        rows = report.setdefault("blocks", [])
        try:
            for row in parts[part](dtype, SHAPES, arguments.repeats):
                rows.append(row)
                print(
                    f"{row['what']:42}{row['shape']:>18}{row['forward_ms']:14.2f}"
                    f"{row['forward_backward_ms']:15.2f}{row['relative']:8.2f}",
                    flush=True,
                )
        except ImportError as error:  # named, so that its rows do not vanish silently
            report["peers"][part] = {"missing": f"{type(error).__name__}: {error}"}
            print(f"{part} is missing: {error}")
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def about(arguments):
    """On what, with what and when; write_pages.py shows it."""
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for package in ("mamba_ssm", "transformers", "triton"):
        with suppress(PackageNotFoundError):
            report[package] = version(package)
    report |= {"version": causal_conv1d.__version__, "dtype": arguments.dtype, "peers": {}}
    return report | {"date": datetime.date.today().isoformat(), "command": " ".join(sys.argv)}


if __name__ == "__main__":
    sys.exit(main())
