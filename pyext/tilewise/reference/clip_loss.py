"""CLIP's loss as its equation says it."""

from torch import Tensor

from tilewise.reference._cross_entropy import cross_entropy
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
        forth = cross_entropy(logits, pairs, label_smoothing)
        loss = (forth + cross_entropy(logits.T, pairs.T, label_smoothing)) / 2
    return loss.to(accumulate_dtype(image_features))
