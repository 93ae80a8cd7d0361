"""The operations of a scan in plain PyTorch, for a device without kernels."""

from __future__ import annotations

import dataclasses

from .._operators import CALLERS
from .._plain import after_checks
from ..reference import selective_state_update_ref
from . import plain
from .arguments import Inputs, empty_grads
from .operators import INPUTS


def _inputs(name, args):
    """The inputs of a scan, with the bounds of its sequences on the CPU, for the loop over them.

    RuntimeError for wrong bounds, as on the CPU.
    """
    inputs = Inputs(*args[:INPUTS])
    if inputs.cu_seqlens is not None:
        inputs.cu_seqlens = inputs.cu_seqlens.cpu()
        least, most = 0, inputs.u.shape[2]
        for i, bound in enumerate(inputs.cu_seqlens.tolist()):
            if not least <= bound <= most:
                text = f"must not decrease and lie within 0..{most} (seqlen), got {bound} at {i}"
                raise RuntimeError(f"{CALLERS[name]}: cu_seqlens {text}")
            least = bound
    return inputs


def _scan_forward(*args):
    out, ungated, last_states = args[INPUTS:]
    plain.forward(_inputs("scan_forward", args), out, ungated, last_states)


def _scan_backward(*args):
    dout, dlast_states, *written = args[INPUTS:]
    inputs = _inputs("scan_backward", args)
    grads = empty_grads(inputs, with_out=written[-1] is not None)
    plain.backward(inputs, dout, dlast_states, grads)
    for target, field in zip(written, dataclasses.fields(grads), strict=True):
        if target is not None:
            target.copy_(getattr(grads, field.name))


def _state_update(*args):
    *tensors, indices, out, dt_softplus = args
    out.copy_(selective_state_update_ref(*tensors, dt_softplus, indices))


def operations(checks: dict) -> dict:
    """The operations by name, each with the check of its arguments first."""
    functions = {
        "scan_forward": _scan_forward,
        "scan_backward": _scan_backward,
        "state_update": _state_update,
    }

    return after_checks(functions, checks)
