"""Builds wheels and source distributions for pip (PEP 517 and 660), by CMake and Python alone.

pip needs no setuptools and so no network, whatever the environment has.

Environment: ``CAUSAL_CONV1D_CUDA`` (1, true, yes, on: fail without nvcc; 0, false, no, off: CPU
only; default: CUDA where nvcc is found), ``TORCH_CUDA_ARCH_LIST``, ``CUDACXX`` or ``CUDA_HOME``,
``MAX_JOBS``, ``CMAKE_ARGS``.
"""

import base64
import gzip
import hashlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACKAGE = "causal_conv1d"  # which the compiled libraries lie in
NAME = "causal_conv1d"
# torch is needed but not named: a board's own build of it must never be replaced.
METADATA = """\
Metadata-Version: 2.1
Name: causal-conv1d
Version: {version}
Summary: Depthwise causal 1-D convolution of Mamba-style models on NVIDIA Jetson, other GPUs, CPUs
License: MIT
Requires-Python: >=3.10
Description-Content-Type: text/markdown

{readme}"""
# py3-none: the libraries use no Python API, so one file serves every Python.
WHEEL = """\
Wheel-Version: 1.0
Generator: causal_conv1d build_backend
Root-Is-Purelib: false
Tag: py3-none-{platform}
"""


class BuildError(Exception):
    """A condition that stops the build; its text says what to do."""


# ------------------------------------------------------------------------------- compiled libraries


def cuda_option() -> str:
    value = os.environ.get("CAUSAL_CONV1D_CUDA", "").strip().lower()
    if value in ("1", "true", "yes", "on"):
        return "ON"
    if value in ("0", "false", "no", "off"):
        return "OFF"
    if value in ("", "auto"):
        return "AUTO"
    raise BuildError(f"CAUSAL_CONV1D_CUDA={value} means nothing here: set it to 1, 0 or auto.")


def job_count() -> int:
    value = os.environ.get("MAX_JOBS", "")
    if not value:
        return os.cpu_count() or 1
    if not value.isdecimal() or int(value) == 0:
        raise BuildError(f"MAX_JOBS={value} is no number of jobs: set it to 1 or more.")
    return int(value)


def environment() -> dict:
    """The environment for CMake and Ninja, which may be packages of this Python."""
    env = dict(os.environ)
    # pip's isolation hides the installed packages, and with them cmake's own Python part.
    env.pop("PYTHONPATH", None)
    env["PATH"] = os.pathsep.join([env.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    return env


def run(command, env) -> str:
    """Runs command, shows its output as it comes and returns it."""
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output = []
    for line in process.stdout:
        print(line, end="", flush=True)
        output.append(line)
    if process.wait() != 0:
        raise subprocess.CalledProcessError(process.returncode, command, "".join(output))
    return "".join(output)


def configure(build: Path, env: dict) -> None:
    cmake = shutil.which("cmake", path=env["PATH"])
    version = re.search(r"(\d+)\.(\d+)", run([cmake, "--version"], env)) if cmake else None
    if version is None or tuple(map(int, version.groups())) < (3, 22):
        raise BuildError("CMake >= 3.22 is needed: apt-get install cmake, or pip install cmake.")
    cuda = cuda_option()
    command = [cmake, "-S", str(ROOT), "-B", str(build), f"-DCAUSAL_CONV1D_CUDA={cuda}"]
    if shutil.which("ninja", path=env["PATH"]):
        command += ["-G", "Ninja"]
    command += shlex.split(env.get("CMAKE_ARGS", ""))
    try:
        run(command, env)
    except subprocess.CalledProcessError as error:
        if "CMAKE_CXX_COMPILER" in error.output:
            raise BuildError(
                "A C++17 compiler is needed: apt-get install g++, or set CXX to one that works."
            ) from None
        # Our own errors say what to do; CMake shows one as a paragraph.
        said = re.findall(r"^CMake Error at CMakeLists.txt.*\n\n?((?:  .*\n)+)", error.output, re.M)
        if said:
            raise BuildError(" ".join(said[-1].split()) + ".") from None
        raise BuildError(
            "CMake failed as told above; if it is about CUDA, CAUSAL_CONV1D_CUDA=0 builds without."
        ) from None


def build_libraries(destination: Path) -> str:
    """Compiles the libraries and installs them into destination; returns the compilers' output."""
    env = environment()
    with tempfile.TemporaryDirectory(prefix="causal-conv1d-") as folder:
        build = Path(folder)
        configure(build, env)
        command = ["cmake", "--build", str(build), "--config", "Release", "-j", str(job_count())]
        try:
            output = run(command, env)
        except subprocess.CalledProcessError:
            raise BuildError(
                "The compiler failed as told above; if it was killed for memory, set MAX_JOBS=1."
            ) from None
        run(["cmake", "--install", str(build), "--prefix", str(destination)], env)
        return output


# ------------------------------------------------------------------------------------------- wheels


def version(label: str = "") -> str:
    text = (ROOT / PACKAGE / "_version.py").read_text()
    return re.search(r'__version__ = "(.+)"', text)[1] + label


def metadata(label: str = "", platform: str = "") -> dict:
    """The text files of the wheel's .dist-info, without RECORD."""
    platform = platform or re.sub(r"[-.]", "_", sysconfig.get_platform())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return {
        "METADATA": METADATA.format(version=version(label), readme=readme),
        "WHEEL": WHEEL.format(platform=platform),
        "licenses/LICENSE": (ROOT / "LICENSE").read_text(),
    }


def python_files():
    """Every module and package in the root.

    The modules are single files so that a compiled extension of the same name beside them wins.
    """
    for path in sorted(ROOT.glob("*.py")):
        if path != Path(__file__).resolve():
            yield path
    for package in sorted(ROOT.glob("*/__init__.py")):
        for path in sorted(package.parent.rglob("*")):
            if path.is_file() and path.suffix not in (".so", ".pyc"):
                yield path


def wheel_files(libraries: Path, label: str = "") -> dict:
    """The wheel's contents, name to bytes, with the libraries of a folder."""
    files = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in python_files()}
    own_version = f"{PACKAGE}/_version.py"
    files[own_version] = files[own_version].replace(version().encode(), version(label).encode())
    for library in sorted(libraries.glob("*.so")):
        files[f"{PACKAGE}/{library.name}"] = library.read_bytes()
    return files


def write_wheel(directory, files: dict, label: str = "", platform: str = "") -> str:
    """Writes files and the metadata; returns the wheel's name.

    label is appended to the version. platform is the wheel's platform tag, by default this
    machine's.
    """
    stem = f"{NAME}-{version(label)}"
    texts = metadata(label, platform)
    files = files | {f"{stem}.dist-info/{name}": text.encode() for name, text in texts.items()}
    record = f"{stem}.dist-info/RECORD"
    lines = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}\n")
    files[record] = ("".join(lines) + f"{record},,\n").encode()
    tag = re.search(r"Tag: (.+)", texts["WHEEL"])[1]
    wheel = Path(directory, f"{stem}-{tag}.whl")
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))  # the same bytes, whenever built
            entry.external_attr = (0o100755 if name.endswith(".so") else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return wheel.name


def reporting(hook):
    """Makes the last line of a failed build the sentence that says what to do."""

    def wrapped(*args, **kwargs):
        try:
            return hook(*args, **kwargs)
        except BuildError as error:
            sys.stdout.flush()
            sys.exit(f"error: causal_conv1d was not built. {error}")

    return wrapped


@reporting
def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    with tempfile.TemporaryDirectory() as folder:
        build_libraries(Path(folder))
        return write_wheel(wheel_directory, wheel_files(Path(folder)))


@reporting
def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    package = ROOT / PACKAGE
    with tempfile.TemporaryDirectory() as folder:
        build_libraries(Path(folder))
        for library in package.glob("libcausal_conv1d_*.so"):
            library.unlink()  # of an earlier build, perhaps with CUDA where this one has none
        for library in Path(folder).glob("*.so"):
            shutil.copy2(library, package)
    return write_wheel(wheel_directory, {f"{NAME}.pth": f"{ROOT}\n".encode()})


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = f"{NAME}-{version()}.dist-info"
    for name, text in metadata().items():
        path = Path(metadata_directory, folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


# ----------------------------------------------------------------------------- source distributions


def source_files() -> list[str]:
    """What belongs to the sources: what git knows or would add, or all there is without git."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(listing, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*")]
    ignored = re.compile(r"(^|/)(build|dist|__pycache__|\.git|PKG-INFO)(/|$)|\.(so|pyc)$")
    return sorted(n for n in names if n and (ROOT / n).is_file() and not ignored.search(n))


def build_sdist(sdist_directory, config_settings=None):
    stem = f"{NAME}-{version()}"
    name = f"{stem}.tar.gz"
    with (
        gzip.GzipFile(Path(sdist_directory, name), "wb", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        files = {file: (ROOT / file).read_bytes() for file in source_files()}
        files["PKG-INFO"] = metadata()["METADATA"].encode()
        for file, data in files.items():
            entry = tarfile.TarInfo(f"{stem}/{file}")
            entry.size = len(data)
            executable = file != "PKG-INFO" and os.access(ROOT / file, os.X_OK)
            entry.mode = 0o755 if executable else 0o644
            archive.addfile(entry, io.BytesIO(data))
    return name
