"""The Triton kernels of the selective scan, in tiles and chunks so small that there are several.

On the CPU they run in Triton's interpreter.
"""

import importlib.util
import itertools
import os
import sys

import pytest
import test_selective_scan as plain
import torch

from causal_conv1d.selective_scan import arguments, interface

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton: scripts/test_ecosystem.sh mamba_ssm", allow_module_level=True)


@pytest.fixture
def kernels(device, monkeypatch):
    if device == "cpu":
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("Triton was imported without TRITON_INTERPRET=1")
        os.environ["TRITON_INTERPRET"] = "1"
    from causal_conv1d.selective_scan import triton_backward, triton_common, triton_forward

    monkeypatch.setattr(arguments, "CHUNK", 32)
    monkeypatch.setattr(triton_common, "TILE", 64)
    monkeypatch.setattr(triton_backward, "CHANNELS", 2)
    both = (triton_forward.forward, triton_backward.backward)
    monkeypatch.setattr(interface, "_backend", lambda _: both)


@pytest.mark.parametrize(
    ("variable", "without"),
    [("", ()), ("B", ()), ("C", ()), ("BC", ()), ("BC", ("D", "z", "delta_bias"))],
)
def test_agrees_with_the_reference(kernels, device, variable, without):
    inputs = plain.make(2, 6, 75, 3, 2, variable=variable, without=without, device=device)
    plain.check(inputs, softplus=not without)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit(kernels, device, dtype):
    plain.check(plain.make(1, 3, 40, 2, 1, dtype=dtype, device=device), True)


def test_any_strides(kernels, device):
    inputs = plain.make(1, 4, 40, 3, 2, device=device)
    layouts = itertools.cycle(["channel_last", "strided", "dim_major"])
    for name, layout in zip(("u", "delta", "z"), layouts, strict=False):
        inputs[name] = plain.lay_out(inputs[name], layout)
    inputs["A"] = plain.lay_out(inputs["A"], "transposed")
    inputs["C"] = inputs["C"].transpose(2, 3).contiguous().transpose(2, 3)
    plain.check(inputs, True)
