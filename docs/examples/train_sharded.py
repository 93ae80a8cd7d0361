"""A small model trained on many ranks: the sequence and the parameters sharded over some of them
(FSDP2), the channels over others (tensor parallelism). The losses are those of one rank.

    torchrun --nproc-per-node 4 docs/examples/train_sharded.py [--steps 8]

On GPUs, one for each rank, where there are any.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from causal_conv1d import causal_conv1d_cp, selective_scan_cp

DIM, INNER, WIDTH, STATES = 16, 32, 4, 8


class Block(nn.Module):
    def __init__(self, group):
        super().__init__()
        self.group = group  # the ranks that share the sequence
        self.norm = nn.LayerNorm(DIM)
        self.into, self.gate, self.delta = (nn.Linear(DIM, INNER) for _ in range(3))
        self.back = nn.Linear(INNER, DIM)
        self.conv_weight = nn.Parameter(torch.randn(INNER, WIDTH) / WIDTH)
        self.conv_bias = nn.Parameter(torch.zeros(INNER))
        self.A = nn.Parameter(-torch.rand(INNER, STATES))
        self.B, self.C = (nn.Parameter(torch.randn(INNER, STATES) * 0.3) for _ in range(2))

    def forward(self, h):
        normed = self.norm(h)
        x, z, delta = (layer(normed).mT for layer in (self.into, self.gate, self.delta))
        names = ("conv_weight", "conv_bias", "A", "B", "C")
        weight, bias, A, B, C = (getattr(self, name).to_local() for name in names)
        x = causal_conv1d_cp(x, weight, bias, "silu", self.group)
        x = selective_scan_cp(x, delta, A, B, C, z=z, delta_softplus=True, group=self.group)
        return h + self.back(x.mT)


def shard_channels(block, mesh):
    """Tensor parallelism: the convolution and the scan need nothing of other channels."""
    plan = {name: ColwiseParallel() for name in ("into", "gate", "delta")}
    parallelize_module(block, mesh, plan | {"back": RowwiseParallel()})
    for name, parameter in block.named_parameters(recurse=False):
        whole = parameter.data
        setattr(block, name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])))


def train(steps=8, device="cpu"):
    """The losses of some steps; one group of ranks must have been made."""
    ranks = dist.get_world_size()
    channels = 2 if ranks % 4 == 0 else 1
    names = ("sequence", "channels")
    mesh = init_device_mesh(device, (ranks // channels, channels), mesh_dim_names=names)
    sequence = mesh["sequence"]

    torch.manual_seed(0)
    model = nn.Sequential(Block(sequence), Block(sequence)).to(device)
    for block in model:
        shard_channels(block, mesh["channels"])
        fully_shard(block, mesh=sequence)
    fully_shard(model, mesh=sequence)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    whole = torch.randn(2, 128, DIM)  # on every rank the same, of which it takes its part
    wanted = F.pad(whole, (0, 0, 5, 0))[:, :128].cumsum(1) / 10
    part, of = sequence.get_local_rank(), sequence.size()
    h, wanted = (t.chunk(of, dim=1)[part].to(device) for t in (whole, wanted))
    losses = []
    for _ in range(steps):
        # FSDP2 averages the ranks' gradients, so each takes the mean over its own steps.
        loss = F.mse_loss(model(h), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / of
        dist.all_reduce(mean, group=sequence.get_group())
        losses.append(mean.item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    losses = train(options.steps, device)
    if dist.get_rank() == 0:
        print(" ".join(f"{loss:.6f}" for loss in losses))
    dist.destroy_process_group()
