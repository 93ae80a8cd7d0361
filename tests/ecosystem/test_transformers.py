"""Tiny models of transformers give the same values and gradients with this library as without.

transformers takes ``causal_conv1d_fn`` and ``causal_conv1d_update`` when a model's module is
imported, and uses them on every device; without the package it has its own in plain PyTorch. So
each module is imported twice. That one calls this library and the other does not is counted.
"""

import importlib
import sys

import pytest
import torch
from operator_calls import OperatorCalls

transformers = pytest.importorskip("transformers")

VOCABULARY, BATCH, SEQLEN, NEW_TOKENS = 64, 2, 37, 6
ATTENTION = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}

# Name: (prefix of its classes, options besides COMMON, layers with a short convolution).
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MODELS = {
    "mamba": ("Mamba", {"state_size": 8}, 2),
    "mamba2": (
        "Mamba2",
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8},
        2,
    ),
    "falcon_mamba": ("FalconMamba", {"state_size": 8}, 2),
    "jamba": (
        "Jamba",
        ATTENTION
        | {"num_experts": 2, "num_experts_per_tok": 2, "mamba_d_state": 8}
        | {"attn_layer_period": 2, "attn_layer_offset": 1},
        1,
    ),
    "bamba": (
        "Bamba",
        ATTENTION
        | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2}
        | {"mamba_chunk_size": 8, "attn_layer_indices": [1]},
        1,
    ),
    "zamba2": (
        "Zamba2",
        ATTENTION
        | {"num_key_value_heads": 4, "mamba_d_state": 8, "mamba_headdim": 8, "mamba_ngroups": 2}
        | {"n_mamba_heads": 8, "chunk_size": 8, "num_mem_blocks": 1, "adapter_rank": 4}
        | {"layers_block_type": ["mamba", "hybrid"]},
        2,
    ),
    "qwen3_next": (
        "Qwen3Next",
        ATTENTION
        | {"head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
        # Dense: after any rounding a router would pick other experts.
        | {"layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": [0, 1]},
        1,
    ),
    "lfm2": (
        "Lfm2",
        ATTENTION | {"conv_L_cache": 3, "layer_types": ["conv", "full_attention"]},
        1,
    ),
}

# In the 2-norm, relative. The two paths round differently, and later layers and the backward
# amplify that: 1e-7 in logits and 1e-6 in gradients were measured.
LOGITS, GRADIENTS = 1e-6, 1e-5


def import_model(name, hidden):
    """transformers' module of this model, imported while the packages hidden cannot be."""
    path = f"transformers.models.{name}.modeling_{name}"
    with pytest.MonkeyPatch.context() as patch:
        for package in hidden:
            patch.setitem(sys.modules, package, None)
        sys.modules.pop(path, None)
        return importlib.import_module(path)


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def modules(name):
    """The model's module with this library and without. Other kernels are hidden from both."""
    others = ("mamba_ssm", "fla", "mambapy")
    return import_model(name, others), import_model(name, (*others, "causal_conv1d"))


@pytest.fixture(autouse=True)
def float32_throughout(monkeypatch):
    """cuDNN's convolutions would be TF32 by default, those of this library are not."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def make_model(name, module, device, dtype=torch.float32):
    prefix, options, _ = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**COMMON | options)
    torch.manual_seed(0)
    return getattr(module, f"{prefix}ForCausalLM")(config).to(device, dtype)


def tokens(device):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (BATCH, SEQLEN), generator=generator).to(device)


def train_step(model, ids, mask=None):
    """Logits, and the gradient of each parameter."""
    output = model.train()(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
    output.loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), gradients


def error(actual, expected):
    size = expected.double().norm()
    assert size > 0, "the expected value is 0, nothing is tested"
    return ((actual.double() - expected.double()).norm() / size).item()


def assert_same(actual, expected, logits=LOGITS, gradients=GRADIENTS):
    assert error(actual[0], expected[0]) <= logits
    assert actual[1].keys() == expected[1].keys() and any("conv" in key for key in actual[1])
    # A gradient whose terms nearly cancel, such as qwen3_next's dt_bias at 1e-6 of the largest, has
    # the rounding errors of its terms, not of its sum.
    floor = 1e-4 * max(gradient.norm().item() for gradient in expected[1].values())
    for key, gradient in expected[1].items():
        difference = (actual[1][key].double() - gradient.double()).norm().item()
        assert gradient.any(), f"{key}: the expected gradient is 0, nothing is tested"
        assert difference <= gradients * max(gradient.norm().item(), floor), key


@pytest.mark.parametrize("padded", (False, True))
def test_training_step(name, modules, device, padded):
    ids = tokens(device)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :11] = 0
    results = []
    for module in modules:
        with OperatorCalls() as calls:
            results.append(train_step(make_model(name, module, device), ids, mask))
        layers = MODELS[name][2] if module is modules[0] else 0
        assert (calls.forward, calls.backward) == (layers, layers)
    assert_same(*results)


def test_bfloat16_is_no_less_accurate(name, modules, device):
    """Against the same rounded weights in float32. The convolution rounds once, at its end."""
    ids = tokens(device)
    models = [make_model(name, module, device, torch.bfloat16) for module in modules]
    exact = make_model(name, modules[1], device)
    exact.load_state_dict(models[0].state_dict())
    with_library, without = (train_step(model, ids) for model in models)
    expected = train_step(exact, ids)
    assert error(with_library[0], expected[0]) <= 1.1 * error(without[0], expected[0])


def test_generation(name, modules, device):
    """A prompt, then a token at a time from the cache, by transformers' own greedy loop."""
    ids, outputs = tokens(device), []
    for module in modules:
        model = make_model(name, module, device).eval()
        with OperatorCalls() as calls:
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
    assert with_library.sequences.shape == (BATCH, SEQLEN + NEW_TOKENS)
    assert torch.equal(with_library.sequences, without.sequences)
    assert len(with_library.logits) == NEW_TOKENS
    for step in range(NEW_TOKENS):
        assert error(with_library.logits[step], without.logits[step]) <= LOGITS


def test_prompt_in_two_pieces(name, modules, device):
    """The second piece meets a filled cache, so its convolution starts from the cached inputs."""
    ids = tokens(device)
    pieces = []
    for module in modules:
        model = make_model(name, module, device).eval()
        with torch.no_grad(), OperatorCalls() as calls:
            first = model(input_ids=ids[:, :20], use_cache=True)
            # The models that only ever have this cache call it cache_params.
            key = "cache_params" if "cache_params" in first else "past_key_values"
            second = model(input_ids=ids[:, 20:], use_cache=True, **{key: first[key]})
        pieces.append(second.logits)
        assert calls.total == (2 * MODELS[name][2] if module is modules[0] else 0)
    assert error(pieces[0], pieces[1]) <= LOGITS


def test_packed_sequences(device):
    """seq_idx reaches the convolution: a packed row equals its sequences one by one."""
    module = import_model("lfm2", ())
    config = transformers.Lfm2Config(**COMMON | MODELS["lfm2"][1])
    torch.manual_seed(0)
    layer = module.Lfm2ShortConv(config, layer_idx=0).to(device)
    x = torch.randn(1, 30, config.hidden_size, device=device)
    ids = torch.tensor([[0] * 13 + [1] * 17], dtype=torch.int32, device=device)
    together = layer(x, seq_idx=ids)
    apart = torch.cat([layer(x[:, :13]), layer(x[:, 13:])], dim=1)
    assert torch.allclose(together, apart, atol=1e-6)
    assert not torch.allclose(layer(x), apart, atol=1e-3)
