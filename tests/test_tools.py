"""Tools of torch that follow or keep operators: ONNX, jit, export, checkpointing, the profiler."""

import functools

import numpy
import pytest
import torch
from helpers import make_case, randn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

DIM, SEQLEN = 8, 10
IS_NEW = torch.__version__ >= (2, 9)  # before it, ONNX's exporter does not say that it is at work


class Block(torch.nn.Module):
    """A gated convolution between two projections, as in Mamba."""

    def __init__(self, activation="silu"):
        super().__init__()
        torch.manual_seed(0)
        self.into, self.back = torch.nn.Linear(DIM, 2 * DIM), torch.nn.Linear(DIM, DIM)
        self.conv1d = torch.nn.Conv1d(DIM, DIM, 4, groups=DIM)
        self.activation = activation

    def convolve(self, x):
        return causal_conv1d_fn(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation=self.activation
        )

    def forward(self, h):
        x, z = self.into(h).transpose(1, 2).chunk(2, 1)
        y = self.convolve(x)
        return self.back((y * torch.nn.functional.silu(z)).transpose(1, 2))


class Chunk(Block):
    """With its state as input and output."""

    def forward(self, x, states):
        return causal_conv1d_fn(
            x,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            None,
            states,
            return_final_states=True,
            activation=self.activation,
        )


class Packed(Block):
    def forward(self, x, seq_idx):
        weight = self.conv1d.weight.squeeze(1)
        return causal_conv1d_fn(x, weight, self.conv1d.bias, seq_idx, activation=self.activation)


class Step(Block):
    """One token, with its state as input and output."""

    def forward(self, x, state):
        weight = self.conv1d.weight.squeeze(1)
        y = causal_conv1d_update(x, state, weight, self.conv1d.bias, self.activation)
        return y, state


class Ring(Block):
    def forward(self, x, state, lens):
        weight = self.conv1d.weight.squeeze(1)
        y = causal_conv1d_update(x, state, weight, self.conv1d.bias, self.activation, lens)
        return y, state


def block_inputs(batch, seqlen):
    return (randn(batch, seqlen, DIM, seed=batch),)


def chunk_inputs(batch, seqlen):
    return randn(batch, DIM, seqlen, seed=batch), randn(batch, DIM, 3, seed=batch + 9)


def packed_inputs(batch, seqlen):
    ids = (torch.arange(seqlen) // 4).int().expand(batch, seqlen).clone()
    ids[:, -2:] = -1
    return randn(batch, DIM, seqlen, seed=batch), ids


def step_inputs(batch, _):
    return randn(batch, DIM, seed=batch), randn(batch, DIM, 5, seed=batch + 9)


def ring_inputs(batch, _):
    return (*step_inputs(batch, _), torch.arange(batch, dtype=torch.int32) * 3 + 1)


MODELS = {  # the model, its inputs, and which of their dimensions vary: B batch, L length
    "block": (Block, block_inputs, ("BL",)),
    "chunk": (Chunk, chunk_inputs, ("B L", "B")),
    "packed": (Packed, packed_inputs, ("B L", "BL")),
    "step": (Step, step_inputs, ("B", "B")),
    "ring": (Ring, ring_inputs, ("B", "B", "B")),
}


def run_onnx(path, inputs):
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    values = [tensor.detach().numpy() for tensor in inputs]
    return session.run(None, dict(zip(names, values, strict=True)))


@pytest.mark.parametrize("activation", (None, "silu"))
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dynamo", (False, True), ids=("trace", "dynamo"))
def test_onnx(dynamo, name, activation, tmp_path):
    """Exported with one batch and length, run with others."""
    for module in ("onnx", "onnxruntime", *(("onnxscript",) if dynamo else ())):
        pytest.importorskip(module)
    if dynamo and not IS_NEW:
        pytest.skip("this torch's exporter does not say that it is at work")
    make, inputs_of, varying = MODELS[name]
    model, path = make(activation).eval(), tmp_path / "model.onnx"
    words = {"B": "batch", "L": "length"}
    axes = [{i: words[c] for i, c in enumerate(dims) if c != " "} for dims in varying]
    inputs = inputs_of(3, SEQLEN)
    if dynamo:
        sizes = {c: torch.export.Dim(word, min=2, max=512) for c, word in words.items()}
        shapes = tuple({i: sizes[w[0].upper()] for i, w in a.items()} for a in axes)
        torch.onnx.export(model, inputs, path, dynamo=True, dynamic_shapes=shapes)
    else:
        names = [f"input{i}" for i in range(len(inputs))]
        torch.onnx.export(
            model,
            inputs,
            path,
            dynamo=False,
            input_names=names,
            dynamic_axes=dict(zip(names, axes, strict=True)),
        )
    for batch, seqlen in ((3, SEQLEN), (2, 37)):
        other = inputs_of(batch, seqlen)
        found = run_onnx(path, [tensor.clone() for tensor in other])
        with torch.no_grad():
            expected = model(*(tensor.clone() for tensor in other))
        expected = expected if isinstance(expected, tuple) else (expected,)
        assert len(found) >= len(expected)
        for a, b in zip(found, expected, strict=False):
            assert numpy.abs(b.numpy()).max() > 0.1
            numpy.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- jit


def test_jit_trace_save_and_load(tmp_path, device):
    """With its defaults, which trace twice and compare; what is loaded can be trained."""
    model, inputs = Block().eval().to(device), randn(3, SEQLEN, DIM).to(device)
    traced = torch.jit.trace(model, (inputs,))
    traced.save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    other = randn(2, 23, DIM, seed=1).to(device)
    assert torch.equal(loaded(other), model(other))
    found = torch.autograd.grad(loaded(other).square().sum(), list(loaded.parameters()))
    expected = torch.autograd.grad(model(other).square().sum(), list(model.parameters()))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        frozen = torch.jit.freeze(torch.jit.trace(model, (inputs,)))
        torch.testing.assert_close(frozen(other), model(other))


@pytest.mark.parametrize("name", ("chunk", "packed", "step", "ring"))
def test_jit_trace_of_states(name, tmp_path, device):
    make, inputs_of, _ = MODELS[name]
    model = make().eval().to(device)

    def inputs(*sizes):
        return tuple(tensor.to(device) for tensor in inputs_of(*sizes))

    torch.jit.trace(model, inputs(3, SEQLEN), check_inputs=[inputs(2, 7)]).save(tmp_path / "m.pt")
    found = torch.jit.load(tmp_path / "m.pt")(*inputs(2, 31))
    expected = model(*inputs(2, 31))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("strict", (False, True))
def test_export_keeps_the_operator(strict, tmp_path, device):
    model, inputs = Block().eval().to(device), randn(3, SEQLEN, DIM).to(device)
    dims = {0: torch.export.Dim("b", min=1, max=64), 1: torch.export.Dim("l", min=2, max=4096)}
    program = torch.export.export(model, (inputs,), dynamic_shapes={"h": dims}, strict=strict)
    torch.export.save(program.run_decompositions(), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    assert "causal_conv1d.forward.default" in [str(node.target) for node in program.graph.nodes]
    other = randn(2, 77, DIM, seed=1).to(device)
    torch.testing.assert_close(program.module()(other), model(other))


def test_export_of_a_step(device):
    model, inputs = Step().eval().to(device), [t.to(device) for t in step_inputs(3, 1)]
    with torch.no_grad():
        program = torch.export.export(model, tuple(t.clone() for t in inputs))
        state, expected_state = inputs[1].clone(), inputs[1].clone()
        found, expected = program.module()(inputs[0], state), model(inputs[0], expected_state)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(state, expected_state) and not torch.equal(state, inputs[1])


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="its packages are of torch 2.6")
def test_aot_inductor(tmp_path, device):
    """Two operators in one program, compiled once: values, and a state that changes in place."""

    class Both(Block):
        def forward(self, x, token, state):
            weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
            y = causal_conv1d_update(token, state, weight, bias, "silu")
            return self.convolve(x) + y[:, :, None]

    model = Both().eval().to(device)
    x, _ = (t.to(device) for t in chunk_inputs(3, SEQLEN))
    token, state = (t.to(device) for t in step_inputs(3, 1))
    with torch.no_grad():
        program = torch.export.export(model, (x, token, state.clone()))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "m.pt2")
        )
        compiled = torch._inductor.aoti_load_package(path)
        found_state, expected_state = state.clone(), state.clone()
        for _ in range(2):
            found, expected = compiled(x, token, found_state), model(x, token, expected_state)
            torch.testing.assert_close(found, expected)
            assert torch.equal(found_state, expected_state)
    assert not torch.equal(found_state, state)


def test_make_fx_traces_forward_and_backward(device):
    case = make_case((2, DIM, SEQLEN), 4, states=True, device=device)

    def gradient(x, weight):
        out = causal_conv1d_fn(x, weight, case.bias, activation="silu")
        return torch.autograd.grad(out.square().sum(), (x, weight))

    leaves = [case.x.requires_grad_(), case.weight.requires_grad_()]
    graph = make_fx(gradient)(*leaves)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert "causal_conv1d.forward.default" in targets
    assert "causal_conv1d.backward.default" in targets
    other = [randn(2, DIM, SEQLEN, seed=5).to(device), randn(DIM, 4, seed=6).to(device)]
    other = [tensor.requires_grad_() for tensor in other]
    for a, b in zip(graph(*other), gradient(*other), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("transform", ("jvp", "grad", "vmap"))
def test_transforms_under_compile(transform, device):
    if transform == "vmap" and torch.__version__ < (2, 6):
        pytest.skip("torch 2.5 cannot run an operator's batching rule within a trace")
    torch._dynamo.reset()
    case = make_case((2, DIM, SEQLEN), 4, device=device)

    def conv(x):
        return causal_conv1d_fn(x, case.weight, case.bias, activation="silu")

    def function(x):
        if transform == "jvp":
            return torch.func.jvp(conv, (x,), (x,))[1]
        if transform == "grad":
            return torch.func.grad(lambda x: conv(x).square().sum())(x)
        return torch.vmap(conv)(x[:, None])

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(case.x), function(case.x))


# ---------------------------------------------------------------------- checkpointing, the profiler


@pytest.mark.parametrize("states", (False, True), ids=("", "states"))
@pytest.mark.parametrize("policy", ("MUST_SAVE", "MUST_RECOMPUTE", "PREFER_RECOMPUTE"))
def test_selective_checkpointing(policy, states, device):
    case = make_case((3, DIM, SEQLEN), 4, states=True, device=device)
    leaves = [case.x.requires_grad_(), case.weight.requires_grad_()]
    own = (
        torch.ops.causal_conv1d.forward.default,
        torch.ops.causal_conv1d.forward_states.default,
    )
    seen = []

    def policy_of(context, operator, *args, **kwargs):
        if operator in own:
            seen.append(operator)
            return getattr(CheckpointPolicy, policy)
        return CheckpointPolicy.PREFER_RECOMPUTE

    def layer(x, weight):
        found = causal_conv1d_fn(
            x, weight, case.bias, return_final_states=states, activation="silu"
        )
        out, final = found if states else (found, x[..., -3:])
        return out.tanh().sin() + final.sum().cos()

    expected = torch.autograd.grad(layer(*leaves).square().sum(), leaves)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy_of)
    y = checkpoint(layer, *leaves, use_reentrant=False, context_fn=contexts)
    poison = [torch.full_like(y, torch.nan) for _ in range(20)]
    del poison  # its memory is what a missing result would be read from
    found = torch.autograd.grad(y.square().sum(), leaves)
    assert own[states] in seen
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpointing(use_reentrant, device):
    model, h = Block().to(device), randn(3, SEQLEN, DIM).to(device).requires_grad_()
    parameters = [h, *model.parameters()]
    expected = torch.autograd.grad(model(h).square().sum(), parameters)
    y = checkpoint(model, h, use_reentrant=use_reentrant)
    y.square().sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_profiler_names_the_operators(device):
    case = make_case((2, DIM, SEQLEN), 4, device=device)
    x = case.x.requires_grad_()
    with torch.profiler.profile() as profile:
        causal_conv1d_fn(x, case.weight).sum().backward()
        with torch.no_grad():
            causal_conv1d_fn(x, case.weight)
            causal_conv1d_update(x[:, :, 0], torch.zeros(2, DIM, 3, device=device), case.weight)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["causal_conv1d::forward"] == 2
    assert counts["causal_conv1d::backward"] == counts["causal_conv1d::update"] == 1
