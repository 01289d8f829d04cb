"""Gumbel-softmax in Triton: noise is made in registers, and a row is read and written once.

A program holds whole rows, see `_short_rows`. Of a row too wide for registers each block has a
program, in two launches: the first measures blocks, the second, whose programs merge that, makes
the noise again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels import _common, _philox, _rows, _short_rows

LONGEST_WITH_TAU = 4096  # columns: what the gradient by tau needs lies in registers beside the rest

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
def perturbed_pieces(
    x_ptr, seed, at, row_offset, row_stride, col_stride, COLS: tl.constexpr, UNIT: tl.constexpr,
):
    """The same of pieces of rows: see `_short_rows`."""
    x = _short_rows.load(x_ptr, at, row_stride, col_stride, float("-inf"), COLS, UNIT)
    return x + _philox.gumbel_pieces(seed, at[0] + row_offset, at[1], COLS)


@triton.jit
def relaxed(z, tau, at):
    """softmax(z / tau) of whole rows."""
    p = tl.exp2((z - _short_rows.of_rows(z, at, "max")[:, None]) * sharpness(tau))
    return p * tl.div_rn(1.0, _short_rows.of_rows(p, at, "sum"))[:, None]


@triton.jit
def one_hot(z, at, cols):
    """1 at each row's first maximum; rows that have no softmax are NaN."""
    col = _short_rows.columns(at, z.shape[1])
    below = z - _short_rows.of_rows(z, at, "max")[:, None]
    # NaN where z is, and where the maximum is infinite
    place = tl.where(below == 0, col, tl.where(below == below, cols, -1))
    first = _short_rows.of_rows(place, at, "min")[:, None]
    return tl.where(first < 0, float("nan"), tl.where(col == first, 1.0, 0.0))


# Sizes are not specialised on: every batch runs the same binary, of whatever width.
@triton.jit(do_not_specialize=["rows", "row_offset", "cols", "row_stride"])
def sample_rows(
    x_ptr,  # (rows, cols) logits
    y_ptr,  # out: (rows, cols), contiguous
    tau_ptr, seed_ptr,  # one float32, one int64
    rows: tl.int64, row_offset: tl.int64,
    cols, row_stride,  # in UNITs
    col_stride,
    HARD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr,
):
    """A sample of each row that a tile holds."""
    cols, row_stride = cols * UNIT, row_stride * UNIT
    at = _short_rows.place(rows, cols, ROWS, COLS)
    tau = tl.load(tau_ptr)
    z = perturbed_pieces(
        x_ptr, tl.load(seed_ptr), at, row_offset, row_stride, col_stride, COLS, UNIT
    )
    if HARD:
        y = one_hot(z, at, cols)
    else:
        if tau == 0:
            y = one_hot(z, at, cols)
        else:
            y = relaxed(z, tau, at)
    _short_rows.store(y_ptr, at, cols, y, COLS, UNIT)


@triton.jit
def first_maximum(
    x_ptr, seed, row, row_offset, rows, cols, row_stride, col_stride, COLS: tl.constexpr,
):
    """Of a row of any width: its largest value, where that is first, whether any is NaN: (1,)."""
    top = tl.full((1,), float("-inf"), tl.float32)
    index = tl.zeros((1,), tl.int64)
    nan = tl.zeros((1,), tl.int32)
    for first in range(0, cols, COLS):
        z = perturbed(
            x_ptr, seed, row, row_offset, first, rows, cols, row_stride, col_stride, COLS,
        )
        nan = tl.maximum(nan, tl.max(tl.where(z == z, 0, 1), 1))
        z = tl.where(z == z, z, float("-inf"))  # never wins
        best = tl.max(z, 1)
        col = first + tl.arange(0, COLS)
        at = tl.min(tl.where(z == best[:, None], col[None, :], cols), 1)
        index = tl.where(best > top, at.to(tl.int64), index)
        top = tl.maximum(top, best)
    return top, index, nan


@triton.jit
def mark_maximum(
    x_ptr, y_ptr, seed, row, row_offset, rows, cols, row_stride, col_stride, COLS: tl.constexpr,
):
    """One-hot vector of a row of any width."""
    top, index, nan = first_maximum(
        x_ptr, seed, row, row_offset, rows, cols, row_stride, col_stride, COLS,
    )
    one = tl.where((nan != 0) | (tl.abs(top) == float("inf")), float("nan"), 1.0)
    zero = tl.where(one == one, 0.0, one)
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        y = tl.where(col[None, :] == index[:, None], one[:, None], zero[:, None])
        _rows.store_tile(y_ptr, row, col, rows, cols, y)


@triton.jit(do_not_specialize=["rows", "row_offset"])
def sample_halved_row(
    x_ptr, y_ptr, tau_ptr, seed_ptr,
    rows: tl.int64, row_offset: tl.int64, cols, row_stride, col_stride,
    COLS: tl.constexpr,
):
    """A relaxed sample of one row of up to 2 * COLS columns.

    The maximum of one half is known before the other half's noise is made: that keeps the compiler
    from making both at once, and so from spilling.
    """
    row = _rows.row_numbers(1)
    seed = tl.load(seed_ptr)
    tau = tl.load(tau_ptr)
    if tau == 0:  # in small blocks: what is rare may not set the number of registers
        mark_maximum(
            x_ptr, y_ptr, seed, row, row_offset, rows, cols, row_stride, col_stride, COLS // 8,
        )
    else:
        a = perturbed(x_ptr, seed, row, row_offset, 0, rows, cols, row_stride, col_stride, COLS)
        top = tl.max(a, 1)
        b = perturbed(x_ptr, seed, row, row_offset, COLS, rows, cols, row_stride, col_stride, COLS)
        top = tl.maximum(top, tl.max(b, 1))[:, None]
        scale = sharpness(tau)
        a = tl.exp2((a - top) * scale)
        b = tl.exp2((b - top) * scale)
        factor = tl.div_rn(1.0, tl.sum(a, 1) + tl.sum(b, 1))[:, None]
        col = tl.arange(0, COLS)
        _rows.store_tile(y_ptr, row, col, rows, cols, a * factor)
        _rows.store_tile(y_ptr, row, COLS + col, rows, cols, b * factor)


@triton.jit
def sensitivities(y, dy, inner):
    """-d(y) / d(log tau) * dy, of which 0 * log(0) is 0, as y."""
    return y * (inner - dy) * _philox.log(tl.where(y < SMALLEST, SMALLEST, y))


@triton.jit
def sensitivity(y, dy, inner):
    """Sums over columns of -d(y) / d(log tau) * dy, of which 0 * log(0) is 0: (ROWS,)."""
    return tl.sum(sensitivities(y, dy, inner[:, None]), 1)


@triton.jit(do_not_specialize=["rows", "row_offset", "cols", "grad_stride", "row_stride"])
def differentiate_rows(
    grad_ptr,  # (rows, cols) by y
    saved_ptr,  # (rows, cols): y, or logits if HARD
    out_ptr,  # out: (rows, cols), contiguous, by the logits
    part_ptr,  # out: (rows,) float32 by tau, if NEED_TAU
    tau_ptr, seed_ptr,
    rows: tl.int64, row_offset: tl.int64, cols, grad_stride, row_stride, grad_col, col_stride,
    HARD: tl.constexpr, NEED_TAU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Gradients of each row that a tile holds."""
    cols, grad_stride, row_stride = cols * UNIT, grad_stride * UNIT, row_stride * UNIT
    at = _short_rows.place(rows, cols, ROWS, COLS)
    tau = tl.load(tau_ptr)
    if HARD:
        z = perturbed_pieces(
            saved_ptr, tl.load(seed_ptr), at, row_offset, row_stride, col_stride, COLS, UNIT
        )
        y = relaxed(z, tau, at)
    else:
        y = _short_rows.load(saved_ptr, at, row_stride, col_stride, 0.0, COLS, UNIT)
    dy = _short_rows.load(grad_ptr, at, grad_stride, grad_col, 0.0, COLS, UNIT)
    inner = _short_rows.of_rows(y * dy, at, "sum")[:, None]
    factor = inverse(tau)
    _short_rows.store(out_ptr, at, cols, y * (dy - inner) * factor, COLS, UNIT)
    if NEED_TAU:
        part = _short_rows.of_rows(sensitivities(y, dy, inner), at, "sum")
        tl.store(part_ptr + at[0], part * factor, mask=_short_rows.first_pieces(at))


def _blocks():
    """Where kernels of wide rows are, which are made of what is here."""
    from tilewise.kernels import _gumbel_blocks

    return _gumbel_blocks


def gumbel_softmax(
    logits: Tensor, tau: Tensor, seed: Tensor, row_offset: int, dim: int, hard: bool
) -> Tensor:
    """A relaxed sample of the categorical distribution of the logits, or a one-hot one.

        y = softmax((logits + g) / tau) along dim

    Args:
        logits: any shape, float16, bfloat16 or float32, any strides.
        tau, seed: one float32, one int64, on the device.
        row_offset: the number of the first row.

    Returns:
        y as the logits, contiguous. Equal bits on every run.

    Cost: traffic of the logits and of y; of a relaxed row beyond 2 * _rows.LONGEST columns, of the
    logits twice.
    """
    with _common.launching(logits=logits) as arch:
        x = _rows.as_rows(logits, dim)
        rows, cols = x.shape
        y = x.new_empty(rows, cols)
        tile = _short_rows.choose_tile(rows, cols, x.stride()[:1], arch)
        half = _rows.longest(cols if x.stride(0) % 16 == 0 else 1)
        if tile is not None and y.numel():
            sample_rows[(tile.programs,)](
                x, y, tau, seed, rows, row_offset, *tile.units(cols, x.stride(0)), x.stride(1),
                HARD=hard, **tile.constants(),
            )
        elif y.numel() and not hard and cols <= 2 * half:
            wide = _rows.choose_tile(cols, arch, half)
            sample_halved_row[(rows,)](
                x, y, tau, seed, rows, row_offset, cols, *x.stride(), COLS=wide.cols,
                num_warps=wide.warps,
            )
        elif y.numel():
            wide = _rows.choose_tile(cols, arch, _rows.BLOCK)
            _blocks().sample(x, y, tau, seed, row_offset, hard, wide)
        return _rows.from_rows(y, logits, dim)


def gumbel_softmax_backward(
    grad: Tensor, saved: Tensor, tau: Tensor, seed: Tensor, row_offset: int, dim: int, hard: bool,
    need_tau: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of a relaxed sample y, also where the one-hot one was returned.

        d_logits = y * (grad - <y, grad>) / tau,    d_tau = -sum(d_logits * log(y))

    Args:
        grad: as y, any strides.
        saved: y, or with `hard` the logits, from which y is made again.
        tau, seed, row_offset, dim: as for `gumbel_softmax`. At tau = 0 gradients are 0.

    Returns:
        d_logits, contiguous, as `saved`; d_tau () float32, empty if not needed. Equal bits on every
        run.

    Cost: traffic of the three, beyond LONGEST_WITH_TAU columns or _rows.LONGEST of the first two
    twice.
    """
    with _common.launching(saved=saved) as arch:
        x, dy = _rows.as_rows(saved, dim), _rows.as_rows(grad, dim)
        rows, cols = x.shape
        out = x.new_empty(rows, cols)
        strides = dy.stride(0), x.stride(0)
        tile = _short_rows.choose_tile(rows, cols, strides, arch)
        if need_tau and cols > LONGEST_WITH_TAU:
            tile = None
        blocks = 1 if tile is not None else triton.cdiv(cols, _rows.BLOCK)
        parts = x.new_zeros(rows * blocks if need_tau else 0, dtype=torch.float32)
        if tile is not None and out.numel():
            differentiate_rows[(tile.programs,)](
                dy, x, out, parts, tau, seed, rows, row_offset, *tile.units(cols, *strides),
                dy.stride(1), x.stride(1), HARD=hard, NEED_TAU=need_tau, **tile.constants(),
            )
        elif out.numel():
            wide = _rows.choose_tile(cols, arch, _rows.BLOCK)
            of_tau = parts if need_tau else None
            _blocks().differentiate(dy, x, out, of_tau, tau, seed, row_offset, hard, wide)
        d_tau = parts.sum(dtype=torch.float64).to(tau.dtype) if need_tau else tau.new_empty(0)
        return _rows.from_rows(out, saved, dim), d_tau
