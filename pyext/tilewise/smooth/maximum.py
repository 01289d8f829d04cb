"""The maximum, where it is, and its index."""

import torch
from torch import Tensor

from tilewise.smooth import _temperature


def maximum(
    x: Tensor, tau: Tensor | float = 1.0, dim: int = -1, *, mask: Tensor | None = None
) -> Tensor:
    r"""The largest element, smoothly: log-sum-exp.

        maximum(x) = tau log sum_i exp(x_i / tau)

    Its gradient is `onehot_argmax(x, tau)`.

    Args:
        x: any shape, float16, bfloat16, float32 or float64. -inf is masked.
        tau: a float, at least 0, or a tensor of one element above 0, which may learn.
        dim: along which to look.
        mask: bool, broadcast to x: True where an element counts.

    Returns:
        x's shape without `dim`, x's dtype. -inf where nothing counts.

    Rate: max(x) <= maximum(x) <= max(x) + tau log n; the excess is tau log m + O(tau exp(-gap /
    tau)) where m of the n elements are equally the largest, and the next is smaller by the gap.

    Cost: a few readings of x; memory of x.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype, named in the text.
    """
    tau = _temperature.temperature(tau, "x", x)
    values, counts = _temperature.elements("x", x, dim, mask)
    if _temperature.is_zero(tau):
        return values.masked_fill(~counts, -torch.inf).amax(-1).to(x.dtype)
    weights, largest = _temperature.log_weights(values, counts, tau)
    excess = torch.where(counts.any(-1), torch.logsumexp(weights, -1), 0.0)
    return (largest.squeeze(-1) + tau * excess).to(x.dtype)


def onehot_argmax(
    x: Tensor, tau: Tensor | float = 1.0, dim: int = -1, *, mask: Tensor | None = None
) -> Tensor:
    r"""A 1 at the largest element, smoothly: softmax.

        onehot_argmax(x)_i = exp(x_i / tau) / sum_j exp(x_j / tau)

    Args:
        x, tau, dim, mask: as in `maximum`.

    Returns:
        x's shape and dtype, each row with the sum 1. Equal maxima share. NaN where nothing counts.

    Rate: no element is off by more than (n - 1) exp(-gap / tau), with the gap from the largest
    value to the next smaller one.

    Cost: a few readings of x; memory of x.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype, named in the text.
    """
    tau = _temperature.temperature(tau, "x", x)
    values, counts = _temperature.elements("x", x, dim, mask)
    return _temperature.softmax(values, counts, tau).movedim(-1, dim).to(x.dtype)


def argmax(
    x: Tensor, tau: Tensor | float = 1.0, dim: int = -1, *, mask: Tensor | None = None
) -> Tensor:
    r"""The index of the largest element, smoothly: the mean index under a softmax.

        argmax(x) = sum_i i softmax(x / tau)_i

    An index is a place here: between two equal maxima lies their mean, which may be neither. It is
    meant for positions (a keypoint's coordinate), not for names of classes.

    Args:
        x, tau, dim, mask: as in `maximum`.

    Returns:
        x's shape without `dim`, float32 (float64 for float64). NaN where nothing counts.

    Rate: off by at most (n - 1)^2 exp(-gap / tau), with the gap from the largest value to the
    next smaller one.

    Cost: a few readings of x; memory of x.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype, named in the text.
    """
    tau = _temperature.temperature(tau, "x", x)
    values, counts = _temperature.elements("x", x, dim, mask)
    place = torch.arange(values.shape[-1], dtype=values.dtype, device=x.device)
    return (_temperature.softmax(values, counts, tau) * place).sum(-1)
