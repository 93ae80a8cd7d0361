"""Runs every CUDA kernel on the sizes where out-of-bounds accesses hide; for compute-sanitizer.

    compute-sanitizer --tool memcheck python scripts/dev/sanitizer_cases.py

Every tensor is an allocation of its own and no larger than it must be, so that an access past its
end is seen. Results are compared with the CPU's, so that a kernel that did nothing is seen too.
"""

import os
import random

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch  # noqa: E402

from causal_conv1d import causal_conv1d_varlen_states  # noqa: E402
from causal_conv1d.cpp_functions import (  # noqa: E402
    write_backward,
    write_forward,
    write_update,
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tensor(layout, batch, dim, seqlen, dtype):
    if layout == "first":
        return torch.randn(batch, dim, seqlen).to(dtype)
    if layout == "last":
        return torch.randn(batch, seqlen, dim).to(dtype).transpose(1, 2)
    return torch.randn(batch, dim, seqlen + 1).to(dtype)[..., 1:]  # misaligned rows


def to_cuda(t):
    """A copy with t's strides in an allocation that ends with its last element."""
    if t is None or t.numel() == 0:
        return t if t is None else t.cuda()
    size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    block = t.as_strided((size,), (1,), t.storage_offset()).cuda()
    return block.as_strided(t.shape, t.stride(), 0)


def check(name, found, expected):
    if expected is None:
        return
    found, expected = found.cpu().double(), expected.double()
    size = max(expected.norm().item(), 1.0)
    error = (found - expected).norm().item() / size
    assert error <= TOLERANCE[dtype], f"{name}: error {error}"


random.seed(0)
torch.manual_seed(0)
CASES = [(seqlen, random.randint(1, 70)) for seqlen in range(1, 301)]
CASES += [(seqlen, random.randint(1, 70)) for seqlen in range(1023, 1031)]
CASES += [(random.randint(1, 130), dim) for dim in range(1, 71)]
for seqlen, dim in CASES:
    batch, width = random.randint(1, 3), random.choice((1, 2, 3, 4, 4, 4, 5, 8, 9))
    dtype = random.choice((torch.float32, torch.float16, torch.bfloat16))
    layout, silu = random.choice(("first", "last", "misaligned")), random.random() < 0.7
    x, dout = (tensor(layout, batch, dim, seqlen, dtype) for _ in range(2))
    weight, bias = torch.randn(dim, width).to(dtype) * width**-0.5, torch.randn(dim).to(dtype)
    states, dfinal, ids = None, None, None
    if random.random() < 0.5:
        states, dfinal = (torch.randn(batch, dim, width - 1).to(dtype) for _ in range(2))
    if random.random() < 0.5:
        ids = torch.randint(-1, 3, (batch, seqlen), dtype=torch.int32).sort(dim=1).values
    cpu = [x, weight, bias, dout, ids, states, dfinal]
    cuda = [to_cuda(t) for t in cpu]
    results = []
    for x, weight, bias, dout, ids, states, dfinal in (cpu, cuda):
        out, dx = torch.empty_like(x), torch.empty_like(x)
        final = x.new_empty(batch, dim, width - 1)
        dweight, dbias, dinit = (torch.empty_like(t) for t in (weight, bias, final))
        write_forward(x, weight, bias, ids, states, out, final, silu)
        write_backward(x, weight, bias, dout, ids, states, dfinal, dx, dweight, dbias, dinit, silu)
        state = torch.zeros(batch + 1, dim, width + random.Random(seqlen).randint(0, 2))
        state = state.to(x.device, dtype)
        token, ring = torch.empty_like(x[..., 0]), torch.empty_like(x)
        start = torch.arange(batch, dtype=torch.int32, device=x.device)
        rows = torch.tensor([1, 0, 1][:batch], device=x.device)  # one of them twice
        first = state[:batch]
        write_update(x[..., 0].contiguous(), first, weight, bias, token, silu, None, None)
        write_update(x, state, weight, bias, ring, silu, start, rows)
        offsets = torch.tensor([0, seqlen // 3, seqlen], device=x.device)
        varlen = causal_conv1d_varlen_states(x[0].t().contiguous(), offsets, 3)
        results.append((out, final, dx, dweight, dbias, dinit, token, ring, state, varlen))
    names = "out final_states dx dweight dbias dinitial_states token ring state varlen".split()
    for name, expected, found in zip(names, *results, strict=True):
        check(f"{name} of {layout} {(batch, dim, seqlen)} width {width} {dtype}", found, expected)
print(f"{len(CASES)} cases equal the CPU's")
