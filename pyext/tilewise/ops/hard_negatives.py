"""BLIP's hard negatives: for each image a text that looks right, and the other way round."""

import torch
from torch import Tensor

from tilewise import _backend, reference
from tilewise.ops import _arguments
from tilewise.ops._register import define
from tilewise.reference.hard_negatives import HardNegatives


def hard_negatives(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    positives: int | tuple[Tensor, Tensor] | None = 0,
    seed: Tensor | int | None = None,
    row_offset: int = 0,
) -> HardNegatives:
    r"""Samples a negative for each row by similarity, without the logits.

    With z_ij = logit_scale * <image_i, text_j>, and independent draws:

        P(text_index_i = j)  = exp(z_ij) / sum_k exp(z_ik)  over the texts that don't match image i
        P(image_index_j = i) = exp(z_ij) / sum_k exp(z_kj)  over the images that don't match text j

    by the largest z_ij + g_ij, with Gumbel noise g that is made in registers where it is used.

    Args:
        image_features: (B, D), float16, bfloat16, float32 or float64. Usually L2-normalised.
        text_features: (N, D), same dtype and device. N may differ from B.
        logit_scale: one element or a float; 1 / temperature.
        positives: image i matches text i + positives, if there is one. Or a pair of int64 vectors,
            ids of the images (B,) and of the texts (N,): they match where these are equal. None:
            nothing matches. What matches is never drawn.
        seed: of the noise, an int or one int64 element. None draws it from torch's default
            generator, so that `torch.manual_seed` governs.
        row_offset: the number of the first image in the random stream.

    Returns:
        (text_index, image_index), (B,) and (N,) int64: a text for each image, an image for each
        text. -1 where there is none to choose from: all match, or have a logit of -inf or NaN.
        Where ids may do that, leave the rows out: `valid = text_index >= 0`, for both directions.

    Indices have no gradient. For equal seeds the indices are the same in all backends, but for
    values that no float32 can tell apart. Under autocast the features are cast as for a matrix
    product.

    Cost: one matrix product of B * N * D for both directions, memory O(B + N) plus a fixed
    workspace, whatever B and N.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, named in the text;
            one image and one text that match by their place.
        RuntimeError: inside a torch.func transform.

    Paper: Li et al., Align before Fuse: Vision and Language Representation Learning with Momentum
    Distillation, NeurIPS 2021; sampling: Maddison, Tarlow and Minka, A* Sampling, NeurIPS 2014.
    """
    image, text = _arguments.features(
        image_features=image_features, text_features=text_features
    )
    image, text = image.detach(), text.detach()
    scale = _arguments.scalar("logit_scale", logit_scale, image).detach()
    offset, image_ids, text_ids = _arguments.matches(
        "positives", positives, image.shape[0], text.shape[0], image.device
    )
    if image.shape[0] == text.shape[0] == 1 and offset == 0:
        raise ValueError(
            "image_features: a batch of one has no negative, expected more rows, or positives=None"
        )
    row_offset = _arguments.row_offset(row_offset)
    seed = _arguments.seed(seed, image.device)

    op = _backend.operator("hard_negatives", image.device, image.dtype)
    if op is None:
        return reference.hard_negatives(
            image, text, scale, positives=positives, seed=seed, row_offset=row_offset
        )
    return HardNegatives(
        *op(image, text, scale, offset, image_ids, text_ids, seed, row_offset)
    )


def _fake(image, text, scale, positives, image_ids, text_ids, seed, row_offset):
    return (
        image.new_empty(image.shape[0], dtype=torch.int64),
        text.new_empty(text.shape[0], dtype=torch.int64),
    )


define(
    "hard_negatives",
    "(Tensor image_features, Tensor text_features, Tensor logit_scale, SymInt? positives, "
    "Tensor? image_ids, Tensor? text_ids, Tensor seed, SymInt row_offset) "
    "-> (Tensor text_index, Tensor image_index)",
    _fake,
    module="hard_negatives",
)
