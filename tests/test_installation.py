"""Installations that cannot work say so in one sentence, from an import and from the doctor.

Each is a copy of the package in a folder of its own, and runs in a process of its own. A torch with
CUDA is one whose torch.version.cuda has been set: no GPU is needed to be refused.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from causal_conv1d import _elf, _installation, _library

LIBRARY = Path(_library.cpu.path)
OTHER = {"x86_64": "aarch64", "aarch64": "x86_64"}.get(platform.machine(), "x86_64")
NUMBER = {name: number for number, name in _elf.MACHINES.items()}[OTHER]


def of_another_machine(data):
    return data[:18] + NUMBER.to_bytes(2, "little") + data[20:]


DAMAGES = {
    "empty": (lambda data: b"", "is empty"),
    "foreign": (of_another_machine, f"is for {OTHER}, and this is {platform.machine()}"),
    "one byte less": (lambda data: data[:-1], "is truncated: "),
    "half": (lambda data: data[: len(data) // 2], "is truncated: "),
    "without segments": (lambda data: data[:80], "is truncated: 80 of "),
    "without a header": (lambda data: data[:30], "is truncated: 30 bytes are left"),
    "two bytes": (lambda data: data[:2], "is truncated: 2 bytes are left"),
    "text": (lambda data: b"version https://git-lfs.github.com/spec/v1", "is no compiled library"),
}


@pytest.fixture
def site(tmp_path):
    """A folder with a copy of the package, without a CUDA library."""
    ignored = shutil.ignore_patterns("__pycache__", "libcausal_conv1d_cuda.so")
    shutil.copytree(LIBRARY.parent, tmp_path / "causal_conv1d", ignore=ignored)
    return tmp_path


def damaged(site, name, change):
    path = site / "causal_conv1d" / f"libcausal_conv1d_{name}.so"
    path.write_bytes(change(LIBRARY.read_bytes()))
    return path


def run(site, *arguments, with_torch=True, **variables):
    """Python with the folder before all else that this process finds, or with it alone."""
    paths = [str(site), *(path for path in sys.path if path and with_torch)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"}
    env |= variables
    options = [] if with_torch else ["-S"]  # no site-packages
    return subprocess.run(
        [sys.executable, *options, *arguments], cwd=site, env=env, capture_output=True, text=True
    )


def doctor(site, **options):
    """The lines it prints; it must fail, and without a traceback."""
    done = run(site, "-m", "causal_conv1d", "--no-speed", **options)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"causal_conv1d {_installation.__version__}, commit "), lines
    assert str(site / "causal_conv1d") in lines[0]
    return lines


def import_error(site, **options):
    done = run(site, "-c", "import causal_conv1d", **options)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def assert_both_say(site, *words, **options):
    error, line = import_error(site, **options), doctor(site, **options)[-1]
    assert error == f"ImportError: {line.removeprefix('✗ ')}" != f"ImportError: {line}"
    for word in words:
        assert word in error


# ------------------------------------------------------------------------------------------- torch


def test_without_torch(site):
    words = "causal_conv1d needs PyTorch >= 2.5, and pip does not install it", "install it yourself"
    assert_both_say(site, *words, sys.executable, with_torch=False)
    (site / "torch").mkdir()  # which Python takes for a package
    assert_both_say(site, *words, with_torch=False)


@pytest.mark.parametrize("version", ("2.4.1+cu124", "main", ""))
def test_an_old_torch(site, version):
    (site / "torch").mkdir()
    (site / "torch/__init__.py").write_text(f"__version__ = '{version}'\n")
    assert_both_say(site, "PyTorch >= 2.5", "newer", f"'{version}'", str(site / "torch"))


@pytest.mark.parametrize("error", ("OSError", "RuntimeError", "SyntaxError"))
def test_a_torch_that_does_not_import(site, error):
    (site / "torch").mkdir()
    text = "libcusparseLt.so.0: cannot open shared object file"
    (site / "torch/__init__.py").write_text(f"raise {error}('{text}')\n")
    assert_both_say(site, f"importing torch failed: {text}")


@pytest.mark.parametrize("version", ("2.5.0a0+872d972e41.nv24.08", "2.15.0+cu132", "3.0"))
def test_newer_torches_are_taken(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    _installation.require_torch()


def test_other_programs_that_import_it_get_the_error(site):
    """mamba_ssm and others catch it: only the doctor's own start ends in a sentence."""
    (site / "other").mkdir()
    (site / "other/__init__.py").write_text(
        "try:\n    import causal_conv1d\nexcept ImportError:\n    causal_conv1d = None\n"
    )
    (site / "other/__main__.py").write_text("print('goes on')\n")
    done = run(site, "-m", "other", with_torch=False)
    assert (done.returncode, done.stdout) == (0, "goes on\n"), done.stderr


# --------------------------------------------------------------------------------------- libraries


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages_are_told_apart(tmp_path, damage):
    change, words = DAMAGES[damage]
    path = tmp_path / "library.so"
    path.write_bytes(LIBRARY.read_bytes())
    assert _elf.damage(path) is None
    path.write_bytes(change(LIBRARY.read_bytes()))
    assert _elf.damage(path).startswith(f"{path} {words}")


@pytest.mark.parametrize("damage", ("foreign", "half"))
def test_a_damaged_cpu_library(site, damage):
    change, words = DAMAGES[damage]
    path = damaged(site, "cpu", change)
    assert_both_say(
        site, f"causal_conv1d: {path} {words}", f"reinstall it ({_installation.REINSTALL})"
    )


def test_a_missing_cpu_library(site):
    path = site / "causal_conv1d/libcausal_conv1d_cpu.so"
    path.unlink()
    assert_both_say(site, f"there is no {path}", "source folder", _installation.REINSTALL)


WITH_CUDA = """
import sys, warnings, torch
torch.version.cuda = {cuda!r}
def texts():
    return [str(each.message) for each in caught if "causal_conv1d" in str(each.message)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import causal_conv1d
    print("warnings:", *texts())
    x = torch.ones(1, 2, 3)
    assert causal_conv1d.causal_conv1d_fn(x, torch.ones(2, 2)).shape == x.shape
    from other_device import Device, OtherTensor
    with Device():  # tensors that say that they are on a GPU
        for _ in range(2):
            try:
                causal_conv1d.causal_conv1d_fn(OtherTensor(x), OtherTensor(torch.ones(2, 2)))
            except RuntimeError as error:  # a torch without CUDA or a GPU comes so far
                known = "not linked with support for cuda", "no NVIDIA driver", "CUDA error"
                assert any(text in str(error) for text in known), error
    print("at a call:", *texts())
from causal_conv1d import __main__ as doctor
doctor.CHECKS.clear()  # about the CPU, whose kernels are as they are elsewhere
doctor.gpus = lambda: {gpus!r}
torch.cuda.get_device_properties = lambda _: type(
    "Orin", (), dict(name="Orin", major=8, minor=7, multi_processor_count=16, total_memory=0)
)
sys.argv[1:] = ["--no-speed"]
sys.exit(doctor.main())
"""


def with_cuda(site, cuda="12.6", gpus=()):
    """Warnings at import, then those of calls too, the doctor's line on CUDA, all lines, status."""
    done = run(site, "-c", WITH_CUDA.format(cuda=cuda, gpus=gpus), OTHER_DEVICE="cuda")
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    found = [
        next((line.partition(start)[2].strip() for line in lines if start in line), None)
        for start in ("warnings:", "at a call:", "CUDA kernels: not loaded:")
    ]
    return *found, lines, done.returncode


def warning_of(problem):
    """Of one call with a CUDA tensor or more."""
    return (
        "causal_conv1d: cuda tensors are computed by plain torch operations, which are slower than "
        f"kernels, as there are no CUDA kernels in this process: {problem}"
    )


def test_a_cuda_tensor_without_a_cuda_library(site):
    """A build without nvcc, which is as it should be where no GPU can be used."""
    at_import, warned, said, _, status = with_cuda(site)
    assert (at_import, warned, status) == ("", warning_of(said), 0)
    assert said.startswith("causal_conv1d was built without nvcc, so there is no ")
    assert "nvcc of CUDA 12 on PATH" in said
    assert "'CAUSAL_CONV1D_CUDA=1 pip install --no-deps --force-reinstall .'" in said

    _, again, _, lines, status = with_cuda(site, gpus=(0,))
    assert (again, status) == (warned, 1)
    assert any(line.startswith("✗ torch can use a GPU, but there are no CUDA") for line in lines)
    assert any(line.startswith("cuda:0: largest relative error") for line in lines)


@pytest.mark.parametrize("damage", ("empty", "foreign"))
def test_a_damaged_cuda_library(site, damage):
    change, words = DAMAGES[damage]
    path = damaged(site, "cuda", change)
    at_import, warned, said, lines, status = with_cuda(site)
    assert said.startswith(f"{path} {words}") and _installation.REINSTALL in said
    assert (at_import, warned) == ("", warning_of(said))
    assert f"✗ CUDA kernels: not loaded: {said}" in lines and status == 1


def test_a_cuda_library_of_something_else(site):
    path = damaged(site, "cuda", lambda data: data)  # the CPU library, which lacks its functions
    at_import, warned, said, *_ = with_cuda(site)
    assert said.startswith(f"{path} is of another version")
    assert (at_import, warned) == ("", warning_of(said))


def test_a_damaged_cuda_library_where_torch_has_no_use_for_it(site):
    """An import has nothing to say about it; the installation is not whole all the same."""
    path = damaged(site, "cuda", DAMAGES["half"][0])
    at_import, _, said, lines, status = with_cuda(site, cuda=None)
    assert at_import == "" and f"torch is built without CUDA, and {path} is truncated: " in said
    assert f"✗ CUDA kernels: not loaded: {said}" in lines and status == 1


# ------------------------------------------------------------------------------------------ commit


def commit_of(site):
    return doctor(site, with_torch=False)[0].split(", ")[1].removeprefix("commit ")


def git(folder, *words):
    options = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.check_output(["git", "-C", str(folder), *options, *words], text=True).strip()


def test_the_commit(site):
    (site / "causal_conv1d/_commit.py").unlink(missing_ok=True)
    assert commit_of(site) == "unknown"
    if shutil.which("git") is not None:
        git(site, "init", "-q")
        git(site, "commit", "-q", "--allow-empty", "-m", "someone else's")
        assert commit_of(site) == "unknown"  # git knows the folder, but not the package in it
        git(site, "add", ".")
        git(site, "commit", "-q", "-m", "the sources")
        assert commit_of(site) == git(site, "rev-parse", "--short", "HEAD")
    (site / "causal_conv1d/_commit.py").write_text('commit = "0123456789abcdef0123"\n')
    assert commit_of(site) == "0123456789ab"


def test_from_an_archive(tmp_path):
    """Python imports from one, but a library has to be a file."""
    folder = LIBRARY.parent
    archive = shutil.make_archive(tmp_path / "packed", "zip", folder.parent, folder.name)
    program = f"import sys; sys.path.insert(0, {archive!r}); import causal_conv1d"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    expected = f"it cannot run from the archive {archive}, as its libraries must be files"
    assert expected in done.stderr.splitlines()[-1]
