"""The distances themselves, of a Gaussian from a target, without samples: what a fit aims at.

A model is a tensor (4,), float64: two means and two logarithms of variances, which the family has
along the axes. Every distance is differentiable, so that its optimum is found by Newton-like steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from examples.distances.targets import Mixture, grid

WIDTHS = (0.5, 1.0, 2.0)  # of the discrepancy's kernels
POINTS, AREA = grid()


def log_prob(model: Tensor, x: Tensor) -> Tensor:
    """Of points (..., 2)."""
    mean, logvar = model[:2].to(x), model[2:].to(x)
    squared = (x - mean).square() * torch.exp(-logvar)
    return -(squared + logvar + math.log(2 * math.pi)).sum(-1) / 2


def forward_kl(model: Tensor, target: Mixture) -> Tensor:
    """KL(target, model)."""
    p = target.log_prob(POINTS)
    return (p.exp() * (p - log_prob(model, POINTS))).sum() * AREA


def reverse_kl(model: Tensor, target: Mixture) -> Tensor:
    """KL(model, target)."""
    q = log_prob(model, POINTS)
    return (q.exp() * (q - target.log_prob(POINTS))).sum() * AREA


def jensen_shannon(model: Tensor, target: Mixture) -> Tensor:
    """Half of each one's divergence from the mean of both: what the best critic's error tells."""
    p, q = target.log_prob(POINTS), log_prob(model, POINTS)
    middle = torch.logaddexp(p, q) - math.log(2)
    return (p.exp() * (p - middle) + q.exp() * (q - middle)).sum() * AREA / 2


def mmd(model: Tensor, target: Mixture) -> Tensor:
    """The squared discrepancy: Gaussian kernels' expectations under Gaussians are Gaussians."""
    means = torch.cat([model[None, :2], target.means])
    covariances = torch.cat([model[None, 2:].exp().diag_embed(), target.covariances])
    weights = torch.cat([-torch.ones(1, dtype=torch.float64), target.weights])
    away = means[:, None] - means  # (K + 1, K + 1, 2)
    total = torch.zeros((), dtype=torch.float64)
    for h in WIDTHS:
        spread = h**2 * torch.eye(2, dtype=torch.float64) + covariances[:, None] + covariances
        squared = torch.einsum("abi,abij,abj->ab", away, torch.linalg.inv(spread), away)
        expected = h**2 * torch.exp(-squared / 2) / torch.linalg.det(spread).sqrt()
        total = total + weights @ expected @ weights / len(WIDTHS)
    return total


def sliced_wasserstein(model: Tensor, target: Mixture) -> Tensor:
    """The square. Along a direction it is (m - m')^2 + s^2 + s'^2 - 2 s c, where c is the mean of
    the product of the target's quantiles and a standard normal's."""
    angles = (torch.arange(48, dtype=torch.float64) + 0.5) * math.pi / 48
    directions = torch.stack([angles.cos(), angles.sin()], 1)  # (L, 2)
    mean, covariance = target.moments()
    variance = torch.einsum("li,ij,lj->l", directions, covariance, directions)
    away = directions @ (model[:2] - mean)
    spread = directions.square() @ model[2:].exp()
    shared = 2 * spread.sqrt() * _aligned(target, directions)
    return (away.square() + spread + variance - shared).mean()


def _aligned(target: Mixture, directions: Tensor) -> Tensor:
    """(L,): integral of x Phi^-1(F(x)) dF(x), with F the distribution along each direction."""
    x = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    centers = directions @ target.means.T  # (L, K)
    widths = torch.einsum("li,kij,lj->lk", directions, target.covariances, directions).sqrt()
    z = (x - centers[:, :, None]) / widths[:, :, None]  # (L, K, X)
    below = torch.einsum("k,lkx->lx", target.weights, torch.special.ndtr(z))
    density = torch.exp(-z.square() / 2) / (widths[:, :, None] * math.sqrt(2 * math.pi))
    density = torch.einsum("k,lkx->lx", target.weights, density)
    normal = torch.special.ndtri(below.clamp(1e-15, 1 - 1e-15))
    return (x * normal * density).sum(1) * (x[1] - x[0])


def optimum(distance: Callable[[Tensor, Mixture], Tensor], target: Mixture) -> Tensor:
    """The model at the smallest distance, the best of what several starts lead to."""
    mean, covariance = target.moments()
    starts = [torch.cat([mean, covariance.diagonal().log()])]
    starts += [
        torch.cat([m, c.diagonal().log()])
        for m, c in zip(target.means, target.covariances, strict=True)
    ]
    found = [_descend(distance, target, start) for start in starts]
    return min(found, key=lambda model: float(distance(model, target)))


def _descend(distance, target: Mixture, start: Tensor) -> Tensor:
    model = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([model], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = distance(model, target)
        value.backward()
        return value

    optimizer.step(closure)
    return model.detach()


def apart(a: Tensor, b: Tensor) -> float:
    """The Wasserstein distance of two models: of their means and standard deviations."""
    moved = torch.cat([a[:2] - b[:2], (a[2:] / 2).exp() - (b[2:] / 2).exp()])
    return float(moved.norm())
