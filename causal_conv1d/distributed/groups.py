"""Process groups: what is kept of each, and the check that all ranks make the same call."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

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
MOST = 1024  # forms of calls that are kept


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
    if hasattr(group, "get_group"):  # a DeviceMesh
        if group.ndim != 1:
            raise RuntimeError(
                f"{caller}: group must be a DeviceMesh of one dimension, got one of {group.ndim}"
            )
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    is_outside = group is dist.GroupMember.NON_GROUP_MEMBER
    if not is_outside and not isinstance(group, dist.ProcessGroup):
        kind = type(group).__name__
        raise TypeError(f"{caller}: group must be a process group or a DeviceMesh, got {kind}")
    if is_outside or dist.get_rank(group) < 0:
        raise RuntimeError(f"{caller}: this process is not in the group")
    return group


class _Kept:
    """What is kept of a group.

    Calls are counted, and what is agreed on has only numbers that are the same on every rank: so
    the ranks of a right program check the same calls.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.life = 0  # which group this is of those that had its name in the store; 0: not asked
        self.noted = 0  # the last call that was compared by the store
        self.agreed: set[tuple[int, ...]] = set()
        self.prepared: dict[Hashable, tuple[Any, list[int]]] = {}
        self.streams: dict[torch.device, Any] = {}
        self.connected: set[torch.device] = set()

    def connect(self, group: Any, device: torch.device) -> None:
        """Connects all ranks: NCCL's first messages must not be those between some of them."""
        if device.type != "cuda" or device in self.connected or _is_capturing(device):
            return
        self.connected.add(device)
        if dist.get_world_size(group) > 1:
            dist.all_reduce(torch.zeros(1, device=device), group=group)

    def stream(self, device: torch.device) -> Any:
        """The stream for messages; it goes first where both have work."""
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device, priority=-1)
        return self.streams[device]


_kept: WeakKeyDictionary[Any, _Kept] = WeakKeyDictionary()


def kept_of(group: Any) -> _Kept:
    kept = _kept.get(group)
    if kept is None:
        kept = _kept[group] = _Kept()
    return kept


def _has_cpu_backend(group: Any) -> bool:
    return "cpu:" in dist.get_backend_config(group)


def _store(group: Any) -> Any:
    """Where the processes of a group leave each other texts, or None."""
    return dist.distributed_c10d._world.pg_map.get(group, (None, None))[1]


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


class _Notes:
    """The numbers of each rank at a call, by the group's store: hosts alone take part."""

    def __init__(self, caller: str, group: Any) -> None:
        kept = kept_of(group)
        self.caller, self.store, self.kept, self.call = caller, _store(group), kept, kept.calls
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        if kept.life == 0:  # a group that was destroyed leaves its notes in the store
            kept.life = self.store.add(f"causal_conv1d/lives/{self.rank}", 1)

    def _key(self, rank: int, call: int) -> str:
        return f"causal_conv1d/{self.kept.life}/{call}/{rank}"

    def leave(self, numbers: Sequence[int]) -> None:
        self.store.set(self._key(self.rank, self.call), json.dumps(list(numbers)))

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        self.leave(numbers)
        keys = [self._key(rank, self.call) for rank in range(self.ranks)]
        try:
            self.store.wait(keys)
        except RuntimeError as error:
            absent = [r for r, key in enumerate(keys) if not self.store.check([key])]
            raise RuntimeError(
                f"{self.caller}: every rank must make the same call, and ranks {absent} did not "
                f"make that of rank {self.rank} within the time limit of the group's store"
            ) from error
        rows = [json.loads(self.store.get(key)) for key in keys]
        if self.kept.noted:  # which all have read that are here
            self.store.delete_key(self._key(self.rank, self.kept.noted))
        self.kept.noted = self.call
        return rows


def agree(
    caller: str,
    group: Any,
    x: Any,
    check: bool | None,
    agreed: dict[str, bool],
    form: Hashable,
    prepare: Callable[[], tuple[Any, list[int]]],
) -> Any:
    """What prepare() returns, once every rank has the same numbers.

    If prepare fails on one rank, or its numbers differ, every rank that compares them raises. What
    prepare returned is taken again for a call of the same form, unless that is None. agreed has the
    name of each number, and whether an error shows the number.
    """
    kept = kept_of(group)
    kept.calls += 1
    device = x.device if isinstance(x, torch.Tensor) else torch.device("cpu")
    checks, gather = _checks(caller, check, group, device)
    try:
        prepared, numbers = _prepared(kept, form, prepare)
    except Exception:
        if checks != "never":
            gather([1, *(0 for _ in agreed)], False)
        raise
    key = tuple(numbers)
    if checks == "always" or (checks == "once" and key not in kept.agreed):
        _compare(caller, agreed, gather([0, *numbers], True))
        _keep_few(kept.agreed)
        kept.agreed.add(key)
    kept.connect(group, device)
    return prepared


def _checks(caller: str, check: bool | None, group: Any, device: torch.device):
    """When to check, and a function of this rank's numbers, and whether it waits for the others'.

    A call of a new kind is compared by the store, as a rank may find it new alone: what it leaves
    there is not taken for a part of the next collective.
    """

    def together(numbers, _):
        return _gather(numbers, group, device)

    def by_notes(numbers, waits):
        notes = _Notes(caller, group)
        return notes.gather(numbers) if waits else notes.leave(numbers)

    if check is False or dist.get_world_size(group) == 1 or _is_capturing(device):
        return "never", together
    if _has_cpu_backend(group) and (check or device.type == "cpu"):
        return "always", together
    if _store(group) is not None:
        return "always" if check else "once", by_notes
    return "always" if check else "never", together


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _prepared(kept: _Kept, form: Hashable, prepare: Callable[[], Any]) -> Any:
    if form is None:
        return prepare()
    found = kept.prepared.get(form)
    if found is None:
        found = prepare()
        _keep_few(kept.prepared)
        kept.prepared[form] = found
    return found


def _keep_few(kept: Any) -> None:
    if len(kept) >= MOST:
        kept.clear()


def _compare(caller: str, agreed: dict[str, bool], rows: list[list[int]]) -> None:
    """Raises unless each rank's numbers are the same."""
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
