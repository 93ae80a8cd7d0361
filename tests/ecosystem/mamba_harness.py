"""Makes released versions of mamba_ssm importable for the tests, without a change to their files.

- transformers 5 lacks two names that mamba_ssm before 2.3 imports, and uses as types of a result.
- ``triton.autotune`` gets one configuration of each kernel: to compile and time them all takes
  minutes on a GPU, and there is nothing to time on the CPU.
- On the CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1, set before Triton is
  imported), and three names of ``torch.cuda`` that launches need have stand-ins.
"""

import contextlib
import os
import sys
import types

import torch


def prepare(device):
    """Call it before mamba_ssm, transformers or Triton is imported."""
    # float32 products in Triton kernels are of TF32 otherwise, too rough to compare.
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    if device == "cpu":
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("Triton was imported without TRITON_INTERPRET=1")
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)  # the tensors are tiny
        torch.cuda.device = lambda *_: contextlib.nullcontext()
        torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=2)
        torch.cuda.Event = lambda *_, **__: None

    import transformers.generation as generation
    import triton

    autotune = triton.autotune
    triton.autotune = lambda configs, key, **options: autotune(configs[-1:], key, **options)

    for name in ("GreedySearchDecoderOnlyOutput", "SampleDecoderOnlyOutput"):
        if not hasattr(generation, name):
            setattr(generation, name, generation.GenerateDecoderOnlyOutput)
