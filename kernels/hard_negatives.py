"""Sampling of hard negatives in Triton: each tile of logits is perturbed and searched twice.

A tile leaves the largest value of each of its rows, and of each of its columns with another noise,
and where they are. These parts are merged chunk by chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels import _common, _contrast_chunks, _contrast_tiles, _philox
from tilewise.kernels._common import Tile
from tilewise.kernels._contrast import (
    SIZES,
    Launch,
    matches,
    part_of_rows,
    tile_of_dots,
    tiles,
)
from tilewise.kernels._contrast_chunks import Chunk
from tilewise.kernels._ids import renumber

# A chunk of the logits is computed by one launch. Its parts are the workspace: 8 bytes for each row
# and for each column of a tile, 32 MiB with tiles of 128 x 128, and a third more to merge them.
# Columns are a multiple of 4, as noise asks for.
CHUNK_ROWS = 16384
CHUNK_COLS = 16384
CHUNK_BYTES = 128 << 20  # workspace where the library multiplies: the dots of a chunk
MERGED, PARTS = 128, 16  # rows or columns that a program merges, and parts at a time

# Two noises need registers. The interpreter pays by the operation, not by the element.
TILES = _contrast_tiles.SMALLER_TILES | {
    ("sm_80", "half"): Tile(128, 128, 32, pieces=8, warps=8, stages=4),
    ("sm_86", "half"): Tile(128, 128, 32, pieces=8, warps=8, stages=3),
    ("sm_89", "half"): Tile(128, 128, 32, pieces=8, warps=8, stages=3),
    ("sm_120", "tf32"): Tile(128, 64, 32, pieces=8, warps=8, stages=3),
    ("gfx90a", "half"): Tile(128, 64, 32, pieces=1, warps=8, stages=2),
    ("interpreter", "half"): Tile(64, 64, 16, pieces=1, warps=1, stages=1, tma=True),
    ("interpreter", "ieee"): Tile(64, 64, 16, pieces=1, warps=1, stages=1),
    ("interpreter", "tf32"): Tile(64, 64, 16, pieces=1, warps=1, stages=1, tma=True),
    ("interpreter", "tf32x3"): Tile(64, 64, 16, pieces=1, warps=1, stages=1),
}


@triton.jit
def search(
    dots, best, row, col, pairs, operands,
    AT: tl.constexpr, EVEN: tl.constexpr, OPTION: tl.constexpr,
):
    """Stores the columns' part and updates the rows': the largest so far, and its column.

    What matches, is outside or is NaN has a logit of -inf: it can't be the largest then.
    """
    WIDTH: tl.constexpr = dots.shape[1]
    scale, seed, first_row, first_col, value_ptr, index_ptr = operands
    i = row + tl.arange(0, dots.shape[0])
    j = col + AT + tl.arange(0, WIDTH)
    z = dots * scale
    keep = (z == z) & ~matches(i, j, pairs, EVEN)
    if not EVEN:
        keep &= (i < pairs[0])[:, None] & (j < pairs[1])[None, :]
    z = tl.where(keep, z, float("-inf"))
    number = i.to(tl.int64) + first_row
    first_col += col + AT
    g = _philox.gumbel_tile(seed, number, first_col, WIDTH, _philox.NEGATIVE_TEXTS)
    largest, at = tl.max(z + g, 1, return_indices=True)  # of equals the first
    value, index = best
    better = largest > value  # and of equal pieces
    best = tl.where(better, largest, value), tl.where(better, col + AT + at, index)
    g = _philox.gumbel_tile(seed, number, first_col, WIDTH, _philox.NEGATIVE_IMAGES)
    largest, at = tl.max(z + g, 0, return_indices=True)
    tl.store(value_ptr + AT + tl.arange(0, WIDTH), largest)
    tl.store(index_ptr + AT + tl.arange(0, WIDTH), row + at)
    return best


@triton.jit(do_not_specialize=[*SIZES, "first_row", "first_col", "row_offset"])
def negatives_tile(
    image_ptr, text_ptr, rows, cols, depth, image_stride, text_stride,  # see `tile_of_dots`
    offset, image_ids_ptr, text_ids_ptr,  # see `matches`
    scale_ptr,  # one float32
    seed_ptr,  # one int64
    first_row: tl.int64, first_col: tl.int64, row_offset: tl.int64,  # in the random stream
    row_value_ptr, row_index_ptr,  # (tiles in a row, rows rounded up to whole tiles): parts
    col_value_ptr, col_index_ptr,  # (tiles in a column, cols rounded up)
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):
    """The largest perturbed logit of a tile's rows and of its columns, values and indices."""
    row, col, dots = tile_of_dots(
        image_ptr, text_ptr, rows, cols, depth, image_stride, text_stride,
        TILE_M, TILE_N, TILE_K, PRECISION, EVEN, TMA,
    )
    at = row // TILE_M * (tl.cdiv(cols, TILE_N).to(tl.int64) * TILE_N) + col
    best = tl.full((TILE_M,), float("-inf"), tl.float32), tl.zeros((TILE_M,), tl.int32)
    value, index = tiles(
        search, dots, best, row, col, (rows, cols, offset, image_ids_ptr, text_ids_ptr),
        (
            tl.load(scale_ptr), tl.load(seed_ptr), first_row + row_offset, first_col,
            col_value_ptr + at, col_index_ptr + at,
        ),
        0, EVEN, None, PIECES,
    )
    at = part_of_rows(row, col, rows, TILE_M, TILE_N)
    tl.store(row_value_ptr + at, value)
    tl.store(row_index_ptr + at, index)


@triton.jit
def merge(
    block, value_ptr, index_ptr, best_ptr, at_ptr, size, padded, parts, first,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):
    """The largest of each column of parts, and of the best so far; of equals the first.

    value_ptr, index_ptr (parts, padded): indices count from `first`, and where that is 0 nothing
    was before. best_ptr, at_ptr (size,): -1 where all are -inf.
    """
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    best = tl.load(best_ptr + i, mask=inside & (first > 0), other=float("-inf"))
    at = tl.load(at_ptr + i, mask=inside & (first > 0), other=-1)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        keep = (part < parts) & inside[None, :]
        place = part.to(tl.int64) * padded + i[None, :]
        value = tl.load(value_ptr + place, mask=keep, other=float("-inf"))
        index = tl.load(index_ptr + place, mask=keep, other=0)
        largest = tl.max(value, 0)
        lowest = tl.min(tl.where(value == largest[None, :], index, 2**31 - 1), 0)
        better = largest > best
        best = tl.where(better, largest, best)
        at = tl.where(better, lowest.to(tl.int64) + first, at)
    tl.store(best_ptr + i, best, mask=inside)
    tl.store(at_ptr + i, at, mask=inside)


@triton.jit(do_not_specialize=[
    "rows", "cols", "row_parts", "col_parts", "padded_rows", "padded_cols", "first_row", "first_col"
])
def merge_negatives(
    row_value_ptr, row_index_ptr, col_value_ptr, col_index_ptr,  # what negatives_tile stores
    row_best_ptr, row_at_ptr, col_best_ptr, col_at_ptr,  # (rows,), (cols,) of the chunk, so far
    rows, cols, row_parts, col_parts, padded_rows, padded_cols,
    first_row, first_col,  # of the chunk
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):
    """Merges the parts of a chunk with what those before it left: chunks come in order."""
    block = tl.program_id(0)
    blocks = tl.cdiv(rows, BLOCK)
    if block < blocks:
        merge(
            block, row_value_ptr, row_index_ptr, row_best_ptr, row_at_ptr, rows, padded_rows,
            row_parts, first_col, BLOCK, PARTS,
        )
    else:
        merge(
            block - blocks, col_value_ptr, col_index_ptr, col_best_ptr, col_at_ptr, cols,
            padded_cols, col_parts, first_row, BLOCK, PARTS,
        )


class Side:
    """The images or the texts: the best of the others so far for each."""

    def __init__(self, size: int, others: int, device: torch.device):
        self.value = torch.empty(size, dtype=torch.float32, device=device)
        self.index = torch.empty(size, dtype=torch.int64, device=device)
        if not others:
            self.index.fill_(-1)


class HardNegatives:
    """One call's operands, and the launches on a chunk of them."""

    def __init__(self, image_features, text_features, scale, seed, row_offset):
        self.launch = Launch.of(image_features, len(image_features), len(text_features), TILES)
        self.image = self.launch.operand(image_features)
        self.text = self.launch.operand(text_features)
        self.scale, self.seed, self.row_offset = scale, seed, row_offset
        self.images = Side(len(self.image), len(self.text), self.image.device)
        self.texts = Side(len(self.text), len(self.image), self.image.device)

    def chunk_size(self) -> tuple[int, int]:
        """Rows and columns of a chunk: fewer where its dots are stored."""
        if not self.launch.by_library:
            return CHUNK_ROWS, CHUNK_COLS
        return _contrast_chunks.chunk_size(
            self.image, self.text, self.launch.tile, CHUNK_COLS, CHUNK_BYTES
        )

    def run(self, chunk: Chunk) -> None:
        """Searches a chunk and merges what is found there."""
        dtypes = torch.float32, torch.int32
        row_parts = [self.launch.row_parts(chunk, dtype=dtype) for dtype in dtypes]
        col_parts = [self.launch.col_parts(chunk, dtype=dtype) for dtype in dtypes]
        self.launch.run(
            negatives_tile, chunk, *chunk.matches, self.scale, self.seed,
            chunk.rows.start, chunk.cols.start, self.row_offset, *row_parts, *col_parts,
            limited=True,
        )
        rows, cols = len(chunk.image), len(chunk.text)
        merge_negatives[(triton.cdiv(rows, MERGED) + triton.cdiv(cols, MERGED),)](
            *row_parts, *col_parts,
            self.images.value[chunk.rows], self.images.index[chunk.rows],
            self.texts.value[chunk.cols], self.texts.index[chunk.cols],
            rows, cols, len(row_parts[0]), len(col_parts[0]),
            row_parts[0].stride(0), col_parts[0].stride(0), chunk.rows.start, chunk.cols.start,
            BLOCK=MERGED, PARTS=PARTS,
        )


def hard_negatives(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    positives: int | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    seed: Tensor,
    row_offset: int,
) -> tuple[Tensor, Tensor]:
    """A text for each image and an image for each text, drawn by similarity without a host sync.

        text_index_i = argmax_j (scale * <image_i, text_j> + g_ij)    over pairs that don't match
        image_index_j = argmax_i (scale * <image_i, text_j> + h_ij)

    Args:
        image_features: (B, D), float16, bfloat16 or float32, any strides.
        text_features: (N, D), the same.
        logit_scale: one float32.
        positives: image i matches text i + positives, if there is one.
        image_ids, text_ids: int64 (B,) and (N,): those match where these are equal instead.
        seed: one int64 on the device.
        row_offset: the number of the first image in the random stream.

    Returns:
        text_index (B,), image_index (N,), int64; -1 where nothing is above -inf. The same on every
        run.

    Cost: a matrix product of B*N*D, memory O((B + N) * D) plus the parts of one chunk, and
    CHUNK_BYTES where the library multiplies.
    """
    with _common.launching(image_features=image_features):
        ids = None if image_ids is None else renumber(image_ids, text_ids)
        negatives = HardNegatives(image_features, text_features, logit_scale, seed, row_offset)
        size = negatives.chunk_size()
        room = negatives.launch.room(negatives.image, size)
        for chunk in _contrast_chunks.chunks(negatives.image, negatives.text, positives, ids, size):
            negatives.run(negatives.launch.multiplied(chunk, room))
        return negatives.images.index, negatives.texts.index
