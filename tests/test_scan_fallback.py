"""The selective scan in plain PyTorch, which stands in for kernels that do not run."""

import math

import pytest
import torch
from helpers import assert_close, dtype_id
from scan_helpers import (
    INPUTS,
    arguments,
    assert_gradients,
    expected_of,
    gradients_of_outputs,
    make_scan,
)
from test_scan_update import make_update
from tolerances import SCAN

from causal_conv1d import _library, _torch_ops
from causal_conv1d.reference import selective_state_update_ref
from causal_conv1d.selective_scan import plain


@pytest.fixture(scope="module")
def operations():
    return _torch_ops.operations(_library.cpu.library, warn=lambda device: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"without": ("D", "z", "delta_bias", "initial_states")},
        {"constant": "B"},
        {"batch": 1, "bounds": [0, 5, 5, 150]},
    ],
    ids=str,
)
def test_agrees_with_the_reference(operations, monkeypatch, options, dtype):
    """In several chunks and tiles."""
    monkeypatch.setattr(plain, "CHUNK", 70)
    monkeypatch.setattr(plain, "TILE_ELEMENTS", {"cpu": 4 * 5 * plain.BLOCK})
    inputs = make_scan(seqlen=150, dtype=dtype, **options)
    dout, dlast = gradients_of_outputs(inputs)
    expected_out, expected_last, expected = expected_of(inputs, True, dout, dlast)
    out, ungated, last = (torch.full_like(t, math.nan) for t in (dout, dout, dlast))
    operations["scan_forward"](*arguments(inputs, True), out, ungated, last)
    assert_close(out, expected_out, SCAN[dtype], name="out")
    assert_close(last, expected_last, SCAN[last.dtype], name="last states")
    assert inputs["z"] is None or not torch.equal(out, ungated)
    found = {
        name: None if inputs[name] is None else torch.full_like(inputs[name], math.nan)
        for name in INPUTS
    }
    again = torch.full_like(out, math.nan)
    operations["scan_backward"](*arguments(inputs, True), dout, dlast, *found.values(), again)
    assert_gradients(found, expected, inputs)
    assert_close(again, expected_out, SCAN[dtype], name="out again")
    # Some gradients alone, and without that of the last states.
    du = torch.full_like(dout, math.nan)
    operations["scan_backward"](*arguments(inputs, True), dout, None, du, *(None,) * 9)
    assert du.isfinite().all() and not torch.equal(du, found["u"])


def test_steps_of_no_sequence_are_zero(operations):
    inputs = make_scan(1, bounds=[3, 20])
    dout, dlast = gradients_of_outputs(inputs)
    out, last = torch.full_like(dout, math.nan), torch.full_like(dlast, math.nan)
    operations["scan_forward"](*arguments(inputs, True), out, None, last)
    kernel_out, kernel_last = torch.empty_like(out), torch.empty_like(last)
    forward_out = torch.ops.causal_conv1d.scan_forward_out
    forward_out(*arguments(inputs, True), kernel_out, None, kernel_last)
    assert not out[..., :3].any() and not out[..., 20:].any()
    assert_close(out, kernel_out.double(), 1e-6)
    assert_close(last, kernel_last.double(), 1e-6)


@pytest.mark.parametrize("indices", [None, [4, -1, 0]], ids=["rows", "indices"])
def test_update(operations, indices):
    options = {"indices": indices, "rows": 5} if indices else {}
    inputs = make_update(**options)
    copies = inputs | {"state": inputs["state"].clone()}
    out = torch.full_like(inputs["x"], math.nan)
    version = inputs["state"]._version
    operations["state_update"](*inputs.values(), out, True)
    assert inputs["state"]._version > version
    assert torch.equal(out, selective_state_update_ref(**copies, dt_softplus=True))
    assert torch.equal(inputs["state"], copies["state"])


def test_wrong_arguments_are_refused(operations):
    inputs = make_scan()
    inputs["B"] = inputs["B"][..., 1:]
    with pytest.raises(RuntimeError, match="selective_scan_fwd: B must be"):
        operations["scan_forward"](*arguments(inputs, True), inputs["u"].clone(), None, None)
