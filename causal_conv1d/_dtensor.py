"""How DTensor shards the operators: over the batch and over the channels, without communication.

An x of ``causal_conv1d_fn`` that is sharded over the sequence goes to ``causal_conv1d_cp``.

torch imports DTensor when it is first used, so the strategies are registered then.
"""

from __future__ import annotations

import sys

import torch

from ._ops import ops
from ._when_imported import when_imported

# The dimension of each tensor that is sharded with the batch, and with the channels. None: it is
# whole on every device; "partial": it is to be summed over them.
_ROWS = "x dout out dx pre_gate post_gate residual dpre_gate dpost_gate conv_state".split()
_ROWS += "initial_states dfinal_states final_states dinitial_states".split()
_BATCH: dict[str, int | str] = dict.fromkeys((*_ROWS, "seq_idx", "cache_seqlens"), 0)
_BATCH |= {"dweight": "partial", "dbias": "partial"}
_CHANNELS = dict.fromkeys(_ROWS, 1) | dict.fromkeys("weight bias dweight dbias".split(), 0)


def _strategies(operator, outputs):
    """What register_sharding takes: for the arguments, the placements of outputs and of inputs."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    names = [argument.name for argument in operator._schema.arguments]

    def place(dims, name):
        dim = dims.get(name)
        return Partial() if dim == "partial" else Replicate() if dim is None else Shard(dim)

    def strategies(*args):
        given = dict(zip(names, args, strict=True))
        is_tensor = {name: hasattr(value, "placements") for name, value in given.items()}
        choices = [{}, _BATCH, _CHANNELS]
        if given.get("cu_seqlens") is not None:
            choices = [{}, _CHANNELS]
        # What is not needed has size 0.
        needed = given.get("needed", -1) | 1
        present = {name for i, name in enumerate(outputs) if needed >> i & 1}
        if given.get("return_final_states") is False:
            present.remove("final_states")
        state = given.get("conv_state")
        if state is not None:
            # It is changed in place, so it stays as it is and the others follow.
            if len(set(state.placements)) > 1:
                raise NotImplementedError(
                    "causal_conv1d_update: conv_state must be sharded alike over all dimensions of "
                    f"the mesh, got {state.placements}"
                )
            choices = [c for c in choices if place(c, "conv_state") == state.placements[0]]
            if given["conv_state_indices"] is not None:
                choices = [c for c in choices if c is not _BATCH]
        return [
            (
                [place(dims if name in present else {}, name) for name in outputs],
                [place(dims, name) if is_tensor[name] else None for name in names],
            )
            for dims in choices
        ]

    return strategies


def _register() -> None:
    try:
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError:  # before torch 2.6; DTensor then says that there is no strategy
        return
    outputs = {
        "forward": ["out"],
        "forward_states": ["out", "final_states"],
        "backward": ["dx", "dweight", "dbias", "dinitial_states"],
        "update": ["out"],
        "conv_forward": ["out", "final_states"],
        "conv_backward": [
            *("dx", "dweight", "dbias"),
            *("dinitial_states", "dpre_gate", "dpost_gate"),
        ],
    }
    for name, returned in outputs.items():
        operator = getattr(ops, name).default
        register_sharding(operator)(_strategies(operator, returned))


def register() -> None:
    when_imported("torch.distributed.tensor", _register)


def is_sequence_sharded(x) -> bool:
    """Whether x is a DTensor (batch, dim, seqlen) whose sequence is sharded."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor) and x.dim() == 3 and any(p.is_shard(2) for p in x.placements)


def _local(x, name, tensor):
    """This device's part of a tensor that goes with x; where x alone is sharded, its gradient is
    this device's share."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if tensor is None:
        return None
    if not isinstance(tensor, DTensor):
        raise TypeError(f"causal_conv1d_fn: {name} must be a DTensor, as x is")
    follows = {0: _BATCH.get(name), 1: _CHANNELS.get(name), 2: 1 if name == "seq_idx" else None}
    places, gradients = [], []
    for placement in x.placements:
        dim = follows[placement.dim] if placement.is_shard() else None
        places.append(Replicate() if dim is None else Shard(dim))
        shared = placement.is_shard() and dim is None
        gradients.append(Partial() if shared else places[-1])
    return tensor.redistribute(x.device_mesh, places).to_local(grad_placements=gradients)


def sequence_sharded(x, weight, bias, seq_idx, initial_states, with_states, silu, dilation):
    """forward or forward_states of such an x: each device's part, and a halo from those before.

    Along the other dimensions of the mesh x stays as it is; the other tensors follow it.
    """
    from torch.distributed.tensor import DTensor, Replicate

    from .distributed import causal_conv1d_cp

    along, *others = (i for i, placement in enumerate(x.placements) if placement.is_shard(2))
    if others:
        raise NotImplementedError(
            "causal_conv1d_fn: x must have its sequence sharded over one dimension of the mesh, "
            f"got {x.placements}"
        )
    x = x.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])
    mesh, count = x.device_mesh, x.device_mesh.size(along)
    most = -(-x.shape[2] // count)  # as torch.chunk divides
    found = causal_conv1d_cp(
        x.to_local(),
        _local(x, "weight", weight),
        _local(x, "bias", bias),
        "silu" if silu else None,
        mesh.get_group(along),
        _local(x, "seq_idx", seq_idx),
        initial_states=_local(x, "initial_states", initial_states),
        return_final_states=with_states,
        lengths=[min(most, max(x.shape[2] - i * most, 0)) for i in range(count)],
        dilation=dilation,
    )

    def whole(tensor, placements, like):
        size = {"shape": like.shape, "stride": like.stride()}
        return DTensor.from_local(tensor, mesh, placements, run_check=False, **size)

    on_meta = torch.empty_strided(x.shape, x.stride(), device="meta")
    out, final = found if with_states else (found, None)
    out = whole(out, x.placements, torch.empty_like(on_meta))
    if final is None:
        return out
    if final.requires_grad and mesh.get_local_rank(along) > 0:
        # Each device has the whole gradient of the final states, which is to be counted once.
        final.register_hook(torch.zeros_like)
    like = on_meta.new_empty(*x.shape[:2], (weight.shape[1] - 1) * dilation)
    return out, whole(final, [Replicate() if p.is_shard(2) else p for p in x.placements], like)
