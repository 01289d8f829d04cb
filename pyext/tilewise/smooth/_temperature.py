"""What smooth functions share: their arguments, and the two curves that all are made of."""

import math

import torch
from torch import Tensor

from tilewise import _numbers
from tilewise.ops import _arguments
from tilewise.reference._precision import accumulate_dtype


def temperature(tau: Tensor | float, name: str, x: Tensor) -> Tensor | float:
    """tau as a float, at least 0, or as a 0-d tensor in the precision that x is computed in."""
    _arguments.check_floating(name, x)
    if isinstance(tau, Tensor):  # whose value stays unknown: to look would wait for a GPU
        return _numbers.scalar("tau", tau, accumulate_dtype(x), x.device)
    number = _numbers.real("tau", tau)
    if not number >= 0:
        raise ValueError(f"tau: expected at least 0, got {tau}")
    # A quotient by less would be inf, or NaN of 0.
    return number if number >= torch.finfo(accumulate_dtype(x)).tiny else 0.0


def is_zero(tau: Tensor | float) -> bool:
    """Whether the hard function is asked for."""
    return not isinstance(tau, Tensor) and tau == 0


def elements(name: str, x: Tensor, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """x in the precision to compute in, with `dim` last, and which of its elements count.

    Those that do not, masked or -inf, become 0, so that no NaN comes of them in a gradient.
    """
    if x.dim() == 0:
        raise ValueError(f"{name}: expected at least one dimension, got ()")
    dim = _arguments.dimension("dim", dim, x)
    if x.shape[dim] == 0:
        raise ValueError(f"{name}: expected at least one element along dim, got {tuple(x.shape)}")
    wide = x.to(accumulate_dtype(x))
    counts = wide != -math.inf
    if mask is not None:
        counts = counts & bool_like("mask", mask, x)
    return torch.where(counts, wide, 0.0).movedim(dim, -1), counts.movedim(dim, -1)


def bool_like(name: str, mask: Tensor, like: Tensor) -> Tensor:
    """A bool tensor, broadcast to the shape of another."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: expected a bool tensor, got {got}")
    try:
        return mask.to(like.device).expand(like.shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected to broadcast to {tuple(like.shape)}, got {tuple(mask.shape)}"
        ) from None


def scaled(gap: Tensor, tau: Tensor | float) -> Tensor:
    """gap / tau of gaps <= 0, where softmax takes them; the limit is 0 or -inf."""
    if is_zero(tau):
        return torch.zeros_like(gap).masked_fill(gap != 0, -math.inf)
    return gap / tau


def log_weights(x: Tensor, counts: Tensor, tau: Tensor | float) -> tuple[Tensor, Tensor]:
    """(x - max) / tau, -inf for what does not count, and the largest, a constant: (..., 1)."""
    largest = x.detach().masked_fill(~counts, -math.inf).amax(-1, keepdim=True)
    gap = torch.where(counts, x - largest, 0.0)
    return scaled(gap, tau).masked_fill(~counts, -math.inf), largest


def softmax(x: Tensor, counts: Tensor, tau: Tensor | float) -> Tensor:
    """Of x / tau along the last dimension. NaN where nothing counts."""
    return torch.softmax(log_weights(x, counts, tau)[0], -1)


def step(x: Tensor, tau: Tensor | float) -> Tensor:
    """sigmoid(x / tau); its limit is 0, 1/2 at 0, and 1."""
    if is_zero(tau):
        return (x.detach().sign() + 1) / 2
    return torch.sigmoid(x / tau)
