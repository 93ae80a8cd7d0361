"""Compares the machine code of two builds, kernel by kernel, by how often each opcode occurs.

Kernels are matched by name. Those whose template arguments were renamed are matched among the
kernels of one function and element type: where the numbers and truth values among the arguments of
one are part of the other's, else by the nearest counts.

usage: compare_opcodes.py BEFORE AFTER [--arch sm_87] [--all]

BEFORE and AFTER are each a shared library, an object, a cubin, a wheel, or a folder of these.
It needs cuobjdump and nvdisasm of the CUDA toolkit on PATH.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

FUNCTION = re.compile(r"^\s*Function\s*:\s*(\S+)")
ARCHITECTURE = re.compile(r"^\s*(?:code for|arch =) (sm_\w+)")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
USAGE = re.compile(r"^\s*Function (\S+):\s*$")
REGISTERS = re.compile(r"REG:(\d+)")
ELEMENT = re.compile(r"\b(?:__half|__nv_bfloat16|float|double)\b")
VALUE = re.compile(r"\b(?:true|false|\d+)\b")
SPILLS = ("LDL", "STL")  # loads and stores of local memory
SUFFIXES = (".so", ".o", ".cubin", ".fatbin")


@dataclass
class Kernel:
    name: str  # demangled
    opcodes: Counter = field(default_factory=Counter)
    registers: int | None = None

    @property
    def key(self) -> tuple[str, str | None]:
        """What stays when template arguments are renamed: the name and the element type."""
        element = ELEMENT.search(self.name)
        return base_name(self.name), element and element[0]

    @property
    def values(self) -> list[str]:
        """The numbers and truth values among its template arguments."""
        return VALUE.findall(self.name.split(">(")[0])

    @property
    def spills(self) -> int:
        return sum(n for opcode, n in self.opcodes.items() if opcode.split(".")[0] in SPILLS)

    @property
    def size(self) -> int:
        return sum(self.opcodes.values())


def base_name(name: str) -> str:
    """The function's own name, without namespaces, template arguments and parameters."""
    depth, kept = 0, []
    for c in name.replace("(anonymous namespace)::", ""):
        depth += (c in "<(") - (c in ">)")
        if depth == 0 and c not in ">)":
            kept.append(c)
    return "".join(kept).split()[-1].split("::")[-1] if kept else name


def read_sass(text: str, architecture: str) -> dict[str, Counter]:
    """Opcodes of each function, of cuobjdump -sass. Padding (NOP) does not count."""
    found: dict[str, Counter] = {}
    wanted, current = True, None
    for line in text.splitlines():
        if match := ARCHITECTURE.match(line):
            wanted, current = match[1] == architecture, None
        elif match := FUNCTION.match(line):
            current = found.setdefault(match[1], Counter()) if wanted else None
        elif current is not None and (match := INSTRUCTION.match(line)) and match[1] != "NOP":
            current[match[1]] += 1
    return found


def read_registers(text: str) -> dict[str, int]:
    """Registers of each function, of cuobjdump -res-usage."""
    found, name = {}, None
    for line in text.splitlines():
        if match := USAGE.match(line):
            name = match[1]
        elif name and (match := REGISTERS.search(line)):
            found[name], name = int(match[1]), None
    return found


def demangle(names: list[str]) -> list[str]:
    try:
        run = subprocess.run(
            ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return names
    lines = run.stdout.splitlines()
    return lines if len(lines) == len(names) else names


def distance(a: Kernel, b: Kernel) -> int:
    """Instructions that came or went, whichever are more: one in place of another is one."""
    return max((a.opcodes - b.opcodes).total(), (b.opcodes - a.opcodes).total())


def change(a: Kernel, b: Kernel) -> float:
    return distance(a, b) / max(a.size, b.size, 1)


def is_within(few: list[str], many: list[str]) -> bool:
    """Whether `many` has those of `few` in their order."""
    rest = iter(many)
    return all(value in rest for value in few)


def related(a: Kernel, b: Kernel) -> bool:
    return is_within(a.values, b.values) or is_within(b.values, a.values)


def match_kernels(before: list[Kernel], after: list[Kernel]):
    """Pairs (before, after), and what only one side has."""
    pairs, left = [], {k.name: k for k in after}
    rest = []
    for kernel in before:
        if kernel.name in left:
            pairs.append((kernel, left.pop(kernel.name)))
        else:
            rest.append(kernel)
    groups = defaultdict(lambda: ([], []))
    for side, kernels in enumerate((rest, left.values())):
        for kernel in kernels:
            groups[kernel.key][side].append(kernel)
    only_before, only_after = [], []
    for old, new in groups.values():
        candidates = sorted(
            (not related(a, b), distance(a, b), i, j)
            for i, a in enumerate(old)
            for j, b in enumerate(new)
        )
        used_old, used_new = set(), set()
        for _, _, i, j in candidates:
            if i not in used_old and j not in used_new:
                used_old.add(i)
                used_new.add(j)
                pairs.append((old[i], new[j]))
        only_before += [k for i, k in enumerate(old) if i not in used_old]
        only_after += [k for j, k in enumerate(new) if j not in used_new]
    return pairs, only_before, only_after


def report(before: list[Kernel], after: list[Kernel], everything: bool = False) -> str:
    pairs, only_before, only_after = match_kernels(before, after)
    pairs.sort(key=lambda pair: (-change(*pair), pair[1].name))
    same = sum(change(a, b) == 0 for a, b in pairs)
    slight = sum(0 < change(a, b) <= 0.01 for a, b in pairs)
    lines = []
    for a, b in pairs:
        if change(a, b) == 0 and a.registers == b.registers and not everything:
            continue
        lines.append(f"{change(a, b):7.2%}  {b.name}")
        lines.append(
            f"         instructions {a.size} -> {b.size}, registers {a.registers} -> "
            f"{b.registers}, spills {a.spills} -> {b.spills}"
        )
        for opcode in sorted(a.opcodes.keys() | b.opcodes.keys()):
            if a.opcodes[opcode] != b.opcodes[opcode] or everything:
                lines.append(f"           {opcode:24} {a.opcodes[opcode]} -> {b.opcodes[opcode]}")
    lines += [f"   gone  {k.name}" for k in only_before] + [
        f"    new  {k.name}" for k in only_after
    ]
    lines.append(
        f"{len(pairs)} kernels in both: {same} with the same opcodes, {slight} changed by up to "
        f"1 %, {len(pairs) - same - slight} by more; {len(only_before)} gone, "
        f"{len(only_after)} new; instructions {sum(k.size for k in before)} -> "
        f"{sum(k.size for k in after)}; spilling {sum(k.spills > 0 for k in before)} -> "
        f"{sum(k.spills > 0 for k in after)}"
    )
    return "\n".join(lines)


def cuobjdump(option: str, file: Path, architecture: str) -> str:
    select = [] if file.suffix == ".cubin" else ["-arch", architecture]
    run = subprocess.run(["cuobjdump", option, *select, str(file)], capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(f"cuobjdump {option} {file} failed: {run.stderr.strip()}")
    return run.stdout


def files_of(build: Path, folder: Path) -> list[Path]:
    """The files with machine code; those of a wheel are unpacked to folder."""
    if build.suffix == ".whl":
        with zipfile.ZipFile(build) as wheel:
            wheel.extractall(folder)
        build = folder
    if build.is_dir():
        return sorted(p for p in build.rglob("*") if p.suffix in SUFFIXES and "cpu" not in p.stem)
    return [build]


def kernels_of(build: Path, architecture: str) -> list[Kernel]:
    opcodes: dict[str, Counter] = {}
    registers: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for file in files_of(build, Path(folder)):
            opcodes |= read_sass(cuobjdump("-sass", file, architecture), architecture)
            registers |= read_registers(cuobjdump("-res-usage", file, architecture))
    if not opcodes:
        raise SystemExit(f"{build} has no kernels for {architecture}")
    names = list(opcodes)
    return [
        Kernel(name, opcodes[mangled], registers.get(mangled))
        for mangled, name in zip(names, demangle(names), strict=True)
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--arch", default="sm_87", help="the GPUs, sm_87 by default")
    parser.add_argument("--all", action="store_true", help="every kernel and opcode")
    options = parser.parse_args(arguments)
    before, after = (kernels_of(p, options.arch) for p in (options.before, options.after))
    print(report(before, after, options.all))
    return 0


if __name__ == "__main__":
    sys.exit(main())
