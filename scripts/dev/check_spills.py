"""Fails if a kernel for sm_87 spills registers or has a stack frame, by ptxas' own report.

Of other architectures it tells how many do.

usage: check_spills.py BUILD_LOG    (a log of nvcc with -Xptxas -v)
"""

import re
import subprocess
import sys
from dataclasses import dataclass

ARCHITECTURE = "sm_87"
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass
class Kernel:
    name: str
    architecture: str
    frame: tuple[int, ...] | None = None  # bytes of stack frame, spill stores, spill loads
    registers: int | None = None


def kernels_in(lines) -> list[Kernel]:
    """The kernels compiled, once for each architecture.

    ptxas reports a kernel in four lines: its name, its properties, their values, its registers.
    Reports of parallel jobs do not mix where ninja builds: it prints a job's output as a whole.
    """
    kernels, current = [], None
    for line in lines:
        if entry := ENTRY.search(line):
            current = Kernel(entry[1], entry[2])
            kernels.append(current)
        elif current is None:
            continue
        elif (frame := FRAME.search(line)) and current.frame is None:
            current.frame = tuple(map(int, frame.groups()))
        elif (registers := REGISTERS.search(line)) and current.registers is None:
            current.registers = int(registers[1])
    return kernels


def demangled(name: str) -> str:
    try:
        return subprocess.run(
            ["c++filt", name], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return name


def main(arguments) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    with open(arguments[0], errors="replace") as log:
        every_kernel = kernels_in(log)
    kernels = [kernel for kernel in every_kernel if kernel.architecture == ARCHITECTURE]
    if not kernels:
        print(f"error: {arguments[0]} reports no kernel for {ARCHITECTURE}", file=sys.stderr)
        return 1
    bad = 0
    for kernel in kernels:
        if kernel.frame is None or kernel.registers is None:
            problem = "has no complete report"
        elif any(kernel.frame):
            problem = "has {} bytes of stack frame, {} of spill stores, {} of spill loads".format(
                *kernel.frame
            )
        else:
            continue
        bad += 1
        print(f"error: {ARCHITECTURE}: {demangled(kernel.name)} {problem}", file=sys.stderr)
    most = max(kernels, key=lambda kernel: kernel.registers or 0)
    print(
        f"{ARCHITECTURE}: {len(kernels)} kernels, {bad} with spills or a stack frame; "
        f"at most {most.registers} registers, in {demangled(most.name)}"
    )
    for other in sorted({kernel.architecture for kernel in every_kernel} - {ARCHITECTURE}):
        frames = [kernel.frame for kernel in every_kernel if kernel.architecture == other]
        spilling = sum(frame is None or any(frame) for frame in frames)
        print(f"{other}: {len(frames)} kernels, {spilling} with spills or a stack frame")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
