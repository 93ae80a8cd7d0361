"""A wrong argument gives an error that names it, and nothing is written."""

import ctypes
import math

import pytest
import torch
from helpers import ALL_FLOATS, dtype_id, operation, ops

from causal_conv1d import (
    _ctypes_ops,
    _library,
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)

B, D, L, W, S, ROWS = 2, 8, 10, 4, 5, 3
PREFIX = {
    "forward": "causal_conv1d_fn",
    "backward": "causal_conv1d_bwd",
    "update": "causal_conv1d_update",
    "varlen_states": "causal_conv1d_varlen_states",
    "conv_forward": "causal_conv1d_fn",
    "conv_backward": "causal_conv1d_bwd",
}
PACKED = ("conv_forward", "conv_backward")  # here, two sequences with a dilation of 2
INDICES = ("seq_idx", "cache_seqlens", "conv_state_indices", "cu_seqlens")
# Of x's own type.
LIKE_X = "out dout dx states pre_gate post_gate residual dpre_gate dpost_gate".split()
STATES = (B, D, W - 1)


def arguments_of(name, device):
    """Valid arguments by name, in the operator's order, with poisoned outputs."""

    def given(*shape):
        return torch.linspace(-1, 1, math.prod(shape), device=device).reshape(shape)

    def poisoned(*shape):
        return torch.full(shape, math.nan, device=device)

    def index(*values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    common = {"x": given(B, D, L), "weight": given(D, W), "bias": given(D)}
    ids = torch.zeros(B, L, dtype=torch.int32, device=device)
    if name == "forward":
        return common | {
            "seq_idx": ids,
            "initial_states": given(*STATES),
            "out": poisoned(B, D, L),
            "final_states_out": poisoned(*STATES),
            "silu": True,
        }
    if name == "backward":
        return common | {
            "dout": given(B, D, L),
            "seq_idx": ids,
            "initial_states": given(*STATES),
            "dfinal_states": given(*STATES),
            "dx": poisoned(B, D, L),
            "dweight": poisoned(D, W),
            "dbias": poisoned(D),
            "dinitial_states": poisoned(*STATES),
            "silu": True,
        }
    if name == "update":
        return {
            "x": given(B, D, L),
            "conv_state": given(ROWS, D, S),
            "weight": given(D, W),
            "bias": given(D),
            "out": poisoned(B, D, L),
            "silu": True,
            "cache_seqlens": index(0, 3),
            "conv_state_indices": index(2, 0),
        }
    if name in PACKED:
        row, states = (1, D, L), (2, D, 2 * (W - 1))
        common |= {"x": given(*row)}
        ids = {"seq_idx": None, "cu_seqlens": index(0, 4, 10), "initial_states": given(*states)}
        gates = {"pre_gate": given(*row), "post_gate": given(*row)}
        if name == "conv_forward":
            written = {"out": poisoned(*row), "final_states_out": poisoned(*states)}
            rest = {"dilation": 2, "silu": True}
            return common | ids | gates | {"residual": given(*row)} | written | rest
        written = {"dx": poisoned(*row), "dweight": poisoned(D, W), "dbias": poisoned(D)}
        written |= {"dinitial_states": poisoned(*states)}
        written |= {"dpre_gate": poisoned(*row), "dpost_gate": poisoned(*row)}
        rest = {"dilation": 2, "residual_is_x": False, "silu": True}
        inputs = common | {"dout": given(*row)} | ids | {"dfinal_states": given(*states)} | gates
        return inputs | written | rest
    return {"x": given(L, D), "cu_seqlens": index(0, 4, 10), "states": poisoned(2, D, S)}


TENSORS = {
    name: [k for k, v in arguments_of(name, "cpu").items() if isinstance(v, torch.Tensor)]
    for name in PREFIX
}
EVERY = [(name, argument) for name in PREFIX for argument in TENSORS[name]]
WRITTEN = {
    "forward": ("out", "final_states_out"),
    "backward": ("dx", "dweight", "dbias", "dinitial_states"),
    "update": ("conv_state", "out"),
    "varlen_states": ("states",),
    "conv_forward": ("out", "final_states_out"),
    "conv_backward": (
        *("dx", "dweight", "dbias", "dinitial_states"),
        *("dpre_gate", "dpost_gate"),
    ),
}
EVERY_WRITTEN = [(name, argument) for name in PREFIX for argument in WRITTEN[name]]

# A dimension that only defines a size has no wrong value of its own: the error then names the
# first argument that does not fit.
DEFINES_A_SIZE = {
    ("forward", "x"): (0, 1, 2),
    ("forward", "weight"): (1,),
    ("backward", "x"): (0, 1, 2),
    ("backward", "weight"): (1,),
    ("update", "x"): (0, 1, 2),
    ("update", "weight"): (1,),
    ("update", "conv_state"): (0, 2),
    ("varlen_states", "x"): (0, 1),
    ("varlen_states", "cu_seqlens"): (0,),
    ("varlen_states", "states"): (2,),
    ("conv_forward", "x"): (1, 2),
    ("conv_forward", "weight"): (1,),
    ("conv_forward", "cu_seqlens"): (0,),
    ("conv_backward", "x"): (1, 2),
    ("conv_backward", "weight"): (1,),
    ("conv_backward", "cu_seqlens"): (0,),
}


def device_of(arguments):
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    return "cuda" if any(tensor.is_cuda for tensor in tensors) else "cpu"


def assert_rejected(name, arguments, argument):
    """argument None: the error may name any argument."""
    before = {
        k: v.detach().clone()
        for k, v in arguments.items()
        if isinstance(v, torch.Tensor) and v.device.type != "meta"
    }
    named = rf"\b{argument}\b" if argument else "|".join((*TENSORS[name], "dilation"))
    with pytest.raises(RuntimeError, match=rf"^{PREFIX[name]}: .*({named})"):
        operation(name, device_of(arguments))(*arguments.values())
    for k, value in before.items():
        same = torch.equal(arguments[k].nan_to_num(77.0), value.nan_to_num(77.0))
        assert same, f"{k} was written"


@pytest.mark.parametrize("name", PREFIX)
def test_the_arguments_used_here_are_valid(name, device):
    arguments = arguments_of(name, device)
    operation(name, device)(*arguments.values())
    for written in WRITTEN[name]:
        assert torch.isfinite(arguments[written]).all()


@pytest.mark.parametrize(("name", "argument"), EVERY)
def test_number_of_dimensions(name, argument, device):
    value = arguments_of(name, device)[argument]
    if (name, argument) == ("update", "x"):
        wrong = (value[None], value[0, 0], value[0, 0, 0])
    else:
        wrong = (value[None], value[0], value[None, None], value.flatten()[0])
    for bad in wrong:
        assert_rejected(name, arguments_of(name, device) | {argument: bad}, argument)


@pytest.mark.parametrize(("name", "argument"), EVERY)
def test_each_size(name, argument, device):
    value = arguments_of(name, device)[argument]
    for i in range(value.dim()):
        if i in DEFINES_A_SIZE.get((name, argument), ()):
            continue
        larger = torch.cat([value, value.narrow(i, 0, 1)], dim=i)
        for bad in (larger, value.narrow(i, 0, value.shape[i] - 1), value.narrow(i, 0, 0)):
            assert_rejected(name, arguments_of(name, device) | {argument: bad}, argument)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        pair
        for pair in DEFINES_A_SIZE
        if pair[1] not in ("conv_state", "states") and pair != ("varlen_states", "x")
    ],
)
def test_sizes_that_do_not_fit_the_rest(name, argument, device):
    value = arguments_of(name, device)[argument]
    for i in DEFINES_A_SIZE[name, argument]:
        if (name, argument) == ("update", "weight"):
            value = value.repeat(1, 2)  # wider than the state allows
        bad = torch.cat([value, value.narrow(i, 0, 1)], dim=i)
        assert_rejected(name, arguments_of(name, device) | {argument: bad}, None)


def test_weight_without_taps(device):
    for name in ("forward", "backward", "update", *PACKED):
        weight = torch.empty(D, 0, device=device)
        assert_rejected(name, arguments_of(name, device) | {"weight": weight}, "weight")


def test_conv_state_shorter_than_the_window(device):
    state = torch.ones(ROWS, D, W - 2, device=device)
    assert_rejected("update", arguments_of("update", device) | {"conv_state": state}, "conv_state")


@pytest.mark.parametrize("rows", (B - 1, B + 1))
def test_conv_state_with_other_rows_than_the_batch(rows, device):
    """More rows would mean a guess which of them are the batch's."""
    state = torch.ones(rows, D, S, device=device)
    before = state.clone()
    x, weight = torch.ones(B, D, device=device), torch.ones(D, W, device=device)
    text = rf"conv_state must have batch = {B} rows unless .* got \({rows}, {D}, {S}\)"
    with pytest.raises(RuntimeError, match=rf"^causal_conv1d_update: {text}"):
        causal_conv1d_update(x, state, weight)
    assert torch.equal(state, before)


@pytest.mark.parametrize(("name", "argument"), EVERY)
def test_type(name, argument, device):
    value = arguments_of(name, device)[argument].nan_to_num(1)
    if argument in INDICES:
        wrong = (torch.int16, torch.float32)
    else:
        wrong = (torch.int32, torch.complex64)
        if argument in LIKE_X:
            wrong += (torch.float16, torch.float64)
        elif argument != "x" and argument not in ("dweight", "dbias"):
            wrong += (torch.float64,)  # only where all are
    for dtype in wrong:
        bad = value.to(dtype)
        assert_rejected(name, arguments_of(name, device) | {argument: bad}, argument)


@pytest.mark.parametrize("name", ("forward", "backward", "update", *PACKED))
def test_float64_is_for_all_or_none(name, device):
    arguments = arguments_of(name, device)
    assert_rejected(name, arguments | {"x": arguments["x"].double()}, None)


@pytest.mark.parametrize(("name", "argument"), EVERY)
def test_device(name, argument, device):
    """The other device is the CPU for CUDA, and torch's meta device for the CPU."""
    arguments = arguments_of(name, device)
    bad = arguments[argument].to("cpu" if device == "cuda" else "meta")
    # With x elsewhere it is the others that are on the wrong device.
    assert_rejected(name, arguments | {argument: bad}, None if argument == "x" else argument)


@pytest.mark.parametrize(("name", "argument"), EVERY_WRITTEN)
def test_expanded_output(name, argument, device):
    """One element of memory cannot hold several results."""
    value = arguments_of(name, device)[argument]
    for i in (i for i in range(value.dim()) if value.shape[i] > 1):
        bad = value.narrow(i, 0, 1).expand(value.shape)
        assert_rejected(name, arguments_of(name, device) | {argument: bad}, argument)


@pytest.mark.parametrize(
    ("name", "argument", "shared"),
    [
        ("forward", "out", "x"),
        ("backward", "dx", "x"),
        ("backward", "dx", "dout"),
        ("update", "out", "x"),
        ("conv_forward", "out", "residual"),
        ("conv_forward", "out", "pre_gate"),
        ("conv_backward", "dpre_gate", "pre_gate"),
        ("conv_backward", "dpost_gate", "dx"),
    ],
)
def test_output_that_is_an_input(name, argument, shared, device):
    arguments = arguments_of(name, device)
    arguments[argument] = arguments[shared]
    assert_rejected(name, arguments, argument)


def test_update_whose_state_is_x_or_out(device):
    arguments = arguments_of("update", device) | {"conv_state_indices": None}
    both = torch.ones(B, D, L, device=device)
    assert_rejected("update", arguments | {"conv_state": both, "x": both}, "conv_state")
    assert_rejected("update", arguments | {"conv_state": both, "out": both}, "out")


def test_message_gives_what_is_wanted_and_what_was_given(device):
    weight = torch.ones(32, 4, device=device)
    with pytest.raises(RuntimeError) as error:
        causal_conv1d_fn(torch.ones(2, 64, 5, device=device), weight)
    assert "64" in str(error.value) and "(32, 4)" in str(error.value)


@pytest.mark.parametrize("needs_grad", (False, True))
@pytest.mark.parametrize("argument", ("weight", "bias", "seq_idx", "initial_states"))
def test_causal_conv1d_fn_names_the_argument(argument, needs_grad, device):
    arguments = arguments_of("forward", device)
    names = ("x", "weight", "bias", "seq_idx", "initial_states")
    arguments = {name: arguments[name] for name in names}
    arguments["x"].requires_grad_(needs_grad)
    arguments[argument] = arguments[argument][1:]
    with pytest.raises(RuntimeError, match=rf"^causal_conv1d_fn: {argument}\b"):
        causal_conv1d_fn(**arguments)


def test_causal_conv1d_fn_leaves_a_wrong_final_states_out_alone(device):
    arguments = arguments_of("forward", device)
    buffer = torch.full((B, D, W), math.nan, device=device)
    with pytest.raises(RuntimeError, match=r"^causal_conv1d_fn: final_states_out\b"):
        causal_conv1d_fn(
            arguments["x"],
            arguments["weight"],
            return_final_states=True,
            final_states_out=buffer,
        )
    assert buffer.isnan().all()


def test_causal_conv1d_update_leaves_the_state_alone(device):
    arguments = arguments_of("update", device)
    state = arguments["conv_state"]
    before = state.clone()
    with pytest.raises(RuntimeError, match=r"^causal_conv1d_update: bias\b"):
        causal_conv1d_update(arguments["x"][:, :, 0], state, arguments["weight"], state[0])
    assert torch.equal(state, before)


def test_causal_conv1d_varlen_states_names_the_argument(device):
    arguments = arguments_of("varlen_states", device)
    with pytest.raises(RuntimeError, match=r"^causal_conv1d_varlen_states: cu_seqlens\b"):
        causal_conv1d_varlen_states(arguments["x"], arguments["cu_seqlens"].float(), S)


@pytest.mark.parametrize(
    ("name", "argument", "value", "text"),
    [
        ("conv_forward", "dilation", 0, "dilation must be 1..65536, got 0"),
        ("conv_forward", "dilation", 65537, "dilation must be 1..65536, got 65537"),
        ("conv_backward", "dilation", -1, "dilation must be 1..65536, got -1"),
        ("conv_forward", "seq_idx", (1, L), "cu_seqlens must not be given with seq_idx"),
        ("conv_forward", "cu_seqlens", (0,), "cu_seqlens must have at least one element"),
        ("conv_backward", "pre_gate", None, "dpre_gate must not be given without pre_gate"),
    ],
)
def test_options_that_do_not_go_together(name, argument, value, text, device):
    if isinstance(value, tuple):
        value = torch.zeros(value, dtype=torch.int32, device=device)
    arguments = arguments_of(name, device) | {argument: value}
    assert_rejected(name, arguments, None)
    with pytest.raises(RuntimeError) as real:
        operation(name, device)(*arguments.values())
    assert str(real.value) == f"{PREFIX[name]}: {text}"
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments.values()]
    with pytest.raises(RuntimeError) as fake:
        operation(name, device)(*meta)
    assert str(fake.value) == str(real.value)


@pytest.mark.parametrize("name", [name for name in PREFIX if name not in PACKED])
def test_cuda_error_is_not_left_for_the_next_kernel(name, cuda):
    """The C functions return it; torch's check after its own launches must not find it too."""
    library = _library.cuda.library
    params = _ctypes_ops.Packer(name)(tuple(arguments_of(name, cuda).values()))
    workspace = (None, ctypes.c_int64(0)) if name == "backward" else ()
    call = getattr(library, f"causal_conv1d_cuda_{name}")
    call.restype = _ctypes_ops.Status
    status = call(params, ctypes.c_int(torch.cuda.device_count()), None, *workspace)
    assert status.code != 0 and b"invalid device ordinal" in status.message
    assert (torch.ones(3, device=cuda) + 1).tolist() == [2, 2, 2]


WITH_WORKSPACE = ("backward", "conv_forward", "conv_backward")


def assert_workspace_is_checked(library, name, device):
    function = f"causal_conv1d_cuda_{_ctypes_ops._FUNCTIONS.get(name, name)}"
    pack, structs = _ctypes_ops._packer(name)
    tail = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    call = _ctypes_ops._function(library, function, structs, *tail)
    size_of = getattr(library, f"{function}_workspace_size")
    size_of.argtypes, size_of.restype = [ctypes.c_char_p] * structs, ctypes.c_int64
    arguments = arguments_of(name, device)
    params = pack(tuple(arguments.values()))
    size = size_of(*params)
    assert size > 0
    memory = torch.zeros(size + 16, dtype=torch.uint8, device=device)
    few = f"workspace must have {size} bytes, got {size - 1}"
    aligned = "workspace must be memory that is aligned to 16 bytes, got "
    start = memory.data_ptr()
    for workspace, given, text in (
        (start, size - 1, few),
        (None, size, aligned),
        (start + 8, size, aligned),
    ):
        status = call(*params, 0, None, workspace, given)
        assert status.code == 1
        assert status.message.decode().startswith(f"{PREFIX[name]}: {text}")
    for written in WRITTEN[name]:
        assert arguments[written].isnan().all()


@pytest.mark.parametrize("name", WITH_WORKSPACE)
def test_workspace_is_checked(name, cuda):
    assert_workspace_is_checked(_library.cuda.library, name, cuda)


OTHER_DTYPES = [dtype for dtype in _ctypes_ops.DTYPES if dtype not in ALL_FLOATS]


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=dtype_id)
def test_the_dtype_given_is_named(dtype, device):
    x, weight = torch.empty(2, 6, 9, dtype=dtype, device=device), torch.ones(6, 4, device=device)
    name = dtype_id(dtype)
    if name == "float8_e8m0fnu" and torch.__version__ < (2, 13):
        name = f"({name}|an unsupported dtype)"  # torch's stable ABI does not name it there
    with pytest.raises(RuntimeError, match=rf"_fn: x must be .*, got {name}$"):
        ops.forward(x, weight, None, None, None, False)
