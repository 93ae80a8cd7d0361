"""vLLM's two functions, against a plain formula; and vLLM's own test of them, if it is there.

That test is vLLM's ``tests/kernels/mamba/test_causal_conv1d.py``, of 0.33: the environment variable
CAUSAL_CONV1D_VLLM_TEST names the file. Its imports alone are changed.
"""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from tolerances import OUT

from causal_conv1d import causal_conv1d_fn as upstream_fn
from causal_conv1d import vllm

DTYPES = (torch.float32, torch.bfloat16)


def plain(x, weight, bias, states, sequences, silu):
    """out (dim, total), changing states; a sequence is (first, last + 1, slot, has, accepted)."""
    out = torch.zeros_like(x, dtype=torch.float64)
    history = weight.shape[1] - 1
    for begin, end, slot, has_state, accepted in sequences:
        if slot is None or begin == end:
            continue
        first = 0 if accepted is None else accepted - 1
        before = states[slot, :, first : first + history].clone()
        inputs = torch.cat([before if has_state else before * 0, x[:, begin:end]], 1)
        total = torch.zeros_like(out[:, begin:end])
        if bias is not None:
            total = total + bias[:, None].double()
        for k in range(weight.shape[1]):
            total = total + weight[:, k, None].double() * inputs[:, k : k + end - begin].double()
        out[:, begin:end] = torch.nn.functional.silu(total) if silu else total
        kept = history if accepted is None else min(history - 1 + end - begin, states.shape[2])
        states[slot, :, :kept] = inputs[:, inputs.shape[1] - kept :]
    return out


def make(device, dtype, lengths, dim=24, width=4, state_len=3, slots=12, channel_last=True, seed=0):
    torch.manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float32).to(device, dtype)

    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    x = randn(bounds[-1], dim).t() if channel_last else randn(dim, bounds[-1])
    states = randn(slots, state_len, dim).mT if channel_last else randn(slots, dim, state_len)
    starts = torch.tensor(bounds, dtype=torch.int32, device=device)
    return x, randn(dim, width), randn(dim), states, starts, bounds


def test_signatures():
    fn = inspect.signature(vllm.causal_conv1d_fn).parameters.values()
    assert [(p.name, p.default) for p in fn if p.default is not p.empty] == [
        ("cache_indices", None),
        ("has_initial_state", None),
        ("activation", "silu"),
        ("pad_slot_id", -1),
        ("null_block_id", 0),
        ("metadata", None),
        ("validate_data", False),
    ]
    required = [p.name for p in fn if p.default is p.empty]
    assert required == ["x", "weight", "bias", "conv_states", "query_start_loc"]
    update = inspect.signature(vllm.causal_conv1d_update).parameters
    assert (
        list(update)
        == (
            "x conv_state weight bias activation conv_state_indices num_accepted_tokens "
            "query_start_loc max_query_len null_block_id validate_data out"
        ).split()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channel_last", (False, True))
@pytest.mark.parametrize("width, state_len", ((4, 3), (2, 4), (3, 7), (6, 5)))
def test_prompts_and_tokens_together(device, dtype, channel_last, width, state_len):
    lengths = [1, 30, 0, 1, 2, 1, 17, 1]
    x, weight, bias, states, starts, bounds = make(
        device, dtype, lengths, width=width, state_len=state_len, channel_last=channel_last
    )
    slots = [3, 5, 7, 0, 2, 9, 1, 11]  # 0 is vLLM's null block
    has_state = [True, False, True, True, True, False, True, True]
    sequences = [
        (bounds[i], bounds[i + 1], slot or None, has_state[i], None) for i, slot in enumerate(slots)
    ]
    want_states = states.clone()
    want = plain(x, weight, bias, want_states, sequences, True)
    given = x.clone()
    out = vllm.causal_conv1d_fn(
        x,
        weight,
        bias,
        states,
        starts,
        torch.tensor(slots, dtype=torch.int32, device=device),
        torch.tensor(has_state, device=device),
    )
    assert out.stride() == x.stride() and torch.equal(x, given)
    assert_close(out, want, OUT[x.dtype])
    assert torch.equal(states, want_states)


def test_bitwise_as_each_sequence_alone(device):
    x, weight, bias, states, starts, bounds = make(device, torch.bfloat16, [5, 1, 200, 33])
    slots = torch.tensor([4, 1, 2, 3], device=device)
    before = states.clone()
    has_state = torch.ones(4, dtype=torch.bool, device=device)
    out = vllm.causal_conv1d_fn(x, weight, bias, states, starts, slots, has_state)
    for i, slot in enumerate(slots.tolist()):
        alone, final_states = upstream_fn(
            x[None, :, bounds[i] : bounds[i + 1]],
            weight,
            bias,
            initial_states=before[slot : slot + 1],
            return_final_states=True,
            activation="silu",
        )
        assert torch.equal(out[:, bounds[i] : bounds[i + 1]], alone[0])
        assert torch.equal(states[slot], final_states[0])


def test_without_slots_or_flags(device):
    x, weight, bias, states, starts, bounds = make(device, torch.float32, [4, 1, 9])
    sequences = [(bounds[i], bounds[i + 1], i, False, None) for i in range(3)]
    want_states = states.clone()
    want = plain(x, weight, bias, want_states, sequences, False)
    out = vllm.causal_conv1d_fn(x, weight, bias, states, starts, activation=False)
    assert_close(out, want, OUT[x.dtype])
    assert torch.equal(states, want_states)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own_out", (False, True))
@pytest.mark.parametrize("form", ("token", "tokens", "tokens, dim fastest", "ragged"))
@pytest.mark.parametrize("state_len", (3, 6))
def test_update(device, dtype, own_out, form, state_len):
    lengths = {"token": [1] * 5, "ragged": [2, 0, 3, 1, 1]}.get(form, [3] * 5)
    x, weight, bias, states, starts, bounds = make(device, dtype, lengths, state_len=state_len)
    slots = [3, 5, 0, 2, 9]
    sequences = [(bounds[i], bounds[i + 1], s or None, True, None) for i, s in enumerate(slots)]
    want_states = states.clone()
    want = plain(x, weight, bias, want_states, sequences, True).t()
    given = x.t().clone()
    options = {"conv_state_indices": torch.tensor(slots, dtype=torch.int32, device=device)}
    if form == "ragged":
        options |= {"query_start_loc": starts, "max_query_len": 3}
    if form.startswith("tokens"):
        want = want.reshape(5, 3, -1).transpose(1, 2)
        given = given.reshape(5, 3, -1).transpose(1, 2)
        if form == "tokens":
            given = given.contiguous()
    kept = given.clone()
    options["out"] = torch.empty_like(given) if own_out else None
    out = vllm.causal_conv1d_update(given, states, weight, bias, "silu", **options)
    assert out is (options["out"] if own_out else given)
    assert not own_out or torch.equal(given, kept)
    assert_close(out, want, OUT[x.dtype])
    assert torch.equal(states, want_states)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accepted_tokens(device, dtype):
    lengths = [4, 1, 0, 3, 5]
    x, weight, bias, states, starts, bounds = make(device, dtype, lengths, state_len=7)
    slots, accepted = [3, 5, 7, 2, 9], [4, 1, 2, 3, 2]
    sequences = [(bounds[i], bounds[i + 1], slots[i], True, accepted[i]) for i in range(5)]
    want_states = states.clone()
    want = plain(x, weight, bias, want_states, sequences, True).t()
    table = torch.tensor(slots, device=device)[:, None].repeat(1, 3)
    given = x.t().clone()
    out = vllm.causal_conv1d_update(
        given,
        states,
        weight,
        bias,
        True,
        table,
        torch.tensor(accepted, dtype=torch.int32, device=device),
        starts,
        5,
    )
    assert_close(out, want, OUT[x.dtype])
    assert torch.equal(states, want_states)


def test_wrong_arguments(device):
    x, weight, bias, states, starts, _ = make(device, torch.float32, [4, 1])
    with pytest.raises(RuntimeError, match="causal_conv1d_pool: conv_states must be"):
        vllm.causal_conv1d_fn(x, weight, bias, states[:, :5], starts)
    with pytest.raises(TypeError, match="causal_conv1d_fn: x must be a tensor"):
        vllm.causal_conv1d_fn(None, weight, bias, states, starts)
    with pytest.raises(TypeError, match="causal_conv1d_update: conv_state must be a tensor"):
        vllm.causal_conv1d_update(x.t(), 3, weight, bias)
    with pytest.raises(NotImplementedError, match="activation"):
        vllm.causal_conv1d_update(x.t(), states, weight, bias, "relu")


STAND_IN = """
import os
import torch

NULL_BLOCK_ID = 0
set_random_seed = torch.manual_seed

device_type = os.environ["DEVICE"]

class current_platform:
    device_type = device_type
    is_cuda_alike = staticmethod(lambda: True)
    is_xpu = is_cpu = staticmethod(lambda: False)

if device_type == "cpu":
    torch.accelerator.empty_cache = lambda: None

def rearrange(x, form):
    assert form == "b s d -> b d s"
    return x.transpose(1, 2)
"""


def with_other_imports(text):
    """vLLM's test, of which its imports alone are changed."""
    module = "from vllm.model_executor.layers.mamba.ops.causal_conv1d import"
    assert module in text
    text = text.replace(module, "from causal_conv1d.vllm import")
    lines = text.splitlines(keepends=True)
    for i, line in enumerate(lines):
        words = line.split()
        if words[:1] == ["from"] and (words[1].startswith("vllm") or words[1] == "einops"):
            lines[i] = line.replace(words[1], "stand_in")
    return "".join(lines)


def test_own_test_of_vllm(device, tmp_path):
    path = os.environ.get("CAUSAL_CONV1D_VLLM_TEST")
    if path is None:
        pytest.skip("CAUSAL_CONV1D_VLLM_TEST names no test of vLLM")
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "test_vllm_own.py").write_text(with_other_imports(Path(path).read_text()))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "test_vllm_own.py"],
        cwd=tmp_path,
        env=os.environ | {"DEVICE": device},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0 and "passed" in run.stdout, run.stdout[-3000:]
    assert "skipped" not in run.stdout, run.stdout
