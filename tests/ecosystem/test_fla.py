"""FLA's ShortConvolution with its ``cuda`` backend, which is this library.

The reference is the layer's own nn.Conv1d in float64. FLA's Triton kernels run on CUDA only, so
what needs them (its final states, its Triton backend, its mixed function) is tested there.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from operator_calls import OperatorCalls
from tolerances import OUT, PARAM

pytest.importorskip("fla")

from fla.modules import ShortConvolution  # noqa: E402
from fla.modules.causal_conv1d.backends.cuda import fast_causal_conv1d_fn  # noqa: E402

BATCH, SEQLEN, DIM = 2, 53, 40
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def no_other_backend(monkeypatch):
    monkeypatch.delenv("FLA_CONV_BACKEND", raising=False)


def make_layer(device, width=4, bias=True, activation="silu", dtype=torch.float32, dim=DIM):
    torch.manual_seed(0)
    layer = ShortConvolution(dim, width, bias=bias, activation=activation, backend="cuda")
    assert layer.backend == "cuda"
    return layer.to(device, dtype)


def make_x(device, dtype=torch.float32, batch=BATCH, seqlen=SEQLEN, dim=DIM, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, seqlen, dim, generator=generator).to(device, dtype)


def reference(layer, x):
    """The layer's own Conv1d and activation, without FLA's forward."""
    z = torch.nn.Conv1d.forward(layer, x.transpose(1, 2))[..., : x.shape[1]]
    return (F.silu(z) if layer.activation else z).transpose(1, 2)


def compare(layer, x, residual=None, sequences=None):
    """Values and all gradients of one call against the reference, sequence by sequence."""
    exact = copy.deepcopy(layer).double()
    inputs = [x] if residual is None else [x, residual]
    inputs64 = [tensor.double() for tensor in inputs]
    leaves = [tensor.requires_grad_() for tensor in inputs] + list(layer.parameters())
    leaves64 = [tensor.requires_grad_() for tensor in inputs64] + list(exact.parameters())

    options = {} if sequences is None else {"cu_seqlens": sequences}
    with OperatorCalls() as calls:
        out, state = layer(x, residual=residual, **options)
        dout = torch.randn_like(out)
        found = torch.autograd.grad(out, leaves, dout)
    assert state is None
    assert (calls.forward, calls.backward) == (1, 1)

    lengths = x.shape[1] if sequences is None else sequences.diff().tolist()
    out64 = torch.cat([reference(exact, part) for part in inputs64[0].split(lengths, 1)], dim=1)
    if residual is not None:
        out64 = out64 + inputs64[1]
    wanted = torch.autograd.grad(out64, leaves64, dout.double())
    assert_close(out, out64, OUT[x.dtype])
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == x.dtype
        assert_close(got, want, max(OUT[x.dtype], PARAM[x.dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ("silu", None))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("width", (3, 4))
def test_values_and_gradients(width, bias, activation, dtype, device):
    compare(make_layer(device, width, bias, activation, dtype), make_x(device, dtype))


def test_residual_is_added_in_place(device):
    """FLA adds it to our output in place."""
    compare(make_layer(device), make_x(device), residual=make_x(device, seed=2))


def test_dim_that_is_no_multiple_of_8(device):
    compare(make_layer(device, dim=37), make_x(device, dim=37))


def test_packed_sequences(device):
    bounds = torch.tensor([0, 1, 20, 22, SEQLEN], device=device)
    compare(make_layer(device), make_x(device, batch=1), sequences=bounds)


def test_token_by_token(device):
    """Decoding from FLA's cache, which is as long as the kernel is wide."""
    layer, x = make_layer(device), make_x(device)
    cache = torch.zeros(BATCH, DIM, 4, device=device)
    with torch.no_grad(), OperatorCalls() as calls:
        whole, _ = layer(x)
        for t in range(SEQLEN):
            out, cache = layer(x[:, t : t + 1], cache=cache, output_final_state=True)
            assert torch.equal(out, whole[:, t : t + 1])
    assert (calls.forward, calls.update) == (1, SEQLEN)
    assert torch.equal(cache, x[:, -4:].transpose(1, 2))


def test_prompt_then_tokens(cuda):
    layer, x = make_layer(cuda), make_x(cuda)
    with torch.no_grad():
        whole, _ = layer(x)
        out, cache = layer(x[:, :30], output_final_state=True)
        assert torch.equal(out, whole[:, :30])
        for t in range(30, SEQLEN):
            out, cache = layer(x[:, t : t + 1], cache=cache, output_final_state=True)
            assert torch.equal(out, whole[:, t : t + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_its_triton_backend(dtype, cuda):
    layer, x = make_layer(cuda, dtype=dtype), make_x(cuda, dtype)
    triton = copy.deepcopy(layer)
    triton.backend = "triton"
    dout, results = make_x(cuda, dtype, seed=3), []
    for each in (layer, triton):
        with OperatorCalls() as calls:
            leaf = x.detach().clone().requires_grad_()
            out, _ = each(leaf)
            results.append((out, *torch.autograd.grad(out, [leaf, *each.parameters()], dout)))
        assert calls.total == (2 if each is layer else 0)
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 2 * OUT[dtype])  # both are rounded


@pytest.mark.parametrize("packed", (False, True))
def test_triton_forward_with_our_backward(packed, cuda):
    """fast_causal_conv1d_fn calls causal_conv1d_bwd_function by keywords, with its own dx."""
    layer = make_layer(cuda)
    x = make_x(cuda, batch=1).requires_grad_()
    leaves = [x, layer.weight, layer.bias]
    bounds = torch.tensor([0, 20, SEQLEN], device=cuda) if packed else None
    ours, _ = layer(x, cu_seqlens=bounds)
    dout = torch.randn_like(ours)
    wanted = torch.autograd.grad(ours, leaves, dout)
    with OperatorCalls() as calls:
        out, _ = fast_causal_conv1d_fn(
            x, layer.weight.squeeze(1), layer.bias, activation="silu", cu_seqlens=bounds
        )
        found = torch.autograd.grad(out, leaves, dout)
    assert (calls.forward, calls.backward) == (0, 1)
    for got, want in zip((out, *found), (ours, *wanted), strict=True):
        assert_close(got, want, 2 * PARAM[torch.float32])


BENCHMARK = """
import sys
import torch
from triton.runtime.autotuner import Autotuner

import peers

init = Autotuner.__init__
Autotuner.__init__ = lambda self, fn, names, configs, *rest, **options: init(
    self, fn, names, configs[:1], *rest, **options
)
found, missing = peers.find()
assert missing == {}, missing
device = sys.argv[1]
torch.manual_seed(0)
for width, with_bias, silu in ((4, True, True), (3, False, False), (9, True, False)):
    x, dout = (torch.randn(2, 20, 16, device=device).mT for _ in range(2))
    leaves = [x, torch.randn(16, width, device=device)]
    leaves += [torch.randn(16, device=device)] if with_bias else []
    leaves = [leaf.requires_grad_() for leaf in leaves]
    arguments = (*leaves[1:], *([] if with_bias else [None]), silu)
    expected = peers.conv1d_and_silu(x, *arguments)
    grads = torch.autograd.grad(expected, leaves, dout)
    with torch.no_grad():
        out, *_ = found["FLA"].forward(x, *arguments)
        dx, dweight, *_ = found["FLA"].backward(x, dout, *arguments)
    for a, b in ((out.mT, expected), (dx.mT, grads[0]), (dweight, grads[1])):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
"""


def test_what_the_benchmark_times_is_the_convolution(device):
    """On the CPU in Triton's interpreter, with one configuration of each kernel."""
    root = Path(__file__).resolve().parent.parent.parent
    path = os.pathsep.join([str(root / "benchmarks"), *(p for p in sys.path if p)])
    env = os.environ | {"PYTHONPATH": path} | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
    command = [sys.executable, "-c", BENCHMARK, device]
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LAYERS = """
import sys
import torch
from triton.runtime.autotuner import Autotuner

init = Autotuner.__init__
Autotuner.__init__ = lambda self, fn, names, configs, *rest, **options: init(
    self, fn, names, configs[:1], *rest, **options
)
import causal_conv1d
from fla.modules import ShortConvolution

device = sys.argv[1]
torch.manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, device=device)


def results(layer, x, residual, options):
    options = dict(options)
    leaves = [x.clone().requires_grad_(), *layer.parameters()]
    if "cache" in options and device == "cuda":  # the interpreter cannot run FLA's gradient of it
        leaves.append(options["cache"].clone().requires_grad_())
        options["cache"] = leaves[-1]
    out, state = layer(leaves[0] * 1, residual, **options)  # FLA changes x where there is a mask
    if "cache" in options and device == "cpu":
        return [out, state]
    torch.manual_seed(1)
    return [out, state, *torch.autograd.grad((out * torch.randn_like(out)).sum(), leaves)]


bounds = torch.tensor([0, 3, 4, 20], device=device)
final = {"output_final_state": True}
for width, bias, activation in ((4, True, "silu"), (3, False, None)):
    theirs = ShortConvolution(16, width, bias, activation, device=device)
    ours = causal_conv1d.ShortConvolution(16, width, bias, activation, device=device)
    ours.load_state_dict(theirs.state_dict())
    x, residual = normal(2, 20, 16), normal(2, 20, 16)
    mask = torch.ones(2, 20, device=device)
    mask[0, :4] = 0
    for call in (
        (x, None, {}),
        (x, residual, final),
        (x, None, {"mask": mask}),
        (x, residual, final | {"cache": normal(2, 16, width)}),
        (x[:, :2], None, final | {"cache": normal(2, 16, width)}),
        (x[:1], residual[:1], final | {"cu_seqlens": bounds}),
        (x[:1], residual[:1], final | {"cu_seqlens": bounds, "cache": normal(3, 16, width)}),
    ):
        for found, expected in zip(results(ours, *call), results(theirs, *call), strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        caches = [torch.zeros(2, 16, width, device=device) for _ in range(2)]
        tokens = [(x[:, t : t + 1], residual[:, t : t + 1]) for t in range(5)]
        for token, added in [*tokens, (x[:, 5:6], None)]:
            (a, _), (b, after) = (
                layer(token, added, cache=cache, **final)
                for layer, cache in zip((theirs, ours), caches, strict=True)
            )
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
            assert torch.equal(*caches) and after is caches[1]
        caches = [normal(5, 16, width)] * 2
        caches[1] = caches[0].clone()
        a, b = (
            layer(x[:1, :5], cache=cache, cu_seqlens=torch.arange(6, device=device), **final)[0]
            for layer, cache in zip((theirs, ours), caches, strict=True)
        )
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert torch.equal(*caches)
"""


def test_our_layer_has_the_results_of_flas(device):
    """On the CPU FLA's kernels run in Triton's interpreter."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    env |= {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    command = [sys.executable, "-W", "ignore", "-c", LAYERS, device]
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
