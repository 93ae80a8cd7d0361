"""The selective scan and its backward at random: cases and their comparison with the reference."""

import torch
from helpers import FLOATS, Layout, assert_untouched_outside
from scan_helpers import INPUTS, OPTIONAL, PROJECTION_LAYOUTS, assert_scan, make_scan


def random_layout(rng):
    """Of three dimensions; half of them dense."""
    order = tuple(rng.sample(range(3), 3))
    if rng.random() < 0.5:
        return Layout(order, (1, 1, 1), (0, 0, 0), (0, 0, 0))

    def each(*choices):
        return tuple(rng.choice(choices) for _ in order)

    return Layout(order, each(1, 1, 1, 2, 3), each(0, 0, 1, 3, 8), each(0, 0, 1, 2, 8))


def random_case(rng, device):
    """What make_scan takes, by name, softplus, and the layout of what is written."""
    groups, dtype = rng.choice((1, 1, 2, 3)), rng.choice((*FLOATS, torch.float64))
    dim = groups * rng.choice((1, 3, 8, 20, 32, 33, 64, 70))
    dstate = rng.choice((1, 2, 3, 4, 8, 15, 16, 16, 16, 17, 32, 33, 64, 65, 100, 256))
    seqlen = rng.choice((1, 2, 7, 8, 9, 31, 63, 64, 65, 127, 128, 130, 200, 256, 257, 300))
    if dstate > 33:  # or the reference takes most of the time
        dim, seqlen = min(dim, groups * 20), min(seqlen, 130)
    bounds = None
    if rng.random() < 0.4:
        count, even = rng.randint(0, 8), seqlen // 8 * 8
        inner = [rng.choice((rng.randint(0, seqlen), even)) for _ in range(count)]
        bounds = [0, *sorted(inner), seqlen]
    mixed = dtype != torch.float64 and rng.random() < 0.3
    constant = rng.choice(("", "", "", "B", "C", "BC"))
    layouts = {}
    if rng.random() < 0.6:
        layouts = {name: random_layout(rng) for name in ("u", "delta", "z", "initial_states")}
        layouts |= {n: rng.choice(tuple(PROJECTION_LAYOUTS)) for n in "BC" if n not in constant}
    options = dict(
        batch=1 if bounds else rng.randint(1, 3),
        dim=dim,
        seqlen=seqlen,
        dstate=dstate,
        groups=groups,
        dtype=dtype,
        dtypes={name: rng.choice(FLOATS) if mixed else dtype for name in INPUTS},
        without=tuple(name for name in OPTIONAL if rng.random() < 0.4),
        constant=constant,
        bounds=bounds,
        layouts=layouts,
        device=device,
        seed=rng.randint(0, 1_000_000),
    )
    return options, rng.random() < 0.7, random_layout(rng)


def assert_case(options, softplus, where):
    # A sum of few terms may cancel.
    for tensor in assert_scan(make_scan(**options), softplus, where, allow_zero=True, factor=10):
        if tensor.dim() == 3:
            assert_untouched_outside(tensor)


def described(options, softplus, where):
    """In one line."""
    words = [f"{name}={value}" for name, value in options.items()]
    return ", ".join([*words, f"softplus={softplus}", f"written {where}"])
