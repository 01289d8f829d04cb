"""Distances between two distributions of which there are only samples; all have a gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def mmd(x: Tensor, y: Tensor, widths: tuple[float, ...]) -> Tensor:
    """The squared maximum mean discrepancy, without bias, of x (n, D) and y (m, D).

        E k(x, x') + E k(y, y') - 2 E k(x, y),    k(a, b) = mean over h of exp(-|a - b|^2 / (2 h^2))

    x' is another sample than x, so equal distributions give 0 on average, and values below 0. In
    memory: the kernels of all pairs.
    """
    n, m = len(x), len(y)
    both = torch.cat([x, y])
    kernels = kernel(both, both, widths)
    same = kernels.new_ones(n + m).diag()  # k(a, a) = 1 is no pair
    within, beyond, across = kernels[:n, :n], kernels[n:, n:], kernels[:n, n:]
    return (
        (within - same[:n, :n]).sum() / (n * (n - 1))
        + (beyond - same[n:, n:]).sum() / (m * (m - 1)) - 2 * across.mean()
    )  # fmt: skip


def kernel(x: Tensor, y: Tensor, widths: tuple[float, ...]) -> Tensor:
    """(n, m): the mean of Gaussian kernels of several widths."""
    squared = (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)
    return torch.stack([torch.exp(squared / (-2 * h * h)) for h in widths]).mean(0)


def sliced_wasserstein(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """The squared sliced Wasserstein distance of x and y (n, D): in one dimension the best way to
    move one sample onto the other keeps the order, so that sorting finds it.

        mean over the directions u (L, D), unit vectors, of mean_i (sort(x u)_i - sort(y u)_i)^2
    """
    along, other = (points @ directions.T for points in (x, y))  # (n, L)
    return (along.sort(0).values - other.sort(0).values).square().mean()


def unit_vectors(count: int, dim: int) -> Tensor:
    """(count, dim), drawn from torch's default generator."""
    return torch.nn.functional.normalize(torch.randn(count, dim), dim=1)
