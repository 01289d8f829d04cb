"""Sampling of hard negatives in Triton: each tile of logits is perturbed and searched twice.

A tile leaves the largest value of each of its rows, and of each of its columns with another noise,
and where they are. These parts are merged in torch, chunk by chunk.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels import _common, _contrast, _philox
from tilewise.kernels._common import Tile
from tilewise.kernels._contrast import tile_corner, tile_of_dots

# A chunk of the logits is computed by one launch. Its parts are the workspace: 8 bytes for each row
# and for each column of a tile, 32 MiB with tiles of 128 x 128, and a third more to merge them.
# Columns are a multiple of 4, as noise asks for.
CHUNK_ROWS = 16384
CHUNK_COLS = 16384

# Smaller, or in more pieces, where two noises need more registers than sigmoid_loss does. The
# interpreter pays by the operation, not by the element.
TILES = _contrast.TILES | {
    ("sm_80", "half"): Tile(128, 128, 32, pieces=8, warps=8, stages=4),
    ("sm_86", "half"): Tile(128, 128, 32, pieces=8, warps=8, stages=3),
    ("sm_89", "half"): Tile(128, 128, 32, pieces=8, warps=8, stages=3),
    ("sm_100", "half"): Tile(128, 128, 64, pieces=8, warps=8, stages=3, tma=True),
    ("sm_100", "tf32"): Tile(128, 128, 32, pieces=8, warps=8, stages=3, tma=True),
    ("gfx942", "half"): Tile(128, 64, 32, pieces=1, warps=8, stages=2),
    ("gfx90a", "half"): Tile(128, 64, 32, pieces=1, warps=8, stages=2),
    ("interpreter", "half"): Tile(64, 64, 16, pieces=1, warps=1, stages=1, tma=True),
    ("interpreter", "ieee"): Tile(64, 64, 16, pieces=1, warps=1, stages=1),
    ("interpreter", "tf32"): Tile(64, 64, 16, pieces=1, warps=1, stages=1, tma=True),
    ("interpreter", "tf32x3"): Tile(64, 64, 16, pieces=1, warps=1, stages=1),
}


@triton.jit
def logits_of_negatives(dots, i, j, pairs, EVEN: tl.constexpr, IDS: tl.constexpr):
    """The logits; -inf for what matches, is outside or is NaN, which can't be the largest then."""
    rows, cols, scale, diagonal, image_ids_ptr, text_ids_ptr = pairs
    if IDS:
        match = tl.load(image_ids_ptr + i, mask=i < rows, other=-1)
        label = tl.load(text_ids_ptr + j, mask=j < cols, other=-2)
    else:
        match = i + diagonal
        label = j
    z = dots * scale
    keep = (match[:, None] != label[None, :]) & (z == z)
    if not EVEN:
        keep &= (i < rows)[:, None] & (j < cols)[None, :]
    return tl.where(keep, z, float("-inf"))


@triton.jit
def search(
    dots,  # (TILE_M, WIDTH) float32
    best,  # (TILE_M,) each: the largest of the columns before, and its column
    value_ptr, index_ptr,  # where the largest of the first column goes, and its row
    row, col,  # of the first element of `dots`
    pairs, noise,
    EVEN: tl.constexpr, IDS: tl.constexpr, PIECES: tl.constexpr,
):
    """Stores the columns' part and updates the rows', a piece of columns at a time."""
    TILE_M: tl.constexpr = dots.shape[0]
    WIDTH: tl.constexpr = dots.shape[1]
    if PIECES > 1:
        HALF: tl.constexpr = WIDTH // 2
        left, right = tl.split(dots.reshape(TILE_M, 2, HALF).permute(0, 2, 1))
        best = search(
            left, best, value_ptr, index_ptr, row, col, pairs, noise, EVEN, IDS, PIECES // 2
        )
        best = search(
            right, best, value_ptr + HALF, index_ptr + HALF, row, col + HALF, pairs, noise,
            EVEN, IDS, PIECES // 2,
        )
    elif col < pairs[1]:  # a branch also keeps the compiler from mixing pieces
        i = row + tl.arange(0, TILE_M)
        j = col + tl.arange(0, WIDTH)
        z = logits_of_negatives(dots, i, j, pairs, EVEN, IDS)
        seed, first_row, first_col = noise
        number = i.to(tl.int64) + first_row
        first_col += col
        g = _philox.gumbel_tile(seed, number, first_col, WIDTH, _philox.NEGATIVE_TEXTS)
        largest, at = tl.max(z + g, 1, return_indices=True)  # of equals the first
        value, index = best
        better = largest > value  # and of equal pieces
        best = (tl.where(better, largest, value), tl.where(better, col + at, index))
        g = _philox.gumbel_tile(seed, number, first_col, WIDTH, _philox.NEGATIVE_IMAGES)
        largest, at = tl.max(z + g, 0, return_indices=True)
        tl.store(value_ptr + tl.arange(0, WIDTH), largest)
        tl.store(index_ptr + tl.arange(0, WIDTH), row + at)
    return best


# Sizes are not specialised on: every batch runs the same binary.
@triton.jit(do_not_specialize=["rows", "cols", "diagonal", "first_row", "first_col", "row_offset"])
def negatives_tile(
    image_ptr,  # (rows, depth), unit stride in a row; if TMA, a descriptor of it
    text_ptr,  # (cols, depth), the same
    scale_ptr,  # one float32
    seed_ptr,  # one int64
    row_value_ptr, row_index_ptr,  # (tiles in a row, rows rounded up to whole tiles): parts
    col_value_ptr, col_index_ptr,  # (tiles in a column, cols rounded up)
    rows, cols, depth, image_stride, text_stride,
    diagonal,  # row i matches column i + diagonal
    image_ids_ptr, text_ids_ptr,  # (rows,), (cols,) int32 >= 0: if IDS, equal ones match instead
    first_row: tl.int64, first_col: tl.int64, row_offset: tl.int64,  # in the random stream
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PIECES: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    IDS: tl.constexpr,
):
    """The largest perturbed logit of a tile's rows and of its columns, values and indices."""
    row, col = tile_corner(rows, cols, TILE_M, TILE_N, GROUP)
    dots = tile_of_dots(
        image_ptr, text_ptr, row, col, rows, cols, depth, image_stride, text_stride,
        TILE_M, TILE_N, TILE_K, PRECISION, EVEN, TMA,
    )
    pairs = (rows, cols, tl.load(scale_ptr), diagonal, image_ids_ptr, text_ids_ptr)
    noise = (tl.load(seed_ptr), first_row + row_offset, first_col)
    best = (tl.full((TILE_M,), float("-inf"), tl.float32), tl.zeros((TILE_M,), tl.int32))
    at = row // TILE_M * (tl.cdiv(cols, TILE_N).to(tl.int64) * TILE_N) + col
    value, index = search(
        dots, best, col_value_ptr + at, col_index_ptr + at, row, col, pairs, noise,
        EVEN, IDS, PIECES,
    )
    at = col // TILE_N * (tl.cdiv(rows, TILE_M).to(tl.int64) * TILE_M) + row
    at += tl.arange(0, TILE_M)
    tl.store(row_value_ptr + at, value)
    tl.store(row_index_ptr + at, index)


class Side:
    """The images or the texts: the best of the others so far for each."""

    def __init__(self, size: int, device: torch.device):
        self.value = torch.full((size,), -torch.inf, device=device)
        self.index = torch.full((size,), -1, dtype=torch.int64, device=device)

    def add(self, at: slice, value: Tensor, index: Tensor, first: int) -> None:
        """Merges (n, at) parts, whose indices count from `first`. Chunks come in order.

        The lowest index of equal values stays, and -1 where all are -inf.
        """
        largest = value.amax(0)
        lowest = index.masked_fill(value != largest, torch.iinfo(torch.int32).max).amin(0)
        better = largest > self.value[at]
        self.index[at] = torch.where(better, lowest.long() + first, self.index[at])
        self.value[at] = torch.maximum(largest, self.value[at])


class HardNegatives:
    """One call's operands, and the launch on a chunk of them."""

    def __init__(self, image_features, text_features, scale, seed, row_offset):
        self.arch = _common.architecture(image_features.device)
        self.kind = _common.product_kind(image_features.dtype, self.arch)
        self.tile = _common.choose_tile(TILES, _contrast.DEFAULT_TILES, self.arch, self.kind)
        self.image = _common.operand(image_features, self.tile.depth)
        self.text = _common.operand(text_features, self.tile.depth)
        self.scale, self.seed, self.row_offset = scale, seed, row_offset
        self.images = Side(len(self.image), self.image.device)
        self.texts = Side(len(self.text), self.image.device)

    def new_parts(self, count: int, size: int, tile: int) -> tuple[Tensor, Tensor]:
        """Values and indices, (count, size) each, with room for whole tiles."""
        value, index = (
            self.image.new_empty(count, _common.round_up(size, tile), dtype=dtype)[:, :size]
            for dtype in (torch.float32, torch.int32)
        )
        return value, index

    def run(self, chunk: _contrast.Chunk) -> None:
        """Searches a chunk and merges what is found there."""
        tile, kind = self.tile, self.kind
        rows, cols = len(chunk.image), len(chunk.text)
        high, wide = triton.cdiv(rows, tile.rows), triton.cdiv(cols, tile.cols)
        row_parts = self.new_parts(wide, rows, tile.rows)
        col_parts = self.new_parts(high, cols, tile.cols)
        negatives_tile[(high * wide,)](
            _common.source(chunk.image, tile.rows, tile, kind),
            _common.source(chunk.text, tile.cols, tile, kind),
            self.scale, self.seed, *row_parts, *col_parts,
            rows, cols, chunk.image.shape[1], chunk.image.stride(0), chunk.text.stride(0),
            chunk.diagonal, *(chunk.ids or row_parts),
            chunk.rows.start, chunk.cols.start, self.row_offset,
            TILE_M=tile.rows, TILE_N=tile.cols, TILE_K=tile.depth, PIECES=tile.pieces,
            GROUP=8, PRECISION="ieee" if kind == "half" else kind,
            EVEN=rows % tile.rows == 0 and cols % tile.cols == 0, TMA=tile.tma,
            IDS=chunk.ids is not None, num_warps=tile.warps, num_stages=tile.stages,
            **_contrast.register_limit(self.arch, tile),
        )
        self.images.add(chunk.rows, *row_parts, chunk.cols.start)
        self.texts.add(chunk.cols, *col_parts, chunk.rows.start)


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

    Cost: a matrix product of B*N*D, memory O((B + N) * D) plus the parts of one chunk.
    """
    dtype, device = image_features.dtype, image_features.device
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"image_features: expected float16, bfloat16 or float32, got {dtype}")
    ids = None if image_ids is None else _contrast.number(image_ids, text_ids)
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), torch.autocast(device.type, enabled=False), on_device:
        negatives = HardNegatives(image_features, text_features, logit_scale, seed, row_offset)
        size = CHUNK_ROWS, CHUNK_COLS
        for chunk in _contrast.chunks(negatives.image, negatives.text, positives, ids, size):
            negatives.run(chunk)
        return negatives.images.index, negatives.texts.index
