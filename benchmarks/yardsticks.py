"""What people run today, written as they write it. Tests, benchmarks and examples compare with it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    positives: int | None = 0,
) -> Tensor:
    """The sigmoid loss in the inputs' own dtype, with its B x N matrices of logits and labels."""
    logits = logit_scale * image_features @ text_features.T  # (B, N)
    if logit_bias is not None:
        logits = logits + logit_bias
    labels = -torch.ones_like(logits)
    if positives is not None:
        rows = torch.arange(len(image_features), device=logits.device)
        columns = torch.arange(len(text_features), device=logits.device)
        labels = labels + 2 * (columns == rows[:, None] + positives)
    return -F.logsigmoid(labels * logits).sum() / len(image_features)
