"""Reparameterised Gaussian samples and their divergence from N(0, 1), as the equations say them."""

from typing import NamedTuple

import torch
from torch import Tensor

from tilewise import _numbers
from tilewise.reference import _philox
from tilewise.reference._precision import accumulate_dtype, exact_dtype, no_autocast


class GaussianSample(NamedTuple):
    """A sample and the divergence of each row from N(0, 1); see `tilewise.gaussian_sample`."""

    z: Tensor
    kl: Tensor


def gaussian_sample(
    mean: Tensor,
    logvar: Tensor,
    seed: Tensor | int | None = None,
    row_offset: int = 0,
    *,
    logvar_range: tuple[float, float] | None = None,
) -> GaussianSample:
    """What `tilewise.gaussian_sample` computes; arguments and results are the same.

    Cost: a dozen tensors of the size of `mean`, in int64 and float64.
    """
    with no_autocast(mean):
        m, v = torch.broadcast_tensors(mean.to(exact_dtype(mean)), logvar.to(exact_dtype(mean)))
        if logvar_range is not None:
            v = _clamped(v, *logvar_range)
        rows = m.shape[0]
        cols = m.numel() // max(rows, 1)
        noise = _philox.gaussian(_numbers.seed(seed, m.device), rows, cols, row_offset)
        z = m + torch.exp(v / 2) * noise.view(m.shape)
        terms = (m.square() + torch.expm1(v) - v) / 2  # >= 0, each of them
        kl = terms.reshape(rows, cols).sum(1)
        return GaussianSample(z.to(mean.dtype), kl.to(accumulate_dtype(mean)))


def _clamped(x: Tensor, lowest: float, highest: float) -> Tensor:
    """x.clamp(lowest, highest); at the bounds torch's own has a gradient up to 2.13 only."""
    return torch.where((x < lowest) | (x > highest), x.detach().clamp(lowest, highest), x)
