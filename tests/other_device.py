"""A device without kernels, for tests: its tensors' values are on the CPU.

Its device type is Lazy or what ``OTHER_DEVICE`` says: a name for torch's PrivateUse1, which torch
then keeps for the rest of the process, or cuda, of which every build makes tensors. They are of a
subclass, as a device of its own takes C++ to make. The library sees what it sees on a device: a
device type that it has no kernels for, no address, and no way to the host.
"""

import os

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map, tree_map_only

from causal_conv1d._ops import NAMESPACE

TYPE = os.environ.get("OTHER_DEVICE", "lazy")
if TYPE == "lazy":
    import torch._lazy.ts_backend

    torch._lazy.ts_backend.init()
elif TYPE != "cuda":
    backend_registration._setup_privateuseone_for_python_backend(TYPE)

DEVICE = torch.device(TYPE, 0)
aten = torch.ops.aten
# For which the host waits: results, or their shapes, depend on values.
SYNCHRONISING = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal)
KERNEL = torch._C.DispatchKey.CompositeExplicitAutograd


class OtherTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(
            cls, data.shape, data.stride(), data.storage_offset(), dtype=data.dtype, device=DEVICE
        )

    def __init__(self, data):
        self.data_on_cpu = data

    def __repr__(self):
        return f"OtherTensor({self.data_on_cpu})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with Device():
            return func(*args, **(kwargs or {}))


class Device(TorchDispatchMode):
    """Calls of torch with tensors of the device, or that make some.

    waits: how many of them fetched values from it.
    """

    waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_made = torch.device(kwargs.get("device") or "cpu").type == TYPE
        if not is_made and OtherTensor not in types:
            return func(*args, **kwargs)
        if func.namespace == NAMESPACE:
            with self:
                return func._op_dk(KERNEL, *args, **kwargs)
        if func.overloadpacket is aten.to:  # which comes so far in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        if func.overloadpacket in SYNCHRONISING or _counts_a_mask(func, args):
            raise AssertionError(f"the host waits for the device: {func}")
        if func.overloadpacket is aten._to_copy and "device" in kwargs and not is_made:
            Device.waits += 1
            return func(values(args[0]), **kwargs)
        on_cpu = kwargs | {"device": "cpu"} if is_made else kwargs
        found = func(*tree_map(values, args), **tree_map(values, on_cpu))
        found = tree_map_only(torch.Tensor, OtherTensor, found)
        return return_and_correct_aliasing(func, args, kwargs, found)


def _counts_a_mask(func, args):
    """Whether it takes the elements of a mask."""
    if func.overloadpacket not in (aten.index, aten.index_put, aten.index_put_):
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])


def values(tensor):
    """Those of a tensor of the device on the CPU, in the same memory; all else as it is."""
    return tensor.data_on_cpu if isinstance(tensor, OtherTensor) else tensor
