"""Functions whose expectations are known, and how to estimate gradients with their errors."""

import torch
from torch import Tensor

from tilewise import estimators
from tilewise.estimators import Categorical, Gaussian

ROWS = 6000  # independent estimates
LOGITS = torch.tensor([0.5, -1.0, 0.3, 0.0])
TWO = torch.stack([LOGITS, -LOGITS.flip(0)])  # two variables in a row
WEIGHTS = torch.tensor([[0.6, -1.0, 1.4, 0.2], [1.0, 0.0, -0.5, 0.3]])


def linear(y: Tensor) -> Tensor:
    """All functions take (S, B, 4) or (S, B, 2, 4)."""
    return (y * WEIGHTS[: 1 if y.dim() == 3 else 2]).flatten(2).sum(-1)


def quadratic(y: Tensor) -> Tensor:
    return (linear(y) - 0.45).square()


def curved(y: Tensor) -> Tensor:
    return torch.sin(2 * linear(y)) + linear(y).exp() / 2


def step(y: Tensor) -> Tensor:
    """Without a slope."""
    return (linear(y.detach()) > 0.25).to(y.dtype)


def truth(f, logits: Tensor) -> Tensor:
    """By summation over all outcomes."""
    return estimators.gradient(f, Categorical(logits[None].double()), "exact").logits[0]


def estimates(f, logits: Tensor, name: str, seed: int = 0, **options) -> Tensor:
    """One for each row, (ROWS, ...), in float64."""
    rows = Categorical(logits.expand(ROWS, *logits.shape))
    return estimators.gradient(f, rows, name, seed=seed, **options).logits.double()


def errors(found: Tensor, expected: Tensor) -> Tensor:
    """Of the mean over the rows, in standard errors."""
    return (found.mean(0) - expected).abs() / (found.std(0) / len(found) ** 0.5).clamp(min=1e-7)


def normal(rows: int = ROWS) -> Gaussian:
    """Three variables in a row."""
    mean, logvar = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([0.2, -1.0, 0.5])
    return Gaussian(mean.expand(rows, 3), logvar.expand(rows, 3))
