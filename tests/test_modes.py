"""Autocast, no_grad, inference_mode; on CUDA streams, graphs and a second GPU."""

import subprocess
import sys

import pytest
import torch
from helpers import GRADIENTS, assert_gradients, lay_out, make_case, ops, randn, run_backward

from causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)

SHAPE = (2, 16, 65)


def fn(case):
    return causal_conv1d_fn(
        case.x,
        case.weight,
        case.bias,
        case.seq_idx,
        case.initial_states,
        return_final_states=True,
        activation=case.activation,
    )


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_without_gradients(mode, device):
    case = make_case(SHAPE, 4, states=True, device=device)
    expected = fn(case)
    case = case.map(lambda tensor: tensor.requires_grad_())
    with mode():
        found = fn(case)
        state = case.initial_states.detach().clone()
        y = causal_conv1d_update(case.x, state, case.weight, case.bias, "silu")
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and not a.requires_grad
    assert torch.equal(y, expected[0]) and torch.equal(state, expected[1])


def test_inference_tensors(device):
    with torch.inference_mode():
        case = make_case(SHAPE, 4, states=True, device=device)
        out, final_states = fn(case)
    expected, expected_final = fn(make_case(SHAPE, 4, states=True, device=device))
    assert torch.equal(out, expected) and torch.equal(final_states, expected_final)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_leaves_the_operator_in_the_type_of_its_input(dtype, device):
    """x as the layer before made it, weight and bias in float32, as autocast has them."""
    case = make_case(
        SHAPE, 4, dtype, weight_dtype=torch.float32, state_dtype=dtype, states=True, device=device
    )
    expected = fn(case)
    with torch.autocast(device, dtype=dtype):
        found = fn(case)
        state = case.initial_states.clone()
        y = causal_conv1d_update(case.x, state, case.weight, case.bias, "silu")
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and torch.equal(a, b)
    assert torch.equal(y, expected[0])


def test_training_step_under_autocast(device):
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 16, device=device)
    weight = randn(16, 4, device=device, seed=1).requires_grad_()
    bias = randn(16, device=device, seed=2).requires_grad_()
    tokens = randn(2, 65, 16, device=device, seed=3)
    with torch.autocast(device, dtype=torch.bfloat16):
        x = linear(tokens).transpose(1, 2)
        out = causal_conv1d_fn(x, weight, bias, activation="silu")
        loss = linear(out.transpose(1, 2)).float().square().mean()
    assert x.dtype == out.dtype == torch.bfloat16
    loss.backward()
    for parameter in (weight, bias, linear.weight):
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
        assert parameter.grad.any()


def test_autograd_in_another_thread(device):
    """torch runs backwards of CUDA tensors in threads of its own; here we start one ourselves."""
    import threading

    case = make_case(SHAPE, 4, states=True, device=device)
    expected = run_backward(case)
    found = {}
    thread = threading.Thread(target=lambda: found.update(run_backward(case)))
    thread.start()
    thread.join()
    for name in GRADIENTS:
        assert torch.equal(found[name], expected[name])


FORKED = """
import os, signal, sys, torch
from causal_conv1d import causal_conv1d_fn

torch.set_num_threads(2)
x, weight = torch.randn(4, 256, 1024), torch.randn(256, 4)
expected = causal_conv1d_fn(x, weight)
child = os.fork()
if child == 0:
    signal.alarm(60)
    found = causal_conv1d_fn(x, weight)
    torch.set_num_threads(1)  # torch's own operators would hang with more
    os._exit(0 if torch.equal(found, expected) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_has_threads_of_its_own():
    """Those of the parent's OpenMP are not there, and OpenMP waits for them for ever."""
    subprocess.run([sys.executable, "-c", FORKED], check=True, cwd="/")


def test_current_stream_is_used(cuda):
    """The operator waits for what its stream did before, and for nothing else's sake."""
    case = make_case((4, 256, 4096), 4, device=cuda)
    expected = causal_conv1d_fn(case.x, case.weight, case.bias, activation="silu")
    x = torch.zeros_like(case.x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(case.x)
        out = causal_conv1d_fn(x, case.weight, case.bias, activation="silu")
        assert not stream.query(), "the operator must not synchronise"
    stream.synchronize()
    assert torch.equal(out, expected)


def test_nothing_synchronises(cuda):
    case = make_case(SHAPE, 4, states=True, seq_idx="packed", device=cuda)
    indices = torch.tensor([1, 0], dtype=torch.int32, device=cuda)
    lens = torch.tensor([3, 9], dtype=torch.int32, device=cuda)
    bounds = torch.tensor([0, 1, 2], dtype=torch.int32, device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fn(case)
        run_backward(case)
        causal_conv1d_update(
            case.x, case.initial_states, case.weight, case.bias, "silu", lens, indices
        )
        causal_conv1d_varlen_states(case.x[0, :2].contiguous(), bounds, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", ("channel_first", "channel_last", "strided"))
def test_cuda_graph_of_forward_and_backward(layout, cuda):
    case = make_case(SHAPE, 4, states=True, seq_idx="packed", layout=layout, device=cuda)
    out, final = torch.empty_like(case.x), torch.empty(case.state_shape, device=cuda)
    grads = {
        "dx": torch.empty_like(case.x),
        "dweight": torch.empty_like(case.weight),
        "dbias": torch.empty_like(case.bias),
        "dinitial_states": torch.empty(case.state_shape, device=cuda),
    }
    common = (case.x, case.weight, case.bias)

    def step():
        ops.forward_out(*common, case.seq_idx, case.initial_states, out, final, case.silu)
        ops.backward_out(
            *common,
            case.dout,
            case.seq_idx,
            case.initial_states,
            case.dfinal_states,
            *grads.values(),
            case.silu,
        )

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    other = make_case(SHAPE, 4, states=True, seq_idx="packed", layout=layout, seed=1, device=cuda)
    for name, value in vars(case).items():
        if isinstance(value, torch.Tensor):
            value.copy_(getattr(other, name))
    for tensor in (out, final, *grads.values()):
        tensor.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    expected, expected_final = fn(other)
    assert torch.equal(out, expected) and torch.equal(final, expected_final)
    assert_gradients(other, grads)


@pytest.mark.parametrize("mode", ("shift", "indexed ring"))
def test_cuda_graph_of_update(mode, cuda):
    """Replays read the positions and indices that are in memory then."""
    case = make_case((2, 16, 1), 4, states=True, device=cuda)
    state, eager_state = case.initial_states.clone(), case.initial_states.clone()
    lens = indices = None
    if mode == "indexed ring":
        lens = torch.zeros(2, dtype=torch.int32, device=cuda)
        indices = torch.tensor([1, 0], dtype=torch.int32, device=cuda)

    def step(state):
        return causal_conv1d_update(case.x, state, case.weight, case.bias, "silu", lens, indices)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(state.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(state)
    state.copy_(eager_state)
    for i in range(5):
        case.x.copy_(randn(2, 16, 1, seed=10 + i))
        if lens is not None:
            lens.fill_(i)
            indices.copy_(torch.tensor([1, 0] if i % 2 else [0, -1]))
        graph.replay()
        torch.cuda.synchronize()
        expected = step(eager_state)
        assert torch.equal(out, expected) and torch.equal(state, eager_state)


@pytest.mark.parametrize("is_graph", (False, True), ids=("stream", "graph"))
@pytest.mark.parametrize("layout", ("channel_first", "channel_last"))
def test_kernels_wait_for_what_comes_before_them(layout, is_graph, cuda):
    """Kernels, copies and other streams, where kernels may be brought to the GPU early."""
    shape, steps = (4, 512, 4096), 4
    case = make_case(shape, 4, torch.bfloat16, layout=layout, device=cuda)
    sources = [torch.randn_like(case.x) for _ in range(steps)]
    x, dx, side_x = (torch.empty_like(case.x) for _ in range(3))
    weights = (case.weight, case.bias)
    state = torch.zeros(4, 512, 4, dtype=torch.bfloat16, device=cuda)
    side = torch.cuda.Stream()

    def conv(x):
        return causal_conv1d_fn(x, *weights, activation="silu")

    def step(source, wait):
        results = []
        x.fill_(torch.nan)
        torch.mul(source, 2, out=x)  # a kernel writes what the next one reads
        results.append(wait(conv(x)))
        results.append(wait(conv(results[-1])))  # and one of this library
        x.copy_(source)  # and a copy, after the last has read
        results.append(wait(conv(x)))
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # and another stream
            side_x.copy_(results[-1])
            results.append(wait(conv(side_x)))
        torch.cuda.current_stream().wait_stream(side)
        results.append(wait(conv(results[-1])))
        dweight, dbias = (torch.empty_like(w) for w in weights)
        ops.backward_out(x, *weights, results[-1], None, None, None, dx, dweight, dbias, None, True)
        results += [wait(dx.clone()), dweight, dbias]
        results.append(wait(causal_conv1d_update(dx[:, :, -1].contiguous(), state, *weights)))
        return results

    def synchronized(result):
        torch.cuda.synchronize()
        return result

    expected = [step(source, synchronized) for source in sources]
    state.zero_()
    torch.cuda.synchronize()
    if is_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = [step(source, lambda result: result) for source in sources]
        for _ in range(3):
            state.zero_()
            graph.replay()
    else:
        found = [step(source, lambda result: result) for source in sources]
    torch.cuda.synchronize()
    for i, results in enumerate(found):
        for j, result in enumerate(results):
            assert torch.equal(result, expected[i][j]), (i, j)


def test_tensors_of_a_gpu_that_is_not_the_current_one(second_gpu):
    case = make_case(SHAPE, 4, states=True, seq_idx="padded", device="cuda:0")
    expected, expected_final = fn(case)
    expected_grads = run_backward(case)
    other = make_case(SHAPE, 4, states=True, seq_idx="padded", device=second_gpu)
    assert torch.cuda.current_device() == 0
    out, final = fn(other)
    grads = run_backward(other)
    state = lay_out(other.initial_states, "channel_first")
    y = causal_conv1d_update(other.x, state, other.weight, other.bias, "silu")
    assert torch.cuda.current_device() == 0
    assert out.device == y.device == torch.device(second_gpu)
    assert torch.equal(out.cpu(), expected.cpu())
    assert torch.equal(final.cpu(), expected_final.cpu())
    for name in GRADIENTS:
        assert torch.equal(grads[name].cpu(), expected_grads[name].cpu()), name
