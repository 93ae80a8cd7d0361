"""Builds the C++ and CUDA libraries by CMake; the rest is setuptools' and in pyproject.toml.

Environment:
  CAUSAL_CONV1D_CUDA   1: fail without nvcc. 0: CPU only. Default: CUDA where nvcc is found; without
                       nvcc a machine with a GPU is an error, any other gets the CPU library alone.
  CAUSAL_CONV1D_HIP    1: the library for AMD GPUs too, by hipcc: see docs/rocm.md.
  CAUSAL_CONV1D_LABEL  appended to the version, as in cu13.
  TORCH_CUDA_ARCH_LIST, CUDACXX or CUDA_HOME, MAX_JOBS, CMAKE_ARGS: see docs/BUILD_GUIDE.md.
  CAUSAL_CONV1D_SKIP_CUDA_BUILD, CAUSAL_CONV1D_FORCE_BUILD: upstream's. TRUE means CUDA=0, and what
                       is done anyway.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (an older one comes as far as this)
    sys.exit(
        "error: causal_conv1d needs Python >= 3.10, and this is {}.{}: take a newer one, as of "
        "JetPack 6 or 7.".format(*sys.version_info[:2])
    )

import atexit
import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"error: causal_conv1d is built with setuptools >= 77, and this is {setuptools.__version__}"
        ": pip install -U setuptools, or leave --no-build-isolation out."
    )

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
PACKAGE = "causal_conv1d"  # which the compiled libraries lie in
YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
# The same bytes whenever a wheel is built: 2020-01-01.
os.environ.setdefault("SOURCE_DATE_EPOCH", "1577836800")


class BuildError(SystemExit):
    """A condition that stops the build; its text says what to do."""

    def __init__(self, text):
        super().__init__(f"error: causal_conv1d was not built. {text}")


# -------------------------------------------------------------------------------------- environment


def cuda_option():
    value = os.environ.get("CAUSAL_CONV1D_CUDA", "").strip().lower()
    if value in YES:
        return "ON"
    if value in NO:
        return "OFF"
    if value not in ("", "auto"):
        raise BuildError(f"CAUSAL_CONV1D_CUDA={value} means nothing here: set it to 1, 0 or auto.")
    skip = os.environ.get("CAUSAL_CONV1D_SKIP_CUDA_BUILD", "").strip().lower()
    return "OFF" if skip in YES else "AUTO"


def hip_option():
    value = os.environ.get("CAUSAL_CONV1D_HIP", "").strip().lower()
    if value not in ("", *YES, *NO):
        raise BuildError(f"CAUSAL_CONV1D_HIP={value} means nothing here: set it to 1 or 0.")
    return "ON" if value in YES else "OFF"


def job_count():
    value = os.environ.get("MAX_JOBS", "").strip()
    if not value:
        return os.cpu_count() or 1
    if not value.isdecimal() or int(value) == 0:
        raise BuildError(f"MAX_JOBS={value} is no number of jobs: set it to 1 or more.")
    return int(value)


def build_environment():
    """For CMake and Ninja, which may be packages of this Python; with absolute paths to nvcc."""
    env = dict(os.environ)
    env["PATH"] = os.pathsep.join([env.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    if env.get("CUDA_HOME"):
        env["CUDA_HOME"] = os.path.abspath(env["CUDA_HOME"])
    if os.sep in env.get("CUDACXX", ""):  # else it is looked for on PATH
        env["CUDACXX"] = os.path.abspath(env["CUDACXX"])
    if env.get("CUDACXX") and not shutil.which(env["CUDACXX"], path=env["PATH"]):
        raise BuildError(f"CUDACXX={env['CUDACXX']} is no program: set it to nvcc's path.")
    return env


def version():
    text = (ROOT / PACKAGE / "_version.py").read_text(encoding="utf-8")
    label = os.environ.get("CAUSAL_CONV1D_LABEL", "")
    if not re.fullmatch(r"([a-z0-9]+(\.[a-z0-9]+)*)?", label):
        raise BuildError(
            f"CAUSAL_CONV1D_LABEL={label} cannot be in a version: set it to small letters, digits "
            "and dots, as in cu13."
        )
    return re.search(r'__version__ = "(.+)"', text)[1] + (label and f".{label}")


def commit():
    """The commit of these sources, or None where git knows none."""
    tracked = ["ls-files", "--error-unmatch", "setup.py"]  # else the repository is another's
    describe = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        for arguments in (tracked, describe):
            command = ["git", "-C", str(ROOT), *arguments]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def cuda_of_torch():
    """CUDA's version of the torch that is installed for this Python, or "". Nothing is imported."""
    for folder in dict.fromkeys((sysconfig.get_path("platlib"), *sys.path)):
        file = Path(folder, "torch", "version.py")
        if file.is_file():
            found = re.search(r"^cuda\b.*= *['\"](.+)['\"]", file.read_text(), re.MULTILINE)
            return found[1] if found else ""
    return ""


# ------------------------------------------------------------------------------- compiled libraries


def run(command, env):
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


def find_cmake(env):
    cmake = shutil.which("cmake", path=env["PATH"])
    found = re.search(r"(\d+)\.(\d+)", run([cmake, "--version"], env)) if cmake else None
    if found is None or tuple(map(int, found.groups())) < (3, 22):
        raise BuildError("CMake >= 3.22 is needed: apt-get install cmake, or pip install cmake.")
    return cmake


def settings_key(env):
    """Names the build folder, so that builds with other settings do not disturb each other."""
    names = "TORCH_CUDA_ARCH_LIST CMAKE_ARGS CC CXX CFLAGS CXXFLAGS CUDAFLAGS LDFLAGS CUDACXX"
    names += " CUDA_HOME CUDAHOSTCXX NVCC_PREPEND_FLAGS NVCC_APPEND_FLAGS"
    names += " HIPCC ROCM_PATH PYTORCH_ROCM_ARCH"
    options = (cuda_option(), hip_option())
    facts = [sys.platform, os.uname().machine, *options, *map(env.get, names.split())]
    toolkit = os.path.join(env.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    for program in (env.get("CXX", "c++"), env.get("CUDACXX", "nvcc"), toolkit):
        path = shutil.which(program, path=env["PATH"])
        facts += [path and os.path.realpath(path), path and os.stat(path).st_mtime_ns]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


@contextlib.contextmanager
def build_folder(env):
    """A folder that a later build goes on with, for one build at a time, or a temporary one.

    It is temporary where the sources may not be written, and without Ninja, as Make would take what
    an interrupted compiler left for finished.
    """
    folder = ROOT / "build" / f"cmake-{settings_key(env)}"
    lock = None
    if shutil.which("ninja", path=env["PATH"]):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / "lock", "w")
    if lock is None:
        with tempfile.TemporaryDirectory(prefix="causal-conv1d-") as temporary:
            yield Path(temporary)
        return
    with lock:  # the system takes it back when the process ends, however it does
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def configure(build, env):
    cmake = find_cmake(env)
    command = [cmake, "-S", str(ROOT), "-B", str(build), f"-DCAUSAL_CONV1D_CUDA={cuda_option()}"]
    command += [f"-DCAUSAL_CONV1D_TORCH_CUDA={cuda_of_torch()}"]
    command += [f"-DCAUSAL_CONV1D_HIP={hip_option()}"]
    ninja = shutil.which("ninja", path=env["PATH"])
    if ninja:
        command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    try:
        command += shlex.split(env.get("CMAKE_ARGS", ""))
    except ValueError as error:
        raise BuildError(f"CMAKE_ARGS={env['CMAKE_ARGS']} is no command line: {error}.") from None
    command += ["-DCAUSAL_CONV1D_PYTHON=ON"]
    try:
        try:
            return run(command, env)
        except subprocess.CalledProcessError:
            if not (build / "CMakeCache.txt").exists():
                raise
            # Perhaps of a configuration that was interrupted.
            (build / "CMakeCache.txt").unlink()
            shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
            return run(command, env)
    except subprocess.CalledProcessError as error:
        raise BuildError(advice(error.output)) from None


def advice(output):
    """What to do about a configuration that failed."""
    if "CMAKE_CXX_COMPILER" in output or "CXX compiler identification is unknown" in output:
        return "A C++17 compiler is needed: apt-get install g++, or set CXX to one that works."
    # Our own errors say what to do; CMake shows one as a paragraph.
    paragraph = r"^CMake Error at CMakeLists.txt.* \(message\):\n((?:  .*\n)+)"
    said = re.findall(paragraph, output, re.MULTILINE)
    if said:
        return " ".join(said[-1].split()) + "."
    return "CMake failed as told above; if it is about CUDA, CAUSAL_CONV1D_CUDA=0 builds without."


def build_libraries(destination):
    """Compiles what has changed and puts the libraries into destination; returns their names."""
    env = build_environment()
    cmake = find_cmake(env)
    destination.mkdir(parents=True, exist_ok=True)
    with build_folder(env) as build, tempfile.TemporaryDirectory() as installed:
        configure(build, env)
        try:
            run([cmake, "--build", str(build), "--config", "Release", "-j", str(job_count())], env)
        except subprocess.CalledProcessError:
            raise BuildError(
                "The compiler failed as told above; if it was killed for memory, set MAX_JOBS=1."
            ) from None
        run([cmake, "--install", str(build), "--prefix", installed], env)
        libraries = sorted(Path(installed).glob("*.so"))
        if not libraries:
            raise BuildError("CMake installed no library: look at what CMAKE_ARGS tells it.")
        for old in destination.glob("libcausal_conv1d_*.so"):
            old.unlink()  # of an earlier build, perhaps with CUDA where this one has none
        for library in libraries:
            shutil.copy(library, destination)
    return [library.name for library in libraries]


# ----------------------------------------------------------------------------- setuptools' commands


class BuildLibraries(setuptools.Command):
    """Takes the place of build_ext."""

    description = "build the C++ and CUDA libraries"
    user_options = [("inplace", "i", "put them beside the sources")]
    boolean_options = ["inplace"]
    editable_mode = False

    def initialize_options(self):
        self.inplace = False
        self.build_lib = None
        self.names = []

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        folder = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        self.names = build_libraries(folder / PACKAGE)

    def get_source_files(self):
        return []

    def get_outputs(self):
        return [str(Path(self.build_lib, PACKAGE, name)) for name in self.names]

    def get_output_mapping(self):
        return {output: str(ROOT / PACKAGE / Path(output).name) for output in self.get_outputs()}


class BuildModules(build_py):
    """Adds the commit and the version's label to the package."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib, PACKAGE)
        write_commit(package)
        (package / "_version.py").write_text(f'__version__ = "{version()}"\n', encoding="utf-8")


def write_commit(package):
    """In the package, which then no longer needs git; as in sources without it."""
    found = commit()
    if found is not None:
        (package / "_commit.py").write_text(f'commit = "{found}"\n', encoding="utf-8")


class Build(build):
    """In a folder of its own: neither what an older build left there nor another build's files."""

    def initialize_options(self):
        super().initialize_options()
        self.build_base = temporary_folder()


class EggInfo(egg_info):
    def finalize_options(self):
        if self.egg_base is None and "sdist" not in self.distribution.commands:
            self.egg_base = temporary_folder()  # the sources may not be writable
        super().finalize_options()


class SourceDistribution(sdist):
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir, PACKAGE))


class Wheel(bdist_wheel):
    def get_tag(self):
        """For every Python: the libraries use nothing of it."""
        return ("py3", "none", super().get_tag()[2])

    def write_wheelfile(self, *args, **kwargs):
        super().write_wheelfile(*args, **kwargs)
        # All is there. The same modes, whatever those of the sources and the umask are.
        for path in Path(self.bdist_dir).rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)


class Distribution(setuptools.Distribution):
    def has_ext_modules(self):
        return True


def temporary_folder():
    folder = tempfile.mkdtemp(prefix="causal-conv1d-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


setuptools.setup(
    version=version(),
    distclass=Distribution,
    cmdclass={
        "bdist_wheel": Wheel,
        "build": Build,
        "build_ext": BuildLibraries,
        "build_py": BuildModules,
        "egg_info": EggInfo,
        "sdist": SourceDistribution,
    },
)
