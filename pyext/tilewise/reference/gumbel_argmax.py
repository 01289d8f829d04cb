"""Sampling by the largest perturbed logits, as the equation says it."""

from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.reference._precision import accumulate_dtype, exact_dtype, no_autocast
from tilewise.reference.gumbel_softmax import perturbed


class GumbelArgmax(NamedTuple):
    """Sampled categories and log softmax at these; see `tilewise.gumbel_argmax`."""

    index: Tensor  # type: ignore[assignment]  # tuple.index, which nobody needs here
    log_prob: Tensor


def gumbel_argmax(
    logits: Tensor,
    k: int | None = None,
    dim: int = -1,
    seed: Tensor | int | None = None,
    row_offset: int = 0,
    *,
    log_prob: bool = False,
) -> Tensor | GumbelArgmax:
    """What `tilewise.gumbel_argmax` computes; arguments and results are the same.

    Cost: a dozen matrices of the size of the logits, in int64 and float64.
    """
    with no_autocast(logits):
        z = perturbed(logits.detach(), dim, seed, row_offset)  # (..., K)
        # NaN never wins; of equals, the lowest index does.
        order = z.masked_fill(z.isnan(), -torch.inf).sort(dim=-1, descending=True, stable=True)
        index = order.indices[..., : k or 1].movedim(-1, dim).contiguous()
        value = None
        if log_prob:
            x = logits.to(exact_dtype(logits))
            value = torch.log_softmax(x, dim).gather(dim, index)
            value = value.to(accumulate_dtype(logits))
        if k is None:
            index, value = index.squeeze(dim), None if value is None else value.squeeze(dim)
        return index if value is None else GumbelArgmax(index, value)
