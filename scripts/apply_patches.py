"""Applies patches/ to mamba_ssm 2.2.4, and to Mamba-YOLO where there is one.

    python scripts/apply_patches.py [--dry-run] [--revert] [--mamba-ssm DIR] [--mamba-yolo DIR]

Every hunk of every file is checked before anything changes, so either all files are changed or
none. Beside each its original is kept as FILE.orig. Files that are patched already stay as they
are. ``--revert`` takes the patches out again. The exit status is 0 if all files are as asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

PATCHES = Path(__file__).resolve().parent.parent / "patches"
MAMBA_SSM = ("0001-fix-libc10-so-dependency.patch", "0002-fix-torch-distributed-api.patch")
MAMBA_YOLO = ("0003-fix-selective-scan-cuda-core.patch",)
VERSION = "2.2.4"


class PatchError(Exception):
    """What is wrong, for the user; nothing has been changed."""


@dataclasses.dataclass
class Hunk:
    start: int  # of the old lines, from 0
    old: list[bytes]
    new: list[bytes]

    def reversed(self) -> Hunk:
        return Hunk(self.start, self.new, self.old)


def read_patch(path: Path) -> dict[str, list[Hunk]]:
    """The hunks of a patch in git's format, by the file that they are for."""
    hunks: dict[str, list[Hunk]] = {}
    name, wanted = None, (0, 0)
    for line in path.read_bytes().splitlines(keepends=True):
        header = re.match(rb"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@", line)
        if line.startswith(b"+++ b/"):
            name = line[6:].decode().strip()
        elif header:
            first, *counts = header.groups()
            wanted = tuple(int(count or 1) for count in counts)
            hunks.setdefault(name, []).append(Hunk(int(first) - 1, [], []))
        elif any(wanted):
            hunk = hunks[name][-1]
            if line[:1] in b" -":
                hunk.old.append(line[1:])
            if line[:1] in b" +":
                hunk.new.append(line[1:])
            wanted = (wanted[0] - (line[:1] in b" -"), wanted[1] - (line[:1] in b" +"))
    return hunks


def apply_hunks(content: bytes, hunks: list[Hunk]) -> bytes:
    """The content with the hunks applied, each at the place nearest to its own that has its lines.

    Raises PatchError with the number of the first hunk that has no place.
    """
    lines, result, done, shift = content.splitlines(keepends=True), [], 0, 0
    for number, hunk in enumerate(hunks, 1):
        length, expected = len(hunk.old), hunk.start + shift
        places = [i for i in range(done, len(lines)) if lines[i : i + length] == hunk.old]
        if not places:
            raise PatchError(f"hunk {number} of {len(hunks)}, at line {hunk.start + 1}")
        place = min(places, key=lambda i: abs(i - expected))
        shift = place - hunk.start
        result += lines[done:place] + hunk.new
        done = place + length
    return b"".join(result + lines[done:])


def change(path: Path, patch: Path, hunks: list[Hunk], revert: bool) -> bytes | None:
    """What the file is to become, or None if it is so already."""
    if not path.is_file():
        raise PatchError(f"{path} is missing")
    content = path.read_bytes()
    hunks, undone = hunks, [hunk.reversed() for hunk in hunks]
    if revert:
        hunks, undone = undone, hunks
    try:
        return apply_hunks(content, hunks)
    except PatchError as problem:
        try:
            apply_hunks(content, undone)
        except PatchError:
            state = "reverted" if revert else "applied"
            raise PatchError(
                f"{patch.name} cannot be {state} to {path}: {problem}, does not fit; the file is "
                "neither as released nor as patched"
            ) from None
        return None


def version_of(folder: Path) -> str:
    found = re.search(
        r"""^__version__ = ["'](.+?)["']""", (folder / "__init__.py").read_text(), re.MULTILINE
    )
    return found.group(1) if found else "of unknown version"


def find_package(name: str, given: Path | None) -> Path | None:
    """The package's folder: in the folder given, else the installed one, which is not imported."""
    if given is not None:
        if not (given / name / "__init__.py").is_file():
            raise PatchError(f"there is no {name}/__init__.py in {given}")
        return given / name
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def targets(mamba_ssm: Path | None, mamba_yolo: Path | None) -> list[tuple[Path, Path]]:
    """(patch, folder it is relative to) of each patch that has something to apply to."""
    found = []
    package = find_package("mamba_ssm", mamba_ssm)
    if package is not None:
        version = version_of(package)
        if version != VERSION:
            raise PatchError(
                f"the mamba_ssm in {package} is {version}, and the patches are for {VERSION}"
            )
        found += [(PATCHES / name, package.parent) for name in MAMBA_SSM]
    yolo = find_package("ultralytics", mamba_yolo)
    scan = "nn/modules/common_utils_mbyolo.py"
    if yolo is not None and (mamba_yolo is not None or (yolo / scan).is_file()):
        found += [(PATCHES / name, yolo.parent) for name in MAMBA_YOLO]
    if not found:
        raise PatchError("neither mamba_ssm nor Mamba-YOLO is installed; give their folders")
    return found


def backup_of(path: Path) -> Path:
    return path.with_name(path.name + ".orig")


def write(path: Path, content: bytes) -> None:
    """Replaces the file: a hard link to it, as from an installer's cache, keeps its content."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(content)
    shutil.copymode(path, new)
    os.replace(new, path)


def write_all(changes: dict[Path, bytes], revert: bool) -> None:
    before = {path: path.read_bytes() for path in changes}
    if not revert:
        for path, content in before.items():
            backup = backup_of(path)
            if backup.exists() and backup.read_bytes() != content:
                raise PatchError(f"{backup} is in the way: it is no copy of {path.name}")
    done = []
    try:
        for path, content in changes.items():
            backup = backup_of(path)
            if not revert and not backup.exists():
                shutil.copy2(path, backup)
            done.append(path)
            write(path, content)
            if revert and backup.exists() and backup.read_bytes() == content:
                backup.unlink()
    except OSError as problem:
        for path in done:
            if path.read_bytes() != before[path]:
                write(path, before[path])
        raise PatchError(f"nothing was changed: {problem}") from None


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description="Patches mamba_ssm 2.2.4 and Mamba-YOLO; see patches/."
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, change nothing")
    parser.add_argument("--revert", action="store_true", help="take the patches out again")
    parser.add_argument(
        "--mamba-ssm", type=Path, help="folder that holds mamba_ssm/ (default: the installed one)"
    )
    parser.add_argument(
        "--mamba-yolo", type=Path, help="folder that holds Mamba-YOLO's ultralytics/"
    )
    options = parser.parse_args(arguments)
    changes, unchanged = {}, []
    try:
        for patch, root in targets(options.mamba_ssm, options.mamba_yolo):
            for name, hunks in read_patch(patch).items():
                content = change(root / name, patch, hunks, options.revert)
                if content is None:
                    unchanged.append(root / name)
                else:
                    changes[root / name] = content
        if not options.dry_run:
            write_all(changes, options.revert)
    except PatchError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    verb = "reverted" if options.revert else "patched"
    for path in unchanged:
        print(f"{'not patched' if options.revert else 'already patched'}: {path}")
    for path in changes:
        print(f"{'would be ' if options.dry_run else ''}{verb}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
