"""Messages between ranks: what each has for another, in one buffer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .groups import kept_of
from .parts import Part, Piece, Route

ALIGNMENT = 16  # bytes: of each tensor in a buffer


class _Buffer:
    """A tensor of bytes, and by rank the tensors in it."""

    def __init__(self, forms: dict[int, list[torch.Tensor]], device: torch.device) -> None:
        """forms: by rank tensors of which shape and dtype are read."""
        end = 0
        bounds: dict[int, tuple[int, int]] = {}
        places: dict[int, list[tuple[int, int, torch.Tensor]]] = {}
        for rank, tensors in forms.items():
            start, places[rank] = end, []
            for tensor in tensors:
                size = tensor.numel() * tensor.element_size()
                places[rank].append((end, end + size, tensor))
                end += -(-size // ALIGNMENT) * ALIGNMENT
            bounds[rank] = start, end
        memory = torch.empty(end, dtype=torch.uint8, device=device)
        self.bytes = {rank: memory[start:stop] for rank, (start, stop) in bounds.items()}
        self.tensors = {
            rank: [memory[start:stop].view(t.dtype).view(t.shape) for start, stop, t in at]
            for rank, at in places.items()
        }


class Messages:
    """Tensors on their way from and to other ranks of a group.

    On the CPU they are sent at once. On CUDA they are sent by ``wait``, on a stream that waits only
    for what the current one had to do when this was made: so the caller first queues a kernel, and
    the messages travel beside it.
    """

    def __init__(
        self,
        outgoing: dict[int, list[torch.Tensor]],
        incoming: dict[int, list[torch.Tensor]],
        device: torch.device,
        group: Any,
    ) -> None:
        """outgoing: by rank what goes there; incoming: tensors of the form of what comes."""
        self.group, self.outgoing, self.device = group, outgoing, device
        self.works: list[Any] = []
        self.stream: Any = None
        self.is_empty = not outgoing and not incoming
        if self.is_empty:
            return
        # Made here, so that the kernels that may still use their memory are those waited for.
        self.sent, self.received = _Buffer(outgoing, device), _Buffer(incoming, device)
        if device.type == "cuda":
            self.stream = kept_of(group).stream(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))
        else:
            self._post()

    def _post(self) -> None:
        for rank, tensors in self.outgoing.items():
            for room, tensor in zip(self.sent.tensors[rank], tensors, strict=True):
                room.copy_(tensor)
        operations = [
            dist.P2POp(operation, buffer, dist.get_global_rank(self.group, rank), self.group)
            for operation, buffers in ((dist.isend, self.sent), (dist.irecv, self.received))
            for rank, buffer in buffers.bytes.items()
        ]
        self.works = dist.batch_isend_irecv(operations)

    def wait(self) -> dict[int, list[torch.Tensor]]:
        """By rank what came. The host waits only for what is on the CPU."""
        if self.is_empty:
            return {}
        if self.stream is None:
            self._finish()
        else:
            try:
                with torch.cuda.stream(self.stream):
                    self._post()
                    self._finish()
            finally:  # buffers that are let go may be used by the current stream
                torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return self.received.tensors

    def _finish(self) -> None:
        for work in self.works:
            work.wait()


def send(
    items: Iterable[tuple[int, int, Hashable]],
    cut: Callable[[Any], torch.Tensor],
    like: torch.Tensor,
    rank: int,
    group: Any,
) -> dict[Any, torch.Tensor]:
    """By key what this rank is sent, its own included.

    items are (source rank, target rank, key), the same on every rank. cut(key) gives the tensor of
    a key, at the source; all have the form of like.
    """
    outgoing: dict[int, list[torch.Tensor]] = {}
    incoming: dict[int, list[Any]] = {}
    values = {}
    for source, target, key in items:
        if source == target == rank:
            values[key] = cut(key)
        elif source == rank:
            outgoing.setdefault(target, []).append(cut(key))
        elif target == rank:
            incoming.setdefault(source, []).append(key)
    forms = {source: [like] * len(keys) for source, keys in incoming.items()}
    came = Messages(outgoing, forms, like.device, group).wait()
    for source, keys in incoming.items():
        values.update(zip(keys, came[source], strict=True))
    return values


class Halos:
    """The steps beside each of this rank's parts, on their way.

    Each of the fields, of which some may be None, is cut along its last dimension.
    """

    def __init__(self, route: Route, fields: Sequence[torch.Tensor | None], group: Any) -> None:
        self.route, self.fields = route, fields
        self.given = [field for field in fields if field is not None]
        device = self.given[0].device
        outgoing = {
            rank: [self._cut(field, piece) for piece in pieces for field in self.given]
            for rank, pieces in route.outgoing.items()
        }
        incoming = {
            rank: [
                field.new_empty(1).expand(*field.shape[:-1], piece.last - piece.first)
                for piece in pieces
                for field in self.given
            ]
            for rank, pieces in route.incoming.items()
        }
        self.messages = Messages(outgoing, incoming, device, group)

    @staticmethod
    def _cut(field: torch.Tensor, piece: Piece) -> torch.Tensor:
        return field[..., piece.source.slice(piece.first, piece.last)]

    def wait(self) -> dict[Part, list[torch.Tensor | None]]:
        """For each of this rank's parts its halo of each field; empty where there is none."""
        came = self.messages.wait()
        values: dict[Piece, Any] = {}
        for rank, pieces in self.route.incoming.items():
            arrived = iter(came[rank])
            values.update({piece: [next(arrived) for _ in self.given] for piece in pieces})
        found: dict[Part, list[torch.Tensor | None]] = {}
        for part, pieces in self.route.halos.items():
            tensors = [
                values[piece] if piece in values else [self._cut(f, piece) for f in self.given]
                for piece in pieces
            ]
            by_field = iter([_joined(of_field) for of_field in zip(*tensors, strict=True)])
            found[part] = [
                None if field is None else next(by_field) if pieces else field[..., :0]
                for field in self.fields
            ]
        return found


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), -1)


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
