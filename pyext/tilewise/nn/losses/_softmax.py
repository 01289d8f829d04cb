"""Softmaxes over candidates that come block by block."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewise.ops._blocks import block_means


def nothing_yet(rows: Tensor) -> Tensor:
    """Sums of exponentials (rows, 2) before the first block."""
    sums = rows.new_zeros((len(rows), 2), dtype=torch.float64)
    sums[:, 0] = -torch.inf
    return sums


def merge_sums(sums: Tensor, more: Tensor) -> None:
    """Adds exponentials (rows, 2): the largest logit, the sum relative to it."""
    largest = torch.maximum(sums[:, 0], more[:, 0])
    base = largest.nan_to_num(neginf=0.0)  # without a logit yet, -inf - -inf would be NaN
    total = sums[:, 1] * (sums[:, 0] - base).exp() + more[:, 1] * (more[:, 0] - base).exp()
    sums[:, 0], sums[:, 1] = largest, total


class Means:
    """What some queries find among candidates that come block by block: softmax and its mean.

    Enough for the loss and its gradient by the queries, in one round and 2 products.
    """

    def __init__(self, query: Tensor, scale: Tensor, need_mean: bool):
        self.query, self.scale, self.need_mean = query, scale, need_mean
        self.sums = nothing_yet(query)
        self.mean: Tensor | None = None  # of the candidates, by exponentials

    def see(self, keys: Tensor) -> None:
        """Takes a block of candidates in."""
        sums, mean = block_means(self.query, keys, self.scale, self.need_mean)
        before = self.sums.clone()
        merge_sums(self.sums, sums.t())
        if self.mean is None:
            self.mean = mean
        elif self.need_mean:
            self.mean.mul_(self._share(before)).add_(mean.mul_(self._share(sums.t())))

    def _share(self, part: Tensor) -> Tensor:
        """How much of all exponentials so far some of them are, (B, 1)."""
        share = (part[:, 0] - self.sums[:, 0]).exp() * (part[:, 1] / self.sums[:, 1])
        # Without a candidate so far, 0 / 0; where a feature is NaN, all is.
        share = torch.where((part[:, 1] == 0) & ~self.sums[:, 1].isnan(), 0.0, share)
        return share.to(self.scale.dtype).unsqueeze(1)

    def results(self, target: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and scale's gradient, () float64; gradients by the queries (B, D).

        Args:
            target: (B, D) float64, the mean of the candidates under the targets.
        """
        z = (self.query * target).sum(1)
        loss = (self.sums[:, 0] + self.sums[:, 1].log() - self.scale * z).sum() * weight
        if not self.need_mean or self.mean is None:
            return loss, self.query.new_empty(0), loss.new_zeros(())
        away = self.mean - target
        d_scale = (self.query * away).sum() * weight
        return loss, away.mul_(self.scale * weight).to(self.scale.dtype), d_scale


def combined(
    found: Sequence[tuple[Tensor, Tensor, Tensor]], scale: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss, gradients by the queries of each, gradient by the scale."""
    losses, gradients, d_scales = zip(*found, strict=True)
    return sum(losses).to(scale.dtype), list(gradients), sum(d_scales).to(scale.dtype)
