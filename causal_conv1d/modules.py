"""The convolution as a layer, with the names and results of FLA's ``ShortConvolution``."""

from __future__ import annotations

from typing import Any

import torch

from .causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update
from .causal_conv1d_varlen import causal_conv1d_varlen_fn

__all__ = ["CausalConv1d", "ShortConvolution"]


class CausalConv1d(torch.nn.Conv1d):
    """A depthwise causal convolution with its weights: of whole sequences, packed ones, or tokens.

    Takes the place of FLA's ``ShortConvolution``, whose name it has too, and whose parameters it
    loads: weight (hidden_size, 1, kernel_size) and bias. x is (batch, seqlen, hidden_size). A
    state, FLA's cache, has the last ``(kernel_size - 1) * dilation + 1`` inputs of each sequence,
    the newest last: with dilation 1 as many as kernel_size.

    Args:
        hidden_size: number of channels.
        kernel_size: width.
        bias: whether there is a bias.
        activation: None, "silu" or "swish".
        backend: any; FLA's choice of kernels has no meaning here.
        device: of the parameters.
        dtype: of the parameters.
        dilation: steps from one tap to the next.

    Example::

        >>> layer, x = CausalConv1d(64, 4), torch.randn(2, 10, 64)
        >>> with torch.no_grad():
        ...     whole, _ = layer(x)
        ...     out, state = layer(x[:, :9], output_final_state=True)
        ...     token, state = layer(x[:, 9:], cache=state, output_final_state=True)
        >>> torch.equal(torch.cat([out, token], 1), whole)
        True
    """

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int,
        bias: bool = False,
        activation: str | None = "silu",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dilation: int = 1,
    ) -> None:
        if activation not in (None, "silu", "swish"):
            raise ValueError(f"activation must be None, silu or swish, got {activation!r}")
        super().__init__(
            hidden_size,
            hidden_size,
            kernel_size,
            padding=(kernel_size - 1) * dilation,
            dilation=dilation,
            groups=hidden_size,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.hidden_size, self.activation = hidden_size, activation

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"

    @property
    def state_columns(self) -> int:
        """Inputs in a state."""
        return (self.kernel_size[0] - 1) * self.dilation[0] + 1

    @property
    def state_size(self) -> int:
        """Numbers in the state of one sequence."""
        return self.hidden_size * self.state_columns

    def state(self, batch: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The state of sequences that have not begun: zeros."""
        return self.weight.new_zeros(batch, self.hidden_size, self.state_columns, dtype=dtype)

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: torch.Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: torch.Tensor | None = None,
        chunk_indices: torch.Tensor | None = None,
        *,
        pre_gate: torch.Tensor | None = None,
        post_gate: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The convolution, and the state after it.

        Args:
            x: (batch, seqlen, hidden_size); dimensions after the second are taken as one.
            residual: x's shape, or None: added to the activation's result.
            mask: (batch, seqlen) or None: x is multiplied by it; not with cu_seqlens.
            cache: (sequences, hidden_size, columns) or None: the state before. Where no gradient is
                recorded and there are as many tokens as sequences, it is changed in place.
            output_final_state: whether the state after is returned.
            cu_seqlens: (sequences + 1,) or None: boundaries of packed sequences; batch is then 1.
            chunk_indices: FLA's, without meaning here.
            pre_gate: x's shape, or None: x is multiplied by it.
            post_gate: x's shape, or None: the activation's result is multiplied by it.

        Returns:
            out of x's shape, and the state after, or None without ``output_final_state``.
        """
        if mask is not None:
            if cu_seqlens is not None:
                raise ValueError("mask and cu_seqlens must not be given together")
            x = x * mask[(..., *(None,) * (x.dim() - mask.dim()))].to(x.dtype)
        is_step = not torch.is_grad_enabled() and x.shape[0] * x.shape[1] == (
            x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        )
        around = (residual, pre_gate, post_gate)
        if is_step and cu_seqlens is None and all(tensor is None for tensor in around):
            return self.step(x, None, cache, output_final_state)
        rows = x.flatten(2).transpose(1, 2)
        added, pre, post = (
            None if tensor is None else tensor.flatten(2).to(x.dtype).transpose(1, 2)
            for tensor in around
        )
        options: dict[str, Any] = {"residual": rows if residual is x else added}
        options |= {"pre_gate": pre, "post_gate": post, "dilation": self.dilation[0]}
        options["initial_states"] = None if cache is None else cache[:, :, 1:]
        options["activation"] = self.activation
        weight = self.weight[:, 0]
        if cu_seqlens is None:
            out = causal_conv1d_fn(rows, weight, self.bias, **options)
        else:
            out = causal_conv1d_varlen_fn(rows, weight, self.bias, cu_seqlens, **options)
        out = out.transpose(1, 2).reshape(x.shape)
        if not output_final_state and not (is_step and cache is not None):
            return out, None
        after = self._state_after(rows if pre is None else pre * rows, cache, cu_seqlens)
        if is_step and cache is not None:
            after = cache.copy_(after)
        return out, after if output_final_state else None

    def step(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        cache: torch.Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One token of each sequence; the state changes in place.

        Args:
            x: (batch, 1, hidden_size), or (1, sequences, hidden_size) with cu_seqlens.
            residual: x's shape, or None.
            cache: (sequences, hidden_size, columns), or None for zeros.
            output_final_state: whether the state is returned.
            cu_seqlens: given if sequences are packed; its values are not read.

        Returns:
            out of x's shape, and the state or None.
        """
        tokens = x.reshape(-1, self.hidden_size)
        if cache is None:
            cache = x.new_zeros(len(tokens), self.hidden_size, self.state_columns)
        weight, dilation = self.weight[:, 0], self.dilation[0]
        if residual is None:
            out = causal_conv1d_update(
                tokens, cache, weight, self.bias, self.activation, dilation=dilation
            )
        else:
            out = causal_conv1d_fn(
                tokens[:, :, None],
                weight,
                self.bias,
                initial_states=cache[:, :, 1:],
                activation=self.activation,
                residual=residual.to(x.dtype).reshape(tokens.shape)[:, :, None],
                dilation=dilation,
            )
            with torch.no_grad():
                cache.copy_(torch.cat([cache[:, :, 1:], tokens[:, :, None]], dim=2))
        return out.reshape(x.shape), cache if output_final_state else None

    def _state_after(self, rows, cache, cu_seqlens):
        """The last inputs of each sequence; rows is (batch, hidden_size, seqlen)."""
        columns, length = self.state_columns, rows.shape[2]
        if cache is None:
            count = rows.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            cache = rows.new_zeros(count, self.hidden_size, columns)
        cache = cache.to(rows.dtype)
        if cu_seqlens is None:
            if length < columns:
                rows = torch.cat([cache, rows], dim=2)
            return rows[:, :, rows.shape[2] - columns :].contiguous()
        start, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
        time = end - columns + torch.arange(columns, device=rows.device)
        old = (columns + time - start).clamp(0, columns - 1)[:, None, :]
        before = cache.gather(2, old.expand(-1, self.hidden_size, -1))
        if length == 0:
            return before
        inputs = rows[0].index_select(1, time.clamp(0, length - 1).flatten())
        inputs = inputs.unflatten(1, time.shape).transpose(0, 1)
        return torch.where((time < start)[:, None, :], before, inputs)


ShortConvolution = CausalConv1d
