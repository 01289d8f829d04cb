"""What estimators share: samples, values of f, and terms that are there for their gradient."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise.estimators._distributions import Categorical, Distribution, Gaussian
from tilewise.ops import _arguments
from tilewise.ops.gaussian_sample import gaussian_sample
from tilewise.ops.gumbel_argmax import gumbel_argmax
from tilewise.reference._precision import accumulate_dtype

Function = Callable[[Tensor], Tensor]


def logits_of(distribution: Distribution, num_samples: int, estimator: str) -> Tensor:
    """A categorical's logits, once for each sample: (S, B, ..., K), not copied."""
    if not isinstance(distribution, Categorical):
        raise TypeError(
            f"{estimator}: expected a Categorical, got {type(distribution).__name__}"
        )
    logits = distribution.logits
    _arguments.check_floating("logits", logits)
    if logits.dim() < 2 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected (B, ..., K), got {tuple(logits.shape)}")
    return logits.expand(_arguments.integer("num_samples", num_samples, least=1), *logits.shape)


def normal(
    distribution: Distribution, num_samples: int, seed: Tensor, estimator: str
) -> tuple[Tensor, Tensor, Tensor]:
    """A Gaussian's samples (S, B, ...), which gradients pass through, and its mean and logvar."""
    if not isinstance(distribution, Gaussian):
        raise TypeError(f"{estimator}: expected a Gaussian, got {type(distribution).__name__}")
    mean, logvar = distribution
    _arguments.check_floating("mean", mean)
    if mean.dim() == 0:
        raise ValueError("mean: expected (B, ...), got ()")
    many = mean.expand(_arguments.integer("num_samples", num_samples, least=1), *mean.shape)
    return gaussian_sample(many, logvar, seed).z, mean, logvar


def one_hot(logits: Tensor, seed: Tensor) -> Tensor:
    """A sample of each row, of the logits' shape and dtype: gumbel_softmax's, with hard=True."""
    index = gumbel_argmax(logits.detach(), seed=seed)
    assert isinstance(index, Tensor)
    return F.one_hot(index, logits.shape[-1]).to(logits.dtype)


def log_prob(logits: Tensor, sample: Tensor) -> Tensor:
    """Of one-hot samples (S, B, ..., K) by logits (B, ..., K): (S, B)."""
    logs = F.log_softmax(logits.to(accumulate_dtype(logits)), -1)
    index = sample.argmax(-1, keepdim=True)
    return row_sum(logs.expand(sample.shape).gather(-1, index))


def values(f: Function, sample: Tensor, name: str = "f") -> Tensor:
    """f of samples (S, B, ...): one number for each, (S, B)."""
    found = f(sample)
    if not isinstance(found, Tensor) or found.shape != sample.shape[:2]:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{name}: expected a value for each sample of each row, {tuple(sample.shape[:2])}, "
            f"got {got}"
        )
    return found


def row_sum(x: Tensor) -> Tensor:
    """Over all dimensions but those of samples and rows: (S, B)."""
    return x.flatten(2).sum(2) if x.dim() > 2 else x


def for_gradient(x: Tensor) -> Tensor:
    """0, with the gradient of x."""
    return x - x.detach()


def softmax_gradient(p: Tensor, logits: Tensor) -> Tensor:
    """0, with the gradient that a softmax has where its value is p: diag(p) - p p'."""
    p, logits = p.detach(), logits.masked_fill(logits == -torch.inf, 0.0)
    return for_gradient(p * (logits - (p * logits).sum(-1, keepdim=True)))
