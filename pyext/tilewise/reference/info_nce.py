"""InfoNCE as its equation says it."""

from torch import Tensor

from tilewise.reference._cross_entropy import cross_entropy
from tilewise.reference._matches import matches
from tilewise.reference._precision import accumulate_dtype, exact_dtype, no_autocast


def info_nce(
    query: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    *,
    positives: int | tuple[Tensor, Tensor] | None = 0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """What `tilewise.info_nce` computes; arguments and result are the same.

    Cost: memory O(B * N), several float64 matrices of that size.
    """
    with no_autocast(query):
        exact = query.to(exact_dtype(query))  # (B, D)
        logits = exact @ keys.to(exact.dtype).T * logit_scale  # (B, N)
        pairs = matches(query, keys, positives).to(logits.dtype)
        loss = cross_entropy(logits, pairs, label_smoothing)
    return loss.to(accumulate_dtype(query))
