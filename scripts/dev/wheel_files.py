"""Wheels and source distributions as files: their names, their metadata, and what is wrong."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

# name-version[-build]-python-abi-platform.whl, with a version as in PEP 440.
WHEEL_NAME = re.compile(
    r"""(?P<name>\w[\w.]*)
    -(?P<version>v?(?:\d+!)?\d+(?:\.\d+)*
        (?:[_.]?(?:alpha|beta|preview|pre|post|dev|rev|rc|a|b|c|r)[_.]?\d*)*
        (?:\+[a-z0-9]+(?:[_.][a-z0-9]+)*)?)
    (?:-\d[^-]*)?
    -(?P<python>[\w.]+)-(?P<abi>[\w.]+)-(?P<platform>[\w.]+)\.whl""",
    re.ASCII | re.IGNORECASE | re.VERBOSE,
)


class Problem(Exception):
    """A sentence for whoever runs a script."""


def exits_with_a_sentence(main):
    """Makes a Problem, or an error of the system, in main a line on stderr and exit status 1."""

    @functools.wraps(main)
    def wrapped(*arguments) -> int:
        try:
            return main(*arguments)
        except Problem as problem:
            text = problem
        except OSError as error:
            text = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"error: {text}", file=sys.stderr)
        return 1

    return wrapped


def parse_name(wheel: Path) -> re.Match:
    """The groups name, version, python, abi and platform of a wheel's name."""
    found = WHEEL_NAME.fullmatch(wheel.name)
    if found is None:
        raise Problem(
            f"{wheel.name} is no wheel's name, which is NAME-VERSION-PYTHON-ABI-PLATFORM.whl: "
            f"give it back the name that it was built with"
        )
    return found


def check_folder(path: Path) -> None:
    if path.is_file():
        raise Problem(f"{path} is a file: give the folder that it is in, {path.resolve().parent}")
    if not path.is_dir():
        raise Problem(f"there is no {path}: give the folder that has the wheels")


def make_folder(path: Path, option: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if path.is_file():
            raise Problem(f"{path} is a file: give {option} a folder") from None
        raise Problem(f"{option} {path} cannot be made: {error.strerror}") from None


@contextlib.contextmanager
def reading(path: Path):
    """What goes wrong in the block is that path is missing, no file or damaged."""
    if path.is_dir():
        raise Problem(f"{path} is a folder, not a file")
    try:
        yield
    except FileNotFoundError as error:
        if path.exists():
            raise
        raise Problem(f"there is no {path}") from error
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError) as bad:
        raise Problem(f"{path} is damaged: {bad}") from bad


@contextlib.contextmanager
def opened(wheel: Path):
    """The wheel as a ZipFile."""
    with reading(wheel), zipfile.ZipFile(wheel) as archive:
        yield archive


def metadata(file: Path) -> str:
    """Of a wheel or a source distribution."""
    if file.suffix == ".whl":
        with opened(file) as wheel:
            names = [n for n in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
            if len(names) != 1:
                raise Problem(f"{file} is no wheel: it has no *.dist-info/METADATA")
            return wheel.read(names[0]).decode(errors="replace")
    name = f"{file.name.removesuffix('.tar.gz')}/PKG-INFO"
    with reading(file), tarfile.open(file, "r:gz") as source:
        if name not in source.getnames():
            raise Problem(f"{file} is no source distribution: it has no {name}")
        return source.extractfile(name).read().decode(errors="replace")
