"""AIter's form of the forward: out comes first, an empty bias is none."""

import subprocess
import sys

import pytest
import torch
from helpers import LAYOUTS, assert_close, assert_untouched_outside, lay_out, randn
from tolerances import OUT

from causal_conv1d import aiter
from causal_conv1d.aiter import causal_conv1d_fwd
from causal_conv1d.reference import causal_conv1d_ref

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def arguments(device, dtype=torch.float32, width=4, shape=(3, 20, 70)):
    x = randn(*shape, dtype=dtype, device=device, seed=1)
    weight = randn(shape[1], width, dtype=dtype, device=device, seed=2)
    bias = randn(shape[1], dtype=dtype, device=device, seed=3)
    return x, weight, bias


def expected(x, weight, bias, silu):
    bias = None if bias is None else bias.double()
    return causal_conv1d_ref(x.double(), weight.double(), bias, activation="silu" if silu else None)


@pytest.mark.parametrize("silu", (True, False))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (1, 2, 4, 7, 8, 9, 33))
def test_any_width(width, dtype, silu, device):
    x, weight, bias = arguments(device, dtype, width)
    out = torch.full_like(x, torch.nan)
    assert causal_conv1d_fwd(out=out, x=x, weight=weight, bias=bias, use_silu=silu) is None
    assert_close(out, expected(x, weight, bias, silu), OUT[dtype])


@pytest.mark.parametrize("none", (lambda x: x.new_empty(0), lambda x: None))
def test_no_bias(none, device):
    x, weight, bias = arguments(device)
    out = torch.full_like(x, torch.nan)
    causal_conv1d_fwd(out, x, weight, none(x), True)
    assert_close(out, expected(x, weight, None, True), OUT[torch.float32])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_of_any_layout_is_written_in_place(layout, device):
    x, weight, bias = arguments(device)
    out = lay_out(torch.full_like(x, torch.nan), layout)
    causal_conv1d_fwd(out, lay_out(x, layout), weight, bias, False)
    assert_close(out, expected(x, weight, bias, False), OUT[torch.float32])
    assert_untouched_outside(out)


def test_wrong_arguments_are_named(device):
    x, weight, bias = arguments(device)
    out = torch.empty_like(x)
    with pytest.raises(RuntimeError, match="out"):
        causal_conv1d_fwd(out[..., 1:], x, weight, bias, True)
    with pytest.raises(RuntimeError, match="weight"):
        causal_conv1d_fwd(out, x, weight[1:], bias, True)
    with pytest.raises(RuntimeError, match="bias"):
        causal_conv1d_fwd(out, x, weight, bias[1:], True)


def run(*options):
    command = [sys.executable, "-m", "causal_conv1d.aiter", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def test_command(device):
    shape = ["--batch", "2", "--dim", "24", "--seqlen", "300", "--width", "3"]
    found = run(*shape, "--dtype", "bfloat16", "--use_silu", "--no_bias", "--device", device)
    assert found.returncode == 0, found.stderr
    settings = "batch 2, dim 24, seqlen 300, width 3, bfloat16"
    for part in (settings, "SiLU, no bias", "relative error", "ms a call"):
        assert part in found.stdout


def test_command_with_its_defaults(device, capsys):
    assert aiter.main(["--device", device]) == 0
    assert "batch 2, dim 256, seqlen 1024, width 4, float16" in capsys.readouterr().out


def test_command_fails_on_wrong_values(device, capsys, monkeypatch):
    monkeypatch.setattr(aiter, "causal_conv1d_fwd", lambda out, *rest: out.zero_())
    assert aiter.main(["--device", device, "--dim", "8"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_command_refuses_wrong_options():
    for options in (["--dtype", "float64"], ["--width", "0"], ["--batch", "-1"]):
        found = run(*options)
        assert found.returncode == 2 and options[0].lstrip("-") in found.stderr
