"""DTensor, FSDP2 and DDP: the values and gradients of one process, on two with Gloo."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import make_case, randn

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_fn

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is without distributed")
WORLD = 2


def spawn(function, tmp_path, device):
    """Runs function(mesh) in WORLD processes; on a GPU, all on the first one."""
    if device == "cuda":
        pytest.skip("Gloo has CPU tensors; several GPUs have an issue of their own")
    mp.spawn(_main, (function, str(tmp_path / "store")), WORLD)


def _main(rank, function, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        from torch.distributed.device_mesh import init_device_mesh

        function(init_device_mesh("cpu", (WORLD,)))
        dist.barrier()  # a process that ends early takes its connections from the other
    finally:
        dist.destroy_process_group()
    os._exit(0)  # threads of Gloo that are still there may abort a process that ends otherwise


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


def _dtensor_options(mesh):
    x, weight, _, _, _ = arguments()
    pre, post = randn(4, 8, 21, seed=7), randn(4, 8, 21, seed=8)
    bounds = torch.tensor([0, 5, 21])

    def dense(x, weight, pre, post):
        return causal_conv1d_fn(x, weight, pre_gate=pre, post_gate=post, residual=x, dilation=2)

    def packed(x, weight, pre, post):
        own = _distribute(bounds, None, mesh) if hasattr(x, "placements") else bounds
        return causal_conv1d_varlen_fn(x[:1], weight, None, own, None, True, None, pre[:1])[0]

    for how, dims in SHARDED.items():
        for function in (dense, packed):
            if function is packed and how == "batch":
                continue
            leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, pre, post)]
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
        batch = batch.chunk(WORLD)[dist.get_rank()]
    losses = []
    for _ in range(5):
        loss = (run(batch) - batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if wrap is not _alone:
            dist.all_reduce(total)
            total /= WORLD
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


def test_strategies_are_registered_whenever_dtensor_is_imported():
    """Before this library or after it."""
    import subprocess
    import sys

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
