"""The FLOPs that torch.utils.flop_counter counts: as many as for the same F.conv1d."""

from __future__ import annotations

import math

from ._ops import ops
from ._when_imported import when_imported


def _of_convolution(x_shape, weight_shape) -> int:
    """A multiplication and an addition per output and tap."""
    return 2 * math.prod(x_shape) * weight_shape[-1]


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    def forward(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        return _of_convolution(x_shape, weight_shape)

    def backward(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        """For dx, and as many for dweight; recomputation does not count."""
        return 2 * _of_convolution(x_shape, weight_shape)

    def update(x_shape, state_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        return _of_convolution(x_shape, weight_shape)

    def scan(u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
        """Four multiplications and two additions for each state and step."""
        return 6 * math.prod(u_shape) * A_shape[-1]

    def scan_backward(*args, **kwargs) -> int:
        return 2 * scan(*args, **kwargs)

    def state_update(state_shape, x_shape, *args, out_shape=None, **kwargs) -> int:
        return 6 * math.prod(x_shape) * state_shape[-1]

    formulas = (
        (forward, (ops.forward, ops.forward_states, ops.forward_out)),
        (forward, (ops.conv_forward, ops.conv_forward_out)),
        (backward, (ops.backward, ops.backward_out)),
        (backward, (ops.conv_backward, ops.conv_backward_out)),
        (update, (ops.update, ops.update_out)),
        (scan, (ops.scan_forward, ops.scan_forward_out)),
        (scan_backward, (ops.scan_backward, ops.scan_backward_out)),
        (state_update, (ops.state_update, ops.state_update_out)),
    )
    for formula, packets in formulas:
        register_flop_formula([packet for packet in packets if packet not in flop_registry])(
            formula
        )


def register() -> None:
    when_imported("torch.utils.flop_counter", _register)  # which imports Triton
