"""Losses of a block of the logits, for processes that each hold a part: see ops/_blocks.py."""

import torch
from torch import Tensor

from tilewise.kernels import _common, _contrast, clip_loss
from tilewise.kernels._cross_entropy import FACTOR, LARGEST, CrossEntropy, Side
from tilewise.kernels.itc_loss import ItcLoss


def _block(image: Tensor, text: Tensor, scale: Tensor, *weights: Tensor) -> CrossEntropy:
    block = CrossEntropy(image, text, scale, False, clip_loss.TILES)
    block.weigh(Side(weights[0]), Side(weights[1]))
    return block


def clip_block_sums(
    image: Tensor, text: Tensor, logit_scale: Tensor, positives: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logits and sums of exponentials, (2, B) and (2, N) float64; the matches' logits."""
    with _common.launching(image=image):
        halves = (x.new_full((len(x),), 0.5, dtype=torch.float64) for x in (image, text))
        block = _block(image, text, logit_scale, *halves)
        size = block.scale.double().abs()
        most = clip_loss.CHUNK_COLS, clip_loss.CHUNK_BYTES
        matched = block.sums(*block.chunks(positives, None, most, gradients=False), ends=False)
        sums = []
        for side in block.sides:
            largest, total = side.state.T[:2].double()
            sums.append(torch.stack([torch.where(total > 0, largest * size, -torch.inf), total]))
        return sums[0], sums[1], matched.sum(dtype=torch.float64) * size / block.unit


def clip_block_gradients(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    positives: int | None,
    image_sums: Tensor,
    text_sums: Tensor,
    image_weight: Tensor,
    text_weight: Tensor,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by image, text and scale, float32, empty where not needed."""
    with _common.launching(image=image):
        block = _block(image, text, logit_scale, image_weight, text_weight)
        size = block.scale.double().abs()
        for side, sums in zip(block.sides, (image_sums, text_sums), strict=True):
            largest = torch.where(size > 0, sums[0] / size, 0.0)
            # What has no weight may have been compared with nothing: no exponential overflows.
            highest = -_contrast.LOWEST.value
            side.state[:, LARGEST.value] = torch.where(side.matched, largest, highest)
            side.state[:, FACTOR.value] = sums[1]
            side.end_of_sums()
        most = clip_loss.CHUNK_COLS, clip_loss.CHUNK_BYTES
        needs = need_image, need_text, need_scale
        return block.gradients(*block.chunks(positives, None, most, gradients=True), needs)


def itc_block_means(
    query: Tensor, keys: Tensor, logit_scale: Tensor, need_mean: bool
) -> tuple[Tensor, Tensor]:
    """Largest logits and sums of exponentials (2, B) float64; the keys' means (B, D) float32."""
    with _common.launching(query=query):
        # A loss depends on the mean: in half precision weights are split, as for a teacher's.
        block = ItcLoss(query, keys, logit_scale.reshape(()), None, None, precise=True)
        sums = logit_scale.new_zeros(2, len(query), dtype=torch.float64)
        sums[0] = -torch.inf
        mean = query.new_zeros(query.shape if need_mean else 0, dtype=torch.float32)
        for start in range(0, len(query) if block.segments else 0, block.size[0]):
            at = slice(start, start + block.size[0])
            rows = block.rows(at)
            state = block.sums(rows)
            sums[0, at], sums[1, at] = state[0] * block.scale.double().abs(), state[1]
            if need_mean:
                total, parts, rest = block.means(rows, state, block.splits * len(rows))
                weights = parts[0].sum(0, dtype=torch.float64)[:, None]
                if block.splits:
                    total = total[: len(rows)] + total[rest:]
                mean[at] = (total / weights)[:, : query.shape[1]]
        return sums, mean
