"""The sigmoid loss of SigLIP as its equation says it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise.reference._matches import matches
from tilewise.reference._precision import accumulate_dtype, exact_dtype, no_autocast


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    positives: int | tuple[Tensor, Tensor] | None = 0,
) -> Tensor:
    """What `tilewise.sigmoid_loss` computes; arguments and result are the same.

    Cost: memory O(B * N), several float64 matrices of that size.
    """
    with no_autocast(image_features):
        image = image_features.to(exact_dtype(image_features))  # (B, D)
        text = text_features.to(image.dtype)  # (N, D)
        logits = image @ text.T * logit_scale  # (B, N)
        if logit_bias is not None:
            logits = logits + logit_bias
        labels = torch.where(matches(image, text, positives), 1.0, -1.0).to(logits.dtype)
        loss = -F.logsigmoid(labels * logits).sum() / max(len(image), 1)
    return loss.to(accumulate_dtype(image_features))
