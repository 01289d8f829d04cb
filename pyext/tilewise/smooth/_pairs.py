"""Every pair of two lists, a piece at a time, so that memory stays that of the lists."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tilewise.smooth import _temperature

PAIRS = 2**22  # that are in memory at once


def count_below(a: Tensor, b: Tensor, weight: Tensor, tau: Tensor | float) -> Tensor:
    """sum_j weight_j step(a_i - b_j), in pieces: (..., n) of (..., n) and twice (..., m)."""
    if _temperature.is_zero(tau):
        ordered, order = b.detach().sort(-1)
        sums = weight.gather(-1, order).cumsum(-1)
        sums = torch.cat([torch.zeros_like(sums[..., :1]), sums], -1)
        a = a.detach().contiguous()
        below, up_to = (torch.searchsorted(ordered, a, right=right) for right in (False, True))
        return (sums.gather(-1, below) + sums.gather(-1, up_to)) / 2

    def count(rows: Tensor) -> Tensor:
        steps = _temperature.step(rows[..., None] - b[..., None, :], tau)
        return (steps * weight[..., None, :]).sum(-1)

    return in_pieces(count, a, b.numel())


def in_pieces(function: Callable[[Tensor], Tensor], rows: Tensor, width: int) -> Tensor:
    """function(rows), which has `width` numbers for each of the last dimension's, in pieces."""
    size = max(PAIRS // max(width, 1), 1)
    if rows.shape[-1] <= size:
        return function(rows)
    return torch.cat([
        checkpoint(function, piece, use_reentrant=False, preserve_rng_state=False)
        for piece in rows.split(size, -1)
    ], -1)  # fmt: skip
