"""Inputs of the selective scan in any layout, what it must give, and the raw operators' results."""

import math

import torch
from helpers import allocate, assert_close, lay_out, layout, on_cpu, randn
from tolerances import SCAN, SCAN_PARAM

from causal_conv1d.reference import selective_scan_ref

ops = torch.ops.causal_conv1d

INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_states")
OPTIONAL = ("D", "z", "delta_bias", "initial_states")
# Whose gradients are no sums over batch and time.
NO_SUMS = ("u", "delta", "z", "initial_states")

# For B and C: (batch, groups, dstate, seqlen).
PROJECTION_LAYOUTS = {
    "contiguous": layout((0, 1, 2, 3)),
    "state_fastest": layout((0, 3, 1, 2)),
    "slice": layout((0, 1, 2, 3), leads=(0, 1, 2, 3), tails=(1, 0, 1, 2)),
    "strided": layout((1, 0, 3, 2), steps=(1, 2, 3, 2), leads=(0, 1, 1, 1)),
}


def make_scan(
    batch=2,
    dim=6,
    seqlen=37,
    dstate=5,
    groups=2,
    dtype=torch.float32,
    *,
    dtypes=None,
    without=(),
    constant="",
    bounds=None,
    layouts=None,
    device="cpu",
    seed=0,
):
    """The inputs by name, with cu_seqlens; what is not given is None.

    dtypes: by name, of tensors whose type is not dtype. constant: "B", "C" or "BC", those of shape
    (dim, dstate). bounds: cu_seqlens, for a batch of 1. layouts: by name.
    """
    rows = batch if bounds is None else len(bounds) - 1
    in_time = (batch, dim, seqlen)
    shapes = {
        "u": in_time,
        "delta": in_time,
        "A": (dim, dstate),
        "B": (dim, dstate) if "B" in constant else (batch, groups, dstate, seqlen),
        "C": (dim, dstate) if "C" in constant else (batch, groups, dstate, seqlen),
        "D": (dim,),
        "z": in_time,
        "delta_bias": (dim,),
        "initial_states": (rows, dim, dstate),
    }
    found = {}
    for i, (name, shape) in enumerate(shapes.items()):
        values = randn(*shape, dtype=torch.float64, seed=100 * seed + i)
        if name == "A":
            values = -values.exp()
        elif name in ("delta", "delta_bias"):
            values = values.abs() / 2
        values = values.to((dtypes or {}).get(name, dtype))
        where = (layouts or {}).get(name)
        if isinstance(where, str) and len(shape) == 4:
            where = PROJECTION_LAYOUTS[where]
        values = values.to(device) if where is None else lay_out(values, where, device)
        found[name] = None if name in without else values
    found["cu_seqlens"] = None if bounds is None else torch.tensor(bounds, device=device)
    return found


def gradients_of_outputs(inputs, seed=77):
    """dout and dlast_states."""
    u, states = inputs["u"], states_shape(inputs)
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    dout = randn(*u.shape, dtype=u.dtype, device=u.device, seed=seed)
    return dout, randn(*states, dtype=dtype, device=u.device, seed=seed + 1)


def states_shape(inputs):
    bounds = inputs["cu_seqlens"]
    rows = inputs["u"].shape[0] if bounds is None else len(bounds) - 1
    return rows, *inputs["A"].shape


def widened(inputs, requires_grad=False):
    """In float64, on the values that they have."""
    return {
        name: value.detach().double().requires_grad_(requires_grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def expected_of(inputs, softplus, dout, dlast):
    """out, the last states, and the gradients of the inputs by name, in float64."""
    wide = widened(on_cpu(inputs), requires_grad=True)
    out, last = selective_scan_ref(**wide, delta_softplus=softplus, return_last_state=True)
    given = {name: wide[name] for name in INPUTS if wide[name] is not None}
    outputs, above = [out], [dout.double().cpu()]
    if dlast is not None:
        outputs.append(last)
        above.append(dlast.double().cpu())
    found = torch.autograd.grad(outputs, list(given.values()), above, materialize_grads=True)
    return out.detach(), last.detach(), dict(zip(given, found, strict=True))


def tolerance_of(name, tensor):
    return (SCAN if name in NO_SUMS else SCAN_PARAM)[tensor.dtype]


def assert_gradients(found, expected, inputs, allow_zero=False, factor=1, terms=None):
    """Gradients by name agree, in their tensors' shapes and types. terms: by name, the magnitudes
    of what a gradient sums."""
    for name in INPUTS:
        if inputs[name] is None:
            assert found.get(name) is None
            continue
        gradient = found[name]
        assert gradient.dtype == inputs[name].dtype and gradient.shape == inputs[name].shape, name
        tolerance, typical = factor * tolerance_of(name, gradient), (terms or {}).get(name)
        assert_close(gradient, expected[name], tolerance, typical, allow_zero, name=f"d{name}")


def arguments(inputs, softplus):
    """As the operators take them."""
    return [*(inputs[name] for name in (*INPUTS, "cu_seqlens")), softplus]


def poisoned(like, where=None):
    if where is None or like.dim() != 3:
        return torch.full_like(like, math.nan)
    return allocate(like.shape, where, like.dtype, like.device)


def run_forward(inputs, softplus, where=None):
    """out, ungated and last_states of the raw operator, which got them full of NaN."""
    u = inputs["u"]
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    out, ungated = poisoned(u, where), poisoned(u, where)
    last = poisoned(torch.empty(states_shape(inputs), dtype=dtype, device=u.device), where)
    ops.scan_forward_out(*arguments(inputs, softplus), out, ungated, last)
    return out, ungated, last


def run_backward(inputs, softplus, dout, dlast, where=None):
    """The gradients by name, and out once more, of the raw operator."""
    found = {
        name: None if inputs[name] is None else poisoned(inputs[name], where) for name in INPUTS
    }
    out = poisoned(inputs["u"], where)
    ops.scan_backward_out(*arguments(inputs, softplus), dout, dlast, *found.values(), out)
    return found, out


def assert_scan(inputs, softplus, where=None, allow_zero=False, factor=1):
    """The raw operators agree with the reference; returns all that they write."""
    dout, dlast = gradients_of_outputs(inputs)
    expected_out, expected_last, expected = expected_of(inputs, softplus, dout, dlast)
    out, ungated, last = run_forward(inputs, softplus, where)
    tolerance = factor * SCAN[out.dtype]
    assert_close(out, expected_out, tolerance, allow_zero=allow_zero, name="out")
    assert_close(last, expected_last, factor * SCAN[last.dtype], allow_zero=allow_zero, name="last")
    without_z = widened(on_cpu(inputs)) | {"z": None}
    expected_ungated = selective_scan_ref(**without_z, delta_softplus=softplus)
    assert_close(ungated, expected_ungated, tolerance, allow_zero=allow_zero, name="ungated")
    found, out_again = run_backward(inputs, softplus, dout, dlast, where)
    assert_close(out_again, expected_out, tolerance, allow_zero=allow_zero, name="out again")
    terms = {}
    if factor > 1:  # of few channels and steps, whose terms may cancel
        terms["delta_bias"] = expected["delta"].abs().sum((0, 2))
        gate = 1 if inputs["z"] is None else torch.nn.functional.silu(inputs["z"].double())
        terms["D"] = (inputs["u"].double() * gate * dout).abs().sum((0, 2))
    assert_gradients(found, expected, inputs, allow_zero, factor, terms)
    return [out, ungated, last, out_again, *(v for v in found.values() if v is not None)]
