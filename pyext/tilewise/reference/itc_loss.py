"""BLIP's image-text contrast as its equation says it."""

import torch
from torch import Tensor

from tilewise.reference._matches import matches
from tilewise.reference._precision import accumulate_dtype, exact_dtype, no_autocast


def itc_loss(
    query: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    *,
    positives: int | tuple[Tensor, Tensor] | None = 0,
    queue: Tensor | None = None,
    teacher_query: Tensor | None = None,
    alpha: Tensor | float = 0.4,
) -> Tensor:
    """What `tilewise.itc_loss` computes; arguments and result are the same.

    Cost: memory O(B * (K + Q)), several float64 matrices of that size.
    """
    with no_autocast(query):
        student = query.to(exact_dtype(query))  # (B, D)
        parts = [keys] if queue is None else [keys, queue]
        candidates = torch.cat(parts).detach().to(student.dtype)  # (K + Q, D)
        pairs = matches(student, candidates, positives).to(student.dtype)  # (B, K + Q)
        count = pairs.sum(1, keepdim=True)
        target = pairs / count.clamp(min=1)
        if teacher_query is not None:
            teacher = teacher_query.detach().to(student.dtype)
            with torch.no_grad():
                soft = torch.softmax(teacher @ candidates.T * logit_scale, dim=1)
            target = alpha * soft + (1 - alpha) * target
        terms = -(target * torch.log_softmax(student @ candidates.T * logit_scale, dim=1)).sum(1)
        rows = count.squeeze(1) > 0
        loss = torch.where(rows, terms, 0.0).sum() / rows.sum().clamp(min=1)
    return loss.to(accumulate_dtype(query))
