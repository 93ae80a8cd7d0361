"""What scripts/dev/build_wheel.py says where it cannot build."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("scripts_path")


def nvcc_that_says(text):
    return f"#!/bin/sh\necho '{text}'\n"


NVCC = {
    "no such file": ("/nope/nvcc", None, "CUDACXX is /nope/nvcc, and there is no such program"),
    "not on PATH": ("nope-nvcc", None, "CUDACXX is nope-nvcc, and there is no such program"),
    "silent": ("nvcc", nvcc_that_says(""), "nvcc --version tells of no release of CUDA"),
    "no program": ("nvcc", "text", "nvcc --version tells of no release of CUDA"),
    "CUDA 11": ("nvcc", nvcc_that_says("release 11.4"), "CUDA 11: CUDA 12 or 13 is needed"),
}


@pytest.fixture
def build_wheel_says(tmp_path, monkeypatch, capsys):
    """A function that returns the sentence that build_wheel.py ends with."""
    import build_wheel

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: types.SimpleNamespace(origin="x"))
    monkeypatch.setattr(build_wheel.check_wheel, "output_of", lambda *_: "")
    monkeypatch.setattr(build_wheel.platform, "machine", lambda: "x86_64")

    def run(out=tmp_path / "out", machine="x86_64"):
        command = ["build_wheel.py", "--machine", machine, "--out", str(out)]
        monkeypatch.setattr(sys, "argv", command)
        assert build_wheel.main() == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    return run


@pytest.mark.parametrize("nvcc, script, text", NVCC.values(), ids=NVCC)
def test_build_wheel_without_an_nvcc_of_use(
    build_wheel_says, tmp_path, monkeypatch, nvcc, script, text
):
    if script is not None:
        nvcc = tmp_path / nvcc
        nvcc.write_text(script)
        nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    assert text in build_wheel_says()


def test_build_wheel_into_what_is_no_folder(build_wheel_says, tmp_path):
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file is a file: give --out a folder" in build_wheel_says(tmp_path / "file")
    assert "--out /proc/out cannot be made: " in build_wheel_says("/proc/out")


@pytest.mark.parametrize(
    "line, text",
    (
        ("CMake failed as told above; if it is about CUDA, CAUSAL_CONV1D_CUDA=0 builds without.",)
        + ("CMake failed.",),
        ("The compiler failed as told above; if it was killed for memory, set MAX_JOBS=1.",)
        + ("The compiler failed; if it was killed for memory, set MAX_JOBS=1.",),
        ("something else", "the build failed."),
    ),
)
def test_build_wheel_names_the_log_of_what_failed(
    build_wheel_says, tmp_path, monkeypatch, line, text
):
    """`build` is stood in for, which runs setup.py; these are sentences of that."""
    import build_wheel

    if "failed" in line:
        assert line in (ROOT / "setup.py").read_text()
        line = f"error: {line}"

    def run(command, stdout, **_):
        stdout.write(f"nvcc fatal\n{line}\n")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(build_wheel, "find_nvcc", lambda: ("nvcc", 13))
    monkeypatch.setattr(build_wheel.subprocess, "run", run)
    log = tmp_path / "out/build-cu13-x86_64.log"
    assert build_wheel_says() == f"error: {text} The output is in {log}.\n"
