"""Gaussian samples and their divergence from N(0, 1) in Triton: one reading, one writing.

Rows may be long and few, so that programs share a row; each leaves its part of the divergence.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels import _common, _philox, _rows

# Columns of a tile: of rows shorter than NARROW, of others, and of those from LONG on that are
# aligned. That, and whether others are aligned, is all that binaries differ in.
NARROW, USUAL, WIDE = 16, 128, 2048
LONG = 4096


@triton.jit
def exponential(v):
    """exp(v), float32, with a product by log2(e) of more than 24 bits."""
    high = v * 1.4426950408889634
    low = tl.fma(v, 1.4426950408889634, -high) + v * 1.9259629911266175e-08
    low = tl.where(tl.abs(high) < 256.0, low, 0.0)  # else exp2(high) is 0, infinite or NaN
    e = tl.exp2(high)
    return tl.where(e < float("inf"), tl.fma(e, low * 0.6931471805599453, e), e)


@triton.jit
def above_tangent(v, e):
    """exp(v) - 1 - v for e = exp(v), with all its digits where it is small."""
    p = tl.fma(v, 2.7722835511667654e-06, 2.535482963139657e-05)
    p = tl.fma(v, p, 0.0001984402333619073)
    p = tl.fma(v, p, 0.001388545148074627)
    p = tl.fma(v, p, 0.00833331048488617)
    p = tl.fma(v, p, 0.04166673496365547)
    p = tl.fma(v, p, 0.1666666716337204)
    p = tl.fma(v, p, 0.5)
    return tl.where(tl.abs(v) < 1.0, v * v * p, e - 1.0 - v)


@triton.jit
def clamped(v, low, high):
    """v in [low, high]; NaN stays."""
    v = tl.where(v < low, low, v)
    return tl.where(v > high, high, v)


# Rows are not specialised on: every batch runs the same binary.
@triton.jit(do_not_specialize=["rows", "row_offset"])
def sample_tile(
    mean_ptr, logvar_ptr,  # (rows, cols)
    z_ptr,  # out: (rows, cols), contiguous
    kl_ptr,  # out: (rows, blocks of columns) float32
    seed_ptr,  # one int64
    rows: tl.int64, row_offset: tl.int64, cols, mean_stride, mean_col, logvar_stride, logvar_col,
    low, high,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Samples of one tile, and what it adds to the divergence."""
    row, block, blocks = _rows.place(cols, ROWS, COLS)
    first = block * COLS
    col = first + tl.arange(0, COLS)
    m = _rows.load_tile(mean_ptr, row, col, rows, cols, mean_stride, mean_col, 0.0)
    v = _rows.load_tile(logvar_ptr, row, col, rows, cols, logvar_stride, logvar_col, 0.0)
    v = clamped(v, low, high)
    e = _philox.normal_tile(tl.load(seed_ptr), row + row_offset, first, COLS)
    _rows.store_tile(z_ptr, row, col, rows, cols, tl.fma(exponential(0.5 * v), e, m))
    terms = 0.5 * (m * m + above_tangent(v, exponential(v)))
    terms = tl.where(col[None, :] < cols, terms, 0.0)
    tl.store(kl_ptr + row * blocks + block, tl.sum(terms, 1), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "row_offset"])
def differentiate_tile(
    d_z_ptr, d_kl_ptr,  # (rows, cols), (rows,); None for none
    mean_ptr, logvar_ptr,  # (rows, cols)
    d_mean_ptr, d_logvar_ptr,  # out: (rows, cols), contiguous
    seed_ptr,
    rows: tl.int64, row_offset: tl.int64, cols, d_z_stride, d_z_col, d_kl_stride,
    mean_stride, mean_col, logvar_stride, logvar_col, low, high,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Gradients of one tile, whose noise is made again."""
    row, block, _ = _rows.place(cols, ROWS, COLS)
    first = block * COLS
    col = first + tl.arange(0, COLS)
    logvar = _rows.load_tile(logvar_ptr, row, col, rows, cols, logvar_stride, logvar_col, 0.0)
    v = clamped(logvar, low, high)
    d_mean = tl.zeros((ROWS, COLS), tl.float32)
    d_logvar = tl.zeros((ROWS, COLS), tl.float32)
    if d_z_ptr is not None:
        d_z = _rows.load_tile(d_z_ptr, row, col, rows, cols, d_z_stride, d_z_col, 0.0)
        e = _philox.normal_tile(tl.load(seed_ptr), row + row_offset, first, COLS)
        d_mean = d_z
        d_logvar = 0.5 * d_z * e * exponential(0.5 * v)
    if d_kl_ptr is not None:
        d_kl = tl.load(d_kl_ptr + row * d_kl_stride, mask=row < rows, other=0.0)[:, None]
        m = _rows.load_tile(mean_ptr, row, col, rows, cols, mean_stride, mean_col, 0.0)
        d_mean += d_kl * m
        e = exponential(v)
        slope = tl.where(tl.abs(v) < 1.0, above_tangent(v, e) + v, e - 1.0)  # exp(v) - 1
        d_logvar += 0.5 * d_kl * slope
    outside = (logvar < low) | (logvar > high)
    _rows.store_tile(d_mean_ptr, row, col, rows, cols, d_mean)
    _rows.store_tile(d_logvar_ptr, row, col, rows, cols, tl.where(outside, 0.0, d_logvar))


class Work(NamedTuple):
    """How a launch is cut."""

    tile: _rows.Tile
    grid: tuple[int]
    blocks: int  # of columns

    def constants(self) -> dict[str, int]:
        return {"ROWS": self.tile.rows, "COLS": self.tile.cols, "num_warps": self.tile.warps}


def cut(rows: int, cols: int, arch: str) -> Work:
    width = NARROW if cols < NARROW else WIDE if cols >= LONG and cols % 16 == 0 else USUAL
    tile = _rows.choose_tile(width, arch, width)
    blocks = triton.cdiv(cols, tile.cols)
    return Work(tile, (triton.cdiv(rows, tile.rows) * blocks,), blocks)


def bounds(low: float, high: float) -> tuple[float, float]:
    """Float32 bounds that the same float32 numbers are outside of."""
    with np.errstate(over="ignore"):
        lowest, highest = np.float32(low), np.float32(high)
    if float(lowest) < low:  # numpy would round `low` before it compares
        lowest = np.nextafter(lowest, np.float32(math.inf))
    if float(highest) > high:
        highest = np.nextafter(highest, np.float32(-math.inf))
    return float(lowest), float(highest)


def as_rows(x: Tensor) -> Tensor:
    """(B, columns), a view where strides allow."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def gaussian_sample(
    mean: Tensor, logvar: Tensor, seed: Tensor, row_offset: int, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Samples of N(mean, exp(logvar)), and the divergence of each row from N(0, 1).

        z = mean + exp(logvar / 2) * e,    kl_i = sum (mean^2 + exp(logvar) - 1 - logvar) / 2

    Args:
        mean, logvar: (B, ...), float16, bfloat16 or float32, any strides, one shape.
        seed: one int64 on the device.
        row_offset: the number of the first row.
        low, high: logvar is clamped to them.

    Returns:
        z as `mean`, contiguous; kl (B,) float32. Equal bits on every run.

    Cost: traffic of the inputs and of z.
    """
    with _common.launching(mean=mean) as arch:
        m, v = as_rows(mean), as_rows(logvar)
        rows, cols = m.shape
        z = m.new_empty(rows, cols)
        work = cut(rows, cols, arch)
        parts = m.new_empty(rows, work.blocks, dtype=torch.float32)
        if z.numel():
            sample_tile[work.grid](
                m, v, z, parts, seed, rows, row_offset, cols, *m.stride(), *v.stride(),
                *bounds(low, high), **work.constants(),
            )
        return z.view(mean.shape), parts.sum(1, dtype=torch.float64).float()


def gaussian_sample_backward(
    d_z: Tensor | None, d_kl: Tensor | None, mean: Tensor, logvar: Tensor, seed: Tensor,
    row_offset: int, low: float, high: float,
) -> tuple[Tensor, Tensor]:
    """Gradients by mean and logvar; the noise is made again.

        d_mean = d_z + d_kl * mean,    d_logvar = (d_z * e * exp(logvar / 2)
                                                   + d_kl * (exp(logvar) - 1)) / 2

    Args:
        d_z, d_kl: as z and kl, any strides; None stands for 0.
        mean, logvar, seed, row_offset, low, high: as for `gaussian_sample`.

    Returns:
        d_mean, d_logvar: contiguous, as `mean`; d_logvar is 0 where logvar is outside.

    Cost: traffic of d_z, the inputs and the results.
    """
    with _common.launching(mean=mean) as arch:
        m, v = as_rows(mean), as_rows(logvar)
        rows, cols = m.shape
        d_mean, d_logvar = m.new_empty(rows, cols), m.new_empty(rows, cols)
        if m.numel():
            g = None if d_z is None else as_rows(d_z)
            work = cut(rows, cols, arch)
            differentiate_tile[work.grid](
                g, d_kl, m, v, d_mean, d_logvar, seed, rows, row_offset, cols,
                *((0, 0) if g is None else g.stride()), 0 if d_kl is None else d_kl.stride(0),
                *m.stride(), *v.stride(), *bounds(low, high), **work.constants(),
            )
        return d_mean.view(mean.shape), d_logvar.view(mean.shape)
