"""transformers' Mamba models with this library's selective scan and without mamba_ssm.

``use_in_transformers`` puts it into the models' modules; each module is imported twice, once to
stay as it is.
"""

import subprocess
import sys

import pytest
import torch
from test_transformers import (
    LOGITS,
    MODELS,
    NEW_TOKENS,
    assert_same,
    error,
    import_model,
    make_model,
    tokens,
    train_step,
)
from torch.utils._python_dispatch import TorchDispatchMode

from causal_conv1d import _transformers

OTHERS = ("mamba_ssm", "fla", "mambapy")
SCANS = ("mamba", "falcon_mamba", "jamba")
UPDATES = (*SCANS, "mamba2", "bamba", "zamba2")


class ScanCalls(TorchDispatchMode):
    """Counts the scan's operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = dict.fromkeys(("scan_forward", "scan_backward", "state_update"), 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "causal_conv1d":
            name = function._schema.name.partition("::")[2]
            if name in self.counts:
                self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module", params=UPDATES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def modules(name):
    """The model's module with the scan and as it is."""
    with_scan, without = import_model(name, OTHERS), import_model(name, OTHERS)
    if not hasattr(without, "use_kernel_func_from_hub_with_fallback"):
        pytest.skip("transformers before 5 uses the scan on CUDA alone")
    _transformers._replace(with_scan)
    return with_scan, without


def layers_of(name):
    return MODELS[name][2] if name in SCANS else 0


@pytest.mark.parametrize("padded", (False, True))
def test_training_step(name, modules, device, padded):
    ids = tokens(device)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :11] = 0
    results = []
    for module in modules:
        model = make_model(name, module, device)
        with ScanCalls() as calls:
            results.append(train_step(model, ids, mask))
        layers = layers_of(name) if module is modules[0] else 0
        assert calls.counts["scan_forward"] == calls.counts["scan_backward"] == layers
    if name in SCANS:
        assert_same(*results)


def test_generation(name, modules, device):
    """A prompt with padding on the left, then a token at a time from the cache."""
    ids, outputs = tokens(device), []
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    for module in modules:
        model = make_model(name, module, device).eval()
        with ScanCalls() as calls:
            outputs.append(
                model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            )
        is_first = module is modules[0]
        assert calls.counts["scan_forward"] == (layers_of(name) if is_first else 0)
        updates = MODELS[name][2] * (NEW_TOKENS - 1) if is_first else 0
        assert calls.counts["state_update"] == updates
    first, second = outputs
    assert torch.equal(first.sequences, second.sequences)
    for step in range(NEW_TOKENS):
        assert error(first.logits[step], second.logits[step]) <= LOGITS


def test_float64(name, modules, device):
    """Whose A, D and bias the models make float32."""
    if name == "jamba":
        pytest.skip("torch multiplies no float64 for its experts")
    results = [
        train_step(make_model(name, module, device, torch.float64), tokens(device))
        for module in modules
    ]
    assert error(results[0][0], results[1][0]) <= 1e-6


def test_compile(device):
    module = import_model("mamba", OTHERS)
    _transformers._replace(module)
    model = make_model("mamba", module, device).eval()
    ids = tokens(device)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager")
        assert error(compiled(input_ids=ids, use_cache=False).logits, expected) <= LOGITS


def test_before_and_after_the_import(tmp_path):
    """One call does for models that are imported later and for those that were before."""
    code = """
import sys
for package in ("mamba_ssm", "fla", "mambapy"):
    sys.modules[package] = None
import causal_conv1d
from transformers.models.mamba import modeling_mamba
causal_conv1d.use_in_transformers()
from transformers.models.jamba import modeling_jamba
for module in (modeling_mamba, modeling_jamba):
    scan = getattr(module, "mamba_selective_scan", None) or module.selective_scan_fn
    assert scan.__module__.startswith("causal_conv1d."), scan
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
