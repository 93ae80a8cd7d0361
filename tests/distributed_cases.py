"""Random cases of the convolution in shards, and the whole call that they are compared with.

The functions here run on every rank of ``distributed_run``. Each rank makes the same whole and
takes its own shard of it.
"""

import random
import warnings

import torch
import torch.distributed as dist

from causal_conv1d import (
    causal_conv1d_cp,
    causal_conv1d_fn,
    causal_conv1d_varlen_fn,
    selective_scan_cp,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The relative error, in the 2-norm, of the sum of the ranks' shares of a gradient, by its dtype:
# each share is rounded to it.
SHARES = {
    torch.float32: 5e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 1.5e-3,
    torch.float64: 1e-12,
}


def part_lengths(rng, parts, width):
    """Of each part, from 0 to 3 W; None if all are equal."""
    kind = rng.randrange(3)
    if kind == 0:
        return [rng.randrange(3 * width + 1)] * parts, False
    if kind == 1:  # mostly short ones, so that a halo comes from several ranks
        return [rng.choice((0, 1, 1, 2, width)) for _ in range(parts)], True
    return [rng.randrange(3 * width + 1) for _ in range(parts)], True


def own_steps(lengths, layout, rank, ranks):
    """The steps of a rank's shard, by their places in the whole."""
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    mine = [rank] if layout == "contiguous" else [rank, 2 * ranks - 1 - rank]
    return [step for i in mine for step in range(starts[i], starts[i + 1])]


def boundaries(rng, total, lengths=()):
    """cu_seqlens with empty and short sequences, many of which begin shortly before a part of these
    lengths; sometimes padding follows the last."""
    count = rng.randrange(1, 7)
    end = total if rng.random() < 0.7 else rng.randrange(total + 1)
    near = [sum(lengths[:i]) - back for i in range(1, len(lengths)) for back in (1, 2, 3)]
    near = [step for step in near if 0 <= step <= end]
    inner = [
        rng.choice(near) if near and rng.random() < 0.5 else rng.randrange(end + 1)
        for _ in range(count - 1)
    ]
    return [0, *sorted(inner), end]


def ids_of(bounds, total):
    ids = [-1] * total
    for i in range(len(bounds) - 1):
        ids[bounds[i] : bounds[i + 1]] = [i] * (bounds[i + 1] - bounds[i])
    return ids


def make_ids(rng, batch, total):
    """Rows of packed sequences, some of them padding."""
    rows = []
    for _ in range(batch):
        bounds = boundaries(rng, total)
        names = rng.sample(range(50), len(bounds))
        padding = set(rng.sample(range(len(bounds)), rng.randrange(2)))
        ids = [-1 if i < 0 or i in padding else names[i] for i in ids_of(bounds, total)]
        kind = rng.random()
        if kind < 0.3 and total > 0:  # nothing but padding, but for the last step perhaps
            ids = [-1] * (total - 1) + [-1 if kind < 0.2 else 7]
        rows.append(ids)
    return torch.tensor(rows, dtype=torch.int32).view(batch, total)


def whole(case, x, weight, bias, states):
    """out and final states of one process."""
    silu, dilation = case["silu"], case["dilation"]
    if case["bounds"] is None:
        args = (x, weight, bias, case["ids"], states, True, None, silu)
        return causal_conv1d_fn(*args, dilation=dilation)
    bounds = torch.tensor(case["bounds"], device=x.device)
    args = (x, weight, bias, bounds, states, True, silu)
    return causal_conv1d_varlen_fn(*args, dilation=dilation)


def random_case(rng, ranks):
    layout = rng.choice(("contiguous", "zigzag"))
    parts = ranks * (2 if layout == "zigzag" else 1)
    width, dilation = rng.choice((1, 2, 3, 4, 4, 4, 5, 7)), rng.choice((1, 1, 3))
    lengths, given = part_lengths(rng, parts, width)
    total = sum(lengths)
    kind = rng.choice(("plain", "seq_idx", "cu_seqlens", "cu_seqlens"))
    batch = 1 if kind == "cu_seqlens" else rng.randrange(1, 4)
    dim, dtype = rng.choice((1, 5, 8, 16)), rng.choice(DTYPES)
    half = rng.choice((torch.float32, torch.float16, torch.bfloat16))
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))

    def values(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = values(batch, total, dim).mT if rng.random() < 0.5 else values(batch, dim, total)
    other = dtype if dtype == torch.float64 else half
    bounds = boundaries(rng, total, lengths) if kind == "cu_seqlens" else None
    rows, states = batch if bounds is None else len(bounds) - 1, None
    if rng.random() < 0.6:
        states = values(rows, dim, (width - 1) * dilation, dtype=other)
    ids = make_ids(rng, batch, total) if kind == "seq_idx" else None
    final = rng.random() < 0.5
    return {
        "layout": layout,
        "lengths": lengths,
        "given": given,
        "dilation": dilation,
        "silu": rng.choice((None, "silu")),
        "bounds": bounds,
        "ids": ids,
        "final": final,
        "final_gradient": final and rng.random() < 0.8,
        "x": x,
        "weight": values(dim, width, dtype=other),
        "bias": values(dim, dtype=other) if rng.random() < 0.5 else None,
        "states": states,
        "dout": values(batch, dim, total),
        "seed": rng.randrange(1 << 30),
    }


def summed(share, wanted):
    """Whether the ranks' shares of a gradient add up to the whole one."""
    share = share.detach().double()
    sizes = share.abs()
    dist.all_reduce(share)
    dist.all_reduce(sizes)
    return (share - wanted.double()).norm() <= SHARES[wanted.dtype] * sizes.norm()


def leaf(tensor):
    return None if tensor is None else tensor.detach().clone().requires_grad_()


def on_device(case, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.items()}


def run_case(case, rank, ranks):
    """Raises unless this rank's shard of the case is that of the whole."""
    leaves = [leaf(case[name]) for name in ("x", "weight", "bias", "states")]
    given = [t for t in leaves if t is not None]
    out, final = whole(case, *leaves)
    generator = torch.Generator().manual_seed(case["seed"])
    dfinal = torch.randn(final.shape, generator=generator, dtype=torch.float64).to(final)
    loss, dloss = [out], [case["dout"]]
    if case["final_gradient"]:
        loss, dloss = [out, final], [case["dout"], dfinal]
    wanted = torch.autograd.grad(loss, given, dloss, allow_unused=True)
    wanted = [torch.zeros_like(t) if g is None else g for g, t in zip(wanted, given, strict=True)]

    steps = own_steps(case["lengths"], case["layout"], rank, ranks)
    mine = [leaf(case["x"][..., steps]), *(leaf(t) for t in leaves[1:])]
    own = [t for t in mine if t is not None]
    bounds = None
    if case["bounds"] is not None:  # every other element of a tensor
        bounds = torch.tensor(case["bounds"], device=out.device).repeat_interleave(2)[::2]
    found = causal_conv1d_cp(
        mine[0],
        mine[1],
        mine[2],
        case["silu"],
        seq_idx=None if case["ids"] is None else case["ids"][:, steps],
        cu_seqlens=bounds,
        initial_states=mine[3],
        return_final_states=case["final"],
        layout=case["layout"],
        lengths=case["lengths"] if case["given"] else None,
        dilation=case["dilation"],
    )
    own_out, own_final = found if case["final"] else (found, None)
    assert torch.equal(own_out, out[..., steps]), "out"
    if case["final"]:
        assert torch.equal(own_final, final), "final states"
    loss, dloss = [own_out], [case["dout"][..., steps]]
    if case["final_gradient"]:
        # Of one rank's loss alone; the others' gradient is zero.
        last = rank == case["seed"] % ranks
        loss, dloss = [own_out, own_final], [*dloss, dfinal if last else torch.zeros_like(dfinal)]
    gradients = torch.autograd.grad(loss, own, dloss)
    names = [
        n for n, t in zip(("dx", "dweight", "dbias", "dstates"), mine, strict=True) if t is not None
    ]
    for name, got, want in zip(names, gradients, wanted, strict=True):
        if name == "dx":
            assert torch.equal(got, want[..., steps]), "dx"
        elif name == "dstates":  # on the rank of the first step, else 0
            dist.all_reduce(got)
            assert torch.equal(got, want), name
        else:
            assert summed(got, want), name


def random_cases(seeds, device="cpu"):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    warnings.filterwarnings("error", "torch.searchsorted")
    for seed in seeds:
        case = on_device(random_case(random.Random(seed), ranks), device)
        try:
            run_case(case, rank, ranks)
        except Exception as error:
            told = {k: v for k, v in case.items() if not isinstance(v, torch.Tensor)}
            raise AssertionError(f"rank {rank} of {ranks}, seed {seed}: {told}") from error


def without_synchronisation():
    """The host never waits for the GPU, nor does a CUDA graph know more than the sizes."""
    values = torch.randn(1, 16, 600, device="cuda", dtype=torch.bfloat16)
    x, weight = leaf(values), leaf(values[0, :, :4])
    ids = torch.arange(600, device="cuda", dtype=torch.int32)[None] // 70
    bounds = torch.tensor([0, 100, 101, 600 * dist.get_world_size()], device="cuda")
    forms = [
        {},
        {"layout": "zigzag", "dilation": 3, "initial_states": values[..., :9]},
        {"seq_idx": ids, "return_final_states": True},
        {"cu_seqlens": bounds, "return_final_states": True, "layout": "zigzag"},
        {"cu_seqlens": bounds, "initial_states": values[..., :9].reshape(3, 16, 3)},
    ]
    scan = (values, values.abs(), -weight.detach().abs(), values[:, None, :4], values[:, None, :4])

    def step():
        for form in forms:
            found = causal_conv1d_cp(x, weight, activation="silu", check=False, **form)
            found = found if isinstance(found, tuple) else (found,)
            torch.autograd.grad(found, (x, weight), [torch.ones_like(t) for t in found])
        u = leaf(scan[0])
        for form in ({}, {"cu_seqlens": bounds, "layout": "zigzag"}):
            out = selective_scan_cp(u, *scan[1:], check=False, **form)
            torch.autograd.grad(out, u, torch.ones_like(out))
        return out

    step()  # the kernels' self-test, and NCCL's beginning
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    wanted = step()
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert torch.equal(found, wanted)
