"""Models of transformers with this library and mamba_ssm, whose fused functions call it directly.

In training transformers then takes mamba_ssm's fused forward and backward, else its scans. Compared
with transformers' own plain PyTorch. On the CPU mamba_ssm's kernels run in Triton's interpreter.

Not here: Jamba, which does not take the fused function, and Falcon-Mamba, for which mamba_ssm's
fused function gives other values than transformers' own code, whatever computes the convolution.
"""

import importlib.util

import pytest
import torch
from mamba_harness import prepare
from operator_calls import OperatorCalls

if importlib.util.find_spec("mamba_ssm") is None:
    pytest.skip("needs mamba_ssm: scripts/test_ecosystem.sh", allow_module_level=True)

from test_transformers import MODELS, error, import_model, make_model, tokens, train_step

NAMES = ("mamba", "mamba2", "bamba", "zamba2")
NEW_TOKENS = 3
# Relative errors in the 2-norm. On CUDA the products in mamba_ssm's Triton kernels are TF32.
TOLERANCE = {"cpu": 2e-5, "cuda": 5e-3}


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def modules(name, device):
    """The model's module with this library and mamba_ssm, and with neither."""
    prepare(device)
    others = ("fla", "mambapy")
    return import_model(name, others), import_model(name, (*others, "causal_conv1d", "mamba_ssm"))


def prompt(device):
    """Short on the CPU, where the interpreter takes seconds for a few kernels."""
    return tokens(device) if device == "cuda" else tokens(device)[:1, :13]


def test_fused_training_step(name, modules, device):
    ids, results = prompt(device), []
    for module in modules:
        with OperatorCalls() as calls:
            results.append(train_step(make_model(name, module, device), ids))
        layers = MODELS[name][2] if module is modules[0] else 0
        # The fused backward computes the convolution again.
        assert (calls.forward, calls.backward) == (2 * layers, layers)
    (logits, gradients), (wanted_logits, wanted) = results
    assert error(logits, wanted_logits) <= TOLERANCE[device]
    assert gradients.keys() == wanted.keys()
    for key in wanted:
        assert error(gradients[key], wanted[key]) <= TOLERANCE[device], key


def test_generation(name, modules, device):
    ids, outputs = prompt(device), []
    for module in modules:
        model = make_model(name, module, device).eval()
        with torch.no_grad(), OperatorCalls() as calls:
            outputs.append(
                model.generate(
                    ids,
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            )
        layers = MODELS[name][2] if module is modules[0] else 0
        assert (calls.forward, calls.update) == (layers, layers * (NEW_TOKENS - 1))
    with_library, without = outputs
    for step in range(NEW_TOKENS):
        assert error(with_library.logits[step], without.logits[step]) <= TOLERANCE[device]
        # Of two nearly equal logits either may be the larger; what follows is then another text.
        if not torch.equal(*(output.sequences[:, : ids.shape[1] + step + 1] for output in outputs)):
            break
    assert step > 0
