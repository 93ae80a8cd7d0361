"""The operator ``pool``, a pool of states, on meta tensors and for autograd.

It is ``causal_conv1d_pool_params`` of the C interface. All results are written into what is given,
so it has no derivative.
"""

from __future__ import annotations

import torch

from ._autograd import _negated_kernel, _writing_kernel
from ._fake import Checker, _name, _text
from ._operators import argument_names
from ._ops import NAMESPACE, add_op_namespace_prefix
from ._ops import ops as _ops

TENSORS = 11  # how many of its first arguments they are
_FLAGS = (torch.bool, torch.uint8, torch.int32, torch.int64)


def _vector(c: Checker, name: str, count) -> None:
    c.index(name, "(sequences,)", (count,))


def _check_sequences(c: Checker) -> None:
    t = c.tensors
    count = t["x"].shape[1]
    if t["query_start_loc"] is not None:
        c.index("query_start_loc", "(sequences + 1,)", (None,))
        if t["query_start_loc"].shape[0] < 1:
            c.fail("query_start_loc", "must have at least one element")
        count = t["query_start_loc"].shape[0] - 1
    _vector(c, "cache_indices", count)
    slots = t["conv_states"].shape
    if t["cache_indices"] is None and slots[0] < count:
        text = f"must have at least {count} slots unless cache_indices is given, got {_text(slots)}"
        c.fail("conv_states", text)
    has = t["has_initial_state"]
    if has is not None:
        c.sizes("has_initial_state", "(sequences,)", (count,))
        if has.dtype not in _FLAGS:
            text = f"must be bool, uint8, int32 or int64, got {_name(has.dtype)}"
            c.fail("has_initial_state", text)
        if t["num_accepted_tokens"] is not None:
            c.fail("has_initial_state", "must not be given with num_accepted_tokens")
    _vector(c, "num_accepted_tokens", count)
    _check_windows(c, count)


def _check_windows(c: Checker, count) -> None:
    windows, rows = c.tensors["windows_out"], c.tensors["window_indices"]
    if windows is None:
        if rows is not None:
            c.fail("window_indices", "must not be given without windows_out")
        return
    _vector(c, "window_indices", count)
    inputs = c.tensors["x"].shape[0] * (c.tensors["weight"].shape[1] - 1)
    shape = windows.shape
    if len(shape) != 3 or (rows is None and shape[0] != count) or shape[2] != inputs:
        first = "sequences" if rows is None else "rows"
        text = f"must be ({first}, tokens, dim * (width - 1) = {inputs}), got {_text(shape)}"
        c.fail("windows_out", text)
    c.float_like_first("windows_out")
    c.writable("windows_out")


def check(tensors: dict, max_seqlen) -> None:
    """Raises RuntimeError, as the real operation does, for tensors by name that it refuses."""
    c = Checker("pool", tensors)
    c.sizes("x", "(dim, total)", (None, None))
    c.float_like_first("x")
    dim = tensors["x"].shape[0]
    c.parameters(dim)
    c.sizes("conv_states", "(slots, dim, state_len)", (None, dim, None))
    c.float_like_first("conv_states")
    history, shape = tensors["weight"].shape[1] - 1, tensors["conv_states"].shape
    if shape[2] < history:
        text = f"must have state_len >= width - 1 = {history}, got {_text(shape)}"
        c.fail("conv_states", text)
    c.like_x("out")
    _check_sequences(c)
    if max_seqlen < 0:
        c.fail("max_seqlen", f"must be >= 0, got {max_seqlen}")
    c.writable("conv_states")
    c.writable("out")


def _fake(*args) -> None:
    tensors = dict(zip(argument_names("pool"), args[:TENSORS], strict=False))
    check(tensors, args[TENSORS + 1])


def register(loaded) -> None:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    torch.library.register_fake(add_op_namespace_prefix("pool"), _fake, lib=library)
    loaded.registrations.append(library)
    loaded.register({"pool.plain": _fake}, "Meta")
    loaded.register({"pool": _writing_kernel("pool", _ops.pool.default)}, "Autograd")
    negated = {
        "pool": _negated_kernel("pool", _ops.pool.default),
        "pool.plain": _negated_kernel("pool", _ops.pool.plain),
    }
    loaded.register(negated, "Negative")
