"""BLIP's contrast in Triton: softmax-weighted means of the candidates, in two passes over them."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels import _common, _contrast
from tilewise.kernels._common import Tile
from tilewise.kernels._contrast import (
    LOWEST,
    SIZES,
    Chunk,
    Launch,
    add_exponentials,
    part_of_rows,
    tile_of_dots,
    tiles,
)

CHUNK_BYTES = 128 << 20  # workspace: the weights of one chunk of the candidates
CHUNK_ROWS = 8192  # bounds what is kept of a query besides: sums in float64, its mean
CHUNK_COLS = 8192  # at least, if there are so many; more for few queries
# A weight is at most 1, in units of the row's largest; float16 keeps it times 2^14 and ends at
# 2^-38 of it.
FLOAT16_EXPONENT = 14

TILES = _contrast.TILES | {
    ("sm_86", "half"): Tile(128, 128, 32, pieces=8, warps=8, stages=3),
    ("sm_89", "half"): Tile(128, 128, 32, pieces=8, warps=8, stages=3),
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
    """Stores weights and adds to the sums of those, as stored, and of weights * (x - largest)."""
    sign, rate, largest, weights_ptr, rest_ptr = operands
    total, moment = sums
    j = AT + tl.arange(0, dots.shape[1])
    away = x_of_dots(dots, col + j, pairs[1], sign, EVEN) - largest[:, None]
    weights = tl.exp2(away * rate + EXPONENT)
    stored = weights.to(weights_ptr.dtype.element_ty)
    tl.store(weights_ptr + j[None, :], stored)
    total += tl.sum(stored.to(tl.float32), 1)
    if rest_ptr is not None:
        rest = (weights - stored.to(tl.float32)).to(rest_ptr.dtype.element_ty)
        tl.store(rest_ptr + j[None, :], rest)
        total += tl.sum(rest.to(tl.float32), 1)
    else:
        moment += tl.sum(weights * tl.maximum(away, LOWEST), 1)  # x may be -inf
    return total, moment


@triton.jit(do_not_specialize=SIZES)
def itc_sums_tile(
    query_ptr, candidates_ptr,  # (rows, depth), (cols, depth)
    rows, cols, depth, query_stride, candidates_stride,  # see `tile_of_dots`
    scalars_ptr,  # the sign of x, the rate of its exponentials
    parts_ptr,  # (2, tiles in a row, rows rounded up to whole tiles) float32: largest x, sums
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
        add_sums, dots, sums, row, col, (rows, cols),
        (tl.load(scalars_ptr), tl.load(scalars_ptr + 1)), 0, EVEN, None, PIECES,
    )
    parts_ptr += part_of_rows(row, col, rows, TILE_M, TILE_N)
    tl.store(parts_ptr, largest)
    padded_rows = tl.cdiv(rows, TILE_M).to(tl.int64) * TILE_M
    tl.store(parts_ptr + tl.cdiv(cols, TILE_N) * padded_rows, total)


@triton.jit(do_not_specialize=SIZES)
def itc_weights_tile(
    query_ptr, candidates_ptr,
    rows, cols, depth, query_stride, candidates_stride, scalars_ptr,  # all as in pass 1
    largest_ptr,  # (rows,) float32: x
    weights_ptr,  # (rows, cols) rounded up to whole tiles, unit stride in a row
    rest_ptr,  # the same: what rounding took of the weights; or None
    weights_stride,
    sums_ptr,  # (1 with rest_ptr, else 2, tiles in a row, rows rounded up to whole tiles) float32
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    EXPONENT: tl.constexpr,
):
    """Pass 2: weights = 2^EXPONENT * exp(z - largest z) of one tile.

    And the sums over its rows of the weights as stored and, without a rest, of
    weights * (x - largest).
    """
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
    zero = tl.zeros((TILE_M,), tl.float32)
    total, moment = tiles(
        store_weights, dots, (zero, zero), row, col, (rows, cols),
        (tl.load(scalars_ptr), tl.load(scalars_ptr + 1), largest, weights_ptr, rest_ptr),
        0, EVEN, EXPONENT, PIECES,
    )
    sums_ptr += part_of_rows(row, col, rows, TILE_M, TILE_N)
    tl.store(sums_ptr, total)
    if rest_ptr is None:
        padded_rows = tl.cdiv(rows, TILE_M).to(tl.int64) * TILE_M
        tl.store(sums_ptr + tl.cdiv(cols, TILE_N) * padded_rows, moment)


class ItcLoss:
    """One call's operands, and the launches on a chunk of them."""

    def __init__(self, query, keys, scale, queue, teacher_query):
        self.launch = launch = Launch.of(query, TILES)
        self.query = launch.operand(query)  # (B, D rounded up), as are the others
        self.teacher = None if teacher_query is None else launch.operand(teacher_query)
        self.segments = [launch.operand(x) for x in (keys, queue) if x is not None and len(x)]
        self.scale = scale.double().abs()
        self.sign, self.rate = _contrast.sign_and_rate(scale)
        self.scalars = torch.stack([self.sign, self.rate])
        self.exponent = FLOAT16_EXPONENT if query.dtype == torch.float16 else 0
        # The loss, which is float32, depends on the teacher's mean: there, a weight of half
        # precision is two numbers. Of the student's mean d_query alone is made, which is rounded.
        self.splits = 2 if teacher_query is not None and query.dtype != torch.float32 else 1
        self.size = self.chunk_size() if self.segments else (1, 0)
        self.workspace: Tensor | None = None

    def chunk_size(self) -> tuple[int, int]:
        """Queries and candidates of a chunk: as many candidates as fit beside few queries."""
        x, tile, budget = self.query, self.launch.tile, CHUNK_BYTES // self.splits
        rows = _common.round_up(max(min(len(x), CHUNK_ROWS), 1), tile.rows)
        fitting = budget // (rows * x.element_size()) // tile.cols * tile.cols
        longest = max(self.segments, key=len)
        size = _contrast.chunk_size(x, longest, tile, max(fitting, CHUNK_COLS), budget)
        return min(size[0], rows), size[1]

    def chunks(self, rows: Tensor) -> Iterator[Chunk]:
        """All candidates, for at most as many queries as a chunk has."""
        for segment in self.segments:
            yield from _contrast.chunks(rows, segment, None, None, self.size)

    def sums(self, rows: Tensor) -> Tensor:
        """Pass 1: (2, rows) largest x and sums of exponentials."""
        state = self.scalars.new_empty(2, len(rows))
        for i, chunk in enumerate(self.chunks(rows)):
            parts = self.launch.row_parts(chunk, 2)
            self.launch.run(itc_sums_tile, chunk, self.scalars, parts, **self.launch.limit)
            _contrast.merge_exponentials(state, parts, self.rate, begun=i > 0)
        return state

    def weigh(self, chunk: Chunk, largest: Tensor, weights: Tensor) -> Tensor:
        """Pass 2 on a chunk, into `weights` (1 or 2, rows, cols); returns its sums, float64."""
        rest = weights[1] if len(weights) == 2 else None
        parts = self.launch.row_parts(chunk, 3 - len(weights))
        self.launch.run(
            itc_weights_tile, chunk, self.scalars, largest, weights[0], rest, weights.stride(1),
            parts, EXPONENT=self.exponent, **self.launch.limit,
        )
        return parts.sum(1, dtype=torch.float64)

    def means(self, rows: Tensor, state: Tensor, splits: int) -> tuple[Tensor, Tensor]:
        """(rows, D rounded up) float32: the candidates' mean, weighted by exp(z).

        And without a split (1, rows) float64: the mean of x - largest, else (0, rows).

        The candidates' is divided by the sum of what the weights were rounded to, so that rounding
        shifts weight between candidates and adds none: the mean of equal candidates is what they
        are, and where one has nearly all of the weight, the others' keep their digits.
        """
        if self.workspace is None:
            self.workspace = self.launch.workspace(rows, self.size, self.splits)
        mean = rows.new_empty(rows.shape, dtype=torch.float32)
        sums = self.scale.new_zeros(3 - splits, len(rows))
        begun = False
        for chunk in self.chunks(rows):
            weights = self.workspace[:splits, : len(rows), : len(chunk.text)]
            sums += self.weigh(chunk, state[0], weights)
            for part in weights:
                _common.add_product(mean, part, chunk.text, accumulate=begun)
                begun = True
        return mean.div_(sums[0].unsqueeze(1)), sums[1:] / (state[1] * 2.0**self.exponent)


def add_queries(itc, at, query, alpha, matched, weight, scale, d_query, need_mean):
    """Terms of loss and d_scale of some queries, float64; their d_query is written."""
    depth, state = query.shape[1], itc.sums(itc.query[at])
    target = matched[at]  # (rows, D)
    if itc.teacher is not None:
        teacher = itc.teacher[at]
        soft, _ = itc.means(teacher, itc.sums(teacher), itc.splits)
        target = alpha * soft[:, :depth] + (1 - alpha) * target
    largest, total = state.double()
    x_of_target = itc.sign * (query[at].double() * target).sum(1)
    # A query without a match may be NaN, and is of no account.
    terms = weight[at] * (itc.scale * (largest - x_of_target) + total.log())
    loss = torch.where(weight[at] > 0, terms, 0.0).sum()
    if not need_mean:
        return loss, None
    mean, (away,) = itc.means(itc.query[at], state, 1)
    if len(d_query):
        d_query[at] = (mean[:, :depth] - target) * (weight[at] * scale).unsqueeze(1)
    return loss, itc.sign * (weight[at] * (largest - x_of_target + away)).sum()


def _itc_loss(query, keys, scale, queue, teacher_query, alpha, matched, count, needs):
    scale, alpha = scale.reshape(()), alpha.reshape(())
    itc = ItcLoss(query, keys, scale, queue, teacher_query)
    d_query = matched.new_zeros(query.shape if needs[0] else 0)
    loss, d_scale = itc.scale.new_zeros(2)
    counted = (count > 0).double()
    weight = counted / counted.sum().clamp(min=1)  # (B,)
    for start in range(0, len(query) if itc.segments else 0, itc.size[0]):
        at = slice(start, start + itc.size[0])
        terms = add_queries(itc, at, query, alpha, matched, weight, scale, d_query, any(needs))
        loss = loss + terms[0]
        d_scale = d_scale if terms[1] is None else d_scale + terms[1]
    return loss.float(), d_query, d_scale.float() if needs[1] else d_query.new_empty(0)


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
        matched: (B, D) float32: the mean of the candidates that match each query.
        count: (B,) int64: how many match. Where none does, the query is of no account.

    Returns:
        loss, d_query, d_scale; empty where not needed. Equal bits on every run.

    Cost: 6 matrix products of B * (K + Q) * D, 7 in half precision (2 less if nothing is needed;
    without a teacher 3 and 1), memory O(B * D) plus CHUNK_BYTES, and O((K + Q) * D) where features
    must be copied: their rows not aligned, or D no multiple of 64.
    """
    needs = need_query, need_scale
    with _common.launching(query=query):
        return _itc_loss(
            query, keys, logit_scale, queue, teacher_query, alpha, matched, count, needs
        )
