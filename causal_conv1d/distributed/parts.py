"""Which part of the sequence each rank holds. Every rank works out the same, so nothing is asked.

A shard is one part of the sequence (contiguous), or two that lie one after the other in the rank's
tensors (zigzag: parts r and 2n - 1 - r of rank r of n).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
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
    """The steps from first to last of the part source, which the part target needs."""

    target: Part
    source: Part
    first: int
    last: int


@dataclass(frozen=True)
class Route:
    """What a rank's parts need of others, in the order of the sequence, and what goes where.

    halos has by part the pieces that make up its halo; outgoing and incoming have by rank those
    that come from another. Both ends have them in the same order.
    """

    halos: dict[Part, list[Piece]]
    outgoing: dict[int, list[Piece]]
    incoming: dict[int, list[Piece]]

    def add(self, rank: int, piece: Piece) -> None:
        source, target = piece.source.rank, piece.target.rank
        if target == rank:
            self.halos[piece.target].append(piece)
            if source != rank:
                self.incoming.setdefault(source, []).append(piece)
        elif source == rank:
            self.outgoing.setdefault(target, []).append(piece)


class Parts:
    """All parts, in the order of the sequence, as rank sees them.

    filled are those that are not empty, mine those of them that are this rank's. first is the one
    with the first step; it answers for what comes before.
    """

    def __init__(self, parts: Sequence[Part], rank: int) -> None:
        self.rank, self.total = rank, parts[-1].end
        self.filled = [part for part in parts if part.length > 0]
        self.mine = [part for part in self.filled if part.rank == rank]
        self.first = (self.filled or parts)[0]

    def before(self, count: int) -> Route:
        """The way of up to count steps before each part to it."""
        return self._near(lambda part: (part.start - count, part.start), count)

    def after(self, count: int) -> Route:
        """As before, of the steps after each part."""
        return self._near(lambda part: (part.end, part.end + count), count)

    def _near(self, steps: Callable[[Part], tuple[int, int]], count: int) -> Route:
        near: set[int] = set()
        for i, part in enumerate(self.filled):
            if part.rank == self.rank:
                near.update(self._within(i, part.start - count, part.end + count))
        route = Route({part: [] for part in self.mine}, {}, {})
        for i in sorted(near):
            target, (begin, end) = self.filled[i], steps(self.filled[i])
            for source in (self.filled[k] for k in self._within(i, begin, end)):
                where = max(begin - source.start, 0), min(end - source.start, source.length)
                if where[0] < where[1]:
                    route.add(self.rank, Piece(target, source, *where))
        return route

    def _within(self, i: int, begin: int, end: int) -> range:
        """The numbers of the part i and of those beside it that reach into begin to end."""
        first = last = i
        while first > 0 and self.filled[first - 1].end > begin:
            first -= 1
        while last + 1 < len(self.filled) and self.filled[last + 1].start < end:
            last += 1
        return range(first, last + 1)


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
    try:
        lengths = [operator.index(n) for n in lengths]
    except TypeError:
        raise TypeError(f"{caller}: lengths must be ints, got {lengths!r}") from None
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
    return Parts(parts, rank)


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
