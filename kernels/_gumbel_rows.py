"""Rows of logits with Gumbel noise, and what a temperature makes of them."""

import triton
import triton.language as tl

from tilewise.kernels import _philox, _rows

# Float32's. A running maximum begins at the lowest, from which -inf is -inf away, and not NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # of those that have full precision


@triton.jit
def perturbed(
    x_ptr, seed, row, row_offset, first, rows, cols, row_stride, col_stride, COLS: tl.constexpr,
):
    """float32(x + g) of columns first to first + COLS - 1: (ROWS, COLS), -inf outside."""
    col = first + tl.arange(0, COLS)
    x = _rows.load_tile(x_ptr, row, col, rows, cols, row_stride, col_stride, float("-inf"))
    return x + _philox.gumbel_tile(seed, row + row_offset, first, COLS)


@triton.jit
def sharpness(tau):
    """log2(e) / tau; finite and positive, so that it times 0 is 0, and times -inf is -inf."""
    scale = tl.div_rn(1.4426950408889634, tau)
    scale = tl.where(scale > -LOWEST, -LOWEST, scale)
    return tl.where(scale < SMALLEST, SMALLEST, scale)


@triton.jit
def inverse(tau):
    """1 / tau; 0 for 0, where a sample does not change with anything, and never infinite."""
    factor = tl.div_rn(1.0, tau)
    factor = tl.where(factor > -LOWEST, -LOWEST, factor)
    return tl.where(tau == 0, 0.0, factor)


@triton.jit
def sensitivity(y, dy, inner):
    """Sums over columns of -d(y) / d(log tau) * dy, of which 0 * log(0) is 0: (ROWS,)."""
    return -tl.sum(y * (dy - inner[:, None]) * _philox.log(tl.where(y < SMALLEST, SMALLEST, y)), 1)
