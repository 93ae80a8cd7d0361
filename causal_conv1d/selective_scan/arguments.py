"""The arguments of a scan in plain PyTorch, where its gradients go, and the checks of both."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Inputs:
    """The inputs of a scan: see :func:`causal_conv1d.selective_scan_fn`; B and C have groups."""

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    delta_bias: torch.Tensor | None
    initial_states: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    delta_softplus: bool = False

    @property
    def groups(self) -> int:
        """The groups of B and C; 1 if both are constant in time."""
        return max(tensor.shape[1] if tensor.dim() == 4 else 1 for tensor in (self.B, self.C))

    @property
    def real_dtype(self) -> torch.dtype:
        """The type of the arithmetic."""
        return torch.float64 if self.u.dtype == torch.float64 else torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """The type of the states."""
        return self.real_dtype.to_complex() if self.A.is_complex() else self.real_dtype

    @property
    def states_shape(self):
        rows = self.u.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        return rows, self.u.shape[1], self.A.shape[1]

    def sequences(self):
        """Of each sequence the first step, the one past the last, and its row of the states, None
        if every batch entry has its own."""
        if self.cu_seqlens is None:
            return [(0, self.u.shape[2], None)]
        bounds = self.cu_seqlens.tolist()
        return [(*steps, i) for i, steps in enumerate(itertools.pairwise(bounds))]


@dataclass
class Grads:
    """Where a backward puts its results; dA to ddelta_bias are sums that begin with 0."""

    du: torch.Tensor
    ddelta: torch.Tensor
    dA: torch.Tensor
    dB: torch.Tensor
    dC: torch.Tensor
    dD: torch.Tensor | None
    dz: torch.Tensor | None
    ddelta_bias: torch.Tensor | None
    dinitial_states: torch.Tensor | None
    out: torch.Tensor | None  # the forward's once more


def empty_grads(inputs: Inputs, with_out: bool = False) -> Grads:
    """In the types that sums have, where they are sums."""

    def zeros(tensor: Any) -> Any:
        if tensor is None:
            return None
        dtype = inputs.real_dtype.to_complex() if tensor.is_complex() else inputs.real_dtype
        return torch.zeros_like(tensor, dtype=dtype)

    def empty(tensor: Any) -> Any:
        return None if tensor is None else torch.empty_like(tensor)

    return Grads(
        empty(inputs.u),
        empty(inputs.delta),
        zeros(inputs.A),
        zeros(inputs.B),
        zeros(inputs.C),
        zeros(inputs.D),
        empty(inputs.z),
        zeros(inputs.delta_bias),
        empty(inputs.initial_states),
        empty(inputs.u) if with_out else None,
    )


def check(
    name: str, inputs: Inputs, dout: torch.Tensor | None = None, dz: torch.Tensor | None = None
) -> None:
    """Raises ValueError, naming the argument, for shapes, devices and types that do not fit."""
    u, A = inputs.u, inputs.A
    if u.dim() != 3:
        raise ValueError(f"{name}: u must be (batch, dim, seqlen), got {tuple(u.shape)}")
    if A.dim() != 2:
        raise ValueError(f"{name}: A must be (dim, dstate), got {tuple(A.shape)}")
    (batch, dim, seqlen), dstate = u.shape, A.shape[1]

    def check_shape(argument, tensor, text, *shape):
        if tensor is None:
            return
        if tensor.shape != shape:
            got = tuple(tensor.shape)
            raise ValueError(f"{name}: {argument} must be ({text}) = {shape}, got {got}")
        if tensor.device != u.device:
            where = f"{u.device}, got {tensor.device}"
            raise ValueError(f"{name}: {argument} must be on u's device {where}")

    floats = {"u": u, "delta": inputs.delta, "D": inputs.D, "z": inputs.z, "dout": dout, "dz": dz}
    floats |= {"delta_bias": inputs.delta_bias}
    mixed = {"A": A, "B": inputs.B, "C": inputs.C, "initial_states": inputs.initial_states}
    for argument, tensor in (floats | mixed).items():
        if tensor is None or tensor.is_floating_point():
            continue
        if argument not in mixed or not tensor.is_complex():
            raise ValueError(f"{name}: {argument} must be of a float type, got {tensor.dtype}")
    check_shape("A", A, "dim, dstate", dim, dstate)
    for argument, tensor in {"delta": inputs.delta, "z": inputs.z, "dout": dout, "dz": dz}.items():
        check_shape(argument, tensor, "batch, dim, seqlen", batch, dim, seqlen)
    check_shape("D", inputs.D, "dim,", dim)
    check_shape("delta_bias", inputs.delta_bias, "dim,", dim)
    if inputs.cu_seqlens is not None and (batch != 1 or inputs.cu_seqlens.dim() != 1):
        raise ValueError(f"{name}: cu_seqlens must be (sequences + 1,), and batch 1, got {batch}")
    if inputs.cu_seqlens is not None:
        _check_bounds(name, inputs.cu_seqlens, seqlen)
    rows = "batch" if inputs.cu_seqlens is None else "sequences"
    text = f"{rows}, dim, dstate"
    check_shape("initial_states", inputs.initial_states, text, *inputs.states_shape)
    twice = "2 * " if A.is_complex() else ""
    length = 2 * seqlen if A.is_complex() else seqlen
    for argument, tensor in {"B": inputs.B, "C": inputs.C}.items():
        if tensor.dim() == 2:
            check_shape(argument, tensor, "dim, dstate", dim, dstate)
        elif tensor.dim() == 4:
            text, groups = f"batch, groups, dstate, {twice}seqlen", tensor.shape[1]
            check_shape(argument, tensor, text, batch, groups, dstate, length)
            if groups != inputs.groups or groups == 0 or dim % groups:
                wants = f"one number of groups for B and C that divides dim = {dim}"
                raise ValueError(f"{name}: {argument} must have {wants}, got {groups}")
        else:
            wants = f"(dim, dstate) or (batch, groups, dstate, {twice}seqlen)"
            raise ValueError(f"{name}: {argument} must be {wants}, got {tuple(tensor.shape)}")
        if tensor.is_complex() != (A.is_complex() and tensor.dim() == 2):
            wants = "complex if and only if A is and it is (dim, dstate)"
            raise ValueError(f"{name}: {argument} must be {wants}, got {tensor.dtype}")


def _check_bounds(name: str, cu_seqlens: torch.Tensor, seqlen: int) -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    bounds = cu_seqlens.tolist()
    if not bounds or bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] > seqlen:
        raise ValueError(
            f"{name}: cu_seqlens must ascend between 0 and seqlen = {seqlen}, got {bounds}"
        )
