"""Cases of selective_state_update, at random too, and their comparison with the reference."""

import torch
from helpers import (
    FLOATS,
    assert_close,
    assert_untouched_outside,
    lay_out,
    layout,
    on_cpu,
    randn,
)
from tolerances import FEW, SCAN

from causal_conv1d import selective_state_update
from causal_conv1d.reference import selective_state_update_ref

NAMES = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
# Whose magnitudes are those of the terms that out sums.
SUMMED = ("state", "x", "B", "C", "D")
STATE_LAYOUTS = {
    "contiguous": layout((0, 1, 2, 3)),
    "state_first": layout((0, 1, 3, 2)),
    "slice": layout((0, 1, 2, 3), leads=(1, 0, 1, 2), tails=(1, 1, 0, 3)),
    "strided": layout((1, 0, 2, 3), steps=(1, 2, 1, 2)),
}


def make_update(
    batch=3,
    heads=4,
    dim=6,
    dstate=5,
    groups=2,
    dtype=torch.float32,
    *,
    dtypes=None,
    without=(),
    indices=None,
    rows=None,
    where="contiguous",
    device="cpu",
    seed=0,
):
    """The arguments by name; heads 0: mamba_ssm's forms without them."""
    h, g = ((heads,), (groups,)) if heads else ((), ())
    shapes = {
        "state": (rows or batch, *h, dim, dstate),
        "x": (batch, *h, dim),
        "dt": (batch, *h, dim),
        "A": (*h, dim, dstate),
        "B": (batch, *g, dstate),
        "C": (batch, *g, dstate),
        "D": (*h, dim),
        "z": (batch, *h, dim),
        "dt_bias": (*h, dim),
    }
    found = {}
    for i, (name, shape) in enumerate(shapes.items()):
        values = randn(*shape, dtype=torch.float64, seed=100 * seed + i, device=device)
        if name == "A":
            values = -values.exp()
        elif name in ("dt", "dt_bias"):
            values = values.abs() / 2
        values = values.to((dtypes or {}).get(name, dtype))
        if name == "state" and heads:
            values = lay_out(values, STATE_LAYOUTS[where])
        found[name] = None if name in without else values
    if indices is not None:
        indices = torch.tensor(indices, device=device)
    return found | {"state_batch_indices": indices}


def assert_update(arguments, softplus):
    """The function agrees with the reference, in out and in the state."""
    wide = {
        name: value.double() if value is not None and value.is_floating_point() else value
        for name, value in on_cpu(arguments).items()
    }
    state = wide["state"] = wide["state"].clone()
    terms = None
    if arguments["x"].numel() < FEW:  # a sum of which may cancel
        magnitudes = {name: wide[name].abs() for name in SUMMED if wide[name] is not None}
        terms = selective_state_update_ref(**(wide | magnitudes), dt_softplus=softplus)
    expected = selective_state_update_ref(**wide, dt_softplus=softplus)
    out = selective_state_update(**arguments, dt_softplus=softplus)
    x = arguments["x"]
    assert out.dtype == x.dtype and out.shape == x.shape
    finite = expected.isfinite()
    assert torch.equal(finite, out.isfinite().cpu())
    terms = None if terms is None else terms[finite]
    assert_close(out.cpu()[finite], expected[finite], SCAN[out.dtype], terms, name="out")
    assert_close(arguments["state"], state, SCAN[arguments["state"].dtype], name="state")
    return out


def random_case(rng, device):
    """The arguments by name, and dt_softplus."""
    groups, batch, rows = rng.choice((1, 1, 2, 3)), rng.choice((1, 2, 3, 5, 33)), 40
    dtype = rng.choice((*FLOATS, torch.float64))
    mixed = dtype != torch.float64 and rng.random() < 0.5
    indices = None
    if rng.random() < 0.5:
        first, *others = rng.sample(range(rows), batch)
        indices = [first, *(-1 if rng.random() < 0.2 else row for row in others)]
    arguments = make_update(
        batch=batch,
        heads=groups * rng.randint(1, 3),
        dim=rng.choice((1, 2, 7, 16, 33, 64, 130)),
        dstate=rng.choice((1, 2, 3, 4, 7, 8, 16, 16, 33, 64, 128, 256)),
        groups=groups,
        dtype=dtype,
        dtypes={name: rng.choice(FLOATS) if mixed else dtype for name in NAMES},
        without=tuple(name for name in ("D", "z", "dt_bias") if rng.random() < 0.4),
        indices=indices,
        rows=None if indices is None else rows,
        where=rng.choice(tuple(STATE_LAYOUTS)),
        device=device,
        seed=rng.randint(0, 1_000_000),
    )
    return arguments, rng.random() < 0.7


def assert_case(arguments, softplus):
    assert_update(arguments, softplus)
    assert_untouched_outside(arguments["state"])


def described(arguments, softplus):
    """In one line."""
    words = [f"softplus={softplus}"]
    for name, value in arguments.items():
        if name == "state_batch_indices":
            words.append(f"{name}={None if value is None else value.tolist()}")
        elif value is not None:
            words.append(f"{name}={tuple(value.shape)} {value.stride()} {value.dtype}")
    return ", ".join(words)
