"""The selective scan's C interface, ``csrc/selective_scan.h``, called with ctypes on torch tensors,
and what it should give, in float64."""

import ctypes
from pathlib import Path

import torch
import torch.nn.functional as F

import causal_conv1d
from causal_conv1d._ctypes_ops import DTYPES, Status

INPUTS = "u delta A B C D z delta_bias initial_states".split()
GRADIENTS = {name: f"d{name}" for name in "u delta A B C D z delta_bias initial_states".split()}


class Tensor(ctypes.Structure):
    """``causal_conv1d_tensor4``."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    ]

    def __init__(self, tensor=None):
        super().__init__()
        if tensor is None:
            return
        self.data, self.ndim, self.dtype = tensor.data_ptr(), tensor.dim(), DTYPES[tensor.dtype]
        self.sizes[: self.ndim] = tensor.shape
        self.strides[: self.ndim] = tensor.stride()


def _struct(name, tensors, others=(), end=()):
    fields = [*others, *((tensor, Tensor) for tensor in tensors.split()), *end]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


Inputs = _struct(
    "Inputs",
    "u delta A B C D z delta_bias initial_states cu_seqlens",
    end=[("delta_softplus", ctypes.c_int32)],
)
Forward = _struct("Forward", "out ungated last_states", [("inputs", Inputs)])
Backward = _struct(
    "Backward",
    "dout dlast_states du ddelta dA dB dC dD dz ddelta_bias dinitial_states out",
    [("inputs", Inputs)],
)
Update = _struct(
    "Update",
    "state x dt A B C D z dt_bias state_indices out",
    end=[("dt_softplus", ctypes.c_int32)],
)


def current_device():
    """The type of the device that new tensors are on, which those of a call are on too."""
    return torch.empty(0).device.type


def _cuda_arguments(library, function, params):
    device = torch.cuda.current_device()
    arguments = [ctypes.c_int(device), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)]
    if function == "state_update":
        return arguments
    size_of = getattr(library, f"causal_conv1d_cuda_{function}_workspace_size")
    size_of.restype = ctypes.c_int64
    size = max(0, size_of(ctypes.byref(params), device))  # invalid ones are the call's to report
    # The memory is not used by others before the stream has come to that.
    workspace = torch.full((size,), 255, dtype=torch.uint8)  # NaNs
    return [*arguments, ctypes.c_void_p(workspace.data_ptr()), ctypes.c_int64(size)]


def call(function, params, threads=1):
    """Calls a function of the device's library; RuntimeError with its message if it fails."""
    device = current_device()
    path = Path(causal_conv1d.__file__).with_name(f"libcausal_conv1d_{device}.so")
    library = ctypes.CDLL(str(path))
    end = [threads] if device == "cpu" else _cuda_arguments(library, function, params)
    function = getattr(library, f"causal_conv1d_{device}_{function}")
    function.restype = Status
    status = function(ctypes.byref(params), *end)
    if status.code != 0:
        raise RuntimeError(status.message.decode())


def set_tensors(params, tensors):
    """Fills a struct's members, and those of its inputs, by name."""
    for name, value in tensors.items():
        to = (
            params.inputs if hasattr(params, "inputs") and name in dict(Inputs._fields_) else params
        )
        setattr(to, name, value if isinstance(value, int) else Tensor(value))
    return params


def states_shape(problem):
    u, A, cu_seqlens = (problem.get(name) for name in ("u", "A", "cu_seqlens"))
    return (u.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, *A.shape)


def forward(problem, threads=1, dtype=None, **outputs):
    """The results of the inputs in problem, by name."""
    u = problem["u"]
    made = {
        "out": torch.full_like(u, 7, dtype=dtype),
        "ungated": torch.full_like(u, 7, dtype=dtype),
        "last_states": u.new_full(states_shape(problem), 7, dtype=dtype),
    }
    results = made | outputs
    call("scan_forward", set_tensors(Forward(), problem | results), threads)
    return results


def empty_gradients(problem):
    results = {
        GRADIENTS[name]: torch.full_like(problem[name], 7)
        for name in INPUTS
        if problem.get(name) is not None
    }
    return results | {"out": torch.full_like(problem["u"], 7)}


def backward(problem, dout, dlast_states=None, threads=1, **outputs):
    """The gradients, by name, of those given in outputs, else of all."""
    results = outputs or empty_gradients(problem)
    tensors = problem | results | {"dout": dout, "dlast_states": dlast_states}
    call("scan_backward", set_tensors(Backward(), tensors), threads)
    return results


def update(problem, threads=1):
    call("state_update", set_tensors(Update(), problem), threads)


# ------------------------------------------------------------------------------------- reference


def _over_time(projection, dim, seqlen):
    """B or C as (batch or 1, dim, dstate, seqlen)."""
    if projection.dim() == 2:
        return projection[None, :, :, None].expand(-1, -1, -1, seqlen)
    return projection.repeat_interleave(dim // projection.shape[1], dim=1)


def _scan(dt, u, A, B, C, state):
    outs = []
    for now, x, b, c in zip(
        dt[..., None, :].unbind(-1),
        u[..., None, :].unbind(-1),
        B.unbind(-1),
        C.unbind(-1),
        strict=True,
    ):
        state = torch.exp(now * A) * state + now * b * x
        outs.append((c * state).sum(-1))
    return torch.stack(outs, 2) if outs else torch.zeros_like(u), state


def reference(u, delta, A, B, C, D=None, z=None, delta_bias=None, initial_states=None,
              cu_seqlens=None, delta_softplus=0):  # fmt: skip
    """(out, ungated, last_states), differentiable, of the dtype of the inputs."""
    dim, seqlen = u.shape[1:]
    B, C = _over_time(B, dim, seqlen), _over_time(C, dim, seqlen)
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    ends = [0, seqlen] if cu_seqlens is None else cu_seqlens.tolist()
    ys, states = [torch.zeros_like(u[:, :, : ends[0]])], []
    for i, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        rows = slice(None) if cu_seqlens is None else slice(i, i + 1)
        state = u.new_zeros(1, *A.shape) if initial_states is None else initial_states[rows]
        steps = slice(begin, end)
        state = state.expand(u.shape[0], -1, -1)
        y, state = _scan(dt[..., steps], u[..., steps], A, B[..., steps], C[..., steps], state)
        ys.append(y if D is None else y + D[:, None] * u[..., steps])
        states.append(state)
    ys.append(torch.zeros_like(u[:, :, ends[-1] :]))
    y = torch.cat(ys, 2)
    last_states = torch.cat(states) if states else u.new_zeros(0, *A.shape)
    return y if z is None else y * F.silu(z), y, last_states


def reference_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, state_indices=None,
                     dt_softplus=0):  # fmt: skip
    """(state, out)."""
    heads = x.shape[1]
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    B, C = (t.repeat_interleave(heads // t.shape[1], dim=1)[:, :, None] for t in (B, C))
    rows = torch.arange(len(x)) if state_indices is None else state_indices.long()
    used, state = rows >= 0, state.clone()
    new = torch.exp(dt[..., None] * A) * state[rows.clamp(min=0)] + (dt * x)[..., None] * B
    state[rows[used]] = new[used]
    out = (new * C).sum(-1)
    out = out if D is None else out + D * x
    out = out if z is None else out * F.silu(z)
    return state, torch.where(used[:, None, None], out, 0)


def error(got, want):
    """Relative, in the 2-norm."""
    want = want.double()
    difference = (got.double() - want).norm()
    return (difference / want.norm()).item() if want.norm() > 0 else difference.item()
