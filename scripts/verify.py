"""Shows that Mamba models work here, by comparing values and gradients with plain PyTorch.

    python scripts/verify.py [--device cpu|cuda] [--mamba-yolo DIR]

One line, with a tick or a cross, for each of causal_conv1d_fn, mamba_ssm's Mamba module,
selective_scan_cuda, and SS2D and VSSBlock_YOLO of Mamba-YOLO (in DIR, or installed). Where there is
no mamba_ssm or no Mamba-YOLO, what is of it is "not installed", which is no failure. The exit
status is 1 if there is a cross.

``python -m causal_conv1d`` checks this library alone, and more of it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import types
import warnings
from pathlib import Path
from unittest import mock

import apply_patches
import mamba_requirements


def needs_torch(error: Exception) -> str:
    """The library's own sentence, also where it is not installed."""
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    try:
        importlib.import_module("causal_conv1d")
    except ImportError as sentence:
        return f"error: {sentence}"
    return f"error: {error}"


try:
    import torch
    import torch.nn.functional as F
except (ImportError, OSError) as error:  # OSError: a library of its own is missing
    sys.exit(needs_torch(error))

# Relative errors in the 2-norm, from several layers in float32 and in float16.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}

# ------------------------------------------------------------------------------- the plain versions


def causal_conv1d(x, weight, bias=None):
    """x (batch, dim, seqlen), weight (dim, width): SiLU of the causal convolution."""
    padded = F.pad(x, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=x.shape[1]))


def selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """u, delta, z (batch, dim, seqlen), A (dim, state), B, C (batch, groups, state, seqlen).

    Returns the output and the last state, (batch, dim, state).
    """
    delta = delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    # Each group of channels shares its B and C.
    B, C = (t.repeat_interleave(u.shape[1] // t.shape[1], dim=1) for t in (B, C))
    state, outputs = torch.zeros_like(B[..., 0]), []
    for t in range(u.shape[2]):
        decay = torch.exp(delta[:, :, t, None] * A)
        state = decay * state + (delta * u)[:, :, t, None] * B[..., t]
        outputs.append((state * C[..., t]).sum(dim=-1))
    y = torch.stack(outputs, dim=-1) + D[:, None] * u
    return (y if z is None else y * F.silu(z)), state


def mamba_block(p, x):
    """mamba_ssm's Mamba with parameters p, by name, of x (batch, seqlen, d_model)."""
    x, z = (x @ p["in_proj.weight"].T).transpose(1, 2).chunk(2, dim=1)
    x = causal_conv1d(x, p["conv1d.weight"].squeeze(1), p["conv1d.bias"])
    d_state, dt_rank = p["A_log"].shape[1], p["dt_proj.weight"].shape[1]
    projected = p["x_proj.weight"] @ x
    dt, B, C = projected.split([dt_rank, d_state, d_state], dim=1)
    delta, A = p["dt_proj.weight"] @ dt, -torch.exp(p["A_log"])
    y, _ = selective_scan(x, delta, A, B[:, None], C[:, None], p["D"], z, p["dt_proj.bias"], True)
    return y.transpose(1, 2) @ p["out_proj.weight"].T


class PlainScan:
    """Stands in for Mamba-YOLO's SelectiveScanCore."""

    @staticmethod
    def apply(u, delta, A, B, C, D, delta_bias, delta_softplus, *_):
        return selective_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)[0]


# --------------------------------------------------------------------------------------- the checks


class Wrong(Exception):
    """A value that is not what it should be."""


class Missing(Exception):
    """What is to be installed, as a sentence."""


def compare(pairs, dtype) -> float:
    """The largest relative error of (name, got, wanted); more than the tolerance is Wrong."""
    largest = 0.0
    for name, got, want in pairs:
        if got.shape != want.shape:
            raise Wrong(f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
        want = want.detach().double()
        error = ((got.detach().double() - want).norm() / want.norm()).item()
        if not error <= TOLERANCE[dtype]:
            raise Wrong(f"{name} has a relative error of {error:.1e} ({dtype})")
        largest = max(largest, error)
    return largest


def normal(*shape, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def doubled(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def with_gradients(out, names, leaves, dout):
    """(name, value) of the output and of the gradient of each leaf."""
    gradients = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    names = ("output", *(f"the gradient of {name}" for name in names))
    return zip(names, (out, *gradients), strict=True)


def compare_functions(names, got, leaves, want, leaves64, dtype) -> float:
    """Outputs and gradients of two calls, given as the outputs and what they depend on."""
    dout = normal(*got.shape, device=got.device, seed=99)
    found = with_gradients(got, names, leaves, dout)
    wanted = with_gradients(want, names, leaves64, dout)
    return compare(((n, a, b) for (n, a), (_, b) in zip(found, wanted, strict=True)), dtype)


def check_causal_conv1d_fn(device) -> float:
    from causal_conv1d import causal_conv1d_fn

    errors = []
    for dtype in TOLERANCE:
        leaves = [
            normal(*shape, device=device, dtype=dtype, seed=seed).requires_grad_()
            for seed, shape in enumerate(((2, 32, 64), (32, 4), (32,)))
        ]
        leaves64 = doubled(leaves)
        out = causal_conv1d_fn(*leaves, activation="silu")
        want = causal_conv1d(*leaves64)
        names = ("x", "weight", "bias")
        errors.append(compare_functions(names, out, leaves, want, leaves64, dtype))
        # The form in guides for Jetson: the activation in the seventh place.
        out = causal_conv1d_fn(*leaves[:2], None, None, None, None, "silu")
        want = causal_conv1d(*leaves64[:2])
        errors.append(compare_functions(names[:2], out, leaves[:2], want, leaves64[:2], dtype))
    return max(errors)


def check_mamba_module(device) -> float | None:
    package = apply_patches.find_package("mamba_ssm", None)
    if package is None:
        return None
    missing = mamba_requirements.problem(package)
    if missing is not None:
        raise Missing(missing)
    from mamba_ssm.modules.mamba_simple import Mamba

    errors = []
    for dtype in TOLERANCE:
        torch.manual_seed(0)
        module = Mamba(d_model=64, d_state=8).to(device, dtype)
        x = normal(2, 32, 64, device=device, dtype=dtype).requires_grad_()
        names, parameters = zip(*module.named_parameters(), strict=True)
        leaves = [x, *parameters]
        leaves64 = doubled(leaves)
        want = mamba_block(dict(zip(names, leaves64[1:], strict=True)), leaves64[0])
        out = module(x)
        errors.append(compare_functions(("x", *names), out, leaves, want, leaves64, dtype))
    return max(errors)


def check_selective_scan_cuda(device) -> float:
    import selective_scan_cuda

    batch, dim, groups, d_state, seqlen = 2, 16, 2, 8, 70
    shapes = {
        "u": (batch, dim, seqlen),
        "delta": (batch, dim, seqlen),
        "A": (dim, d_state),
        "B": (batch, groups, d_state, seqlen),
        "C": (batch, groups, d_state, seqlen),
        "D": (dim,),
        "z": (batch, dim, seqlen),
        "delta_bias": (dim,),
    }
    inputs = [normal(*shape, device=device, seed=i) for i, shape in enumerate(shapes.values())]
    inputs[2] = -inputs[2].exp()
    inputs64 = doubled(inputs)
    out, x, out_z = selective_scan_cuda.fwd(*inputs, True)
    want, last_state = selective_scan(*inputs64, True)
    dout = normal(*out.shape, device=device, seed=99)
    found = selective_scan_cuda.bwd(*inputs, dout, x, out, None, True, False)
    names = ("u", "delta", "A", "B", "C", "D", "delta_bias", "z")
    wanted = dict(zip(shapes, torch.autograd.grad(want, inputs64, dout.double()), strict=True))
    pairs = [("output", out_z, want), ("the last state", x[:, :, -1, 1::2], last_state)]
    pairs += [
        (f"the gradient of {name}", got, wanted[name])
        for name, got in zip(names, found, strict=True)
    ]
    return compare(pairs, torch.float32)


def check_yolo_module(tree, name, options, device) -> float:
    """The module with its scan against the same module with the plain one, in float64."""
    torch.manual_seed(0)
    module = getattr(tree, name)(**options).to(device).eval()
    with mock.patch.object(tree, "SelectiveScanCore", PlainScan):
        plain = getattr(tree, name)(**options).to(device).double().eval()
    plain.load_state_dict(module.state_dict())
    x = normal(2, 64, 9, 11, device=device).requires_grad_()
    (x64,) = doubled([x])
    names, parameters = zip(*module.named_parameters(), strict=True)
    out, want = module(x), plain(x64)
    leaves, leaves64 = [x, *parameters], [x64, *plain.parameters()]
    return compare_functions(("x", *names), out, leaves, want, leaves64, torch.float32)


def find_mamba_yolo(given: Path | None) -> Path | None:
    """Its mamba_yolo.py, in the folder given or in an installed ultralytics."""
    if given is not None:
        files = [given] if given.is_file() else sorted(given.rglob("mamba_yolo.py"))
        if not files:
            raise FileNotFoundError(f"there is no mamba_yolo.py in {given}")
        return files[0]
    spec = importlib.util.find_spec("ultralytics")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).rglob("mamba_yolo.py"), None)


def import_tree(file: Path):
    """The module as one of a package of its own: without all of ultralytics."""
    package = types.ModuleType("mamba_yolo_tree")
    package.__path__ = [str(file.parent)]
    sys.modules[package.__name__] = package
    return importlib.import_module(f"{package.__name__}.{file.stem}")


def check_ss2d(device, given) -> float | None:
    file = find_mamba_yolo(given)
    if file is None:
        return None
    options = {"d_model": 64, "d_state": 8}
    return check_yolo_module(import_tree(file), "SS2D", options, device)


def check_vssblock(device, given) -> float | None:
    file = find_mamba_yolo(given)
    if file is None:
        return None
    tree = import_tree(file)
    name = "VSSBlock_YOLO" if hasattr(tree, "VSSBlock_YOLO") else "VSSBlock"
    options = {"in_channels": 64, "hidden_dim": 64, "ssm_d_state": 8}
    return check_yolo_module(tree, name, options, device)


# -------------------------------------------------------------------------------------- the command


def mark(good: bool) -> str:
    sign, plain = ("✓", "ok") if good else ("✗", "FAILED")
    try:
        sign.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return plain
    return sign


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description="Compares values and gradients with plain PyTorch; see the file's beginning."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is")
    parser.add_argument(
        "--mamba-yolo", type=Path, metavar="DIR", help="a Mamba-YOLO, or its file mamba_yolo.py"
    )
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # cuDNN's convolutions would be TF32 by default.
    torch.backends.cudnn.allow_tf32 = False

    checks = {
        "causal_conv1d_fn": lambda: check_causal_conv1d_fn(device),
        "Mamba module": lambda: check_mamba_module(device),
        "selective_scan_cuda": lambda: check_selective_scan_cuda(device),
        "SS2D": lambda: check_ss2d(device, options.mamba_yolo),
        "VSSBlock_YOLO": lambda: check_vssblock(device, options.mamba_yolo),
    }
    print(f"torch {torch.__version__}, {device}")
    good = True
    for name, check in checks.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                error = check()
        except Exception as problem:  # reported, and the other checks still run
            good = False
            kind = "" if isinstance(problem, Missing) else f"{type(problem).__name__}: "
            print(f"{mark(False)} {name:<20} {kind}{problem}")
        else:
            if error is None:
                print(f"- {name:<20} not installed")
            else:
                print(f"{mark(True)} {name:<20} largest relative error {error:.0e}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
