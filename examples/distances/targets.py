"""What is to be learned: mixtures of Gaussians in the plane, whose density is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import tilewise as tw

HALF = 7.0  # targets and models lie within (-HALF, HALF)^2, but for what no sum would notice


@dataclass(frozen=True)
class Mixture:
    """Gaussians with weights (K,), means (K, 2) and covariances (K, 2, 2), all float64."""

    name: str
    weights: Tensor
    means: Tensor
    covariances: Tensor

    def sample(self, count: int) -> Tensor:
        """float32 (count, 2), from torch's default generator."""
        component = tw.gumbel_argmax(self.weights.log().expand(count, -1))
        roots = torch.linalg.cholesky(self.covariances).float()[component]
        noise = torch.randn(count, 2, 1)
        return self.means.float()[component] + (roots @ noise).squeeze(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        """(...) of points (..., 2), in their dtype."""
        means, precision = self.means.to(x), torch.linalg.inv(self.covariances).to(x)
        away = x[..., None, :] - means  # (..., K, 2)
        squared = torch.einsum("...ki,kij,...kj->...k", away, precision, away)
        norm = 2 * math.log(2 * math.pi) + torch.logdet(self.covariances).to(x)
        return torch.logsumexp(self.weights.log().to(x) - (squared + norm) / 2, -1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (2,) and covariance (2, 2)."""
        mean = self.weights @ self.means
        away = self.means - mean
        spread = self.covariances + away[:, :, None] * away[:, None, :]
        return mean, (self.weights[:, None, None] * spread).sum(0)


def mixture(name: str, weights: list, means: list, covariances: list) -> Mixture:
    return Mixture(name, *(torch.tensor(x, dtype=torch.float64)
                           for x in (weights, means, covariances)))  # fmt: skip


def ring(bumps: int = 8, radius: float = 2.0, width: float = 0.2) -> Mixture:
    """Equal bumps on a circle."""
    angles = torch.arange(bumps, dtype=torch.float64) * 2 * math.pi / bumps
    means = radius * torch.stack([angles.cos(), angles.sin()], 1)
    covariances = (width**2 * torch.eye(2, dtype=torch.float64)).expand(bumps, 2, 2)
    return Mixture("ring", torch.full((bumps,), 1 / bumps, dtype=torch.float64), means, covariances)


ROUND = [[0.25, 0.0], [0.0, 0.25]]
TARGETS = [
    mixture("inside: axes", [1.0], [[1.0, -0.5]], [[[1.44, 0.0], [0.0, 0.36]]]),
    mixture("outside: slanted", [1.0], [[0.0, 0.0]], [[[1.0, 0.85], [0.85, 1.0]]]),
    mixture("outside: two bumps", [0.6, 0.4], [[-1.6, -0.8], [1.6, 0.8]], [ROUND, ROUND]),
]


def grid(side: int = 141) -> tuple[Tensor, float]:
    """Points (side^2, 2) in float64 and the area of each: sums over them are integrals."""
    line = torch.linspace(-HALF, HALF, side, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    return points, float(line[1] - line[0]) ** 2
