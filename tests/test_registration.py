"""The operators registered through torch's stable ABI, and from Python as an older torch needs it.

The whole suite runs the second way with CAUSAL_CONV1D_REGISTRATION=ctypes; here that gives the same
bits and the same errors, in a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_case, ops

from causal_conv1d import _ctypes_ops, _library, _operators, causal_conv1d_fn

HEADER = Path(__file__).resolve().parent.parent / "csrc" / "causal_conv1d.h"
needs_sources = pytest.mark.skipif(not HEADER.exists(), reason="needs the sources")

PROGRAM = """
import sys, torch
from helpers import make_case
from test_registration import error_of, operators_of_torch, results_of
from causal_conv1d import _library

device = sys.argv[1]
assert _library.cpu.registration == _library.CTYPES
assert operators_of_torch() == list(_library.loaded.schemas.values())
if device == "cuda":
    assert _library.cuda.registration == _library.CTYPES
torch.save((results_of(device), error_of(device)), sys.argv[2])
"""


def results_of(device):
    """out, final states and gradients in every dtype."""
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        case = make_case((3, 20, 130), 4, dtype, states=True, seq_idx="padded", device=device)
        leaves = [case.x, case.weight, case.bias, case.initial_states]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        x, weight, bias, states = leaves
        outs = causal_conv1d_fn(x, weight, bias, case.seq_idx, states, True, None, "silu")
        grads = torch.autograd.grad(outs, leaves, (case.dout, case.dfinal_states))
        found += [tensor.detach().cpu() for tensor in (*outs, *grads)]
    return found


def error_of(device):
    x = torch.ones(2, 6, 9, device=device)
    with pytest.raises(RuntimeError) as error:
        ops.forward_out(x, x[0, 0, 0], None, None, None, torch.empty_like(x), None, True)
    return str(error.value)


def operators_of_torch():
    """The schemas that torch has, as the library gives them."""
    schemas = [getattr(ops, name).default._schema for name in _library.loaded.schemas]
    return [str(schema).partition("::")[2] for schema in schemas]


def test_torch_has_the_schemas_that_the_library_gives():
    assert operators_of_torch() == list(_library.loaded.schemas.values())
    for name in _library.loaded.schemas:
        operator = getattr(ops, name)
        plain = str(operator.plain._schema)
        assert plain == str(operator.default._schema).replace("(", ".plain(", 1)


@needs_sources
@pytest.mark.parametrize("operation", _operators.CALLERS)
def test_the_tensors_of_an_operation_are_those_of_its_struct(operation):
    """The C interface has them in the order of the operator that writes."""
    headers = (HEADER, HEADER.with_name("selective_scan.h"))
    text = re.sub("//.*", "", "".join(header.read_text() for header in headers))

    def members(struct):
        found = re.search(rf"struct causal_conv1d_{struct} {{([^}}]*)}}", text)[1]
        declarations = re.findall(r"(causal_conv1d_\w+|int32_t) ([^;]*);", found)
        pairs = [(kind, name) for kind, names in declarations for name in names.split(", ")]
        if pairs[0][1] == "inputs":
            return members("scan_inputs") + pairs[1:]
        return pairs

    pairs = members(f"{operation.removeprefix('conv_')}_params")
    names = _operators.argument_names(operation)
    if operation.startswith("conv_"):
        options, gradients = members("options"), members("option_gradients")
        pack = _ctypes_ops.OptionsPacker(operation)
        assert [name for _, name in pack.optional] == [name for _, name in options]
        if operation == "conv_backward":
            assert [name for _, name in pack.gates] == [name for _, name in gradients[:-1]]
        ours = {name for _, name in (*options, *gradients)} | {"dilation"}
        names = tuple(name for name in names if name not in ours)
    if operation == "pool":  # int64_t is no member here
        names = tuple(name for name in names if name not in ("pad_slot", "max_seqlen"))
        assert _ctypes_ops.PoolPacker.TENSORS == len(pairs) - 1
    tensors = [name for kind, name in pairs if kind != "int32_t"]
    flags = [name for kind, name in pairs if kind == "int32_t"]
    assert [name for name in names if name in tensors] == tensors
    assert [name for name in names if name not in tensors] == flags
    written = [name for name in _operators.written_names(operation) if name in names]
    assert set(written) <= set(tensors)


@needs_sources
def test_the_numbers_of_dtypes_are_those_of_the_header():
    found = re.findall(r"^  CAUSAL_CONV1D_(\w+) = (\d+),?$", HEADER.read_text(), re.MULTILINE)
    numbers = {name.lower(): int(number) for name, number in found}
    for number, name in enumerate(_ctypes_ops._DTYPE_NAMES):
        assert numbers[name.removeprefix("an_")] == number, name


def test_every_argument_of_the_cuda_functions_has_its_type(monkeypatch):
    """ctypes passes one without a type as a C int, which cuts a pointer to 32 bits."""

    class Library:
        def __getattr__(self, name):  # as ctypes does, the same function object every time
            function = type("Function", (), {})()
            setattr(self, name, function)
            return function

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", None, raising=False)
    library = Library()
    _ctypes_ops.cuda_operations(library)
    counts = {"forward": 3, "backward": 5, "update": 3, "varlen_states": 3}
    counts |= {"scan_forward": 5, "scan_backward": 5, "state_update": 3}
    counts |= {"forward_with": 6, "backward_with": 7}
    for operator, count in counts.items():
        function = getattr(library, f"causal_conv1d_cuda_{operator}")
        assert len(function.argtypes) == count, operator


def run(*arguments, registration):
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([here, *(p for p in sys.path if p)])
    env = dict(os.environ, PYTHONPATH=path, CAUSAL_CONV1D_REGISTRATION=registration)
    return subprocess.run(
        [sys.executable, "-c", *arguments], cwd="/", env=env, capture_output=True, text=True
    )


def test_registration_from_python_gives_the_same_bits_and_errors(device, tmp_path):
    file = tmp_path / "results.pt"
    done = run(PROGRAM, device, str(file), registration="ctypes")
    assert done.returncode == 0, done.stderr
    results, error = torch.load(file)
    for found, expected in zip(results, results_of(device), strict=True):
        assert torch.equal(found, expected)
    assert error == error_of(device)
    assert error == "causal_conv1d_fn: weight must have one to three dimensions, got 0"


def test_the_stable_abi_is_used_from_torch_2_9_on():
    wanted = os.environ.get("CAUSAL_CONV1D_REGISTRATION", "auto")
    stable = torch.__version__ >= (2, 9) and wanted == "auto"
    assert _library.cpu.registration == (_library.STABLE_ABI if stable else _library.CTYPES)


def test_an_unknown_registration_is_refused():
    done = run("import causal_conv1d", registration="pybind")
    assert done.returncode != 0
    assert "ImportError: CAUSAL_CONV1D_REGISTRATION=pybind: give auto or ctypes" in done.stderr
