"""Models judged from samples alone, without a density: grey pixels (N, 784) beside new digits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common.sample_distances import mmd

CHUNK = 500


def widths(real: Tensor) -> tuple[float, ...]:
    """Of the discrepancy's kernels: a half, one and two times the usual distance of two digits."""
    some = real[:500]
    usual = float(torch.pdist(some).median())
    return usual / 2, usual, usual * 2


def nearest(points: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (N,) to the nearest training digit, and which one that is."""
    found = [torch.cdist(part, seen).min(1) for part in points.split(CHUNK)]
    return torch.cat([x.values for x in found]), torch.cat([x.indices for x in found])


def pooled(pixels: Tensor, side: int) -> Tensor:
    """Means of squares of pixels: (N, side^2)."""
    size = 28 // side
    return F.avg_pool2d(pixels.view(-1, 1, 28, 28), size).flatten(1)


def told_apart(made: Tensor, real: Tensor, side: int, steps: int) -> float:
    """Accuracy of a network that learns to tell them apart on one half and is asked about the
    other, both ways round; 0.5 is that of equal distributions. On pictures of side^2 pixels."""
    x = torch.cat([pooled(made, side), pooled(real, side)])
    y = torch.cat([torch.zeros(len(made)), torch.ones(len(real))])
    x = (x - x.mean(0)) / x.std(0).clamp(min=0.05)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    halves = order.chunk(2)
    right = [
        _learned(x[halves[i]], y[halves[i]], x[halves[1 - i]], steps) == y[halves[1 - i]].bool()
        for i in (0, 1)
    ]
    return float(torch.cat(right).float().mean())


def _learned(x: Tensor, y: Tensor, new: Tensor, steps: int) -> Tensor:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(network(x).squeeze(1), y).backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        return network(new).squeeze(1) > 0


def pixel_gaussian(seen: Tensor, count: int) -> Tensor:
    """Samples of a Gaussian with the digits' mean and covariance: a model without a network."""
    mean, covariance = seen.mean(0), seen.T.cov()
    values, vectors = torch.linalg.eigh(covariance)
    noise = torch.randn(count, len(values)) * values.clamp(min=0).sqrt()
    return (mean + noise @ vectors.T).clamp(0, 1)


def judge(made: dict[str, Tensor], seen: Tensor, real: Tensor, steps: int = 60) -> dict:
    """Figures of each model's samples, as many as there are new digits `real`."""
    usual = nearest(real, seen)[0].mean()
    kernels = widths(real)
    found = {}
    for name, points in made.items():
        distance, which = nearest(points, seen)
        found[name] = {
            "mmd": 1e3 * float(mmd(points, real, kernels)),
            "apart 14": told_apart(points, real, 14, steps),
            "apart 7": told_apart(points, real, 7, steps),
            "nearest": float(distance.mean() / usual),
            "different": len(which.unique()),
        }
    distance, which = nearest(real, seen)
    found["new digits"] = {"nearest": 1.0, "different": len(which.unique())}
    return found
