"""The CPU kernels of every instruction set that this machine runs, each in a process of its own."""

import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ALL_FLOATS, make_case, run_backward, run_forward

from causal_conv1d import (
    _library,
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_fn,
)

VARIABLE = "CAUSAL_CONV1D_CPU_ISA"
TESTS = Path(__file__).parent
EVERY = 32  # of the value tests, one of so many


def python(program, isa, *arguments, check=True):
    """Runs a program here with an instruction set; from this folder, which is not the package's."""
    env = os.environ | {VARIABLE: isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=env, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0 or not check, f"{isa}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done


NAME = """
import ctypes, sys
function = ctypes.CDLL(sys.argv[1]).causal_conv1d_cpu_isa
function.restype = ctypes.c_char_p
print(function().decode())
"""


def name_in_use(isa):
    return python(NAME, isa, str(_library.cpu.path)).stdout.strip()


@functools.cache
def runnable():
    return [isa for isa in ("avx512", "avx2", "neon", "baseline") if name_in_use(isa) == isa]


@pytest.fixture(autouse=True)
def cpu(device):
    if device != "cpu":
        pytest.skip("about the CPU")


def test_the_best_is_in_use_unless_one_is_named():
    assert runnable()
    assert name_in_use("") == runnable()[0]


WRONG = """
import torch
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
x, weight = torch.ones(1, 2, 3), torch.ones(2, 4)
for call in (
    lambda: causal_conv1d_fn(x, weight),
    lambda: causal_conv1d_update(x, torch.ones(1, 2, 3), weight),
    lambda: causal_conv1d_varlen_states(x[0], torch.tensor([0, 2]), 1),
):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""


def test_another_is_an_error_that_names_the_variable():
    for isa in ("sse2", "AVX2", "avx512 ", "0", *({"neon", "avx2"} - {*runnable()})):
        assert name_in_use(isa) == "none", isa
    isa = "sse2"
    lines = python(WRONG, isa).stdout.splitlines()
    known = ", ".join(runnable())
    assert len(lines) == 3
    for line, function in zip(lines, ("fwd", "update", "varlen_states"), strict=True):
        assert f"causal_conv1d_{function}: {VARIABLE} must name kernels" in line, line
        assert f"({known}), got {isa}" in line


SAMPLE = f"""
import sys, pytest

class Sample:
    def pytest_collection_modifyitems(self, items):
        items[:] = items[::{EVERY}]

tests = ["test_forward.py", "test_backward.py", "test_update.py"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests], [Sample()]))
"""


@pytest.mark.parametrize("isa", ("avx512", "avx2", "neon", "baseline"))
def test_values(isa):
    if isa not in runnable():
        pytest.skip("this machine does not run it")
    assert " passed" in python(SAMPLE, isa).stdout


def digests():
    """What each case gives, by the case and the result's name: a digest of its bits."""
    found = {}
    widths, layouts = (1, 2, 4, 7), ("channel_first", "channel_last", "strided")
    cases = itertools.product(ALL_FLOATS, (None, "silu"), widths, layouts, (None, "padded"))
    for dtype, activation, width, layout, seq_idx in cases:
        case = make_case(
            (2, 37, 131),
            width,
            dtype,
            states=True,
            activation=activation,
            layout=layout,
            seq_idx=seq_idx,
        )
        out, final_states = run_forward(case)
        results = run_backward(case) | {"out": out, "final_states": final_states}
        if seq_idx is None:
            state = case.initial_states.clone()
            results["update"] = causal_conv1d_update(
                case.x[..., :5], state, case.weight, case.bias, activation
            )
            results["state"] = state
        for name, tensor in results.items():
            if tensor is not None:
                key = f"{dtype} {activation} {width} {layout} {seq_idx} {name}"
                found[key] = digest(tensor)
    for dtype, activation, width, layout in itertools.product(
        ALL_FLOATS, (None, "silu"), widths[1:], layouts
    ):
        case = make_case((1, 37, 131), width, dtype, activation=activation, layout=layout)
        found |= option_digests(case, f"{dtype} {activation} {width} {layout} options")
    return found


def digest(tensor):
    bits = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(bits).hexdigest()


def option_digests(case, key):
    """Gates, a residual, dilation and packed sequences."""
    gates = {"pre_gate": case.x.flip(1), "post_gate": case.x.flip(2), "residual": case.x}
    bounds = torch.tensor([0, 1, 1, 60, 100, 131], dtype=torch.int32)
    found = {}
    for dilation in (1, 3):
        arguments = (case.x, case.weight, case.bias)
        options = gates | {"activation": case.activation, "dilation": dilation}
        whole = causal_conv1d_fn(*arguments, **options)
        packed, states = causal_conv1d_varlen_fn(
            *arguments, cu_seqlens=bounds, return_final_states=True, **options
        )
        results = {"out": whole, "packed": packed, "final_states": states}
        found |= {f"{key}{dilation} {name}": digest(t) for name, t in results.items()}
    return found


@functools.cache
def digests_of(isa):
    return json.loads(
        python("import json, test_isa; print(json.dumps(test_isa.digests()))", isa).stdout
    )


def is_promised(key):
    """As causal_conv1d.h says."""
    dtype, activation, *_, name = key.split()
    if dtype == "torch.float64" or name in ("final_states", "state"):
        return True
    return activation == "None" and name not in ("dweight", "dbias")


def test_bits_are_the_same_as_far_as_the_header_promises():
    if len(runnable()) == 1:
        pytest.skip("this machine runs one instruction set")
    expected = digests_of(runnable()[0])
    promised = [key for key in expected if is_promised(key)]
    assert len(promised) > len(expected) / 2
    for isa in runnable()[1:]:
        found = digests_of(isa)
        assert found.keys() == expected.keys()
        assert [key for key in promised if found[key] != expected[key]] == []
