"""What the losses of cross entropies share: sides, the launches of both passes, results."""

import torch
import triton
from torch import Tensor

from tilewise.kernels import _contrast, _contrast_chunks, _contrast_tiles
from tilewise.kernels._common import Tile
from tilewise.kernels._contrast import Launch
from tilewise.kernels._contrast_chunks import Chunk
from tilewise.kernels._cross_entropy_ids import begin_counted_sides
from tilewise.kernels._cross_entropy_sums import (
    BLOCK,
    PARTS,
    begin_sides,
    finish_cross_entropy,
    merge_sums,
)
from tilewise.kernels._cross_entropy_tiles import (
    FACTOR,
    LARGEST,
    SMOOTH,
    TARGET,
    cross_entropy_gradient_tile,
    cross_entropy_sums_tile,
)
from tilewise.kernels._finish import Gradients
from tilewise.kernels._ids import matched_ids

CHUNK_BYTES = 128 << 20  # workspace, at most: d(loss)/d(logit) of one chunk of the logits
CHUNK_COLS = 8192
# Kernels compute dz in units in which it is at most 2, so that float16 does not lose the 1/B of a
# mean; times this it ends at 2^-38.
FLOAT16_SCALE = 2.0**14

TILES = _contrast_tiles.SMALLER_TILES | {
    ("sm_80", "half"): Tile(128, 128, 32, pieces=16, warps=8, stages=4),
    ("sm_86", "half"): Tile(128, 128, 32, pieces=16, warps=8, stages=3),
    ("sm_89", "half"): Tile(128, 128, 32, pieces=16, warps=8, stages=3),
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
        self.state = weight.new_empty(len(weight), 4, dtype=torch.float32)
        self.logs = torch.empty_like(weight)  # weighted logarithms of sums of exponentials

    @classmethod
    def empty(cls, n: int, like: Tensor) -> "Side":
        """One that `begin_sides` fills."""
        return cls(like.new_empty(n, dtype=torch.float64))

    @property
    def matched(self) -> Tensor:
        return self.weight != 0

    def begin(self, unit: Tensor) -> None:
        """`unit`: what kernels' weights are multiplied by."""
        self.weight = self.weight * unit
        self.state[:, LARGEST.value] = _contrast.LOWEST.value
        self.state[:, FACTOR.value] = 0
        self.state[:, TARGET.value] = self.weight * self.share
        self.state[:, SMOOTH.value] = self.weight * self.smooth

    def at(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """What `merge_sums` takes of a part."""
        return self.state[part], self.weight[part], self.logs[part]

    def end_of_sums(self) -> None:
        """From now on FACTOR is one; where the kernels do not end them."""
        total = self.state[:, FACTOR.value]
        self.state[:, FACTOR.value] = torch.where(self.matched, self.weight / total, 0.0)


class CrossEntropy:
    """One call's operands, and the launches on a chunk of them.

    Cross entropies of the rows, and of the columns unless only rows choose. One of the methods
    that weigh comes first; `results` calls it.
    """

    def __init__(
        self, image: Tensor, text: Tensor, scale: Tensor, smoothed: bool,
        tiles: dict[tuple[str, str], Tile],
    ):
        self.launch = Launch.of(image, len(image), len(text), tiles)
        self.image, self.text = self.launch.operand(image), self.launch.operand(text)
        self.depth = image.shape[1]
        self.scale, self.smoothed = scale.reshape(()), smoothed
        self.of_rows: Side
        self.of_cols: Side | None
        self.room: Tensor | None = None  # for dots
        # d(loss)/d(logit) of half precision must not vanish.
        self.stored = FLOAT16_SCALE if self.image.dtype == torch.float16 else 1.0

    def weigh(self, of_rows: Side, of_cols: Side | None) -> None:
        """Sides whose weights only the device knows."""
        self.of_rows, self.of_cols = of_rows, of_cols
        self.scalars = torch.stack(_contrast.sign_and_rate(self.scale))
        sides = self.sides
        weights = [self.scale.new_zeros(1).double(), *(side.weight for side in sides)]
        heaviest = torch.cat(weights).amax()
        self.unit = torch.where(heaviest > 0, self.stored / heaviest, 1.0)
        for side in sides:
            side.begin(self.unit)

    def _begin(self, both: bool) -> tuple[tuple, int]:
        """Room for sides; what kernels that fill them take of it, and in how many programs."""
        rows, cols = len(self.image), len(self.text)
        self.of_rows = Side.empty(rows, self.scale)
        self.of_cols = Side.empty(cols, self.scale) if both else None
        self.scalars = self.scale.new_empty(2)
        self.unit = self.scale.new_empty((), dtype=torch.float64)
        of_cols = (None, None) if self.of_cols is None else self.of_cols.at(slice(None))[:2]
        blocks = triton.cdiv(rows, BLOCK) + (triton.cdiv(cols, BLOCK) if both else 0)
        return (*self.of_rows.at(slice(None))[:2], *of_cols), 1 + blocks

    def weigh_ids(
        self, image_ids: Tensor, text_ids: Tensor, both: bool, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """Equal ids match: the mean over those with a match, sharing. Returns numbers for ids."""
        sides, programs = self._begin(both)
        numbers, counts = matched_ids(image_ids, text_ids)
        rows, cols = len(self.image), len(self.text)
        begin_counted_sides[(programs,)](
            self.scale, self.scalars, self.unit, counts, *sides, rows, cols, smoothing,
            WEIGHT=self.stored, BLOCK=BLOCK,
        )
        return numbers[:rows], numbers[rows:]

    def weigh_pairs(self, positives: int | None, both: bool, smoothing: float) -> None:
        """Row i and column i + positives match: the mean over rows; with `both`, half of it."""
        sides, programs = self._begin(both)
        rows, cols = len(self.image), len(self.text)
        offset = cols if positives is None else min(max(positives, -rows), cols)
        pairs = max(min(rows, cols - offset) - max(-offset, 0), 0)
        begin_sides[(programs,)](
            self.scale, self.scalars, self.unit, *sides, rows, cols, offset, max(pairs, 1),
            self.stored * (1 - smoothing), self.stored * smoothing / max(cols, 1),
            self.stored * smoothing / max(rows, 1),
            WEIGHT=self.stored, UNIT=self.stored * (2 if both else 1), BLOCK=BLOCK,
        )

    @property
    def sides(self) -> list[Side]:
        return [side for side in (self.of_rows, self.of_cols) if side is not None]

    def run(self, kernel, chunk: Chunk, sums: Tensor, *outputs) -> None:
        """Launches `kernel`; `sums` gets what each of its programs adds up."""
        of_cols = self.of_cols and self.of_cols.state[chunk.cols]
        self.launch.run(
            kernel, chunk, *chunk.matches, self.of_rows.state[chunk.rows], of_cols, self.scalars,
            sums, *outputs, SMOOTHED=self.smoothed, limited=True,
        )

    def sums(self, chunks: list[Chunk], shape: tuple[int, int], ends: bool = True) -> Tensor:
        """Pass 1 on all chunks, which are at most `shape`; sums of target * x of each program.

        `ends`: whether the last chunk of a row or column ends its sums. If the library multiplies,
        the dots of the last chunk stay for pass 2, which begins with it.
        """
        programs = self.launch.programs(chunks)
        targets = self.scale.new_empty(sum(programs))
        self.room = self.launch.room(self.image, shape)
        for i, part in enumerate(targets.split(programs)):
            chunk = self.launch.multiplied(chunks[i], self.room)
            self._add_sums(chunk, part, ends)
            if i + 1 == len(chunks):
                chunks[i] = chunk
        return targets

    def _add_sums(self, chunk: Chunk, targets: Tensor, ends: bool) -> None:
        """Sums of target * x of a chunk into `targets`, those of exponentials into sides."""
        row_parts = self.launch.row_parts(chunk, 2)
        col_parts = None if self.of_cols is None else self.launch.col_parts(chunk, 2)
        self.run(cross_entropy_sums_tile, chunk, targets, row_parts, col_parts)
        rows, cols = len(chunk.image), len(chunk.text)
        blocks = triton.cdiv(rows, BLOCK)
        of_cols, of_col_parts = (None,) * 3, (0, 0)
        if self.of_cols is not None:
            blocks += triton.cdiv(cols, BLOCK)
            of_cols = self.of_cols.at(chunk.cols)
            of_col_parts = col_parts.shape[1], col_parts.stride(1)
        merge_sums[(blocks,)](
            self.scale, self.scalars, *self.of_rows.at(chunk.rows), *of_cols, row_parts, col_parts,
            rows, cols, row_parts.shape[1], of_col_parts[0], row_parts.stride(1), of_col_parts[1],
            int(ends and chunk.cols.stop == len(self.text)),
            int(ends and chunk.rows.stop == len(self.image)), BLOCK=BLOCK, PARTS=PARTS,
        )

    def chunks(
        self, positives: int | None, ids: tuple[Tensor, Tensor] | None, most: tuple[int, int],
        gradients: bool,
    ) -> tuple[list[Chunk], tuple[int, int]]:
        """Chunks of at most so many columns, and gradients of so many bytes; their size.

        Those of pass 2, where `gradients`, may be smaller: unless the library multiplies, pass 1
        stores no logits.
        """
        if gradients or self.launch.by_library:
            most = _contrast_chunks.in_cache(self.image, self.text, *most)
        size = _contrast_chunks.chunk_size(self.image, self.text, self.launch.tile, *most)
        return list(_contrast_chunks.chunks(self.image, self.text, positives, ids, size)), size

    def results(
        self, positives: int | None, ids: tuple[Tensor | None, Tensor | None], both: bool,
        smoothing: float, size: tuple[int, int], needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss and its gradients by both features and the scale, empty where not needed.

        `both`: columns choose among rows, too. `size`: of chunks, as `chunks` takes it.
        """
        numbers = None
        if ids[0] is None or ids[1] is None:
            self.weigh_pairs(positives, both, smoothing)
        else:
            numbers = self.weigh_ids(ids[0], ids[1], both, smoothing)
        chunks, shape = self.chunks(positives, numbers, size, gradients=False)
        targets = self.sums(chunks, shape)
        if not self.launch.by_library:
            chunks, shape = self.chunks(positives, numbers, size, gradients=True)
        loss = self.scale.new_empty(())
        return loss, *self.gradients(chunks, shape, needs, loss, targets)

    def gradients(
        self, chunks: list[Chunk], shape: tuple[int, int], needs: tuple[bool, bool, bool],
        loss: Tensor | None = None, targets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By both features and the scale, once the sums are known; chunks are at most `shape`.

        Fills `loss`, of which `targets` are parts.
        """
        chunks = chunks[::-1]
        programs = self.launch.programs(chunks)
        dz_x = self.scale.new_empty(sum(programs))
        parts = iter(dz_x.split(programs))

        def dz(chunk: Chunk, grad: Tensor) -> None:
            self.run(cross_entropy_gradient_tile, chunk, next(parts), grad, grad.stride(0))

        products = None, None
        if any(needs):
            products = self.launch.products(
                self.image, self.text, chunks, shape, needs[:2], dz, self.room
            )
        gradients = Gradients.of(products, self.depth, self.image)
        d_scale = self.scale.new_empty(() if needs[2] else 0)
        logs = [x for side in self.sides for x in (side.logs, len(side.logs) if chunks else 0)]
        finish_cross_entropy[(gradients.programs,)](
            self.scale, self.scalars, self.unit, *(*logs, None, 0)[:4],
            targets, 0 if targets is None else len(targets), dz_x, len(dz_x),
            loss, d_scale if needs[2] else None, *gradients.arguments, **gradients.constants,
        )
        return *gradients.results, d_scale
