"""DTensor, FSDP2 and DDP: the values and gradients of one process, on several with Gloo."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_run import check, run
from helpers import make_case, randn

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_fn

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is without distributed")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def spawn(function, tmp_path, device, ranks=2):
    """Runs function(mesh) in processes with Gloo."""
    if device == "cuda":
        pytest.skip("Gloo has CPU tensors; several GPUs have an issue of their own")
    check(_on_mesh, ranks, tmp_path, function)


def _on_mesh(function):
    from torch.distributed.device_mesh import init_device_mesh

    ranks = dist.get_world_size()
    function(init_device_mesh("cpu", (ranks,) if ranks == 2 else (2, ranks // 2)))


def arguments(seq_idx=None):
    case = make_case((4, 8, 21), 4, states=True, seq_idx=seq_idx)
    return [case.x, case.weight, case.bias, case.seq_idx, case.initial_states]


SHARDED = {  # by argument, the dimension
    "batch": (0, None, None, 0, 0),
    "channels": (1, 0, 0, None, 1),
    "none": (None,) * 5,
}


def _distribute(tensor, dim, mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if tensor is None:
        return None
    return distribute_tensor(tensor, mesh, [Replicate() if dim is None else Shard(dim)])


def _loss(x, weight, bias, seq_idx, states):
    out, final = causal_conv1d_fn(x, weight, bias, seq_idx, states, True, None, "silu")
    return out, final, out.square().sum() + final.pow(3).sum()


def _dtensor(mesh):
    from torch.distributed.tensor.debug import CommDebugMode

    for how, dims in SHARDED.items():
        for kind in (None, "padded"):
            plain = arguments(kind)
            for tensor in plain:
                if tensor is not None and tensor.is_floating_point():
                    tensor.requires_grad_()
            leaves = [tensor for tensor in plain if tensor is not None and tensor.requires_grad]
            expected = _loss(*plain)
            gradients = torch.autograd.grad(expected[2], leaves)

            sharded = [
                _distribute(t if t is None else t.detach(), dim, mesh)
                for t, dim in zip(plain, dims, strict=True)
            ]
            given = [t for t in sharded if t is not None and t.is_floating_point()]
            for tensor in given:
                tensor.requires_grad_()
            with CommDebugMode() as communication:
                out, final = causal_conv1d_fn(*sharded[:4], sharded[4], True, None, "silu")
            assert communication.get_total_counts() == 0
            if how != "none":
                assert out.placements[0].is_shard(dims[0]), out.placements
                assert final.placements[0].is_shard(dims[0]), final.placements
            assert torch.equal(out.full_tensor(), expected[0])
            assert torch.equal(final.full_tensor(), expected[1])
            found = torch.autograd.grad(_loss(*sharded)[2], given)
            for a, b in zip(found, gradients, strict=True):
                torch.testing.assert_close(a.full_tensor(), b)


def test_dtensor(tmp_path, device):
    spawn(_dtensor, tmp_path, device)


def _sequence_sharded(mesh):
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.debug import CommDebugMode

    # Of 1 step the second device has none.
    for length in (22, 21, 1):
        for kind in (None, "padded"):
            case = make_case((4, 8, length), 4, states=True, seq_idx=kind)
            plain = [case.x, case.weight, case.bias, case.seq_idx, case.initial_states]
            leaves = [t for t in plain if t is not None and t.is_floating_point()]
            for tensor in leaves:
                tensor.requires_grad_()
            expected = _loss(*plain)
            gradients = torch.autograd.grad(expected[2], leaves)
            sharded = [
                _distribute(t if t is None else t.detach(), dim, mesh)
                for t, dim in zip(plain, (2, None, None, 1, None), strict=True)
            ]
            given = [t for t in sharded if t is not None and t.is_floating_point()]
            for tensor in given:
                tensor.requires_grad_()
            out, final, loss = _loss(*sharded)
            assert isinstance(out, DTensor) and out.placements == sharded[0].placements
            assert torch.equal(out.full_tensor(), expected[0])
            assert torch.equal(final.full_tensor(), expected[1])
            found = torch.autograd.grad(loss, given)
            for a, b in zip(found, gradients, strict=True):
                torch.testing.assert_close(a.full_tensor(), b)
            with pytest.raises(TypeError, match="weight must be a DTensor"):
                causal_conv1d_fn(sharded[0], plain[1])
    with CommDebugMode() as communication:
        found = causal_conv1d_fn(*sharded[:4], return_final_states=True, dilation=2)
    expected = causal_conv1d_fn(*plain[:4], return_final_states=True, dilation=2)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.full_tensor(), other)
    assert found[0].placements == sharded[0].placements
    gathers = torch.ops.c10d_functional.all_gather_into_tensor
    assert communication.get_comm_counts()[gathers] == 0


def test_sequence_sharded_dtensor(tmp_path, device):
    spawn(_sequence_sharded, tmp_path, device)


def _sequence_and_more(mesh):
    """The sequence along one dimension of the mesh, something else along the other."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    sequence = (2, None, None, 1, None)
    for how, dims in SHARDED.items():
        for order in ((dims, sequence), (sequence, dims)):
            plain = arguments("padded")
            sharded = [
                distribute_tensor(t, mesh, [Replicate() if d is None else Shard(d) for d in both])
                for t, *both in zip(plain, *order, strict=True)
            ]
            leaves = [t for t in plain if t.is_floating_point()]
            given = [t for t in sharded if t.is_floating_point()]
            for tensor in leaves + given:
                tensor.requires_grad_()
            expected = torch.autograd.grad(_loss(*plain)[2], leaves)
            out, final, loss = _loss(*sharded)
            assert out.placements == sharded[0].placements, how
            found = torch.autograd.grad(loss, given)
            assert torch.equal(out.full_tensor(), _loss(*plain)[0])
            assert torch.equal(final.full_tensor(), _loss(*plain)[1])
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a.full_tensor(), b)


def test_sequence_and_another_dimension_sharded(tmp_path, device):
    spawn(_sequence_and_more, tmp_path, device, ranks=4)


def _dtensor_options(mesh):
    x, weight, _, _, _ = arguments()
    pre, post = randn(4, 8, 21, seed=7), randn(4, 8, 21, seed=8)
    bounds = torch.tensor([0, 5, 21])

    def dense(x, weight, pre, post):
        return causal_conv1d_fn(x, weight, pre_gate=pre, post_gate=post, residual=x, dilation=2)

    def packed(x, weight, pre, post):
        own = _distribute(bounds, None, mesh) if hasattr(x, "placements") else bounds
        return causal_conv1d_varlen_fn(x, weight, None, own, None, True, None, pre)[0]

    for how, dims in SHARDED.items():
        for function in (dense, packed):
            rows = slice(0, 4 if function is dense else 1)  # of which the other process has none
            leaves = [tensor.clone() for tensor in (x[rows], weight, pre[rows], post[rows])]
            leaves = [tensor.detach().requires_grad_() for tensor in leaves]
            places = (dims[0], dims[1], dims[0], dims[0])
            given = [
                _distribute(leaf.detach(), dim, mesh).requires_grad_()
                for leaf, dim in zip(leaves, places, strict=True)
            ]
            out, expected = function(*given), function(*leaves)
            assert torch.equal(out.full_tensor(), expected), how
            used = slice(0, 4 if function is dense else 3)
            found = torch.autograd.grad(out.square().sum(), given[used])
            wanted = torch.autograd.grad(expected.square().sum(), leaves[used])
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a.full_tensor(), b)


def test_dtensor_with_options(tmp_path, device):
    spawn(_dtensor_options, tmp_path, device)


def _dtensor_update(mesh):
    x, weight, bias, _, states = arguments()
    token = x[:, :, 0].contiguous()
    for how, dims in SHARDED.items():
        expected_state = states.clone()
        expected = causal_conv1d_update(token, expected_state, weight, bias, "silu")
        # x comes in another way than the state, which must stay where it is.
        for x_dim in (dims[0], None):
            mine = _distribute(states.clone(), dims[0], mesh)
            with torch.no_grad():
                out = causal_conv1d_update(
                    _distribute(token, x_dim, mesh),
                    mine,
                    _distribute(weight, dims[1], mesh),
                    _distribute(bias, dims[2], mesh),
                    "silu",
                )
            assert torch.equal(out.full_tensor(), expected), how
            assert torch.equal(mine.full_tensor(), expected_state), how
            assert mine._version > 0


def test_dtensor_update(tmp_path, device):
    spawn(_dtensor_update, tmp_path, device)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.into = torch.nn.Linear(8, 16)
        self.conv1d = torch.nn.Conv1d(16, 16, 4, groups=16)
        self.back = torch.nn.Linear(16, 8)

    def forward(self, h):
        x = self.into(h).transpose(1, 2)
        weight = self.conv1d.weight.squeeze(1)
        return self.back(causal_conv1d_fn(x, weight, self.conv1d.bias, activation="silu").mT)


def _train(wrap):
    """The losses of some steps; the batch is the same for one process and for all together."""
    torch.manual_seed(0)
    model = Model()
    run = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batch = randn(4, 30, 8, seed=1)
    if dist.is_initialized() and wrap is not _alone:
        batch = batch.chunk(dist.get_world_size())[dist.get_rank()]
    losses = []
    for _ in range(5):
        loss = (run(batch) - batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if wrap is not _alone:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        losses.append(total)
    return torch.stack(losses)


def _alone(model):
    return model


def _ddp(mesh):
    expected = _train(_alone)
    assert expected[-1] < expected[0]
    found = _train(torch.nn.parallel.DistributedDataParallel)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_training_with_ddp(tmp_path, device):
    spawn(_ddp, tmp_path, device)


def _fsdp2(mesh):
    from torch.distributed.fsdp import fully_shard

    # The whole model: conv1d's parameters are used outside of its forward.
    found = _train(lambda model: fully_shard(model, mesh=mesh))
    torch.testing.assert_close(found, _train(_alone), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch's FSDP2 needs a GPU before 2.7")
def test_training_with_fsdp2(tmp_path, device):
    spawn(_fsdp2, tmp_path, device)


ROOT = Path(__file__).resolve().parent.parent


def test_documented_example(tmp_path):
    code = re.search(
        r"```python\n(# shards.py\n.*?)```", (ROOT / "docs/distributed.md").read_text(), re.S
    )
    (tmp_path / "shards.py").write_text(code[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "4", "shards.py"]
    found = subprocess.run(command, cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    for rank in range(4):  # the ranks write beside each other, line ends apart from lines
        assert found.stdout.count(f"rank {rank}: the same as one process") == 1, found.stdout


def _documented_training(folder):
    sys.path.insert(0, folder)
    import train_sharded

    return " ".join(map(repr, train_sharded.train()))


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch's FSDP2 needs a GPU before 2.7")
def test_documented_training(tmp_path):
    """FSDP2, tensor parallelism and the sequence in shards: the losses of one rank."""
    folder = str(ROOT / "docs/examples")
    one, *others = [
        [float(loss) for loss in text.split()]
        for ranks in (1, 4)
        for text in run(_documented_training, ranks, tmp_path, folder)
    ]
    assert one[-1] < 0.8 * one[0]
    for losses in others:
        assert losses == pytest.approx(one, rel=1e-5)


def test_strategies_are_registered_whenever_dtensor_is_imported():
    """Before this library or after it."""
    program = """
import sys, torch
{}
x = torch.randn(2, 4, 9)
with torch.inference_mode():
    causal_conv1d.causal_conv1d_fn(x, torch.randn(4, 4))
from torch.distributed.tensor import DTensor
known = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
assert torch.ops.causal_conv1d.forward.default in known
"""
    imports = ("import torch.distributed.tensor, causal_conv1d", "import causal_conv1d")
    for first in imports:
        subprocess.run([sys.executable, "-c", program.format(first)], check=True, cwd="/")
