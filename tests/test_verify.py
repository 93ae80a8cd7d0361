"""scripts/verify.py, on stand-ins for mamba_ssm and Mamba-YOLO made here."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("scripts_path")


SCAN = '''
"""selective_scan_cuda by the plain version of verify.py."""
import torch
from verify import selective_scan

def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)

def fwd(*inputs):
    out, state = scan(*inputs[:6], None, *inputs[7:])
    x = torch.zeros(*state.shape[:2], 1, 2 * state.shape[2])
    x[:, :, 0, 1::2] = state
    return [out, x] if inputs[6] is None else [out, x, scan(*inputs)[0]]

def bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, softplus, recompute):
    inputs = [t.detach().requires_grad_() for t in (u, delta, A, B, C, D, delta_bias)]
    gates = [] if z is None else [z.detach().requires_grad_()]
    with torch.enable_grad():
        y, _ = scan(*inputs[:6], gates[0] if gates else None, inputs[6], softplus)
        return list(torch.autograd.grad(y, [*inputs, *gates], dout))
'''

MAMBA = '''
"""mamba_ssm's Mamba by the plain version of verify.py."""
import torch
from torch import nn
from verify import mamba_block

class Mamba(nn.Module):
    def __init__(self, d_model, d_state):
        super().__init__()
        inner, rank = 2 * d_model, 4
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.rand(inner, d_state))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, x):
        return mamba_block(dict(self.named_parameters()), x)
'''

YOLO = '''
"""Modules with Mamba-YOLO's names, options and calls of the scan."""
import torch
from torch import nn
import selective_scan_cuda_core

class SelectiveScanCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, delta_bias, delta_softplus, nrows, backnrows, oflex):
        out, x = selective_scan_cuda_core.fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, 1)
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, x)
        ctx.delta_softplus = delta_softplus
        return out

    @staticmethod
    def backward(ctx, dout):
        u, delta, A, B, C, D, delta_bias, x = ctx.saved_tensors
        grads = selective_scan_cuda_core.bwd(
            u, delta, A, B, C, D, delta_bias, dout, x, ctx.delta_softplus, 1
        )
        return (*grads, None, None, None, None)

class SS2D(nn.Module):
    def __init__(self, d_model, d_state):
        super().__init__()
        self.scan = SelectiveScanCore
        self.proj = nn.Conv2d(d_model, d_model + 2 * d_state, 1)
        self.sizes = [d_model, d_state, d_state]
        self.A_logs = nn.Parameter(torch.rand(d_model, d_state))
        self.Ds = nn.Parameter(torch.ones(d_model))
        self.dt_bias = nn.Parameter(torch.rand(d_model))

    def forward(self, x):
        delta, B, C = self.proj(x).flatten(2).split(self.sizes, dim=1)
        B, C = B[:, None].contiguous(), C[:, None].contiguous()
        y = self.scan.apply(
            x.flatten(2), delta, -self.A_logs.exp(), B, C, self.Ds, self.dt_bias, True, 1, 1, False
        )
        return y.view_as(x)

class VSSBlock(nn.Module):
    def __init__(self, in_channels, hidden_dim, ssm_d_state):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, hidden_dim, 1)
        self.op = SS2D(hidden_dim, ssm_d_state)

    def forward(self, x):
        x = self.conv(x)
        return x + self.op(x)
'''

CORE = """
import selective_scan_cuda

def fwd(u, delta, A, B, C, D, delta_bias, softplus, nrows):
    return selective_scan_cuda.fwd(u, delta, A, B, C, D, None, delta_bias, softplus)

def bwd(u, delta, A, B, C, D, delta_bias, dout, x, softplus, nrows):
    return selective_scan_cuda.bwd(
        u, delta, A, B, C, D, None, delta_bias, dout, x, None, None, softplus, False
    )
"""

FILES = {
    "selective_scan_cuda.py": SCAN,
    "selective_scan_cuda_core.py": CORE,
    "mamba_ssm/__init__.py": "",
    "mamba_ssm/modules/__init__.py": "",
    "mamba_ssm/modules/mamba_simple.py": MAMBA,
    "yolo/nn/mamba_yolo.py": YOLO,
}
NAMES = ("causal_conv1d_fn", "Mamba module", "selective_scan_cuda", "SS2D", "VSSBlock_YOLO")


@pytest.fixture
def stand_ins(tmp_path):
    """Packages with the right names and values, in plain PyTorch."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def replace_in(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def signs_of(output):
    """The sign in front of each name in what verify.py prints."""
    lines = output.splitlines()[1:]
    assert len(lines) == len(NAMES), output
    signs = {}
    for name, line in zip(NAMES, lines, strict=True):
        sign, rest = line.split(" ", 1)
        assert rest.startswith(f"{name} "), output
        signs[name] = sign
    return signs


@pytest.fixture
def run_verify(stand_ins, scripts_path, monkeypatch, capsys):
    """verify.py's exit status, signs and output, run where the stand-ins are what is installed."""
    import verify

    monkeypatch.syspath_prepend(stand_ins)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the loops over time are of tiny operations

    def forget():
        packages = {name.split(".")[0].split("/")[0] for name in FILES} | {"mamba_yolo_tree"}
        for name in list(sys.modules):
            if name.split(".")[0] in packages:
                del sys.modules[name]

    def run(*options):
        forget()
        status = verify.main(["--device", "cpu", *options])
        forget()
        output = capsys.readouterr().out
        return status, signs_of(output), output

    yield run
    torch.set_num_threads(threads)


def test_verify_ticks_all(stand_ins, run_verify):
    status, signs, _ = run_verify("--mamba-yolo", str(stand_ins / "yolo"))
    assert status == 0 and signs == dict.fromkeys(NAMES, "✓")


def test_verify_without_mamba_yolo(stand_ins, run_verify):
    status, signs, output = run_verify()
    assert status == 0
    assert signs == dict.fromkeys(NAMES[:3], "✓") | dict.fromkeys(NAMES[3:], "-")
    assert output.count("not installed") == 2


@pytest.mark.parametrize("left", ("nothing", "a folder without modules"))
def test_verify_without_mamba_ssm(stand_ins, run_verify, left):
    shutil.rmtree(stand_ins / "mamba_ssm")
    if left != "nothing":
        (stand_ins / "mamba_ssm/utils").mkdir(parents=True)
        (stand_ins / "mamba_ssm/utils/generation.py.orig").touch()
    status, signs, output = run_verify("--mamba-yolo", str(stand_ins / "yolo"))
    assert status == 0
    assert signs == dict.fromkeys(NAMES, "✓") | {"Mamba module": "-"}
    assert output.count("not installed") == 1

    replace_in(stand_ins / "selective_scan_cuda.py", "x[:, :, 0, 1::2] = state", "pass")
    status, signs, _ = run_verify()
    assert status == 1 and signs["Mamba module"] == "-" and signs["selective_scan_cuda"] == "✗"


def test_verify_with_half_a_mamba_ssm(stand_ins, run_verify):
    (stand_ins / "mamba_ssm/modules/mamba_simple.py").unlink()
    status, signs, output = run_verify()
    assert status == 1 and signs["Mamba module"] == "✗"
    assert "No module named 'mamba_ssm.modules.mamba_simple'" in output


IMPORTS = """
import triton
from einops import rearrange
from transformers.generation import GreedySearchDecoderOnlyOutput
try:
    import packaging
except ImportError:
    pass
    import huggingface_hub
"""


def test_verify_names_what_mamba_ssm_lacks_before_it_is_imported(
    stand_ins, run_verify, monkeypatch
):
    (stand_ins / "mamba_ssm/__init__.py").write_text(
        '__version__ = "2.2.4"\nimport mamba_ssm.ops\n'
    )
    (stand_ins / "mamba_ssm/ops.py").write_text(IMPORTS)
    genuine = importlib.util.find_spec
    there = set()

    def find_spec(name, *arguments):
        if name in ("triton", "einops", "transformers", "packaging", "huggingface_hub"):
            return types.SimpleNamespace(origin="there") if name in there else None
        return genuine(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.24.0")

    def said():
        status, signs, output = run_verify()
        assert status == 1 and signs["Mamba module"] == "✗"
        return next(line for line in output.splitlines() if "Mamba module" in line).split(None, 3)[
            3
        ]

    assert said() == (
        "mamba_ssm 2.2.4 cannot be imported without einops and transformers and triton: pip "
        "install einops 'transformers<5' triton (Triton for a Jetson: from the index that its "
        "torch came from)"
    )
    there |= {"transformers", "triton"}
    assert said() == "mamba_ssm 2.2.4 cannot be imported without einops: pip install einops"
    there |= {"einops"}
    assert said() == (
        "mamba_ssm 2.2.4 cannot be imported with transformers 5.24.0, which has no "
        "GreedySearchDecoderOnlyOutput: pip install 'transformers<5'"
    )


@pytest.mark.parametrize(
    ("file", "old", "new", "crosses"),
    (
        pytest.param(
            "selective_scan_cuda.py",
            "return list(torch.autograd.grad(y, [*inputs, *gates], dout))",
            "return [2 * g for g in torch.autograd.grad(y, [*inputs, *gates], dout)]",
            NAMES[2:],
            id="wrong gradients, right values",
        ),
        pytest.param(
            "selective_scan_cuda.py",
            "x[:, :, 0, 1::2] = state",
            "pass",
            NAMES[2:3],
            id="wrong last state",
        ),
        pytest.param(
            "mamba_ssm/modules/mamba_simple.py",
            "return mamba_block(dict(self.named_parameters()), x)",
            "return 1.001 * mamba_block(dict(self.named_parameters()), x)",
            NAMES[1:2],
            id="values wrong by a thousandth",
        ),
        pytest.param(
            "mamba_ssm/modules/mamba_simple.py",
            "return mamba_block(dict(self.named_parameters()), x)",
            "return mamba_block(dict(self.named_parameters()), x.detach())",
            NAMES[1:2],
            id="no gradient",
        ),
        pytest.param(
            "selective_scan_cuda_core.py",
            "dout, x, None, None, softplus, False",
            "dout, x, softplus, 1",
            NAMES[3:],
            id="the published wrapper's backward",
        ),
        pytest.param("mamba_ssm/__init__.py", "", "import nowhere", NAMES[1:2], id="import error"),
    ),
)
def test_verify_crosses_what_is_wrong(stand_ins, run_verify, file, old, new, crosses):
    replace_in(stand_ins / file, old, new) if old else (stand_ins / file).write_text(new)
    status, signs, output = run_verify("--mamba-yolo", str(stand_ins / "yolo"))
    assert status == 1, output
    assert {name for name in NAMES if signs[name] == "✗"} == set(crosses), output


def test_verify_accepts_the_other_name_of_the_block(stand_ins, run_verify):
    file = stand_ins / "yolo/nn/mamba_yolo.py"
    replace_in(file, "class VSSBlock(", "class VSSBlock_YOLO(")
    status, signs, _ = run_verify("--mamba-yolo", str(file))
    assert status == 0 and signs["VSSBlock_YOLO"] == "✓"


def test_verify_of_a_folder_without_mamba_yolo(run_verify, tmp_path):
    status, signs, output = run_verify("--mamba-yolo", str(tmp_path / "mamba_ssm"))
    assert status == 1 and signs["SS2D"] == signs["VSSBlock_YOLO"] == "✗"
    assert "no mamba_yolo.py" in output


def test_verify_as_a_command_on_an_ascii_terminal(stand_ins):
    folders = [str(stand_ins), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    environment |= {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "scripts/verify.py", "--device", "cpu"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    assert found.returncode == 0, found.stdout + found.stderr
    signs = signs_of(found.stdout)
    assert list(signs.values()) == ["ok", "ok", "ok", "-", "-"]


@pytest.mark.parametrize("left", ("nothing", "a folder without modules", "a broken library"))
@pytest.mark.parametrize("installed", (True, False), ids=("installed", "from the sources"))
def test_verify_without_torch(tmp_path, left, installed):
    """-S and -I: a Python that has nothing, but what is put on its path here."""
    if left != "nothing":
        (tmp_path / "torch").mkdir()
    if left == "a broken library":
        (tmp_path / "torch/__init__.py").write_text("raise OSError('libcudart is missing')\n")
    paths = [str(ROOT / "scripts"), str(tmp_path), *([str(ROOT)] if installed else [])]
    code = f"import sys; sys.path[:0] = {paths}; import verify"
    done = subprocess.run([sys.executable, "-SIc", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    wanted = "error: causal_conv1d needs PyTorch >= 2.5, and pip does not install it"
    if left == "a broken library":
        wanted = "error: causal_conv1d: importing torch failed: libcudart is missing"
    assert done.stderr.startswith(wanted)


def test_the_plain_versions_of_verify(device):
    """Against PyTorch's own convolution and a recurrence written another way."""
    import verify

    x, weight, bias = (torch.randn(s, device=device) for s in ((2, 6, 9), (6, 4), (6,)))
    own = torch.nn.Conv1d(6, 6, 4, padding=3, groups=6, device=device)
    own.weight.data, own.bias.data = weight[:, None], bias
    expected = torch.nn.functional.silu(own(x)[..., :9])
    assert torch.allclose(verify.causal_conv1d(x, weight, bias), expected, atol=1e-5)

    u, delta, z = torch.randn(3, 1, 1, 5, device=device)
    A, B, C, D, shift = (torch.randn(s, device=device) for s in ((1, 1), 5, 5, 1, 1))
    dt, h, expected = torch.log1p(torch.exp(delta + shift))[0, 0], 0.0, []
    for t in range(5):
        h = torch.exp(dt[t] * A[0, 0]) * h + dt[t] * B[t] * u[0, 0, t]
        gate = z[0, 0, t] / (1 + torch.exp(-z[0, 0, t]))
        expected.append((C[t] * h + D[0] * u[0, 0, t]) * gate)
    shape = (1, 1, 1, 5)
    out, last = verify.selective_scan(u, delta, A, B.view(shape), C.view(shape), D, z, shift, True)
    assert torch.allclose(out[0, 0], torch.stack(expected), atol=1e-5)
    assert torch.allclose(last[0, 0, 0], h, atol=1e-5)
