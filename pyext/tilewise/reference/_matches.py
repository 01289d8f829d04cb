"""Which pairs of two batches match."""

import torch
from torch import Tensor


def matches(
    image: Tensor, text: Tensor, positives: int | tuple[Tensor, Tensor] | None
) -> Tensor:
    """Which images and texts belong together: (B, N) bool."""
    if isinstance(positives, (tuple, list)):
        image_ids, text_ids = positives
        return image_ids[:, None] == text_ids
    rows = torch.arange(len(image), device=image.device)[:, None]
    columns = torch.arange(len(text), device=image.device)
    if positives is None:
        return torch.zeros_like(rows == columns)
    return columns == rows + positives
