"""Checks wheels and source distributions before they are given away, by the packagers' own tools.

    pip install twine check-wheel-contents 'auditwheel>=6.8'
    python3 scripts/dev/check_release.py [FILE or FOLDER ...]      # default: dist/

twine check --strict: the metadata and how the README is shown. check-wheel-contents: files that do
not belong. auditwheel show: the glibc and libstdc++ that are needed are not newer than the wheel's
tag says, and no library is linked but libcudart, which torch brings. What a wheel's libraries hold
is for check_wheel.py.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import check_wheel
import wheel_files

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {
    "twine": "twine",
    "check_wheel_contents": "check-wheel-contents",
    "auditwheel": "'auditwheel>=6.8'",
}


def run(tool: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def top_level() -> str:
    """What a wheel installs beside its metadata, for check-wheel-contents."""
    modules = [path.name for path in ROOT.glob("*.py") if path.name != "setup.py"]
    packages = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    return ",".join(sorted(modules + packages))


def glibc_of(tag: str) -> tuple[int, int]:
    """(2, 28) of manylinux_2_28_x86_64; of linux_*, which says nothing, what any may need."""
    found = re.match(r"manylinux_(\d+)_(\d+)_", tag)
    return (int(found[1]), int(found[2])) if found else check_wheel.NEWEST["GLIBC"]


def audit(wheel: Path):
    """What auditwheel finds wrong."""
    shown = run("auditwheel", "show", "--json", wheel)
    if shown.returncode != 0:
        yield shown.stdout + shown.stderr
        return
    facts = json.loads(shown.stdout)
    tag = wheel.stem.split("-")[-1]
    print(f"{wheel.name}: auditwheel allows {facts['sym_tag']} by its symbols")
    needs_newer = glibc_of(facts["sym_tag"]) > glibc_of(tag)
    if needs_newer or facts["sym_tag"].startswith("linux_"):
        yield f"its libraries need {facts['sym_tag']}, and its tag is {tag}"
    for library in facts["external_libs"]:
        if not check_wheel.CUDART.fullmatch(library):
            yield f"it links {library}"
    if facts["unsupported_isa"]:
        yield "it needs a processor newer than its tag says"


def problems_of(file: Path):
    try:  # the tools show a traceback
        if file.suffix == ".whl":
            wheel_files.parse_name(file)
        wheel_files.metadata(file)
    except (wheel_files.Problem, OSError) as problem:
        yield str(problem)
        return
    checked = run("twine", "check", "--strict", file)
    if checked.returncode != 0:
        yield checked.stdout + checked.stderr
    if file.suffix != ".whl":
        return
    checked = run("check_wheel_contents", "--no-config", "--toplevel", top_level(), file)
    if checked.returncode != 0:
        yield checked.stdout + checked.stderr
    yield from audit(file)


@wheel_files.exits_with_a_sentence
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", type=Path, nargs="*", default=[ROOT / "dist"])
    files, paths = [], parser.parse_args(arguments).paths
    for path in paths:
        folder = [*path.glob("*.whl"), *path.glob("*.tar.gz")]
        files += sorted(folder) if path.is_dir() else [path]
    missing = [name for tool, name in TOOLS.items() if importlib.util.find_spec(tool) is None]
    problems = [f"{sys.executable} lacks a tool: pip install {' '.join(missing)}"] * bool(missing)
    absent = [f"there is no {path}" for path in paths if not path.exists()]
    problems += absent
    if not absent and not any(file.suffix == ".whl" for file in files):
        problems.append("there is no wheel to check")
    for file in files if not problems else []:
        found = [f"{file.name}: {problem.strip()}" for problem in problems_of(file)]
        print(f"{file.name}: {'wrong' if found else 'right'}")
        problems += found
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
