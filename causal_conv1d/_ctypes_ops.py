"""The compiled kernels called through their C interface, ``csrc/causal_conv1d.h``, with ctypes.

A torch before 2.9 has no stable C ABI for operators to register through; there these functions are
registered as ``torch.ops.causal_conv1d.*`` instead, with the same schemas and errors. They cost
some microseconds more a call.
"""

from __future__ import annotations

import ctypes
import struct

import torch

# Operators of torch.ops.causal_conv1d, and how errors call them.
OPERATORS = {
    "forward": "causal_conv1d_fn",
    "backward": "causal_conv1d_bwd",
    "update": "causal_conv1d_update",
    "varlen_states": "causal_conv1d_varlen_states",
}

# causal_conv1d_dtype
DTYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float64: 3,
    torch.int32: 4,
    torch.int64: 5,
}
_UNSUPPORTED_DTYPE = 6
# causal_conv1d_tensor: data, sizes[3], strides[3], ndim, dtype
_TENSOR = "Q3q3qii"
_NOT_GIVEN = (0,) * 9
_PADDING = {1: (0, 0), 2: (0,), 3: ()}


class Status(ctypes.Structure):
    """``causal_conv1d_status``."""

    _fields_ = [("code", ctypes.c_int32), ("message", ctypes.c_char * 252)]


def raise_if_failed(status: Status) -> None:
    if status.code != 0:
        raise RuntimeError(status.message.decode(errors="replace"))


def schemas(cpu_library: ctypes.CDLL) -> dict[str, str]:
    """The operators' schemas by name, as the C++ registration defines them."""
    get = cpu_library.causal_conv1d_schemas
    get.restype = ctypes.c_char_p
    lines = get().decode().splitlines()
    return {line.partition("(")[0]: line for line in lines}


class Packer:
    """Turns an operator's arguments into the parameter struct of the C function of its name.

    The struct has the tensors in the schema's order, and then ``silu`` if there is one.
    """

    def __init__(self, operator: str, schema: str):
        self.caller = OPERATORS[operator]
        arguments = schema[schema.index("(") + 1 : schema.rindex(") ->")].split(", ")
        names = [argument.rpartition(" ")[2] for argument in arguments]
        self.tensors = [(i, name) for i, name in enumerate(names) if name != "silu"]
        self.silu = names.index("silu") if "silu" in names else None
        ending = "" if self.silu is None else "i4x"
        self.struct = struct.Struct("=" + _TENSOR * len(self.tensors) + ending)

    def __call__(self, args) -> bytes:
        """The struct's bytes; RuntimeError for what the C function could not even be told."""
        fields = []
        device = args[0].device
        for i, name in self.tensors:
            tensor = args[i]
            if tensor is None:
                fields += _NOT_GIVEN
                continue
            shape = tensor.shape
            ndim = len(shape)
            padding = _PADDING.get(ndim)
            if padding is None:
                raise RuntimeError(
                    f"{self.caller}: {name} must have one to three dimensions, got {ndim}"
                )
            if tensor.device != device:
                raise RuntimeError(
                    f"{self.caller}: {name} must be on x's device {device}, got {tensor.device}"
                )
            fields += (
                tensor.data_ptr(),
                *shape,
                *padding,
                *tensor.stride(),
                *padding,
                ndim,
                DTYPES.get(tensor.dtype, _UNSUPPORTED_DTYPE),
            )
        if self.silu is not None:
            fields.append(bool(args[self.silu]))
        return self.struct.pack(*fields)


def _function(library: ctypes.CDLL, name: str, *argtypes):
    function = getattr(library, name)
    function.restype = Status
    function.argtypes = [ctypes.c_char_p, *argtypes]  # the struct's bytes, which C only reads
    return function


def cpu_kernels(library: ctypes.CDLL, packers: dict[str, Packer]) -> dict:
    """The operators on CPU tensors, by name."""

    def kernel(operator):
        pack = packers[operator]
        call = _function(library, f"causal_conv1d_cpu_{operator}", ctypes.c_int)

        def run(*args):
            status = call(pack(args), torch.get_num_threads())
            if status.code != 0:
                raise_if_failed(status)

        return run

    return {operator: kernel(operator) for operator in OPERATORS}


def cuda_kernels(library: ctypes.CDLL, packers: dict[str, Packer]) -> dict:
    """The operators on CUDA tensors, by name; on the current stream of their device."""
    current_stream = torch._C._cuda_getCurrentRawStream  # a tenth of the time of the public one

    def kernel(operator):
        pack = packers[operator]
        name = f"causal_conv1d_cuda_{operator}"
        call = _function(library, name, ctypes.c_int, ctypes.c_void_p)

        def run(*args):
            index = args[0].device.index
            status = call(pack(args), index, current_stream(index))
            if status.code != 0:
                raise_if_failed(status)

        return run

    workspace_size = library.causal_conv1d_cuda_backward_workspace_size
    workspace_size.restype = ctypes.c_int64
    workspace_size.argtypes = [ctypes.c_char_p]
    pack_backward = packers["backward"]
    call_backward = _function(
        library,
        "causal_conv1d_cuda_backward",
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
    )

    def backward(*args):
        device = args[0].device
        params = pack_backward(args)
        size = workspace_size(params)
        workspace = torch.empty(max(size, 0), dtype=torch.uint8, device=device)
        status = call_backward(
            params, device.index, current_stream(device.index), workspace.data_ptr(), size
        )
        if status.code != 0:
            raise_if_failed(status)

    others = [operator for operator in OPERATORS if operator != "backward"]
    return {operator: kernel(operator) for operator in others} | {"backward": backward}


def checks(cpu_library: ctypes.CDLL, packers: dict[str, Packer]) -> dict:
    """By operator, a function that raises RuntimeError for arguments that its kernel refuses."""

    def check(operator):
        pack = packers[operator]
        call = _function(cpu_library, f"causal_conv1d_check_{operator}")
        return lambda args: raise_if_failed(call(pack(args)))

    return {operator: check(operator) for operator in OPERATORS}
