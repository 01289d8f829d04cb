"""BLIP's contrast in Triton: softmax-weighted means of the candidates, in two passes over them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels import _common, _contrast_chunks, _contrast_tiles
from tilewise.kernels._common import Tile
from tilewise.kernels._contrast import (
    LOWEST,
    SIZES,
    Launch,
    add_exponentials,
    of_scale,
    part_of_rows,
    tile_of_dots,
    tiles,
)
from tilewise.kernels._contrast_chunks import Chunk
from tilewise.kernels._itc_loss_finish import (
    FINISHED,
    MERGED,
    PARTS,
    finish_loss,
    finish_queries,
    merge_parts,
)

CHUNK_BYTES = 192 << 20  # workspace: the weights of one chunk of the candidates
CHUNK_ROWS = 8192  # bounds what is kept of a query besides: sums in float64, its mean
CHUNK_COLS = 8192  # at least, if there are so many; more for few queries
# A weight is at most 1, in units of the row's largest; float16 keeps it times 2^14 and ends at
# 2^-38 of it.
FLOAT16_EXPONENT = 14

TILES = _contrast_tiles.TILES | {
    ("sm_80", "half"): Tile(128, 128, 32, pieces=16, warps=8, stages=4),
    ("sm_86", "half"): Tile(128, 128, 32, pieces=16, warps=8, stages=3),
    ("sm_89", "half"): Tile(128, 128, 32, pieces=16, warps=8, stages=3),
    ("sm_120", "tf32x3"): Tile(64, 64, 16, pieces=1, warps=4, stages=3),  # larger ones spill
}


@triton.jit
def x_of_dots(dots, j, cols, sign, EVEN: tl.constexpr):
    """x = dots with the sign of logit_scale: the largest x is the largest logit. Outside LOWEST."""
    x = dots * sign
    return x if EVEN else tl.where((j < cols)[None, :], x, LOWEST)


@triton.jit
def add_sums(
    dots, sums, row, col, pairs, operands,
    AT: tl.constexpr, EVEN: tl.constexpr, OPTION: tl.constexpr,
):
    """Adds to the largest x and the sum of exponentials, (TILE_M,) each."""
    sign, rate = operands
    j = col + AT + tl.arange(0, dots.shape[1])
    return add_exponentials(x_of_dots(dots, j, pairs[1], sign, EVEN), sums[0], sums[1], rate)


@triton.jit
def store_weights(
    dots, sums, row, col, pairs, operands,
    AT: tl.constexpr, EVEN: tl.constexpr, EXPONENT: tl.constexpr,
):
    """Stores weights and adds to the sums of those, as stored, and of weights * (x - largest).

    A tile that has rows below `split` stores rests of all its rows.
    """
    sign, rate, largest, weights_ptr, rest_ptr, split = operands
    total, moment = sums
    j = AT + tl.arange(0, dots.shape[1])
    away = x_of_dots(dots, col + j, pairs[1], sign, EVEN) - largest[:, None]
    weights = tl.exp2(away * rate + EXPONENT)
    stored = weights.to(weights_ptr.dtype.element_ty)
    tl.store(weights_ptr + j[None, :], stored)
    total += tl.sum(stored.to(tl.float32), 1)
    moment += tl.sum(weights * tl.maximum(away, LOWEST), 1)  # x may be -inf
    if rest_ptr is not None:
        if row < split:
            rest = (weights - stored.to(tl.float32)).to(rest_ptr.dtype.element_ty)
            tl.store(rest_ptr + j[None, :], rest)
            i = row + tl.arange(0, dots.shape[0])
            total += tl.where(i < split, tl.sum(rest.to(tl.float32), 1), 0.0)
    return total, moment


@triton.jit(do_not_specialize=[*SIZES, "all_parts"])
def itc_sums_tile(
    query_ptr, candidates_ptr,  # (rows, depth), (cols, depth)
    rows, cols, depth, query_stride, candidates_stride,  # see `tile_of_dots`
    scale_ptr,  # one float32: logit_scale
    parts_ptr,  # (2, tiles in a row, rows rounded up to whole tiles) float32: largest x, sums
    all_parts,  # from one to the other: a segment's tiles are some of a row's
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):
    """Pass 1: largest x and sum of exponentials of a tile's rows."""
    row, col, dots = tile_of_dots(
        query_ptr, candidates_ptr, rows, cols, depth, query_stride, candidates_stride,
        TILE_M, TILE_N, TILE_K, PRECISION, EVEN, TMA,
    )
    sums = tl.full((TILE_M,), LOWEST, tl.float32), tl.zeros((TILE_M,), tl.float32)
    largest, total = tiles(
        add_sums, dots, sums, row, col, (rows, cols), of_scale(tl.load(scale_ptr)),
        0, EVEN, None, PIECES,
    )
    parts_ptr += part_of_rows(row, col, rows, TILE_M, TILE_N)
    tl.store(parts_ptr, largest)
    tl.store(parts_ptr + all_parts, total)


@triton.jit(do_not_specialize=[*SIZES, "split", "all_parts"])
def itc_weights_tile(
    query_ptr, candidates_ptr,
    rows, cols, depth, query_stride, candidates_stride, scale_ptr,  # all as in pass 1
    largest_ptr,  # (rows,) float32: x
    weights_ptr,  # (rows, cols) rounded up to whole tiles, unit stride in a row
    rest_ptr,  # the same for rows below `split`: what rounding took of the weights; or None
    weights_stride, split,
    sums_ptr, all_parts,  # as in pass 1: sums of the weights as stored, of weight * (x - largest)
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    EXPONENT: tl.constexpr,
):
    """Pass 2: weights = 2^EXPONENT * exp(z - largest z) of one tile, and sums over its rows."""
    row, col, dots = tile_of_dots(
        query_ptr, candidates_ptr, rows, cols, depth, query_stride, candidates_stride,
        TILE_M, TILE_N, TILE_K, PRECISION, EVEN, TMA,
    )
    i = row + tl.arange(0, TILE_M)
    if EVEN:
        largest = tl.load(largest_ptr + i)
    else:  # rows outside get weights of 0, whatever their dots are
        largest = tl.load(largest_ptr + i, mask=i < rows, other=-LOWEST)
    at = i[:, None].to(tl.int64) * weights_stride + col
    weights_ptr += at
    if rest_ptr is not None:
        rest_ptr += at
    sign, rate = of_scale(tl.load(scale_ptr))
    zero = tl.zeros((TILE_M,), tl.float32)
    total, moment = tiles(
        store_weights, dots, (zero, zero), row, col, (rows, cols),
        (sign, rate, largest, weights_ptr, rest_ptr, split), 0, EVEN, EXPONENT, PIECES,
    )
    sums_ptr += part_of_rows(row, col, rows, TILE_M, TILE_N)
    tl.store(sums_ptr, total)
    tl.store(sums_ptr + all_parts, moment)


class ItcLoss:
    """One call's operands, and the launches on a chunk of its queries.

    Rows of a chunk are the teacher's and then the student's, so that one launch serves both.
    """

    def __init__(self, query, keys, scale, queue, teacher_query, precise=False):
        self.query, self.teacher, self.scale = query, teacher_query, scale
        segments = [x for x in (keys, queue) if x is not None and len(x)]
        stacked = len(query) * (1 if teacher_query is None else 2)
        most = max(map(len, segments), default=0)
        self.launch = launch = Launch.of(query, stacked, most, TILES)
        self.segments = [launch.operand(x) for x in segments]  # (K, D rounded up), as rows are
        self.exponent = FLOAT16_EXPONENT if query.dtype == torch.float16 else 0
        # The loss, which is float32, depends on the teacher's mean: there, a weight of half
        # precision is two numbers. Of the student's mean d_query alone is made, which is rounded.
        self.splits = (precise or teacher_query is not None) and query.dtype != torch.float32
        self.size = self.chunk_size() if self.segments else (1, 0)

    def chunk_size(self) -> tuple[int, int]:
        """Queries and candidates of a chunk: as many candidates as fit beside few queries."""
        x, tile = self.query, self.launch.tile
        stacked = 1 if self.teacher is None else 2  # rows of a query
        # Sums of rows in each tile, an eighth of the workspace; then the weights.
        tiles = sum(triton.cdiv(len(x), tile.cols) for x in self.segments)
        of_sums = CHUNK_BYTES // 8 // (8 * stacked * tiles) // tile.rows * tile.rows
        most = min(len(x), CHUNK_ROWS, max(of_sums, tile.rows))
        rows = _common.round_up(max(most, 1), tile.rows)
        budget = CHUNK_BYTES // (stacked + self.splits)
        fitting = budget // (rows * x.element_size()) // tile.cols * tile.cols
        longest = max(self.segments, key=len)
        size = _contrast_chunks.chunk_size(x, longest, tile, max(fitting, CHUNK_COLS), budget)
        return min(size[0], rows), size[1]

    def rows(self, at: slice) -> Tensor:
        """The teacher's and the student's features of some queries, (rows, D rounded up)."""
        both = self.query[at] if self.teacher is None else torch.cat(
            [self.teacher[at], self.query[at]]
        )
        return self.launch.operand(both)

    def parts(self, rows: Tensor, cols: int) -> tuple[Tensor, list[tuple[Chunk, Tensor]]]:
        """(2, tiles in a row, rows), with room for whole tiles, for sums of each tile.

        And chunks of all candidates, at most `cols` at once, with their tiles of it.
        """
        size = len(rows), cols
        chunks = [
            x for y in self.segments for x in _contrast_chunks.chunks(rows, y, None, None, size)
        ]
        tiles = [self.launch.grid(chunk)[1] for chunk in chunks]
        padded = _common.round_up(len(rows), self.launch.tile.rows)
        parts = self.scale.new_empty(2, sum(tiles), padded)[..., : len(rows)]
        return parts, list(zip(chunks, parts.split(tiles, 1), strict=True))

    def sums(self, rows: Tensor) -> Tensor:
        """Pass 1: (2, rows) largest x and sums of exponentials."""
        launch = self.launch
        cols = self.size[1] if launch.by_library else max(map(len, self.segments))
        parts, chunks = self.parts(rows, cols)
        room = launch.room(rows, (len(rows), cols))
        for chunk, part in chunks:
            launch.run(
                itc_sums_tile, launch.multiplied(chunk, room), self.scale, part, part.stride(0),
                limited=True,
            )
        state = self.scale.new_empty(2, len(rows))
        merge_parts[(triton.cdiv(len(rows), MERGED),)](
            parts, self.scale, state, len(rows), parts.shape[1], parts.stride(1),
            BLOCK=MERGED, PARTS=PARTS,
        )
        return state

    def means(self, rows: Tensor, state: Tensor, split: int) -> tuple[Tensor, Tensor, int]:
        """Pass 2: candidates times weights, not yet divided by the weights' sums.

        (rows, D rounded up) float32, with rows more for the rests of the first `split` rows;
        the sums, as `parts`; and the row where the rests begin.
        """
        tile = self.launch.tile
        parts, chunks = self.parts(rows, self.size[1])
        rest = _common.round_up(len(rows), tile.rows)
        height = rest + _common.round_up(split, tile.rows)
        width = _common.round_up(self.size[1], tile.cols)
        workspace = rows.new_empty(height, width)
        used = rest + split if split else len(rows)
        mean = self.scale.new_empty(used, rows.shape[1])
        for i, (chunk, part) in enumerate(chunks):
            weights = workspace[:used, : len(chunk.text)]
            self.launch.run(
                itc_weights_tile, self.launch.multiplied(chunk, weights), self.scale, state,
                weights[: len(rows)], weights[rest:] if split else None, width, split,
                part, part.stride(0), EXPONENT=self.exponent, limited=True,
            )
            _common.add_product(mean, weights, chunk.text, accumulate=i > 0)
        return mean, parts, rest

    def add_queries(self, at: slice, alpha, matched, count, d_query, terms, need_mean) -> None:
        """Terms of loss and d_scale of some queries; their d_query is written."""
        rows = self.rows(at)
        queries = len(self.query[at])
        student = len(rows) - queries
        state = self.sums(rows)
        averaged = rows if need_mean else rows[:student]
        mean, parts, rest = None, None, 0
        if len(averaged):
            mean, parts, rest = self.means(averaged, state, self.splits * queries)
        depth = self.query.shape[1]
        cols = min(triton.next_power_of_2(max(depth, 16)), FINISHED // 4)
        block = FINISHED // cols
        finish_queries[(triton.cdiv(queries, block),)](
            self.scale, alpha, count, matched, rows, state, mean, parts, d_query, terms,
            at.start, queries, len(self.query), student, rest,
            *((0, 0) if parts is None else (parts.shape[1], parts.stride(1))),
            depth, matched.stride(0), rows.stride(0), rows.shape[1],
            TEACHER=self.teacher is not None, SPLIT=self.splits, NEED_MEAN=need_mean,
            EXPONENT=self.exponent, ROWS=block, COLS=cols, PARTS=FINISHED // block,
            # Left alone, ptxas spills a register of some to save others.
            **({"maxnreg": 96} if self.launch.arch.startswith("sm_") else {}),
        )


def _itc_loss(query, keys, scale, queue, teacher_query, alpha, matched, count, needs):
    itc = ItcLoss(query, keys, scale, queue, teacher_query)
    nothing = not itc.segments or not len(query)
    matched = matched if matched.stride(1) == 1 else matched.contiguous()
    new = scale.new_zeros if nothing else scale.new_empty
    loss, d_scale = new(()), new(() if needs[1] else 0)
    d_query = new(query.shape if needs[0] else 0)
    if nothing:
        return loss, d_query, d_scale
    terms = matched.new_empty(2, len(query), dtype=torch.float64)
    for start in range(0, len(query), itc.size[0]):
        at = slice(start, start + itc.size[0])
        itc.add_queries(
            at, alpha, matched, count, d_query if needs[0] else None, terms, any(needs)
        )
    finish_loss[(1,)](terms, loss, d_scale if needs[1] else None, len(query))
    return loss, d_query, d_scale


def itc_loss(
    query: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    queue: Tensor | None,
    teacher_query: Tensor | None,
    alpha: Tensor,
    matched: Tensor,
    count: Tensor,
    need_query: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """BLIP's contrast and its gradients, float32 and on the device, without a host sync.

    Args:
        query: (B, D), float16, bfloat16 or float32, any strides.
        keys: (K, D), the same.
        logit_scale: one float32.
        queue: (Q, D), as keys: more candidates.
        teacher_query: (B, D), as query. None: the targets are the matches alone.
        alpha: one float32: the teacher's part of the targets.
        matched: (B, D) float32, or as keys: the mean of the candidates that match each query.
        count: (B,) int64: how many match. Where none does, the query is of no account.

    Returns:
        loss, d_query, d_scale; empty where not needed. Equal bits on every run.

    Cost: 6 matrix products of B * (K + Q) * D, 7 in half precision (2 less if nothing is needed;
    without a teacher 3 and 1), memory O(B * D) plus CHUNK_BYTES, 32 bytes a candidate where these
    are many, and O((K + Q) * D) where features must be copied: their rows not aligned, or D no
    multiple of 64.
    """
    needs = need_query, need_scale
    with _common.launching(query=query):
        return _itc_loss(
            query, keys, logit_scale, queue, teacher_query, alpha, matched, count, needs
        )
