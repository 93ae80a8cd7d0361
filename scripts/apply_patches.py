"""Applies patches/ to mamba_ssm 2.2.4, and to Mamba-YOLO where there is one.

    python scripts/apply_patches.py [--dry-run] [--revert] [--mamba-ssm DIR] [--mamba-yolo DIR]

Every hunk of every file is checked before anything changes, so either all files are changed or
none, also if a disk is full or Ctrl-C is pressed. Beside each its original is kept as FILE.orig.
Files that are patched already stay as they are, so after a power failure the same command finishes
the work. ``--revert`` takes the patches out again. The exit status is 0 if all files are as asked
for. The files' encodings and line endings may be any; they are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

PATCHES = Path(__file__).resolve().parent.parent / "patches"
MAMBA_SSM = ("0001-fix-libc10-so-dependency.patch", "0002-fix-torch-distributed-api.patch")
MAMBA_YOLO = ("0003-fix-selective-scan-cuda-core.patch",)
VERSION = "2.2.4"
BACKUP = ".orig"
UTF8_MARK = b"\xef\xbb\xbf"


class PatchError(Exception):
    """What is wrong, for the user; unless the text says otherwise nothing has been changed."""


def backup_of(path: Path) -> Path:
    return path.with_name(path.name + BACKUP)


# A hunk: the number of its first old line, from 0, and its lines, each with its sign (b" ", b"-" or
# b"+") and without its line ending.
Hunk = tuple[int, list[tuple[bytes, bytes]]]


def reversed_hunk(hunk: Hunk) -> Hunk:
    start, lines = hunk
    return start, [({b"-": b"+", b"+": b"-"}.get(sign, sign), text) for sign, text in lines]


def read_patch(path: Path) -> dict[str, list[Hunk]]:
    """The hunks of a patch in git's format, by the file that they are for."""
    hunks: dict[str, list[Hunk]] = {}
    name, old, new = None, 0, 0  # how many lines of the hunk are still to come
    for line in path.read_bytes().splitlines():
        sign, text = line[:1], line[1:]
        header = re.match(rb"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@", line)
        if line.startswith(b"+++ b/"):
            name = line[6:].decode().strip()
        elif header:
            start, old, new = (int(number or 1) for number in header.groups())
            hunks.setdefault(name, []).append((start - 1, []))
        elif (old or new) and sign in (b" ", b"-", b"+"):
            hunks[name][-1][1].append((sign, text))
            old -= sign != b"+"
            new -= sign != b"-"
    return hunks


def apply_hunks(content: bytes, hunks: list[Hunk]) -> bytes:
    """The content with the hunks applied, each at the place nearest to its own that has its lines.

    What a hunk does not name stays as it is, byte for byte: lines are compared without their
    endings, new lines end as the one at their hunk's beginning does, and a byte order mark is no
    part of the first line. Raises PatchError with the number of the first hunk that has no place.
    """
    mark = UTF8_MARK if content.startswith(UTF8_MARK) else b""
    lines = content.removeprefix(mark).splitlines(keepends=True)
    texts = [line.rstrip(b"\r\n") for line in lines]
    result, done, shift = [], 0, 0
    for number, (start, changes) in enumerate(hunks, 1):
        before = [text for sign, text in changes if sign != b"+"]
        places = [i for i in range(done, len(lines)) if texts[i : i + len(before)] == before]
        if not places:
            raise PatchError(f"hunk {number} of {len(hunks)}, at line {start + 1}")
        place = min(places, key=lambda i: abs(i - start - shift))
        shift = place - start
        result += lines[done:place]
        done = place
        ending = lines[place][len(texts[place]) :] or b"\n"
        for sign, text in changes:
            if sign == b"+":
                if result and not result[-1].endswith((b"\r", b"\n")):
                    result.append(ending)  # which the file's last line has not
                result.append(text + ending)
            else:
                result += [lines[done]] if sign == b" " else []
                done += 1
    joined = mark + b"".join(result + lines[done:])
    if lines and lines[-1] == texts[-1]:  # the last line still has no ending
        return joined.removesuffix(b"\n").removesuffix(b"\r")
    return joined


def change(path: Path, patch: Path, hunks: list[Hunk], revert: bool) -> bytes | None:
    """What the file is to become, or None if it is so already."""
    if path.is_symlink():
        raise PatchError(f"{path} is a symbolic link; put a copy of the file in its place")
    if not path.is_file():
        raise PatchError(f"{path} is missing")
    content, backup = path.read_bytes(), backup_of(path)
    if revert and backup.is_file():
        # Where nothing else has changed the backup tells what no patch does: each line's ending.
        original = backup.read_bytes()
        with contextlib.suppress(PatchError):
            if apply_hunks(original, hunks) == content:
                return original
    undone = [reversed_hunk(hunk) for hunk in hunks]
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
    text = (folder / "__init__.py").read_bytes().removeprefix(UTF8_MARK)
    found = re.search(rb"""^__version__ = ["'](.+?)["']""", text, re.MULTILINE)
    return found.group(1).decode(errors="replace") if found else "of unknown version"


def find_package(name: str, given: Path | None) -> Path | None:
    """The package's folder: in the folder given, else the installed one, which is not imported."""
    if given is not None:
        if not (given / name / "__init__.py").is_file():
            raise PatchError(f"there is no {name}/__init__.py in {given}")
        return given / name
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # pip leaves a folder behind, with the backups
        return None
    return Path(spec.origin).parent


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


def with_backups(changes: dict[Path, bytes], revert: bool) -> dict[Path, bytes | None]:
    """What is to become of the files and of their backups; None is to be no file."""
    wanted: dict[Path, bytes | None] = {}
    for path, content in changes.items():
        if not (os.access(path, os.W_OK) and path.stat().st_mode & 0o222):
            raise PatchError(f"{path} is read-only")
        backup, original = backup_of(path), path.read_bytes()
        if revert:
            wanted[path] = content
            if backup.is_file() and backup.read_bytes() == content:
                wanted[backup] = None
        elif not os.path.lexists(backup):
            wanted |= {backup: original, path: content}  # no file is ever without its backup
        elif backup.is_file() and backup.read_bytes() == original:
            wanted[path] = content
        else:
            raise PatchError(f"{backup} is in the way: it is no copy of {path.name}")
    return wanted


def write_like(path: Path, content: bytes, model: Path) -> None:
    """A new file with the content, and the model's mode, owner and attributes."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    status = model.stat()
    os.chown(path, status.st_uid, status.st_gid)
    shutil.copystat(model, path)


def put_back(saved: Path, path: Path) -> None:
    try:
        if saved.exists():
            os.replace(saved, path)
        else:
            path.unlink(missing_ok=True)
    except OSError as problem:
        raise PatchError(f"{path} could not be put back as it was: {problem}") from None


def write_all(wanted: dict[Path, bytes | None]) -> None:
    """Makes every file what is wanted; if anything is raised on the way, every one is as before.

    First all is written under other names: then only renames are left, there and back. Files are
    replaced, so a hard link to one, as from an installer's cache, keeps its content.
    """
    with contextlib.ExitStack() as folders, contextlib.ExitStack() as undo:
        steps = []
        for path, content in wanted.items():
            folder = tempfile.TemporaryDirectory(
                prefix=".apply_patches-", dir=path.parent, ignore_cleanup_errors=True
            )
            beside = Path(folders.enter_context(folder))
            new, saved = beside / "new", beside / "saved"
            if path.exists():
                write_like(saved, path.read_bytes(), path)
            if content is not None:
                write_like(new, content, path if path.exists() else path.with_suffix(""))
                os.utime(new)  # by its time Python knows that the compiled file is old
            steps.append((path, new, saved))
        for path, new, saved in steps:
            undo.callback(put_back, saved, path)
            if new.exists():
                os.replace(new, path)
            else:
                path.unlink()
        undo.pop_all()


@contextlib.contextmanager
def signals_held():
    """Ctrl-C and kill take effect at the end."""
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
        wanted = with_backups(changes, options.revert)
        if not options.dry_run:
            with signals_held():
                write_all(wanted)
    except OSError as problem:
        print(f"error: nothing was changed: {problem}", file=sys.stderr)
        return 1
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
