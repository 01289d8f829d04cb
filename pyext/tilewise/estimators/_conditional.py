"""Perturbed logits given where their largest is."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise.ops.gumbel_softmax import gumbel_softmax
from tilewise.reference._precision import accumulate_dtype


def perturbed(logits: Tensor, sample: Tensor, seed: Tensor, draw: int) -> Tensor:
    """logits + g given that it is largest where the one-hot sample is 1, less that largest.

    With exponential variates E_j = exp(-g_j) of new noise and p = softmax(logits), the largest is
    -log E_i and the others -log(E_j / p_j + E_i); so another is lower by log(1 + E_j / (E_i p_j)).
    Both factors come from the relaxed sample v of zero logits, whose row's constant drops out.

    Draws with different numbers are independent of each other, and those from 1 on of the seed's
    own sample of these rows: they take rows of the random stream that come after.
    """
    logs = F.log_softmax(logits.to(accumulate_dtype(logits)), -1)
    rows = logits.numel() // max(logits.shape[-1], 1)
    zeros = torch.zeros((), dtype=logs.dtype, device=logits.device).expand(logits.shape)
    v = gumbel_softmax(zeros, 1.0, seed=seed, row_offset=draw * rows).log()
    ratio = (v * sample).sum(-1, keepdim=True) - v  # log(E_j / E_i)
    lower = F.softplus(ratio - logs, threshold=40.0)
    return -torch.where(sample > 0, 0.0, lower)
