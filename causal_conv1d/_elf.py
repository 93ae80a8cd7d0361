"""What is wrong with a compiled library's file, in words.

Its headers are read before the loader has it: a file that ends too early can kill the process
there, and for one of another machine the loader reports that there is no such file.
"""

from __future__ import annotations

import os
import platform
import struct
from pathlib import Path

HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # Elf64_Ehdr, little-endian as every machine below
SEGMENT = struct.Struct("<IIQQQQQQ")  # Elf64_Phdr
MACHINES = {62: "x86_64", 183: "aarch64"}


def damage(path: Path) -> str | None:
    """A clause that names the file, or None if nothing is wrong as far as its headers tell."""
    try:
        with open(path, "rb") as file:
            size, start = os.fstat(file.fileno()).st_size, file.read(1 << 16)
    except FileNotFoundError:
        return f"there is no {path}"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if not start:
        return f"{path} is empty"
    if not start.startswith(b"\x7fELF"[: len(start)]):
        return f"{path} is no compiled library"
    if len(start) < HEADER.size:
        return f"{path} is truncated: {size} bytes are left"
    header = HEADER.unpack_from(start)
    machine = MACHINES.get(header[2])
    if machine is None:
        return None  # of a machine unknown here the loader knows more
    if machine != platform.machine():
        return f"{path} is for {machine}, and this is {platform.machine()}"
    if size < _full_size(start, header):
        return f"{path} is truncated: {size} of {_full_size(start, header)} bytes are left"
    return None


def _full_size(start: bytes, header: tuple) -> int:
    """The least size that the headers in the file's start allow."""
    segments, sections, segment_count, section_size, section_count = (
        header[i] for i in (5, 6, 10, 11, 12)
    )
    size = max(segments + SEGMENT.size * segment_count, sections + section_size * section_count)
    if segments + SEGMENT.size * segment_count <= len(start):
        for number in range(segment_count):
            segment = SEGMENT.unpack_from(start, segments + SEGMENT.size * number)
            size = max(size, segment[2] + segment[5])  # its place in the file and its size there
    return size
