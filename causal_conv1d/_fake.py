"""The operators on meta and fake tensors: the real ones' checks, and results without values.

Sizes may be symbols there, which C++ cannot be given, so the checks of ``csrc/check.cpp`` stand
here once more; ``tests/test_operators.py`` compares the two, message by message. What needs
addresses, the overlap of tensors, is left to the real call.
"""

from __future__ import annotations

import torch

from . import _operators, _options
from ._operators import CALLERS, argument_names
from ._ops import NAMESPACE, add_op_namespace_prefix

_MOST_DILATION = 1 << 16
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _text(shape) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Checker:
    """The arguments of one call by name; what is not given is None.

    first: the one that tells whether all are float64.
    """

    dilation = 1

    def __init__(
        self,
        operation: str,
        tensors: dict,
        first: str = "x",
        most_dims: int = 3,
        caller: str | None = None,
    ):
        self.caller, self.tensors, self.first = caller or CALLERS[operation], tensors, first
        leader = next(iter(tensors))
        device = tensors[leader].device
        most = {3: "three", 4: "four"}[most_dims]
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if not 1 <= tensor.dim() <= most_dims:
                self.fail(name, f"must have one to {most} dimensions, got {tensor.dim()}")
            if tensor.device != device:
                self.fail(name, f"must be on {leader}'s device {device}, got {tensor.device}")

    def fail(self, name: str, text: str):
        raise RuntimeError(f"{self.caller}: {name} {text}")

    def sizes(self, name: str, dims: str, want) -> None:
        """None in want matches any size; dim is the one that a message can give."""
        shape = self.tensors[name].shape
        if len(shape) == len(want) and all(
            w is None or size == w for size, w in zip(shape, want, strict=True)
        ):
            return
        known = [w for w in want if w is not None]
        if len(known) == len(want):
            self.fail(name, f"must be {dims} = {_text(want)}, got {_text(shape)}")
        with_dim = f" with dim = {known[0]}" if known else ""
        self.fail(name, f"must be {dims}{with_dim}, got {_text(shape)}")

    def float_like_first(self, name: str) -> None:
        first = self.first
        dtype, leading = self.tensors[name].dtype, self.tensors[first].dtype
        if dtype not in _FLOATS:
            wanted = f"float32, float16 or bfloat16 (or float64 with {first})"
            self.fail(name, f"must be {wanted}, got {_name(dtype)}")
        if (dtype == torch.float64) != (leading == torch.float64):
            got = f"{_name(dtype)} with {first} {_name(leading)}"
            self.fail(name, f"must be float64 if and only if {first} is, got {got}")

    def like_x(self, name: str) -> None:
        x = self.tensors["x"]
        self.sizes(name, "x's shape", x.shape)
        if self.tensors[name].dtype != x.dtype:
            got = _name(self.tensors[name].dtype)
            self.fail(name, f"must have x's dtype {_name(x.dtype)}, got {got}")

    def index(self, name: str, dims: str, want) -> None:
        if self.tensors[name] is None:
            return
        self.sizes(name, dims, want)
        if self.tensors[name].dtype not in (torch.int32, torch.int64):
            self.fail(name, f"must be int32 or int64, got {_name(self.tensors[name].dtype)}")

    def writable(self, name: str) -> None:
        tensor = self.tensors[name]
        if any(tensor.shape[i] > 1 and tensor.stride(i) == 0 for i in range(tensor.dim())):
            self.fail(name, "is written and must not be an expanded tensor (stride 0)")

    def x(self) -> None:
        self.sizes("x", "(batch, dim, seqlen)", (None, None, None))
        self.float_like_first("x")

    def parameters(self, dim=None) -> None:
        dim = self.tensors["x"].shape[1] if dim is None else dim
        self.sizes("weight", "(dim, width)", (dim, None))
        self.float_like_first("weight")
        if self.tensors["weight"].shape[1] < 1:
            self.fail("weight", f"must have width >= 1, got {_text(self.tensors['weight'].shape)}")
        if self.tensors["bias"] is not None:
            self.sizes("bias", "(dim,)", (dim,))
            self.float_like_first("bias")

    def states(self, name: str, is_written=False) -> None:
        if self.tensors.get(name) is None:
            return
        batch, dim, _ = self.tensors["x"].shape
        bounds = self.tensors.get("cu_seqlens")
        rows = "batch" if bounds is None else "sequences"
        count = batch if bounds is None else bounds.shape[0] - 1
        columns = "width - 1" if self.dilation == 1 else "(width - 1) * dilation"
        want = (count, dim, (self.tensors["weight"].shape[1] - 1) * self.dilation)
        self.sizes(name, f"({rows}, dim, {columns})", want)
        self.float_like_first(name)
        if is_written:
            self.writable(name)

    def seq_idx(self) -> None:
        batch, _, seqlen = self.tensors["x"].shape
        self.index("seq_idx", "(batch, seqlen)", (batch, seqlen))

    def check_dilation(self) -> None:
        if not 1 <= self.dilation <= _MOST_DILATION:
            self.fail("dilation", f"must be 1..{_MOST_DILATION}, got {self.dilation}")

    def options(self) -> None:
        self.check_dilation()
        if self.tensors.get("cu_seqlens") is not None:
            self.index("cu_seqlens", "(sequences + 1,)", (None,))
            if self.tensors["cu_seqlens"].shape[0] < 1:
                self.fail("cu_seqlens", "must have at least one element")
            if self.tensors["seq_idx"] is not None:
                self.fail("cu_seqlens", "must not be given with seq_idx")
            shape = self.tensors["x"].shape
            if shape[0] != 1:
                self.fail("x", f"must be (1, dim, total) with cu_seqlens, got {_text(shape)}")
        for name in ("pre_gate", "post_gate", "residual"):
            if self.tensors.get(name) is not None:
                self.like_x(name)


def _check_forward(c: Checker) -> None:
    c.x()
    c.parameters()
    c.seq_idx()
    c.options()
    c.states("initial_states")
    if c.tensors.get("out") is not None:
        c.like_x("out")
        c.writable("out")
    c.states("final_states_out", is_written=True)


def _check_backward(c: Checker) -> None:
    c.x()
    c.parameters()
    c.like_x("dout")
    c.seq_idx()
    c.options()
    c.states("initial_states")
    c.states("dfinal_states")
    if c.tensors.get("dx") is not None:
        c.like_x("dx")
        c.writable("dx")
    for name, dims, like in (("dweight", "(dim, width)", "weight"), ("dbias", "(dim,)", None)):
        if c.tensors.get(name) is not None:
            shape = c.tensors["weight"].shape
            c.sizes(name, dims, shape if like else shape[:1])
            c.float_like_first(name)
            c.writable(name)
    c.states("dinitial_states", is_written=True)
    for name in ("pre_gate", "post_gate"):
        if c.tensors.get(f"d{name}") is not None:
            if c.tensors[name] is None:
                c.fail(f"d{name}", f"must not be given without {name}")
            c.like_x(f"d{name}")
            c.writable(f"d{name}")


def _check_update(c: Checker) -> None:
    x, state = c.tensors["x"], c.tensors["conv_state"]
    if x.dim() not in (2, 3):
        c.fail("x", f"must be (batch, dim) or (batch, dim, seqlen), got {_text(x.shape)}")
    c.float_like_first("x")
    c.parameters()
    c.check_dilation()
    c.sizes("conv_state", "(batch, dim, state_len)", (None, x.shape[1], None))
    c.float_like_first("conv_state")
    history = (c.tensors["weight"].shape[1] - 1) * c.dilation
    if state.shape[2] < history:
        least = "width - 1" if c.dilation == 1 else "(width - 1) * dilation"
        text = f"must have state_len >= {least} = {history}, got {_text(state.shape)}"
        c.fail("conv_state", text)
    if c.tensors["conv_state_indices"] is None and state.shape[0] != x.shape[0]:
        rows = f"batch = {x.shape[0]} rows unless conv_state_indices is given"
        c.fail("conv_state", f"must have {rows}, got {_text(state.shape)}")
    c.writable("conv_state")
    if c.tensors.get("out") is not None:
        c.like_x("out")
        c.writable("out")
    c.index("cache_seqlens", "(batch,)", x.shape[:1])
    c.index("conv_state_indices", "(batch,)", x.shape[:1])


def check_varlen_states(x, cu_seqlens, state_len) -> None:
    c = Checker("varlen_states", {"x": x, "cu_seqlens": cu_seqlens})
    c.sizes("x", "(total_tokens, dim)", (None, None))
    c.float_like_first("x")
    c.sizes("cu_seqlens", "(batch + 1,)", (None,))
    c.index("cu_seqlens", "(batch + 1,)", (None,))
    if cu_seqlens.shape[0] < 1:
        c.fail("cu_seqlens", "must have at least one element")
    if state_len < 0:
        text = f"must be >= 0 and give at most 2^52 states, got {state_len}"
        c.fail("state_len", text)


_CHECKS = {
    "forward": _check_forward,
    "backward": _check_backward,
    "update": _check_update,
    "conv_forward": _check_forward,
    "conv_backward": _check_backward,
}


def check(operation: str, tensors: dict, dilation: int = 1, caller: str | None = None) -> None:
    """Raises RuntimeError, as the real operation does, for tensors by name that it refuses.

    caller: whom errors name, if it is not the operation's usual one.
    """
    checker = Checker(operation, tensors, caller=caller)
    checker.dilation = dilation
    _CHECKS[operation](checker)


def _operation(name: str):
    """An operation that checks what it is given and writes nothing."""

    def run(*args):
        arguments = dict(zip(argument_names(name), args, strict=True))
        dilation = arguments.get("dilation", 1)
        for flag in ("silu", "dilation", "residual_is_x"):
            arguments.pop(flag, None)
        check(name, arguments, dilation)

    return run


def register(loaded) -> None:
    operations = {name: _operation(name) for name in _CHECKS}
    operations["varlen_states"] = lambda x, cu_seqlens, states: None
    fakes = _operators.over(operations, check_varlen_states) | _options.over(operations)
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, fake in fakes.items():
        torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=library)
    loaded.registrations.append(library)
    loaded.register({f"{name}.plain": fake for name, fake in fakes.items()}, "Meta")
