"""CLIP's loss in Triton: a pass over the logits for sums of exponentials, another for gradients."""

import math

import torch
from torch import Tensor

from tilewise.kernels import _common, _contrast
from tilewise.kernels._clip_loss_tiles import (
    FACTOR,
    LARGEST,
    SMOOTH,
    TARGET,
    clip_gradient_tile,
    clip_sums_tile,
)
from tilewise.kernels._common import Tile
from tilewise.kernels._contrast import Chunk, Launch

CHUNK_BYTES = 128 << 20  # workspace: d(loss)/d(logit) of one chunk of the logits
CHUNK_COLS = 8192
# Kernels compute dz * 2 * min(images with a match, texts with one), which is at most 2, so that
# float16 does not lose the 1/B of a mean; times this it ends at 2^-38.
FLOAT16_SCALE = 2.0**14

TILES = _contrast.SMALLER_TILES | {
    ("sm_80", "half"): Tile(128, 128, 32, pieces=16, warps=8, stages=4),
    ("sm_86", "half"): Tile(128, 128, 32, pieces=16, warps=8, stages=3),
    ("sm_89", "half"): Tile(128, 128, 32, pieces=16, warps=8, stages=3),
    ("sm_90", "ieee"): Tile(64, 64, 32, pieces=2, warps=4, stages=2),
    ("sm_120", "tf32"): Tile(128, 64, 32, pieces=4, warps=8, stages=3),
    ("sm_120", "tf32x3"): Tile(64, 64, 16, pieces=1, warps=4, stages=3),
    ("gfx942", "half"): Tile(128, 64, 32, pieces=4, warps=8, stages=2),
    ("gfx90a", "half"): Tile(128, 64, 32, pieces=4, warps=8, stages=2),
}


class Side:
    """The images or the texts: what each has to do with all of the others."""

    def __init__(self, matches: Tensor, others: int, smoothing: float):
        """`matches`: how many of the others match each."""
        self.matched = matches > 0
        self.count = self.matched.sum()
        self.shares = (1 - smoothing) / matches.clamp(min=1), smoothing / max(others, 1)

    def begin(self, unit: Tensor) -> None:
        """`unit`: what kernels' weights are multiplied by, which are 1 / (2 count)."""
        weight = unit.double() / (2 * self.count.clamp(min=1))
        self.weight = torch.where(self.matched, weight, 0.0)
        share, smooth = self.shares
        self.state = self.weight.new_zeros(len(self.weight), 4, dtype=torch.float32)
        self.state[:, LARGEST.value] = _contrast.LOWEST.value
        self.state[:, TARGET.value] = self.weight * share
        self.state[:, SMOOTH.value] = self.weight * smooth

    def add(self, at: slice, parts: Tensor, rate: Tensor) -> None:
        """Merges (2, n, at) largest x and sums of exponentials of n parts."""
        _contrast.merge_exponentials(self.state.T[:2, at], parts, rate)

    def log_sums(self, scale: Tensor) -> Tensor:
        """The weighted sum of log(sum of exp(z)), float64."""
        largest, total = self.state.T[:2].double()
        return torch.where(self.matched, self.weight * (scale * largest + total.log()), 0.0).sum()

    def end_of_sums(self) -> None:
        """From now on FACTOR is one."""
        total = self.state[:, FACTOR.value]
        self.state[:, FACTOR.value] = torch.where(self.matched, self.weight / total, 0.0)


def count_matches(rows: int, cols: int, offset: int, device: torch.device) -> Tensor:
    """(rows,): 1 where i + offset is one of the columns, else 0."""
    i = torch.arange(rows, device=device) + min(max(offset, -rows), cols)
    return ((i >= 0) & (i < cols)).long()


def count_equal(ids: Tensor, others: Tensor) -> Tensor:
    """(len(ids),): how many of the others equal each."""
    others = others.sort()[0]
    return torch.searchsorted(others, ids, right=True) - torch.searchsorted(others, ids)


class ClipLoss:
    """One call's operands, and the launches on a chunk of them."""

    def __init__(self, image_features, text_features, scale, positives, ids, smoothing):
        rows, cols = len(image_features), len(text_features)
        device = image_features.device
        self.launch = Launch.of(image_features, TILES)
        self.image = self.launch.operand(image_features)
        self.text = self.launch.operand(text_features)
        self.smoothed = smoothing > 0
        self.sign, self.rate = _contrast.sign_and_rate(scale.reshape(()))
        self.scalars = torch.stack([self.sign, self.rate])

        if ids is None:
            counts = (
                count_matches(rows, cols, positives, device),
                count_matches(cols, rows, -positives, device),
            )
        else:
            counts = count_equal(*ids), count_equal(*ids[::-1])
        self.images = Side(counts[0], cols, smoothing)
        self.texts = Side(counts[1], rows, smoothing)
        self.unit = 2.0 * torch.minimum(self.images.count, self.texts.count).clamp(min=1)
        if self.image.dtype == torch.float16:
            self.unit *= FLOAT16_SCALE
        for side in (self.images, self.texts):
            side.begin(self.unit)

    def run(self, kernel, chunk: Chunk, *outputs) -> Tensor:
        """Launches `kernel`; returns the sum of what its programs add up, float64."""
        sums = self.scalars.new_empty(math.prod(self.launch.grid(chunk)))
        self.launch.run(
            kernel, chunk, *chunk.matches,
            self.images.state[chunk.rows], self.texts.state[chunk.cols], self.scalars, sums,
            *outputs, THREADS=self.launch.threads, SMOOTHED=self.smoothed, **self.launch.limit,
        )
        return sums.sum(dtype=torch.float64)

    def add_sums(self, chunk: Chunk) -> Tensor:
        """Pass 1 on a chunk; returns its sum of target * x."""
        row_parts = self.launch.row_parts(chunk, 2)
        col_parts = self.launch.col_parts(chunk, 2)
        targets = self.run(clip_sums_tile, chunk, row_parts, col_parts)
        self.images.add(chunk.rows, row_parts, self.rate)
        self.texts.add(chunk.cols, col_parts, self.rate)
        return targets

    def gradient(self, chunk: Chunk, grad: Tensor) -> Tensor:
        """Pass 2 on a chunk, into `grad`; returns its sum of dz * x."""
        return self.run(clip_gradient_tile, chunk, grad, grad.stride(0))


def _clip_loss(image_features, text_features, scale, positives, ids, smoothing, needs):
    clip = ClipLoss(image_features, text_features, scale, positives, ids, smoothing)
    image, text, launch, depth = clip.image, clip.text, clip.launch, image_features.shape[1]
    size = _contrast.chunk_size(image, text, launch.tile, CHUNK_COLS, CHUNK_BYTES)
    numbers = ids and _contrast.renumber(*ids)
    chunks = list(_contrast.chunks(image, text, positives, numbers, size))

    scale = scale.reshape(())
    zero = image.new_zeros((), dtype=torch.float64)
    targets = sum((clip.add_sums(chunk) for chunk in chunks), zero)
    size_of_scale = scale.double().abs()
    log_sums = clip.images.log_sums(size_of_scale) + clip.texts.log_sums(size_of_scale)
    loss = ((log_sums - targets * size_of_scale) / clip.unit).float()
    for side in (clip.images, clip.texts):
        side.end_of_sums()

    d_scale, d_image, d_text = launch.gradients(
        image, text, chunks, size, needs, clip.gradient
    )
    factor = scale / clip.unit
    return (
        loss,
        d_image.mul_(factor)[..., :depth].contiguous(),
        d_text.mul_(factor)[..., :depth].contiguous(),
        (d_scale * clip.sign / clip.unit).float() if needs[2] else loss.new_empty(0),
    )


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    positives: int | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    label_smoothing: float,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of CLIP and its gradients, float32 and on the device, without a host sync.

    Args:
        image_features: (B, D), float16, bfloat16 or float32, any strides.
        text_features: (N, D), the same.
        logit_scale: one float32.
        positives: image i matches text i + positives, if there is one.
        image_ids, text_ids: int64 (B,) and (N,): those match where these are equal instead.
        label_smoothing: what part of each target all of the others share.

    Returns:
        loss, d_image, d_text, d_scale; empty where not needed. Equal bits on every run.

    Cost: 4 matrix products of B*N*D (1 if nothing is needed), memory O((B + N) * D) plus
    CHUNK_BYTES.
    """
    needs = (need_image, need_text, need_scale)
    ids = None if image_ids is None else (image_ids, text_ids)
    with _common.launching(image_features=image_features):
        return _clip_loss(
            image_features, text_features, logit_scale, positives, ids, label_smoothing, needs
        )
