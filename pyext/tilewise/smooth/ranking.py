"""Order: which elements are the k largest, ranks, and sorted values."""

import math

import torch
from torch import Tensor

from tilewise.ops import _arguments
from tilewise.smooth import _pairs, _temperature

FAR = 128.0  # temperatures beyond which exp(-x) is no longer seen beside 1, even of its square


def topk(
    x: Tensor, k: int, tau: Tensor | float = 1.0, dim: int = -1, *, mask: Tensor | None = None
) -> Tensor:
    r"""A 1 at each of the k largest elements, smoothly: sigmoids about a common threshold.

        topk(x)_i = sigmoid((x_i - t) / tau),    t such that    sum_i topk(x)_i = k

    It is the point of {0 <= y <= 1, sum y = k} that maximises <x, y> + tau H(y), with the entropy
    H of independent yes/no choices. The threshold is found by bisection; the gradient is that of
    the exact solution.

    Args:
        x, tau, dim, mask: as in `maximum`.
        k: how many, at most x's size along dim. Rows with fewer elements that count take all.

    Returns:
        x's shape and dtype, each row with the sum k. 0 where masked. Those that are equally the
        k-th largest share what is left.

    Rate: no element is off by more than sqrt(k (n - k)) exp(-gap / (2 tau)), with the gap from the
    k-th largest to the next smaller one: half the exponent of the others, since the threshold lies
    in the middle.

    Cost: 32 readings of x (62 for float64); memory of x. The backward pass keeps the result.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype, named in the text; k larger
            than the number of elements.

    Paper: Amos, Koltun and Kolter, The Limited Multi-Label Projection Layer, 2019 (arXiv
    1906.08707).
    """
    tau = _temperature.temperature(tau, "x", x)
    k = _arguments.integer("k", k, least=1)
    values, counts = _temperature.elements("x", x, dim, mask)
    if k > values.shape[-1]:
        raise ValueError(f"k: expected at most the {values.shape[-1]} elements, got {k}")
    return _topk(values, counts, k, tau).movedim(-1, dim).to(x.dtype)


def _topk(x: Tensor, counts: Tensor, k: int, tau: Tensor | float) -> Tensor:
    """Of the last dimension."""
    enough = counts.sum(-1, keepdim=True) > k
    lowest = x.detach().masked_fill(~counts, -math.inf).topk(k, -1).values[..., -1:]
    gap = torch.where(counts & enough, x - lowest, 0.0)
    if k == x.shape[-1]:
        chosen = torch.ones_like(x)
    elif _temperature.is_zero(tau):
        gap = gap.detach()
        above, equal = counts & (gap > 0), counts & (gap == 0)
        left = k - above.sum(-1, keepdim=True)
        chosen = above + equal * left / equal.sum(-1, keepdim=True).clamp(min=1)
    else:
        # The largest of those that do not count is as far away as it can be seen.
        chosen = _KSubset.apply((gap / tau).clamp(-FAR, FAR).masked_fill(~counts, -FAR), k)
    return torch.where(enough, chosen * counts, counts.to(x.dtype))


class _KSubset(torch.autograd.Function):
    """sigmoid(z - t) along the last dimension with the sum k; the k-th largest z is 0."""

    @staticmethod
    def forward(ctx, z, k):
        largest, others = z.sort(-1, descending=True).values.tensor_split([k], -1)
        # k + 1 elements that are at most log k below t have a sum of at least k; those from the
        # k-th on, all log(n - k) below t, have at most 1.
        low = others[..., :1] - math.log(k)
        high = torch.full_like(low, math.log(others.shape[-1]))
        for _ in range(62 if z.dtype == torch.float64 else 32):
            middle = (low + high) / 2
            # The sum is above k where the k largest lack less than the others have.
            lacking = torch.sigmoid(middle - largest).sum(-1, keepdim=True)
            more = torch.sigmoid(others - middle).sum(-1, keepdim=True) > lacking
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        chosen = torch.sigmoid(z - (low + high) / 2)
        ctx.save_for_backward(chosen)
        return chosen

    @staticmethod
    def backward(ctx, grad):
        (chosen,) = ctx.saved_tensors
        slope = chosen * (1 - chosen)
        total = slope.sum(-1, keepdim=True).clamp(min=torch.finfo(slope.dtype).tiny)
        return slope * (grad - (slope * grad).sum(-1, keepdim=True) / total), None


def rank(
    x: Tensor,
    tau: Tensor | float = 1.0,
    dim: int = -1,
    descending: bool = False,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Each element's place in the order, from 1, smoothly: how many are smaller.

        rank(x)_i = 1 + sum_{j != i} sigmoid((x_i - x_j) / tau)

    Args:
        x, tau, dim, mask: as in `maximum`.
        descending: the largest has rank 1.

    Returns:
        x's shape, float32 (float64 for float64); n elements have the ranks' sum n (n + 1) / 2 at
        every tau. Equal elements share the mean of their ranks. 0 where masked.

    Rate: off by at most (n - 1) exp(-gap / tau), with the gap of the two closest different values.

    Cost: n^2 sigmoids a row, in pieces: where there are more than 4 million, the backward pass
    makes them again, and memory is that of x. tau=0: one sort.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype, named in the text.

    Paper: Qin, Liu and Li, A General Approximation Framework for Direct Optimization of Information
    Retrieval Measures, Information Retrieval 2010.
    """
    tau = _temperature.temperature(tau, "x", x)
    values, counts = _temperature.elements("x", x, dim, mask)
    if descending:
        values = -values
    below = _pairs.count_below(values, values, counts.to(values.dtype), tau)
    return torch.where(counts, below + 0.5, 0.0).movedim(-1, dim)


def sort(
    x: Tensor,
    tau: Tensor | float = 1.0,
    dim: int = -1,
    descending: bool = False,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    r"""The elements in order, smoothly: each a mean of those that are near it.

        sort(x)_i = sum_j P_ij x_j,    P_i = softmax_j(-|s_i - x_j| / tau),    s = torch.sort(x)

    Args:
        x, tau, dim, mask: as in `maximum`.
        descending: the largest comes first.

    Returns:
        x's shape and dtype. Masked elements come last, as 0.

    Rate: off by at most (n - 1) tau / e, whatever x; and by (n - 1) gap exp(-gap / tau) once tau
    is smaller than the gap of the two closest different values.

    Cost: n^2 exponentials a row, in pieces: where there are more than 4 million, the backward pass
    makes them again, and memory is that of x.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype, named in the text.

    Paper: Prillo and Eisenschlos, SoftSort: A Continuous Relaxation for the argsort Operator, ICML
    2020.
    """
    tau = _temperature.temperature(tau, "x", x)
    values, counts = _temperature.elements("x", x, dim, mask)
    last = values.masked_fill(~counts, -math.inf if descending else math.inf)
    ordered, order = torch.sort(last, dim=-1, descending=descending, stable=True)
    filled = counts.gather(-1, order)
    ordered = torch.where(filled, ordered, 0.0)
    if not _temperature.is_zero(tau):

        def mix(targets: Tensor) -> Tensor:
            distance = (targets[..., None] - values[..., None, :]).abs()
            logits = (-distance / tau).masked_fill(~counts[..., None, :], -math.inf)
            near = torch.softmax(logits, -1).masked_fill(~counts[..., None, :], 0.0)
            return (near * values[..., None, :]).sum(-1)

        ordered = torch.where(filled, _pairs.in_pieces(mix, ordered, values.numel()), 0.0)
    return ordered.movedim(-1, dim).to(x.dtype)
