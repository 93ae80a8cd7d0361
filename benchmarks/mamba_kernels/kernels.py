"""mamba_ssm's compiled selective scan behind ctypes, for contiguous tensors, float32 and bfloat16.

``build.sh`` beside this file makes the library. What mamba_ssm's own C++ does around its kernels,
zeroing the sums and rounding dB and dC to the type of B and C, is done here too, and timed.
"""

import ctypes

import torch

SIZES = "batch dim seqlen dstate groups bf16".split()
TENSORS = (
    "u delta A B C D z delta_bias out out_z x dout du ddelta dA dB dC dD dz ddelta_bias".split()
)
CHUNK = 2048  # steps between the states that the forward leaves in x


class Call(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in SIZES]
    _fields_ += [(name, ctypes.c_void_p) for name in TENSORS]


class Kernels:
    version = "2.3.2.post1, compiled for sm_90 with its own flags"

    def __init__(self, path):
        self.library = ctypes.CDLL(path)
        if self.library.mamba_call_size() != ctypes.sizeof(Call):
            raise RuntimeError(f"{path}: not of this version")

    def _run(self, name, tensors):
        u, B = tensors["u"], tensors["B"]
        batch, dim, seqlen = u.shape
        sizes = (batch, dim, seqlen, B.shape[2], B.shape[1], int(u.dtype == torch.bfloat16))
        call = Call(*sizes)
        for key, tensor in tensors.items():
            if tensor is not None:
                assert tensor.is_contiguous(), key
                setattr(call, key, tensor.data_ptr())
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = getattr(self.library, name)(ctypes.byref(call), stream)
        if error:
            raise RuntimeError(f"{name}: CUDA error {error}")

    @staticmethod
    def _inputs(one):
        return {name: one[name] for name in "u delta A B C D z delta_bias".split()}

    def forward(self, one):
        tensors = self._inputs(one)
        u = tensors["u"]
        batch, dim, seqlen = u.shape
        chunks = -(-seqlen // CHUNK)
        out = torch.empty_like(u)
        out_z = None if tensors["z"] is None else torch.empty_like(u)
        x = torch.empty(batch, dim, chunks, 2 * one["A"].shape[1], device=u.device)
        self._run("mamba_fwd", tensors | {"out": out, "out_z": out_z, "x": x})
        one["saved"] = out, x  # mamba_ssm saves x, and out with z, for the backward
        return out if out_z is None else out_z

    def backward(self, one):
        """After forward(one), whose states it takes."""
        tensors = self._inputs(one)
        out, x = one["saved"]
        tensors |= {"out": out, "x": x, "dout": one["dout"]}
        tensors |= {"du": torch.empty_like(one["u"]), "ddelta": torch.empty_like(one["u"])}
        tensors["dz"] = None if one["z"] is None else torch.empty_like(one["z"])
        for name in "A B C D delta_bias".split():
            tensors["d" + name] = torch.zeros_like(one[name], dtype=torch.float32)
        self._run("mamba_bwd", tensors)
        dB, dC = (tensors["d" + name].to(one[name].dtype) for name in "BC")
        return tensors["du"], dB, dC
