"""Lays this library out as a kernel of the Hugging Face Hub, a folder that `kernels` loads.

    python scripts/dev/build_hub.py WHEEL... [--output dist/hub/causal-conv1d]

Each WHEEL, which may also be the folder of the installed package or one of wheels, becomes a
variant for the CPU of its machine and, if the CUDA library is in it, one for CUDA there. Needs
readelf (binutils); nothing is fetched, and neither torch nor `kernels` is needed.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import wheel_files
from check_wheel import CUDART, device_code, output_of
from wheel_files import Problem

ROOT = Path(__file__).resolve().parents[2]
# What this form has of its own, or instead of the package's.
HUB = Path(__file__).resolve().parent / "hub"
NAME = "causal-conv1d"
VERSION = 1  # to be raised with changes of the interface that break a caller
TORCH = "29"  # the first with a stable C interface to register through
KERNELS = "0.16.0"  # the first that knows variants for that interface
MACHINES = {62: "x86_64", 183: "aarch64"}  # by their number in an ELF header
OWN = ("_version.py", "_commit.py")  # of the same sources, each build's own
CPU, CUDA = "libcausal_conv1d_cpu.so", "libcausal_conv1d_cuda.so"


def expanded(paths: list[Path]) -> list[Path]:
    """The paths, with the wheels in each folder of wheels in its place."""
    found = []
    for path in paths:
        wheels = sorted(path.glob("causal_conv1d-*.whl")) if path.is_dir() else []
        found += wheels or [path]
    return found


def unpacked(path: Path, folder: Path) -> Path:
    """The package's folder: path itself, or what the wheel there has, extracted into folder."""
    package = path
    if not path.is_dir():
        with wheel_files.opened(path) as wheel:
            names = [name for name in wheel.namelist() if name.startswith("causal_conv1d/")]
            wheel.extractall(folder, names)
        package = folder / "causal_conv1d"
    if not (package / CPU).exists() or not (package / "_ops.py").exists():
        raise Problem(
            f"{path} has no {CPU} or no _ops.py: give wheels of this version of causal_conv1d, or "
            f"the folder of the installed package"
        )
    return package


def python_files(package: Path) -> dict[str, bytes]:
    """By path, __init__.py and the modules that it imports, directly or by way of others."""
    found, wanted = {}, ["__init__.py"]
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        source = HUB / name if (HUB / name).exists() else package / name
        if name == "_commit.py" and not source.exists():  # wheels alone have it
            continue
        found[name] = source.read_bytes()
        for node in ast.walk(ast.parse(found[name])):
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                wanted += imported(package, Path(name), node)
    return found


def imported(package: Path, importer: Path, node: ast.ImportFrom) -> list[str]:
    """The paths of the modules that a relative import in a file loads, packages on the way too."""
    folder = importer.parents[node.level - 1].joinpath(*(node.module or "").split("."))
    names = [folder / alias.name for alias in node.names]
    modules = [path for path in (folder, *names) if is_module(package, path)]
    if not modules:  # one that is missing, which will be told
        modules = [folder if node.module else names[0]]
    paths = []
    for module in modules:
        if (package / module).is_dir():
            paths.append(module / "__init__.py")
        else:
            paths.append(module.with_suffix(".py"))
            if module.parent != Path("."):
                paths.append(module.parent / "__init__.py")
    return [path.as_posix() for path in paths]


def is_module(package: Path, path: Path) -> bool:
    """Whether a package has it, or the kernel here; _commit.py may be missing."""
    if path == Path("."):
        return False
    files = (path.with_suffix(".py"), path / "__init__.py")
    here = any((root / file).exists() for root in (HUB, package) for file in files)
    return here or path.name == "_commit"


def machine_of(library: Path) -> str:
    number = int.from_bytes(library.read_bytes()[18:20], "little")
    if number not in MACHINES:
        raise Problem(f"{library} is for neither of {', '.join(MACHINES.values())}")
    return MACHINES[number]


def cuda_version(library: Path) -> str:
    """The major version of CUDA whose runtime a library links; it does with any minor one."""
    found = CUDART.search(output_of("readelf", "-dW", library))
    if found is None:
        raise Problem(f"{library} does not link libcudart.so")
    return found[1]


def architectures(library: Path) -> list[str]:
    """Compute capabilities as ``kernels`` writes them: 8.7 for sm_87, 8.0+PTX for compute_80."""
    found = []
    for code in sorted(set().union(*device_code(library))):
        kind, number = code.split("_")
        found.append(f"{number[:-1]}.{number[-1]}" + ("+PTX" if kind == "compute" else ""))
    return sorted(found, key=lambda text: float(text.removesuffix("+PTX")))


def variants_of(package: Path):
    """(name, backend as metadata has it, files) of each variant that a package's folder makes."""
    files = python_files(package) | {CPU: (package / CPU).read_bytes()}
    system = f"{machine_of(package / CPU)}-linux"
    yield f"torch-stable-abi{TORCH}-cpu-{system}", {"type": "cpu"}, files
    library = package / CUDA
    if library.exists():
        backend = {"type": "cuda", "archs": architectures(library)}
        name = f"torch-stable-abi{TORCH}-cu{cuda_version(library)}0-{system}"
        yield name, backend, files | {CUDA: library.read_bytes()}


def collect(paths: list[Path]) -> dict:
    """(backend, files) by the variant's name; for a machine's CPU the first wheel's."""
    variants, given_by, python = {}, {}, None
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            for name, backend, files in variants_of(unpacked(path, Path(folder))):
                same = {n: files[n] for n in files if n.endswith(".py") and n not in OWN}
                python = python or same
                if same != python:
                    raise Problem(f"{paths[0]} and {path} are of different versions")
                if name in variants and backend["type"] == "cuda":
                    raise Problem(f"{given_by[name]} and {path} both make {name}: give one")
                variants.setdefault(name, (backend, files))
                given_by.setdefault(name, path)
    return variants


def hash_of(variants: dict) -> str:
    """Tells apart what was built from other sources, or in another way."""
    total = hashlib.sha256()
    for name, (_, files) in sorted(variants.items()):
        for file, data in sorted(files.items()):
            total.update(f"{name}/{file} {hashlib.sha256(data).hexdigest()}\n".encode())
    return total.hexdigest()[:10]


def metadata(backend: dict, files: dict, build: str) -> dict:
    """id names the module and torch's namespace of operators; programs that torch.export saved hold
    it, so it is the same on every machine."""
    digests = {n: base64.b64encode(hashlib.sha256(files[n]).digest()).decode() for n in files}
    return {
        "id": f"_causal_conv1d_{backend['type']}_{build}",
        "name": NAME,
        "version": VERSION,
        "license": "mit",
        "kernels-minver": KERNELS,
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": dict(sorted(digests.items()))},
    }


def write(variants: dict, output: Path) -> None:
    own = {"build", "README.md", "LICENSE"}
    wheel_files.make_folder(output, "--output")
    if not {path.name for path in output.iterdir()} <= own:
        raise Problem(f"{output} has other files: give --output a folder that is empty or new")
    shutil.rmtree(output / "build", ignore_errors=True)
    build = hash_of(variants)
    for name, (backend, files) in variants.items():
        folder = output / "build" / name
        folder.mkdir(parents=True)
        for file, data in files.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(data)
        text = json.dumps(metadata(backend, files, build), indent=2)
        (folder / "metadata.json").write_text(text + "\n")
    shutil.copyfile(HUB / "README.md", output / "README.md")
    shutil.copyfile(ROOT / "LICENSE", output / "LICENSE")


@wheel_files.exits_with_a_sentence
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / "hub" / NAME)
    options = parser.parse_args(arguments)
    variants = collect(expanded(options.wheel))
    write(variants, options.output)
    for name in sorted(variants):
        print(options.output / "build" / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
