"""What the ranks of ``test_cp.py`` do besides random cases; each function runs on every rank."""

import datetime
import os
import random
import time

import torch
import torch.distributed as dist
from distributed_cases import leaf
from torch.distributed.device_mesh import init_device_mesh

from causal_conv1d import causal_conv1d_cp, causal_conv1d_fn, selective_scan_cp
from causal_conv1d.distributed import convolution, gather_lengths, groups, local


def raised(call):
    """The error's first line."""
    try:
        call()
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "no error"


def differences():
    """By what differs on rank 1, what each rank raises."""
    odd = dist.get_rank() == 1
    x, weight, bias = torch.randn(2, 4, 6), torch.randn(4, 3), torch.randn(4)
    calls = {
        "batch": lambda: causal_conv1d_cp(x[:1] if odd else x, weight),
        "dim": lambda: causal_conv1d_cp(x[:, :2] if odd else x, weight[:2] if odd else weight),
        "width": lambda: causal_conv1d_cp(x, weight[:, :2] if odd else weight),
        "dtype": lambda: causal_conv1d_cp(x.bfloat16() if odd else x, weight),
        "bias": lambda: causal_conv1d_cp(x, weight, bias if odd else None),
        "length": lambda: causal_conv1d_cp(x[..., :4] if odd else x, weight),
        "lengths": lambda: causal_conv1d_cp(x, weight, lengths=(6, 6, 7 if odd else 6)),
        "gradients": lambda: causal_conv1d_cp(x.clone().requires_grad_(odd), weight),
        "an error": lambda: causal_conv1d_cp(x, weight[:2] if odd else weight),
        "no tensor": lambda: causal_conv1d_cp(None if odd else x, weight),
        "scan": lambda: selective_scan_cp(x, x, weight[: 3 if odd else 4], weight, weight),
    }
    return "\n".join(f"{name}: {raised(call)}" for name, call in calls.items())


def by_notes(function, *args):
    """The function where hosts can compare arguments by the store alone, as with NCCL."""
    groups._has_cpu_backend = lambda group: False
    return function(*args)


def a_call_of_one_rank():
    """Rank 1 makes another call than that which all have compared: one that is new to it alone."""
    x, weight = torch.randn(2, 4, 6), torch.randn(4, 3)
    for _ in range(3):
        causal_conv1d_cp(x, weight)
    kept = groups.kept_of(dist.group.WORLD)
    assert len(kept.agreed) == 1 and kept.noted == 1 and kept.calls == 3
    if dist.get_rank() != 1:
        return None
    dist.distributed_c10d._get_default_store().set_timeout(datetime.timedelta(seconds=1))
    return raised(lambda: causal_conv1d_cp(x[..., :5], weight))


def groups_of_one_name():
    """One after the other; notes of the first, which are still in the store, are not the second's.

    Rank 1 is late, so that the others look while its note is not there.
    """
    store = dist.PrefixStore("both", dist.distributed_c10d._get_default_store())
    groups._store = lambda group: store
    x, weight = torch.randn(2, 4, 8), torch.randn(4, 3)
    for length in (6, 8):
        group = dist.new_group()
        if dist.get_rank() == 1:
            time.sleep(0.3)
        causal_conv1d_cp(x[..., :length], weight, group=group)


def wrong_boundaries():
    """Those of a GPU are not checked: whatever they are, torch's operations index no step beyond.

    The kernels are left out, as the CPU's check them.
    """

    def backward(dx, x, weight, bias, dout, seq_idx, cu_seqlens, states, *others):
        dstates = None if states is None else torch.zeros_like(states)
        return torch.zeros_like(weight), None, dstates

    convolution.check_bounds = lambda *args, **options: None
    local.forward, local.backward = (lambda *args: None), backward
    rng = random.Random(0)
    for seed in range(60):
        sequences, width, length = rng.randrange(1, 6), rng.randrange(1, 5), 2 * rng.randrange(6)
        bounds = torch.tensor([rng.randrange(-20, 40) for _ in range(sequences + 1)])
        x, weight = leaf(torch.randn(1, 3, length)), leaf(torch.randn(3, width))
        states = leaf(torch.randn(sequences, 3, width - 1)) if seed % 2 else None
        found = causal_conv1d_cp(
            x,
            weight,
            cu_seqlens=bounds,
            initial_states=states,
            return_final_states=True,
            layout=rng.choice(("contiguous", "zigzag")),
        )
        torch.autograd.backward(found, [torch.ones_like(tensor) for tensor in found])


def refusals():
    """Errors that every rank finds for itself."""
    x, weight = torch.randn(1, 4, 5), torch.randn(4, 3)
    bounds = torch.tensor([0, 15])

    def told(text, *args, **more):
        message = raised(lambda: causal_conv1d_cp(*args, **more))
        assert text in message and "\n" not in message, message

    told("layout must be 'contiguous' or 'zigzag', got 'ring'", x, weight, layout="ring")
    told("a zigzag shard must have two parts of equal length", x, weight, layout="zigzag")
    told("lengths must have the length of each of the 3 parts", x, weight, lengths=(5, 5))
    told("lengths must be ints, got [5.0, 5, 5]", x, weight, lengths=[5.0, 5, 5])
    told("lengths must be ints, got 15", x, weight, lengths=15)
    told("causal_conv1d_cp: dilation must be 1..65536, got 65537", x, weight, dilation=65537)
    told("dilation must be an int, got 2.0", x, weight, dilation=2.0)
    told(
        "initial_states must be (batch, dim, width - 1) = (1, 4, 2)",
        x,
        weight,
        initial_states=x,
    )
    told("x must be (1, dim, total) with", x.expand(2, -1, -1), weight, cu_seqlens=bounds)
    told("cu_seqlens must ascend from 0", x, weight, cu_seqlens=torch.tensor([0, 16]))
    told(
        "cu_seqlens must not be given with seq_idx",
        x,
        weight,
        cu_seqlens=bounds,
        seq_idx=torch.zeros(1, 5, dtype=torch.int32),
    )
    told("activation must be None, silu, or swish", x, weight, activation="relu")
    told("causal_conv1d_cp: weight must be (dim, width) with dim = 4", x, weight[:3])
    told("group must be a process group or a DeviceMesh, got list", x, weight, group=[0, 1])
    mesh = init_device_mesh("cpu", (3, 1))
    told("group must be a DeviceMesh of one dimension, got one of 2", x, weight, group=mesh)
    only = dist.new_group([0])
    if dist.get_rank() > 0:
        told("this process is not in the group", x, weight, group=only)


def another_dim_unchecked():
    x = torch.randn(2, 6 if dist.get_rank() == 1 else 4, 6)
    weight = torch.randn(x.shape[1], 3)

    def steps():
        for _ in range(3):
            causal_conv1d_cp(x, weight, check=False)
            dist.all_reduce(weight)

    return raised(steps)


def one_dies():
    x, weight = torch.randn(2, 4, 6, requires_grad=True), torch.randn(4, 3)

    def steps():
        for step in range(3):
            out = causal_conv1d_cp(x, weight)
            if step == 1 and dist.get_rank() == 1:
                os._exit(1)
            out.sum().backward()

    return raised(steps)


def call_forms():
    """Megatron's and FLA's, and the small things around the function."""
    from causal_conv1d.distributed import fla, megatron

    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, ranks * 6, 8, generator=generator)
    weight, bias = torch.randn(8, 4, generator=generator), torch.randn(8, generator=generator)
    bounds = torch.tensor([0, 2, 9, 9 + 2 * 6, ranks * 6])
    ids = torch.searchsorted(bounds, torch.arange(ranks * 6), right=True)[None]
    for given in (None, ids):
        seq_idx = None if given is None else given.int()
        whole = leaf(x)
        wanted = causal_conv1d_fn(whole.mT, weight, bias, seq_idx, activation="silu").mT
        (wanted_dx,) = torch.autograd.grad(wanted.square().sum(), whole)
        mine = leaf(x[:, rank * 6 : rank * 6 + 6])
        found = megatron.causal_conv1d_cp(mine, weight, bias, "silu", None, given)
        (dx,) = torch.autograd.grad(found.square().sum(), mine)
        assert torch.equal(found, wanted[:, rank * 6 : rank * 6 + 6])
        assert torch.equal(dx, wanted_dx[:, rank * 6 : rank * 6 + 6])
    for layout in ("contiguous", "zigzag"):
        context, steps = fla_context(bounds, rank, ranks, 6, layout)
        mine = leaf(x[:, steps])
        args = (mine, weight, bias, mine.detach(), None, False, "silu")
        found, nothing = fla.causal_conv1d(*args, cp_context=context)
        (dx,) = torch.autograd.grad((found - mine.detach()).square().sum(), mine)
        assert nothing is None
        assert torch.equal(found - mine, wanted[:, steps] + mine - mine)
        torch.testing.assert_close(dx, wanted_dx[:, steps])

    mesh = init_device_mesh("cpu", (ranks,))
    assert gather_lengths(rank + 3, mesh) == list(range(3, ranks + 3))
    mine = x[:, rank * 6 : rank * 6 + 6].mT
    assert torch.equal(causal_conv1d_cp(mine, weight, group=mesh), causal_conv1d_cp(mine, weight))


def fla_context(bounds, rank, ranks, length, layout):
    """What FLA's build_cp_context gives, with the fields that are read, and the shard's steps."""
    from types import SimpleNamespace

    parts = [rank] if layout == "contiguous" else [rank, 2 * ranks - 1 - rank]
    size = length // len(parts)
    local, ago, steps = [0], [], []
    counts = []
    for part in parts:
        start, end = part * size, (part + 1) * size
        inside = [b for b in bounds.tolist() if start < b < end] + [end]
        begin = max(b for b in bounds.tolist() if b <= start)
        ago.append(part - begin // size)
        counts.append(len(inside))
        local += [b - start + len(steps) for b in inside]
        steps += range(start, end)
    context = SimpleNamespace(group=dist.group.WORLD, cu_seqlens=torch.tensor(local), layout=layout)
    if layout == "contiguous":
        context.pre_num_ranks = ago[0]
    else:
        context.pre_num_ranks_by_part, context.front_num_seqs = tuple(ago), counts[0]
    return context, steps
