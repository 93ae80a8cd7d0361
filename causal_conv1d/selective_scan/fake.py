"""The selective scan's operators on meta and fake tensors, as ``_fake.py`` has the convolution's.

The checks are those of ``csrc/scan_check.cpp``, message by message.
"""

from __future__ import annotations

import torch

from .. import _fake
from .._fake import _text
from .._operators import argument_names
from .._ops import NAMESPACE, add_op_namespace_prefix
from . import operators


class _Checker(_fake.Checker):
    """The arguments of one call by name; what is not given is None."""

    def required(self, name: str, dims: str, want) -> None:
        self.sizes(name, dims, want)
        self.float_like_first(name)

    def optional(self, name: str, dims: str, want) -> None:
        if self.tensors.get(name) is not None:
            self.required(name, dims, want)

    def written(self, name: str, dims: str, want) -> None:
        self.optional(name, dims, want)
        if self.tensors.get(name) is not None:
            self.writable(name)

    any_dstate = False  # then more than the kernels take

    def dstate(self, name: str) -> None:
        shape = self.tensors[name].shape
        if not 1 <= shape[-1] <= operators.MOST_STATES and not self.any_dstate:
            text = f"must have dstate from 1 to {operators.MOST_STATES}, got {_text(shape)}"
            self.fail(name, text)

    def groups(self, name: str, whole: str, size) -> None:
        shape = self.tensors[name].shape
        if shape[1] < 1 or size % shape[1] != 0:
            text = f"must have a number of groups that divides {whole} = {size}, got {_text(shape)}"
            self.fail(name, text)

    def same_groups(self) -> None:
        B, C = self.tensors["B"], self.tensors["C"]
        if B.dim() == C.dim() != 2 and B.shape[1] != C.shape[1]:
            text = f"must have B's number of groups {B.shape[1]}, got {_text(C.shape)}"
            self.fail("C", text)


def _check_projection(c: _Checker, name: str) -> None:
    batch, dim, seqlen = c.tensors["u"].shape
    dstate, shape = c.tensors["A"].shape[1], c.tensors[name].shape
    constant = len(shape) == 2 and shape[0] == dim and shape[1] == dstate
    in_time = len(shape) == 4 and shape[0] == batch and shape[2] == dstate and shape[3] == seqlen
    if not constant and not in_time:
        first = f"(batch, groups, dstate, seqlen) = ({batch}, groups, {dstate}, {seqlen})"
        second = f"(dim, dstate) = ({dim}, {dstate})"
        c.fail(name, f"must be {first} or {second}, got {_text(shape)}")
    if in_time:
        c.groups(name, "dim", dim)
    c.float_like_first(name)


def _check_states(c: _Checker, name: str, check) -> None:
    u, cu_seqlens = c.tensors["u"], c.tensors["cu_seqlens"]
    rows = "batch" if cu_seqlens is None else "sequences"
    want = (operators.sequences(u, cu_seqlens), u.shape[1], c.tensors["A"].shape[1])
    check(name, f"({rows}, dim, dstate)", want)


def _check_inputs(c: _Checker) -> None:
    c.required("u", "(batch, dim, seqlen)", (None, None, None))
    shape = c.tensors["u"].shape
    batch, dim, _ = shape
    c.required("delta", "u's shape", shape)
    c.required("A", "(dim, dstate)", (dim, None))
    c.dstate("A")
    _check_projection(c, "B")
    _check_projection(c, "C")
    c.same_groups()
    c.optional("D", "(dim,)", (dim,))
    c.optional("z", "u's shape", shape)
    c.optional("delta_bias", "(dim,)", (dim,))
    if c.tensors["cu_seqlens"] is not None:
        c.index("cu_seqlens", "(sequences + 1,)", (None,))
        if c.tensors["cu_seqlens"].shape[0] < 1:
            c.fail("cu_seqlens", "must have at least one element")
        if batch != 1:
            c.fail("cu_seqlens", f"must be left out unless batch is 1, got batch = {batch}")
    _check_states(c, "initial_states", c.optional)


def _check_forward(c: _Checker) -> None:
    _check_inputs(c)
    for name in ("out", "ungated"):
        c.written(name, "u's shape", c.tensors["u"].shape)
    _check_states(c, "last_states", c.written)


def _check_backward(c: _Checker) -> None:
    _check_inputs(c)
    t = c.tensors
    shape, dim = t["u"].shape, t["u"].shape[1]
    c.required("dout", "u's shape", shape)
    _check_states(c, "dlast_states", c.optional)
    c.written("du", "u's shape", shape)
    c.written("ddelta", "u's shape", shape)
    for name in "ABC":
        c.written(f"d{name}", f"{name}'s shape", t[name].shape)
    c.written("dD", "(dim,)", (dim,))
    if t.get("dz") is not None and t["z"] is None:
        c.fail("dz", "must be left out without z")
    c.written("dz", "u's shape", shape)
    c.written("ddelta_bias", "(dim,)", (dim,))
    _check_states(c, "dinitial_states", c.written)
    c.written("out", "u's shape", shape)


def _check_update(c: _Checker) -> None:
    x, state, indices = (c.tensors[name] for name in ("x", "state", "state_indices"))
    c.required("x", "(batch, heads, dim)", (None, None, None))
    batch, heads, dim = x.shape
    if state.dim() != 4 or state.shape[1] != heads or state.shape[2] != dim:
        wanted = f"(states, heads, dim, dstate) with heads = {heads} and dim = {dim}"
        c.fail("state", f"must be {wanted}, got {_text(state.shape)}")
    c.dstate("state")
    c.float_like_first("state")
    if indices is None and state.shape[0] != batch:
        wanted = f"batch = {batch} rows unless state_indices is given"
        c.fail("state", f"must have {wanted}, got {_text(state.shape)}")
    dstate = state.shape[3]
    c.required("dt", "x's shape", x.shape)
    c.required("A", "(heads, dim, dstate)", (heads, dim, dstate))
    for name in ("B", "C"):
        shape = c.tensors[name].shape
        if len(shape) != 3 or shape[0] != batch or shape[2] != dstate:
            wanted = f"(batch, groups, dstate) = ({batch}, groups, {dstate})"
            c.fail(name, f"must be {wanted}, got {_text(shape)}")
        c.groups(name, "heads", heads)
        c.float_like_first(name)
    c.same_groups()
    c.optional("D", "(heads, dim)", (heads, dim))
    c.optional("z", "x's shape", x.shape)
    c.optional("dt_bias", "(heads, dim)", (heads, dim))
    c.index("state_indices", "(batch,)", (batch,))
    c.writable("state")
    c.written("out", "x's shape", x.shape)


_CHECKS = {
    "scan_forward": (_check_forward, "u"),
    "scan_backward": (_check_backward, "u"),
    "state_update": (_check_update, "x"),
}


def check(
    operation: str, tensors: dict, any_dstate: bool = False, caller: str | None = None
) -> None:
    """Raises RuntimeError, as the real operation does, for tensors by name that it refuses.

    caller: whom errors name, if it is not the operation's usual one.
    """
    function, first = _CHECKS[operation]
    if operation == "state_update":
        tensors = {name: operators.with_heads(name, tensor) for name, tensor in tensors.items()}
    checker = _Checker(operation, tensors, first=first, most_dims=4, caller=caller)
    checker.any_dstate = any_dstate
    function(checker)


def _operation(name: str):
    """An operation that checks what it is given and writes nothing."""

    def run(*args):
        arguments = zip(argument_names(name), args, strict=True)
        check(name, {key: value for key, value in arguments if not key.endswith("softplus")})

    return run


def register(loaded) -> None:
    fakes = operators.over({name: _operation(name) for name in _CHECKS})
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, fake in fakes.items():
        torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=library)
    loaded.registrations.append(library)
    loaded.register({f"{name}.plain": fake for name, fake in fakes.items()}, "Meta")
