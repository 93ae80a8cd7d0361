"""An unpatched release of mamba_ssm runs on this library, and agrees with its own reference code.

scripts/test_ecosystem.sh runs this file once a release. On the CPU mamba_ssm's own Triton kernels
run in Triton's interpreter: see mamba_harness.py.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mamba_harness import prepare
from operator_calls import OperatorCalls

if importlib.util.find_spec("mamba_ssm") is None and "MAMBA_SSM_VERSION" not in os.environ:
    pytest.skip("needs mamba_ssm: scripts/test_ecosystem.sh", allow_module_level=True)

HERE = Path(__file__).resolve().parent
APPLY_PATCHES = HERE.parent.parent / "scripts" / "apply_patches.py"
BATCH, SEQLEN, D_MODEL = 2, 21, 16
MAMBA2 = {"d_state": 16, "headdim": 8, "chunk_size": 16}

# Relative error in the 2-norm of float32 computations in different orders.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def mamba_ssm(device):
    prepare(device)
    import mamba_ssm

    wanted = os.environ.get("MAMBA_SSM_VERSION")
    assert wanted in (None, mamba_ssm.__version__)
    return mamba_ssm


def error(actual, expected):
    size = expected.double().norm()
    assert size > 0, "the expected value is 0, nothing is tested"
    return ((actual.double() - expected.double()).norm() / size).item()


def gradients(result, tensors):
    torch.manual_seed(3)
    return torch.autograd.grad(result, tensors, torch.randn_like(result))


def assert_same(result, expected, tensors):
    """Two results of the tensors by name agree, and so do all their gradients."""
    assert error(result, expected) <= TOLERANCE
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    wanted = gradients(expected, list(tensors.values()))
    found = gradients(result, list(tensors.values()))
    for name, actual, right in zip(tensors, found, wanted, strict=True):
        assert error(actual, right) <= TOLERANCE, name


def torch_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
    assert seq_idx is None
    pad = weight.shape[1] - 1
    out = F.conv1d(F.pad(x, (pad, 0)), weight[:, None], bias, groups=x.shape[1])
    return out if activation is None else F.silu(out)


@pytest.fixture
def torch_only(mamba_ssm, monkeypatch):
    """A function that puts plain PyTorch in the places of all kernels that mamba_ssm would call."""
    from mamba_ssm.modules import mamba_simple
    from mamba_ssm.ops import selective_scan_interface
    from mamba_ssm.ops.triton import layernorm_gated, ssd_combined

    def apply():
        reference = selective_scan_interface.selective_scan_ref
        for module in (mamba_simple, selective_scan_interface, ssd_combined):
            monkeypatch.setattr(module, "causal_conv1d_fn", torch_conv1d_fn)
        for module in (mamba_simple, selective_scan_interface):
            monkeypatch.setattr(module, "selective_scan_fn", reference)
        monkeypatch.setattr(ssd_combined, "rmsnorm_fn", layernorm_gated.rms_norm_ref)

    return apply


# ------------------------------------------------------------------------------------------- parts


def test_the_scan_is_this_library_s(mamba_ssm):
    import selective_scan_cuda
    from causal_conv1d import selective_scan

    assert selective_scan_cuda.selective_scan_fwd is selective_scan.selective_scan_fwd


@pytest.mark.parametrize("variable", [True, False])
@pytest.mark.parametrize("has_z", [True, False])
@pytest.mark.parametrize("complex_", [True, False])
def test_selective_scan(mamba_ssm, device, variable, has_z, complex_):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

    torch.manual_seed(0)
    batch, dim, seqlen, dstate = 2, 6, 70, 4

    def projection():
        if variable:
            return torch.randn(batch, 2, dstate, seqlen * (2 if complex_ else 1), device=device)
        dtype = torch.complex64 if complex_ else torch.float32
        return torch.randn(dim, dstate, dtype=dtype, device=device)

    A = -torch.rand(dim, dstate, device=device)
    inputs = {
        "u": torch.randn(batch, dim, seqlen, device=device),
        "delta": torch.rand(batch, dim, seqlen, device=device) / 2,
        "A": torch.complex(A, torch.randn_like(A)) if complex_ else A,
        "B": projection(),
        "C": projection(),
        "D": torch.randn(dim, device=device),
        "z": torch.randn(batch, dim, seqlen, device=device) if has_z else None,
        "delta_bias": torch.rand(dim, device=device) / 2,
    }
    inputs = {k: v if v is None else v.requires_grad_() for k, v in inputs.items()}
    out, state = selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True)
    wanted, wanted_state = selective_scan_ref(**inputs, delta_softplus=True, return_last_state=True)
    assert (
        error(torch.view_as_real(state.cfloat()), torch.view_as_real(wanted_state.cfloat()))
        <= TOLERANCE
    )
    assert error(out, wanted) <= TOLERANCE
    names = [name for name, tensor in inputs.items() if tensor is not None]
    tensors = [inputs[name] for name in names]
    found, right = gradients(out, tensors), gradients(wanted, tensors)
    for name, a, b in zip(names, found, right, strict=True):
        if a.is_complex():
            a, b = torch.view_as_real(a), torch.view_as_real(b)
        assert error(a, b) <= TOLERANCE, name


@pytest.mark.parametrize("checkpoint_lvl", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_mamba_inner(mamba_ssm, device, torch_only, bias, checkpoint_lvl):
    """The fused forward and backward against mamba_inner_ref, and that in plain PyTorch."""
    from mamba_ssm.ops.selective_scan_interface import MambaInnerFn, mamba_inner_ref

    torch.manual_seed(0)
    dim, rank, dstate = 12, 3, 4
    rand = lambda *shape: torch.randn(*shape, device=device) / shape[-1] ** 0.5  # noqa: E731
    inputs = {
        # As the product of in_proj with the input: (dim, batch, seqlen) in memory.
        "xz": torch.randn(2 * dim, BATCH, SEQLEN, device=device).transpose(0, 1),
        "conv1d_weight": rand(dim, 1, 4),
        "conv1d_bias": rand(dim) if bias else None,
        "x_proj_weight": rand(rank + 2 * dstate, dim),
        "delta_proj_weight": rand(dim, rank),
        "out_proj_weight": rand(D_MODEL, dim),
        "out_proj_bias": None,
        "A": -torch.rand(dim, dstate, device=device),
        "B": None,
        "C": None,
        "D": rand(dim),
        "delta_bias": torch.rand(dim, device=device),
    }
    inputs = {k: v if v is None else v.requires_grad_() for k, v in inputs.items()}
    with OperatorCalls() as calls:
        out = MambaInnerFn.apply(*inputs.values(), None, None, True, checkpoint_lvl)
        gradients(out, [inputs["xz"]])
    assert (calls.forward, calls.backward) == (1 + checkpoint_lvl, 1)
    out = MambaInnerFn.apply(*inputs.values(), None, None, True, checkpoint_lvl)
    assert_same(out, mamba_inner_ref(**inputs), inputs)
    torch_only()
    out = MambaInnerFn.apply(*inputs.values(), None, None, True, checkpoint_lvl)
    assert_same(out, mamba_inner_ref(**inputs), inputs)


# ------------------------------------------------------------------------------------------- layers


def make_layer(mamba_ssm, kind, device, **options):
    torch.manual_seed(0)
    options = ({"d_state": 4} if kind == "Mamba" else MAMBA2) | {"layer_idx": 0} | options
    return getattr(mamba_ssm, kind)(D_MODEL, device=device, **options)


def make_input(device, seqlen=SEQLEN):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, seqlen, D_MODEL, generator=generator).to(device).requires_grad_()


def mamba2_reference(layer, u):
    """Mamba2.forward by mamba_ssm's reference, under torch_only without any kernel."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_ref

    return mamba_split_conv1d_scan_ref(
        layer.in_proj(u),
        layer.conv1d.weight[:, 0],
        layer.conv1d.bias,
        layer.dt_bias,
        -torch.exp(layer.A_log),
        layer.D,
        layer.chunk_size,
        rmsnorm_weight=layer.norm.weight if layer.rmsnorm else None,
        rmsnorm_eps=1e-5,
        outproj_weight=layer.out_proj.weight,
        headdim=layer.headdim,
        ngroups=layer.ngroups,
        norm_before_gate=False,
    )


# headdim 16 gives 2 heads and a projection of 98 channels: rows that start at no multiple of 8.
OPTIONS = {
    "Mamba": [{}, {"d_conv": 3, "conv_bias": False}],
    "Mamba2": [{"headdim": 16}, {"ngroups": 2, "rmsnorm": False, "conv_bias": False}],
}


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
@pytest.mark.parametrize("options", [0, 1])
@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
def test_layer(mamba_ssm, device, torch_only, kind, options, fast):
    """Forward and backward, on the fused path and on the one of single operations."""
    layer = make_layer(mamba_ssm, kind, device, **OPTIONS[kind][options])
    setattr(layer, "use_fast_path" if kind == "Mamba" else "use_mem_eff_path", fast)
    u = make_input(device)
    tensors = {"u": u} | dict(layer.named_parameters())
    with OperatorCalls() as calls:
        out = layer(u)
        found = gradients(out, list(tensors.values()))
    assert (calls.forward, calls.backward) == (2 if fast else 1, 1)
    torch_only()
    if kind == "Mamba":
        layer.use_fast_path = False
        wanted = layer(u)
    else:
        wanted = mamba2_reference(layer, u)
    assert error(out, wanted) <= TOLERANCE
    for name, a, b in zip(tensors, found, gradients(wanted, list(tensors.values())), strict=True):
        assert error(a, b) <= TOLERANCE, name


def test_packed_sequences(mamba_ssm, device):
    """seq_idx through Mamba2's fused path: a packed row equals its sequences one by one."""
    layer = make_layer(mamba_ssm, "Mamba2", device)
    u = make_input(device)[:1]
    ids = torch.tensor([[0] * 8 + [1] * (SEQLEN - 8)], dtype=torch.int32, device=device)
    together = layer(u, seq_idx=ids)
    apart = torch.cat([layer(u[:, :8]), layer(u[:, 8:])], dim=1)
    assert error(together, apart) <= TOLERANCE
    found, wanted = (gradients(out, [layer.conv1d.weight])[0] for out in (together, apart))
    assert error(found, wanted) <= TOLERANCE


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
def test_token_by_token(mamba_ssm, device, kind):
    """A prompt, then single tokens from the states, give what the whole sequence gives."""
    from mamba_ssm.utils.generation import InferenceParams

    layer, u, prompt = make_layer(mamba_ssm, kind, device), make_input(device, 9), 5
    with torch.no_grad():
        whole = layer(u)
        params = InferenceParams(max_seqlen=9, max_batch_size=BATCH)
        outs = [layer(u[:, :prompt], inference_params=params)]
        with OperatorCalls() as calls:
            for t in range(prompt, 9):
                params.seqlen_offset = t
                outs.append(layer(u[:, t : t + 1], inference_params=params))
    assert calls.update == 9 - prompt
    assert error(torch.cat(outs, dim=1), whole) <= TOLERANCE


def test_varlen_prompts(mamba_ssm, device):
    """Several prompts packed into a row fill the states of each (Mamba2)."""
    from mamba_ssm.utils.generation import InferenceParams

    layer, u = make_layer(mamba_ssm, "Mamba2", device), make_input(device)[:1]
    ids = torch.tensor([[0] * 8 + [1] * (SEQLEN - 8)], dtype=torch.int32, device=device)
    ends = torch.tensor([0, 8, SEQLEN], dtype=torch.int32, device=device)
    packed = InferenceParams(max_seqlen=SEQLEN, max_batch_size=2)
    with torch.no_grad():
        layer(u, seq_idx=ids, cu_seqlens=ends, inference_params=packed)
        for i, part in enumerate((u[:, :8], u[:, 8:])):
            single = InferenceParams(max_seqlen=SEQLEN, max_batch_size=1)
            layer(part, inference_params=single)
            for together, alone in zip(
                packed.key_value_memory_dict[0], single.key_value_memory_dict[0], strict=True
            ):
                assert error(together[i], alone[0]) <= TOLERANCE


def test_attention_with_a_convolution(mamba_ssm, device, monkeypatch):
    """MHA with d_conv: whole sequences and single tokens, with this library and without."""
    from mamba_ssm.modules import mha
    from mamba_ssm.utils.generation import InferenceParams

    torch.manual_seed(0)
    layer = mha.MHA(D_MODEL, 2, d_conv=4, causal=True, layer_idx=0, device=device)
    u, tensors = make_input(device), [layer.conv1d.weight, layer.conv1d.bias, layer.in_proj.weight]

    def outputs():
        whole = layer(u)
        params = InferenceParams(max_seqlen=SEQLEN, max_batch_size=BATCH)
        with torch.no_grad():
            prompt = layer(u[:, :5], inference_params=params)
            params.seqlen_offset = 5
            token = layer(u[:, 5:6], inference_params=params)
        return [whole, prompt, token, *gradients(whole, tensors)]

    with OperatorCalls() as calls:
        found = outputs()
    assert (calls.forward, calls.update, calls.backward) == (2, 1, 1)
    monkeypatch.setattr(mha, "causal_conv1d_fn", None)
    monkeypatch.setattr(mha, "causal_conv1d_update", None)
    for actual, expected in zip(found, outputs(), strict=True):
        assert error(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
def test_mamba2_simple(mamba_ssm, device, monkeypatch, fast):
    """Against its own path for where causal_conv1d is not installed."""
    from mamba_ssm.modules import mamba2_simple

    torch.manual_seed(0)
    layer = mamba2_simple.Mamba2Simple(D_MODEL, **MAMBA2, use_mem_eff_path=fast, device=device)
    u = make_input(device)
    tensors = [u, *layer.parameters()]
    with OperatorCalls() as calls:
        out = layer(u)
        found = gradients(out, tensors)
    assert (calls.forward, calls.backward) == (2 if fast else 1, 1)
    layer.use_mem_eff_path = False
    monkeypatch.setattr(mamba2_simple, "causal_conv1d_fn", None)
    wanted = layer(u)
    assert error(out, wanted) <= TOLERANCE
    for actual, expected in zip(found, gradients(wanted, tensors), strict=True):
        assert error(actual, expected) <= TOLERANCE


def make_model(mamba_ssm, kind, device):
    from mamba_ssm.models.config_mamba import MambaConfig

    torch.manual_seed(0)
    options = {"d_state": 4} if kind == "Mamba1" else MAMBA2
    config = MambaConfig(
        d_model=D_MODEL, n_layer=2, vocab_size=32, ssm_cfg={"layer": kind} | options
    )
    return mamba_ssm.MambaLMHeadModel(config, device=device, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["Mamba1", "Mamba2"])
def test_generate(mamba_ssm, device, kind):
    """mamba_ssm's own loop, with a CUDA graph too, writes what the whole sequence predicts."""
    model = make_model(mamba_ssm, kind, device).eval()
    ids = torch.randint(32, (BATCH, 5), generator=torch.Generator().manual_seed(2)).to(device)
    for graph in (False, True) if device == "cuda" else (False,):
        written = model.generate(ids, max_length=9, cg=graph)
        assert written.shape == (BATCH, 9) and torch.equal(written[:, :5], ids)
        with torch.no_grad():
            logits = model(written[:, :-1]).logits[:, 4:]
        chosen = logits.gather(2, written[:, 5:, None])[..., 0]
        slack = 10 * TOLERANCE * logits.abs().amax()  # equal ones may be ordered otherwise
        assert (chosen >= logits.amax(-1) - slack).all()


def test_autocast(mamba_ssm, cuda):
    """Weights in float32, arithmetic in bfloat16."""
    for kind in ("Mamba", "Mamba2"):
        layer, u = make_layer(mamba_ssm, kind, cuda), make_input(cuda)
        wanted = layer(u)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = layer(u)
        assert error(out, wanted) <= 2e-2
        for found, right in zip(gradients(out, [u]), gradients(wanted, [u]), strict=True):
            assert error(found, right) <= 3e-2


# ---------------------------------------------------------------------------------------- processes


def run(*arguments):
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_without_distributed(mamba_ssm, device):
    """The names that mamba_ssm takes at import, and the one that generate(cg=True) calls."""
    run(
        "-c",
        f"""
import sys, types, torch
real = torch.distributed
bare = types.ModuleType("torch.distributed")
bare.__path__ = real.__path__
bare.is_available = lambda: False
bare.ProcessGroup = type("ProcessGroup", (), {{}})
from mamba_harness import prepare
prepare({device!r})
import transformers, huggingface_hub
sys.modules["torch.distributed"] = torch.distributed = bare
import mamba_ssm.utils.generation
assert torch.distributed.is_initialized() is False
layer = mamba_ssm.Mamba(16, d_state=4, device={device!r})
layer(torch.randn(1, 8, 16, device={device!r})).sum().backward()
assert layer.conv1d.weight.grad.abs().sum() > 0
""",
    )


@pytest.mark.parametrize("kind", ["Mamba1", "Mamba2"])
def test_patched_and_unpatched_train_alike(mamba_ssm, device, tmp_path, kind):
    """The same losses over 50 steps with the patches for mamba_ssm 2.2.4 and without them."""
    if mamba_ssm.__version__ != "2.2.4":
        pytest.skip("about mamba_ssm 2.2.4")
    if kind == "Mamba2" and device == "cpu":
        pytest.skip("Triton's interpreter takes minutes for 50 steps of Mamba2")
    source = Path(mamba_ssm.__file__).parent
    shutil.copytree(source, tmp_path / "mamba_ssm")
    run(str(APPLY_PATCHES), "--mamba-ssm", str(tmp_path))
    changed = tmp_path / "mamba_ssm" / "ops" / "selective_scan_interface.py"
    assert changed.read_text() != (source / "ops" / changed.name).read_text()
    script = str(HERE / "mamba_loss_curve.py")
    curves = [
        json.loads(run(script, str(folder), device, kind, "50"))
        for folder in (source.parent, tmp_path)
    ]
    assert len(curves[0]) == 50 and curves[0][-1] < 0.8 * curves[0][0]
    for unpatched, patched in zip(*curves, strict=True):
        assert abs(unpatched - patched) <= 1e-4 * unpatched
