"""Gumbel-softmax of rows too wide for registers: each block of a row has a program, twice.

Programs of the first launch measure their blocks; those of the second merge what was measured of
the row, in one order, and make the noise of their block again. So few rows keep a GPU busy, too.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels import _common, _rows
from tilewise.kernels.gumbel_softmax import LOWEST, inverse, perturbed, sensitivity, sharpness

MERGED = tl.constexpr(128)  # blocks of a row whose measures are merged at a time


@triton.jit(do_not_specialize=["rows", "row_offset"])
def measure_blocks(
    x_ptr,  # (rows, cols) logits
    top_ptr, index_ptr,  # out: (rows, blocks) float32 and int32
    total_ptr,  # out: (rows, blocks) float32; or None
    tau_ptr, seed_ptr,  # None: 1, and no noise
    rows: tl.int64, row_offset: tl.int64, cols, row_stride, col_stride,
    COLS: tl.constexpr,
):
    """Of a block of COLS columns of a row: its largest z, where that is first, sum exp(z / tau).

    The index is -1 less it where an element is NaN, which is never the largest.
    """
    row, block, blocks = _rows.place(cols, 1, COLS)
    first = block * COLS
    col = first + tl.arange(0, COLS)
    if seed_ptr is None:
        z = _rows.load_tile(x_ptr, row, col, rows, cols, row_stride, col_stride, float("-inf"))
    else:
        z = perturbed(
            x_ptr, tl.load(seed_ptr), row, row_offset, first, rows, cols, row_stride, col_stride,
            COLS,
        )
    numbers = tl.where(z == z, z, float("-inf"))
    top = tl.max(numbers, 1)
    index = tl.min(tl.where(numbers == top[:, None], col[None, :], cols), 1)
    nan = tl.max((z != z).to(tl.int32), 1)
    at = row * blocks + block
    tl.store(top_ptr + at, top)
    tl.store(index_ptr + at, tl.where(nan != 0, -1 - index, index))
    if total_ptr is not None:
        scale = 1.4426950408889634 if tau_ptr is None else sharpness(tl.load(tau_ptr))
        z -= tl.maximum(top, LOWEST)[:, None]
        tl.store(total_ptr + at, tl.sum(tl.exp2(z * scale), 1))


@triton.jit
def merge_blocks(top_ptr, index_ptr, total_ptr, row, blocks, scale):
    """What `measure_blocks` says of a row's blocks, of all of them: (1,) each.

    The largest, where it is first, whether any is NaN, and the sum of exp(scale (z - largest)).
    """
    top = tl.full((1,), float("-inf"), tl.float32)
    nan = tl.zeros((1,), tl.int32)
    for begin in range(0, blocks, MERGED):
        block = begin + tl.arange(0, MERGED)[None, :]
        at = row[:, None] * blocks + block
        top = tl.maximum(top, tl.max(tl.load(top_ptr + at, block < blocks, float("-inf")), 1))
        index = tl.load(index_ptr + at, block < blocks, 0)
        nan = tl.maximum(nan, tl.max((index < 0).to(tl.int32), 1))
    first = tl.full((1,), 2147483647, tl.int32)
    total = tl.zeros((1,), tl.float32)
    for begin in range(0, blocks, MERGED):
        block = begin + tl.arange(0, MERGED)[None, :]
        at = row[:, None] * blocks + block
        of_block = tl.load(top_ptr + at, block < blocks, float("-inf"))
        index = tl.load(index_ptr + at, block < blocks, 0)
        index = tl.where(index < 0, -1 - index, index)
        best = (block < blocks) & (of_block == top[:, None])
        first = tl.minimum(first, tl.min(tl.where(best, index, 2147483647), 1))
        if total_ptr is not None:
            away = tl.maximum(of_block, LOWEST) - tl.maximum(top, LOWEST)[:, None]
            exponentials = tl.load(total_ptr + at, block < blocks, 0.0)
            total += tl.sum(exponentials * tl.exp2(away * scale), 1)
    return top, first, nan, total


@triton.jit(do_not_specialize=["rows", "row_offset"])
def sample_blocks(
    x_ptr, y_ptr, top_ptr, index_ptr, total_ptr, tau_ptr, seed_ptr,
    rows: tl.int64, row_offset: tl.int64, cols, row_stride, col_stride,
    HARD: tl.constexpr, COLS: tl.constexpr,
):
    """As sample_rows, of a block of a row of any width, once all blocks were measured."""
    row, block, blocks = _rows.place(cols, 1, COLS)
    first = block * COLS
    col = first + tl.arange(0, COLS)
    tau = tl.load(tau_ptr)
    scale = sharpness(tau)
    top, index, nan, total = merge_blocks(top_ptr, index_ptr, total_ptr, row, blocks, scale)
    one = tl.where((nan != 0) | (tl.abs(top) == float("inf")), float("nan"), 1.0)
    zero = tl.where(one == one, 0.0, one)
    y = tl.where(col[None, :] == index[:, None], one[:, None], zero[:, None])
    if not HARD:
        if tau != 0:
            z = perturbed(
                x_ptr, tl.load(seed_ptr), row, row_offset, first, rows, cols, row_stride,
                col_stride, COLS,
            )
            away = z - tl.maximum(top, LOWEST)[:, None]
            y = tl.exp2(away * scale) * tl.div_rn(1.0, total)[:, None]
    _rows.store_tile(y_ptr, row, col, rows, cols, y)


@triton.jit
def block_of_gradient(
    grad_ptr, saved_ptr, seed_ptr, row, row_offset, first, rows, cols, grad_stride, grad_col,
    row_stride, col_stride, HARD: tl.constexpr, COLS: tl.constexpr,
):
    """What y is made of, y itself or if HARD z, and dy, of COLS columns of a row."""
    col = first + tl.arange(0, COLS)
    if HARD:
        y = perturbed(
            saved_ptr, tl.load(seed_ptr), row, row_offset, first, rows, cols, row_stride,
            col_stride, COLS,
        )
    else:
        y = _rows.load_tile(saved_ptr, row, col, rows, cols, row_stride, col_stride, 0.0)
    return y, _rows.load_tile(grad_ptr, row, col, rows, cols, grad_stride, grad_col, 0.0)


@triton.jit(do_not_specialize=["rows", "row_offset"])
def measure_gradient_blocks(
    grad_ptr, saved_ptr,
    top_ptr, total_ptr,  # out, if HARD: (rows, blocks) float32; else None
    inner_ptr,  # out: (rows, blocks) float32
    tau_ptr, seed_ptr,
    rows: tl.int64, row_offset: tl.int64, cols, grad_stride, grad_col, row_stride, col_stride,
    HARD: tl.constexpr, COLS: tl.constexpr,
):
    """Of a block of a row: <y, dy>; if HARD of y that lacks a factor, its largest z and sum."""
    row, block, blocks = _rows.place(cols, 1, COLS)
    y, dy = block_of_gradient(
        grad_ptr, saved_ptr, seed_ptr, row, row_offset, block * COLS, rows, cols, grad_stride,
        grad_col, row_stride, col_stride, HARD, COLS,
    )
    at = row * blocks + block
    if HARD:
        top = tl.maximum(tl.max(y, 1), LOWEST)
        y = tl.exp2((y - top[:, None]) * sharpness(tl.load(tau_ptr)))
        tl.store(top_ptr + at, top)
        tl.store(total_ptr + at, tl.sum(y, 1))
    tl.store(inner_ptr + at, tl.sum(y * dy, 1))


@triton.jit(do_not_specialize=["rows", "row_offset"])
def differentiate_blocks(
    grad_ptr, saved_ptr, out_ptr,
    part_ptr,  # out: (rows, blocks) float32 by tau, if NEED_TAU
    top_ptr, total_ptr, inner_ptr, tau_ptr, seed_ptr,
    rows: tl.int64, row_offset: tl.int64, cols, grad_stride, grad_col, row_stride, col_stride,
    HARD: tl.constexpr, NEED_TAU: tl.constexpr, COLS: tl.constexpr,
):
    """As differentiate_rows, of a block of a row of any width, once all blocks were measured."""
    row, block, blocks = _rows.place(cols, 1, COLS)
    tau = tl.load(tau_ptr)
    scale = sharpness(tau)
    top = tl.full((1,), LOWEST, tl.float32)
    if HARD:
        for begin in range(0, blocks, MERGED):
            other = begin + tl.arange(0, MERGED)[None, :]
            at = row[:, None] * blocks + other
            top = tl.maximum(top, tl.max(tl.load(top_ptr + at, other < blocks, LOWEST), 1))
    total = tl.zeros((1,), tl.float32)
    inner = tl.zeros((1,), tl.float32)
    for begin in range(0, blocks, MERGED):
        other = begin + tl.arange(0, MERGED)[None, :]
        at = row[:, None] * blocks + other
        part = tl.load(inner_ptr + at, other < blocks, 0.0)
        if HARD:
            away = tl.load(top_ptr + at, other < blocks, LOWEST) - top[:, None]
            fade = tl.exp2(away * scale)
            total += tl.sum(tl.load(total_ptr + at, other < blocks, 0.0) * fade, 1)
            part *= fade
        inner += tl.sum(part, 1)
    first = block * COLS
    y, dy = block_of_gradient(
        grad_ptr, saved_ptr, seed_ptr, row, row_offset, first, rows, cols, grad_stride, grad_col,
        row_stride, col_stride, HARD, COLS,
    )
    if HARD:
        share = tl.div_rn(1.0, total)
        y = tl.exp2((y - top[:, None]) * scale) * share[:, None]
        inner *= share
    factor = inverse(tau)
    dx = y * (dy - inner[:, None]) * factor
    _rows.store_tile(out_ptr, row, first + tl.arange(0, COLS), rows, cols, dx)
    if NEED_TAU:
        tl.store(part_ptr + row * blocks + block, sensitivity(y, dy, inner) * factor)


class Measures(NamedTuple):
    """Of blocks of rows, (rows, blocks) each; see `measure_blocks`."""

    top: Tensor
    index: Tensor
    total: Tensor | None


def measured(
    x: Tensor, tau: Tensor | None, seed: Tensor | None, row_offset: int, tile: _rows.Tile,
    totals: bool = True,
) -> Measures:
    """What `measure_blocks` says of x (rows, cols), in blocks of the tile's columns."""
    shape = len(x), triton.cdiv(x.shape[1], tile.cols)
    top, index = x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)
    total = torch.empty_like(top) if totals else None
    measure_blocks[(index.numel(),)](
        x, top, index, total, tau, seed, len(x), row_offset, x.shape[1], *x.stride(),
        COLS=tile.cols, num_warps=tile.warps,
    )
    return Measures(top, index, total)


def sample(
    x: Tensor, y: Tensor, tau: Tensor, seed: Tensor, row_offset: int, hard: bool, tile: _rows.Tile
) -> None:
    """Fills y (rows, cols) with samples of x."""
    measures = measured(x, tau, seed, row_offset, tile, totals=not hard)
    sample_blocks[(measures.index.numel(),)](
        x, y, *measures, tau, seed, len(x), row_offset, x.shape[1], *x.stride(), HARD=hard,
        COLS=tile.cols, num_warps=tile.warps,
    )


def differentiate(
    dy: Tensor, saved: Tensor, out: Tensor, parts: Tensor | None, tau: Tensor, seed: Tensor,
    row_offset: int, hard: bool, tile: _rows.Tile,
) -> None:
    """Fills `out` with gradients by logits, and `parts` (rows * blocks,) with parts of tau's."""
    rows, cols = saved.shape
    blocks = triton.cdiv(cols, tile.cols)
    inner = out.new_empty(rows, blocks, dtype=torch.float32)
    top, total = (torch.empty_like(inner) if hard else None for _ in range(2))
    measures = top, total, inner
    arguments = tau, seed, rows, row_offset, cols, *dy.stride(), *saved.stride()
    options = {"HARD": hard, "COLS": tile.cols, "num_warps": tile.warps}
    measure_gradient_blocks[(rows * blocks,)](dy, saved, *measures, *arguments, **options)
    if _common.architecture(out.device).startswith("sm_"):
        options["maxnreg"] = 128  # left alone, ptxas spills a register of some to save others
    differentiate_blocks[(rows * blocks,)](
        dy, saved, out, parts, *measures, *arguments, NEED_TAU=parts is not None, **options
    )
