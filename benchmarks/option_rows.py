"""Packed sequences, gates, a residual and a dilation: sections of benchmark.py.

packed: rows of documents of random lengths, beside the same row as one sequence. gates: what LFM2,
LFM3 and Inkling have around the convolution, beside a copy of as many bytes as the call must move.
dilation: Qwen4-Exp's, beside the same call without.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import peers
import torch

from causal_conv1d._dispatch import call_without_grad

ops = torch.ops.causal_conv1d

PACKED_SHAPES = ((1, 8192, 16384), (1, 10240, 32768))
DOCUMENTS = (32, 128, 512)
COPIED = 1 << 26  # elements at once, 256 MB of fp32


class Gated(NamedTuple):
    model: str
    dim: int
    width: int
    around: tuple[str, ...]
    dtype: str = "bf16"


GATES = ("pre_gate", "post_gate")
GATED = (
    Gated("LFM2-MoE", 2048, 3, GATES),
    Gated("LFM2", 2560, 3, GATES),
    Gated("LFM3-1.7B", 2048, 7, GATES),
    Gated("Inkling", 6144, 4, ("residual",), "fp32"),
)
GATED_BATCH, GATED_SEQLEN = 4, 8192
DILATED = (("Qwen4-Exp's PLE", (1, 10240, 8192), 4, 3),)


class Buffers:
    """What one call of the forward and of the backward reads and writes."""

    def __init__(self, make, weight, bias, around=(), cu_seqlens=None):
        self.x, self.out, self.dx = make(), make(), make()
        self.around = {name: make() if name in around else None for name in (*GATES, "residual")}
        self.dgates = [make() if name in around else None for name in GATES]
        self.weight, self.bias, self.cu_seqlens = weight, bias, cu_seqlens
        self.dweight = torch.empty_like(weight)
        self.dbias = None if bias is None else torch.empty_like(bias)

    def forward(self, dilation, silu):
        ids = (None, self.cu_seqlens, None)
        inputs = (self.x, self.weight, self.bias, *ids, *self.around.values())
        call_without_grad(ops.conv_forward_out, *inputs, self.out, None, dilation, silu)

    def backward(self, dilation, silu):
        inputs = (self.x, self.weight, self.bias, self.out, None, self.cu_seqlens, None, None)
        gates = [self.around[name] for name in GATES]
        written = (self.dx, self.dweight, self.dbias, None, *self.dgates)
        rest = (dilation, False, silu)
        call_without_grad(ops.conv_backward_out, *inputs, *gates, *written, *rest)


def bounds_of(documents, total, device):
    """Boundaries of documents of random lengths, of at least one token."""
    generator = torch.Generator().manual_seed(documents)
    inner = torch.randperm(total - 1, generator=generator)[: documents - 1] + 1
    bounds = torch.cat([torch.tensor([0]), inner.sort().values, torch.tensor([total])])
    return bounds.to(device=device, dtype=torch.int32)


def copy_time(tensors, like, time):
    """Of as many bytes as are read and written where so many tensors are."""
    count = like.numel() * tensors // 2
    pairs = [[like.new_empty(count) for _ in range(2)] for _ in range(2)]

    def copy(to, of):  # of more than 512 MB at once torch's copy is a third slower on an H200
        for a, b in zip(to.split(COPIED), of.split(COPIED), strict=True):
            a.copy_(b)

    return time([lambda a=a, b=b: copy(a, b) for a, b in pairs])


def both_times(time, buffers, dilation=1, silu=True):
    return {
        "forward_us": time([lambda b=b: b.forward(dilation, silu) for b in buffers]),
        "backward_us": time([lambda b=b: b.backward(dilation, silu) for b in buffers]),
    }


def row_of(shape, layout, dtype, width, **more) -> dict[str, Any]:
    batch, dim, seqlen = shape
    row = {"batch": batch, "dim": dim, "seqlen": seqlen, "dtype": dtype, "layout": layout}
    return row | {"width": width} | more


def parameters(dim, width, dtype, device):
    return torch.randn(dim, width, device=device).to(dtype), torch.randn(dim, device=device).to(
        dtype
    )


def packed_cases():
    return [
        (s, layout, n) for s in PACKED_SHAPES for layout in ("first", "last") for n in DOCUMENTS
    ]


def measure_packed(args, time, name, dtype, tensor, copies):
    dense = {}
    for shape, layout, documents in packed_cases():
        weight, bias = parameters(shape[1], 4, dtype, args.device)
        n = copies(shape[1] * shape[2] * dtype.itemsize)

        def buffers(bounds):
            def make():
                return tensor(shape, layout, dtype, args.device)  # noqa: B023

            return [Buffers(make, weight, bias, (), bounds) for _ in range(n)]  # noqa: B023

        if (shape, layout) not in dense:
            dense[shape, layout] = both_times(time, buffers(None))
        bounds = bounds_of(documents, shape[2], args.device)
        own = buffers(bounds)
        row = row_of(shape, layout, name, 4, documents=documents, dense=dense[shape, layout])
        row |= both_times(time, own)
        add_peers(row, args, time, own, bounds)
        yield row


def add_peers(row, args, time, buffers, bounds):
    """The times of those that know packed sequences."""
    found, missing = peers.find()
    row |= {"others_us": {}, "others_backward_us": {}, "others_missing": {}}
    if "FLA" not in args.others:
        return
    if "FLA" not in found:
        row["others_missing"]["FLA"] = missing.get("FLA", "not found")
        return
    peer = found["FLA"]
    if peer.layout not in (None, row["layout"]):
        row["others_missing"]["FLA"] = f"it takes channel-{peer.layout} alone"
        return
    try:
        packing = peer.packing(bounds)
        with torch.no_grad():
            row["others_us"]["FLA"] = time(
                [lambda b=b: peer.forward(b.x, b.weight, b.bias, True, **packing) for b in buffers]
            )
            row["others_backward_us"]["FLA"] = time(
                [
                    lambda b=b: peer.backward(b.x, b.out, b.weight, b.bias, True, **packing)
                    for b in buffers
                ]
            )
    except Exception as error:  # a form that it refuses ends no run
        row["others_missing"]["FLA"] = peers.one_line(error)


def gated_cases():
    return [(case, layout) for case in GATED for layout in ("first", "last")]


def measure_gates(args, time, dtypes, tensor, copies):
    for case, layout in gated_cases():
        shape, dtype = (GATED_BATCH, case.dim, GATED_SEQLEN), dtypes[case.dtype]
        weight, _ = parameters(case.dim, case.width, dtype, args.device)
        n = copies(shape[0] * shape[1] * shape[2] * dtype.itemsize)

        def make():
            return tensor(shape, layout, dtype, args.device)  # noqa: B023

        own = [Buffers(make, weight, None, case.around) for _ in range(n)]
        gates = sum(name in GATES for name in case.around)
        words = {"model": case.model, "around": list(case.around)}
        row = row_of(shape, layout, case.dtype, case.width, **words)
        row["copy_us"] = copy_time(2 + len(case.around), own[0].x, time)
        row["backward_copy_us"] = copy_time(3 + 2 * gates, own[0].x, time)
        row |= both_times(time, own, silu=False)
        yield row


def dilated_cases():
    return [(case, layout) for case in DILATED for layout in ("first", "last")]


def measure_dilation(args, time, name, dtype, tensor, copies):
    for (model, shape, width, dilation), layout in dilated_cases():
        weight, bias = parameters(shape[1], width, dtype, args.device)
        n = copies(shape[1] * shape[2] * dtype.itemsize)

        def make():
            return tensor(shape, layout, dtype, args.device)  # noqa: B023

        own = [Buffers(make, weight, bias) for _ in range(n)]
        row = row_of(shape, layout, name, width, model=model, dilation=dilation)
        row["dense"] = both_times(time, own)
        yield row | both_times(time, own, dilation)
