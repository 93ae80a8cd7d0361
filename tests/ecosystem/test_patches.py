"""patches/ on the released mamba_ssm 2.2.4, by git, by patch and by scripts/apply_patches.py."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PATCHES = sorted((ROOT / "patches").glob("000[12]-*.patch"))
TOOLS = {
    "git": ("git", "apply", "--check"),
    "patch": ("patch", "-p1", "--dry-run", "--fuzz=0", "-i"),
}

sys.path.insert(0, str(ROOT / "scripts"))
import apply_patches  # noqa: E402

installed = importlib.util.find_spec("mamba_ssm")
if installed is None or apply_patches.version_of(Path(installed.origin).parent) != "2.2.4":
    pytest.skip("needs mamba_ssm 2.2.4: scripts/test_ecosystem.sh", allow_module_level=True)


@pytest.fixture
def released(tmp_path):
    """A folder with the release's mamba_ssm."""
    source = Path(installed.origin).parent
    ignored = shutil.ignore_patterns("__pycache__", "*.orig")
    shutil.copytree(source, tmp_path / "released/mamba_ssm", ignore=ignored)
    return tmp_path / "released"


@pytest.fixture
def patched(released, tmp_path):
    shutil.copytree(released, tmp_path / "patched")
    assert apply_patches.main(["--mamba-ssm", str(tmp_path / "patched")]) == 0
    return tmp_path / "patched"


def snapshot(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def needs(tool):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.name[:4])
def test_patch_applies_forward_and_in_reverse(patch, tool, released, patched):
    needs(tool)

    def check(folder, *options):
        command = [*TOOLS[tool], str(patch), *options]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)

    for folder, options in ((released, ()), (patched, ("-R",))):
        found = check(folder, *options)
        assert found.returncode == 0 and "offset" not in found.stdout, found.stdout + found.stderr
    assert check(released, "-R").returncode != 0


def test_apply_patches_makes_what_git_makes(released, patched):
    needs("git")
    before = snapshot(released)
    for patch in PATCHES:
        subprocess.run(["git", "apply", patch], cwd=released, check=True)
    after = {name: text for name, text in snapshot(patched).items() if not name.endswith(".orig")}
    assert after == snapshot(released)
    assert sum(after[name] != before[name] for name in before) == 4
    assert not any(b"causal_conv1d_cuda" in text for text in after.values())

    assert apply_patches.main(["--mamba-ssm", str(patched)]) == 0  # already patched
    assert apply_patches.main(["--mamba-ssm", str(patched), "--revert"]) == 0
    assert snapshot(patched) == before


def run(folder, code, device, **environment):
    """Runs code with the mamba_ssm in folder, and with this folder and scripts/ to import from."""
    path = (folder, HERE, ROOT / "scripts", os.environ.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, map(str, path)))
    start = f"from mamba_harness import prepare; prepare({device!r})\n"
    return subprocess.run(
        [sys.executable, "-c", start + code],
        env=os.environ | {"PYTHONIOENCODING": "utf-8"} | environment,
        cwd="/",
        capture_output=True,
        text=True,
    )


def test_patched_it_runs_and_trains_without_the_raw_module(released, patched, device):
    """verify.py compares the Mamba module's values and gradients with plain PyTorch."""
    code = f"""
import sys
sys.modules["causal_conv1d_cuda"] = None
import verify
verify.main(["--device", {device!r}])
"""
    for folder, sign in ((released, "✗"), (patched, "✓")):
        found = run(folder, code, device)
        assert f"{sign} Mamba module" in found.stdout, found.stdout + found.stderr


def test_patched_it_does_without_torch_distributed(released, patched, device):
    code = """
import sys, types, torch, transformers, huggingface_hub
bare = types.ModuleType("torch.distributed")
bare.__path__ = torch.distributed.__path__
bare.is_available = lambda: False
bare.ProcessGroup = type("ProcessGroup", (), {})
sys.modules["torch.distributed"] = torch.distributed = bare
import mamba_ssm.utils.generation
try:
    torch.distributed.all_gather_into_tensor(1, 2)
except RuntimeError as error:
    print("refused:", error)
"""
    found = run(released, code, device, CAUSAL_CONV1D_DISTRIBUTED_STUBS="0")
    assert found.returncode != 0 and "_all_gather_base" in found.stderr
    found = run(patched, code, device, CAUSAL_CONV1D_DISTRIBUTED_STUBS="0")
    assert found.returncode == 0, found.stderr
    assert "refused: torch.distributed.all_gather_into_tensor is not available" in found.stdout


def test_patched_mamba2_gives_the_same(released, patched, device, tmp_path):
    """Fused forward and backward with seq_idx; on the CPU its kernels run in an interpreter."""
    code = f"""
import torch
from mamba_ssm import Mamba2
torch.manual_seed(0)
layer = Mamba2(16, d_state=16, headdim=8, chunk_size=16, device={device!r})
u = torch.randn(1, 9, 16).to({device!r}).requires_grad_()
ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]], dtype=torch.int32, device={device!r})
out = layer(u, seq_idx=ids)
gradients = torch.autograd.grad(out, [u, *layer.parameters()], torch.ones_like(out))
torch.save([out, *gradients], "PATH")
"""
    results = []
    for folder in (released, patched):
        path = tmp_path / f"{folder.name}.pt"
        found = run(folder, code.replace("PATH", str(path)), device)
        assert found.returncode == 0, found.stderr
        results.append(torch.load(path, map_location="cpu"))
    assert len(results[0]) == 2 + 8  # out, u, and the parameters
    for got, want in zip(*results, strict=True):
        assert want.norm() > 0 and (got - want).norm() <= 1e-5 * want.norm()
