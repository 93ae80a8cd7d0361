"""Which part of the sequence each rank holds. Every rank works out the same, so nothing is asked.

A shard is one part of the sequence (contiguous), or two that lie one after the other in the rank's
tensors (zigzag: parts r and 2n - 1 - r of rank r of n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LAYOUTS = ("contiguous", "zigzag")


@dataclass(frozen=True)
class Part:
    """length steps from start on of the sequence, which are at offset in the shard of rank."""

    rank: int
    offset: int
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length

    def slice(self, first: int = 0, last: int | None = None) -> slice:
        """Where the steps from first to last, of the part, are in the shard."""
        return slice(self.offset + first, self.offset + (self.length if last is None else last))


@dataclass(frozen=True)
class Piece:
    """The steps from first to last of the part source, which rank needs."""

    rank: int
    source: Part
    first: int
    last: int


@dataclass(frozen=True)
class Parts:
    """All parts, in the order of the sequence, as rank sees them."""

    all: tuple[Part, ...]
    rank: int

    @property
    def total(self) -> int:
        return self.all[-1].end

    @property
    def filled(self) -> list[Part]:
        """The parts that are not empty."""
        return [part for part in self.all if part.length > 0]

    @property
    def mine(self) -> list[Part]:
        """This rank's parts that are not empty."""
        return [part for part in self.filled if part.rank == self.rank]

    @property
    def first(self) -> Part:
        """The part with the first step; it answers for what comes before."""
        return (self.filled or self.all)[0]

    def before(self, count: int) -> dict[Part, list[Piece]]:
        """For each part, in order, the pieces that hold up to count steps before it."""
        return {part: self._cut(part, part.start - count, part.start) for part in self.filled}

    def after(self, count: int) -> dict[Part, list[Piece]]:
        """For each part, in order, the pieces that hold up to count steps after it."""
        return {part: self._cut(part, part.end, part.end + count) for part in self.filled}

    def _cut(self, part: Part, begin: int, end: int) -> list[Piece]:
        pieces = []
        for source in self.filled:
            first, last = max(begin, source.start), min(end, source.end)
            if first < last:
                where = first - source.start, last - source.start
                pieces.append(Piece(part.rank, source, *where))
        return pieces


def make_parts(
    caller: str,
    layout: str,
    length: int,
    lengths: Sequence[int] | None,
    rank: int,
    ranks: int,
) -> Parts:
    """The parts, from this rank's length where all are equal, else from lengths."""
    if layout not in LAYOUTS:
        raise ValueError(f"{caller}: layout must be 'contiguous' or 'zigzag', got {layout!r}")
    zigzag = layout == "zigzag"
    count = 2 * ranks if zigzag else ranks
    if lengths is None:
        if zigzag and length % 2:
            raise ValueError(
                f"{caller}: a zigzag shard must have two parts of equal length unless lengths is "
                f"given, got {length} steps"
            )
        lengths = [length // 2 if zigzag else length] * count
    lengths = [int(n) for n in lengths]
    if len(lengths) != count or min(lengths) < 0:
        raise ValueError(
            f"{caller}: lengths must have the length of each of the {count} parts, got {lengths}"
        )
    parts, start = [], 0
    for i, n in enumerate(lengths):
        back = i >= ranks
        owner = 2 * ranks - 1 - i if back else i
        parts.append(Part(owner, lengths[owner] if back else 0, start, n))
        start += n
    own = sum(part.length for part in parts if part.rank == rank)
    if own != length:
        raise ValueError(
            f"{caller}: the shard of rank {rank} must have {own} steps, as lengths says, "
            f"got {length}"
        )
    return Parts(tuple(parts), rank)


def check_bounds(caller: str, cu_seqlens, total: int, padding: bool) -> None:
    """Raises for boundaries that do not fit; of those on a GPU the host knows only the number.

    padding: whether the last may lie before the end.
    """
    fits = cu_seqlens.shape[0] > 1 or total == 0
    if fits and cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        fits = bounds[0] == 0 and bounds == sorted(bounds) and bounds[-1] <= total
        fits = fits and (padding or bounds[-1] == total)
    if not fits:
        end = f"at most {total}" if padding else total
        raise RuntimeError(
            f"{caller}: cu_seqlens must ascend from 0 to {end}, the steps of all ranks together, "
            f"got {cu_seqlens.tolist()}"
        )
