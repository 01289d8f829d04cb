"""Training in several processes, as torchrun starts them, on the batches of one.

    torchrun --nproc-per-node=2 -m examples.siglip

Each process embeds its part of a batch; the loss sees the pairs of all. Any number of processes
that torchrun starts, 1 too, computes the same but for the order of sums.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn


class Place(NamedTuple):
    """This process, and how many there are."""

    rank: int
    size: int

    def part(self, x: torch.Tensor) -> torch.Tensor:
        """This process's rows of a batch, of which each has as many, or one less."""
        return x.tensor_split(self.size)[self.rank]

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over the processes."""
        x = x.detach().clone()
        if self.size > 1:
            dist.all_reduce(x)
        return x / self.size

    def replica(self, model: nn.Module) -> nn.Module:
        """The model, whose gradients are then those of all processes; it is changed in place."""
        if not dist.is_initialized():
            return model
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SharedBatchNorm
        # Buffers are equal as they are.
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


ALONE = Place(0, 1)


@contextlib.contextmanager
def processes() -> Iterator[Place]:
    """Joins those that torchrun has started; without it there is one."""
    if "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun's store outlives a restart: there gloo would find the addresses of dead processes.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        yield Place(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


class _Sum(torch.autograd.Function):
    """Over the processes; so is its gradient."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the rows of all processes: torch's own wants a GPU.

    Sums are float64, as those of one process are on a CPU.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        dims, shape = (0, 2, 3), (1, -1, 1, 1)
        wide = x.double()
        own = wide.new_full((1,), x.numel() / x.shape[1])
        total = _Sum.apply(torch.cat([wide.sum(dims), own]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centered = wide - mean.view(shape)
        variance = _Sum.apply(centered.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).float(), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centered * scale.view(shape) + self.bias.view(shape)).float()
