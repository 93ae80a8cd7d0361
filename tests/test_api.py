"""Upstream's names, signatures and call forms, and the second positional form of the seeds."""

import importlib
import importlib.metadata
import importlib.resources
import inspect
import os
import subprocess
import sys

import numpy
import pytest
import torch
from helpers import LAYOUTS, assert_close, lay_out, make_case, randn
from tolerances import OUT

import causal_conv1d
import causal_conv1d_cuda
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.causal_conv1d_interface import CausalConv1dFn
from causal_conv1d.reference import causal_conv1d_ref

INSIDE = "causal_conv1d_interface causal_conv1d_varlen cpp_functions aiter modules onnx".split()
INSIDE.append("reference")
TYPED = [
    "causal_conv1d",
    "causal_conv1d.selective_scan",
    *(f"causal_conv1d.{name}" for name in INSIDE),
    "causal_conv1d_cuda",
    *(f"selective_scan_cuda{end}" for end in ("", "_core", "_ndstate", "_nrow", "_oflex")),
]
INTERFACE = (
    "CausalConv1dFn",
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
)
NAMES = {
    "causal_conv1d": (
        "causal_conv1d_fn",
        "causal_conv1d_update",
        "causal_conv1d_varlen_states",
        "__version__",
    ),
    "causal_conv1d.causal_conv1d_interface": INTERFACE,
    "causal_conv1d.causal_conv1d_varlen": (
        "causal_conv1d_varlen_states",
        "causal_conv1d_varlen_states_ref",
    ),
}


@pytest.mark.parametrize("module", NAMES)
def test_upstreams_names_are_there(module):
    found = importlib.import_module(module)
    assert all(hasattr(found, name) for name in NAMES[module])


def test_one_function_has_one_identity():
    interface = importlib.import_module("causal_conv1d.causal_conv1d_interface")
    varlen = importlib.import_module("causal_conv1d.causal_conv1d_varlen")
    assert interface.causal_conv1d_fn is causal_conv1d.causal_conv1d_fn
    assert interface.causal_conv1d_update is causal_conv1d.causal_conv1d_update
    assert varlen.causal_conv1d_varlen_states is causal_conv1d.causal_conv1d_varlen_states
    assert interface.causal_conv1d_ref is causal_conv1d_ref


SIGNATURES = {
    "causal_conv1d_fn": "(x, weight, bias=None, seq_idx=None, initial_states=None, "
    "return_final_states=False, final_states_out=None, activation=None)",
    "causal_conv1d_update": "(x, conv_state, weight, bias=None, activation=None, "
    "cache_seqlens=None, conv_state_indices=None)",
    "causal_conv1d_ref": "(x, weight, bias=None, initial_states=None, return_final_states=False, "
    "final_states_out=None, activation=None, seq_idx=None)",
    "causal_conv1d_update_ref": "(x, conv_state, weight, bias=None, activation=None, "
    "cache_seqlens=None, conv_state_indices=None)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_upstreams(name):
    """transformers drops keyword arguments that inspect.signature does not show."""
    module = importlib.import_module("causal_conv1d.causal_conv1d_interface")
    signature = inspect.signature(getattr(module, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    ours = [p for p in bare if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert str(inspect.Signature(bare[: len(bare) - len(ours)])) == SIGNATURES[name]
    assert all(p.default in (None, 1) for p in ours)


@pytest.mark.parametrize("name", ("causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"))
def test_signature_of_varlen_states_is_upstreams(name):
    module = importlib.import_module("causal_conv1d.causal_conv1d_varlen")
    assert list(inspect.signature(getattr(module, name)).parameters) == [
        "x",
        "cu_seqlens",
        "state_len",
    ]


@pytest.mark.parametrize("name", NAMES["causal_conv1d"][:3])
def test_public_functions_are_documented(name):
    assert len(getattr(causal_conv1d, name).__doc__.splitlines()) > 3


@pytest.mark.parametrize("module", TYPED)
def test_public_functions_are_annotated(module):
    found = importlib.import_module(module)
    for name in found.__all__:
        function = getattr(found, name)
        if not inspect.isfunction(function):
            continue
        signature = inspect.signature(function)
        annotations = [p.annotation for p in signature.parameters.values()]
        annotations.append(signature.return_annotation)
        assert inspect.Signature.empty not in annotations, name


def test_the_package_says_that_it_has_types():
    for package in (causal_conv1d, causal_conv1d_cuda):
        assert importlib.resources.files(package).joinpath("py.typed").is_file()


@pytest.mark.parametrize("distribution", ("causal_conv1d", "causal-conv1d"))
def test_version_is_the_distributions(distribution):
    assert importlib.metadata.version(distribution) == causal_conv1d.__version__


def test_version_is_1_7_0_with_a_local_label():
    public, plus, label = causal_conv1d.__version__.partition("+")
    assert public == "1.7.0" and plus and label


def test_import_before_torch(tmp_path):
    """import torch need not come first."""
    code = (
        "import causal_conv1d, sys; assert 'torch' in sys.modules; causal_conv1d.causal_conv1d_fn"
    )
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=env)


# -------------------------------------------------------------------------------------- call forms


@pytest.fixture
def case(device):
    return make_case((2, 6, 9), 4, states=True, seq_idx="packed", device=device)


@pytest.fixture
def buffer(case, device):
    return torch.full(case.state_shape, torch.nan, device=device)


def expected_of(case, activation, bias=True, seq_idx=True, states=True):
    return causal_conv1d_ref(
        case.x.double(),
        case.weight.double(),
        case.bias.double() if bias else None,
        case.initial_states.double() if states else None,
        True,
        None,
        activation,
        case.seq_idx if seq_idx else None,
    )


def assert_out(found, expected):
    assert isinstance(found, torch.Tensor), "out alone is wanted"
    assert_close(found, expected, OUT[torch.float32])


def assert_final_states(found, expected):
    assert torch.equal(found, expected.float())


def assert_both(found, expected):
    assert isinstance(found, tuple) and len(found) == 2
    assert_out(found[0], expected[0])
    assert_final_states(found[1], expected[1])


def given(case):
    return (case.x, case.weight, case.bias, case.seq_idx, case.initial_states)


def test_seed_form_without_a_buffer(case):
    """The line by which the seeds verify an installation; upstream silently drops its SiLU."""
    found = causal_conv1d_fn(case.x, case.weight, None, None, None, None, "silu")
    assert_out(found, expected_of(case, "silu", False, False, False)[0])
    assert_out(
        causal_conv1d_fn(*given(case), None, "silu"),
        expected_of(case, "silu")[0],
    )
    assert_out(causal_conv1d_fn(*given(case), False, "swish"), expected_of(case, "silu")[0])


@pytest.mark.parametrize(
    "tail", ((None, None), (None,), (False,), (False, None), (None, None, None))
)
def test_forms_that_agree(tail, case):
    found = causal_conv1d_fn(case.x, case.weight, None, None, None, *tail)
    assert_out(found, expected_of(case, None, False, False, False)[0])


@pytest.mark.parametrize("activation", (None, "silu", "swish"))
def test_upstream_form_with_final_states(activation, case, buffer):
    expected = expected_of(case, activation)
    assert_both(causal_conv1d_fn(*given(case), True, None, activation), expected)
    assert_both(causal_conv1d_fn(*given(case), True, buffer, activation), expected)
    assert_final_states(buffer, expected[1])
    assert_both(
        causal_conv1d_fn(
            x=case.x,
            weight=case.weight,
            bias=case.bias,
            seq_idx=case.seq_idx,
            initial_states=case.initial_states,
            return_final_states=True,
            activation=activation,
        ),
        expected,
    )


def test_upstream_form_ignores_a_buffer_that_is_not_asked_for(case, buffer):
    expected = expected_of(case, None)[0]
    assert_out(causal_conv1d_fn(*given(case), False, buffer), expected)
    assert_out(causal_conv1d_fn(*given(case), final_states_out=buffer), expected)
    assert buffer.isnan().all()


@pytest.mark.parametrize(
    ("tail", "keywords", "activation"),
    [
        (("silu",), {}, "silu"),
        ((), {}, None),
        ((None,), {}, None),
        ((), {"activation": "silu"}, "silu"),
        ((None, "silu"), {}, "silu"),
    ],
)
@pytest.mark.parametrize("needs_grad", (False, True))
def test_seed_form_with_a_buffer(tail, keywords, activation, needs_grad, case, buffer):
    case.x.requires_grad_(needs_grad)
    expected, expected_final = expected_of(case, activation)
    assert_out(causal_conv1d_fn(*given(case), buffer, *tail, **keywords), expected)
    assert_final_states(buffer, expected_final)


def test_mixed_form_returns_both(case):
    found = causal_conv1d_fn(*given(case), True, "silu")
    assert_both(found, expected_of(case, "silu"))


@pytest.mark.parametrize("make", (torch.tensor, numpy.bool_))
def test_a_truth_value_of_any_kind_as_return_final_states(make, case):
    expected = expected_of(case, None)
    assert_both(causal_conv1d_fn(*given(case), make(True)), expected)
    assert_out(causal_conv1d_fn(*given(case), make(False)), expected[0])


def test_legacy_forms(case):
    """1.0: (x, weight, bias, activation); 1.1: (x, weight, bias, seq_idx, activation)."""
    x, weight, bias, seq_idx, _ = given(case)
    expected = expected_of(case, "silu", seq_idx=False, states=False)[0]
    assert_out(causal_conv1d_fn(x, weight, bias, "silu"), expected)
    assert_out(causal_conv1d_fn(x, weight, bias, None, "silu"), expected)
    expected = expected_of(case, "silu", states=False)[0]
    assert_out(causal_conv1d_fn(x, weight, bias, seq_idx, "silu"), expected)


@pytest.mark.parametrize(
    "tail",
    (
        ("silu",),
        (None, "silu", None, None, None, "silu"),
        (None, None, "silu", None, "silu"),
        (None, None, None, "silu"),
        (None, None, None, None, "silu", "silu"),
        (None, "silu", "silu"),
    ),
    ids=str,
)
def test_misplaced_and_repeated_strings_are_type_errors(tail, case):
    with pytest.raises(TypeError):
        causal_conv1d_fn(case.x, case.weight, *tail)


@pytest.mark.parametrize("position", (3, 4, 6))
def test_positional_activation_and_keyword_too_is_a_type_error(position, case):
    tail = [None] * (position - 2) + ["silu"]
    with pytest.raises(TypeError, match="multiple values for .*activation"):
        causal_conv1d_fn(case.x, case.weight, *tail, activation="silu")


def test_two_buffers_are_a_type_error(case, buffer):
    with pytest.raises(TypeError):
        causal_conv1d_fn(*given(case), buffer, buffer, "silu")
    assert buffer.isnan().all()


@pytest.mark.parametrize("activation", ("gelu", "SiLU", "", True))
def test_unknown_activations(activation, case):
    message = "activation must be None, silu, or swish"
    state = case.initial_states.clone()
    calls = (
        lambda: causal_conv1d_fn(case.x, case.weight, activation=activation),
        lambda: causal_conv1d_update(case.x, state, case.weight, None, activation),
        lambda: causal_conv1d_ref(case.x, case.weight, activation=activation),
    )
    if isinstance(activation, str):  # else it is taken for a wrong final_states_out
        calls += (
            lambda: causal_conv1d_fn(case.x, case.weight, None, None, None, None, activation),
        )
    for call in calls:
        with pytest.raises(NotImplementedError, match=message):
            call()
    assert torch.equal(state, case.initial_states)


@pytest.mark.parametrize("needs_grad", (False, True))
def test_causal_conv1d_function_apply(needs_grad, case):
    case.x.requires_grad_(needs_grad)
    expected = expected_of(case, "silu")
    assert_both(CausalConv1dFn.apply(*given(case), True, None, "silu"), expected)
    assert_out(CausalConv1dFn.apply(*given(case), False, None, "silu"), expected[0])


# ----------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("needs_grad", (False, True))
@pytest.mark.parametrize("layout", (*LAYOUTS, "expanded"))
def test_out_has_the_layout_of_x_and_is_no_view(layout, needs_grad, device):
    case = make_case((3, 6, 9), 4, layout=layout, states=True, device=device)
    case.weight.requires_grad_(needs_grad)
    out, final_states = causal_conv1d_fn(
        case.x, case.weight, case.bias, None, case.initial_states, True
    )
    assert out.stride() == torch.empty_like(case.x).stride()
    assert out.requires_grad == needs_grad
    for result in (out, final_states):
        assert result._base is None and not result._is_view()
    y = causal_conv1d_update(case.x, case.initial_states, case.weight.detach(), case.bias)
    assert y.stride() == torch.empty_like(case.x).stride()
    assert y._base is None and not y._is_view()


def test_out_of_a_channel_last_slice_is_dense_channel_last(device):
    x = torch.randn(2, 7, 30, device=device)[:, :, 3:11].transpose(1, 2)
    out = causal_conv1d_fn(x, torch.randn(8, 4, device=device))
    assert out.stride() == (7 * 8, 1, 8)


@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_gradient_of_x_has_the_layout_of_x(layout, device):
    x = lay_out(randn(2, 6, 9), layout, device).detach().requires_grad_()
    out = causal_conv1d_fn(x, randn(6, 4, device=device), activation="silu")
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert dx.stride() == x.stride()


def test_update_takes_two_and_three_dimensions(device):
    x, weight = randn(2, 6, device=device), randn(6, 4, device=device)
    state = randn(2, 6, 4, device=device)
    other = state.clone()
    flat = causal_conv1d_update(x, state, weight, None, "silu")
    deep = causal_conv1d_update(x[:, :, None], other, weight, None, "silu")
    assert flat.shape == (2, 6) and deep.shape == (2, 6, 1)
    assert torch.equal(flat, deep[:, :, 0]) and torch.equal(state, other)
