"""Drives CMakeLists.txt; the project's metadata are in pyproject.toml.

Environment: ``CAUSAL_CONV1D_CUDA`` (1/true/yes: fail without nvcc; 0/false/no: CPU only; default:
CUDA where nvcc is found), ``TORCH_CUDA_ARCH_LIST``, ``CUDACXX`` or ``CUDA_HOME``, ``MAX_JOBS``,
``CMAKE_ARGS``.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent


def cuda_option() -> str:
    value = os.environ.get("CAUSAL_CONV1D_CUDA", "auto").lower()
    choices = {"1": "ON", "true": "ON", "yes": "ON", "on": "ON", "auto": "AUTO", "": "AUTO"}
    choices.update({"0": "OFF", "false": "OFF", "no": "OFF", "off": "OFF"})
    if value not in choices:
        raise SystemExit(f"CAUSAL_CONV1D_CUDA={value}: give 1, 0 or auto")
    return choices[value]


def build_libraries(build: Path, destination: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        raise SystemExit(
            "causal_conv1d needs CMake >= 3.22: apt-get install cmake, or pip install cmake"
        )
    configure = [cmake, "-S", str(ROOT), "-B", str(build), f"-DCAUSAL_CONV1D_CUDA={cuda_option()}"]
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    # NVIDIA's packages leave nvcc off the PATH.
    home = os.environ.get("CUDA_HOME") or ("/usr/local/cuda" if not shutil.which("nvcc") else "")
    nvcc = Path(home, "bin", "nvcc")
    if "CUDACXX" not in os.environ and home and nvcc.exists():
        configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
    subprocess.run(configure, check=True)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    subprocess.run([cmake, "--build", str(build), "--config", "Release", "-j", jobs], check=True)
    subprocess.run([cmake, "--install", str(build), "--prefix", str(destination)], check=True)


class BuildPy(build_py):
    """Puts the compiled libraries beside the package's modules."""

    def run(self):
        super().run()
        # Never a build folder of another configuration or machine.
        build = Path(self.get_finalized_command("build").build_temp).resolve() / "cmake"
        shutil.rmtree(build, ignore_errors=True)
        package = ROOT if self.editable_mode else Path(self.build_lib).resolve()
        for library in (package / "causal_conv1d").glob("libcausal_conv1d_*.so"):
            library.unlink()  # of an earlier build, perhaps with CUDA where this one has none
        build_libraries(build, package / "causal_conv1d")


class BdistWheel(bdist_wheel):
    """py3-none: the libraries use no Python API, so one file serves every Python."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(
    cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel},
    distclass=PlatformDistribution,
)
