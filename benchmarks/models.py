"""The convolutions of released models: what benchmark.py and benchmark_cpu.py time by name.

Dimensions are those of the models' default configurations. `apart` says what a model does with the
convolution that is not part of the timing here; such a row times the convolution alone.
"""

from __future__ import annotations

from typing import NamedTuple


class Model(NamedTuple):
    name: str
    dim: int
    width: int = 4
    bias: bool = True
    silu: bool = True
    # Where x lies: "first", "last", or a view of a wider tensor, of benchmark.py's VIEWS.
    layout: str = "last"
    dtype: str = "bf16"
    apart: str = ""


# Mamba-2's in_proj gives z, x with B and C, and dt side by side; the convolution takes the middle.
VIEW = "last: part of the columns"
HALF = "first: half of the channels"

MODELS = (
    Model("Qwen3-Next-80B, Qwen3.5", 8192, bias=False),
    Model("Qwen3.6-27B, Qwen3.8-27B, Qwen4-Exp", 10240, bias=False),
    Model("Kimi-Linear, Ling", 4096, bias=False, apart="one of three: q, k and v"),
    Model("GLM5-Next", 8192, bias=False, apart="one of three: q, k and v"),
    Model("Lara-mini", 4096, bias=False),
    Model("Nemotron-H, Mamba2-7B", 10240, layout=VIEW),
    Model("Bamba, Granite-H", 8704, layout=VIEW),
    Model("Zamba2", 5248, layout=VIEW),
    Model("Zamba", 7424, layout="first"),
    Model("Mamba-130m", 1536, layout=HALF),
    Model("Jamba", 8192, layout=HALF),
    Model("LFM2", 2560, 3, bias=False, silu=False, apart="two gates"),
    Model("LFM2-MoE", 2048, 3, bias=False, silu=False, apart="two gates"),
    Model("LFM3-1.7B", 2048, 7, bias=False, silu=False, apart="two gates"),
    Model("Inkling", 6144, bias=False, silu=False, dtype="fp32", apart="the residual"),
    Model("Inkling 2", 4608, bias=False, silu=False, dtype="fp32", apart="the residual"),
    Model("Inkling loop", 2304, bias=False, silu=False, dtype="fp32", apart="the residual"),
    Model("RecurrentGemma", 2560, silu=False),
    Model("Gemma3n, Gemma4 audio", 1536, 5, bias=False, silu=False, layout="first"),
    Model("Nemotron streaming speech", 1024, 9, bias=False, silu=False, layout="first"),
)

# Named, so that no one thinks they were forgotten.
NOT_TIMED = {"Qwen4-Exp's PLE, 10240": "it has a dilation, and rows of its own"}

SEQLEN = 8192  # a packed row of training, or the largest chunk of a prompt
CPU_SEQLEN = 512  # the smallest chunk
DECODE_BATCH = 64
CPU_DECODE_BATCH = 1


def options(model: Model) -> tuple[str, ...]:
    """What differs from the plain case, in the benchmarks' words."""
    found = () if model.bias else ("no bias",)
    return found if model.silu else (*found, "no activation")


def labels(model: Model) -> dict[str, str]:
    """What a row of a model has beside its numbers."""
    return {"model": model.name} | ({"apart": model.apart} if model.apart else {})
