"""Inputs in any layout, the operators called on poisoned outputs, and the comparisons."""

import dataclasses
import math

import torch
from tolerances import FEW, OUT, PARAM

from causal_conv1d import _ctypes_ops, _library
from causal_conv1d.reference import causal_conv1d_ref

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ALL_FLOATS = (*FLOATS, torch.float64)
ACTIVATIONS = (None, "silu")

ops = torch.ops.causal_conv1d


def operation(name, device):
    """What writes into tensors it is given: an operator, or the C function of varlen_states."""
    if name != "varlen_states":
        return getattr(ops, f"{name}_out").default
    if device == "cpu":
        return _ctypes_ops.cpu_operations(_library.cpu.library)[name]
    return _ctypes_ops.cuda_operations(_library.cuda.library)[name]


def dtype_id(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


# ------------------------------------------------------------------------------------------ layouts


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor lies in a larger block of memory that is otherwise filled with poison.

    order: its dimensions from the slowest to the fastest; then, a dimension: every step-th element
    is used, from lead on, and tail elements follow.
    """

    order: tuple
    steps: tuple
    leads: tuple
    tails: tuple


def layout(order, steps=None, leads=None, tails=None):
    n = len(order)
    return Layout(order, steps or (1,) * n, leads or (0,) * n, tails or (0,) * n)


# For x and all that is shaped like it: (batch, dim, seqlen).
LAYOUTS = {
    "channel_first": layout((0, 1, 2)),
    "channel_last": layout((0, 2, 1)),
    "channel_first_slice": layout((0, 1, 2), leads=(0, 1, 3), tails=(1, 2, 2)),
    "channel_last_slice": layout((0, 2, 1), leads=(1, 3, 1), tails=(0, 2, 1)),
    "channel_first_padded": layout((0, 1, 2), tails=(0, 0, 8)),
    "channel_last_padded": layout((0, 2, 1), tails=(0, 8, 0)),
    "dim_major": layout((1, 0, 2)),
    "seqlen_major": layout((2, 0, 1)),
    "batch_fastest": layout((1, 2, 0)),
    "strided": layout((0, 1, 2), steps=(1, 2, 3), leads=(0, 1, 1)),
}

# For anything else, by its number of dimensions.
OTHER_LAYOUTS = {
    1: {
        "contiguous": layout((0,)),
        "slice": layout((0,), leads=(1,), tails=(2,)),
        "strided": layout((0,), steps=(3,), leads=(1,)),
    },
    2: {
        "contiguous": layout((0, 1)),
        "transposed": layout((1, 0)),
        "slice": layout((0, 1), leads=(1, 3), tails=(1, 2)),
        "strided": layout((0, 1), steps=(2, 3), leads=(1, 1)),
    },
    3: {"contiguous": LAYOUTS["channel_first"], **LAYOUTS},
}


def poison_of(dtype):
    return math.nan if dtype.is_floating_point else 1_234_567


def allocate(shape, where="channel_first", dtype=torch.float32, device="cpu"):
    """A poisoned tensor of the given shape and layout, within a poisoned block of memory."""
    spec = where if isinstance(where, Layout) else OTHER_LAYOUTS[len(shape)][where]
    sizes = [
        lead + size * step + tail
        for size, step, lead, tail in zip(shape, spec.steps, spec.leads, spec.tails, strict=True)
    ]
    block = torch.full([sizes[i] for i in spec.order], poison_of(dtype), dtype=dtype, device=device)
    view = block.permute([spec.order.index(i) for i in range(len(shape))])
    index = tuple(
        slice(lead, lead + size * step, step)
        for size, step, lead in zip(shape, spec.steps, spec.leads, strict=True)
    )
    return view[index]


def lay_out(values, where, device=None):
    """A copy of values in the given layout; "expanded" repeats its first batch entry."""
    device = device or values.device
    if where == "expanded":
        return values[:1].to(device).expand(values.shape)
    view = allocate(values.shape, where, values.dtype, device)
    return view.copy_(values)


def is_poison(tensor):
    if tensor.is_floating_point():
        return tensor.isnan()
    return tensor == poison_of(tensor.dtype)


def assert_untouched_outside(view):
    """All memory around a view made by allocate() still holds its poison."""
    block = view._base.clone()
    inside = block.as_strided(view.shape, view.stride(), view.storage_offset())
    inside.fill_(poison_of(block.dtype))
    assert is_poison(block).all(), "memory outside the view was written"


def all_poison(*tensors):
    return all(is_poison(tensor).all() for tensor in tensors)


# ---------------------------------------------------------------------------------------- the cases


@dataclasses.dataclass
class Case:
    """The arguments of a forward and its backward."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    seq_idx: torch.Tensor | None
    initial_states: torch.Tensor | None
    dout: torch.Tensor
    dfinal_states: torch.Tensor | None
    activation: str | None

    @property
    def silu(self):
        return self.activation is not None

    @property
    def state_shape(self):
        return (*self.x.shape[:2], self.weight.shape[1] - 1)

    def map(self, function):
        """The case with every float tensor replaced by function(tensor)."""
        fields = vars(self).copy()
        for name, value in fields.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                fields[name] = function(value)
        return Case(**fields)


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, dtype=torch.float32, device="cpu", seed=0, scale=1.0):
    values = torch.randn(*shape, generator=generator_of(seed), dtype=torch.float64) * scale
    return values.to(dtype).to(device)


def on_cpu(values):
    """Of a dict, its tensors on the CPU. References run there: they are many small operations, and
    take longer on a GPU, most of all beside other processes or under compute-sanitizer."""
    return {name: v.cpu() if isinstance(v, torch.Tensor) else v for name, v in values.items()}


def sequence_ids(batch, seqlen, kind, seed=0):
    """seq_idx on the CPU: "packed" segments of 1..9 tokens, "long" ones of 1..400, "padded" ones
    of which some are padding, "all_padding", and "recurring" ids in arbitrary order."""
    generator = generator_of(seed)
    longest = {"packed": 9, "long": 400, "padded": 6, "recurring": 2, "all_padding": 5}[kind]
    ids = torch.empty(batch, seqlen, dtype=torch.int32)
    for row in ids:
        start, segment = 0, 0
        while start < seqlen:
            length = int(torch.randint(1, longest + 1, (), generator=generator))
            chance = float(torch.rand((), generator=generator))
            value = segment
            if kind == "all_padding" or (kind == "padded" and chance < 0.4):
                value = -1 - segment
            elif kind == "recurring":
                value = int(chance * 3)
            row[start : start + length] = value
            start, segment = start + length, segment + 1
    return ids


def make_case(
    shape,
    width=4,
    dtype=torch.float32,
    *,
    weight_dtype=None,
    bias_dtype=None,
    state_dtype=None,
    bias=True,
    states=False,
    seq_idx=None,
    activation="silu",
    layout="channel_first",
    dout_layout=None,
    param_layout="contiguous",
    device="cpu",
    seed=0,
):
    """Standard normal inputs, scaled so that z is of order 1; types default to x's."""
    batch, dim, seqlen = shape
    state_shape = (batch, dim, width - 1)
    weight_dtype = weight_dtype or dtype

    def make(offset, shape, dtype, where, scale=1.0):
        values = randn(*shape, dtype=dtype, seed=1000 * seed + offset, scale=scale)
        return lay_out(values, where, device)

    state_layout = layout if layout != "expanded" else "channel_first"
    ids = None
    if seq_idx is not None:
        ids = lay_out(sequence_ids(batch, seqlen, seq_idx, seed), param_layout, device)
    bias_layout = "strided" if param_layout == "transposed" else param_layout
    return Case(
        x=make(1, shape, dtype, layout),
        weight=make(2, (dim, width), weight_dtype, param_layout, width**-0.5),
        bias=make(3, (dim,), bias_dtype or weight_dtype, bias_layout) if bias else None,
        seq_idx=ids,
        initial_states=make(4, state_shape, state_dtype or dtype, state_layout) if states else None,
        dout=make(5, shape, dtype, dout_layout or layout),
        dfinal_states=make(6, state_shape, dtype, state_layout) if states else None,
        activation=activation,
    )


# ------------------------------------------------------------------------- reference and operators


def reference_forward(case):
    """out and final_states in float64, on the case's own (already rounded) values."""
    case = case.map(lambda tensor: tensor.detach().double())
    return causal_conv1d_ref(
        case.x,
        case.weight,
        case.bias,
        case.initial_states,
        return_final_states=True,
        activation=case.activation,
        seq_idx=case.seq_idx,
    )


GRADIENTS = ("dx", "dweight", "dbias", "dinitial_states")


def reference_backward(case):
    """The gradients in float64, by name; None for an absent argument."""
    case = case.map(lambda tensor: tensor.detach().double().requires_grad_())
    out, final_states = causal_conv1d_ref(
        case.x,
        case.weight,
        case.bias,
        case.initial_states,
        return_final_states=True,
        activation=case.activation,
        seq_idx=case.seq_idx,
    )
    outputs, grads = [out], [case.dout.detach()]
    if case.dfinal_states is not None:
        outputs.append(final_states)
        grads.append(case.dfinal_states.detach())
    inputs = (case.x, case.weight, case.bias, case.initial_states)
    given = [tensor for tensor in inputs if tensor is not None]
    found = iter(torch.autograd.grad(outputs, given, grads, materialize_grads=True))
    values = (next(found) if tensor is not None else None for tensor in inputs)
    return dict(zip(GRADIENTS, values, strict=True))


def linear_squares(case):
    """The case whose results are the sums of the squares of the terms that the case itself sums."""
    case = case.map(lambda tensor: tensor.detach().double() ** 2)
    case.activation = None
    return case


def typical_forward(case):
    return reference_forward(linear_squares(case))[0].sqrt()


def typical_backward(case):
    found = reference_backward(linear_squares(case))
    return {name: None if value is None else value.sqrt() for name, value in found.items()}


def run_forward(case, out_layout=None, final_states=True):
    """out and final_states of the raw operator, which got them full of NaN."""
    device = case.x.device
    if out_layout is None:
        out = torch.empty_like(case.x).fill_(math.nan)
    else:
        out = allocate(case.x.shape, out_layout, case.x.dtype, device)
    final = None
    if final_states:
        final = allocate(case.state_shape, out_layout or "channel_first", case.x.dtype, device)
    ops.forward_out(
        case.x,
        case.weight,
        case.bias,
        case.seq_idx,
        case.initial_states,
        out,
        final,
        case.silu,
    )
    return out, final


def run_backward(case, dx_layout=None, wanted=GRADIENTS):
    """The gradients of the raw operator by name, which got its outputs full of NaN."""
    device, dtype = case.x.device, case.x.dtype
    param_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if dx_layout is None:
        dx = torch.empty_like(case.x).fill_(math.nan)
    else:
        dx = allocate(case.x.shape, dx_layout, dtype, device)
    found = dict.fromkeys(GRADIENTS) | {"dx": dx}
    if "dweight" in wanted:
        found["dweight"] = allocate(case.weight.shape, "contiguous", param_dtype, device)
    if case.bias is not None and "dbias" in wanted:
        found["dbias"] = allocate(case.bias.shape, "contiguous", param_dtype, device)
    if case.initial_states is not None and "dinitial_states" in wanted:
        found["dinitial_states"] = allocate(
            case.state_shape, dx_layout or "channel_first", case.initial_states.dtype, device
        )
    ops.backward_out(
        case.x,
        case.weight,
        case.bias,
        case.dout,
        case.seq_idx,
        case.initial_states,
        case.dfinal_states,
        dx,
        found["dweight"],
        found["dbias"],
        found["dinitial_states"],
        case.silu,
    )
    return found


# -------------------------------------------------------------------------------------- comparisons


def assert_close(actual, expected, tolerance, typical=None, allow_zero=False, name="result"):
    """The 2-norm of the error is at most tolerance times that of the expected value.

    typical, of the same shape, is how large the elements are when the terms of their sums have
    random signs. It stands in for an expected value that happens to be smaller, which only occurs
    with a handful of elements. Always allowed are the error of the expected value when it is
    rounded to the type, a twentieth more of it as a value halfway may go to the other side, and
    below FEW elements one unit in the last place.
    An expected value of 0 throughout must be met exactly, and only where the test says that it may
    occur.
    """
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    if expected.numel() == 0:
        assert allow_zero, f"{name}: nothing to compare"
        return
    actual, expected = actual.detach().to(expected.device), expected.detach().double()
    assert torch.isfinite(expected).all(), f"{name}: the expected value is not finite"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    size = expected.norm().item()
    if size == 0:
        assert allow_zero, f"{name}: the expected value is 0, nothing is tested"
        assert not actual.any(), f"{name}: must be 0"
        return
    allowed = tolerance * max(size, 0.0 if typical is None else typical.norm().item())
    rounding = (expected.to(actual.dtype).double() - expected).norm().item()
    if math.isfinite(rounding):
        allowed = max(allowed, 1.05 * rounding)
    if expected.numel() < FEW:
        info = torch.finfo(actual.dtype)
        allowed = max(allowed, info.eps * expected.abs().max().item(), info.smallest_normal)
    error = (actual.double() - expected).norm().item()
    assert error <= allowed, (
        f"{name}: error {error / size:.3g} relative to {size:.3g}, allowed {allowed / size:.3g}"
    )


def assert_forward(case, out_layout=None, allow_zero=False):
    """The raw forward agrees with the reference; returns its outputs."""
    out, final = run_forward(case, out_layout)
    expected, expected_final = reference_forward(case)
    assert_close(
        out, expected, OUT[case.x.dtype], typical_forward(case), allow_zero=allow_zero, name="out"
    )
    assert torch.equal(final, expected_final.to(final.dtype)), "final_states must be exact copies"
    return out, final


def assert_gradients(case, found, allow_zero=False):
    """Gradients by name agree with the reference, to the precision of the type they come in."""
    expected, typical = reference_backward(case), typical_backward(case)
    dtype = case.x.dtype
    for name in GRADIENTS:
        if found[name] is None:
            continue
        own = OUT[found[name].dtype]
        if name in ("dweight", "dbias"):
            is_raw = found[name].dtype in (torch.float32, torch.float64)
            tolerance = PARAM[dtype] if is_raw else max(PARAM[dtype], own)
        else:
            tolerance = max(OUT[dtype], own)
        assert_close(
            found[name], expected[name], tolerance, typical[name], allow_zero=allow_zero, name=name
        )


def assert_backward(case, dx_layout=None, allow_zero=False, wanted=GRADIENTS):
    """The raw backward agrees with the reference; returns the gradients."""
    found = run_backward(case, dx_layout, wanted)
    assert found["dx"] is not None
    assert_gradients(case, found, allow_zero)
    return found
