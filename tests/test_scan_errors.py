"""A wrong argument of the selective scan gives an error that names it, and nothing is written."""

import math

import pytest
import torch
from helpers import all_poison
from scan_helpers import INPUTS, gradients_of_outputs, make_scan
from test_scan_update import make_update

from causal_conv1d import selective_scan_fn, selective_state_update
from causal_conv1d.selective_scan import fake

ops = torch.ops.causal_conv1d
PREFIX = {
    "scan_forward": "selective_scan_fwd",
    "scan_backward": "selective_scan_bwd",
    "state_update": "selective_state_update",
}
WRITTEN = ("out", "ungated", "last_states", "state")


def arguments_of(name, device, packed=False):
    """Valid arguments by name, in the order of the operator that writes, its outputs poisoned."""
    if name == "state_update":
        found = make_update(indices=[4, -1, 0], rows=5, device=device)
        found["state_indices"] = found.pop("state_batch_indices")
        out = torch.full_like(found["x"], math.nan)
        return found | {"out": out, "dt_softplus": True}
    bounds = [0, 7, 37] if packed else None
    inputs = make_scan(1 if packed else 2, bounds=bounds, device=device)
    found = {key: inputs[key] for key in (*INPUTS, "cu_seqlens")} | {"delta_softplus": True}
    dout, dlast = gradients_of_outputs(inputs)

    def poison(like):
        return torch.full_like(like, math.nan)

    if name == "scan_forward":
        written = {"out": dout, "ungated": dout, "last_states": dlast}
        return found | {key: poison(like) for key, like in written.items()}
    found |= {"dout": dout, "dlast_states": dlast}
    return found | {f"d{key}": poison(inputs[key]) for key in INPUTS} | {"out": poison(dout)}


def is_written(key, name):
    if name == "scan_backward":
        return (key.startswith("d") and key[1:] in INPUTS) or key == "out"
    return key in WRITTEN


def assert_refused(name, argument, arguments, match):
    """By the operator, and by its fake kernel with the same words."""
    operator = getattr(ops, f"{name}_out").default
    message = rf"{PREFIX[name]}: {argument} {match}"
    with pytest.raises(RuntimeError, match=message) as real:
        operator(*arguments.values())
    outputs = [value for key, value in arguments.items() if is_written(key, name)]
    poisoned = [
        value for value in outputs if isinstance(value, torch.Tensor) and key_is_float(value)
    ]
    if name != "state_update":
        assert all_poison(*poisoned), "something was written"
    with pytest.raises(RuntimeError) as seen:
        fake.check(name, {k: v for k, v in arguments.items() if not k.endswith("softplus")})
    assert str(seen.value) == str(real.value)


def key_is_float(value):
    return value.is_floating_point()


OPERATIONS = tuple(PREFIX)
TENSORS = [
    (name, key)
    for name in OPERATIONS
    for key, value in arguments_of(name, "cpu", packed=name != "state_update").items()
    if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_shape(device, name, key):
    """A dimension that is one longer, and one dimension more."""
    arguments = arguments_of(name, device, packed=key == "cu_seqlens")
    right = arguments[key]
    if key not in ("u", "x"):  # whose shape the others must have
        for dim in range(right.dim()):
            if key in ("B", "C") and right.dim() - dim == 3 - (name == "state_update"):
                continue  # any number of groups that divides
            if key == "state" and dim == 0 or key in ("A", "state") and dim == right.dim() - 1:
                continue  # of any size
            if key == "cu_seqlens":
                continue
            longer = right.new_zeros([s + (i == dim) for i, s in enumerate(right.shape)])
            if is_written(key, name):
                longer.fill_(math.nan)
            assert_refused(name, key, arguments | {key: longer}, "must be")
    wrong = right[None] if right.dim() < 4 else right[None].flatten(2, 3)[:, :, :1, :, None]
    if right.dim() < 4:
        assert_refused(name, key, arguments | {key: wrong}, "must be")
    else:
        with pytest.raises(RuntimeError, match=f"{key} must have one to four dimensions, got 5"):
            getattr(ops, f"{name}_out").default(*(arguments | {key: right[None]}).values())


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_dtype(device, name, key):
    arguments = arguments_of(name, device, packed=key == "cu_seqlens")
    right = arguments[key]
    if not right.is_floating_point():
        assert_refused(name, key, arguments | {key: right.float()}, "must be int32 or int64")
        return
    assert_refused(
        name, key, arguments | {key: right.int()}, "must be float32, float16 or bfloat16"
    )
    if key in ("u", "x"):
        with pytest.raises(RuntimeError, match="must be float64 if and only if"):
            getattr(ops, f"{name}_out").default(*(arguments | {key: right.double()}).values())
    else:
        wrong = arguments | {key: right.double()}
        first = "x" if name == "state_update" else "u"
        assert_refused(name, key, wrong, f"must be float64 if and only if {first} is, got float64")


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_device(cuda, name, key):
    arguments = arguments_of(name, cuda, packed=key == "cu_seqlens")
    arguments[key] = arguments[key].cpu()
    leader = "state" if name == "state_update" else "u"
    with pytest.raises(RuntimeError, match=f"must be on {leader}'s device"):
        getattr(ops, f"{name}_out").default(*arguments.values())


@pytest.mark.parametrize(
    ("name", "key"),
    [(name, key) for name, key in TENSORS if is_written(key, name)],
)
def test_written_tensors(device, name, key):
    """They may be neither expanded nor parts of what is read."""
    arguments = arguments_of(name, device)
    right = arguments[key]
    expanded = right[:1].clone().expand(right.shape)
    assert_refused(
        name, key, arguments | {key: expanded}, "is written and must not be an expanded tensor"
    )
    first = "A" if name == "state_update" else "delta"
    block = torch.full((2 * max(right.numel(), arguments[first].numel()),), math.nan, device=device)
    arguments[key] = block[: right.numel()].view(right.shape)
    read = arguments[first]
    arguments[first] = block[1 : 1 + read.numel()].view(read.shape)
    with pytest.raises(RuntimeError, match=f"{PREFIX[name]}: {key} must not overlap {first}"):
        getattr(ops, f"{name}_out").default(*arguments.values())
    assert block.isnan().all()


@pytest.mark.parametrize("name", OPERATIONS)
def test_groups_and_states(device, name):
    arguments = arguments_of(name, device)
    B = arguments["B"]
    whole = "heads = 4" if name == "state_update" else "dim = 6"
    for count in (0, 5):
        wrong = B.new_zeros(B.shape[0], count, *B.shape[2:])
        assert_refused(
            name,
            "B",
            arguments | {"B": wrong},
            f"must have a number of groups that divides {whole}",
        )
    one = arguments | {"C": arguments["C"][:, :1]}
    assert_refused(name, "C", one, "must have B's number of groups 2")
    key = "state" if name == "state_update" else "A"
    for dstate in (0, 257):
        wide = arguments[key].new_zeros(*arguments[key].shape[:-1], dstate)
        assert_refused(name, key, arguments | {key: wide}, "must have dstate from 1 to 256")


@pytest.mark.parametrize("name", ["scan_forward", "scan_backward"])
def test_bounds(device, name):
    arguments = arguments_of(name, device, packed=True)
    bounds = arguments["cu_seqlens"]
    assert_refused(name, "cu_seqlens", arguments | {"cu_seqlens": bounds[:0]}, "must have at least")
    rows = arguments_of(name, device) | {"cu_seqlens": bounds}
    assert_refused(name, "cu_seqlens", rows, "must be left out unless batch is 1, got batch = 2")


def test_bounds_out_of_range():
    """Which only the CPU can look at."""
    for wrong in ([0, 9, 38], [-1, 9, 37], [0, 9, 8]):
        arguments = arguments_of("scan_forward", "cpu", packed=True)
        arguments["cu_seqlens"] = torch.tensor(wrong)
        with pytest.raises(RuntimeError, match="selective_scan_fwd: cu_seqlens must not decrease"):
            ops.scan_forward_out(*arguments.values())
        assert all_poison(arguments["out"], arguments["last_states"])


def test_state_without_indices(device):
    arguments = arguments_of("state_update", device) | {"state_indices": None}
    assert_refused(
        "state_update", "state", arguments, "must have batch = 3 rows unless state_indices is given"
    )


def test_dz_without_z(device):
    arguments = arguments_of("scan_backward", device) | {"z": None}
    assert_refused("scan_backward", "dz", arguments, "must be left out without z")


# --------------------------------------------------------------------------------------- functions


@pytest.mark.parametrize("name", [*INPUTS, "cu_seqlens"])
@pytest.mark.parametrize("wrong", [3, "x", torch.eye(3).to_sparse()], ids=["int", "str", "sparse"])
def test_no_tensor(name, wrong):
    inputs = make_scan()
    inputs[name] = wrong
    with pytest.raises(TypeError, match=f"selective_scan_fn: {name} must be a"):
        selective_scan_fn(**inputs)


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C"])
def test_none(name):
    with pytest.raises(TypeError, match=f"selective_scan_fn: {name} must be a tensor, got None"):
        selective_scan_fn(**make_scan() | {name: None})


@pytest.mark.parametrize("name", list(make_update()))
@pytest.mark.parametrize("wrong", [3, torch.eye(3).to_sparse()], ids=["int", "sparse"])
def test_no_tensor_of_update(name, wrong):
    with pytest.raises(TypeError, match=f"selective_state_update: {name} must be a"):
        selective_state_update(**make_update() | {name: wrong})


@pytest.mark.parametrize("name", ["state", "x", "dt", "A", "B", "C"])
def test_none_of_update(name):
    with pytest.raises(TypeError, match=f"update: {name} must be a tensor, got None"):
        selective_state_update(**make_update() | {name: None})


@pytest.mark.parametrize("name", ["D", "initial_states", "B"])
def test_wrong_shapes_under_transformations(name):
    """The same words from the fake kernels, and from the formula of forward mode."""
    inputs = make_scan()
    inputs[name] = inputs[name][..., :-1].clone()
    with pytest.raises(RuntimeError) as real:
        selective_scan_fn(**inputs)
    tangent = torch.ones_like(inputs["u"])
    with pytest.raises(RuntimeError) as seen:
        torch.func.jvp(lambda u: selective_scan_fn(**inputs | {"u": u}), (inputs["u"],), (tangent,))
    assert str(seen.value) == str(real.value)
    meta = {key: value if value is None else value.to("meta") for key, value in inputs.items()}
    with pytest.raises(RuntimeError) as seen:
        selective_scan_fn(**meta)
    assert str(seen.value) == str(real.value)
