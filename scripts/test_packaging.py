"""Installing from source, each way that pip has, always offline: pytest scripts/test_packaging.py

Everything is built from the unpacked source distribution. It needs Linux, a C++ compiler, CMake and
the right to make namespaces (root has it); the Python that runs it must have torch.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ("CAUSAL_CONV1D_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CUDACXX", "CUDA_HOME")
CLEAN = {k: v for k, v in os.environ.items() if k not in (*OPTIONS, "CMAKE_ARGS", "PYTHONPATH")}
# Where CMake and build_backend.py would find nvcc.
FOLDERS = (*CLEAN["PATH"].split(os.pathsep), "/usr/local/bin", "/usr/local/cuda/bin")
NVCC = sorted({str(Path(f, "nvcc")) for f in FOLDERS if Path(f, "nvcc").exists()})


def offline(*command, nvcc=False, cwd=None, **settings):
    """Runs command without a network and, unless nvcc, without nvcc; fails with its output."""
    result = attempt(*command, nvcc=nvcc, cwd=cwd, **settings)
    assert result.returncode == 0, result.stdout
    return result.stdout


def attempt(*command, nvcc=False, cwd=None, **settings):
    environment = CLEAN | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | settings
    hide = [] if nvcc else [f"/bin/mount --bind /dev/null '{path}'" for path in NVCC]
    script = "; ".join(["set -e", *hide, 'exec "$@"'])
    namespaces = "-nm" if os.geteuid() == 0 else "-rnm"
    return subprocess.run(
        ["/usr/bin/unshare", namespaces, "/bin/sh", "-c", script, "sh", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # where pip shows what the build says
        text=True,
        env=environment,
        cwd=cwd,
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    code = f"import build_backend; print(build_backend.build_sdist({str(folder)!r}))"
    name = offline(sys.executable, "-c", code, cwd=ROOT).strip()
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder)
    return folder / name.removesuffix(".tar.gz")


@pytest.fixture
def environment(tmp_path):
    """A function that makes a virtual environment, with torch or without; returns its Python."""

    def make(torch):
        folder = tmp_path / "environment"
        command = [sys.executable, "-m", "venv", "--without-pip", folder]
        subprocess.run(command, check=True)
        if torch:  # this Python's packages, as if installed there
            site = next(folder.glob("lib/python*/site-packages"))
            packages = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
            (site / "torch.pth").write_text("\n".join(packages) + "\n")
        return folder / "bin" / "python"

    return make


def pip(python, *arguments, **settings):
    return offline(sys.executable, "-m", "pip", "--python", python, *arguments, **settings)


def libraries(python):
    site = next(Path(python).parent.parent.glob("lib/python*/site-packages"))
    return sorted(path.name for path in site.glob("causal_conv1d/*.so"))


def test_source_distribution_is_complete(tree):
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    tracked = {name for name in listing.stdout.splitlines() if (ROOT / name).exists()}
    packed = {str(p.relative_to(tree)) for p in tree.rglob("*") if p.is_file()}
    assert tracked - packed == set()


def test_isolated_without_torch_and_without_nvcc(tree, environment):
    python = environment(torch=False)
    output = pip(python, "install", "-v", tree)
    assert "no nvcc found, so the CPU library alone is built" in output
    assert libraries(python) == ["libcausal_conv1d_cpu.so"]
    installed = pip(python, "list", "--format=freeze").split()
    assert [line.split("=")[0] for line in installed] == ["causal-conv1d"]
    assert "missing" not in pip(python, "check")
    result = attempt(python, "-c", "import causal_conv1d", cwd="/")
    assert "No module named 'torch'" in result.stdout
    pip(python, "uninstall", "-y", "causal_conv1d")
    assert not list(Path(python).parent.parent.glob("lib/python*/site-packages/causal*"))


def test_not_isolated_with_torch(tree, environment):
    python = environment(torch=True)
    before = set(pip(python, "list", "--format=freeze").split())
    options = ("--no-build-isolation", "--ignore-installed")
    pip(python, "install", *options, tree, CAUSAL_CONV1D_CUDA="no")
    assert libraries(python) == ["libcausal_conv1d_cpu.so"]
    # Nothing but this package has changed, torch least of all.
    after = set(pip(python, "list", "--format=freeze").split())
    assert {line.split("=")[0] for line in before ^ after} <= {"causal-conv1d"}
    assert "all checks hold" in offline(python, "-m", "causal_conv1d", "--no-speed", cwd="/")


def test_editable(tree, environment):
    python = environment(torch=True)
    options = ("--no-build-isolation", "--ignore-installed", "-e")
    pip(python, "install", *options, tree, CAUSAL_CONV1D_CUDA="false")
    where = offline(python, "-c", "import causal_conv1d as c; print(c.__file__)", cwd="/")
    assert Path(where.strip()) == tree / "causal_conv1d" / "__init__.py"
    assert "all checks hold" in offline(python, "-m", "causal_conv1d", "--no-speed", cwd=tree)


@pytest.mark.parametrize(
    "value, option",
    [(v, "ON") for v in ("1", "true", "yes", "on", "TRUE", "Yes")]
    + [(v, "OFF") for v in ("0", "false", "no", "off", "No")]
    + [(v, "AUTO") for v in ("", "auto")],
)
def test_words_for_options(value, option, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import build_backend

    monkeypatch.setenv("CAUSAL_CONV1D_CUDA", value)
    assert build_backend.cuda_option() == option


FAILURES = {
    "no nvcc": (
        {"CAUSAL_CONV1D_CUDA": "yes"},
        "there is no nvcc: put it on PATH or set CUDACXX.",
    ),
    "a word unknown": ({"CAUSAL_CONV1D_CUDA": "maybe"}, "set it to 1, 0 or auto."),
    "old CMake": ({"PATH": "{folder}"}, "apt-get install cmake, or pip install cmake."),
    "no compiler": (
        {"CXX": "/nonexistent/c++"},
        "apt-get install g++, or set CXX to one that works.",
    ),
    "no number": ({"MAX_JOBS": "many"}, "set it to 1 or more."),
    "nvcc that fails": ({"CUDACXX": "/bin/false"}, "CAUSAL_CONV1D_CUDA=0 builds without."),
    "no such GPU": (
        {"TORCH_CUDA_ARCH_LIST": "new", "CUDACXX": "/bin/false"},
        "give for example TORCH_CUDA_ARCH_LIST='8.7 9.0+PTX' or 'native'.",
    ),
    "small PTX for other GPUs": (
        {
            "CMAKE_ARGS": "-DCAUSAL_CONV1D_SMALL_PTX=ON",
            "TORCH_CUDA_ARCH_LIST": "9.0",
            "CUDACXX": "/bin/false",
        },
        "set TORCH_CUDA_ARCH_LIST=8.7.",
    ),
}


@pytest.mark.parametrize("settings, advice", FAILURES.values(), ids=FAILURES.keys())
def test_failures_end_with_what_to_do(settings, advice, tree, tmp_path):
    cmake = tmp_path / "cmake"
    cmake.write_text("#!/bin/sh\necho cmake version 3.21.7\n")
    cmake.chmod(0o755)
    settings = {name: value.format(folder=tmp_path) for name, value in settings.items()}
    code = f"import build_backend; build_backend.build_wheel({str(tmp_path)!r})"
    result = attempt(sys.executable, "-c", code, cwd=tree, **settings)
    assert result.returncode != 0
    last = result.stdout.splitlines()[-1]
    assert last.startswith("error: causal_conv1d was not built. ") and last.endswith(advice)


@pytest.mark.skipif(not NVCC, reason="needs nvcc")
def test_with_nvcc(tree, tmp_path):
    """CPU code, sm_87 and PTX on two cores: in 60 s where they do nothing else, and 1.5 GB."""
    report = tmp_path / "time"
    command = [shutil.which("time"), "-v", "-o", report, "taskset", "-c", "0,1", sys.executable]
    command += ["-m", "pip", "wheel", "--no-deps", "-w", tmp_path, tree]
    offline(*command, nvcc=True, CAUSAL_CONV1D_CUDA="true", MAX_JOBS="2")
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "check_wheel.py", "--cuda", wheel], check=True
    )
    lines = dict(line.strip().rsplit(": ", 1) for line in report.read_text().splitlines())
    processor = float(lines["User time (seconds)"]) + float(lines["System time (seconds)"])
    memory = int(lines["Maximum resident set size (kbytes)"]) / 2**10
    elapsed = lines["Elapsed (wall clock) time (h:mm:ss or m:ss)"]
    print(f"{elapsed}, {processor:.0f} s of the cores' time; the largest process: {memory:.0f} MiB")
    assert processor < 2 * 60
    assert 2 * memory < 1500  # two at a time
