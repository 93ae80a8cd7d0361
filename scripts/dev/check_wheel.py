"""Fails if a wheel would not load where it is meant to, is open to attacks, or is too large.

usage: check_wheel.py WHEEL [--cuda] [--cuobjdump PROGRAM]

--cuda: the CUDA library must be in it. --cuobjdump: compare what is read here of the embedded
device code with what this program of NVIDIA's lists.

Checked: the tag; for each library its machine, the libraries that it links, its undefined symbols
(none of torch or Python), the versions of glibc and libstdc++ that it needs, that it exports the C
interface alone, full RELRO, a stack that is not executable, no path of the machine that built it;
sm_87 in every part of the device code, and PTX in all but two of them; the size.
"""

import argparse
import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import wheel_files

MACHINES = {"x86_64": "Advanced Micro Devices X86-64", "aarch64": "AArch64"}
# Always there: glibc's and GCC's. libcudart is the one that torch has loaded.
ALLOWED_LIBRARY = re.compile(
    r"(libc|libm|libdl|libpthread|librt)\.so\.\d|libgcc_s\.so\.1|libstdc\+\+\.so\.6|ld-linux-.*"
)
CUDART = re.compile(r"libcudart\.so\.(\d+)")
# Functions of torch are looked up at run time; mangled names hold their namespaces.
FORBIDDEN_SYMBOL = re.compile(r"c10|torch|aoti|^_?Py[A-Z_]|\d+at[0-9N]")
# What every wheel must do with, and its tag (PEP 600) by auditwheel's policies.
MANYLINUX = "manylinux_2_28"
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0)}
# An absolute name of a source, as of __FILE__ and in debug information.
SOURCE_PATH = re.compile(
    rb"(?<![\w.+-])/[\w.+@~-]{2,}(?:/[\w.+@~-]+)+\.(?:cc?|cpp|cxx|cuh?|h|hpp|inl|ptx)\b"
)
# Where this machine builds: check_wheel.py runs where the wheel was made.
FOLDERS = (Path(__file__).resolve().parents[2], os.path.expanduser("~"), tempfile.gettempdir())
BINUTILS = ("readelf", "nm")
# Bytes: with sm_87 and PTX alone, and with more.
SMALL, LARGE = 5_600_000, 27_000_000


def output_of(*command) -> str:
    english = os.environ | {"LC_ALL": "C"}
    program, file = Path(command[0]).name, command[-1]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=english)
    except OSError:
        hint = ": apt-get install binutils" if program in BINUTILS else ""
        raise wheel_files.Problem(f"there is no program {command[0]}{hint}") from None
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise wheel_files.Problem(f"{program} cannot read {Path(file).name}: {said}")
    return done.stdout


def version_needs(library: Path) -> str:
    """Which versions it needs of which library, as readelf tells it."""
    return output_of("readelf", "-VW", library)


def needed_versions(library: Path) -> dict:
    """The newest version of each kind that a library needs: {"GLIBC": (2, 34), ...}."""
    newest = {}
    for kind, text in re.findall(r"Name: ([A-Z]+)_([\d.]+)\b", version_needs(library)):
        version = tuple(map(int, text.split(".")))
        newest[kind] = max(newest.get(kind, ()), version)
    return newest


def manylinux_tag(libraries) -> str:
    """The tag that holds for all libraries, without the machine: MANYLINUX, or linux."""
    needs = [item for library in libraries for item in needed_versions(library).items()]
    fits = all(version <= NEWEST.get(kind, ()) for kind, version in needs)
    return MANYLINUX if fits else "linux"


def device_code(library: Path) -> list[set]:
    """The device code embedded in a library: for each source file {"sm_87", "compute_80", ...}.

    Each source file gives the section .nv_fatbin one container: magic number, version, size of the
    header, size of what follows. That is a row of entries, each with kind (1 PTX, 2 machine code),
    size of its header, size of its data and, at byte 28, its architecture.
    """
    sections = output_of("readelf", "-SW", library)
    found = re.search(r" \.nv_fatbin +\S+ +[0-9a-f]+ +([0-9a-f]+) +([0-9a-f]+)", sections)
    if found is None:
        return []
    start, size = (int(text, 16) for text in found.groups())
    data = library.read_bytes()[start : start + size]
    containers, at = [], 0
    while at + 16 <= len(data):
        magic, _, header, length = struct.unpack_from("<IHHQ", data, at)
        if magic != 0xBA55ED50:
            at += 8  # padding
            continue
        codes, entry, end = set(), at + header, at + header + length
        while entry < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, entry)
            (architecture,) = struct.unpack_from("<I", data, entry + 28)
            codes.add(f"{'compute' if kind == 1 else 'sm'}_{architecture}")
            entry += entry_header + entry_size
        containers.append(codes)
        at = end
    return containers


def listed_by(cuobjdump: str, library: Path) -> set:
    """The same for the whole library, by NVIDIA's program."""
    elf = re.findall(r"\.(sm_\d+)[a-z]?\.cubin", output_of(cuobjdump, "--list-elf", library))
    ptx = re.findall(r"\.sm_(\d+)[a-z]?\.ptx", output_of(cuobjdump, "--list-ptx", library))
    return set(elf) | {f"compute_{number}" for number in ptx}


def paths_in(data: bytes) -> list[str]:
    """What tells of who built it: absolute names of sources, and folders of this machine."""
    found = set(SOURCE_PATH.findall(data))
    for folder in {os.fsencode(folder) for folder in FOLDERS} - {b"/", b"~"}:
        found |= set(re.findall(rb"(?<![\w.+-])" + re.escape(folder) + rb"/[\w./+@~-]*", data))
    return sorted(path.decode() for path in found)


def hardening_problems(library: Path):
    """What makes attacks easier, gets in the way of other libraries, or tells of the builder."""
    name = library.name
    segments, dynamic = output_of("readelf", "-lW", library), output_of("readelf", "-dW", library)
    stack = re.search(r"GNU_STACK +(?:0x\w+ +){5}([RWE ]+)", segments)
    if stack is None or "E" in stack[1]:
        yield f"{name} asks for an executable stack: link it with -Wl,-z,noexecstack"
    if "GNU_RELRO" not in segments or not re.search(r"BIND_NOW|Flags:.* NOW\b", dynamic):
        yield f"{name} has no full RELRO: link it with -Wl,-z,relro,-z,now"
    for path in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic):
        yield f"{name} looks for libraries in {path} (RPATH or RUNPATH)"
    for line in output_of("nm", "-D", "--defined-only", library).splitlines():
        symbol = line.split()[-1]
        if not symbol.startswith("causal_conv1d_"):
            yield f"{name} exports {symbol}, which is no part of the C interface"
    for path in paths_in(library.read_bytes()):
        yield f"{name} contains a path of the machine that built it: {path}"


def problems_of(library: Path, machine: str, cuobjdump):
    name = library.name
    header = output_of("readelf", "-hW", library)
    if MACHINES[machine] not in header:
        yield f"{name} is not for {machine}"
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "-dW", library))
    print(f"{name}: {library.stat().st_size:,} bytes, needs {' '.join(needed)}")
    for link in needed:
        if not ALLOWED_LIBRARY.fullmatch(link) and not (CUDART.fullmatch(link) and "cuda" in name):
            yield f"{name} links {link}"
    undefined = [
        line.split()[-1].partition("@")[0]
        for line in output_of("nm", "-D", "--undefined-only", library).splitlines()
    ]
    for symbol in undefined:
        if FORBIDDEN_SYMBOL.search(symbol):
            yield f"{name} has the undefined symbol {symbol}"
    if {"dlopen", "dlsym"} & set(undefined) and "File: libdl.so.2" not in version_needs(library):
        yield f"{name} takes dlopen or dlsym from libc.so.6, where none is before glibc 2.34"
    versions = needed_versions(library)
    words = [f"{kind} {'.'.join(map(str, version))}" for kind, version in sorted(versions.items())]
    print(f"  versions: {', '.join(words)}")
    for kind, version in versions.items():
        limit = NEWEST.get(kind, ())
        if version > limit:
            yield f"{name} needs {kind} {version}, but {limit} is the newest it may"
    yield from hardening_problems(library)
    if "cuda" not in name:
        return
    parts = device_code(library)
    codes = set().union(*parts)
    print(f"  device code of {len(parts)} sources: {' '.join(sorted(codes))}")
    machine_code = {code for code in codes if code.startswith("sm_")}
    for part in parts or [set()]:
        if part not in (codes, machine_code):
            yield f"{name}: one source has code for {sorted(part)} alone"
    if machine_code != codes and parts.count(machine_code) > 2:  # CMakeLists.txt's machine_sources
        yield f"{name}: {parts.count(machine_code)} sources have no PTX, and two may"
    if "sm_87" not in codes:
        yield f"{name} has no code for sm_87"
    if not any(code.startswith("compute_") for code in codes):
        yield f"{name} has no PTX"
    if cuobjdump:
        if listed_by(cuobjdump, library) != codes:
            yield f"{name}: {cuobjdump} lists {sorted(listed_by(cuobjdump, library))}"
        for path in paths_in(output_of(cuobjdump, "--dump-ptx", library).encode()):
            # The program's own heading names the library, not what is in it.
            if path != str(library):
                yield f"{name} has PTX with a path of the machine that built it: {path}"


@wheel_files.exits_with_a_sentence
def main(arguments) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--cuobjdump")
    options = parser.parse_args(arguments)
    wheel = options.wheel
    problems = []
    with wheel_files.opened(wheel):
        size = wheel.stat().st_size
    print(f"{wheel.name}: {size:,} bytes")
    python, abi, platform = wheel_files.parse_name(wheel).group("python", "abi", "platform")
    if (python, abi) != ("py3", "none"):
        problems.append(f"the tag is {python}-{abi}, not py3-none")
    tag = re.fullmatch(r"(linux|manylinux_\d+_\d+)_(x86_64|aarch64)", platform)
    if tag is None:
        raise wheel_files.Problem(f"{platform} is no tag for what is checked here")
    wanted = {"libcausal_conv1d_cpu.so"}
    if options.cuda:
        wanted.add("libcausal_conv1d_cuda.so")
    limit = SMALL
    with tempfile.TemporaryDirectory() as folder:
        with wheel_files.opened(wheel) as archive:
            files = archive.namelist()
            names = [name for name in files if ".so" in Path(name).suffixes]
            libraries = [Path(archive.extract(name, folder)) for name in names]
        for library in libraries:
            problems += problems_of(library, tag[2], options.cuobjdump)
            if any(codes - {"sm_87", "compute_80"} for codes in device_code(library)):
                limit = LARGE
        oldest = manylinux_tag(libraries)
        if tag[1] not in ("linux", oldest):
            problems.append(f"the tag is {platform}, but the libraries allow {oldest}_{tag[2]}")
    missing = wanted - {library.name for library in libraries}
    missing |= {"causal_conv1d/py.typed"} - set(files)  # type checkers look for it
    problems += [f"there is no {name}" for name in sorted(missing)]
    if size > limit:
        problems.append(f"the wheel is larger than {limit:,} bytes")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 1
    print(f"{wheel.name}: right")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
