"""Devices without kernels: torch's own operations compute there, and one warning says so.

``other_device.py`` is such a device. The same operations serve CPU and CUDA tensors where the
kernels are hidden, for which a part of the suite runs once more in a process of its own.
"""

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import options_cases
import pytest
import torch
from helpers import make_case, randn
from other_device import DEVICE, Device, OtherTensor, values
from pool_cases import WRITTEN
from scan_helpers import arguments, gradients_of_outputs, make_scan
from test_pool import make as make_pool
from test_scan_update import make_update
from torch.utils._python_dispatch import _disable_current_modes

from causal_conv1d import (
    CausalConv1d,
    _library,
    _torch_ops,
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    selective_scan_fn,
    selective_state_update,
)
from causal_conv1d import __main__ as doctor
from causal_conv1d._ops import ops
from causal_conv1d.reference import TOLERANCE, causal_conv1d_ref

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def other_device():
    Device.waits = 0
    with Device(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*plain torch operations")
        yield


def on_device(tensor):
    """A copy there of a tensor; all else as it is."""
    return OtherTensor(tensor.clone()) if isinstance(tensor, torch.Tensor) else tensor


def assert_same(found, expected, tolerance=1e-5):
    assert found.device == DEVICE
    found = values(found.detach())
    torch.testing.assert_close(found, expected.detach(), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("name", doctor.CHECKS)
def test_the_doctors_checks_hold(name):
    dtype = torch.bfloat16 if name == "fn forward" else torch.float32
    worst = doctor.worst_error(doctor.CHECKS[name], DEVICE, dtype, "channel-last")
    assert worst <= TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ("plain", "packed", "dilated"))
def test_options_and_parts_of_out(kind):
    options = {"packed": {"lengths": [3, 0, 6, 8]}, "dilated": {"dilation": 2}}.get(kind, {})
    cpu = options_cases.make_case((1, 8, 20), 4, states=True, **options)
    case = cpu.map(lambda tensor: on_device(tensor).requires_grad_())
    case.cu_seqlens = on_device(cpu.cu_seqlens)
    cpu = cpu.map(lambda tensor: tensor.requires_grad_())
    names = [name for name in options_cases.GRADIENTS.values() if getattr(cpu, name) is not None]
    results = []
    for each in (case, cpu):
        out, states = options_cases.call(each)
        parts, _ = options_cases.call(each, split_sizes=[3, 5])
        total = out + torch.cat(parts, 1) * 2
        leaves = [getattr(each, name) for name in names]
        above = total * each.dout, states * each.dfinal_states
        grads = torch.autograd.grad([a.sum() for a in above], leaves)
        results.append((out, *parts, states, *grads))
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected, 1e-4)
    assert Device.waits == 0


def test_gradients_of_gradients():
    case = make_case((2, 4, 9), 3)
    leaves = [case.x, case.weight, case.bias]
    results = []
    for function, make in ((causal_conv1d_fn, on_device), (causal_conv1d_ref, torch.clone)):
        given = [make(leaf).requires_grad_() for leaf in leaves]
        out = function(*given, activation="silu")
        grads = torch.autograd.grad(out.square().sum(), given, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), given))
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected, 1e-3)


@pytest.mark.parametrize("dilation", (1, 2))
def test_states_are_changed_in_place(dilation):
    """Past the last row out is NaN, as on CUDA: to raise an error the host would have to wait."""
    weight, state = randn(6, 3), randn(4, 6, 7)
    x, indices = randn(4, 6, 2), torch.tensor([2, -1, 0, 9])
    lens = torch.tensor([0, 3, 2**63 - 1, 5])
    placed = on_device(state)
    memory = values(placed).data_ptr()
    rest = (None, "silu", on_device(lens), on_device(indices))
    found = causal_conv1d_update(on_device(x), placed, on_device(weight), *rest, dilation=dilation)
    rest = (None, "silu", lens[:3], indices[:3])
    expected = causal_conv1d_update(x[:3], state, weight, *rest, dilation=dilation)
    assert_same(found[:3], expected)
    assert values(found[3]).isnan().all()
    assert_same(placed, state)
    assert values(placed).data_ptr() == memory and Device.waits == 0


def test_a_scan():
    inputs = make_scan(seqlen=70)
    dout, dlast = gradients_of_outputs(inputs)
    results = []
    for make in (on_device, lambda tensor: tensor):
        given = {name: make(value) for name, value in inputs.items()}
        out = ops.scan_forward(*arguments(given, True), True)
        above = make(dout), make(dlast)
        results.append((*out, *ops.scan_backward(*arguments(given, True), *above, (1 << 9) - 1)))
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected, 1e-4)
    assert Device.waits == 0


def test_a_packed_scan():
    inputs = make_scan(1, bounds=[2, 9, 9, 30])
    args = [*inputs.values(), True, True]
    found = ops.scan_forward(*map(on_device, args))
    for each, expected in zip(found, ops.scan_forward(*args), strict=True):
        assert_same(each, expected, 1e-4)
    assert Device.waits == 1  # for the loop over sequences


@pytest.mark.parametrize("indices", (None, [4, -1, 0], [-1, -1, -1], [7, 2, -1]), ids=str)
def test_a_state_update(indices):
    inputs = make_update(indices=indices, rows=5 if indices else None)
    placed = {name: on_device(value) for name, value in inputs.items()}
    found = selective_state_update(**placed, dt_softplus=True)
    is_row = [0, 1, 2] if indices is None else [i for i in range(3) if indices[i] < 5]
    for name in ("x", "dt", "B", "C", "z", "state_batch_indices"):
        if inputs.get(name) is not None:
            inputs[name] = inputs[name][is_row]
    expected = selective_state_update(**inputs, dt_softplus=True)
    torch.testing.assert_close(values(found)[is_row], expected)
    assert len(is_row) == 3 or values(found)[0].isnan().all()
    assert_same(placed["state"], inputs["state"])
    assert Device.waits == 0


def test_a_pool_of_states():
    case = make_pool(1, "cpu", width=4, ragged=True)
    placed = {name: on_device(value) for name, value in case.items()}
    ops.pool(*placed.values())
    ops.pool(*case.values())
    for name in WRITTEN:
        if case[name] is not None:
            assert_same(placed[name], case[name])
    assert Device.waits == 0


def test_a_layer():
    layer = CausalConv1d(6, 4, activation="silu")
    x, cache = randn(2, 5, 6), randn(2, 6, 4)
    expected, _ = layer(x, cache=cache.clone(), output_final_state=True)
    there = CausalConv1d(6, 4, activation="silu")
    there.weight, there.bias = (
        None if p is None else torch.nn.Parameter(on_device(p.detach()))
        for p in (layer.weight, layer.bias)
    )
    found, _ = there(on_device(x), cache=on_device(cache), output_final_state=True)
    assert_same(found, expected)


# ------------------------------------------------------------------------------- errors and warning


def wrong_calls(make):
    """Functions of bad calls with make's tensors."""
    x, weight, state = make(randn(2, 6, 9)), make(randn(6, 4)), make(randn(2, 6, 5))
    token, bounds = make(randn(2, 6)), make(torch.tensor([0, 9]))
    yield lambda: causal_conv1d_fn(x, weight[:3])
    yield lambda: causal_conv1d_fn(x, weight.double())
    yield lambda: causal_conv1d_fn(x.int(), weight)
    yield lambda: causal_conv1d_fn(x, weight, initial_states=state)
    yield lambda: causal_conv1d_fn(x, weight, pre_gate=x[:1])
    yield lambda: causal_conv1d_fn(x, weight, dilation=0)
    yield lambda: causal_conv1d_update(token, state[:, :, :2], weight)
    yield lambda: ops.update_out(token, state, weight, None, state[:, :, 2], True, None, None)
    yield lambda: ops.forward_out(x, weight, None, None, None, x[:1].expand(2, 6, 9), None, True)
    yield lambda: ops.forward_out(x[:, :, 1:], weight, None, None, None, x[:, :, :-1], None, True)
    yield lambda: causal_conv1d_varlen_states(x[0].t(), bounds[:0], 3)
    yield lambda: causal_conv1d_varlen_states(x[0].t(), bounds, -1)
    yield lambda: selective_scan_fn(x, x, weight, x, x)
    yield lambda: selective_scan_fn(x[:1], x[:1], weight, weight, weight, cu_seqlens=bounds + 1)
    yield lambda: selective_state_update(state, token, token[:1], weight, weight, weight)


def answer(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_errors_are_those_of_the_cpu():
    found = list(map(answer, wrong_calls(on_device)))
    expected = list(map(answer, wrong_calls(torch.clone)))
    assert found == expected and "no error" not in expected
    assert len(set(expected)) > 10


def test_all_tensors_of_a_call_are_on_one_device():
    here = randn(2, 6, 9), randn(6, 4)
    for x, weight in ((here[0], on_device(here[1])), (on_device(here[0]), here[1])):
        text = f"weight must be on x's device {x.device}, got {weight.device}"
        with pytest.raises(RuntimeError, match=text):
            causal_conv1d_fn(x, weight)


@pytest.mark.skipif(DEVICE.type != "lazy", reason="this process has another device")
def test_a_device_without_memory_is_refused():
    """torch's own Lazy device, which records operations as XLA does."""
    with _disable_current_modes():
        x, weight = randn(2, 6, 9, device="lazy"), randn(6, 4, device="lazy")
        with pytest.raises(RuntimeError, match="lazy tensors have no memory of their own"):
            causal_conv1d_fn(x, weight)


def test_one_warning_a_type_of_device_in_all_threads():
    warn = _torch_ops.warner("CUDA", "there is no nvcc")
    devices = [torch.device(name) for name in ("xpu:0", "cuda:0", "xpu:1", "cuda:1")] * 50
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [
            threading.Thread(target=lambda: [warn(device) for device in devices]) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    texts = sorted(str(each.message) for each in caught)
    start = "tensors are computed by plain torch operations, which are slower than kernels, as "
    assert texts == [
        f"causal_conv1d: cuda {start}there are no CUDA kernels in this process: there is no nvcc",
        f"causal_conv1d: xpu {start}there are kernels for CPU and CUDA tensors alone",
    ]


def test_a_call_that_is_refused_does_not_warn():
    seen = []
    operations = _torch_ops.operations(_library.cpu.library, seen.append)
    x, weight = randn(2, 6, 9), randn(6, 4)
    operation = operations["forward"]
    with pytest.raises(RuntimeError, match="weight must be"):
        operation(x, weight[1:], None, None, None, torch.empty_like(x), None, True)
    assert not seen
    operation(x, weight, None, None, None, torch.empty_like(x), None, True)
    assert seen == [x.device]


@pytest.mark.skipif(DEVICE.type == "lazy", reason="which is no accelerator of torch")
def test_the_doctor_checks_the_accelerator(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor", "--no-speed"])
    monkeypatch.setattr(doctor, "CHECKS", {"update": doctor.check_update})
    monkeypatch.setattr(torch.version, "cuda", "12.6")  # a torch that has CUDA too
    assert doctor.main() == 0
    assert "\nother:0: largest relative error" in capsys.readouterr().out


# ------------------------------------------------------------------------ in processes of their own


def run_tests(*options, **variables):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    environment = os.environ | variables
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_on_the_key_for_other_backends():
    """PrivateUse1, with a device guard and threads of autograd as a backend has them."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch makes no such backend in Python")
    names = "gradients or states_are or options or packed_scan or errors_are or doctor_ch"
    out = run_tests("-k", names, os.path.basename(__file__), OTHER_DEVICE="other")
    assert " passed" in out and "skipped" not in out


def test_a_part_of_the_suite_without_kernels(device):
    """Their tensors are torch's own, under a compiler too."""
    tests = (
        "test_forward.py::test_every_layout",
        "test_backward.py::test_a_gradient_left_out_changes_no_other",
        "test_update.py::test_every_option",
        "test_options.py::test_random_cases[6]",
        "test_options.py::test_update_with_a_dilation",
        "test_pool.py::test_under_a_compiler",
        "test_scan.py::test_options",
        "test_scan.py::test_packed_sequences",
        "test_autograd.py::test_final_states_out_is_written_returned_and_differentiable",
        "test_compile.py::test_compiled_fn_writes_final_states_out",
        "test_vmap.py::test_update",
    )
    out = run_tests(f"--device={device}", *tests, WITHOUT_KERNELS=device.upper())
    assert " passed" in out and "skipped" not in out
