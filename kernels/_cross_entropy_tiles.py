"""The kernels of cross entropies: a tile of logits becomes sums of exponentials, then gradients.

Rows choose among columns; columns among rows too, where there is a `col_side_ptr`. Kernels see
x = <image_i, text_j>, with its sign changed where logit_scale is negative, so that the largest
logit of a row has the largest x; and exp(z - largest z) is exp2((x - largest x) * rate). That
difference is exact where it is small, which `scale * x - largest z` in one FMA is not.
"""

import triton
import triton.language as tl

from tilewise.kernels._contrast import (
    LOWEST,
    SIZES,
    add_exponentials,
    matches,
    part_of_rows,
    sum_per_thread,
    tile_of_dots,
    tiles,
)

# Columns of a side, a (rows or columns of logits, 4) float32 tensor of what is known of each.
LARGEST = tl.constexpr(0)  # x
FACTOR = tl.constexpr(1)  # weight / sum of exp(z - largest); in pass 1 the sum itself
TARGET = tl.constexpr(2)  # of each match
SMOOTH = tl.constexpr(3)  # target of every pair


@triton.jit
def read_side(side_ptr, which: tl.constexpr, i, size, EVEN: tl.constexpr):
    side_ptr += i.to(tl.int64) * 4 + which
    if EVEN:
        return tl.load(side_ptr)
    return tl.load(side_ptr, mask=i < size, other=0.0)


@triton.jit
def x_and_targets(dots, i, j, sign, pairs, sides, EVEN: tl.constexpr, SMOOTHED: tl.constexpr):
    """x, whether pairs match, the target of those that do, and what smoothing adds to all targets.

    Outside LOWEST, no match and nothing.
    """
    rows, cols = pairs[0], pairs[1]
    row_side_ptr, col_side_ptr = sides
    x = dots * sign
    if not EVEN:
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        x = tl.where(inside, x, LOWEST)
    target = read_side(row_side_ptr, TARGET, i, rows, EVEN)[:, None]
    if col_side_ptr is not None:
        target += read_side(col_side_ptr, TARGET, j, cols, EVEN)[None, :]
    smooth = tl.zeros_like(x)
    if SMOOTHED:
        smooth += read_side(row_side_ptr, SMOOTH, i, rows, EVEN)[:, None]
        if col_side_ptr is not None:
            smooth += read_side(col_side_ptr, SMOOTH, j, cols, EVEN)[None, :]
        smooth = smooth if EVEN else tl.where(inside, smooth, 0.0)
    return x, matches(i, j, pairs, EVEN), target, smooth


@triton.jit
def add_logits(
    dots, state, row, col, pairs, operands,
    AT: tl.constexpr, EVEN: tl.constexpr, SMOOTHED: tl.constexpr,
):
    """Stores the columns' part; adds to the rows' largest x and sums, and to those of target * x.

    The state is (TILE_M,) twice and (THREADS,).
    """
    WIDTH: tl.constexpr = dots.shape[1]
    sign, rate, sides, col_parts_ptr, all_of_a_part = operands
    i = row + tl.arange(0, dots.shape[0])
    j = col + AT + tl.arange(0, WIDTH)
    x, match, target, smooth = x_and_targets(dots, i, j, sign, pairs, sides, EVEN, SMOOTHED)
    largest, total, targets = state
    # Neither here nor in the gradients may a logit of -inf make NaN of what has no part in it.
    products = tl.where(match, target * x, 0.0)
    if SMOOTHED:
        products += tl.where(smooth == 0.0, 0.0, smooth * x)
    targets += sum_per_thread(products, targets.shape[0])
    largest, total = add_exponentials(x, largest, total, rate)
    if col_parts_ptr is not None:
        col_parts_ptr += AT + tl.arange(0, WIDTH)
        most = tl.maximum(tl.max(x, 0), LOWEST)
        tl.store(col_parts_ptr, most)
        exponentials = tl.exp2((x - most[None, :]) * rate)
        tl.store(col_parts_ptr + all_of_a_part, tl.sum(exponentials, 0))
    return largest, total, targets


@triton.jit
def store_gradients(
    dots, dz_x, row, col, pairs, operands,
    AT: tl.constexpr, EVEN: tl.constexpr, SMOOTHED: tl.constexpr,
):
    """Stores dz and adds to the sums of dz * x, (THREADS,)."""
    WIDTH: tl.constexpr = dots.shape[1]
    rows, cols = pairs[0], pairs[1]
    sign, rate, sides, grad_ptr = operands
    row_side_ptr, col_side_ptr = sides
    i = row + tl.arange(0, dots.shape[0])
    j = col + AT + tl.arange(0, WIDTH)
    x, match, target, smooth = x_and_targets(dots, i, j, sign, pairs, sides, EVEN, SMOOTHED)
    target = tl.where(match, target, 0.0) + smooth
    largest = read_side(row_side_ptr, LARGEST, i, rows, EVEN)[:, None]
    factor = read_side(row_side_ptr, FACTOR, i, rows, EVEN)[:, None]
    dz = factor * tl.exp2((x - largest) * rate) - target
    if col_side_ptr is not None:
        largest = read_side(col_side_ptr, LARGEST, j, cols, EVEN)[None, :]
        factor = read_side(col_side_ptr, FACTOR, j, cols, EVEN)[None, :]
        dz += factor * tl.exp2((x - largest) * rate)
    grad_ptr += AT + tl.arange(0, WIDTH)[None, :]
    tl.store(grad_ptr, dz.to(grad_ptr.dtype.element_ty))
    return dz_x + sum_per_thread(dz * tl.maximum(x, LOWEST), dz_x.shape[0])


@triton.jit(do_not_specialize=SIZES)
def cross_entropy_sums_tile(
    image_ptr, text_ptr, rows, cols, depth, image_stride, text_stride,  # see `tile_of_dots`
    offset, image_ids_ptr, text_ids_ptr,  # see `matches`
    row_side_ptr, col_side_ptr,  # (rows, 4), (cols, 4) float32; or None, where only rows choose
    scalars_ptr,  # the sign of x, the rate of its exponentials
    sums_ptr,  # (programs,) float32: sums of target * x
    row_parts_ptr,  # (2, tiles in a row, rows rounded up to whole tiles): largest x, sums
    col_parts_ptr,  # (2, tiles in a column, cols rounded up), the same; or None
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    THREADS: tl.constexpr, SMOOTHED: tl.constexpr,
):
    """Pass 1: largest x and sum of exponentials of a tile's rows, and of its columns if asked."""
    row, col, dots = tile_of_dots(
        image_ptr, text_ptr, rows, cols, depth, image_stride, text_stride,
        TILE_M, TILE_N, TILE_K, PRECISION, EVEN, TMA,
    )
    padded_cols = tl.cdiv(cols, TILE_N).to(tl.int64) * TILE_N
    if col_parts_ptr is not None:
        col_parts_ptr += row // TILE_M * padded_cols + col
    largest = tl.full((TILE_M,), LOWEST, tl.float32)
    zeros = tl.zeros((TILE_M,), tl.float32), tl.zeros((THREADS,), tl.float32)
    largest, total, targets = tiles(
        add_logits, dots, (largest, zeros[0], zeros[1]), row, col,
        (rows, cols, offset, image_ids_ptr, text_ids_ptr),
        (
            tl.load(scalars_ptr), tl.load(scalars_ptr + 1), (row_side_ptr, col_side_ptr),
            col_parts_ptr, tl.cdiv(rows, TILE_M) * padded_cols,
        ),
        0, EVEN, SMOOTHED, PIECES,
    )
    row_parts_ptr += part_of_rows(row, col, rows, TILE_M, TILE_N)
    tl.store(row_parts_ptr, largest)
    padded_rows = tl.cdiv(rows, TILE_M).to(tl.int64) * TILE_M
    tl.store(row_parts_ptr + tl.cdiv(cols, TILE_N) * padded_rows, total)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(targets))


@triton.jit(do_not_specialize=SIZES)
def cross_entropy_gradient_tile(
    image_ptr, text_ptr, rows, cols, depth, image_stride, text_stride,
    offset, image_ids_ptr, text_ids_ptr,
    row_side_ptr, col_side_ptr, scalars_ptr,  # all as in pass 1
    sums_ptr,  # (programs,) float32: sums of dz * x
    grad_ptr,  # (rows, cols) rounded up to whole tiles, unit stride in a row
    grad_stride,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    THREADS: tl.constexpr, SMOOTHED: tl.constexpr,
):
    """Pass 2: dz = d(loss)/d(logit) of one tile, in the units of the sides' factors and targets."""
    row, col, dots = tile_of_dots(
        image_ptr, text_ptr, rows, cols, depth, image_stride, text_stride,
        TILE_M, TILE_N, TILE_K, PRECISION, EVEN, TMA,
    )
    i = row + tl.arange(0, TILE_M)
    grad_ptr += i[:, None].to(tl.int64) * grad_stride + col
    dz_x = tiles(
        store_gradients, dots, tl.zeros((THREADS,), tl.float32), row, col,
        (rows, cols, offset, image_ids_ptr, text_ids_ptr),
        (tl.load(scalars_ptr), tl.load(scalars_ptr + 1), (row_side_ptr, col_side_ptr), grad_ptr),
        0, EVEN, SMOOTHED, PIECES,
    )
    tl.store(sums_ptr + tl.program_id(0), tl.sum(dz_x))
