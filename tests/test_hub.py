"""scripts/dev/build_hub.py, and what it makes loaded beside the installed package.

tests/ecosystem/test_kernels.py has the package `kernels` load it.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import causal_conv1d
from causal_conv1d import _library

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "dev" / "build_hub.py"
PACKAGE = Path(causal_conv1d.__file__).parent
MACHINE = platform.machine()
COMPILER = shutil.which(os.environ.get("CC", "cc"))

makes_libraries = pytest.mark.skipif(
    None in (COMPILER, shutil.which("readelf")) or MACHINE not in ("x86_64", "aarch64"),
    reason="needs a C compiler and readelf",
)


def build_hub(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def refusal(*arguments):
    done = build_hub(*arguments)
    assert done.returncode == 1 and done.stdout == "", done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# ------------------------------------------------------------------------------------ the script

# .nv_fatbin as nvcc writes it: a header, and an entry for each of sm_87 and compute_80.
DEVICE_CODE = """
#include <stdint.h>
struct entry { uint16_t kind, version; uint32_t header; uint64_t size; uint32_t pad[3], arch; };
__attribute__((used, section(".nv_fatbin"))) static const struct {
  uint32_t magic; uint16_t version, header; uint64_t size; struct entry entries[2];
} code = {0xBA55ED50, 1, 16, 64, {{2, 1, 32, 0, {0}, 87}, {1, 1, 32, 0, {0}, 80}}};
int cudaGetDevice(int*);
int causal_conv1d_cuda_device(int* device) { return cudaGetDevice(device); }
"""


def compile_library(path, source, *options):
    command = [COMPILER, "-shared", "-fPIC", "-x", "c", "-", "-o", str(path), *options]
    subprocess.run(command, input=source, text=True, check=True)


def fake_wheel(folder, machine, cuda=None, library="int causal_conv1d_cpu;", version="1.0"):
    """A wheel with this package's Python files and small libraries, for a machine and a CUDA."""
    folder.mkdir()
    compile_library(folder / "libcausal_conv1d_cpu.so", library)
    if cuda:
        runtime = folder / f"libcudart.so.{cuda}"
        compile_library(
            runtime, "int cudaGetDevice(int* d) { return *d; }", f"-Wl,-soname,{runtime.name}"
        )
        compile_library(
            folder / "libcausal_conv1d_cuda.so", DEVICE_CODE, "-x", "none", str(runtime)
        )
    number = {"x86_64": 62, "aarch64": 183}[machine]
    wheel = folder / f"causal_conv1d-{version}-py3-none-linux_{machine}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in PACKAGE.rglob("*.py"):
            archive.write(path, f"causal_conv1d/{path.relative_to(PACKAGE)}")
        for path in folder.glob("*.so"):
            data = bytearray(path.read_bytes())
            data[18:20] = number.to_bytes(2, "little")
            archive.writestr(f"causal_conv1d/{path.name}", bytes(data))
        archive.writestr("causal_conv1d-1.0.dist-info/METADATA", "")
    return wheel


@makes_libraries
def test_each_wheel_gives_the_variants_of_its_machine(tmp_path):
    wheels = [
        fake_wheel(tmp_path / "1", "x86_64"),
        fake_wheel(tmp_path / "2", "x86_64", cuda=13),
        fake_wheel(tmp_path / "3", "aarch64", cuda=12),
        fake_wheel(tmp_path / "4", "aarch64", cuda=13),
    ]
    output = tmp_path / "hub"
    done = build_hub(*wheels, "--output", output)
    assert done.returncode == 0, done.stderr
    libraries = {
        path.name: {file.name for file in path.glob("*.so")}
        for path in (output / "build").iterdir()
    }
    cpu, cuda = "libcausal_conv1d_cpu.so", "libcausal_conv1d_cuda.so"
    assert libraries == {
        "torch-stable-abi29-cpu-x86_64-linux": {cpu},
        "torch-stable-abi29-cu130-x86_64-linux": {cpu, cuda},
        "torch-stable-abi29-cpu-aarch64-linux": {cpu},
        "torch-stable-abi29-cu120-aarch64-linux": {cpu, cuda},
        "torch-stable-abi29-cu130-aarch64-linux": {cpu, cuda},
    }
    assert sorted(done.stdout.split()) == sorted(str(output / "build" / name) for name in libraries)
    ids = set()
    for name in libraries:
        data = json.loads((output / "build" / name / "metadata.json").read_text())
        ids.add(data["id"])
        is_cuda = "-cu" in name
        archs = {"archs": ["8.0+PTX", "8.7"]} if is_cuda else {}
        assert data["backend"] == {"type": "cuda" if is_cuda else "cpu"} | archs
    assert len(ids) == 2 and all(re.fullmatch(r"_causal_conv1d_(cpu|cuda)_\w{10}", n) for n in ids)
    assert "library_name: kernels" in (output / "README.md").read_text()


def test_only_what_the_kernel_uses_is_in_it_and_imports_are_relative(tmp_path):
    assert build_hub(PACKAGE, "--output", tmp_path / "hub").returncode == 0
    (variant, *_) = (tmp_path / "hub" / "build").iterdir()
    files = {path.name for path in variant.glob("*.py")}
    assert {"__init__.py", "layers.py", "reference.py"} < files
    assert not files & {"__main__.py", "_distributed.py", "aiter.py"}
    scan = {path.name for path in variant.glob("selective_scan/*.py")}
    assert {"__init__.py", "functions.py", "autograd.py", "vmap.py"} < scan
    for path in variant.rglob("*.py"):
        found = re.findall(r"^\s*(?:from|import) +causal_conv1d.*", path.read_text(), re.MULTILINE)
        assert not found, (path.name, found)


@makes_libraries
def test_the_same_wheels_give_the_same_bytes_and_others_another_id(tmp_path):
    contents = []
    for name, library in (("a", ""), ("b", ""), ("c", "int changed;")):
        wheel = fake_wheel(tmp_path / name, "x86_64", library=f"int causal_conv1d_cpu;{library}")
        output = tmp_path / f"hub_{name}"
        for _ in range(2):  # a second time over what is there
            assert build_hub(wheel, "--output", output).returncode == 0
        contents.append({p.name: p.read_bytes() for p in output.rglob("*") if p.is_file()})
    assert contents[0] == contents[1]
    ids = [json.loads(files["metadata.json"])["id"] for files in contents]
    assert ids[1] != ids[2]


@makes_libraries
def test_what_does_not_fit_is_refused(tmp_path):
    good = fake_wheel(tmp_path / "good", "x86_64", cuda=13)
    output = ("--output", tmp_path / "hub")
    other = tmp_path / "other-1.0-py3-none-any.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("other/__init__.py", "")
    for wrong in (other, ROOT / "csrc"):
        text = refusal(wrong, *output)
        assert f"{wrong} has no libcausal_conv1d_cpu.so or no _ops.py: give wheels of" in text
    twice = fake_wheel(tmp_path / "twice", "x86_64", cuda=13)
    text = refusal(good, twice, *output)
    assert f"{good} and {twice} both make torch-stable-abi29-cu130-x86_64-linux: give one" in text
    newer = tmp_path / "newer"
    shutil.copytree(PACKAGE, newer)
    (newer / "reference.py").write_text("")
    assert f"{good} and {newer} are of different versions" in refusal(good, newer, *output)
    assert not (tmp_path / "hub").exists()
    text = refusal(good, "--output", tmp_path)
    assert f"{tmp_path} has other files: give --output a folder that is empty or new" in text
    assert f"{other} is a file: give --output a folder" in refusal(good, "--output", other)
    assert "--output /proc/hub cannot be made: " in refusal(good, "--output", "/proc/hub")


def test_a_wheel_that_cannot_be_read(tmp_path):
    for missing in ("missing.whl", "*.whl"):
        assert refusal(tmp_path / missing) == f"error: there is no {tmp_path / missing}\n"
    damaged = tmp_path / "causal_conv1d-1.0-py3-none-linux_x86_64.whl"
    damaged.write_bytes(b"PK\3\4")
    assert f"error: {damaged} is damaged: " in refusal(damaged)


@makes_libraries
def test_a_folder_of_wheels(tmp_path):
    wheel = fake_wheel(tmp_path / "1", "x86_64")
    shutil.copy(fake_wheel(tmp_path / "2", "aarch64"), wheel.parent)
    done = build_hub(wheel.parent, "--output", tmp_path / "hub")
    assert done.returncode == 0 and len(done.stdout.split()) == 2, done.stderr


# ------------------------------------------------------------------------------ the kernel it makes


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    done = build_hub(PACKAGE, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder


def run(*arguments, registration=None):
    here = str(Path(__file__).parent)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([here, *(p for p in sys.path if p)]))
    if registration:
        env["CAUSAL_CONV1D_REGISTRATION"] = registration
    command = [sys.executable, "-W", "error::UserWarning", *map(str, arguments)]
    return subprocess.run(command, cwd="/", env=env, capture_output=True, text=True)


@pytest.mark.parametrize("registration", [None, "ctypes"])
@pytest.mark.parametrize("order", ["before", "after", "absent"])
def test_a_kernel_and_the_installed_package_do_not_clash(device, hub, order, registration):
    program = ROOT / "tests" / "hub_program.py"
    done = run(program, hub, order, "simple", device, registration=registration)
    assert done.returncode == 0, done.stderr
    *names, how = done.stdout.splitlines()
    wanted = {"before": [0], "after": [1], "absent": []}[order]
    assert [i for i, name in enumerate(names) if name == "causal_conv1d"] == wanted
    stable = registration is None and _library.cpu.registration == _library.STABLE_ABI
    assert how == (_library.STABLE_ABI if stable else _library.CTYPES)


def test_one_file_serves_two_kernels(device, hub, tmp_path):
    """The Hub's cache has links to files, so that versions may share one library in a process."""
    folder = tmp_path / "hub"
    shutil.copytree(hub, folder)
    for library in folder.rglob("*.so"):
        library.unlink()
        library.symlink_to(PACKAGE / library.name)
    for order in ("before", "after"):
        done = run(ROOT / "tests" / "hub_program.py", folder, order, "simple", device)
        assert done.returncode == 0, done.stderr


TWO = """
import sys
from pathlib import Path
import torch
from hub_program import check_names, check_values, load_simply
kernels = [load_simply(Path(folder), sys.argv[1]) for folder in sys.argv[2:]]
assert len({kernel.__name__ for kernel in kernels}) == 2
for kernel in (*kernels, *kernels):
    check_names(kernel, sys.argv[1])
    check_values(kernel, sys.argv[1])
"""


def test_two_versions_of_a_kernel_do_not_clash(device, hub, tmp_path):
    package = tmp_path / "package"
    shutil.copytree(PACKAGE, package)
    with open(package / "_version.py", "a") as file:
        file.write("# another\n")
    assert build_hub(package, "--output", tmp_path / "hub").returncode == 0
    done = run("-c", TWO, device, hub, tmp_path / "hub")
    assert done.returncode == 0, done.stderr


def test_the_package_may_lie_within_another(device, tmp_path):
    """Its operators then have the outer name in theirs, dots being none of torch's."""
    shutil.copytree(PACKAGE, tmp_path / "outer" / "causal_conv1d")
    program = f"""
import sys, torch
sys.path.insert(0, {str(tmp_path)!r})
import outer.causal_conv1d as inner
assert "causal_conv1d" not in sys.modules
x = torch.randn(2, 6, 9, device={device!r})
assert inner.causal_conv1d_fn(x, x[0, :, :4]).shape == x.shape
assert torch.ops.outer_causal_conv1d.forward.default
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stderr


def test_a_program_of_the_installed_package_keeps_its_operators(device, hub, tmp_path):
    """torch.export writes their names down; a kernel loaded first does not change them."""
    file = tmp_path / "program.pt2"
    save = f"""
import torch, causal_conv1d
class Model(torch.nn.Module):
    def forward(self, x, w):
        return causal_conv1d.causal_conv1d_fn(x, w)
args = torch.ones(2, 6, 9, device={device!r}), torch.ones(6, 4, device={device!r})
torch.export.save(torch.export.export(Model(), args), {str(file)!r})
"""
    use = f"""
import torch
from pathlib import Path
from hub_program import load_simply
kernel = load_simply(Path({str(hub)!r}), {device!r})
import causal_conv1d
program = torch.export.load({str(file)!r})
assert "torch.ops.causal_conv1d.forward" in program.graph_module.code
x, w = torch.randn(2, 6, 9, device={device!r}), torch.randn(6, 4, device={device!r})
assert torch.equal(program.module()(x, w), kernel.causal_conv1d_fn(x, w))
"""
    for program in (save, use):
        done = run("-c", program)
        assert done.returncode == 0, done.stderr


def test_the_installed_package_has_the_namespace_of_old():
    assert "loaded" in vars(torch.ops.causal_conv1d)
    assert causal_conv1d._ops.add_op_namespace_prefix("forward") == "causal_conv1d::forward"
