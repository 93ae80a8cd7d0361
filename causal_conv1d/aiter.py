"""AIter's ``causal_conv1d_fwd``, and the options of its test script as a command.

.. code-block:: text

    python -m causal_conv1d.aiter --batch 4 --dim 512 --seqlen 2048 --dtype float16 --use_silu

prints the error against the reference in float64 and the time of a call; the exit status is 1 if
the error is larger than what rounding explains.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

from .cpp_functions import write_forward
from .reference import TOLERANCE, causal_conv1d_ref

__all__ = ["causal_conv1d_fwd"]


def causal_conv1d_fwd(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    use_silu: bool,
) -> None:
    """Writes the causal convolution of x to out.

    Args:
        out: (batch, dim, seqlen), any strides; written.
        x: (batch, dim, seqlen), float16, bfloat16 or float32, on the CPU or a CUDA device, with any
            strides.
        weight: (dim, width), any width >= 1.
        bias: (dim,), or an empty tensor (or None) for none.
        use_silu: whether SiLU is applied to the result.

    Raises:
        RuntimeError: an argument of wrong shape, dtype or device; the message names it.

    Example::

        >>> x, weight = torch.randn(2, 64, 100), torch.randn(64, 4)
        >>> out = torch.empty_like(x)
        >>> causal_conv1d_fwd(out, x, weight, torch.empty(0), use_silu=True)
    """
    if bias is not None and bias.numel() == 0:
        bias = None
    write_forward(x, weight, bias, None, None, out, None, bool(use_silu))


def _time(function: Callable, device: torch.device) -> float:
    """The median time of a call in seconds, from the host's clock."""
    times = []
    for _ in range(30):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[10:])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m causal_conv1d.aiter", description="Error and time of causal_conv1d_fwd."
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--use_silu", action="store_true", help="apply SiLU")
    parser.add_argument("--no_bias", action="store_true", help="pass an empty tensor as bias")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    options = parser.parse_args(arguments)
    sizes = (options.batch, options.dim, options.seqlen, options.width)
    if min(sizes) < 1:
        parser.error("--batch, --dim, --seqlen and --width must be at least 1")

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    x = normal(options.batch, options.dim, options.seqlen)
    weight = normal(options.dim, options.width)
    bias = normal(0 if options.no_bias else options.dim)
    out = torch.empty_like(x)
    causal_conv1d_fwd(out, x, weight, bias, options.use_silu)
    expected = causal_conv1d_ref(
        x.double(),
        weight.double(),
        None if options.no_bias else bias.double(),
        activation="silu" if options.use_silu else None,
    )
    difference = out.double() - expected
    error = (difference.norm() / expected.norm()).item()
    seconds = _time(lambda: causal_conv1d_fwd(out, x, weight, bias, options.use_silu), device)

    settings = f"width {options.width}, {options.dtype}, {device}"
    settings += ", SiLU" if options.use_silu else ", no SiLU"
    settings += ", no bias" if options.no_bias else ", bias"
    print(f"batch {options.batch}, dim {options.dim}, seqlen {options.seqlen}, {settings}")
    print(f"largest error {difference.abs().max().item():.2e}, relative error {error:.2e}")
    print(f"time {seconds * 1e3:.4f} ms a call")
    if error <= TOLERANCE[dtype]:
        return 0
    print(f"FAILED: the relative error must be at most {TOLERANCE[dtype]:.1e}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
