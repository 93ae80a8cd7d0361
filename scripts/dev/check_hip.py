"""Fails if the library for AMD GPUs is not what it should be; nothing of it is run.

usage: check_hip.py LIBRARY [--cuda libcausal_conv1d_cuda.so] [--architectures gfx90a,gfx942,...]

Checked: it links nothing of torch; it exports what the headers declare of the GPU's functions but
the scan's, and with --cuda exactly what that library does but those; each part of the device code
is there for every architecture, with the same kernels in it.
"""

import argparse
import re
import struct
import sys
from collections import defaultdict
from pathlib import Path

import wheel_files
from check_wheel import FORBIDDEN_SYMBOL, hardening_problems, output_of

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ("causal_conv1d.h", "selective_scan.h", "torch/register.h")
# The scan is left to torch's operations on AMD's GPUs.
SCAN = re.compile(r"causal_conv1d_cuda_(scan_\w+|state_update)")
KERNELS = {"forward", "backward", "update", "pool", "varlen_states", "packing"}
BUNDLE = b"__CLANG_OFFLOAD_BUNDLE__"
ENTRY = re.compile(r"hipv4-amdgcn-amd-amdhsa--(gfx\w+)$")
AMDGPU = 224  # an ELF file's machine
KERNEL = re.compile(rb"\0(_Z\w+)\.kd(?=\0)")  # the names of kernel descriptors, as a table has them
LANES = re.compile(rb"\.wavefront_size(.)", re.DOTALL)  # of each kernel


def code_objects(library: Path) -> dict:
    """By architecture, the code objects in the library, one for each source with kernels."""
    data = library.read_bytes()
    found = defaultdict(list)
    start = data.find(BUNDLE)
    while start >= 0:
        (count,) = struct.unpack_from("<Q", data, start + len(BUNDLE))
        at = start + len(BUNDLE) + 8
        for _ in range(count):
            offset, size, length = struct.unpack_from("<QQQ", data, at)
            entry = ENTRY.match(data[at + 24 : at + 24 + length].decode(errors="replace"))
            if entry is not None:  # else it is the host's
                found[entry[1]].append(data[start + offset : start + offset + size])
            at += 24 + length
        start = data.find(BUNDLE, at)
    return found


def exported(library: Path) -> set:
    lines = output_of("nm", "-D", "--defined-only", library).splitlines()
    return {line.split()[-1] for line in lines}


def declared() -> set:
    """The functions of a GPU library, as the headers have them."""
    text = "".join((ROOT / "csrc" / name).read_text() for name in HEADERS)
    return set(re.findall(r"\b(causal_conv1d_(?:cuda_\w+|register_cuda))\(", text))


def kernels_of(code: bytes) -> set:
    return set(KERNEL.findall(code))


def problems_of(library: Path, cuda: Path | None, architectures: list):
    """In words, each problem; what was found is printed."""
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output_of("readelf", "-dW", library))
    print(f"links {', '.join(needed)}; {library.stat().st_size} bytes")
    for name in needed:
        if re.match(r"lib(torch|c10)", name):
            yield f"it links {name}"
    if not any(name.startswith("libamdhip64.so") for name in needed):
        yield "it does not link libamdhip64.so"
    for line in output_of("nm", "-D", "--undefined-only", library).splitlines():
        if FORBIDDEN_SYMBOL.search(line.split()[-1]):
            yield f"it needs {line.split()[-1]}"
    yield from hardening_problems(library)

    names = exported(library)
    for source, wanted in (("the headers", declared()), (cuda, cuda and exported(cuda))):
        if wanted is None:
            continue
        wanted = {name for name in wanted if not SCAN.fullmatch(name)}
        print(f"exports {len(names)} functions, {len(names & wanted)} of {len(wanted)} of {source}")
        for name in sorted(names ^ wanted):
            yield f"{name} is {'not in' if name in names else 'missing, unlike in'} {source}"

    found = code_objects(library)
    for name in sorted(set(architectures) ^ set(found)):
        yield f"there is {'unwanted' if name in found else 'no'} code for {name}"
    listed = {name: [kernels_of(code) for code in codes] for name, codes in found.items()}
    for name, codes in found.items():
        lanes = {found[0] for code in codes for found in LANES.findall(code)}
        kernels = set().union(*listed[name])
        size = sum(map(len, codes))
        print(
            f"{name}: {len(codes)} code objects, {len(kernels)} kernels, {size} bytes, waves of "
            f"{', '.join(str(each) for each in sorted(lanes))} lanes"
        )
        if any(struct.unpack_from("<4s14xH", code) != (b"\x7fELF", AMDGPU) for code in codes):
            yield f"the code for {name} is not AMD's"
        if lanes != {32 if name.startswith("gfx1") else 64}:
            yield f"the waves of {name} have {sorted(lanes)} lanes"
        for kernel in KERNELS:
            if not any(kernel.encode() in each for each in kernels):
                yield f"there is no kernel of {kernel} for {name}"
        if listed[name] != next(iter(listed.values())):
            yield f"{name} has other kernels than {next(iter(listed))}"


def main(arguments) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--cuda", type=Path)
    parser.add_argument("--architectures", default="gfx90a,gfx942,gfx1100")
    args = parser.parse_args(arguments)
    try:
        problems = list(problems_of(args.library, args.cuda, args.architectures.split(",")))
    except (OSError, wheel_files.Problem) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"error: {args.library.name}: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
