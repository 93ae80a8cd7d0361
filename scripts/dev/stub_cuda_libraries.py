"""Lets a torch with CUDA be imported without NVIDIA's libraries, for tests on the CPU.

``pip install --no-deps torch`` leaves out gigabytes of libraries (cuBLAS, cuDNN, NCCL, ...) that
torch's own link, although nothing of them runs without a GPU. This puts in their place libraries
with the same names and symbols, whose functions only return an error code. libcudart is not among
them: pip install the one that torch names.

    python scripts/dev/stub_cuda_libraries.py .../site-packages/torch/lib

Needs gcc and binutils.
"""

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path


def lines(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def dynamic_symbols(library, which):
    """(name, version or None) of the symbols that a library defines or needs."""
    for line in lines("nm", "-D", which, "--with-symbol-versions", str(library)):
        name, _, version = line.split()[-1].replace("@@", "@").partition("@")
        yield name, version or None


def version_owners(library):
    """(version, library that must define it), for example (libcublas.so.12, libcublas.so.12)."""
    owner = None
    for line in lines("readelf", "-VW", str(library)):
        if match := re.search(r"File: (\S+)", line):
            owner = match[1]
        elif owner and (match := re.search(r"Name: (\S+) .*Flags", line)):
            yield match[1], owner


def main(folder: Path) -> None:
    libraries = sorted(folder.glob("*.so*"))
    needed, undefined, defined, owners = set(), set(), set(), {}
    for library in libraries:
        headers = lines("readelf", "-dW", str(library))
        needed |= {m[1] for line in headers if (m := re.search(r"\(NEEDED\).*\[(.*)\]", line))}
        undefined |= set(dynamic_symbols(library, "--undefined-only"))
        defined |= {name for name, _ in dynamic_symbols(library, "--defined-only")}
        owners.update(version_owners(library))
    absent = needed - {library.name for library in libraries}
    missing = sorted(name for name in absent if re.match(r"lib(cu(?!da(rt)?\.)|nccl|nv)", name))
    symbols = {library: defaultdict(set) for library in missing}  # by version
    for name, version in undefined:
        if owners.get(version) in symbols:
            symbols[owners[version]][version].add(name)
        elif version is None and re.match(r"(cu|nccl|nv)", name) and name not in defined:
            symbols[missing[0]][None].add(name)  # found in any library that is loaded
    for library, versions in symbols.items():
        names = sorted(set().union(*versions.values()))
        script = "".join(
            f"{version} {{ global: {'; '.join(sorted(those))}; }};\n"
            for version, those in versions.items()
            if version is not None
        )
        with tempfile.TemporaryDirectory() as work:
            source, version_script = Path(work, "stub.c"), Path(work, "stub.map")
            source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in names))
            version_script.write_text(script)
            options = ["-w", "-shared", "-fPIC", f"-Wl,-soname,{library}"]
            if script:
                options.append(f"-Wl,--version-script={version_script}")
            command = ["gcc", *options, "-o", str(folder / library), str(source)]
            subprocess.run(command, check=True)
        print(f"{library}: {len(names)} functions that only return an error")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
