"""The selective scan, by the names of the compiled extensions that it stands in for."""

import importlib.machinery
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import allocate, assert_close, assert_untouched_outside, dtype_id, lay_out, randn
from selective_scan_reference import selective_scan_reference
from torch.utils._python_dispatch import TorchDispatchMode

import selective_scan_cuda
import selective_scan_cuda_core
import selective_scan_cuda_ndstate
import selective_scan_cuda_nrow
import selective_scan_cuda_oflex
from causal_conv1d.selective_scan import plain

# Relative errors in the 2-norm against float64. float32: hundreds of roundings follow one another
# in the states, and exp multiplies that of its argument. 16 bits: one rounding at its worst, since
# a few large elements may make up the norm.
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 3e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}

# As the arguments of selective_scan_fwd.
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
IN_TIME = ("u", "delta", "B", "C", "z")


def make(
    batch=2,
    dim=6,
    seqlen=150,
    dstate=3,
    groups=2,
    dtype=torch.float32,
    complex_=False,
    variable="BC",
    without=(),
    device="cpu",
    seed=0,
):
    """The inputs by name; A, D, delta_bias and constant B and C are float32, or float64 as u."""
    params = torch.float64 if dtype == torch.float64 else torch.float32

    def rand(offset, *shape, dtype=dtype):
        return randn(*shape, dtype=dtype, seed=100 * seed + offset, device=device)

    def projection(name, offset):
        if name in variable:
            return rand(offset, batch, groups, dstate, seqlen * (2 if complex_ else 1))
        real = rand(offset, dim, dstate, dtype=params)
        return (
            torch.complex(real, rand(offset + 1, dim, dstate, dtype=params)) if complex_ else real
        )

    A = -rand(1, dim, dstate, dtype=params).exp()
    found = {
        "u": rand(2, batch, dim, seqlen),
        "delta": rand(3, batch, dim, seqlen).abs() / 2,
        "A": torch.complex(A, rand(4, dim, dstate, dtype=params)) if complex_ else A,
        "B": projection("B", 5),
        "C": projection("C", 7),
        "D": rand(9, dim, dtype=params),
        "z": rand(10, batch, dim, seqlen),
        "delta_bias": rand(11, dim, dtype=params).abs() / 2,
    }
    return {name: None if name in without else value for name, value in found.items()}


def expected_of(inputs, dout, softplus):
    """out, out_z, last_state and the gradients by name, in float64."""
    wide = {
        name: value.to(torch.complex128 if value.is_complex() else torch.float64).requires_grad_()
        for name, value in inputs.items()
        if value is not None
    }
    out, out_z, last_state = selective_scan_reference(**wide, delta_softplus=softplus)
    result = out if out_z is None else out_z
    grads = torch.autograd.grad(result, list(wide.values()), dout.double())
    return out, out_z, last_state, dict(zip(wide, grads, strict=True))


def assert_near(actual, expected, tolerance, name, allow_zero=False):
    if actual.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    assert_close(actual, expected.to(actual.device), tolerance, allow_zero=allow_zero, name=name)


def check(inputs, softplus, dout=None):
    """fwd and bwd of selective_scan_cuda agree with the reference."""
    u, z = inputs["u"], inputs["z"]
    if dout is None:
        dout = randn(*u.shape, dtype=u.dtype, device=u.device, seed=77)
    out, out_z, last_state, grads = expected_of(inputs, dout, softplus)
    tolerance = TOLERANCES[u.dtype]
    state_tolerance = TOLERANCES[torch.float64 if u.dtype == torch.float64 else torch.float32]

    found, x, *rest = selective_scan_cuda.fwd(*inputs.values(), softplus)
    assert len(rest) == (z is not None)
    assert_near(found, out, tolerance, "out")
    assert_near(x[:, :, -1, 1::2], last_state, state_tolerance, "last state")
    if z is not None:
        assert_near(rest[0], out_z, tolerance, "out_z")

    results = selective_scan_cuda.bwd(*inputs.values(), dout, x, found, None, softplus, True)
    names = ["u", "delta", "A", "B", "C", "D", "delta_bias"]
    if z is not None:
        assert_near(results.pop(), out_z, tolerance, "out_z, recomputed")
        names.append("z")
    assert len(results) == len(names)
    for name, result in zip(names, results, strict=True):
        if inputs[name] is None:
            assert result is None
            continue
        assert result.dtype == inputs[name].dtype
        # Parameters are float32 or wider; of the rest 16-bit ones are rounded.
        wide = state_tolerance if result.dim() <= 2 else tolerance
        no_decay = name == "A" and u.shape[2] == 1  # of the state 0 alone
        assert_near(result, grads[name], wide, f"d{name}", allow_zero=no_decay)
    return results


# ------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("softplus", [False, True], ids=["linear", "softplus"])
@pytest.mark.parametrize("variable", ["", "B", "C", "BC"], ids=lambda names: f"variable_{names}")
@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
def test_agrees_with_the_reference_in_float64(device, complex_, variable, softplus):
    inputs = make(dtype=torch.float64, complex_=complex_, variable=variable, device=device)
    check(inputs, softplus)


@pytest.mark.parametrize("softplus", [False, True], ids=["linear", "softplus"])
@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=dtype_id)
def test_agrees_with_the_reference(device, dtype, without, softplus):
    check(make(dtype=dtype, without=without, device=device), softplus)


@pytest.mark.parametrize("variable", ["", "B", "C"])
def test_constant_projections(device, variable):
    check(make(variable=variable, dtype=torch.bfloat16, device=device), True)


@pytest.mark.parametrize(
    ("batch", "dim", "groups", "dstate", "seqlen"),
    [
        (1, 1, 1, 1, 1),
        (3, 12, 1, 16, 65),
        (1, 12, 12, 5, 64),
        (2, 12, 3, 33, 40),
        (1, 130, 1, 2, 9),
    ],
)
def test_shapes(device, batch, dim, groups, dstate, seqlen):
    inputs = make(batch, dim, seqlen, dstate, groups, device=device)
    check(inputs, True, dout=torch.ones_like(inputs["u"]))


def test_last_state_of_a_long_sequence(device):
    """In the odd places of x, which has a chunk alone; the even ones hold nothing."""
    inputs = make(1, 2, 4166, 2, 1, device=device)
    inputs["delta"] /= 100  # so that something of the beginning is left
    x = selective_scan_cuda.fwd(*inputs.values(), False)[1]
    assert x.shape == (1, 2, 1, 4) and x.dtype == torch.float32
    wide = {name: None if v is None else v.double() for name, v in inputs.items()}
    assert_near(x[:, :, -1, 1::2], selective_scan_reference(**wide)[2], 1e-5, "last state")
    assert not x[..., 0::2].any()


def test_gradients_over_several_chunks(device, monkeypatch):
    """In plain PyTorch, which keeps a state for each."""
    monkeypatch.setattr(plain, "CHUNK", 128)
    check(make(seqlen=300, complex_=True, device=device), True)


def test_tiles_of_channels_and_batch(device, monkeypatch):
    """A tile that is smaller than a group, than all groups, and than the batch."""
    inputs = make(3, 12, 70, 4, 2, dtype=torch.float64, complex_=True, device=device)
    whole = check(inputs, True)
    for rows in (1, 4, 6, 9, 12, 24):
        elements = rows * 4 * plain.BLOCK
        monkeypatch.setattr(plain, "TILE_ELEMENTS", {"cpu": elements, "elsewhere": elements})
        tiled = check(inputs, True)
        for name, first, second in zip(range(8), whole, tiled, strict=True):
            assert_near(first, second, 1e-13, str(name))


@pytest.mark.parametrize("layout", ["channel_last", "channel_first_slice", "strided"])
def test_any_strides(device, layout):
    inputs = make(device=device)
    results = check(inputs, True)
    strided = inputs | {n: lay_out(inputs[n], layout) for n in ("u", "delta", "z")}
    strided["A"] = lay_out(inputs["A"], "transposed")
    strided["B"] = inputs["B"].transpose(2, 3).contiguous().transpose(2, 3)
    for first, second in zip(results, check(strided, True), strict=True):
        assert_near(second, first.double(), 3e-6, "with other strides")


# -------------------------------------------------------------------------------- details of a call


def test_dz_is_written_in_place(device):
    """mamba_ssm gives half of the gradient of xz, and looks nowhere else."""
    inputs = make(device=device)
    dout = randn(*inputs["u"].shape, device=device)
    expected = selective_scan_cuda.bwd(*inputs.values(), dout, None, None, None, True, False)[7]
    for layout in ("channel_first_slice", "channel_last_slice", "dim_major"):
        dz = allocate(inputs["z"].shape, layout, device=device)
        arguments = (*inputs.values(), dout, None, None, dz, True, False)
        results = selective_scan_cuda.bwd(*arguments)
        assert len(results) == 8 and results[7] is dz
        assert_near(dz, expected.double(), 3e-6, "dz")
        assert_untouched_outside(dz)


def test_results_are_like_their_tensors(device):
    """Dtypes and layouts; nothing records a gradient."""
    inputs = make(dtype=torch.bfloat16, device=device)
    inputs["delta"] = lay_out(inputs["delta"], "dim_major").requires_grad_()
    out, x, out_z = selective_scan_cuda.fwd(*inputs.values(), True)
    assert out.dtype == out_z.dtype == torch.bfloat16 and x.dtype == torch.float32
    assert out.stride() == inputs["delta"].stride() and not out.requires_grad
    results = selective_scan_cuda.bwd(*inputs.values(), out, x, out, None, True, False)
    assert [result.dtype for result in results[5:7]] == [torch.float32] * 2
    assert results[1].stride() == inputs["delta"].stride()


def test_is_deterministic(device):
    inputs = make(4, 64, 257, 16, 2, dtype=torch.bfloat16, device=device)
    dout = randn(*inputs["u"].shape, dtype=torch.bfloat16, device=device)

    def run():
        found = selective_scan_cuda.fwd(*inputs.values(), True)
        arguments = (*inputs.values(), dout, found[1], found[0], None, True, True)
        return [*found, *selective_scan_cuda.bwd(*arguments)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


class Largest(TorchDispatchMode):
    """The most elements that a tensor has which an operation allocates."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "aten" and not function.is_view:
            results = result if isinstance(result, (list, tuple)) else (result,)
            for tensor in results:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
        return result


def test_memory_of_plain_pytorch_is_bounded():
    """No tensor of a value per state and step, beyond those of a tile."""
    inputs = make(1, 4, 4500, 64, 1, variable="", complex_=True)
    elements = 4 * 64 * plain.BLOCK
    assert inputs["u"].numel() > elements
    with Largest() as largest:
        out, x, _ = selective_scan_cuda.fwd(*inputs.values(), True)
        selective_scan_cuda.bwd(*inputs.values(), out, x, out, None, True, True)
    assert largest.elements == inputs["u"].numel()
    inputs = make(2, 4, 200, 64, 1, complex_=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "TILE_ELEMENTS", {"cpu": 2 * 64 * plain.BLOCK})
        with Largest() as largest:
            out, x, _ = selective_scan_cuda.fwd(*inputs.values(), True)
            selective_scan_cuda.bwd(*inputs.values(), out, x, out, None, True, True)
    # The gradient of B has as many.
    assert largest.elements == inputs["B"].numel() > 2 * 64 * plain.BLOCK


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 4, 0)], ids=["no_batch", "no_steps"])
def test_empty(device, shape):
    inputs = make(*shape, device=device)
    out, x, out_z = selective_scan_cuda.fwd(*inputs.values(), True)
    assert out.shape == out_z.shape == shape
    results = selective_scan_cuda.bwd(*inputs.values(), out, x, out, None, True, True)
    for name, result in zip(
        ("u", "delta", "A", "B", "C", "D", "delta_bias"), results, strict=False
    ):
        assert result.shape == inputs[name].shape and not result.any()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("u", lambda t: t[0]),
        ("delta", lambda t: t[:, :-1]),
        ("A", lambda t: t[:-1]),
        ("B", lambda t: t[..., :-1]),
        ("B", lambda t: t[:, :1]),
        ("B", lambda t: t[0]),
        ("C", lambda t: t.to(torch.complex64)),
        ("D", lambda t: t[:-1]),
        ("z", lambda t: t[..., :-1]),
        ("delta_bias", lambda t: t[:-1]),
    ],
)
def test_errors_name_the_argument(name, wrong):
    inputs = make()
    inputs[name] = wrong(inputs[name])
    with pytest.raises(RuntimeError, match=rf"selective_scan_fwd: ({name}|A|C|delta) must"):
        selective_scan_cuda.fwd(*inputs.values(), True)


@pytest.mark.parametrize("name", ["delta", "B", "D", "z", "delta_bias"])
def test_errors_name_the_argument_with_a_complex_A(name):
    inputs = make(complex_=True)
    inputs[name] = inputs[name][..., :-1]
    with pytest.raises(ValueError, match=f"selective_scan fwd: {name} must"):
        selective_scan_cuda.fwd(*inputs.values(), True)


def test_bwd_refuses_an_x_of_another_shape():
    inputs = make()
    out, x, _ = selective_scan_cuda.fwd(*inputs.values(), True)
    with pytest.raises(ValueError, match="x must be"):
        selective_scan_cuda.bwd(*inputs.values(), out, x[:, :, :, 1:], out, None, True, False)


# -------------------------------------------------------------------------------- the other modules


def without_z(inputs):
    return [value for name, value in inputs.items() if name != "z"]


@pytest.mark.parametrize("module", [selective_scan_cuda_core, selective_scan_cuda_nrow])
@pytest.mark.parametrize("nrows", [1, 2])
def test_core_and_nrow(device, module, nrows):
    inputs = make(without=("z",), device=device)
    dout = randn(*inputs["u"].shape, device=device)
    out, x = module.fwd(*without_z(inputs), True, nrows)
    expected_out, expected_x = selective_scan_cuda.fwd(*inputs.values(), True)
    assert torch.equal(out, expected_out) and torch.equal(x, expected_x)
    grads = module.bwd(*without_z(inputs), dout, x, True, nrows)
    expected = selective_scan_cuda.bwd(*inputs.values(), dout, x, out, None, True, False)
    assert len(grads) == len(expected) == 7
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_core_without_options(device):
    inputs = make(without=("z", "D", "delta_bias"), device=device)
    out, x = selective_scan_cuda_core.fwd(*without_z(inputs), False, 1)
    grads = selective_scan_cuda_core.bwd(*without_z(inputs), out, x, False, 1)
    assert grads[5:] == [None, None]


def test_core_in_the_form_of_the_mamba_yolo_for_jetson(device):
    """Its forward gives nrows and backnrows, as tensors, before delta_softplus."""
    inputs = make(device=device)
    rows = torch.tensor([-1], device=device)
    for softplus in (False, True):
        out, _ = selective_scan_cuda_core.fwd(*without_z(inputs), rows, rows, softplus)
        expected, _ = selective_scan_cuda_core.fwd(*without_z(inputs), softplus, 1)
        assert torch.equal(out, expected)


def test_oflex_gives_float32(device):
    inputs = make(dtype=torch.bfloat16, without=("z",), device=device)
    out, x = selective_scan_cuda_oflex.fwd(*without_z(inputs), True, 1, True)
    assert out.dtype == torch.float32
    dout = randn(*out.shape, device=device)
    expected, _, _, grads = expected_of(inputs, dout, True)
    assert_near(out, expected, TOLERANCES[torch.float32], "out")
    assert selective_scan_cuda_oflex.fwd(*without_z(inputs), True, 1, False)[0].dtype == (
        torch.bfloat16
    )
    results = selective_scan_cuda_oflex.bwd(*without_z(inputs), dout, x, True, 1)
    for name, result in zip(("u", "delta", "A", "B", "C", "D", "delta_bias"), results, strict=True):
        assert result.dtype == inputs[name].dtype
        assert_near(result, grads[name], TOLERANCES[result.dtype], name)


def test_oflex_with_fewer_channels_of_delta(device):
    inputs = make(without=("z",), device=device)
    inputs["delta"], inputs["delta_bias"] = inputs["delta"][:, ::2], inputs["delta_bias"][::2]
    spread = dict(inputs)
    spread["delta"] = inputs["delta"].repeat_interleave(2, dim=1)
    spread["delta_bias"] = inputs["delta_bias"].repeat_interleave(2)
    out, x = selective_scan_cuda_oflex.fwd(*without_z(inputs), True, 1, True)
    dout = randn(*out.shape, device=device)
    expected, _, _, grads = expected_of(spread, dout, True)
    assert_near(out, expected, TOLERANCES[torch.float32], "out")
    results = selective_scan_cuda_oflex.bwd(*without_z(inputs), dout, x, True, 1)
    wanted = grads["delta"].unflatten(1, (-1, 2)).sum(2)
    assert_near(results[1], wanted, TOLERANCES[torch.float32], "ddelta")
    wanted = grads["delta_bias"].unflatten(0, (-1, 2)).sum(1)
    assert_near(results[6], wanted, TOLERANCES[torch.float32], "ddelta_bias")
    with pytest.raises(ValueError, match="delta must have channels that divide 6, got 4"):
        inputs["delta"] = spread["delta"][:, :4]
        selective_scan_cuda_oflex.fwd(*without_z(inputs), True, 1)


def test_ndstate(device):
    """One state, without its axis."""
    inputs = make(dstate=1, without=("z",), device=device)
    flat = inputs | {"A": inputs["A"][:, 0], "B": inputs["B"][:, :, 0], "C": inputs["C"][:, :, 0]}
    out, x = selective_scan_cuda_ndstate.fwd(*without_z(flat), True, 1)
    dout = randn(*out.shape, device=device)
    expected, _, _, grads = expected_of(inputs, dout, True)
    assert_near(out, expected, TOLERANCES[torch.float32], "out")
    results = selective_scan_cuda_ndstate.bwd(*without_z(flat), dout, x, True, 1)
    for name, result in zip(("u", "delta", "A", "B", "C", "D", "delta_bias"), results, strict=True):
        assert result.shape == flat[name].shape
        wanted = grads[name].reshape(result.shape)
        assert_near(result, wanted, TOLERANCES[torch.float32], name)


# ------------------------------------------------------------------------------------- installation

MODULES = ["", "_core", "_ndstate", "_nrow", "_oflex"]


@pytest.mark.parametrize("suffix", MODULES)
def test_a_compiled_extension_wins(tmp_path, suffix):
    name = f"selective_scan_cuda{suffix}"
    source = Path(importlib.import_module(name).__file__)
    (tmp_path / source.name).write_bytes(source.read_bytes())
    find = importlib.machinery.PathFinder.find_spec
    assert find(name, [str(tmp_path)]).origin.endswith(".py")
    compiled = tmp_path / (name + importlib.machinery.EXTENSION_SUFFIXES[0])
    compiled.touch()
    importlib.machinery.PathFinder.invalidate_caches()
    assert find(name, [str(tmp_path)]).origin == str(compiled)


def test_import_alone():
    """As the first import."""
    code = "import sys; del sys.path[0]\n"
    code += "".join(f"import selective_scan_cuda{suffix}\n" for suffix in MODULES)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_memory_on_cuda_is_a_share_of_the_tensors(cuda):
    """Beside inputs and results: states of chunks, and parts of the sums."""
    inputs = make(1, 512, 32768, 16, 1, dtype=torch.bfloat16, device=cuda)
    out, x, _ = selective_scan_cuda.fwd(*inputs.values(), True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = selective_scan_cuda.bwd(*inputs.values(), out, x, out, None, True, False)
    workspace = torch.cuda.max_memory_allocated() - before - size(*results)
    assert workspace <= size(*inputs.values(), out, *results) / 2


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
