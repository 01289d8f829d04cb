"""What the processes of a distributed run tell each other about a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from tilewise import _numbers
from tilewise.distributed import Peers

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


def world_size(sync: bool) -> int:
    """How many processes share a codebook."""
    if not (sync and dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size()


def all_reduce(x: Tensor, sync: bool) -> None:
    """Sums x over the processes, in place."""
    if world_size(sync) > 1:
        dist.all_reduce(x)


def summed(parts: list[Tensor], sync: bool) -> list[Tensor]:
    """Each part summed over the processes; one collective for all, of their common dtype: counts
    beside float32 sums are exact below 2^24."""
    if world_size(sync) == 1 or not parts:
        return parts
    flat = torch.cat([part.reshape(-1) for part in parts])
    all_reduce(flat, sync)
    sizes = [part.numel() for part in parts]
    return [x.view(part.shape) for x, part in zip(flat.split(sizes), parts, strict=True)]


def all_gather(x: Tensor) -> Tensor:
    """The rows of all processes, in their order; each must have the same number of rows."""
    world = world_size(sync=True)
    if world == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def number_rows(count: Tensor, draws: Tensor, sync: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers the rows of all processes, the first process's first, and shares random numbers.

    Args:
        count: (H) int64, how many rows this process has, for each of H codebooks.
        draws: (R, H) int64, R random numbers below 2**62 for each codebook.

    Returns:
        (H) how many rows all processes have; (H) the number of this process's first row; (R, H)
        the first process's draws. One collective gives all three.
    """
    world = world_size(sync)
    if world == 1:
        return count, count.new_zeros(count.shape), draws
    rank = dist.get_rank()
    table = count.new_zeros(world + len(draws), len(count))
    table[rank] = count
    if rank == 0:
        table[world:] = draws
    dist.all_reduce(table)
    return table[:world].sum(0), table[:rank].sum(0), table[world:]


def from_first_process(x: Tensor, sync: bool) -> Tensor:
    """The first process's x, in every process."""
    if world_size(sync) == 1:
        return x
    x = x if dist.get_rank() == 0 else torch.zeros_like(x)
    dist.all_reduce(x)  # a sum, since torch.compile traces no broadcast
    return x


def shared_seed(device: torch.device, sync: bool) -> int:
    """A random number that all processes agree on; waits for the device."""
    return int(from_first_process(torch.randint(2**62, (1,), device=device), sync))


@torch._disable_dynamo  # the exchange is not traced; the public name imports dynamo at once
def place_in_stream(
    user: str, rows: int, seed: Tensor | int | None, device: torch.device, group: ProcessGroup
) -> tuple[Tensor | int, int]:
    """The first process's seed, and how many rows the processes before this one have.

    With them all draw what one process with all rows would draw.
    """
    peers = Peers(group, user)
    where = peers.place(device)
    table = peers.table(torch.stack([torch.tensor(rows), _numbers.seed(seed, torch.device("cpu"))])
                        .to(where)).tolist()  # fmt: skip
    return table[0][1], sum(row[0] for row in table[: peers.rank])
