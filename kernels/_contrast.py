"""What the losses over all image-text pairs share: one engine, with an epilogue for tiles of dots.

A kernel computes a tile by `tile_of_dots` and hands it to `tiles`, which calls the kernel's
epilogue for a piece of its columns at a time. `Launch` runs it on one of the `chunks` of logits.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels import _common
from tilewise.kernels._common import Tile, Tiles
from tilewise.kernels._contrast_chunks import Chunk
from tilewise.kernels._contrast_tiles import tiles_for

# Of a kernel's arguments, those that are not specialised on: every batch runs the same binary.
SIZES = ["rows", "cols", "offset"]

# x of what is outside, and where maxima begin. Not -inf, because -inf - -inf is NaN.
LOWEST = tl.constexpr(-1e35)
# (LOWEST - x) * rate must be far below 0 for a logit_scale of 0 too.
SMALLEST_RATE = tl.constexpr(1e-30)


@triton.jit
def tile_corner(rows, cols, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    """The first row and column of this program's tile."""
    # GROUP rows of tiles are walked column by column: what runs together shares features in L2.
    GROUP: tl.constexpr = 8
    program = tl.program_id(0)
    in_group = GROUP * tl.cdiv(cols, TILE_N)
    first = program // in_group * GROUP
    group = min(tl.cdiv(rows, TILE_M) - first, GROUP)
    row = (first + program % in_group % group) * TILE_M
    col = program % in_group // group * TILE_N
    return row, col


@triton.jit
def as_multiplied(x, PRECISION: tl.constexpr):
    """x as matrix units should read it: they cut float32 to tf32 instead of rounding."""
    if PRECISION == "tf32":
        rounded = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(tl.abs(x) < float("inf"), rounded.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def tile_of_dots(
    image_ptr, text_ptr, rows, cols, depth, image_stride, text_stride,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, TMA: tl.constexpr,
):
    """The first row and column of this program's tile, (TILE_M, TILE_N) float32 <image_i, text_j>.

    `image_ptr` (rows, depth) and `text_ptr` (cols, depth) have rows of unit stride, or are
    descriptors if TMA; `depth` is a multiple of TILE_K, and with EVEN rows and cols are of theirs.
    Rows and columns outside are 0 with TMA, else they repeat the last one: no load has a mask.
    Without a `text_ptr`, `image_ptr` (rows, cols) has the dots; those outside are 0.
    """
    row, col = tile_corner(rows, cols, TILE_M, TILE_N)
    dots = tl.zeros((TILE_M, TILE_N), tl.float32)
    if text_ptr is None:
        i = row + tl.arange(0, TILE_M)
        j = col + tl.arange(0, TILE_N)
        image_ptr += i[:, None].to(tl.int64) * image_stride + j[None, :]
        if EVEN:
            dots = tl.load(image_ptr)
        else:
            dots = tl.load(image_ptr, mask=(i < rows)[:, None] & (j < cols)[None, :], other=0.0)
    elif TMA:
        for k in range(0, depth, TILE_K):
            image = image_ptr.load([row, k])
            text = text_ptr.load([col, k])
            dots = tl.dot(image, text.T, dots, input_precision=PRECISION)
    else:
        i = row + tl.arange(0, TILE_M)
        j = col + tl.arange(0, TILE_N)
        k = tl.arange(0, TILE_K)
        image_row = i if EVEN else tl.minimum(i, rows - 1)
        text_row = j if EVEN else tl.minimum(j, cols - 1)
        image_ptr += image_row[:, None].to(tl.int64) * image_stride + k[None, :]
        text_ptr += text_row[:, None].to(tl.int64) * text_stride + k[None, :]
        for _ in range(0, depth, TILE_K):
            image = as_multiplied(tl.load(image_ptr), PRECISION)
            text = as_multiplied(tl.load(text_ptr), PRECISION)
            dots = tl.dot(image, text.T, dots, input_precision=PRECISION)
            image_ptr += TILE_K
            text_ptr += TILE_K
    return row, col, dots


@triton.jit
def tiles(
    EPILOGUE: tl.constexpr,  # takes what follows, but for PIECES, and returns the new state
    dots,  # (TILE_M, WIDTH) float32
    state,  # what the epilogue adds up
    row, col,  # of the tile's first element
    pairs,  # rows, cols and what `matches` takes
    operands,  # the epilogue's own
    AT: tl.constexpr,  # the column of the tile that `dots` begin with
    EVEN: tl.constexpr,
    OPTION: tl.constexpr,  # the epilogue's own
    PIECES: tl.constexpr,
):
    """Gives `dots` to EPILOGUE, a piece of columns at a time from left to right."""
    if PIECES > 1:
        HALF: tl.constexpr = dots.shape[1] // 2
        left, right = tl.split(dots.reshape(dots.shape[0], 2, HALF).permute(0, 2, 1))
        state = tiles(
            EPILOGUE, left, state, row, col, pairs, operands, AT, EVEN, OPTION, PIECES // 2
        )
        state = tiles(
            EPILOGUE, right, state, row, col, pairs, operands, AT + HALF, EVEN, OPTION, PIECES // 2
        )
    elif col + AT < pairs[1]:  # a branch also keeps the compiler from mixing pieces, and so from
        state = EPILOGUE(dots, state, row, col, pairs, operands, AT, EVEN, OPTION)  # spilling
    return state


@triton.jit
def matches(i, j, pairs, EVEN: tl.constexpr):
    """(len(i), len(j)): whether image i matches text j. Nothing outside does.

    With ids, (rows,) and (cols,) int32 >= 0, equal ones match, else image i and text i + offset.
    """
    rows, cols, offset, image_ids_ptr, text_ids_ptr = pairs
    if image_ids_ptr is None:
        image_id = i + offset
        text_id = j
    else:
        image_id = tl.load(image_ids_ptr + i, mask=i < rows, other=-1)
        text_id = tl.load(text_ids_ptr + j, mask=j < cols, other=-2)
    if not EVEN:
        image_id = tl.where(i < rows, image_id, -1)
        text_id = tl.where(j < cols, text_id, -(2**31))
    return image_id[:, None] == text_id[None, :]


@triton.jit
def sum_per_thread(x, THREADS: tl.constexpr):
    """(THREADS,) sums of the elements that each thread holds: nothing moves between threads."""
    return tl.sum(tl.reshape(x, (THREADS, x.numel // THREADS), can_reorder=True), 1)


@triton.jit
def add_exponentials(x, largest, total, rate):
    """Adds the columns of x (rows, cols) to the largest x and the sum of exponentials (rows,)."""
    higher = tl.maximum(largest, tl.max(x, 1))
    total *= tl.exp2((largest - higher) * rate)
    total += tl.sum(tl.exp2((x - higher[:, None]) * rate), 1)
    return higher, total


@triton.jit
def part_of_rows(row, col, rows, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    """(TILE_M,): where this tile's rows are in `Launch.row_parts`."""
    padded_rows = tl.cdiv(rows, TILE_M).to(tl.int64) * TILE_M
    return col // TILE_N * padded_rows + row + tl.arange(0, TILE_M)


def sign_and_rate(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of x = sign * dot, for which exp(scale * dot) is exp2(rate * x)."""
    rate = (scale.abs() * math.log2(math.e)).clamp(min=SMALLEST_RATE.value)
    return torch.ones_like(scale).copysign(scale), rate


@triton.jit
def of_scale(scale):
    """The same, of a number."""
    rate = tl.abs(scale) * 1.4426950408889634
    return tl.where(scale < 0, -1.0, 1.0), tl.where(rate < SMALLEST_RATE, SMALLEST_RATE, rate)


@triton.jit
def with_parts(largest, total, parts_ptr, i, inside, padded, parts, rate, PARTS: tl.constexpr):
    """Merges `parts` parts, from the first to the last, with the largest x and sums of rows i.

    parts_ptr: (2, parts, padded) float32, largest x and sums of exponentials; PARTS at a time.
    """
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        keep = (part < parts) & inside[None, :]
        at = part.to(tl.int64) * padded + i[None, :]
        x = tl.load(parts_ptr + at, mask=keep, other=LOWEST)
        sums = tl.load(parts_ptr + at + padded.to(tl.int64) * parts, mask=keep, other=0.0)
        higher = tl.maximum(largest, tl.max(x, 0))
        total *= tl.exp2((largest - higher) * rate)
        total += tl.sum(sums * tl.exp2((x - higher[None, :]) * rate), 0)
        largest = higher
    return largest, total


class Launch(NamedTuple):
    """How one call's kernels multiply features."""

    arch: str
    kind: str  # of product
    tiles: Tiles
    tile: Tile  # one of them

    @classmethod
    def of(
        cls, features: Tensor, rows: int, cols: int, large: dict[tuple[str, str], Tile]
    ) -> "Launch":
        """For logits (rows, cols) of these features."""
        arch = _common.architecture(features.device)
        kind = _common.product_kind(features.dtype, arch)
        sizes = tiles_for(large, arch, kind)
        tile = sizes.choose(rows, cols, _common.processors(features.device, arch))
        return cls(arch, kind, sizes, tile)

    @property
    def threads(self) -> int:
        return self.tile.warps * _common.warp_size(self.arch)

    def operand(self, features: Tensor) -> Tensor:
        """`features` as kernels read them, D rounded up to a multiple of the tile's depth."""
        return _common.operand(features, self.tile.depth)

    def grid(self, chunk: Chunk) -> tuple[int, int]:
        """Tiles in a column and in a row."""
        return (
            triton.cdiv(len(chunk.image), self.tile.rows),
            triton.cdiv(len(chunk.text), self.tile.cols),
        )

    def row_parts(self, chunk: Chunk, *before: int, dtype=torch.float32) -> Tensor:
        """(*before, tiles in a row, rows) of uninitialised memory with room for whole tiles."""
        high, wide = self.grid(chunk)
        new = chunk.image.new_empty(*before, wide, high * self.tile.rows, dtype=dtype)
        return new[..., : len(chunk.image)]

    def col_parts(self, chunk: Chunk, *before: int, dtype=torch.float32) -> Tensor:
        """(*before, tiles in a column, cols), the same."""
        high, wide = self.grid(chunk)
        new = chunk.image.new_empty(*before, high, wide * self.tile.cols, dtype=dtype)
        return new[..., : len(chunk.text)]

    def workspace(self, image: Tensor, size: tuple[int, int], *before: int) -> Tensor:
        """(*before, rows, cols) of features' dtype for a chunk of any `size` up to this."""
        rows, cols = (_common.round_up(n, self.tile[axis]) for axis, n in enumerate(size))
        return image.new_empty(*before, rows, cols)

    def programs(self, chunks: Iterable[Chunk]) -> list[int]:
        """How many there are for each chunk."""
        return [math.prod(self.grid(chunk)) for chunk in chunks]

    @property
    def by_library(self) -> bool:
        """Whether the library multiplies and kernels read the dots: without matrix units.

        There Triton's product waits for shared memory: tests/triton_tools/product_loops.py counts.
        """
        return self.kind == "ieee" and not self.arch.startswith("gfx")

    def room(self, image: Tensor, size: tuple[int, int]) -> Tensor | None:
        """A workspace for the dots of one chunk, where the library multiplies."""
        return self.workspace(image, size) if self.by_library else None

    def multiplied(self, chunk: Chunk, room: Tensor | None) -> Chunk:
        """The chunk, with its dots in `room` if the library multiplies and hasn't done so.

        Gradients may be stored over them: each element is loaded once, by one program, and what is
        stored over it is made of it.
        """
        if not self.by_library or chunk.dots is not None:
            return chunk
        assert room is not None
        dots = room[: len(chunk.image), : len(chunk.text)]
        _common.add_product(dots, chunk.image, chunk.text.t(), accumulate=False)
        return chunk._replace(dots=dots)

    def _of_tile(self, chunk: Chunk) -> tuple:
        """What `tile_of_dots` takes, but for constants."""
        image, text, dots = chunk.image, chunk.text, chunk.dots
        if dots is not None:
            return dots, None, len(image), len(text), 0, dots.stride(0), 0
        return (
            _common.source(image, self.tile.rows, self.tile, self.kind),
            _common.source(text, self.tile.cols, self.tile, self.kind),
            len(image), len(text), image.shape[1], image.stride(0), text.stride(0),
        )

    def run(self, kernel, chunk: Chunk, *operands, limited: bool = False, **constants) -> None:
        """Launches `kernel` on a chunk, one program a tile.

        `limited`: for two programs on one SM, where ptxas takes more registers than it needs.
        """
        rows, cols = len(chunk.image), len(chunk.text)
        fills = rows % self.tile.rows == 0 and cols % self.tile.cols == 0
        even = fills and self.tile is self.tiles.large
        arguments, options = self._arguments(kernel, chunk, operands, limited)
        kernel[(math.prod(self.grid(chunk)),)](*arguments, EVEN=even, **constants, **options)
        if self.arch == "interpreter":
            return
        given = tuple(x is None for x in operands)
        strides = arguments[4:7] if chunk.dots is None else chunk.dots.stride(0) % 16
        like = (
            chunk.image.device, chunk.image.dtype, self, even, strides, given, *constants.values(),
        )
        if not _common.is_new(kernel, like):
            return
        smaller = dict.fromkeys(self.tiles[self.tiles.index(self.tile) :])
        for tile in smaller if even else list(smaller)[1:]:
            launch = self._replace(tile=tile)
            arguments, options = launch._arguments(kernel, chunk, operands, limited)
            kernel.warmup(*arguments, grid=(1,), EVEN=False, **constants, **options)

    def _arguments(self, kernel, chunk: Chunk, operands, limited: bool) -> tuple[tuple, dict]:
        """What a kernel gets, but for EVEN: arguments, and what is constant by the tile."""
        tile, kind = self.tile, self.kind
        arguments = *self._of_tile(chunk), *operands
        options = dict(
            TILE_M=tile.rows, TILE_N=tile.cols, TILE_K=tile.depth, PIECES=tile.pieces,
            PRECISION="ieee" if kind == "half" else kind, TMA=tile.tma, num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if "THREADS" in kernel.arg_names:
            options["THREADS"] = self.threads
        if limited and self.arch.startswith("sm_") and tile.warps == 8:
            options["maxnreg"] = 128
        return arguments, options

    def products(
        self, image: Tensor, text: Tensor, chunks: Iterable[Chunk], size: tuple[int, int],
        needs: tuple[bool, bool], dz: Callable[[Chunk, Tensor], None],
        workspace: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """dz @ text and dz^T @ image, float32; None if not needed.

        dz(chunk, out) fills d(loss)/d(logit) of a chunk of at most `size` into `out`, a part of
        the workspace; if the chunk has dots, they stand there.
        """
        new = image.new_empty if len(image) and len(text) else image.new_zeros
        d_image, d_text = (
            new(x.shape, dtype=torch.float32) if needed else None
            for x, needed in zip((image, text), needs, strict=True)
        )
        if workspace is None:
            workspace = self.workspace(image, size)
        begun: set[tuple[str, int]] = set()
        for chunk in chunks:
            grad = workspace[: len(chunk.image), : len(chunk.text)]
            dz(self.multiplied(chunk, workspace), grad)
            if d_image is not None:
                at = "rows", chunk.rows.start
                _common.add_product(d_image[chunk.rows], grad, chunk.text, accumulate=at in begun)
                begun.add(at)
            if d_text is not None:
                at = "cols", chunk.cols.start
                _common.add_product(
                    d_text[chunk.cols], grad.t(), chunk.image, accumulate=at in begun
                )
                begun.add(at)
        return d_image, d_text
