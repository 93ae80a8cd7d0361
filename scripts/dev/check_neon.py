"""Fails if the innermost loops of an aarch64 CPU library are not vector code, by its disassembly.

usage: check_neon.py LIBRARY    (libcausal_conv1d_cpu.so; needs an objdump that knows aarch64)

A loop here is a branch back to an earlier address with no other such branch between the two. Those
that multiply float32 numbers are counted: with 128-bit vectors (fmla v0.4s) or without (fmadd s0).
Loops over float64 are scalar by intention.
"""

import bisect
import re
import shutil
import subprocess
import sys

INSTRUCTION = re.compile(r" +([0-9a-f]+):\t(\S+)\s*(.*)")
BRANCH = re.compile(r"b|b\.\w+|cbn?z|tbn?z")
MULTIPLY = ("fmul", "fmla", "fmls", "fmadd", "fmsub", "fnmadd", "fnmsub")


def innermost_loops(instructions):
    """The instructions of each innermost loop; instructions: (address, name, operands)."""
    position = {address: i for i, (address, _, _) in enumerate(instructions)}
    loops = []
    for end, (_, name, operands) in enumerate(instructions):
        target = re.search(r"\b([0-9a-f]+) <", operands)
        if BRANCH.fullmatch(name) and target:
            start = position.get(int(target[1], 16))
            if start is not None and start <= end:
                loops.append((start, end))
    starts = sorted(loops)
    for start, end in loops:
        # Loops that begin within this one; it is innermost if none of them also ends within it.
        first = bisect.bisect_left(starts, (start, -1))
        last = bisect.bisect_right(starts, (end, end))
        if not any(e <= end and (s, e) != (start, end) for s, e in starts[first:last]):
            yield instructions[start : end + 1]


def main(arguments) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    objdump = shutil.which("aarch64-linux-gnu-objdump") or "objdump"
    command = [objdump, "-d", "--no-show-raw-insn", arguments[0]]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = filter(None, map(INSTRUCTION.match, text.splitlines()))
    instructions = [(int(m[1], 16), m[2], m[3]) for m in found]
    vector, scalar = [], []
    for loop in innermost_loops(instructions):
        products = [operands for _, name, operands in loop if name in MULTIPLY]
        if any(".4s" in operands for operands in products):
            vector.append(loop)
        elif any(re.match(r"s\d", operands) for operands in products):
            scalar.append(loop)
    fmla = sum(name == "fmla" and ".4s" in operands for _, name, operands in instructions)
    print(
        f"{arguments[0]}: of the innermost loops that multiply float32, {len(vector)} with "
        f"vectors of 4, {len(scalar)} without; {fmla} fmla of 4 in all"
    )
    for loop in scalar:
        print(f"  scalar: {len(loop)} instructions at {loop[0][0]:x}")
    if len(vector) < 50 or len(scalar) > len(vector) / 10:
        print("error: the inner loops are not vector code", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
