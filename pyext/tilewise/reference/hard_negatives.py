"""Sampling of hard negatives by the largest perturbed logits, as the equation says it."""

from typing import NamedTuple

import torch
from torch import Tensor

from tilewise import _numbers
from tilewise.reference import _philox
from tilewise.reference._matches import matches
from tilewise.reference._precision import exact_dtype, no_autocast


class HardNegatives(NamedTuple):
    """An index of a negative for each image and each text; see `tilewise.hard_negatives`."""

    text_index: Tensor
    image_index: Tensor


def hard_negatives(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    positives: int | tuple[Tensor, Tensor] | None = 0,
    seed: Tensor | int | None = None,
    row_offset: int = 0,
) -> HardNegatives:
    """What `tilewise.hard_negatives` computes; arguments and results are the same.

    Cost: memory O(B * N), a dozen int64 and float64 matrices of that size.
    """
    with torch.no_grad(), no_autocast(image_features):
        image = image_features.to(exact_dtype(image_features))  # (B, D)
        text = text_features.to(image.dtype)  # (N, D)
        logits = image @ text.T * logit_scale  # (B, N)
        logits = logits.masked_fill(matches(image, text, positives) | logits.isnan(), -torch.inf)
        seed = _numbers.seed(seed, image.device)
        where = (seed, len(image), len(text), row_offset)
        texts = logits + _philox.gumbel(*where, op=_philox.NEGATIVE_TEXTS)
        images = logits + _philox.gumbel(*where, op=_philox.NEGATIVE_IMAGES)
        return HardNegatives(_largest(texts, 1), _largest(images, 0))


def _largest(x: Tensor, dim: int) -> Tensor:
    """The lowest index of the largest value along `dim`; -1 where nothing is above -inf."""
    if x.shape[dim] == 0:
        return x.new_full((x.shape[1 - dim],), -1, dtype=torch.int64)
    value = x.amax(dim, keepdim=True)
    index = (x == value).to(torch.uint8).argmax(dim)  # the first of equals
    return index.masked_fill(value.squeeze(dim) == -torch.inf, -1)
