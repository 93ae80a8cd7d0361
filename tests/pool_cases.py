"""Random calls of the operator ``pool``, and their comparison with plain operations in float64."""

import sys

import torch
from helpers import assert_close, on_cpu
from tolerances import FEW, OUT

from causal_conv1d import _pool_plain
from causal_conv1d._ops import ops

WRITTEN = ("out", "conv_states", "windows_out")


def random_case(rng, device):
    """Arguments in the operator's order, by name, in a tuple."""
    dtype = rng.choice(list(OUT))
    state_dtype = dtype
    if dtype != torch.float64 and rng.random() < 0.2:
        state_dtype = rng.choice((torch.float32, torch.float16, torch.bfloat16))
    return (make(rng, device, dtype, state_dtype),)


def make(rng, device, dtype, state_dtype=None, *, width=None, ragged=None):
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))

    def randn(*shape, as_type=dtype):
        values = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return values.to(device, as_type)

    def ints(values):
        kind = rng.choice((torch.int32, torch.int64))
        return torch.tensor(values, dtype=kind, device=device)

    if width is None:
        width = rng.choice((1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 13))
    dim, slack = rng.choice((1, 4, 24, 40, 130, 136)), rng.choice((0, 0, 3, 8))
    lengths = [rng.choice((0, 1, 1, 2, 3, 5, 17, 60)) for _ in range(rng.randint(1, 9))]
    count, before, after = len(lengths), rng.randint(0, 2), rng.randint(0, 2)
    if ragged is None:
        ragged = rng.random() < 0.8
    if not ragged:
        lengths, before, after = [1] * count, 0, 0
    bounds = [before]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    total, state_len, slots = bounds[-1] + after, width - 1 + rng.randint(0, 4), count + 2
    x = randn(dim, total)
    if rng.random() < 0.7:
        x = randn(total, dim + slack)[:, :dim].t()
    states = randn(slots, dim, state_len, as_type=state_dtype or dtype)
    if rng.random() < 0.5:
        states = states.mT.contiguous().mT
    accepted, flag = rng.random() < 0.4, rng.choice((torch.bool, torch.uint8, torch.int64))
    pad = rng.choice((-1, 0))
    slot = [pad if rng.random() < 0.2 else s for s in rng.sample(range(slots), count)]
    windows = randn(count + 1, 3, dim * (width - 1)) if rng.random() < 0.4 else None
    first_columns = [rng.randint(1, state_len - width + 2) for _ in lengths]
    return {
        "x": x,
        "conv_states": states,
        "weight": randn(dim, width),
        "bias": randn(dim) if rng.random() < 0.5 else None,
        "out": torch.full_like(x, 7),
        "query_start_loc": ints(bounds) if ragged else None,
        "cache_indices": ints(slot) if rng.random() < 0.8 else None,
        "has_initial_state": None if accepted else (ints(lengths) % 2 == 0).to(flag),
        "num_accepted_tokens": ints(first_columns) if accepted else None,
        "windows_out": windows,
        "window_indices": None if windows is None else ints(rng.sample(range(count + 1), count)),
        "pad_slot": pad,
        "max_seqlen": rng.choice((0, max(lengths))),
        "silu": rng.random() < 0.5,
    }


def copied(arguments):
    """The same, with what is written in memory of its own."""
    return arguments | {n: t.clone() for n in WRITTEN if (t := arguments[n]) is not None}


def plain_results(arguments, function=torch.Tensor.double):
    """The arguments after the plain operations, on function of their floats."""
    plain = {
        name: function(value) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in on_cpu(copied(arguments)).items()
    }
    _pool_plain.pool(*plain.values())
    return plain


def assert_out(out, expected, arguments):
    """A sum of few terms may cancel: then its error is relative to the terms' magnitudes."""
    terms = None
    if out.numel() < FEW:
        magnitudes = plain_results(arguments | {"silu": False}, lambda value: value.double().abs())
        terms = magnitudes["out"]
    assert_close(out, expected, OUT[out.dtype], terms, allow_zero=True, name="out")


def assert_case(arguments):
    plain = plain_results(arguments)
    apart = copied(arguments)
    assert ops.pool(*apart.values()) is None
    assert_out(apart["out"], plain["out"], arguments)
    for name in WRITTEN[1:]:
        if arguments[name] is not None:
            assert torch.equal(apart[name].cpu(), plain[name].to(apart[name].dtype)), name
    stand_in = getattr(sys.modules.get("gpu_stand_in"), "installed", False)
    if arguments["weight"].shape[1] > 8 and (arguments["x"].is_cuda or stand_in):
        return
    again = copied(arguments)
    again["x"] = again["out"] = arguments["x"].clone(memory_format=torch.preserve_format)
    ops.pool(*again.values())
    for name in WRITTEN:
        if arguments[name] is not None:
            assert torch.equal(again[name], apart[name]), f"{name}, in place"


def described(arguments):
    """In one line."""
    parts = []
    for name, value in arguments.items():
        if torch.is_tensor(value) and value.is_floating_point():
            value = f"{tuple(value.shape)} {value.stride()} {value.dtype}"
        elif torch.is_tensor(value):
            value = value.tolist()
        parts.append(f"{name}={value}")
    return ", ".join(parts)
