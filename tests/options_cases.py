"""Cases of the convolution with options, at random too, and their comparison with the reference."""

import dataclasses
import random
from typing import Any

import torch
from helpers import (
    FLOATS,
    LAYOUTS,
    allocate,
    assert_close,
    assert_untouched_outside,
    lay_out,
    on_cpu,
    ops,
    randn,
    sequence_ids,
)
from tolerances import OUT, PARAM

from causal_conv1d import causal_conv1d_fn, causal_conv1d_varlen_fn
from causal_conv1d.reference import causal_conv1d_ref

# The gradients in conv_backward's order, and the tensors that they are of.
GRADIENTS = {
    "dx": "x",
    "dweight": "weight",
    "dbias": "bias",
    "dinitial_states": "initial_states",
    "dpre_gate": "pre_gate",
    "dpost_gate": "post_gate",
}
LIKE_X = ("x", "pre_gate", "post_gate", "residual", "dout")


@dataclasses.dataclass
class Case:
    """The arguments of a forward with options and its backward."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: Any = None
    seq_idx: Any = None
    cu_seqlens: Any = None
    initial_states: Any = None
    pre_gate: Any = None
    post_gate: Any = None
    residual: Any = None
    dout: Any = None
    dfinal_states: Any = None
    dilation: int = 1
    activation: Any = None

    @property
    def silu(self):
        return self.activation is not None

    @property
    def state_shape(self):
        rows = self.x.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        return rows, self.x.shape[1], (self.weight.shape[1] - 1) * self.dilation

    @property
    def residual_is_x(self):
        return self.residual is self.x

    def on_cpu(self):
        fields = on_cpu(vars(self))
        if self.residual_is_x:
            fields["residual"] = fields["x"]
        return Case(**fields)

    def map(self, function):
        """The case with every float tensor replaced; a residual that is x stays so."""
        fields = vars(self).copy()
        for name, value in fields.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                fields[name] = function(value)
        if self.residual_is_x:
            fields["residual"] = fields["x"]
        return Case(**fields)


def bounds_of(lengths, begin=0, dtype=torch.int32, device="cpu"):
    return torch.tensor([begin, *lengths]).cumsum(0).to(dtype).to(device)


def make_case(
    shape,
    width=4,
    dtype=torch.float32,
    *,
    lengths=None,
    begin=0,
    ids=None,
    around=("pre_gate", "post_gate", "residual"),
    states=False,
    bias=True,
    dilation=1,
    activation="silu",
    layout="channel_first",
    layouts=None,
    other_dtype=None,
    index_dtype=torch.int32,
    device="cpu",
    seed=0,
):
    """Standard normal inputs. lengths: of packed sequences, from step begin on; ids: the kind of
    seq_idx; around: what is given of gates and residual, which is x itself as "x"."""
    batch, dim, seqlen = shape
    other = dtype if other_dtype is None else other_dtype
    layouts = layouts or {}

    def make(offset, shape, dtype, where, scale=1.0):
        values = randn(*shape, dtype=dtype, seed=1000 * seed + offset, scale=scale)
        return lay_out(values, where, device)

    case = Case(
        x=make(0, shape, dtype, layouts.get("x", layout)),
        weight=make(1, (dim, width), other, "contiguous", width**-0.5),
        bias=make(2, (dim,), other, "contiguous") if bias else None,
        dout=make(3, shape, dtype, layouts.get("dout", layout)),
        dilation=dilation,
        activation=activation,
    )
    if lengths is not None:
        case.cu_seqlens = bounds_of(lengths, begin, index_dtype, device)
    elif ids is not None:
        case.seq_idx = sequence_ids(batch, seqlen, ids, seed).to(index_dtype).to(device)
    for i, name in enumerate(("pre_gate", "post_gate", "residual")):
        if name in around:
            setattr(case, name, make(4 + i, shape, dtype, layouts.get(name, layout)))
    if "x" in around:
        case.residual = case.x
    if states:
        case.initial_states = make(7, case.state_shape, other, "contiguous")
        case.dfinal_states = make(8, case.state_shape, dtype, "contiguous")
    return case


def reference(case, **options):
    """out and final_states of a case of float64 tensors, each of values that dtype has."""
    dtype = options.get("dtype")
    x, pre_gate = case.x, case.pre_gate
    if pre_gate is not None:  # rounded as a product of dtype would be
        exact = pre_gate * x
        rounded = exact if dtype is None else (pre_gate.to(dtype) * x.to(dtype)).double()
        x = exact + (rounded - exact).detach()
    return causal_conv1d_ref(
        x,
        case.weight,
        case.bias,
        case.initial_states,
        return_final_states=True,
        activation=case.activation,
        seq_idx=case.seq_idx,
        cu_seqlens=case.cu_seqlens,
        post_gate=case.post_gate,
        residual=case.residual,
        dilation=case.dilation,
    )


def reference_gradients(case, dtype=None):
    """By the names of GRADIENTS and dresidual, in float64."""
    case = case.map(lambda tensor: tensor.detach().double().requires_grad_())
    out, final_states = reference(case, dtype=dtype)
    total = (out * case.dout.detach()).sum()
    if case.dfinal_states is not None:
        total = total + (final_states * case.dfinal_states.detach()).sum()
    names = [name for name, of in GRADIENTS.items() if getattr(case, of) is not None]
    inputs = [getattr(case, GRADIENTS[name]) for name in names]
    if not total.requires_grad:  # there is no sequence
        return {name: torch.zeros_like(tensor) for name, tensor in zip(names, inputs, strict=True)}
    found = torch.autograd.grad(total, inputs, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def squares(case):
    """The case whose results are the sums of the squares of the terms that the case itself sums."""
    case = case.map(lambda tensor: tensor.detach().double() ** 2)
    return dataclasses.replace(case, activation=None)


def typical(case):
    """How large results are where the terms of their sums have random signs."""
    squared = squares(case)
    if case.residual_is_x:
        squared.residual = squared.x
    found = {"out": reference(squared)[0].sqrt()}
    return found | {k: v.sqrt() for k, v in reference_gradients(squared).items()}


def run_forward(case, out_layout=None, final_states=True):
    """Of the operator that writes, into poison; the memory around what it writes stays."""
    x = case.x
    where = out_layout or "channel_first"
    out = allocate(x.shape, where, x.dtype, x.device)
    final = (
        allocate(case.state_shape, "channel_first_slice", x.dtype, x.device)
        if final_states
        else None
    )
    ops.conv_forward_out(
        x,
        case.weight,
        case.bias,
        case.seq_idx,
        case.cu_seqlens,
        case.initial_states,
        case.pre_gate,
        case.post_gate,
        case.residual,
        out,
        final,
        case.dilation,
        case.silu,
    )
    for written in (out, final):
        if written is not None:
            assert_untouched_outside(written)
    return out, final


def run_backward(case, dx_layout=None):
    """The gradients by name of the operator that writes, into poison."""
    x = case.x
    where, sums = dx_layout or "channel_first", sum_dtype(x)
    found = dict.fromkeys(GRADIENTS)
    for name, of in GRADIENTS.items():
        tensor = getattr(case, of)
        if tensor is None:
            continue
        is_like_x = of in LIKE_X
        layout = where if is_like_x else "contiguous"
        dtype = tensor.dtype if is_like_x or of == "initial_states" else sums
        found[name] = allocate(tensor.shape, layout, dtype, x.device)
    ops.conv_backward_out(
        x,
        case.weight,
        case.bias,
        case.dout,
        case.seq_idx,
        case.cu_seqlens,
        case.initial_states,
        case.dfinal_states,
        case.pre_gate,
        case.post_gate,
        *found.values(),
        case.dilation,
        case.residual_is_x,
        case.silu,
    )
    for tensor in found.values():
        if tensor is not None:
            assert_untouched_outside(tensor)
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def sum_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def assert_case(case, out_layout=None, dx_layout=None):
    """Forward and backward agree with the reference; returns their results by name."""
    dtype = case.x.dtype
    out, final = run_forward(case, out_layout)
    found = {"out": out} | run_backward(case, dx_layout)
    case = case.on_cpu()
    wide = case.map(lambda tensor: tensor.detach().double())
    out64, final64 = reference(wide, dtype=dtype)
    assert torch.equal(final.cpu(), final64.to(dtype)), "final_states must be exact copies"
    expected = {"out": out64} | reference_gradients(case, dtype)
    for name, wanted in expected.items():
        tolerance = max(OUT[dtype], OUT[found[name].dtype])
        if name in ("dweight", "dbias"):
            tolerance = PARAM[dtype]
        try:
            assert_close(found[name], wanted, tolerance, allow_zero=True, name=name)
        except AssertionError:  # where few terms cancel
            size = typical(case)[name]
            assert_close(found[name], wanted, tolerance, size, allow_zero=True, name=name)
    return found | {"final_states": final}


def call(case, **options):
    """The public function's out and final states."""
    around = {"pre_gate": case.pre_gate, "post_gate": case.post_gate, "residual": case.residual}
    around |= {"dilation": case.dilation, "activation": case.activation}
    around |= {"initial_states": case.initial_states, "return_final_states": True} | options
    if case.cu_seqlens is None:
        return causal_conv1d_fn(case.x, case.weight, case.bias, seq_idx=case.seq_idx, **around)
    return causal_conv1d_varlen_fn(case.x, case.weight, case.bias, case.cu_seqlens, **around)


def leaves(case):
    """The case of leaves that require grad, and those that gradients are of, by name."""
    case = case.map(lambda tensor: tensor.detach().clone().requires_grad_())
    case.dout, case.dfinal_states = (
        None if tensor is None else tensor.detach() for tensor in (case.dout, case.dfinal_states)
    )
    names = [*GRADIENTS.values(), *([] if case.residual_is_x else ["residual"])]
    return case, {name: getattr(case, name) for name in names if getattr(case, name) is not None}


# -------------------------------------------------------------------------------------- at random

PLACES = [name for name in LAYOUTS if name != "batch_fastest"]


def random_lengths(rng, total):
    """Of sequences in total steps, empty ones too; and where the first begins."""
    begin = rng.choice((0, 0, rng.randint(0, min(total, 5))))
    left, lengths = total - begin, []
    longest = rng.choice((2, 9, 70, 400))
    for _ in range(rng.choice((0, 1, 3, 8, 40))):
        lengths.append(min(left, rng.choice((0, 1, rng.randint(0, longest)))))
        left -= lengths[-1]
    if rng.random() < 0.7:
        lengths.append(left)
    return begin, lengths + [0] * rng.choice((0, 0, 2))


def random_case(rng: random.Random, device):
    """A case and the layouts of out and dx."""
    form = rng.choice(("dense", "ids", "packed", "packed"))
    dtype = rng.choice((*FLOATS, *FLOATS, torch.bfloat16, torch.float64))
    dim = rng.choice((rng.randint(1, 40), rng.randint(1, 40), 64, 72, 96, 128, 136))
    seqlen = rng.choice((rng.randint(0, 12), rng.randint(1, 90), rng.randint(100, 700)))
    batch = 1 if form == "packed" else rng.randint(1, 3)
    if dim * seqlen > 30_000:
        batch = 1
    where = rng.choice(("channel_first", "channel_last", rng.choice(PLACES)))
    names = ("x", "dout", "pre_gate", "post_gate", "residual", "out", "dx")
    layouts = dict.fromkeys(names, where)
    if rng.random() < 0.4:
        layouts[rng.choice(names)] = rng.choice(PLACES)
    around = [name for name in ("pre_gate", "post_gate") if rng.random() < 0.5]
    around += rng.choice(([], ["residual"], ["x"]))
    begin, lengths = random_lengths(rng, seqlen) if form == "packed" else (0, None)
    kinds = ("packed", "long", "padded", "recurring", "all_padding")
    case = make_case(
        (batch, dim, seqlen),
        rng.choice((1, 2, 3, 4, 4, 5, 6, 7, 8, 9)),
        dtype,
        lengths=lengths,
        begin=begin,
        ids=rng.choice(kinds) if form == "ids" else None,
        around=around,
        states=rng.random() < 0.5,
        bias=rng.random() < 0.5,
        dilation=rng.choice((1, 1, 1, 2, 3, 4)),
        activation=rng.choice((None, "silu")),
        layouts=layouts,
        other_dtype=None if dtype == torch.float64 else rng.choice((dtype, rng.choice(FLOATS))),
        index_dtype=rng.choice((torch.int32, torch.int64)),
        device=device,
        seed=rng.randint(0, 10_000),
    )
    return case, layouts["out"], layouts["dx"]


def described(case, out_layout, dx_layout):
    """A case in a line, for who has to find it again."""
    words = [f"{name}={value}" for name, value in vars(case).items() if isinstance(value, int)]
    for name, value in vars(case).items():
        if isinstance(value, torch.Tensor):
            words.append(f"{name}={tuple(value.shape)} {value.stride()} {value.dtype}")
    if case.cu_seqlens is not None:
        words.append(f"bounds={case.cu_seqlens.tolist()}")
    return ", ".join([*words, f"silu={case.silu}", f"out {out_layout}, dx {dx_layout}"])
