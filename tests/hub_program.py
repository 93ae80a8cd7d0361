"""Loads a kernel of the Hub beside the installed package, or without it, and uses both.

    python hub_program.py FOLDER before|after|absent simple|kernels DEVICE

When the package is imported: before the kernel, after it, or never. `simple` imports the variant as
`kernels` does; `kernels` has it do so.
"""

import importlib
import importlib.util
import json
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

INSTALLED = ("causal_conv1d", "causal_conv1d_cuda", "selective_scan_cuda")


class Calls(TorchDispatchMode):
    """Counts the operators of each namespace."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "causal_conv1d" in function.namespace:
            self.counts[function.namespace] += 1
        return function(*args, **(kwargs or {}))


def load_simply(folder: Path, device: str):
    wanted = "-cu" if device == "cuda" else "-cpu"
    (variant,) = (path for path in (folder / "build").iterdir() if wanted in path.name)
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_by_kernels(folder: Path, device: str):
    from kernels import get_local_kernel

    return get_local_kernel(folder)


def check_values(module, device):
    """Of the three functions, in float64, and the gradients of the first."""
    reference = importlib.import_module(f"{module.__name__}.reference")

    def same(found, expected):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(device)

    torch.manual_seed(0)
    leaves = [randn(2, 6, 33), randn(6, 4), randn(6), randn(2, 6, 3)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x, weight, bias, states = leaves
    found = module.causal_conv1d_fn(x, weight, bias, None, states, True, activation="silu")
    expected = reference.causal_conv1d_ref(x, weight, bias, states, True, activation="silu")
    grads = [randn(*out.shape) for out in found]
    for pair in zip(found, expected, strict=True):
        same(*pair)
    found, expected = (torch.autograd.grad(outs, leaves, grads) for outs in (found, expected))
    for pair in zip(found, expected, strict=True):
        same(*pair)

    x, weight, bias, states = (leaf.detach() for leaf in leaves)
    plain = module.causal_conv1d_fn(x, weight, bias)  # the overload without autograd
    same(plain, reference.causal_conv1d_ref(x, weight, bias))
    mapped = torch.vmap(lambda x: module.causal_conv1d_fn(x[None], weight, bias)[0])(x)
    same(mapped, plain)
    compiled = torch.compile(module.causal_conv1d_fn, backend="aot_eager", fullgraph=True)
    same(compiled(x, weight, bias), plain)

    one, two = states.clone(), states.clone()
    out = module.causal_conv1d_update(x[:, :, 0], one, weight, bias, "silu")
    same(out, reference.causal_conv1d_update_ref(x[:, :, 0], two, weight, bias, "silu"))
    same(one, two)
    tokens, bounds = x[0].T.contiguous(), torch.tensor([0, 5, 5, 33], device=device)
    same(
        module.causal_conv1d_varlen_states(tokens, bounds, 4),
        reference.causal_conv1d_varlen_states_ref(tokens, bounds, 4),
    )

    A, B = -randn(6, 5).exp(), randn(2, 5, 33)
    inputs = [x, x.abs(), A, B, -B]
    same(module.selective_scan_fn(*inputs), reference.selective_scan_ref(*inputs))
    one = randn(2, 6, 5)
    two, token = one.clone(), (x[:, :, 0], x[:, :, 1].abs(), A, B[:, :, 0], B[:, :, 1])
    out = module.selective_state_update(one, *token)
    same(out, reference.selective_state_update_ref(two, *token))
    same(one, two)


def check_names(module, device):
    """Each operator is of the module's own namespace, and is known to torch there."""
    x, weight = torch.randn(2, 6, 9, device=device), torch.randn(6, 4, device=device)
    with Calls() as calls, FlopCounterMode(display=False) as flops:
        module.causal_conv1d_fn(x, weight)
        module.causal_conv1d_update(x[:, :, 0], x[:, :, :3].clone(), weight)
    assert calls.counts == {module.__name__: 2}, calls.counts
    assert flops.get_total_flops() == 2 * 4 * (2 * 6 * 9 + 2 * 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.11's profiler warns of itself
        with torch.profiler.profile() as profile:  # which sees the overload without autograd
            module.causal_conv1d_fn(x, weight)
    names = [event.name for event in profile.events() if event.name.endswith("::forward")]
    assert names == [f"{module.__name__}::forward"], names
    ops = module._ops.ops  # those that only graphs of torch.compile hold
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert ops.keep(fake).shape == ops.update_gradient(fake, fake).shape == x.shape
    assert torch.equal(torch.vmap(ops.keep)(x), x)
    assert module._library.cpu.path.parent == Path(module.__file__).parent


def main(folder, order, loader, device):
    if order == "absent":
        sys.modules.update(dict.fromkeys(INSTALLED))  # their import fails
    modules = []
    if order == "before":
        modules.append(importlib.import_module("causal_conv1d"))
    distributed = set(vars(torch.distributed))
    kernel = {"simple": load_simply, "kernels": load_by_kernels}[loader](Path(folder), device)
    assert kernel.__name__.startswith("_causal_conv1d_"), kernel
    modules.append(kernel)
    if order != "before":
        assert not any(sys.modules.get(name) for name in INSTALLED)
        assert set(vars(torch.distributed)) == distributed
        assert "loaded" not in vars(torch.ops.causal_conv1d)
    if order == "after":
        modules.append(importlib.import_module("causal_conv1d"))
    for module in (*modules, *modules):
        check_names(module, device)
        check_values(module, device)
    registrations = {module._library.cpu.registration for module in modules}
    print(*(module.__name__ for module in modules), *registrations, sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
