"""Upstream's raw functions: ``causal_conv1d.cpp_functions`` and ``causal_conv1d_cuda``."""

import subprocess
import sys

import pytest
import torch
from helpers import assert_gradients, make_case, reference_forward

import causal_conv1d_cuda as raw
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update, cpp_functions

SHAPE = (2, 10, 33)


@pytest.fixture
def case(device):
    return make_case(SHAPE, device=device)


@pytest.fixture
def full(device):
    return make_case(SHAPE, states=True, seq_idx="packed", layout="channel_last", device=device)


def plain(case):
    return causal_conv1d_fn(case.x, case.weight, case.bias, activation="silu")


def common(case):
    return case.x, case.weight, case.bias


def test_import_as_the_very_first():
    code = "import causal_conv1d_cuda as c; c.causal_conv1d_fwd, c.causal_conv1d_bwd"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_forward_forms_that_return_out(case, full):
    assert torch.equal(raw.causal_conv1d_fwd(*common(case), True), plain(case))
    assert torch.equal(raw.causal_conv1d_fwd(*common(case), None, True), plain(case))
    assert torch.equal(raw.causal_conv1d_fwd(*common(case), None, None, None, True), plain(case))
    ids = causal_conv1d_fn(*common(full), full.seq_idx, activation="silu")
    assert torch.equal(raw.causal_conv1d_fwd(*common(full), full.seq_idx, True), ids)
    final = torch.full(full.state_shape, torch.nan, device=full.x.device)
    arguments = (*common(full), full.seq_idx, full.initial_states)
    out = raw.causal_conv1d_fwd(*arguments, final, True)
    expected, expected_final = causal_conv1d_fn(*arguments, True, activation="silu")
    assert torch.equal(out, expected) and torch.equal(final, expected_final)
    assert torch.equal(cpp_functions.causal_conv1d_fwd_function(*arguments, None, True), out)


def test_forward_form_that_writes_out(full):
    out = torch.full_like(full.x, torch.nan)
    arguments = (*common(full), full.seq_idx, full.initial_states)
    assert raw.causal_conv1d_fwd(*arguments, out, None, True) is None
    expected, _ = reference_forward(full)
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert torch.equal(out, causal_conv1d_fn(*arguments, activation="silu"))


@pytest.mark.parametrize("arity", (6, 7, 10))
def test_backward_forms_that_return_gradients(arity, case, full):
    used = case if arity == 6 else full
    if arity == 7:
        used.initial_states = used.dfinal_states = None
    wide = torch.full((SHAPE[0], 2 * SHAPE[1], SHAPE[2]), torch.nan, device=used.x.device)
    dx = wide.chunk(2, dim=1)[0]
    form = {
        6: (dx, True),
        7: (used.seq_idx, dx, True),
        10: (used.seq_idx, used.initial_states, used.dfinal_states, dx, True, True),
    }[arity]
    found = raw.causal_conv1d_bwd(*common(used), used.dout, *form)
    assert isinstance(found, list) and len(found) == (4 if arity == 10 else 3)
    assert found[0].data_ptr() == dx.data_ptr() and torch.isnan(wide[:, SHAPE[1] :]).all()
    names = ("dx", "dweight", "dbias", "dinitial_states")
    found = dict(zip(names, (*found, None), strict=False))
    found.setdefault("dinitial_states", None)
    assert_gradients(used, found)


def test_backward_form_that_accumulates(full):
    dweight, dbias = torch.ones_like(full.weight), torch.ones_like(full.bias)
    dx, dinit = torch.empty_like(full.x), torch.empty(full.state_shape, device=full.x.device)
    arguments = (*common(full), full.dout, full.seq_idx, full.initial_states, full.dfinal_states)
    result = raw.causal_conv1d_bwd(*arguments, dx, dweight, dbias, dinit, True)
    assert result is None
    expected = cpp_functions.causal_conv1d_bwd_function(*arguments, None, True, True)
    assert torch.equal(dx, expected[0]) and torch.equal(dinit, expected[3])
    assert torch.equal(dweight, 1 + expected[1]) and torch.equal(dbias, 1 + expected[2])


def test_backward_without_bias_or_initial_states(device):
    case = make_case(SHAPE, bias=False, device=device)
    arguments = (case.x, case.weight, None, case.dout, None, None, None, None)
    dx, dweight, dbias, dinit = cpp_functions.causal_conv1d_bwd_function(*arguments, False, True)
    assert dbias is None and dinit is None
    assert_gradients(case, {"dx": dx, "dweight": dweight, "dbias": None, "dinitial_states": None})


@pytest.mark.parametrize("arity", (5, 6, 7, 8))
def test_update_forms(arity, case):
    token = case.x[..., 0].contiguous()
    states = torch.randn(SHAPE[0], SHAPE[1], 4, device=token.device)
    states, expected_states = states.clone(), states.clone()
    ring = torch.zeros(SHAPE[0], dtype=torch.int32, device=token.device) if arity > 5 else None
    expected = causal_conv1d_update(
        token, expected_states, case.weight, case.bias, "silu", cache_seqlens=ring
    )
    if arity == 8:
        out = torch.full_like(token, torch.nan)
        call = (token, states, case.weight, case.bias, out, True, ring, None)
        assert raw.causal_conv1d_update(*call) is None
    else:
        rest = (ring, None)[: arity - 5]
        out = raw.causal_conv1d_update(token, states, case.weight, case.bias, True, *rest)
    assert torch.equal(out, expected) and torch.equal(states, expected_states)


@pytest.mark.parametrize("name", ("causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update"))
def test_other_arities_name_the_supported_ones(name):
    with pytest.raises(TypeError, match=rf"{name}\(\) takes .* or \d+ positional .* 9 were given"):
        getattr(raw, name)(*range(9))
