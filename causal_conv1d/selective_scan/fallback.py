"""The operations of a scan in plain PyTorch, for a device without kernels."""

from __future__ import annotations

import dataclasses

from .._plain import after_checks
from ..reference import selective_state_update_ref
from . import plain
from .arguments import Inputs, empty_grads
from .operators import INPUTS


def _scan_forward(*args):
    out, ungated, last_states = args[INPUTS:]
    plain.forward(Inputs(*args[:INPUTS]), out, ungated, last_states)


def _scan_backward(*args):
    dout, dlast_states, *written = args[INPUTS:]
    inputs = Inputs(*args[:INPUTS])
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
