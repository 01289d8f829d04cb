"""The cross entropy of rows of logits, any number of which may match."""

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, pairs: Tensor, smoothing: float) -> Tensor:
    """Mean over the rows that have a match; the matches of a row share its target."""
    count = pairs.sum(1, keepdim=True)
    target = (1 - smoothing) * pairs / count.clamp(min=1) + smoothing / max(pairs.shape[1], 1)
    rows = count.squeeze(1) > 0
    terms = -(target * torch.log_softmax(logits, dim=1)).sum(1)
    return torch.where(rows, terms, 0.0).sum() / rows.sum().clamp(min=1)
