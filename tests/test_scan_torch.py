"""The selective scan within torch: derivatives, torch.func, torch.compile, export, other modes."""

import pytest
import torch
from helpers import assert_close, randn
from scan_helpers import INPUTS, arguments, gradients_of_outputs, make_scan, ops, run_forward
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from causal_conv1d import selective_scan_fn
from causal_conv1d.reference import selective_scan_ref

MAPPED = {
    "all": (0,) * 9,
    "u": (1, *(None,) * 8),
    "parameters": (None, None, 1, None, None, 0, None, 0, None),
    "some": (None, 0, None, 2, 0, None, 3, None, 1),
}


def small(packed=False, constant="", device="cpu", seed=0):
    """In float64, for torch's own derivatives of the reference."""
    bounds = [0, 3, 3, 6] if packed else None
    return make_scan(
        1 if packed else 2,
        4,
        6,
        2,
        2,
        torch.float64,
        bounds=bounds,
        constant=constant,
        device=device,
        seed=seed,
    )


def function_of(inputs, function=selective_scan_fn):
    """out and the last states, as a function of the inputs that have gradients."""

    def call(*values):
        return function(
            **dict(zip(INPUTS, values, strict=True)),
            cu_seqlens=inputs["cu_seqlens"],
            delta_softplus=True,
            return_last_state=True,
        )

    return call, tuple(inputs[name] for name in INPUTS)


def loss_of(inputs, function=selective_scan_fn):
    call, values = function_of(inputs, function)
    return lambda *values: sum((result**2).sum() for result in call(*values)), values


def assert_all_close(found, expected, tolerance=1e-10):
    for first, second in zip(found, expected, strict=True):
        assert_close(first, second, tolerance, allow_zero=True)


@pytest.mark.parametrize("constant", ["", "BC"], ids=["variable", "constant"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_gradcheck(device, packed, constant):
    call, values = function_of(small(packed, constant, device))
    values = [value.requires_grad_() for value in values]
    assert torch.autograd.gradcheck(call, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, values, fast_mode=True)


def test_third_derivative(device):
    found = []
    for function in (selective_scan_fn, selective_scan_ref):
        loss, values = loss_of(small(device=device), function)
        values = [value.clone().requires_grad_() for value in values]
        total = loss(*values)
        for _ in range(3):
            gradients = torch.autograd.grad(total, values, create_graph=True)
            total = sum((gradient**2).sum() for gradient in gradients)
        found.append([total.detach()[None]])
    assert_all_close(*found)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_forward_mode(device, packed):
    inputs = small(packed, device=device)
    call, values = function_of(inputs)
    reference, _ = function_of(inputs, selective_scan_ref)
    tangents = tuple(randn(*v.shape, dtype=v.dtype, device=device, seed=9) for v in values)
    (*found, derivatives) = torch.func.jvp(call, values, tangents)
    (*expected, expected_derivatives) = torch.func.jvp(reference, values, tangents)
    assert_all_close(found[0], expected[0])
    assert_all_close(derivatives, expected_derivatives)
    with forward_ad.dual_level():
        leaves = [value.clone().requires_grad_() for value in values]
        duals = [forward_ad.make_dual(v, t) for v, t in zip(leaves, tangents, strict=True)]
        out, last = call(*duals)
        assert_all_close([forward_ad.unpack_dual(t).tangent for t in (out, last)], derivatives)
        # Forward over reverse.
        for function, name in ((call, "found"), (reference, "expected")):
            results = function(*duals)
            gradients = torch.autograd.grad(sum(r.sum() for r in results), leaves)
            tangents_of = [forward_ad.unpack_dual(g).tangent for g in gradients]
            if name == "found":
                first = tangents_of
        assert_all_close(first, tangents_of)


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian"])
def test_torch_func(device, transform):
    found = []
    for function in (selective_scan_fn, selective_scan_ref):
        loss, values = loss_of(small(device=device), function)
        call, _ = function_of(small(device=device), function)
        if transform in ("grad", "hessian"):
            results = getattr(torch.func, transform)(loss, argnums=(2, 3))(*values)
        else:
            first = getattr(torch.func, transform)(lambda *v: call(*v)[0], argnums=(2, 5))  # noqa: B023
            results = first(*values)
        found.append(torch.utils._pytree.tree_leaves(results))
    assert_all_close(*found)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("constant", ["", "B"], ids=["variable", "constant"])
@pytest.mark.parametrize("dims", MAPPED.values(), ids=MAPPED)
def test_vmap(device, dims, constant, packed):
    """Values, and gradients for each entry, of parameters that are not mapped too."""
    each = [small(packed, constant, device, seed) for seed in range(3)]
    if constant:
        dims = tuple(None if i == 3 else dim for i, dim in enumerate(dims))
    values = [
        each[0][name] if dim is None else torch.stack([one[name] for one in each], dim)
        for name, dim in zip(INPUTS, dims, strict=True)
    ]
    found = []
    for function in (selective_scan_fn, selective_scan_ref):
        call, _ = function_of(each[0], function)
        loss, _ = loss_of(each[0], function)
        gradient = torch.func.grad(loss, argnums=tuple(range(9)))
        found.append(
            [
                *torch.vmap(call, in_dims=dims)(*values),
                *torch.vmap(gradient, in_dims=dims)(*values),
            ]
        )
    assert_all_close(*found)


def test_vmap_over_bounds(device):
    inputs = small(True, device=device)
    bounds = torch.tensor([[0, 3, 3, 6], [0, 1, 5, 6]], device=device)
    out = torch.vmap(lambda b: selective_scan_fn(**inputs | {"cu_seqlens": b}))(bounds)
    for i in range(2):
        assert torch.equal(out[i], selective_scan_fn(**inputs | {"cu_seqlens": bounds[i]}))


def test_compile(device):
    """One graph, in training too, with dynamic lengths; the operators are in it."""
    inputs = make_scan(device=device)
    loss, values = loss_of(inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for seqlen in (37, 20):
        found = []
        for function in (compiled, loss):
            cut = [
                v[..., :seqlen] if name in ("u", "delta", "z", "B", "C") else v
                for name, v in zip(INPUTS, values, strict=True)
            ]
            leaves = [value.detach().clone().requires_grad_() for value in cut]
            total = function(*leaves)
            found.append([total.detach()[None], *torch.autograd.grad(total, leaves)])
        assert_all_close(*found, tolerance=1e-6)


def test_export(device):
    """The operator stays in the program, for any length."""

    class Module(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return selective_scan_fn(u, delta, A, B, C, delta_softplus=True)

    inputs = make_scan(groups=1, device=device)
    given = tuple(inputs[name] for name in ("u", "delta", "A", "B", "C"))
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = ({2: length}, {2: length}, None, {3: length}, {3: length})
    program = torch.export.export(Module(), given, dynamic_shapes=shapes)
    assert any(node.target is ops.scan_forward.default for node in program.graph.nodes)
    longer = make_scan(groups=1, seqlen=90, device=device, seed=1)
    given = tuple(longer[name] for name in ("u", "delta", "A", "B", "C"))
    assert torch.equal(program.module()(*given), Module()(*given))


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_opcheck(device, packed):
    inputs = small(packed, device=device)
    dout, dlast = gradients_of_outputs(inputs)
    # Without gradients of gradients: to trace those takes half a minute.
    torch.library.opcheck(ops.scan_backward.default, (*arguments(inputs, True), dout, dlast, 511))
    for name in INPUTS:
        inputs[name].requires_grad_()
    torch.library.opcheck(ops.scan_forward.default, (*arguments(inputs, True), True))


def test_opcheck_without_options(device):
    inputs = small(device=device) | {"D": None, "z": None, "initial_states": None}
    dout, _ = gradients_of_outputs(inputs)
    given = arguments(inputs, False)
    torch.library.opcheck(ops.scan_forward.default, (*given, False))
    torch.library.opcheck(ops.scan_backward.default, (*given, dout, None, 0b10000101))


def test_opcheck_of_operators_that_write(device):
    inputs = small(device=device)
    dout, dlast = gradients_of_outputs(inputs)
    given = arguments(inputs, True)
    out, last = torch.zeros_like(dout), torch.zeros_like(dlast)
    torch.library.opcheck(ops.scan_forward_out.default, (*given, out, out.clone(), last))
    written = [torch.zeros_like(inputs[name]) for name in INPUTS]
    torch.library.opcheck(ops.scan_backward_out.default, (*given, dout, dlast, *written, out))


def test_writing_operators_refuse_gradients(device):
    inputs = small(device=device)
    inputs["A"].requires_grad_()
    dout, _ = gradients_of_outputs(inputs)
    with pytest.raises(RuntimeError, match="selective_scan_fwd: A requires grad"):
        ops.scan_forward_out(*arguments(inputs, True), dout, None, None)


def test_versions_of_what_is_written(device):
    inputs = small(device=device)
    dout, dlast = gradients_of_outputs(inputs)
    out, last = torch.empty_like(dout), torch.empty_like(dlast)
    ops.scan_forward_out(*arguments(inputs, True), out, None, last)
    assert (out._version, last._version) == (1, 1)
    du = torch.empty_like(dout)
    ops.scan_backward_out(*arguments(inputs, True), dout, None, du, *(None,) * 9)
    assert du._version == 1 and dout._version == 0


def test_backward_after_a_change_of_an_input(device):
    inputs = small(device=device)
    B = inputs["B"].requires_grad_()
    out = selective_scan_fn(**inputs)
    with torch.no_grad():
        B.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_saves_the_inputs_alone(device):
    inputs = make_scan(device=device)
    inputs["u"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        selective_scan_fn(**inputs, return_last_state=True)
    pointers = {value.data_ptr() for value in inputs.values() if value is not None}
    assert {tensor.data_ptr() for tensor in saved} == pointers


def test_autocast_casts_nothing(device):
    inputs = make_scan(dtypes={"u": torch.bfloat16, "z": torch.bfloat16}, device=device)
    expected = selective_scan_fn(**inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = selective_scan_fn(**inputs)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


def test_inference_mode(device):
    inputs = make_scan(device=device)
    with torch.inference_mode():
        out = selective_scan_fn(**inputs)
    assert torch.equal(out, run_forward(inputs, False)[0])


def test_negated_views(device):
    """Tensor.imag of a conjugate is one: read as it is, and refused where it is written."""
    inputs = make_scan(device=device)
    u = inputs["u"]
    negated = torch.complex(torch.zeros_like(u), -u).conj().imag
    assert negated.is_neg()
    expected = run_forward(inputs, True)[0]
    assert torch.equal(selective_scan_fn(**inputs | {"u": negated}, delta_softplus=True), expected)
    with pytest.raises(RuntimeError, match="selective_scan_fwd: out is written and must not be a"):
        ops.scan_forward_out(*arguments(inputs, True), negated, None, None)


def test_flops():
    inputs = make_scan(2, 6, 37, 5, device="meta")
    inputs["u"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        selective_scan_fn(**inputs).sum().backward()
    assert counter.get_total_flops() == 3 * 6 * 2 * 6 * 37 * 5


def test_meta_tensors():
    inputs = make_scan(dtype=torch.bfloat16, device="meta")
    out, last = selective_scan_fn(**inputs, return_last_state=True)
    assert (out.device.type, out.dtype, out.shape) == ("meta", torch.bfloat16, (2, 6, 37))
    assert (last.dtype, last.shape) == (torch.float32, (2, 6, 5))
