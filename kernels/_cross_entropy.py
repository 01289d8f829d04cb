"""What the losses of cross entropies share: sides, the launches of both passes, results."""

import math

import torch
from torch import Tensor

from tilewise.kernels import _contrast
from tilewise.kernels._common import Tile
from tilewise.kernels._contrast import Chunk, Launch
from tilewise.kernels._cross_entropy_tiles import (
    FACTOR,
    LARGEST,
    SMOOTH,
    TARGET,
    cross_entropy_gradient_tile,
    cross_entropy_sums_tile,
)

CHUNK_BYTES = 128 << 20  # workspace: d(loss)/d(logit) of one chunk of the logits
CHUNK_COLS = 8192
# Kernels compute dz in units in which it is at most 2, so that float16 does not lose the 1/B of a
# mean; times this it ends at 2^-38.
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
    """The rows or the columns of the logits: what each has to do with all of the others."""

    def __init__(self, weight: Tensor, share: Tensor | float = 1.0, smooth: float = 0.0):
        """
        Args:
            weight: (n,) float64, what each counts in the loss; 0: nothing.
            share: the part of it that is the target of each match.
            smooth: the part of it that is the target of every pair.
        """
        self.weight, self.share, self.smooth = weight, share, smooth
        self.matched = weight != 0

    @classmethod
    def of(cls, matches: Tensor, others: int, smoothing: float, share: float) -> "Side":
        """The mean over those that have a match, times `share`; `matches` (n,): how many each."""
        matched = matches > 0
        weight = torch.where(matched, share / matched.sum().clamp(min=1).double(), 0.0)
        return cls(weight, (1 - smoothing) / matches.clamp(min=1), smoothing / max(others, 1))

    def begin(self, unit: Tensor) -> None:
        """`unit`: what kernels' weights are multiplied by."""
        self.weight = self.weight * unit
        self.state = self.weight.new_zeros(len(self.weight), 4, dtype=torch.float32)
        self.state[:, LARGEST.value] = _contrast.LOWEST.value
        self.state[:, TARGET.value] = self.weight * self.share
        self.state[:, SMOOTH.value] = self.weight * self.smooth

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


def count_matches(
    rows: int, cols: int, positives: int | None, ids: tuple[Tensor, Tensor] | None,
    device: torch.device,
) -> Tensor:
    """(rows,): how many of the columns match each row, by ids or else by an offset; None: none."""
    if ids is not None:
        others = ids[1].sort()[0]
        return torch.searchsorted(others, ids[0], right=True) - torch.searchsorted(others, ids[0])
    first = cols if positives is None else min(max(positives, -rows), cols)
    i = torch.arange(rows, device=device) + first
    return ((i >= 0) & (i < cols)).long()


class CrossEntropy:
    """One call's operands, and the launches on a chunk of them.

    `sides`: of the rows and of the columns; or None for these, where only rows choose.
    """

    def __init__(
        self, image: Tensor, text: Tensor, scale: Tensor, sides: tuple[Side, Side | None],
        smoothed: bool, tiles: dict[tuple[str, str], Tile],
    ):
        self.launch = Launch.of(image, tiles)
        self.image, self.text = self.launch.operand(image), self.launch.operand(text)
        self.depth = image.shape[1]
        self.scale, self.smoothed = scale.reshape(()), smoothed
        self.sign, self.rate = _contrast.sign_and_rate(self.scale)
        self.scalars = torch.stack([self.sign, self.rate])
        self.of_rows, self.of_cols = sides
        self.sides = [side for side in sides if side is not None]
        weights = [self.scale.new_zeros(1).double(), *(side.weight for side in self.sides)]
        heaviest = torch.cat(weights).amax()
        self.unit = torch.where(heaviest > 0, 1 / heaviest, 1.0)
        if self.image.dtype == torch.float16:
            self.unit *= FLOAT16_SCALE
        for side in self.sides:
            side.begin(self.unit)

    def run(self, kernel, chunk: Chunk, *outputs) -> Tensor:
        """Launches `kernel`; returns the sum of what its programs add up, float64."""
        sums = self.scalars.new_empty(math.prod(self.launch.grid(chunk)))
        of_cols = self.of_cols and self.of_cols.state[chunk.cols]
        self.launch.run(
            kernel, chunk, *chunk.matches, self.of_rows.state[chunk.rows], of_cols, self.scalars,
            sums, *outputs, THREADS=self.launch.threads, SMOOTHED=self.smoothed,
            **self.launch.limit,
        )
        return sums.sum(dtype=torch.float64)

    def add_sums(self, chunk: Chunk) -> Tensor:
        """Pass 1 on a chunk; returns its sum of target * x."""
        row_parts = self.launch.row_parts(chunk, 2)
        col_parts = self.of_cols and self.launch.col_parts(chunk, 2)
        targets = self.run(cross_entropy_sums_tile, chunk, row_parts, col_parts)
        self.of_rows.add(chunk.rows, row_parts, self.rate)
        if self.of_cols:
            self.of_cols.add(chunk.cols, col_parts, self.rate)
        return targets

    def gradient(self, chunk: Chunk, grad: Tensor) -> Tensor:
        """Pass 2 on a chunk, into `grad`; returns its sum of dz * x."""
        return self.run(cross_entropy_gradient_tile, chunk, grad, grad.stride(0))

    def results(
        self, positives: int | None, ids: tuple[Tensor, Tensor] | None, cols: int, size: int,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss and its gradients by both features and the scale, empty where not needed.

        Chunks have at most `cols` columns, and gradients of `size` bytes.
        """
        image, text, launch = self.image, self.text, self.launch
        shape = _contrast.chunk_size(image, text, launch.tile, cols, size)
        numbers = ids and _contrast.renumber(*ids)
        chunks = list(_contrast.chunks(image, text, positives, numbers, shape))

        zero = image.new_zeros((), dtype=torch.float64)
        targets = sum((self.add_sums(chunk) for chunk in chunks), zero)
        size_of_scale = self.scale.double().abs()
        log_sums = sum((side.log_sums(size_of_scale) for side in self.sides), zero)
        loss = ((log_sums - targets * size_of_scale) / self.unit).float()
        for side in self.sides:
            side.end_of_sums()

        return loss, *self.gradients(chunks, shape, needs)

    def gradients(
        self, chunks: list[Chunk], shape: tuple[int, int], needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By both features and the scale, once the sums are known; chunks are at most `shape`."""
        d_scale, d_image, d_text = self.launch.gradients(
            self.image, self.text, chunks, shape, needs, self.gradient
        )
        factor = self.scale / self.unit
        return (
            d_image.mul_(factor)[..., : self.depth].contiguous(),
            d_text.mul_(factor)[..., : self.depth].contiguous(),
            (d_scale * self.sign / self.unit).float() if needs[2] else factor.new_empty(0).float(),
        )
