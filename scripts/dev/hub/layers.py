"""What ``kernels.kernelize`` puts in the place of a model's functions, by transformers' names.

As it demands, the layers have neither state nor methods of their own.
"""

from torch import nn

from . import causal_conv1d_interface as interface


class causal_conv1d_fn(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states, weight, bias=None, activation=None, **kwargs):
        """Models hand on keywords that are for other functions; of them ``seq_idx`` counts here."""
        seq_idx = kwargs.get("seq_idx")
        return interface.causal_conv1d_fn(
            hidden_states, weight, bias, seq_idx=seq_idx, activation=activation
        )


class causal_conv1d_update(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states, conv_state, weight, bias=None, activation=None):
        return interface.causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)
