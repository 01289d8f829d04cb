"""What the losses over all image-text pairs share: tiles of dots, sums of exponentials, chunks."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels import _common
from tilewise.kernels._common import Tile

# By architecture and kind of product. Two programs or more fit on one SM, without spills:
# static_gate.csv has the figures.
TILES = {
    ("sm_80", "half"): Tile(128, 128, 32, pieces=4, warps=8, stages=4),
    ("sm_90", "half"): Tile(128, 128, 64, pieces=8, warps=8, stages=3, tma=True),
    ("sm_100", "half"): Tile(128, 128, 64, pieces=4, warps=8, stages=3, tma=True),
    ("sm_120", "half"): Tile(64, 128, 64, pieces=4, warps=8, stages=3, tma=True),
    ("gfx942", "half"): Tile(128, 128, 32, pieces=1, warps=8, stages=2),
    ("gfx90a", "half"): Tile(128, 128, 32, pieces=1, warps=8, stages=2),
    ("sm_90", "tf32"): Tile(128, 128, 32, pieces=8, warps=8, stages=3, tma=True),
    ("sm_100", "tf32"): Tile(128, 128, 32, pieces=4, warps=8, stages=3, tma=True),
    ("sm_100", "tf32x3"): Tile(64, 64, 16, pieces=1, warps=4, stages=3),
    ("interpreter", "half"): Tile(32, 32, 16, pieces=2, warps=1, stages=1, tma=True),
    ("interpreter", "ieee"): Tile(32, 32, 16, pieces=2, warps=1, stages=1),
    ("interpreter", "tf32"): Tile(32, 32, 16, pieces=2, warps=1, stages=1, tma=True),
    ("interpreter", "tf32x3"): Tile(32, 32, 16, pieces=2, warps=1, stages=1),
}
DEFAULT_TILES = {
    "half": Tile(128, 128, 32, pieces=4, warps=8, stages=3),
    "tf32": Tile(128, 64, 32, pieces=2, warps=8, stages=3),
    "tf32x3": Tile(128, 64, 16, pieces=2, warps=8, stages=3),
    "ieee": Tile(64, 64, 32, pieces=1, warps=4, stages=2),
}

# x of what is outside, and where maxima begin. Not -inf, because -inf - -inf is NaN.
LOWEST = tl.constexpr(-1e35)
SMALLEST_RATE = 1e-30  # (LOWEST - x) * rate must be far below 0 for a logit_scale of 0 too


@triton.jit
def sum_per_thread(x, THREADS: tl.constexpr):
    """(THREADS,) sums of the elements that each thread holds: nothing moves between threads."""
    return tl.sum(tl.reshape(x, (THREADS, x.numel // THREADS), can_reorder=True), 1)


@triton.jit
def tile_corner(rows, cols, TILE_M: tl.constexpr, TILE_N: tl.constexpr, GROUP: tl.constexpr):
    """The first row and column of this program's tile."""
    # GROUP rows of tiles are walked column by column: what runs together shares features in L2.
    program = tl.program_id(0)
    in_group = GROUP * tl.cdiv(cols, TILE_N)
    first = program // in_group * GROUP
    group = min(tl.cdiv(rows, TILE_M) - first, GROUP)
    row = (first + program % in_group % group) * TILE_M
    col = program % in_group // group * TILE_N
    return row, col


@triton.jit
def tile_of_dots(
    image_ptr, text_ptr, row, col, rows, cols, depth, image_stride, text_stride,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, TMA: tl.constexpr,
):
    """(TILE_M, TILE_N) float32: <image_i, text_j>. `depth` is a multiple of TILE_K.

    With EVEN, rows and cols are of theirs. Rows and columns outside are 0 with TMA, else they
    repeat the last one: no load has a mask.
    """
    dots = tl.zeros((TILE_M, TILE_N), tl.float32)
    if TMA:
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
            dots = tl.dot(
                tl.load(image_ptr), tl.load(text_ptr).T, dots, input_precision=PRECISION
            )
            image_ptr += TILE_K
            text_ptr += TILE_K
    return dots


@triton.jit
def add_exponentials(x, largest, total, rate):
    """Adds the columns of x (rows, cols) to the largest x and the sum of exponentials (rows,)."""
    higher = tl.maximum(largest, tl.max(x, 1))
    total *= tl.exp2((largest - higher) * rate)
    total += tl.sum(tl.exp2((x - higher[:, None]) * rate), 1)
    return higher, total


def sign_and_rate(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of x = sign * dot, for which exp(scale * dot) is exp2(rate * x)."""
    rate = (scale.abs() * math.log2(math.e)).clamp(min=SMALLEST_RATE)
    return torch.ones_like(scale).copysign(scale), rate


def merge_exponentials(state: Tensor, parts: Tensor, rate: Tensor) -> None:
    """Merges (2, n, size) largest x and sums of exponentials of n parts into those of (2, size)."""
    largest = torch.maximum(state[0], parts[0].amax(0))
    state[1] *= torch.exp2((state[0] - largest) * rate)
    state[1] += (parts[1] * torch.exp2((parts[0] - largest) * rate)).sum(0)
    state[0] = largest


def register_limit(arch: str, tile: Tile) -> dict[str, int]:
    """A launch's option for two programs on one SM: left alone, ptxas takes more than it needs."""
    return {"maxnreg": 128} if arch.startswith("sm_") and tile.warps == 8 else {}


def number(image_ids: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same equalities in int32 numbers from 0, which take half the registers."""
    ids, order = torch.cat([image_ids, text_ids]).sort()
    changes = torch.zeros_like(ids, dtype=torch.int32)
    changes[1:] = ids[1:] != ids[:-1]
    numbers = torch.empty_like(changes)
    numbers[order] = changes.cumsum(0, dtype=torch.int32)
    return numbers[: len(image_ids)], numbers[len(image_ids) :]


class Chunk(NamedTuple):
    """A part of the logits that is computed by one launch."""

    rows: slice
    cols: slice
    image: Tensor  # of these rows
    text: Tensor  # of these columns
    diagonal: int  # row i of the chunk matches column i + diagonal of it
    ids: tuple[Tensor, Tensor] | None  # of these rows and columns: equal ones match instead


def chunk_size(image: Tensor, text: Tensor, tile: Tile, cols: int, size: int) -> tuple[int, int]:
    """Rows and columns of a chunk of at most `cols` columns whose gradients take `size` bytes.

    Both axes are cut, so that neither makes the workspace grow.
    """
    chunk_cols = min(cols, max(len(text), 1))
    width = _common.round_up(chunk_cols, tile.cols)
    chunk_rows = max(size // (width * image.element_size() * tile.rows), 1) * tile.rows
    return min(chunk_rows, max(len(image), 1)), chunk_cols


def chunks(
    image: Tensor, text: Tensor, positives: int | None, ids: tuple[Tensor, Tensor] | None,
    size: tuple[int, int],
) -> Iterator[Chunk]:
    """All chunks; those of the same columns follow one another."""
    for c in range(0, len(text), size[1]):
        y = text[c : c + size[1]]
        for r in range(0, len(image), size[0]):
            x = image[r : r + size[0]]
            # From len(y) on there is no match.
            diagonal = len(y) if positives is None else r + positives - c
            diagonal = min(max(diagonal, -len(x)), len(y))
            rows, cols = slice(r, r + len(x)), slice(c, c + len(y))
            here = ids and (ids[0][rows], ids[1][cols])
            yield Chunk(rows, cols, x, y, diagonal, here)
