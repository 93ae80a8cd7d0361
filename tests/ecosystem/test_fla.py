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
