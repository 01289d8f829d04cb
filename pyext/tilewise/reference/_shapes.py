"""Rows of tensors with any leading dimensions, as (heads, N, D)."""

import math

from torch import Tensor


def rows(x: Tensor, heads: int) -> Tensor:
    """x (..., D), or (heads, ..., D), as (heads, N, D)."""
    if heads == 1 and x.dim() == 2:
        return x.unsqueeze(0)  # sooner done than a reshape
    return x.reshape(heads, math.prod(x.shape[:-1]) // max(heads, 1), x.shape[-1])


def flat(x: Tensor, heads: int) -> Tensor:
    """A value per row as (heads, N)."""
    if heads == 1 and x.dim() == 1:
        return x.unsqueeze(0)
    return x.reshape(heads, x.numel() // max(heads, 1))
