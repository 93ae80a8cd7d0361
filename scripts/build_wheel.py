"""Builds a wheel to give away, and checks it: for this machine, or for aarch64 on an x86-64 one.

    python3 scripts/build_wheel.py                       # this machine, a Jetson too
    python3 scripts/build_wheel.py --machine aarch64     # by cross compilation

CUDA's major version is that of the nvcc found (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda): for
JetPack 6 CUDA 12 (scripts/get_cuda12.sh fetches one), for JetPack 7 and servers CUDA 13. Neither
torch nor a GPU is needed; for aarch64 only g++-aarch64-linux-gnu. The label .cu12 or .cu13 in the
wheel's version tells them apart. Options of the build: see build_backend.py.
"""

import argparse
import contextlib
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

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import check_spills  # noqa: E402
import check_wheel  # noqa: E402

import build_backend  # noqa: E402

# Besides sm_87 and PTX, by CUDA's major version and the machine. JetPack 6 is sm_87 alone. Code of
# CUDA 12 takes more room, so there 8.9 runs that for 8.6.
CUDA_13 = "8.0 8.6 8.9 9.0 10.0 11.0 12.0 12.1"
ARCHITECTURES = {
    (12, "aarch64"): "",
    (12, "x86_64"): "8.0 8.6 9.0",
    (13, "aarch64"): CUDA_13,
    (13, "x86_64"): CUDA_13,
}


def find_nvcc() -> tuple[str, int]:
    """nvcc and its major version."""
    folders = [os.environ.get("CUDA_HOME", "") + "/bin", os.environ["PATH"], "/usr/local/cuda/bin"]
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        sys.exit("error: there is no nvcc: put it on PATH or set CUDACXX.")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return nvcc, int(re.search(r"release (\d+)", text)[1])


def add_cmake_argument(argument: str) -> None:
    os.environ["CMAKE_ARGS"] = f"{os.environ.get('CMAKE_ARGS', '')} {argument}"


def set_up(machine: str, nvcc: str, architectures: str, small_ptx: bool) -> None:
    """The environment that build_backend.py reads."""
    if small_ptx:
        add_cmake_argument("-DCAUSAL_CONV1D_SMALL_PTX=ON")
    os.environ |= {
        "CAUSAL_CONV1D_CUDA": "1",
        "CUDACXX": nvcc,
        # Nothing of the GPUs in this machine; sm_87 and PTX always are in.
        "TORCH_CUDA_ARCH_LIST": architectures or "8.7",
    }
    if machine == platform.machine():
        return
    if machine != "aarch64":
        sys.exit(f"error: there is no toolchain file for {machine}; build on such a machine.")
    if shutil.which("aarch64-linux-gnu-g++") is None:
        sys.exit("error: there is no cross compiler: apt-get install g++-aarch64-linux-gnu.")
    add_cmake_argument(f"-DCMAKE_TOOLCHAIN_FILE={ROOT}/cmake/aarch64-linux-gnu.cmake")


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
    arguments = parser.parse_args()

    nvcc, major = find_nvcc()
    architectures = arguments.architectures
    if architectures is None:
        architectures = ARCHITECTURES[major, arguments.machine]
    # On JetPack 6 every GPU is sm_87 and the PTX is not used.
    small_ptx = (major, arguments.machine) == (12, "aarch64") and not architectures
    set_up(arguments.machine, nvcc, architectures, small_ptx)
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / f"build-cu{major}-{arguments.machine}.log"
    print(f"{arguments.machine}, {nvcc} of CUDA {major}; log: {log}", flush=True)

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        libraries = Path(folder)
        with log.open("w") as stream, contextlib.redirect_stdout(stream):
            try:
                build_backend.build_libraries(libraries)
            except build_backend.BuildError as error:
                sys.exit(f"error: {error} The output is in {log}.")
        seconds = time.monotonic() - start
        # NVIDIA's wheels for JetPack 6 are linux_aarch64 too; others say which glibc they need.
        plain = major == 12 and arguments.machine == "aarch64"
        tag = "linux" if plain else check_wheel.manylinux_tag(libraries.glob("*.so"))
        label, tag = f".cu{major}", f"{tag}_{arguments.machine}"
        files = build_backend.wheel_files(libraries, label)
        wheel = arguments.out / build_backend.write_wheel(arguments.out, files, label, tag)
    # The compilers are the only children, so this is the largest of them.
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"built in {seconds:.0f} s; the largest process took {memory:.0f} MiB", flush=True)
    spills = check_spills.main([str(log)])
    cuobjdump = ["--cuobjdump", arguments.cuobjdump] if arguments.cuobjdump else []
    return check_wheel.main(["--cuda", *cuobjdump, str(wheel)]) or spills


if __name__ == "__main__":
    sys.exit(main())
