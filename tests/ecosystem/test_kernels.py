"""The package `kernels`, which loads kernels of the Hugging Face Hub, loads this one from a folder.

Each test is a process of its own, since `kernels` keeps what it has loaded. None has a network.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("kernels")

from test_hub import PACKAGE, build_hub  # noqa: E402

TESTS = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "causal-conv1d"
    done = build_hub(PACKAGE, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder


def run(*arguments, **variables):
    path = os.pathsep.join([str(TESTS), *(p for p in sys.path if p)])
    env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | variables
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd="/", env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("registration", ["auto", "ctypes"])
@pytest.mark.parametrize("order", ["before", "after", "absent"])
def test_get_local_kernel(device, hub, order, registration):
    program = TESTS / "hub_program.py"
    run(program, hub, order, "kernels", device, CAUSAL_CONV1D_REGISTRATION=registration)


METADATA = """
import sys
from pathlib import Path
from kernels import Metadata
from kernels._rust import Digest, DigestAlgorithm
from kernels.validate import default_metadata_validators
from kernels.variants import get_variants_local

build = Path(sys.argv[1]) / "build"
folders = sorted(path.name for path in build.iterdir())
assert sorted(variant.variant_str for variant in get_variants_local(build)) == folders != []
for name in folders:
    metadata = Metadata.read_from_file(build / name / "metadata.json")
    assert str(metadata.name) == "causal-conv1d" and metadata.version == 1, metadata
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build / name))
    for validator in default_metadata_validators():
        validator.validate_metadata(metadata=metadata, variant=name)
"""


def test_the_metadata_holds_and_matches_the_files(hub):
    run("-c", METADATA, hub)


RESOLVE = """
from packaging.version import Version
from kernels.backends import CPU, CUDA
from kernels.variants import _resolve_variant_for_system, parse_variant

names = [
    f"torch-stable-abi29-{backend}-{machine}-linux"
    for backend in ("cpu", "cu120", "cu130")
    for machine in ("x86_64", "aarch64")
]

def chosen(backend, machine, torch):
    variants, _ = _resolve_variant_for_system(
        list(map(parse_variant, names)), backend, machine, "linux", Version(torch), True, None
    )
    return [variant.variant_str.removeprefix("torch-stable-abi29-") for variant in variants]

assert chosen(CPU(), "x86_64", "2.13") == ["cpu-x86_64-linux"]
assert chosen(CUDA(Version("12.6")), "aarch64", "2.9") == ["cu120-aarch64-linux"]
assert chosen(CUDA(Version("13.2")), "x86_64", "2.15") == ["cu130-x86_64-linux"]
assert chosen(CPU(), "x86_64", "2.8") == []
"""


def test_each_machine_gets_its_variant():
    run("-c", RESOLVE)


LAYERS = """
import sys
import torch
import torch.nn.functional as F
from kernels import (
    LocalLayerRepository, Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping,
    use_kernelized_func,
)
from hub_program import Calls
from pathlib import Path

folder, device = Path(sys.argv[1]), sys.argv[2]

# As in the models of transformers, the fallback and its name.
@use_kernel_forward_from_hub("causal_conv1d_update")
def causal_conv1d_update(hidden_states, conv_state, weight, bias=None, activation=None):
    raise AssertionError("the model's own function was called")

@use_kernel_forward_from_hub("causal_conv1d_fn")
def causal_conv1d_fn(hidden_states, weight, bias=None, activation=None, **kwargs):
    raise AssertionError("the model's own function was called")

@use_kernelized_func(causal_conv1d_fn, causal_conv1d_update)
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(6, 6, 4, groups=6, padding=3)

    def forward(self, x, state=None, **kwargs):
        weight, bias = self.conv.weight.squeeze(1), self.conv.bias
        if state is None:
            return causal_conv1d_fn(x, weight, bias, activation="silu", **kwargs)
        return causal_conv1d_update(x, state, weight, bias, activation="silu")

torch.manual_seed(0)
block, x = Block().to(device, torch.float64), torch.randn(2, 6, 33, dtype=torch.float64).to(device)
names = ("causal_conv1d_fn", "causal_conv1d_update")
mapping = {n: {device: LocalLayerRepository(folder, layer_name=n)} for n in names}
with use_kernel_mapping(mapping):
    block = kernelize(block, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device=device)
expected = F.silu(block.conv(x)[..., :33])
with Calls() as calls:
    found = block(x, position_ids=None)
assert [name[:15] for name in calls.counts] == ["_causal_conv1d_"], calls.counts
torch.testing.assert_close(found, expected)
weight = block.conv.weight
for pair in zip(*(torch.autograd.grad(out.sum(), [weight]) for out in (found, expected))):
    torch.testing.assert_close(*pair)
torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), expected)
ids = torch.arange(33, device=device).expand(2, 33).int()  # each position is a sequence
alone = F.silu(x * weight[:, 0, 3:] + block.conv.bias[:, None])
torch.testing.assert_close(block(x, seq_idx=ids), alone)
state = torch.zeros(2, 6, 4, dtype=torch.float64, device=device)
with torch.no_grad():
    tokens = [block(x[..., i : i + 1], state) for i in range(33)]
torch.testing.assert_close(torch.cat(tokens, -1), expected.detach())
"""


def test_layers_take_the_place_of_a_models_functions(device, hub):
    run("-c", LAYERS, hub, device)


COMPILED = """
import sys
from pathlib import Path
import torch
from kernels import get_kernel, get_local_kernel

kernel = get_kernel("somebody/causal-conv1d", version=1)  # LOCAL_KERNELS has it
assert kernel is get_local_kernel(Path(sys.argv[1]))
device = sys.argv[2]
x, weight = torch.randn(2, 6, 9, device=device), torch.randn(6, 4, device=device)
state = torch.zeros(2, 6, 3, device=device)

@torch.compile(fullgraph=True)
def steps(x, weight, state):
    out = kernel.causal_conv1d_fn(x, weight, activation="silu")
    last = kernel.causal_conv1d_update(x[..., 0], state, weight, activation="silu")
    return out, last

leaf = weight.clone().requires_grad_()
out, _ = torch.compile(kernel.causal_conv1d_fn, fullgraph=True)(x, leaf, return_final_states=True)
(grad,) = torch.autograd.grad(out.sum(), leaf)
(wanted,) = torch.autograd.grad(kernel.causal_conv1d_fn(x, leaf).sum(), leaf)
torch.testing.assert_close(grad, wanted)
out, last = steps(x, weight, state)
torch.testing.assert_close(out, kernel.causal_conv1d_fn(x, weight, activation="silu"))
torch.testing.assert_close(last, out[..., 0])
assert torch.equal(state[..., -1], x[..., 0]) and not state[..., :-1].any()
exported = torch.export.export(kernel.layers.causal_conv1d_fn(), (x, weight))
assert f"torch.ops.{kernel.__name__}.forward.default" in exported.graph_module.code
"""


def test_inductor_and_a_name_of_the_hub(device, hub):
    run("-c", COMPILED, hub, device, LOCAL_KERNELS=f"somebody/causal-conv1d={hub}")


DOCUMENTED = """
import sys
import torch
from pathlib import Path

page, folder, device = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
blocks = [part.split("```")[0] for part in page.read_text(encoding="utf-8").split("```python")[1:]]
assert len(blocks) == 2
x, weight = torch.randn(2, 6, 9, device=device), torch.randn(6, 4, device=device)
names = {"x": x, "weight": weight, "bias": None, "torch": torch}
exec(blocks[0].replace("dist/hub/causal-conv1d", folder), names)
torch.testing.assert_close(
    names["out"],
    torch.nn.functional.silu(
        torch.nn.functional.conv1d(x, weight[:, None], padding=3, groups=6)[..., :9]
    ),
)

from kernels import use_kernel_forward_from_hub, use_kernelized_func

@use_kernel_forward_from_hub("causal_conv1d_fn")
def causal_conv1d_fn(hidden_states, weight, bias=None, activation=None, **kwargs):
    raise AssertionError("the model's own function was called")

@use_kernelized_func(causal_conv1d_fn)
class Block(torch.nn.Module):
    def forward(self, x, weight):
        return causal_conv1d_fn(x, weight, None, activation="silu")

names |= {"model": Block().to(device), "folder": Path(folder)}
exec(blocks[1].replace('"cuda"', repr(device)), names)
torch.testing.assert_close(names["model"](x, weight), names["out"])
"""


def test_as_documented(device, hub):
    """The lines of docs/hub.md."""
    run("-c", DOCUMENTED, TESTS.parent / "docs" / "hub.md", hub, device)
