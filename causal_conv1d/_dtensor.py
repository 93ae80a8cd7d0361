"""How DTensor shards the operators: over the batch and over the channels, without communication.

torch imports DTensor when it is first used, so the strategies are registered then.
"""

from __future__ import annotations

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
