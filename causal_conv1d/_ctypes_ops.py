"""The compiled kernels called through their C interface, ``csrc/causal_conv1d.h``, with ctypes.

A torch before 2.9 has no stable C ABI for operators to register through; there these functions are
registered as the operators instead, with the same schemas and errors. They cost some microseconds
more per call.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import torch
from torch.autograd.graph import increment_version

from ._operators import CALLERS, argument_names, written_names
from .selective_scan.operators import with_heads

# causal_conv1d_dtype; those from bool on have a number for errors to name them.
_DTYPE_NAMES = (
    "float32 float16 bfloat16 float64 int32 int64 an_unsupported_dtype bool uint8 int8 int16 "
    "uint16 uint32 uint64 complex32 complex64 complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz "
    "float8_e5m2fnuz float8_e8m0fnu"
).split()
DTYPES = {
    getattr(torch, name): number for number, name in enumerate(_DTYPE_NAMES) if hasattr(torch, name)
}
_UNSUPPORTED_DTYPE = _DTYPE_NAMES.index("an_unsupported_dtype")
_FLAGS = ("silu", "delta_softplus", "dt_softplus")
SCANS = ("scan_forward", "scan_backward", "state_update")
# The C functions of operations that have another name.
_FUNCTIONS = {"conv_forward": "forward_with", "conv_backward": "backward_with"}


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
    """Turns an operation's arguments into the parameter struct of the C function of its name.

    The struct has the tensors in order, and a flag if there is one: at its end or, of a scan,
    behind the inputs.
    """

    def __init__(self, operation: str):
        self.caller = CALLERS[operation]
        self.names = argument_names(operation)
        self.tensors = [(i, name) for i, name in enumerate(self.names) if name not in _FLAGS]
        is_scan = operation in ("scan_forward", "scan_backward")
        # causal_conv1d_tensor, or _tensor4: data, sizes, strides, ndim, dtype
        self.dims = 4 if is_scan or operation == "state_update" else 3
        tensor = self.tensor = f"Q{self.dims}q{self.dims}qii"
        self.not_given = (0,) * (2 * self.dims + 3)
        self.padding = {n: (0,) * (self.dims - n) for n in range(1, self.dims + 1)}
        self.heads = operation == "state_update"
        self.flag = next((i for i, name in enumerate(self.names) if name in _FLAGS), None)
        before = len(self.tensors)
        if is_scan and self.flag is not None:
            before = self.flag
        self.flag_at = before * len(self.not_given)
        flag = "" if self.flag is None else "i4x"
        after = len(self.tensors) - before
        self.struct = struct.Struct("=" + tensor * before + flag + tensor * after)

    def __call__(self, args, address=torch.Tensor.data_ptr) -> bytes:
        """The struct's bytes. RuntimeError for a tensor that the struct cannot describe."""
        fields = self.describe(args, self.tensors, address)
        if self.flag is not None:
            fields.insert(self.flag_at, bool(args[self.flag]))
        return self.struct.pack(*fields)

    def describe(self, args, places, address) -> list[int]:
        """The fields of tensors, given by their places among args and their names."""
        fields: list[int] = []
        device = args[0].device
        for i, name in places:
            tensor = None if i is None else args[i]
            if tensor is None:
                fields += self.not_given
                continue
            if tensor.layout is not torch.strided:
                raise RuntimeError(f"{self.caller}: {name} must be a strided tensor")
            if self.heads:
                tensor = with_heads(name, tensor)
            shape = tensor.shape
            ndim = len(shape)
            padding = self.padding.get(ndim)
            if padding is None:
                most = "three" if self.dims == 3 else "four"
                raise RuntimeError(
                    f"{self.caller}: {name} must have one to {most} dimensions, got {ndim}"
                )
            if tensor.device != device:
                raise RuntimeError(
                    f"{self.caller}: {name} must be on {self.names[0]}'s device {device}, got "
                    f"{tensor.device}"
                )
            fields += (
                address(tensor),
                *shape,
                *padding,
                *tensor.stride(),
                *padding,
                ndim,
                DTYPES.get(tensor.dtype, _UNSUPPORTED_DTYPE),
            )
        return fields


class OptionsPacker:
    """As Packer, for an operation with options: its parameters, options and their gradients."""

    def __init__(self, operation: str):
        self.base = Packer(operation.removeprefix("conv_"))
        names = argument_names(operation)
        self.places = [names.index(name) for name in self.base.names]
        self.dilation = names.index("dilation")
        tensor = self.base.tensor
        self.options = struct.Struct(f"=Qq{tensor * 4}")
        optional = ("cu_seqlens", "pre_gate", "post_gate", "residual")
        self.optional = [(names.index(n) if n in names else None, n) for n in optional]
        self.gradients = None
        if operation == "conv_backward":
            self.gradients = struct.Struct(f"=Q{tensor * 2}i4x")
            self.gates = [(names.index(name), name) for name in ("dpre_gate", "dpost_gate")]
            self.residual_is_x = names.index("residual_is_x")

    def __call__(self, args, address=torch.Tensor.data_ptr) -> tuple[bytes, ...]:
        if args[self.dilation] == 0:  # of which the C interface makes 1
            raise RuntimeError(f"{self.base.caller}: dilation must be 1..65536, got 0")
        params = self.base([args[place] for place in self.places], address)
        tensors = self.base.describe(args, self.optional, address)
        options = self.options.pack(self.options.size, args[self.dilation], *tensors)
        if self.gradients is None:
            return params, options
        gates = self.base.describe(args, self.gates, address)
        flag = bool(args[self.residual_is_x])
        return params, options, self.gradients.pack(self.gradients.size, *gates, flag)


class PoolPacker:
    """As Packer, for the pool of states, whose struct has its size in front and numbers behind."""

    TENSORS = 11

    def __init__(self):
        self.base = Packer("update")
        names = argument_names("pool")[: self.TENSORS]
        self.base.caller, self.base.names = CALLERS["pool"], names
        self.places = list(enumerate(names))
        self.struct = struct.Struct(f"=Q{self.base.tensor * self.TENSORS}qqi4x")

    def __call__(self, args, address=torch.Tensor.data_ptr) -> bytes:
        *numbers, silu = args[self.TENSORS :]
        fields = self.base.describe(args, self.places, address)
        return self.struct.pack(self.struct.size, *fields, *numbers, bool(silu))


def _packer(operation: str):
    """A function of an operation's arguments that gives its structs; and how many they are."""
    if operation in _FUNCTIONS:
        return OptionsPacker(operation), 3 if operation == "conv_backward" else 2
    pack = PoolPacker() if operation == "pool" else Packer(operation)
    return lambda args, *address: (pack(args, *address),), 1


def _function(library: ctypes.CDLL, name: str, structs: int, *argtypes):
    function = getattr(library, name)
    function.restype = Status
    # Of a struct its bytes, which C only reads.
    function.argtypes = [*(ctypes.c_char_p,) * structs, *argtypes]
    return function


def telling_torch(operation: str, function):
    """The operation, but it first tells autograd which tensors it writes.

    An inference tensor outside of inference mode is refused, as torch's operators do.
    """
    names = argument_names(operation)
    written = [i for i, name in enumerate(names) if name in written_names(operation)]

    def run(*args):
        for i in written:
            tensor = args[i]
            if tensor is None:
                continue
            if not tensor.is_inference():
                increment_version(tensor)
            elif not torch.is_inference_mode_enabled():
                raise RuntimeError(
                    f"{CALLERS[operation]}: {names[i]} is an inference tensor, which is changed "
                    f"in place in inference mode alone"
                )
        function(*args)

    return run


def cpu_operations(library: ctypes.CDLL) -> dict:
    """The operations on CPU tensors, by name."""

    def make(operation):
        pack, structs = _packer(operation)
        name = f"causal_conv1d_cpu_{_FUNCTIONS.get(operation, operation)}"
        call = _function(library, name, structs, ctypes.c_int)

        def run(*args):
            status = call(*pack(args), torch.get_num_threads())
            if status.code != 0:
                raise_if_failed(status)

        return telling_torch(operation, run)

    return {operation: make(operation) for operation in CALLERS}


def cuda_operations(library: ctypes.CDLL) -> dict:
    """The operations that a GPU library has, by name; on the current stream of their device."""
    current_stream = torch._C._cuda_getCurrentRawStream  # a tenth of the time of the public one

    def make(operation):
        pack, structs = _packer(operation)
        name = f"causal_conv1d_cuda_{operation}"
        call = _function(library, name, structs, ctypes.c_int, ctypes.c_void_p)

        def run(*args):
            index = args[0].device.index
            status = call(*pack(args), index, current_stream(index))
            if status.code != 0:
                raise_if_failed(status)

        return run

    def make_with_workspace(operation, *device_type):
        pack, structs = _packer(operation)
        name = f"causal_conv1d_cuda_{_FUNCTIONS.get(operation, operation)}"
        size_of = getattr(library, f"{name}_workspace_size")
        size_of.restype = ctypes.c_int64
        size_of.argtypes = [*(ctypes.c_char_p,) * structs, *device_type]
        call = _function(
            library,
            name,
            structs,
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
        )

        def run(*args):
            device = args[0].device
            params, index = pack(args), device.index
            size = size_of(*params, *(index for _ in device_type))
            workspace = torch.empty(max(size, 0), dtype=torch.uint8, device=device)
            status = call(*params, index, current_stream(index), workspace.data_ptr(), size)
            if status.code != 0:
                raise_if_failed(status)

        return run

    with_workspace = {
        "backward": (),
        "scan_forward": (ctypes.c_int,),
        "scan_backward": (ctypes.c_int,),
        "conv_forward": (),
        "conv_backward": (),
    }
    has_scan = hasattr(library, "causal_conv1d_cuda_scan_forward")  # not that for AMD GPUs
    found = {}
    for name in CALLERS:
        if name in SCANS and not has_scan:
            continue
        types = with_workspace.get(name)
        run = make(name) if types is None else make_with_workspace(name, *types)
        found[name] = telling_torch(name, run)
    return found


def _stand_in_addresses() -> Any:
    """A function that gives tensors addresses, which overlap where the tensors do.

    For checks on any device, whose own addresses may be handles.
    """
    numbers: dict[int, int] = {}

    def address(tensor):
        if not torch._C._has_storage(tensor):
            raise RuntimeError(
                f"causal_conv1d: {tensor.device.type} tensors have no memory of their own, which "
                f"operators need: move them to another device"
            )
        storage = tensor.untyped_storage()._cdata
        number = numbers.setdefault(storage, len(numbers) + 1)
        return (number << 48) + tensor.storage_offset() * tensor.element_size()

    return address


def checks(cpu_library: ctypes.CDLL) -> dict:
    """By operation, a function that raises RuntimeError for arguments that its kernel refuses.

    They read no memory, and take tensors of any device.
    """

    def check(operation):
        pack, structs = _packer(operation)
        call = _function(cpu_library, f"causal_conv1d_check_{operation}", structs)
        return lambda args: raise_if_failed(call(*pack(args, _stand_in_addresses())))

    return {operation: check(operation) for operation in CALLERS}


def varlen_sizes_check(cpu_library: ctypes.CDLL):
    """A function that raises RuntimeError for (x, cu_seqlens, state_len) of wrong shapes."""
    call = _function(cpu_library, "causal_conv1d_check_varlen_sizes", 1, ctypes.c_int64)
    pack = Packer("varlen_states")

    def check(x, cu_seqlens, state_len):
        raise_if_failed(call(pack((x, cu_seqlens, None), _stand_in_addresses()), state_len))

    return check
