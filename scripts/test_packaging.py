"""Building and installing from source, each way that there is: pytest scripts/test_packaging.py

Everything is built from the unpacked source distribution, without a network but in test_isolated.
It needs Linux, a C++ compiler, CMake, Ninja, setuptools >= 77, build, uv and the right to make
namespaces (root has it); the Python that runs it must have torch.
"""

import ast
import contextlib
import hashlib
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = """CAUSAL_CONV1D_CUDA CAUSAL_CONV1D_SKIP_CUDA_BUILD CAUSAL_CONV1D_LABEL
TORCH_CUDA_ARCH_LIST MAX_JOBS CUDACXX CUDA_HOME CMAKE_ARGS PYTHONPATH SOURCE_DATE_EPOCH""".split()
CLEAN = {name: value for name, value in os.environ.items() if name not in OPTIONS}
QUICK = {"CXX": str(ROOT / "scripts" / "dev" / "quick_cxx.sh")}
# Where CMake and setup.py would find nvcc.
FOLDERS = (*CLEAN["PATH"].split(os.pathsep), "/usr/local/bin", "/usr/local/cuda/bin")
NVCC = sorted({str(Path(f, "nvcc")) for f in FOLDERS if Path(f, "nvcc").exists()})
CPU_LIBRARY = ["libcausal_conv1d_cpu.so"]
PIP = (sys.executable, "-m", "pip")
# CMake may be the system's, where it would look for the package.
BUILD = (sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check")
WHEEL = (*PIP, "wheel", "-v", "--no-deps", "--no-build-isolation", "-w")
# Shell commands that make another machine of this one, in a namespace of its own.
JETSON = """
mount -t tmpfs none {folder} && cp -a /etc/. {folder} && touch {folder}/nv_tegra_release
mount --bind {folder} /etc"""
GPU = """
mount -t tmpfs none {folder} && touch {folder}/nvidiactl && ln -s /proc/self/fd {folder}/fd
for name in null zero random urandom; do
  touch {folder}/$name && mount --bind /dev/$name {folder}/$name
done
mount --rbind {folder} /dev"""
READ_ONLY = "mount --bind '{tree}' '{tree}' && mount -o remount,bind,ro '{tree}'"


def command_line(command, nvcc, network, machine):
    hide = [] if nvcc else [f"/bin/mount --bind /dev/null '{path}'" for path in NVCC]
    script = "\n".join(["set -e", *hide, machine, 'exec "$@"'])
    namespaces = "-m" if network else "-nm"
    if os.geteuid() != 0:
        namespaces += "r"
    return ["/usr/bin/unshare", namespaces, "/bin/sh", "-c", script, "sh", *map(str, command)]


def attempt(*command, nvcc=False, network=False, machine="", cwd=None, **settings):
    """Runs command, without nvcc and without a network if not asked for.

    Without nvcc what is compiled is not optimised, which takes a fraction of the time.
    """
    settings = ({} if nvcc else QUICK) | settings
    environment = CLEAN | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | settings
    return subprocess.run(
        command_line(command, nvcc, network, machine),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # where pip shows what the build says
        text=True,
        env=environment,
        cwd=cwd,
    )


def offline(*command, **options):
    """The output of a command that must succeed."""
    result = attempt(*command, **options)
    assert result.returncode == 0, result.stdout
    return result.stdout


def compiled(output):
    """How many sources were compiled, by what the build printed."""
    return len(re.findall(r"Building (?:CXX|CUDA) object", output))


def contents(folder):
    """Of the wheel there: each file's checksum, mode and time. And the checksum of the whole."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {f.filename: (f.CRC, f.external_attr, f.date_time) for f in archive.infolist()}
    return files | {"all": hashlib.sha256(wheel.read_bytes()).hexdigest()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    offline(*BUILD, "--sdist", "-o", folder, ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture
def environment(tmp_path):
    """A function that makes a virtual environment, with torch or without; returns its Python."""

    def make(torch):
        folder = tmp_path / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        site = next(folder.glob("lib/python*/site-packages"))
        if torch:  # this Python's packages, as if installed there
            packages = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
            (site / "torch.pth").write_text("\n".join(packages) + "\n")
        else:
            for file in distribution("setuptools").files:
                if not file.parts[0].startswith("."):
                    (site / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file.locate(), site / file)
        return folder / "bin" / "python"

    return make


def pip(python, *arguments, **options):
    return offline(*PIP, "--python", python, *arguments, **options)


def site_of(python):
    return next(Path(python).parent.parent.glob("lib/python*/site-packages"))


def libraries(folder):
    return sorted(path.name for path in folder.glob("causal_conv1d/*.so"))


def doctor(python, cwd="/"):
    assert "all checks hold" in offline(python, "-m", "causal_conv1d", "--no-speed", cwd=cwd)


# ------------------------------------------------------------------------------ each way to install


def test_source_distribution_is_complete(tree):
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    tracked = {name for name in listing.stdout.splitlines() if (ROOT / name).exists()}
    packed = {str(p.relative_to(tree)) for p in tree.rglob("*") if p.is_file()}
    assert tracked - packed == set()
    extra = {name for name in packed - tracked if ".egg-info/" not in name}
    assert extra <= {"PKG-INFO", "setup.cfg", "causal_conv1d/_commit.py"}


def test_isolated(tree, environment):
    """As a user types it: pip fetches setuptools, CMake and Ninja."""
    python = environment(torch=False)
    output = pip(python, "install", "-v", tree, network=True)
    assert "no nvcc found, so the CPU library alone is built" in output
    assert libraries(site_of(python)) == CPU_LIBRARY
    installed = pip(python, "list", "--format=freeze").split()
    assert sorted(line.split("=")[0] for line in installed) == ["causal-conv1d", "setuptools"]
    assert "missing" not in pip(python, "check")
    result = attempt(python, "-c", "import causal_conv1d", cwd="/")
    assert result.returncode != 0 and "needs PyTorch >= 2.5" in result.stdout.splitlines()[-1]
    pip(python, "uninstall", "-y", "causal_conv1d")
    assert not list(site_of(python).glob("causal*"))


@pytest.mark.parametrize("torch", [True, False], ids=["with torch", "without torch"])
def test_not_isolated(tree, environment, torch):
    python = environment(torch)
    before = set(pip(python, "list", "--format=freeze").split())
    options = ("--no-build-isolation", "--ignore-installed")
    pip(python, "install", *options, tree)
    assert libraries(site_of(python)) == CPU_LIBRARY
    # Nothing but this package has changed, torch least of all.
    after = set(pip(python, "list", "--format=freeze").split())
    assert {line.split("=")[0] for line in before ^ after} <= {"causal-conv1d"}
    if torch:
        doctor(python)


def test_editable(tree, environment):
    python = environment(torch=True)
    install = ("install", "-v", "--no-build-isolation", "--ignore-installed", "-e", tree)
    pip(python, *install)
    where = offline(python, "-c", "import causal_conv1d as c; print(c.__file__)", cwd="/")
    assert Path(where.strip()) == tree / "causal_conv1d" / "__init__.py"
    doctor(python)
    found = "import importlib.util as u; print([n for n in {} if u.find_spec(n)])"
    names = ["causal_conv1d", "causal_conv1d_cuda", "selective_scan_cuda"]
    absent = ["benchmarks", "scripts", "tests"]
    assert offline(python, "-c", found.format(names + absent), cwd="/").strip() == str(names)

    assert compiled(pip(python, *install)) == 0
    os.utime(tree / "csrc" / "cpu" / "api.cpp")
    assert compiled(pip(python, *install)) == 1
    doctor(python)
    for library in tree.glob("causal_conv1d/*.so"):
        library.unlink()  # for the tests after this


@pytest.mark.skipif(not NVCC, reason="needs nvcc")
def test_one_changed_cuda_source_is_compiled_alone(tmp_path):
    """In the checkout, where .ci/run has built everything by these settings."""
    options = {"nvcc": True, "CAUSAL_CONV1D_CUDA": "1"}
    offline(*WHEEL, tmp_path, ROOT, **options)
    assert compiled(offline(*WHEEL, tmp_path, ROOT, **options)) == 0
    os.utime(ROOT / "csrc" / "cuda" / "varlen_states.cu")
    assert compiled(offline(*WHEEL, tmp_path, ROOT, **options)) == 1


def test_build(tree, tmp_path):
    """python -m build makes the wheel from a source distribution of its own."""
    offline(*BUILD, "-o", tmp_path, tree)
    (wheel,) = tmp_path.glob("*-py3-none-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert [n for n in names if n.endswith(".so")] == ["causal_conv1d/libcausal_conv1d_cpu.so"]
        assert {n.split("/")[0].split("-")[0] for n in names} == {
            "causal_conv1d",
            "causal_conv1d_cuda",
            *(
                f"selective_scan_cuda{end}.py"
                for end in ("", "_core", "_ndstate", "_nrow", "_oflex")
            ),
        }
        assert {"causal_conv1d/py.typed", "causal_conv1d/selective_scan/plain.py"} < set(names)
        (metadata,) = (n for n in names if n.endswith("/METADATA"))
        text = archive.read(metadata).decode()
        assert "License-Expression: MIT" in text and "Requires-Python: >=3.10" in text
        required = re.findall("^Requires-Dist: (.+)", text, re.MULTILINE)
        assert required and all("extra ==" in line for line in required)
        (licence,) = (n for n in names if n.endswith("/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_uv(tree, tmp_path, environment):
    python = environment(torch=True)
    uv = (sys.executable, "-m", "uv", "--offline", "--no-cache")
    offline(*uv, "pip", "install", "--no-build-isolation", "--python", python, tree)
    assert libraries(site_of(python)) == CPU_LIBRARY
    doctor(python)
    built = (*uv, "build", "--no-build-isolation", "--python", python, "-o", tmp_path / "dist")
    offline(*built, "--sdist", tree)
    offline(*built, "--wheel", tree)
    assert len(list(tmp_path.glob("dist/causal_conv1d-*"))) == 2


def test_uv_builds_again_what_has_changed(tree, tmp_path, environment):
    """In a project that has the sources as one of its [tool.uv.sources]."""
    python = environment(torch=True)
    sources = tmp_path / "sources"
    shutil.copytree(tree, sources, ignore=shutil.ignore_patterns("build"), symlinks=True)
    (sources / "build").symlink_to(tree / "build")  # nothing is compiled again
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "pyproject.toml").write_text(f"""
[project]
name = "project"
version = "1"
requires-python = ">=3.10"
dependencies = ["causal-conv1d"]
[tool.uv.sources]
causal-conv1d = {{ path = "{sources}" }}
""")
    sync = (sys.executable, "-m", "uv", "--offline", "sync", "--no-build-isolation", "--inexact")
    settings = {
        "UV_PROJECT_ENVIRONMENT": str(python.parent.parent),
        "UV_CACHE_DIR": str(tmp_path / "cache"),
    }
    offline(*sync, cwd=tmp_path / "project", **settings)
    module = site_of(python) / "causal_conv1d" / "reference.py"
    assert "changed" not in module.read_text().splitlines()[-1]
    with (sources / "causal_conv1d" / "reference.py").open("a") as file:
        file.write("# changed\n")
    offline(*sync, cwd=tmp_path / "project", **settings)
    assert module.read_text().endswith("# changed\n")


@pytest.fixture
def folder_for_all():
    """A folder that another user can reach, as it is with pytest's own for root alone."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_wheels_are_reproducible(tree, tmp_path, folder_for_all):
    """Whoever builds, where the sources may not be written, of files with whatever modes."""
    elsewhere = folder_for_all / "a folder with spaces"
    shutil.copytree(tree, elsewhere, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    for path in elsewhere.rglob("*"):
        path.chmod(0o700)
    temporary = folder_for_all / "temporary files"
    temporary.mkdir()
    offline(*WHEEL, tmp_path, tree)
    as_nobody = []
    if os.geteuid() == 0:  # who may read, for a Python that lies in /root
        as_nobody = ["setpriv", "--reuid=nobody", "--clear-groups"]
        as_nobody += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        subprocess.run(["chown", "-R", "nobody", folder_for_all], check=True)
    shell = ["sh", "-c", 'umask 077; exec "$@"', "sh"]
    built = folder_for_all / "built"
    before = sorted(elsewhere.rglob("*"))
    read_only = READ_ONLY.format(tree=elsewhere)
    command = (*as_nobody, *shell, *WHEEL, built, elsewhere)
    offline(*command, machine=read_only, HOME=str(folder_for_all), TMPDIR=str(temporary))
    assert sorted(elsewhere.rglob("*")) == before
    assert contents(built) == contents(tmp_path)


def kill_session(leader):
    """Kills the process and all that it started: ninja puts compilers into groups of their own."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(name)) == leader:
                os.kill(int(name), signal.SIGKILL)


def test_interrupted_and_parallel_builds(tree, tmp_path):
    settings = QUICK | {"CXXFLAGS": "-DANOTHER_BUILD_FOLDER"}
    command = command_line((*WHEEL, tmp_path / "killed", tree), False, False, "")
    with (tmp_path / "log").open("w") as log:
        build = subprocess.Popen(
            command, stdout=log, stderr=log, env=CLEAN | settings, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while not compiled((tmp_path / "log").read_text()) and time.monotonic() < deadline:
            time.sleep(0.2)
        kill_session(build.pid)
        assert build.wait() == -signal.SIGKILL
    builds = [
        subprocess.Popen(
            command_line((*WHEEL, tmp_path / name, tree), False, False, ""),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=CLEAN | settings,
        )
        for name in ("first", "second")
    ]
    outputs = [build.communicate()[0] for build in builds]
    assert [build.returncode for build in builds] == [0, 0], outputs
    assert min(map(compiled, outputs)) == 0 < max(map(compiled, outputs))
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


# ------------------------------------------------------------------------------------- versions

VERSION = re.search(r'"(.+)"', (ROOT / "causal_conv1d" / "_version.py").read_text())[1]
NEWER = re.sub(r"\d+$", lambda number: str(int(number[0]) + 1), VERSION)


def empty_wheel(folder, version):
    """What an index has of a version, as far as pip looks at it."""
    info = f"causal_conv1d-{version}.dist-info"
    wheel = folder / f"causal_conv1d-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        head = "Metadata-Version: 2.1\nName: causal-conv1d\n"
        archive.writestr(f"{info}/METADATA", f"{head}Version: {version}\n")
        tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", tag)
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def installed_version(python):
    (info,) = site_of(python).glob("causal_conv1d-*.dist-info")
    return info.name.removeprefix("causal_conv1d-").removesuffix(".dist-info")


KEPT, REPLACED = VERSION, "1.7.0"


@pytest.mark.parametrize(
    "tool, arguments, index, result, constrained_result",
    [
        ("pip", "causal-conv1d>=1.4.0", "1.6.0 1.7.0 1.7.1", KEPT, None),
        ("pip", "causal-conv1d==1.7.0", "1.6.0 1.7.0", KEPT, None),
        ("pip", "-U causal-conv1d", "1.6.0 1.7.0", KEPT, None),
        ("pip", "-U causal-conv1d", "1.7.0 1.7.0.post1", "1.7.0.post1", KEPT),
        ("pip", "-U causal-conv1d", f"1.7.0 {NEWER}", NEWER, None),
        ("pip", "--force-reinstall causal-conv1d", "1.6.0 1.7.0", REPLACED, KEPT),
        ("pip", "causal-conv1d==1.6.0", "1.6.0 1.7.0", "1.6.0", None),
        ("uv", "-U causal-conv1d", "1.6.0 1.7.0", KEPT, None),
        ("uv", "--reinstall causal-conv1d", "1.6.0 1.7.0", REPLACED, KEPT),
    ],
)
def test_what_replaces_it(
    tool, arguments, index, result, constrained_result, tmp_path, environment
):
    """As docs/BUILD_GUIDE.md tells it, of an index that holds these releases."""
    python = environment(torch=False)
    own = empty_wheel(tmp_path, VERSION)
    (tmp_path / "index").mkdir()
    for version in index.split():
        empty_wheel(tmp_path / "index", version)
    pip(python, "install", "--no-index", own)
    (tmp_path / "constraints.txt").write_text(f"causal-conv1d @ {own.as_uri()}\n")
    source = ("--no-index", "--find-links", tmp_path / "index")
    install = {
        "pip": (*PIP, "--python", python, "install"),
        "uv": (sys.executable, "-m", "uv", "--no-cache", "pip", "install", "--python", python),
    }[tool]
    constraint = {f"{tool.upper()}_CONSTRAINT": str(tmp_path / "constraints.txt")}
    if constrained_result is not None:
        offline(*install, *source, *arguments.split(), **constraint)
        assert installed_version(python) == constrained_result
    offline(*install, *source, *arguments.split())
    assert installed_version(python) == result


# ------------------------------------------------------------------------------ what the build says


@pytest.fixture
def setup(monkeypatch):
    """The functions of setup.py."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    "settings, option",
    [({"CAUSAL_CONV1D_CUDA": v}, "ON") for v in ("1", "true", "yes", "on", "TRUE", "Yes")]
    + [({"CAUSAL_CONV1D_CUDA": v}, "OFF") for v in ("0", "false", "no", "off", "No")]
    + [({"CAUSAL_CONV1D_CUDA": v}, "AUTO") for v in ("", "auto")]
    + [({"CAUSAL_CONV1D_SKIP_CUDA_BUILD": v}, "OFF") for v in ("TRUE", "1")]
    + [({"CAUSAL_CONV1D_SKIP_CUDA_BUILD": "FALSE"}, "AUTO")]
    + [({"CAUSAL_CONV1D_FORCE_BUILD": "TRUE"}, "AUTO")]
    + [({"CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_CUDA": "1"}, "ON")],
)
def test_words_for_options(settings, option, setup, monkeypatch):
    for name in OPTIONS:
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert setup["cuda_option"]() == option


def test_an_older_python_gets_a_sentence(monkeypatch):
    ast.parse((ROOT / "setup.py").read_text(), feature_version=(3, 7))
    monkeypatch.setattr(sys, "version_info", (3, 8, 10, "final", 0))
    with pytest.raises(SystemExit, match="needs Python >= 3.10, and this is 3.8"):
        runpy.run_path(str(ROOT / "setup.py"))


def test_an_older_setuptools_gets_a_sentence(monkeypatch):
    monkeypatch.setattr(setuptools, "__version__", "59.6.0")
    with pytest.raises(SystemExit, match="setuptools >= 77, and this is 59.6.0: pip install -U"):
        runpy.run_path(str(ROOT / "setup.py"))


def test_commit_and_label(tmp_path):
    """In the wheel, of the repository that the sources are in and of no other."""
    sources = tmp_path / "sources"
    ignored = shutil.ignore_patterns("build", ".git", "*.so", ".venv", "dist")
    shutil.copytree(ROOT, sources, ignore=ignored)
    git = ("git", "-C", sources, "-c", "user.name=n", "-c", "user.email=e")
    build = (sys.executable, "setup.py", "-q", "build_py", "-d", tmp_path / "built")
    commit = tmp_path / "built" / "causal_conv1d" / "_commit.py"
    subprocess.run([*git, "init", "-q"], check=True)
    offline(*build, cwd=sources)
    assert not commit.exists()
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    offline(*build, cwd=sources, CAUSAL_CONV1D_LABEL="cu13")
    assert commit.read_text() == f'commit = "{head}"\n'
    assert commit.with_name("_version.py").read_text().strip().endswith('.cu13"')
    (sources / "README.md").write_text("changed")
    offline(*build, cwd=sources)
    assert commit.read_text() == f'commit = "{head}-dirty"\n'


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
    "nvcc that is not there": ({"CUDACXX": "/nowhere/nvcc"}, "no program: set it to nvcc's path."),
    "a compiler that is none": (
        {"CXX": "/bin/true"},
        "apt-get install g++, or set CXX to one that works.",
    ),
    "half a quotation": ({"CMAKE_ARGS": "-DX='a"}, "is no command line: No closing quotation."),
    "no label": (
        {"CAUSAL_CONV1D_LABEL": "Cu 13"},
        "set it to small letters, digits and dots, as in cu13.",
    ),
    "nvcc that fails": ({"CUDACXX": "/bin/false"}, "CAUSAL_CONV1D_CUDA=0 builds without."),
    "no such GPU": (
        {"TORCH_CUDA_ARCH_LIST": "new", "CUDACXX": "/bin/false"},
        "give for example TORCH_CUDA_ARCH_LIST='8.7 9.0+PTX' or 'native'.",
    ),
    "a GPU that is too old": (
        {"TORCH_CUDA_ARCH_LIST": "7.0 7.5", "CUDACXX": "/bin/false"},
        "The CUDA kernels need compute capability 7.5 or newer, not sm_70: leave it out of "
        "TORCH_CUDA_ARCH_LIST, or set that where the machine's own GPU is so old; "
        "CAUSAL_CONV1D_CUDA=0 builds for the CPU alone.",
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
    command = (sys.executable, "setup.py", "-q", "bdist_wheel", "-d", tmp_path)
    result = attempt(*command, cwd=tree, **settings)
    assert result.returncode != 0
    last = result.stdout.splitlines()[-1]
    assert last.startswith("error: causal_conv1d was not built. ") and last.endswith(advice)


@pytest.mark.parametrize(
    "machine, sign", [(JETSON, "/etc/nv_tegra_release"), (GPU, "/dev/nvidiactl"), ("", "torch")]
)
def test_cuda_is_never_left_out_silently(machine, sign, tree, tmp_path, environment):
    """Devices, a Jetson, or a torch with CUDA, and no nvcc."""
    python = environment(torch=False)
    if sign == "torch":
        sign = "a torch for CUDA 13.0"
        (site_of(python) / "torch").mkdir()
        version = "__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\n"
        (site_of(python) / "torch" / "version.py").write_text(version)
    folder = tmp_path / "root"
    folder.mkdir()
    machine = machine.format(folder=folder)
    install = (*PIP, "--python", python, "install", "--no-build-isolation", tree)
    result = attempt(*install, machine=machine)
    assert result.returncode != 0
    words = " ".join(result.stdout.split())
    assert f"error: causal_conv1d was not built. This machine has {sign}, but there is no" in words
    assert "install the CUDA toolkit, or put nvcc on PATH, or set CUDACXX;" in words
    offline(*install, machine=machine, CAUSAL_CONV1D_CUDA="0")
    assert libraries(site_of(python)) == CPU_LIBRARY


@pytest.mark.skipif(not NVCC, reason="needs nvcc")
@pytest.mark.parametrize("name, value", [("CUDACXX", "cuda/bin/nvcc"), ("CUDA_HOME", "cuda")])
def test_relative_paths_to_nvcc(name, value, tree, tmp_path, setup, monkeypatch):
    toolkit = Path(NVCC[0]).resolve().parent.parent
    (tmp_path / "cuda").symlink_to(toolkit)
    configure = ("cmake", "-S", tree, "-B", tmp_path / "build", "-DCAUSAL_CONV1D_CUDA=ON")
    output = offline(*configure, cwd=tmp_path, nvcc=True, **{name: value, "PWD": str(tmp_path)})
    assert "causal_conv1d: CPU and CUDA, with code for" in output
    (file,) = tmp_path.glob("build/CMakeFiles/*/CMakeCUDACompiler.cmake")
    found = re.search(r'set\(CMAKE_CUDA_COMPILER "(.+)"\)', file.read_text())
    assert Path(found[1]) == tmp_path / "cuda" / "bin" / "nvcc"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, value)
    assert setup["build_environment"]()[name] == str(tmp_path / value)


@pytest.mark.skipif(not NVCC, reason="needs nvcc")
def test_code_for_the_gpus_that_are_listed(tree, tmp_path):
    configure = ("cmake", "-S", tree, "-B", tmp_path, "-DCAUSAL_CONV1D_CUDA=ON")
    output = offline(*configure, nvcc=True, TORCH_CUDA_ARCH_LIST="7.5 9.0+PTX")
    assert output.count("with code for sm_87 compute_80 sm_75 sm_90 compute_90\n") == 1


@pytest.mark.skipif(not NVCC, reason="needs nvcc")
def test_with_nvcc(tree, tmp_path):
    """CPU code, sm_87 and PTX on two cores: in 110 s where they do nothing else, and 1.5 GB."""
    report = tmp_path / "time"
    command = [shutil.which("time"), "-v", "-o", report, "taskset", "-c", "0,1"]
    offline(*command, *WHEEL, tmp_path, tree, nvcc=True, CAUSAL_CONV1D_CUDA="true", MAX_JOBS="2")
    (wheel,) = tmp_path.glob("*.whl")
    check = [sys.executable, ROOT / "scripts" / "dev" / "check_wheel.py", "--cuda", wheel]
    subprocess.run(check, check=True)
    lines = dict(line.strip().rsplit(": ", 1) for line in report.read_text().splitlines())
    processor = float(lines["User time (seconds)"]) + float(lines["System time (seconds)"])
    memory = int(lines["Maximum resident set size (kbytes)"]) / 2**10
    elapsed = lines["Elapsed (wall clock) time (h:mm:ss or m:ss)"]
    print(f"{elapsed}, {processor:.0f} s of the cores' time; the largest process: {memory:.0f} MiB")
    assert processor < 2 * 110
    assert 2 * memory < 1500  # two at a time
