"""Fails if a wheel is bound to a torch or a Python: by its tag, its links or its undefined symbols.

usage: check_wheel.py WHEEL [--cuda]    (--cuda: the CUDA library must be in it)
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FORBIDDEN_LIBRARY = re.compile(r"lib(torch|c10|python|shm|aoti)")
# Functions of torch are looked up at run time; mangled names hold their namespaces.
FORBIDDEN_SYMBOL = re.compile(r"c10|torch|aoti|^_?Py[A-Z_]|\d+at[0-9N]")


def output_of(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def problems_of(library: Path):
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "-d", library))
    print(f"{library.name}: {library.stat().st_size:,} bytes, needs {' '.join(needed)}")
    for name in filter(FORBIDDEN_LIBRARY.match, needed):
        yield f"{library.name} links {name}"
    for line in output_of("nm", "-D", "--undefined-only", library).splitlines():
        symbol = line.split()[-1]
        if FORBIDDEN_SYMBOL.search(symbol):
            yield f"{library.name} has the undefined symbol {symbol}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--cuda", action="store_true")
    arguments = parser.parse_args()
    wheel = arguments.wheel
    problems = []
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes")
    python, abi = wheel.stem.split("-")[-3:-1]
    if (python, abi) != ("py3", "none"):
        problems.append(f"the tag is {python}-{abi}, not py3-none")
    wanted = {"libcausal_conv1d_cpu.so"}
    if arguments.cuda:
        wanted.add("libcausal_conv1d_cuda.so")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            libraries = [name for name in archive.namelist() if ".so" in Path(name).suffixes]
            for name in libraries:
                problems += problems_of(Path(archive.extract(name, folder)))
    for name in sorted(wanted - {Path(library).name for library in libraries}):
        problems.append(f"there is no {name}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
