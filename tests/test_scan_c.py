"""The kernels of the selective scan, through their C interface."""

import random

import pytest
import scan_c as c
import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Relative errors in the 2-norm: of results of one step's operations, and of sums over many.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 3e-3, torch.float64: 1e-13}
SUMS = {**TOLERANCE, torch.float32: 5e-6}
FEW = 256  # below this number of elements rounding errors do not average out


@pytest.fixture(autouse=True)
def default_device(device):
    with torch.device(device):
        yield


@pytest.fixture
def cpu(device):
    if device != "cpu":
        pytest.skip("about the CPU")


class Draw:
    """Random options of a call, and tensors of random strides, from one seed."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.torch = torch.Generator(c.current_device()).manual_seed(seed)
        self.fp64 = self.random.random() < 0.15

    def one_of(self, *choices):
        return self.random.choice(choices)

    def dtype(self):
        return torch.float64 if self.fp64 else self.one_of(*FLOATS)

    def view(self, shape, dtype=None):
        """Memory of random strides: permuted, a slice, with gaps, or backwards is not torch's."""
        dims = list(range(len(shape)))
        if self.one_of(True, False):
            self.random.shuffle(dims)
        extra = [self.one_of(0, 0, 0, 1, 3) for _ in shape]
        step = [self.one_of(1, 1, 1, 2) for _ in shape]
        whole = [(n + e) * s for n, e, s in zip(shape, extra, step, strict=True)]
        memory = torch.full([whole[d] for d in dims], 7, dtype=dtype or self.dtype())
        memory = memory.permute([dims.index(d) for d in range(len(shape))])
        for d, n in enumerate(shape):
            memory = memory.narrow(d, extra[d] * step[d], n * step[d])[
                (slice(None),) * d + (slice(None, None, step[d]),)
            ]
        return memory

    def tensor(self, *shape, scale=1.0, shift=0.0, sign=0, dtype=None):
        values = torch.randn(shape, generator=self.torch, dtype=torch.float64) * scale + shift
        values = sign * values.abs() if sign else values
        to = self.view(shape, dtype)
        if all(shape) and self.random.random() < 0.1:  # some dimension expanded
            d = self.random.randrange(len(shape))
            to = to.narrow(d, 0, 1).copy_(values.narrow(d, 0, 1)).expand(shape)
            return to
        return to.copy_(values)

    def maybe(self, make):
        return make() if self.one_of(True, False) else None

    def problem(self, batch, dim, seqlen, dstate, groups, sequences=None):
        softplus = self.one_of(0, 1)
        p = {"u": self.tensor(batch, dim, seqlen), "delta_softplus": softplus}
        p["delta"] = self.tensor(batch, dim, seqlen, scale=0.5, sign=1 - softplus)
        p["A"] = self.tensor(dim, dstate, sign=-1)
        for name in "BC":
            shape = (batch, groups, dstate, seqlen)
            if self.random.random() < 0.25:
                shape = (dim, dstate)
            p[name] = self.tensor(*shape)
        p["D"] = self.maybe(lambda: self.tensor(dim))
        p["z"] = self.maybe(lambda: self.tensor(batch, dim, seqlen))
        p["delta_bias"] = self.maybe(
            lambda: self.tensor(dim, shift=-softplus, scale=0.3, sign=1 - softplus)
        )
        rows = batch
        if sequences is not None:
            ends = sorted(self.random.randrange(seqlen + 1) for _ in range(sequences + 1))
            ends[0], ends[-1] = self.one_of(0, ends[0]), self.one_of(seqlen, ends[-1])
            p["cu_seqlens"] = torch.tensor(ends, dtype=self.one_of(torch.int32, torch.int64))
            rows = sequences
        p["initial_states"] = self.maybe(lambda: self.tensor(rows, dim, dstate))
        return {name: value for name, value in p.items() if value is not None}


def draw(seed):
    d = Draw(seed)
    groups = d.one_of(1, 1, 1, 2, 3)
    dim = groups * d.one_of(0, 1, 1, 2, 5, 7, 8, 17, 31, 64, 71) // d.one_of(1, 1, groups)
    dim = dim // groups * groups
    seqlen = d.one_of(0, 1, 2, 7, 13, 16, 31, 64, 67, 130)
    dstate = d.one_of(1, 1, 2, 3, 4, 8, 13, 16, 16, 16, 33, 64, 67, 256)
    if dim * seqlen * dstate > 1 << 17:
        seqlen = max(1, (1 << 17) // (dim * dstate))
    packed = d.one_of(None, None, 1, 4, 9)
    return d, d.problem(
        1 if packed else d.one_of(0, 1, 1, 2, 3), dim, seqlen, dstate, groups, packed
    )


def doubles(problem):
    return {
        name: value.double().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in problem.items()
    }


def check(name, got, want, tolerance):
    """Values that are not finite are in the same places."""
    want = want.detach()
    assert got.shape == want.shape, name
    few = 4 if want.numel() < FEW else 1
    if tolerance is SUMS and want.numel() <= 2:
        few = 100  # a sum may be far smaller than what it adds
    error = c.error(got, want)
    assert error <= few * tolerance[got.dtype], f"{name}: {error:.2g}"


def assert_same(name, got, want):
    """To the bit on the CPU; a GPU rounds otherwise where its chunks of time lie otherwise."""
    if got.is_cuda:
        check(name, got, want, SUMS)
    else:
        assert torch.equal(got, want), name


def check_forward(draw, problem, threads):
    u = problem["u"]
    outputs = {"out": draw.view(u.shape)}
    for name, shape in (("ungated", u.shape), ("last_states", c.states_shape(problem))):
        outputs[name] = draw.view(shape)
    got = c.forward(problem, threads, **outputs)
    leaves = doubles(problem)
    want = dict(zip(("out", "ungated", "last_states"), c.reference(**leaves), strict=True))
    for name, value in want.items():
        check(name, got[name], value, TOLERANCE)
    return leaves, want


def check_backward(draw, problem, leaves, want, threads):
    dout = draw.tensor(*problem["u"].shape)
    dlast = draw.maybe(lambda: draw.tensor(*c.states_shape(problem)))
    outputs = ([want["out"]], [dout.double()]) if want["out"].requires_grad else ([], [])
    if dlast is not None and want["last_states"].requires_grad:
        outputs[0].append(want["last_states"])
        outputs[1].append(dlast.double())
    names = [name for name in c.INPUTS if name in problem]
    grads = [None] * len(names)
    if outputs[0]:
        grads = torch.autograd.grad(
            *(outputs[0], [leaves[name] for name in names], outputs[1]), allow_unused=True
        )
    results = {c.GRADIENTS[name]: draw.view(problem[name].shape) for name in names}
    results["out"] = draw.view(dout.shape)
    left_out = {name for name in results if draw.random.random() < 0.2}
    got = c.backward(
        problem, dout, dlast, threads,
        **{name: None if name in left_out else t for name, t in results.items()},
    )  # fmt: skip
    if "out" not in left_out:
        check("out", got["out"], want["out"], TOLERANCE)
    for name, grad in zip(names, grads, strict=True):
        grad = torch.zeros_like(leaves[name]) if grad is None else grad
        if c.GRADIENTS[name] not in left_out:
            tolerance = TOLERANCE if name in ("u", "z", "initial_states") else SUMS
            check(c.GRADIENTS[name], got[c.GRADIENTS[name]], grad, tolerance)


@pytest.mark.parametrize("seed", range(150))
def test_random_options(seed):
    draw_, problem = draw(seed)
    leaves, want = check_forward(draw_, problem, draw_.one_of(1, 2, 3))
    check_backward(draw_, problem, leaves, want, draw_.one_of(1, 2, 3))


def plain_problem(batch, dim, seqlen, dstate, groups=1, dtype=torch.float32, **options):
    p = {"u": torch.randn(batch, dim, seqlen), "delta": 0.5 * torch.randn(batch, dim, seqlen)}
    p["A"] = -torch.rand(dim, dstate) * dstate
    p["B"], p["C"] = (torch.randn(batch, groups, dstate, seqlen) for _ in range(2))
    p["D"], p["delta_bias"] = torch.randn(dim), torch.randn(dim) - 2
    p["z"] = torch.randn(batch, dim, seqlen)
    p["initial_states"] = torch.randn(batch, dim, dstate)
    return {name: t.to(dtype) for name, t in p.items()} | {"delta_softplus": 1} | options


@pytest.mark.parametrize("shape", ((1, 37, 2100, 16), (2, 70, 600, 64), (1, 20, 300, 256)))
def test_many_spans(shape):
    """More steps than the backward takes at a time."""
    torch.manual_seed(0)
    problem = plain_problem(*shape)
    draw_ = Draw(0)
    leaves, want = check_forward(draw_, problem, 2)
    check_backward(draw_, problem, leaves, want, 2)


def test_many_segments():
    """More than the backward takes at a time."""
    torch.manual_seed(0)
    problem = plain_problem(1, 65, 500, 256)
    problem["cu_seqlens"] = torch.tensor([*range(0, 301, 2), 400, 400, 500])
    problem["initial_states"] = torch.randn(len(problem["cu_seqlens"]) - 1, 65, 256)
    draw_ = Draw(0)
    leaves, want = check_forward(draw_, problem, 2)
    check_backward(draw_, problem, leaves, want, 2)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_threads_do_not_change_a_bit(dtype):
    torch.manual_seed(0)
    for shape in ((1, 300, 200, 16, 1), (3, 96, 130, 9, 3), (2, 7, 2100, 4, 1)):
        problem = plain_problem(*shape, dtype=dtype)
        dout = torch.randn_like(problem["u"])
        dlast = torch.randn_like(problem["initial_states"])
        one = c.forward(problem) | {
            f"bwd {k}": v for k, v in c.backward(problem, dout, dlast).items()
        }
        for threads in (2, 3, 8, 0):
            more = c.forward(problem, threads)
            more |= {f"bwd {k}": v for k, v in c.backward(problem, dout, dlast, threads).items()}
            for name, value in one.items():
                assert torch.equal(value, more[name]), (name, threads)


def layouts(t):
    """The same values in other strides."""
    yield t.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield torch.stack((t, t), -1)[..., 1]
    wide = torch.cat((t, t), -1)
    yield wide[..., t.shape[-1] :]


def test_views_give_the_same_bits():
    torch.manual_seed(0)
    problem = plain_problem(2, 40, 150, 16, 2)
    dout = torch.randn_like(problem["u"])
    forward, backward = c.forward(problem), c.backward(problem, dout)
    for number in range(3):
        views = {
            name: list(layouts(t))[number] if isinstance(t, torch.Tensor) and t.dim() > 1 else t
            for name, t in problem.items()
        }
        outputs = {name: list(layouts(t))[number] for name, t in forward.items()}
        for name, value in c.forward(views, **outputs).items():
            assert torch.equal(value, forward[name]), (name, number)
        outputs = {
            name: list(layouts(t))[number] if t.dim() > 1 else torch.empty_like(t)
            for name, t in backward.items()
        }
        for name, value in c.backward(views, dout, **outputs).items():
            assert torch.equal(value, backward[name]), (name, number)


def test_negative_strides():
    """As no torch tensor has them."""
    torch.manual_seed(0)
    problem = plain_problem(2, 20, 70, 16)
    want = c.forward(problem)
    got = torch.empty_like(problem["u"])
    flipped = {name: problem[name].flip(-1) for name in ("u", "delta", "z", "B", "C")}
    params = c.set_tensors(c.Forward(), problem | flipped | {"out": got})
    for name in (*flipped, "out"):
        tensor = params.out if name == "out" else getattr(params.inputs, name)
        tensor.data += (tensor.sizes[tensor.ndim - 1] - 1) * 4
        tensor.strides[tensor.ndim - 1] = -1
    c.call("scan_forward", params)
    assert_same("out", got.flip(-1), want["out"])


def test_states_join_pieces():
    """A sequence in two pieces, the second from the first one's last states, is as a whole."""
    torch.manual_seed(0)
    problem = plain_problem(2, 19, 100, 16)
    whole = c.forward(problem)
    for cut in (0, 1, 37, 64, 99, 100):
        pieces = []
        states = problem["initial_states"]
        for steps in (slice(0, cut), slice(cut, None)):
            part = {name: problem[name][..., steps] for name in ("u", "delta", "z", "B", "C")}
            result = c.forward(problem | part | {"initial_states": states})
            pieces.append(result["out"])
            states = result["last_states"]
        assert_same("out", torch.cat(pieces, 2), whole["out"])
        assert_same("last_states", states, whole["last_states"])


def test_packed_sequences_are_as_alone():
    torch.manual_seed(0)
    problem = plain_problem(1, 70, 90, 5)
    ends = [3, 3, 20, 21, 85, 85]
    packed = problem | {"cu_seqlens": torch.tensor(ends)}
    packed["initial_states"] = torch.randn(5, 70, 5)
    dout, dlast = torch.randn_like(problem["u"]), torch.randn(5, 70, 5)
    forward, backward = c.forward(packed), c.backward(packed, dout, dlast)
    for i, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        steps, row = slice(begin, end), slice(i, i + 1)
        part = {name: problem[name][..., steps] for name in ("u", "delta", "z", "B", "C")}
        alone = problem | part | {"initial_states": packed["initial_states"][row]}
        result = c.forward(alone)
        assert_same("out", forward["out"][..., steps], result["out"])
        assert_same("last_states", forward["last_states"][row], result["last_states"])
        result = c.backward(alone, dout[..., steps], dlast[row])
        for name in ("du", "ddelta", "dz"):
            assert_same(name, backward[name][..., steps], result[name])
        for name in ("dB", "dC"):  # over channels, in blocks that depend on all sequences
            check(name, backward[name][..., steps], result[name], SUMS)
        states = "dinitial_states"
        assert_same(states, backward[states][row], result[states])
    for outside in (slice(0, 3), slice(85, 90)):
        for results in (forward, backward):
            for name, value in results.items():
                if value.shape[-1] == 90:
                    assert (value[..., outside] == 0).all(), name


def test_no_sequence():
    torch.manual_seed(0)
    problem = plain_problem(1, 7, 70, 3) | {"cu_seqlens": torch.tensor([5])}
    problem["initial_states"] = torch.randn(0, 7, 3)
    for results in c.forward(problem), c.backward(problem, torch.randn_like(problem["u"])):
        for name, value in results.items():
            assert (value == 0).all(), name


# With huge steps it depends on the order of products which overflows first.
@pytest.mark.parametrize(
    "name, value",
    [
        (name, value)
        for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "dout")
        for value in (float("nan"), float("inf"), -float("inf"), 1e38, -1e38)
        if abs(value) != 1e38 or name not in ("delta", "delta_bias")
    ],
)
def test_values_that_are_not_finite(device, name, value):
    """Results are finite, infinite or NaN where the reference, in float32, is."""
    on_gpu = device == "cuda"  # it multiplies and adds in another order
    if on_gpu and (abs(value) == 1e38 or name == "A" or (value == value and "delta" in name)):
        pytest.skip("depends on the order of products")
    torch.manual_seed(0)
    problem = plain_problem(1, 5, 20, 3)
    tensors = problem | {"dout": torch.randn_like(problem["u"])}
    tensors[name].view(-1)[tensors[name].numel() // 2] = value
    dout = tensors.pop("dout")
    leaves = {
        k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in problem.items()
    }
    want = dict(zip(("out", "ungated", "last_states"), c.reference(**leaves), strict=True))
    for key, got in c.forward(problem).items():
        assert_same_kind(got, want[key].detach(), key)
    names = [key for key in c.INPUTS if key in problem]
    grads = torch.autograd.grad([want["out"]], [leaves[key] for key in names], [dout])
    got = c.backward(problem, dout)
    if abs(value) == float("inf") and (on_gpu or name in ("delta", "delta_bias", "A")):
        return  # exp(dt A) is 0 times infinity in some orders of the products
    for key, grad in zip(names, grads, strict=True):
        assert_same_kind(got[c.GRADIENTS[key]], grad, key)


def assert_same_kind(got, want, name):
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(got), kind(want)), f"{name}: {kind.__name__}\n{got}\n{want}"


def test_softplus_everywhere():
    """Of every size of its argument, to a few units in the last place."""
    x = torch.cat([torch.linspace(-80, 40, 20011), torch.tensor([0.0, -0.0, 1e30, -1e30])])
    x = torch.cat([x, torch.tensor([float("inf"), -float("inf"), float("nan")])])
    ones = torch.ones(len(x), 1)
    problem = {"u": ones[None], "delta": x[None, :, None], "A": -ones, "B": ones, "C": ones}
    got = c.forward(problem | {"delta_softplus": 1})["out"][0, :, 0].double()  # dt itself
    want = torch.nn.functional.softplus(x.double())
    finite = want.isfinite() & (want > 0)
    # A GPU's exp(x) is 2^(x log2(e)), with the rounding of the product.
    most = 4e-7 + 1e-7 * x.abs()[finite] * got.is_cuda
    assert ((((got - want).abs() / want)[finite]) < most).all()
    assert (got[~finite & ~want.isnan()] == want[~finite & ~want.isnan()]).all()
    assert got.isnan().equal(want.isnan())


# -------------------------------------------------------------------------------------- the update


def draw_update(seed):
    d = Draw(seed)
    groups = d.one_of(1, 1, 2)
    heads, dim = groups * d.one_of(1, 1, 3), d.one_of(0, 1, 5, 8, 16, 64, 67, 130)
    dstate, batch = d.one_of(1, 2, 3, 8, 16, 16, 33, 128, 256), d.one_of(0, 1, 2, 5)
    p = {"x": d.tensor(batch, heads, dim), "dt": d.tensor(batch, heads, dim, sign=1)}
    p["A"] = d.tensor(heads, dim, dstate, sign=-1)
    if d.one_of(True, False):
        p["A"] = d.tensor(heads, sign=-1)[:, None, None].expand(heads, dim, dstate)
    p["B"], p["C"] = d.tensor(batch, groups, dstate), d.tensor(batch, groups, dstate)
    p["D"], p["dt_bias"] = (d.maybe(lambda: d.tensor(heads, dim)) for _ in range(2))
    p["z"] = d.maybe(lambda: d.tensor(batch, heads, dim))
    p["dt_softplus"] = d.one_of(0, 1)
    states = batch
    if d.one_of(True, False):
        states = batch + 3
        indices = torch.randperm(states, generator=d.torch)[:batch].to(
            d.one_of(torch.int32, torch.int64)
        )
        indices[d.one_of(0, 1) :: 2] = -1
        p["state_indices"] = indices
    state = d.view((states, heads, dim, dstate))
    p["state"] = state.copy_(torch.randn(state.shape, generator=d.torch))
    p["out"] = d.view((batch, heads, dim))
    return d, {name: value for name, value in p.items() if value is not None}


@pytest.mark.parametrize("seed", range(100))
def test_random_updates(seed):
    d, p = draw_update(seed) if seed else draw_update(1000)
    inputs = doubles({name: value for name, value in p.items() if name != "out"})
    with torch.no_grad():
        state, out = c.reference_update(**inputs)
    c.update(p, d.one_of(1, 2, 3))
    check("out", p["out"], out, TOLERANCE)
    check("state", p["state"], state, TOLERANCE)


def test_updates_are_a_scan():
    """Token by token as a forward, to rounding."""
    torch.manual_seed(0)
    problem = plain_problem(2, 19, 12, 16)
    want = c.forward(problem)
    state = problem["initial_states"][:, None].clone()
    for t in range(12):
        p = {"x": problem["u"], "dt": problem["delta"], "z": problem["z"]}
        p = {name: value[..., t].unsqueeze(1) for name, value in p.items()}
        p |= {name: problem[name][..., t] for name in "BC"}
        p |= {"A": problem["A"][None], "D": problem["D"][None], "dt_softplus": 1}
        p |= {"dt_bias": problem["delta_bias"][None], "state": state}
        p["out"] = torch.empty(2, 1, 19)
        c.update(p)
        torch.testing.assert_close(p["out"][:, 0], want["out"][..., t])
    torch.testing.assert_close(state[:, 0], want["last_states"])


# ------------------------------------------------------------------------------------- bad values


def test_offsets_of_sequences(cpu):
    problem = plain_problem(1, 4, 10, 2)
    del problem["initial_states"]
    for offsets, said in (
        ([0, 11], "got 11 at 1"),
        ([-1, 10], "got -1 at 0"),
        ([0, 5, 4], "got 4 at 2"),
    ):
        with pytest.raises(RuntimeError) as caught:
            c.forward(problem | {"cu_seqlens": torch.tensor(offsets)})
        assert str(caught.value) == (
            "selective_scan_fwd: cu_seqlens must not decrease and lie within 0..10 (seqlen), "
            + said
        )


def test_indices_of_states(cpu):
    p = {name: torch.randn(2, 1, 4) for name in ("x", "dt", "out")}
    p |= {"A": torch.randn(1, 4, 3), "B": torch.randn(2, 1, 3), "C": torch.randn(2, 1, 3)}
    p["state"] = torch.randn(5, 1, 4, 3)
    for indices, said in (
        ([0, 5], "must be < 5, got 5 at 1"),
        ([3, 3], "must name a row once, got 3 twice"),
    ):
        with pytest.raises(RuntimeError) as caught:
            c.update(p | {"state_indices": torch.tensor(indices)})
        assert str(caught.value) == f"selective_state_update: state_indices {said}"


def test_nothing_to_do_ends_at_once():
    huge = 1 << 62
    params = c.Forward()
    value = torch.zeros(1)
    for tensor, sizes in (
        (params.inputs.u, (huge, 0, huge)),
        (params.inputs.delta, (huge, 0, huge)),
        (params.out, (huge, 0, huge)),
        (params.inputs.A, (0, 4)),
        (params.inputs.B, (0, 4)),
        (params.inputs.C, (0, 4)),
    ):
        tensor.data, tensor.ndim = value.data_ptr(), len(sizes)
        tensor.sizes[: len(sizes)] = sizes
    c.call("scan_forward", params)


def test_no_steps_leave_the_states():
    problem = plain_problem(2, 9, 0, 5)
    result = c.forward(problem)
    assert torch.equal(result["last_states"], problem["initial_states"])
    dlast = torch.randn(2, 9, 5)
    result = c.backward(problem, torch.randn_like(problem["u"]), dlast)
    assert torch.equal(result["dinitial_states"], dlast)
    for name in ("dA", "dD", "ddelta_bias"):
        assert (result[name] == 0).all()
    huge = plain_problem(0, 9, 3, 5)
    result = c.backward(huge, torch.randn_like(huge["u"]))
    for name in ("dA", "dD", "ddelta_bias"):
        assert (result[name] == 0).all()
