"""Random cases of the selective scan in shards."""

import random
import warnings

import torch
import torch.distributed as dist
from distributed_cases import boundaries, leaf, on_device, own_steps, part_lengths

from causal_conv1d import selective_scan_cp, selective_scan_fn

NAMES = "u delta A B C D z delta_bias initial_states".split()
# The relative error in the 2-norm, by the type of a tensor. Composed maps round differently.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float64: 1e-12}


def random_case(rng, ranks):
    layout = rng.choice(("contiguous", "zigzag"))
    lengths, given = part_lengths(rng, ranks * (2 if layout == "zigzag" else 1), rng.choice((2, 7)))
    total, packed = sum(lengths), rng.random() < 0.5
    bounds = boundaries(rng, total) if packed else None
    if packed:
        bounds[-1] = total
    batch = 1 if packed else rng.randrange(1, 3)
    dim, dstate = rng.choice((4, 8)), rng.choice((1, 3, 16))
    dtype = rng.choice((torch.float32, torch.float64, torch.bfloat16))
    other = dtype if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))

    def values(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def projection():
        kind = rng.randrange(3)
        if kind == 0:
            return values(dim, dstate)
        return values(batch, dstate, total) if kind == 1 else values(batch, 2, dstate, total)

    def sometimes(tensor):
        return tensor if rng.random() < 0.5 else None

    B = projection()
    C = projection() if B.dim() == 2 else values(*B.shape)
    rows = batch if bounds is None else len(bounds) - 1
    tensors = [
        values(batch, dim, total),
        values(batch, dim, total).abs() * 0.3,
        -values(dim, dstate, dtype=other).abs(),
        B,
        C,
        sometimes(values(dim, dtype=other)),
        sometimes(values(batch, dim, total)),
        sometimes(values(dim, dtype=other) * 0.1),
        sometimes(values(rows, dim, dstate, dtype=other)),
    ]
    return {
        "layout": layout,
        "lengths": lengths,
        "given": given,
        "bounds": bounds,
        "softplus": rng.random() < 0.5,
        "last": rng.random() < 0.5,
        "dout": values(batch, dim, total),
        "dlast": values(rows, dim, dstate, dtype=other),
        "tensors": tensors,
        "seed": rng.randrange(1 << 30),
    }


def in_time(name, tensor):
    return name in ("u", "delta", "z") or (name in ("B", "C") and tensor.dim() > 2)


def shard(name, tensor, steps):
    if tensor is None or not in_time(name, tensor):
        return leaf(tensor)
    return leaf(tensor[..., steps])


def compare(name, found, wanted, whole):
    """whole: what wanted is a part of, as a scale."""
    error = (found.double() - wanted.double()).norm()
    limit = LIMITS[wanted.dtype] * whole.double().norm()
    assert error <= limit, f"{name}: {error:.1e}, at most {limit:.1e}"


def run_case(case, rank, ranks):
    given = [leaf(tensor) for tensor in case["tensors"]]
    bounds = case["bounds"]
    if bounds is not None:  # every other element of a tensor
        bounds = torch.tensor(bounds, device=given[0].device).repeat_interleave(2)[::2]
    *tensors, states = given
    args = (*tensors, case["softplus"], True)
    out, last = selective_scan_fn(*args, initial_states=states, cu_seqlens=bounds)
    leaves = [tensor for tensor in given if tensor is not None]
    loss, dloss = [out], [case["dout"]]
    if case["last"]:
        loss, dloss = [out, last], [case["dout"], case["dlast"].to(last.dtype)]
    wanted = torch.autograd.grad(loss, leaves, dloss)

    steps = own_steps(case["lengths"], case["layout"], rank, ranks)
    *mine, states = [shard(name, t, steps) for name, t in zip(NAMES, given, strict=True)]
    own = [tensor for tensor in (*mine, states) if tensor is not None]
    found = selective_scan_cp(
        *mine,
        case["softplus"],
        case["last"],
        initial_states=states,
        cu_seqlens=bounds,
        layout=case["layout"],
        lengths=case["lengths"] if case["given"] else None,
    )
    own_out, own_last = found if case["last"] else (found, None)
    compare("out", own_out, out[..., steps], out)
    loss, dloss = [own_out], [case["dout"][..., steps]]
    if case["last"]:
        compare("last states", own_last, last, last)
        one = rank == case["seed"] % ranks
        loss = [own_out, own_last]
        dloss.append(case["dlast"].to(last.dtype) * one)
    gradients = torch.autograd.grad(loss, own, dloss)
    names = [name for name, tensor in zip(NAMES, given, strict=True) if tensor is not None]
    for name, got, want in zip(names, gradients, wanted, strict=True):
        if in_time(name, want):
            compare(name, got, want[..., steps], want)
        else:
            got = got.double()
            dist.all_reduce(got)
            compare(name, got, want, want)


def random_cases(seeds, device="cpu"):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    warnings.filterwarnings("error", "torch.searchsorted")
    for seed in seeds:
        case = on_device(random_case(random.Random(seed), ranks), device)
        case["tensors"] = [t if t is None else t.to(device) for t in case["tensors"]]
        try:
            run_case(case, rank, ranks)
        except Exception as error:
            told = {k: v for k, v in case.items() if k not in ("tensors", "dout", "dlast")}
            raise AssertionError(f"rank {rank} of {ranks}, seed {seed}: {told}") from error
