"""What torch expects of any operator: versions of what is written, leaves, inference tensors,
layouts, meta tensors with the errors of real ones, FLOPs, and one registration a process."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from helpers import LAYOUTS, lay_out, make_case, operation, ops, randn
from test_errors import DEFINES_A_SIZE, PREFIX, TENSORS, WRITTEN, arguments_of
from torch.utils.flop_counter import FlopCounterMode

from causal_conv1d import _library, causal_conv1d_fn, causal_conv1d_update, cpp_functions
from causal_conv1d.causal_conv1d_interface import CausalConv1dFn
from causal_conv1d.reference import causal_conv1d_ref
from causal_conv1d_cuda import causal_conv1d_bwd, causal_conv1d_fwd

SHAPE = (2, 8, 10)


# ----------------------------------------------------------------------------- functional operators


def functional_forward(case, states=True):
    operator = ops.forward_states.default if states else ops.forward.default
    return operator(case.x, case.weight, case.bias, case.seq_idx, case.initial_states, case.silu)


def functional_backward(case, needs=(True, True, True)):
    return ops.backward.default(
        case.x,
        case.weight,
        case.bias,
        case.dout,
        case.seq_idx,
        case.initial_states,
        case.dfinal_states,
        *needs,
        case.silu,
    )


def test_a_packet_means_the_default_overload(device):
    """Not the one without autograd."""
    case = make_case(SHAPE, 4, device=device)
    out = ops.forward(case.x.requires_grad_(), case.weight, None, None, None, True)
    assert out.requires_grad
    for name in ops.forward.overloads():
        assert name in ("default", "plain")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_have_the_layout_of_empty_like(layout, device):
    case = make_case(SHAPE, 4, torch.bfloat16, layout=layout, states=True, device=device)
    case.weight = lay_out(case.weight, "transposed")
    out, final_states = functional_forward(case)
    dx, dweight, dbias, dinitial_states = functional_backward(case)
    token = causal_conv1d_update(case.x, case.initial_states.clone(), case.weight)
    expected = [torch.empty_like(t) for t in (case.x, case.weight, case.bias)]
    expected_states = torch.empty_like(case.initial_states)
    assert out.stride() == dx.stride() == token.stride() == expected[0].stride()
    assert dweight.stride() == expected[1].stride() and dbias.stride() == expected[2].stride()
    assert dinitial_states.stride() == expected_states.stride()
    assert final_states.is_contiguous() and final_states.dtype == torch.bfloat16


def test_results_have_the_layout_of_empty_like_for_any_strides(device):
    """Sizes 0 and 1, gaps, overlaps and expanded dimensions included."""
    generator = torch.Generator().manual_seed(1)

    def choose(n):
        return int(torch.randint(n, (), generator=generator))

    memory = torch.zeros(4096, device=device)
    for _ in range(400):
        shape = [choose(4) for _ in range(3)]
        strides = [choose(9) * (1, 3, 10)[choose(3)] for _ in range(3)]
        x = memory.as_strided(shape, strides)
        out = ops.forward.default(
            x, torch.ones(shape[1], 1, device=device), None, None, None, False
        )
        assert out.stride() == torch.empty_like(x).stride(), (shape, strides)


def test_gradients_that_are_not_needed_are_empty(device):
    case = make_case(SHAPE, 4, states=True, device=device)
    everything = functional_backward(case)
    for needs in itertools.product((False, True), repeat=3):
        found = functional_backward(case, needs)
        assert torch.equal(found[0], everything[0])
        for tensor, whole, need in zip(found[1:], everything[1:], needs, strict=True):
            assert torch.equal(tensor, whole) if need else tensor.numel() == 0


def test_functional_operators_give_the_bits_of_those_that_write(device):
    case = make_case(SHAPE, 4, states=True, seq_idx="padded", device=device)
    out, final_states = functional_forward(case)
    written, states = torch.empty_like(case.x), torch.empty(case.state_shape, device=device)
    common = (case.x, case.weight, case.bias, case.seq_idx, case.initial_states)
    operation("forward", device)(*common, written, states, True)
    assert torch.equal(out, written) and torch.equal(final_states, states)
    assert torch.equal(functional_forward(case, states=False), out)


def test_the_name_of_upstreams_autograd_function(device):
    case = make_case(SHAPE, 4, device=device)
    found = CausalConv1dFn.apply(case.x, case.weight, case.bias, None, None, False, None, "silu")
    expected = causal_conv1d_fn(case.x, case.weight, case.bias, activation="silu")
    assert torch.equal(found, expected)


# -------------------------------------------------------------------------- what is written, and to


WRITING = ("forward", "backward", "update", "conv_forward", "conv_backward")


@pytest.mark.parametrize("name", WRITING)
def test_what_is_written_has_a_new_version(name, device):
    arguments = arguments_of(name, device)
    versions = {key: arguments[key]._version for key in TENSORS[name]}
    operation(name, device)(*arguments.values())
    for key, version in versions.items():
        assert (arguments[key]._version > version) == (key in WRITTEN[name]), key


def calls_that_write(device):
    """Public functions by name, each with a tensor that it writes, of a given kind."""
    case = make_case(SHAPE, 4, states=True, device=device)
    x, weight, bias, token = case.x, case.weight, case.bias, case.x[:, :, 0].contiguous()
    states = (2, 8, 3)
    return {
        "update": (states, lambda s: causal_conv1d_update(token, s, weight, bias, "silu")),
        "fn": (states, lambda s: causal_conv1d_fn(x, weight, bias, None, None, True, s)),
        "cpp update": (
            states,
            lambda s: cpp_functions.causal_conv1d_update_function(
                token, s, weight, bias, True, None, None
            ),
        ),
        "cpp fwd": (
            states,
            lambda s: cpp_functions.causal_conv1d_fwd_function(
                x, weight, bias, None, None, s, True
            ),
        ),
        "raw fwd": (
            SHAPE,
            lambda out: causal_conv1d_fwd(x, weight, bias, None, None, out, None, True),
        ),
        "raw bwd": (SHAPE, lambda dx: causal_conv1d_bwd(x, weight, bias, x.clone(), dx, True)),
    }


CALLS = list(calls_that_write("cpu"))


@pytest.mark.parametrize("call", CALLS)
def test_versions_by_the_public_functions(call, device):
    shape, run = calls_that_write(device)[call]
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        tensor = torch.zeros(shape, device=device)
        with mode():
            run(tensor)
        assert tensor._version > 0 and tensor.any(), mode


@pytest.mark.parametrize("call", CALLS)
def test_a_leaf_that_requires_grad_is_not_written(call, device):
    shape, run = calls_that_write(device)[call]
    leaf = torch.zeros(shape, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="requires grad|a leaf Variable"):
        run(leaf)
    assert not leaf.any()
    with torch.no_grad():
        run(leaf)
    assert leaf.any()


@pytest.mark.parametrize("call", CALLS)
def test_an_inference_tensor_is_written_in_inference_mode_alone(call, device):
    shape, run = calls_that_write(device)[call]
    with torch.inference_mode():
        tensor = torch.zeros(shape, device=device)
    with pytest.raises(RuntimeError, match="[Ii]nference"):
        run(tensor)
    with torch.inference_mode():
        assert not tensor.any()
        run(tensor)
        assert tensor.any()


def test_a_refused_call_leaves_the_version(device):
    case = make_case(SHAPE, 4, states=True, device=device)
    token, state = case.x[:, :, 0], case.initial_states.clone()
    with pytest.raises(RuntimeError, match="weight must be"):
        causal_conv1d_update(token, state, case.weight[:3])
    if _library.cpu.registration == _library.STABLE_ABI:  # from Python it may rise
        assert state._version == 0


def test_the_raw_backward_checks_the_sums_that_it_adds_to(device):
    case = make_case(SHAPE, 4, device=device)
    memory = torch.zeros(200, device=device)
    good = torch.zeros(8, 4, device=device), torch.zeros(8, device=device)
    bad = (
        (memory[:32].view(8, 4), memory[28:36]),
        (memory.as_strided((8, 4), (2, 1)), good[1]),
        (good[0], good[1][:1].expand(8)),
        (good[0].clone().requires_grad_(), good[1]),
    )
    common = (case.x, case.weight, case.bias, case.dout, None, None, None)
    for dweight, dbias in bad:
        dx = torch.zeros_like(case.x)
        with pytest.raises(RuntimeError, match="^causal_conv1d_bwd: (dweight|dbias)"):
            causal_conv1d_bwd(*common, dx, dweight, dbias, None, True)
        assert not dx.any() and not dweight.any() and not dbias.any()


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_update_with_parameters_that_require_grad(backend, device):
    """As in decoding without no_grad; nothing is asked of its gradient."""
    torch._dynamo.reset()
    case = make_case(SHAPE, 4, states=True, device=device)
    weight, token = case.weight.requires_grad_(), case.x[:, :, 0].contiguous()
    step = torch.compile(lambda x, s: causal_conv1d_update(x, s, weight, None), backend=backend)
    states = case.initial_states.clone(), case.initial_states.clone()
    out = step(token, states[0])
    torch.testing.assert_close(out, causal_conv1d_update(token, states[1], weight, None))
    assert torch.equal(*states)
    with pytest.raises(RuntimeError, match="causal_conv1d_update: it has no derivative"):
        out.sum().backward()


def test_a_backward_after_the_state_was_overwritten_is_refused(device):
    case = make_case(SHAPE, 4, states=True, device=device)
    weight, state = case.weight.requires_grad_(), case.initial_states.clone()
    out = causal_conv1d_fn(case.x, weight, case.bias, None, state, activation="silu")
    with torch.no_grad():
        causal_conv1d_update(case.x[:, :, 0], state, weight, case.bias, "silu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", WRITING)
def test_operators_that_write_have_no_derivative(name, device):
    for argument in TENSORS[name]:
        arguments = arguments_of(name, device)
        if not arguments[argument].is_floating_point():
            continue
        arguments[argument].requires_grad_()
        with pytest.raises(RuntimeError, match=rf"^{PREFIX[name]}: {argument} requires grad"):
            operation(name, device)(*arguments.values())


def test_negated_views(device):
    x, weight, state = randn(2, 8), randn(8, 4), randn(2, 8, 3)
    x, weight, state = (tensor.to(device) for tensor in (x, weight, state))
    expected = causal_conv1d_update(-x, state.clone(), -weight)
    found = causal_conv1d_update(torch._neg_view(x), state.clone(), torch._neg_view(weight))
    assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match=r"^causal_conv1d_update: conv_state is written"):
        causal_conv1d_update(x, torch._neg_view(state), weight)
    rows = x[:, :, None].expand(2, 8, 5)
    found = causal_conv1d_fn(torch._neg_view(rows), weight)
    assert torch.equal(found, causal_conv1d_fn(-rows, weight))


# ------------------------------------------------------------------- final_states_out and gradients


@pytest.mark.parametrize("seqlen", (1, 2, 10))
def test_states_kept_in_place_while_training(seqlen, device):
    case = make_case((2, 8, seqlen), 4, states=True, device=device)

    def gradients(in_place):
        leaves = [case.x, case.weight, case.bias, case.initial_states]
        leaves = [tensor.detach().clone().requires_grad_() for tensor in leaves]
        states = leaves[3] * 1
        target = states if in_place else torch.empty_like(states)
        out, final = causal_conv1d_fn(*leaves[:3], None, states, True, target, "silu")
        assert final is target
        return torch.autograd.grad(out.square().sum() + final.pow(3).sum(), leaves)

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b) and a.any()


@pytest.mark.parametrize("is_detached", (False, True), ids=("", "detached"))
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_states_kept_in_place_in_a_compiled_graph(backend, is_detached, device):
    """Inductor would compute a clone again in the backward, from the state then overwritten."""
    torch._dynamo.reset()
    case = make_case(SHAPE, 4, states=True, device=device)
    weight = case.weight.requires_grad_()

    def function(x, weight, states):
        states = states.detach() if is_detached else states
        out, _ = causal_conv1d_fn(x, weight, None, None, states, True, states, "silu")
        return out

    results = []
    for run in (torch.compile(function, backend=backend, fullgraph=True), function):
        states = case.initial_states.clone()
        out = run(case.x, weight, states)
        results.append((*torch.autograd.grad(out.square().sum(), weight), states))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", (None, "aot_eager"))
def test_final_states_out_in_a_view_of_a_cache(backend, device):
    torch._dynamo.reset()
    case = make_case(SHAPE, 4, device=device)

    def function(x, weight, cache):
        return causal_conv1d_fn(x, weight, None, None, None, True, cache[3], "silu")

    call = function if backend is None else torch.compile(function, backend=backend, fullgraph=True)
    found, expected = [], []
    for run, results in ((call, found), (function, expected)):
        cache = torch.zeros(8, 2, 8, 3, device=device)
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (case.x, case.weight)]
        out, final = run(*leaves, cache)
        assert final.requires_grad
        results += torch.autograd.grad(out.sum() + final.pow(2).sum(), leaves)
        assert torch.equal(cache[3], case.x[..., -3:])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("needs_grad", (False, True))
def test_a_wrong_final_states_out_is_refused(needs_grad, device):
    case = make_case(SHAPE, 4, device=device)
    x = case.x.requires_grad_(needs_grad)
    wrong = (
        torch.zeros(2, 8, 4, device=device),
        torch.zeros(8, 3, device=device),
        torch.zeros(2, 8, 3, device=device, dtype=torch.int32),
        torch.zeros(2, 8, 3, device=device, dtype=torch.float64),
        torch.zeros(24, device=device).as_strided((2, 8, 3), (8, 1, 1)),
        torch.zeros(2, 1, 3, device=device).expand(2, 8, 3),
    )
    for tensor in wrong:
        with pytest.raises(RuntimeError, match=r"^causal_conv1d_fn: final_states_out (must|is)"):
            causal_conv1d_fn(x, case.weight, None, None, None, True, tensor)
        assert not tensor.any()


# ------------------------------------------------------------------------------ meta tensors, FLOPs


def message_of(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return None


def wrong_arguments(name, device):
    """Arguments with one that is wrong, in many ways; but not by an index, which has no value on
    meta tensors."""

    def right():
        arguments = arguments_of(name, device)
        if name == "update":
            arguments["conv_state_indices"].zero_()
        return arguments

    for argument in TENSORS[name]:
        value = right()[argument].nan_to_num(1)
        bad = [value[None], value[0], value.flatten()[0], value.to(torch.complex64)]
        bad += [value.to(torch.int16), value.to(torch.float64), value.to(torch.float8_e5m2)]
        for i in range(value.dim()):
            bad.append(torch.cat([value, value.narrow(i, 0, 1)], dim=i))
            bad.append(value.narrow(i, 0, value.shape[i] - 1))
            if value.shape[i] > 1 and argument in WRITTEN[name]:
                bad.append(value.narrow(i, 0, 1).expand(value.shape))
        for tensor in bad:
            yield argument, right() | {argument: tensor}


@pytest.mark.parametrize("name", WRITING)
def test_meta_tensors_give_the_errors_of_real_ones(name, device):
    messages = set()
    for argument, arguments in wrong_arguments(name, device):
        meta = {
            key: value.to("meta") if isinstance(value, torch.Tensor) else value
            for key, value in arguments.items()
        }
        for key, value in arguments.items():
            if isinstance(value, torch.Tensor) and 0 in value.stride():
                meta[key] = torch.empty_strided(value.shape, value.stride(), device="meta")
        operator = operation(name, device)
        real = message_of(lambda: operator(*arguments.values()))  # noqa: B023
        fake = message_of(lambda: operator(*meta.values()))  # noqa: B023
        assert fake == real, (argument, real, fake)
        messages.add(real)
    assert len(messages) > len(DEFINES_A_SIZE)


def test_meta_tensors_of_varlen_states(device):
    x, bounds = randn(20, 6, device=device), torch.tensor([0, 3, 20], device=device)
    for arguments in (
        (x, bounds, 4),
        (x[0], bounds, 4),
        (x, bounds.float(), 4),
        (x, bounds[:0], 4),
        (x, bounds, -1),
    ):
        real = message_of(lambda: ops.varlen_states(*arguments))  # noqa: B023
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
        assert message_of(lambda: ops.varlen_states(*meta)) == real  # noqa: B023


def test_flops_are_those_of_conv1d(device):
    x, weight = randn(2, 8, 64, device=device), randn(8, 4, device=device)
    x.requires_grad_()
    weight.requires_grad_()
    forward = 2 * x.numel() * 4

    def count(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    padded = torch.nn.functional.pad(x.detach(), (3, 0))
    conv1d = count(lambda: torch.nn.functional.conv1d(padded, weight.detach()[:, None], groups=8))
    assert count(lambda: causal_conv1d_fn(x.detach(), weight.detach())) == conv1d == forward
    assert count(lambda: causal_conv1d_fn(x, weight, return_final_states=True)) == forward
    assert count(lambda: causal_conv1d_fn(x, weight).sum().backward()) == 3 * forward
    state = torch.zeros(2, 8, 3, device=device)
    token = x[:, :, 0].detach()
    assert count(lambda: causal_conv1d_update(token, state, weight.detach())) == 2 * 16 * 4


FLOPS_IN_EITHER_ORDER = """
import torch
{}
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    causal_conv1d.causal_conv1d_fn(torch.randn(1, 2, 8), torch.randn(2, 4))
assert counter.get_total_flops() == 2 * 16 * 4
"""


@pytest.mark.parametrize("modules", ["causal_conv1d", "torch.utils.flop_counter, causal_conv1d"])
def test_flops_are_counted_whatever_is_imported_first(modules):
    program = FLOPS_IN_EITHER_ORDER.format(f"import {modules}")
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")


# -------------------------------------------------------------------------------------- the process


SLOW = "triton torch._dynamo torch._inductor torch.distributed.tensor torch.utils.flop_counter"


def test_import_leaves_out_what_is_slow_to_import():
    """Triton reads its environment when it is imported, so that is left to the user."""
    program = f"""
import sys, torch
before = set(sys.modules)
import causal_conv1d
slow = {SLOW.split()}
assert [name for name in slow if name in sys.modules and name not in before] == []
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")


AGAIN = """
import importlib, sys, torch
import causal_conv1d
x, w = torch.randn(2, 4, 9, requires_grad=True), torch.randn(4, 4)
expected = causal_conv1d.causal_conv1d_fn(x, w)
for _ in range(2):
    for name in [n for n in sys.modules if n.startswith("causal_conv1d")]:
        del sys.modules[name]
    import causal_conv1d
    import gc; gc.collect()
    found = causal_conv1d.causal_conv1d_fn(x, w)
    assert torch.equal(found, expected)
    found.sum().backward()
    torch.vmap(lambda x: causal_conv1d.causal_conv1d_fn(x[None], w))(x)
importlib.reload(causal_conv1d._library)
assert torch.equal(causal_conv1d.causal_conv1d_fn(x, w), expected)
"""


def test_the_package_can_be_imported_again():
    subprocess.run([sys.executable, "-c", AGAIN], check=True, cwd="/")


def test_values_of_the_functional_operators(device):
    """The reference's, as a guard against a fallback that hides behind equal bits."""
    case = make_case(SHAPE, 4, states=True, device=device)
    out, final_states = functional_forward(case)
    expected, expected_final = causal_conv1d_ref(
        case.x, case.weight, case.bias, case.initial_states, True, activation="silu"
    )
    torch.testing.assert_close(out, expected)
    assert torch.equal(final_states, expected_final)
    assert math.isfinite(out.sum().item())
