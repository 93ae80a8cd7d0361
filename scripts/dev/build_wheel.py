"""Builds a wheel to give away, and checks it: for this machine, or for aarch64 on an x86-64 one.

    pip install build wheel
    python3 scripts/dev/build_wheel.py                       # this machine, a Jetson too
    python3 scripts/dev/build_wheel.py --machine aarch64     # by cross compilation

CUDA's major version is that of the nvcc found (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda): for
JetPack 6 CUDA 12 (get_cuda12.sh fetches one), for JetPack 7 and servers CUDA 13. Neither torch
nor a GPU is needed; for aarch64 only g++-aarch64-linux-gnu. The label .cu12 or .cu13 in the
wheel's version tells them apart. Options of the build: see setup.py. Beside the wheel lies an index
for pip and uv, see write_index.py.
"""

import argparse
import importlib.util
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import check_spills
import check_wheel
import wheel_files
import write_index
from wheel_files import Problem

ROOT = Path(__file__).resolve().parents[2]

# Besides sm_87 and PTX, by CUDA's major version and the machine. JetPack 6 is sm_87 alone. Turing,
# 7.5, is in x86-64 machines alone. Code of CUDA 12 takes more room: there 8.9 runs that for 8.6.
CUDA_13 = "8.0 8.6 8.9 9.0 10.0 11.0 12.0 12.1"
ARCHITECTURES = {
    (12, "aarch64"): "",
    (12, "x86_64"): "7.5 8.0 8.6 9.0",
    (13, "aarch64"): CUDA_13,
    (13, "x86_64"): f"7.5 {CUDA_13}",
}
VERSIONS = {major for major, _ in ARCHITECTURES}


def find_nvcc() -> tuple[str, int]:
    """nvcc and its major version."""
    home, path = os.environ.get("CUDA_HOME", ""), os.environ.get("PATH", os.defpath)
    folders = os.pathsep.join([f"{home}/bin", path, "/usr/local/cuda/bin"])
    given = os.environ.get("CUDACXX")
    found = shutil.which(given) if given else shutil.which("nvcc", path=folders)
    if found is None and given:
        raise Problem(f"CUDACXX is {given}, and there is no such program: set it to an nvcc.")
    if found is None:
        raise Problem("there is no nvcc: put it on PATH or set CUDACXX.")
    nvcc = os.path.abspath(found)  # the build runs in another folder
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
        release = re.search(r"release (\d+)", done.stdout)
    except (OSError, UnicodeDecodeError):
        release = None
    if release is None:
        raise Problem(f"{nvcc} --version tells of no release of CUDA: set CUDACXX to an nvcc.")
    if int(release[1]) not in VERSIONS:
        raise Problem(f"{nvcc} is of CUDA {release[1]}: CUDA 12 or 13 is needed.")
    return nvcc, int(release[1])


def build_environment(machine: str, nvcc: str, architectures: str, small_ptx: bool) -> dict:
    """What setup.py reads, without the version's label."""
    cmake = [os.environ.get("CMAKE_ARGS", "")]
    if small_ptx:
        cmake.append("-DCAUSAL_CONV1D_SMALL_PTX=ON")
    if machine != platform.machine():
        if machine != "aarch64":
            raise Problem(f"there is no toolchain file for {machine}; build on such a machine.")
        if shutil.which("aarch64-linux-gnu-g++") is None:
            raise Problem("there is no cross compiler: apt-get install g++-aarch64-linux-gnu.")
        toolchain = ROOT / "cmake" / "aarch64-linux-gnu.cmake"
        cmake.append(f"'-DCMAKE_TOOLCHAIN_FILE={toolchain}'")
    return os.environ | {
        "CAUSAL_CONV1D_CUDA": "1",
        "CMAKE_ARGS": " ".join(cmake),
        "CUDACXX": nvcc,
        # Nothing of the GPUs in this machine; sm_87 and PTX always are in.
        "TORCH_CUDA_ARCH_LIST": architectures or "8.7",
    }


def build(folder: Path, log: Path, env: dict, isolated: bool) -> Path:
    """The wheel made in folder from the source distribution, as pip would from an index."""
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    if not isolated:
        command += ["--no-isolation", "--skip-dependency-check"]  # CMake may be the system's
    with log.open("w") as stream:
        # Elsewhere, as the sources' build/ could be taken for the package `build`.
        made = subprocess.run(command, env=env, cwd=folder, stdout=stream, stderr=stream)
    if made.returncode != 0:
        errors = re.findall(r"error: (.*)", log.read_text(errors="replace"))
        last = errors[-1] if errors else "the build failed."
        # What setup.py says to who sees its output, and may do without CUDA.
        last = re.sub(r" as told above|; if it is about CUDA.* builds without", "", last)
        raise Problem(f"{last} The output is in {log}.")
    (wheel,) = folder.glob("*.whl")
    return wheel


def set_platform(wheel: Path, machine: str, plain: bool) -> Path:
    """Gives the wheel the tag that its libraries allow; plain: one that says nothing of glibc."""
    with tempfile.TemporaryDirectory() as folder, wheel_files.opened(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        libraries = [Path(archive.extract(name, folder)) for name in names]
        tag = "linux" if plain else check_wheel.manylinux_tag(libraries)
    command = [sys.executable, "-m", "wheel", "tags", "--remove"]
    command += [f"--platform-tag={tag}_{machine}", str(wheel)]
    # The same bytes whenever it is done; its last line is the new name.
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return wheel.with_name(output.split()[-1])


@wheel_files.exits_with_a_sentence
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    machines = ("x86_64", "aarch64")
    parser.add_argument("--machine", choices=machines, default=platform.machine())
    parser.add_argument(
        "--architectures", help="as TORCH_CUDA_ARCH_LIST, besides sm_87 and PTX ('8.9 9.0+PTX')"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for wheel and log")
    parser.add_argument("--cuobjdump", help="for check_wheel.py")
    parser.add_argument(
        "--no-isolation",
        dest="isolated",
        action="store_false",
        help="build with the setuptools, CMake and Ninja that are installed, without a network",
    )
    arguments = parser.parse_args()
    for package in ("build", "wheel"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise Problem(f"{sys.executable} has no {package}: pip install build wheel.")
    if arguments.machine not in machines:
        raise Problem(f"there are wheels for {' and '.join(machines)}, not {arguments.machine}.")
    for program in filter(None, (*check_wheel.BINUTILS, arguments.cuobjdump)):
        check_wheel.output_of(program, "--version")  # it is needed after a long build
    wheel_files.make_folder(arguments.out, "--out")

    nvcc, major = find_nvcc()
    architectures = arguments.architectures
    if architectures is None:
        architectures = ARCHITECTURES[major, arguments.machine]
    # On JetPack 6 every GPU is sm_87 and the PTX is not used.
    small_ptx = (major, arguments.machine) == (12, "aarch64") and not architectures
    env = build_environment(arguments.machine, nvcc, architectures, small_ptx)
    env["CAUSAL_CONV1D_LABEL"] = f"cu{major}"
    log = arguments.out / f"build-cu{major}-{arguments.machine}.log"
    print(f"{arguments.machine}, {nvcc} of CUDA {major}; log: {log}", flush=True)

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        made = build(Path(folder), log, env, arguments.isolated)
        seconds = time.monotonic() - start
        # NVIDIA's wheels for JetPack 6 are linux_aarch64 too; others say which glibc they need.
        made = set_platform(made, arguments.machine, (major, arguments.machine) == (12, "aarch64"))
        wheel = Path(shutil.copy(made, arguments.out))
    write_index.main([str(arguments.out)])
    # Of the processes that were waited for, the compilers are the largest.
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"built in {seconds:.0f} s; the largest process took {memory:.0f} MiB", flush=True)
    spills = check_spills.main([str(log)])
    cuobjdump = ["--cuobjdump", arguments.cuobjdump] if arguments.cuobjdump else []
    return check_wheel.main(["--cuda", *cuobjdump, str(wheel)]) or spills


if __name__ == "__main__":
    sys.exit(main())
