"""Messages between ranks, and the check that all ranks make the same call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .parts import Part, Parts, Piece

# A dtype as a number that all ranks agree on.
_DTYPES = (
    None,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.complex64,
    torch.complex128,
)


def dtype_number(tensor: torch.Tensor | None) -> int:
    dtype = None if tensor is None else tensor.dtype
    return _DTYPES.index(dtype) if dtype in _DTYPES else len(_DTYPES)


def find_group(caller: str, group: Any) -> Any:
    """The process group that is meant by group, which this rank is in."""
    if not dist.is_available():
        raise RuntimeError(f"{caller}: this torch is built without torch.distributed")
    if not dist.is_initialized():
        raise RuntimeError(
            f"{caller}: there is no process group: call torch.distributed.init_process_group first"
        )
    if hasattr(group, "get_group"):  # a DeviceMesh of one dimension
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    if dist.get_rank(group) < 0:
        raise RuntimeError(f"{caller}: this process is not in the group")
    return group


def _has_cpu_backend(group: Any) -> bool:
    return "cpu:" in dist.get_backend_config(group)


def gather_lengths(length: int, group: Any = None, device: Any = None) -> list[int]:
    """The length of every rank's shard, in the order of the ranks, for ``lengths``.

    A collective of one integer. The host waits for it: on CPU tensors where the group has a backend
    for them, else on device.

    Args:
        length: that of this rank's shard.
        group: the process group; None is the default one.
        device: where the integer is sent from, for a group without CPU tensors.
    """
    group = find_group("gather_lengths", group)
    return [row[0] for row in _gather([length], group, device)]


def _gather(numbers: Sequence[int], group: Any, device: Any) -> list[list[int]]:
    """The numbers of each rank."""
    device = "cpu" if _has_cpu_backend(group) else device
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, mine, group=group)
    return torch.stack(rows).tolist()


def _wants_check(check: bool | None, group: Any, device: torch.device) -> bool:
    if dist.get_world_size(group) == 1:
        return False
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    return _has_cpu_backend(group) if check is None else check


def agree(
    caller: str,
    group: Any,
    x: Any,
    check: bool | None,
    agreed: dict[str, bool],
    prepare: Callable[[], tuple[Any, Sequence[int]]],
) -> Any:
    """What prepare() returns, once every rank has the same numbers.

    If prepare fails on one rank, or its numbers differ, every rank raises; none waits. agreed has
    the name of each number, and whether an error shows the number.
    """
    device = x.device if isinstance(x, torch.Tensor) else torch.device("cpu")
    if not _wants_check(check, group, device):
        return prepare()[0]
    problem = None
    try:
        prepared, numbers = prepare()
    except Exception as error:
        problem, numbers = error, [0] * len(agreed)
    rows = _gather([int(problem is not None), *numbers], group, device)
    if problem is not None:
        raise problem
    for rank, row in enumerate(rows):
        if row[0]:
            raise RuntimeError(f"{caller}: rank {rank} raised an error, so no rank goes on")
    for i, (name, shown) in enumerate(agreed.items(), 1):
        for rank, row in enumerate(rows):
            if row[i] != rows[0][i]:
                got = f": {rows[0][i]}, and {row[i]} there" if shown else ""
                raise RuntimeError(
                    f"{caller}: {name} must be the same on every rank, and rank {rank} has another "
                    f"than rank 0{got}"
                )
    return prepared


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


class Messages:
    """Tensors on their way between ranks; all that one rank has for another is one message.

    items are (source rank, target rank, key), the same on every rank. cut(key) gives the tensors of
    a key, at the source; like(key) gives tensors of their shapes and dtypes, at the target, of
    which the values do not matter.
    """

    def __init__(
        self,
        items: Iterable[tuple[int, int, Hashable]],
        cut: Callable[[Any], list[torch.Tensor]],
        like: Callable[[Any], list[torch.Tensor]],
        rank: int,
        group: Any,
    ) -> None:
        pairs: dict[tuple[int, int], list[Any]] = {}
        self.values: dict[Any, list[torch.Tensor]] = {}
        for source, target, key in items:
            if source != target:
                pairs.setdefault((source, target), []).append(key)
            elif source == rank:
                self.values[key] = cut(key)
        operations: list[Any] = []
        self.arriving: list[tuple[Any, list[torch.Tensor], torch.Tensor]] = []
        for (source, target), keys in sorted(pairs.items(), key=lambda pair: pair[0]):
            if source == rank:
                buffer = torch.cat([_bytes(tensor) for key in keys for tensor in cut(key)])
                self._post(operations, dist.isend, buffer, target, group)
            elif target == rank:
                forms = [form for key in keys for form in like(key)]
                buffer = forms[0].new_empty(sum(map(_size, forms)), dtype=torch.uint8)
                self._post(operations, dist.irecv, buffer, source, group)
                self.arriving.append((keys, forms, buffer))
        self.sent = [operation.tensor for operation in operations]  # alive until they are through
        self.works = dist.batch_isend_irecv(operations) if operations else []

    @staticmethod
    def _post(operations, operation, buffer, peer, group):
        peer = dist.get_global_rank(group, peer)
        operations.append(dist.P2POp(operation, buffer, peer, group))

    def wait(self) -> dict[Any, list[torch.Tensor]]:
        """By key the tensors for this rank. The host waits only for what is on the CPU."""
        for work in self.works:
            work.wait()
        for keys, forms, buffer in self.arriving:
            pieces = buffer.split([_size(form) for form in forms])
            tensors = [  # a clone is aligned
                piece.clone().view(form.dtype).view(form.shape)
                for piece, form in zip(pieces, forms, strict=True)
            ]
            count = len(forms) // len(keys)
            for i, key in enumerate(keys):
                self.values[key] = tensors[i * count : (i + 1) * count]
        self.works, self.sent, self.arriving = [], [], []
        return self.values


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Halos:
    """The steps beside each of this rank's parts, on their way.

    needed has the pieces of every part. Each of the fields is cut along its last dimension.
    """

    def __init__(
        self,
        parts: Parts,
        needed: dict[Part, list[Piece]],
        fields: Sequence[torch.Tensor | None],
        group: Any,
    ) -> None:
        self.parts, self.needed, self.fields = parts, needed, fields
        pieces = [piece for pieces in needed.values() for piece in pieces]
        items = [(piece.source.rank, piece.rank, piece) for piece in pieces]
        self.messages = Messages(items, self._cut, self._like, parts.rank, group)

    def _given(self) -> list[torch.Tensor]:
        return [field for field in self.fields if field is not None]

    def _cut(self, piece: Piece) -> list[torch.Tensor]:
        where = piece.source.slice(piece.first, piece.last)
        return [field[..., where] for field in self._given()]

    def _like(self, piece: Piece) -> list[torch.Tensor]:
        count = piece.last - piece.first
        return [field.new_empty(1).expand(*field.shape[:-1], count) for field in self._given()]

    def wait(self) -> dict[Part, list[torch.Tensor | None]]:
        """For each of this rank's parts its halo of each field; empty where there is none."""
        values = self.messages.wait()
        found: dict[Part, list[torch.Tensor | None]] = {}
        for part in self.parts.mine:
            pieces = [iter(values[piece]) for piece in self.needed[part]]
            found[part] = [
                None
                if field is None
                else torch.cat([next(piece) for piece in pieces], -1)
                if pieces
                else field[..., :0]
                for field in self.fields
            ]
        return found


def sum_disjoint(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum over the ranks of tensors of which each element is zero on all ranks but one.

    It is formed of their bytes, so every bit stays, whatever the type.
    """
    if dist.get_world_size(group) == 1 or tensor.numel() == 0:
        return tensor
    tensor = tensor.contiguous()
    dist.all_reduce(tensor.view(-1).view(torch.uint8), group=group)
    return tensor


def sum_over_ranks(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum over the ranks, of 16-bit types in float32."""
    if dist.get_world_size(group) == 1 or tensor.numel() == 0:
        return tensor
    tensor = tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32, copy=True)
    tensor = tensor.contiguous()
    dist.all_reduce(tensor, group=group)
    return tensor
