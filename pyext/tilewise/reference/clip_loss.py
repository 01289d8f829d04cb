"""CLIP's loss as its equation says it."""

import torch
from torch import Tensor

from tilewise.reference._matches import matches
from tilewise.reference._precision import accumulate_dtype, exact_dtype, no_autocast


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    positives: int | tuple[Tensor, Tensor] | None = 0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """What `tilewise.clip_loss` computes; arguments and result are the same.

    Cost: memory O(B * N), several float64 matrices of that size.
    """
    with no_autocast(image_features):
        image = image_features.to(exact_dtype(image_features))  # (B, D)
        text = text_features.to(image.dtype)  # (N, D)
        logits = image @ text.T * logit_scale  # (B, N)
        pairs = matches(image, text, positives).to(logits.dtype)
        forth = _cross_entropy(logits, pairs, label_smoothing)
        loss = (forth + _cross_entropy(logits.T, pairs.T, label_smoothing)) / 2
    return loss.to(accumulate_dtype(image_features))


def _cross_entropy(logits: Tensor, pairs: Tensor, smoothing: float) -> Tensor:
    """Mean over the rows that have a match; the matches of a row share its target."""
    count = pairs.sum(1, keepdim=True)
    target = (1 - smoothing) * pairs / count.clamp(min=1) + smoothing / max(pairs.shape[1], 1)
    rows = count.squeeze(1) > 0
    terms = -(target * torch.log_softmax(logits, dim=1)).sum(1)
    return torch.where(rows, terms, 0.0).sum() / rows.sum().clamp(min=1)
