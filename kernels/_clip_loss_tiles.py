"""The kernels of clip_loss: a tile of logits becomes sums of exponentials, then gradients.

They see x = <image_i, text_j>, with its sign changed where logit_scale is negative, so that the
largest logit of a row has the largest x; and exp(z - largest z) is exp2((x - largest x) * rate).
That difference is exact where it is small, which `scale * x - largest z` in one FMA is not.
"""

import triton
import triton.language as tl

from tilewise.kernels._contrast import (
    LOWEST,
    add_exponentials,
    sum_per_thread,
    tile_corner,
    tile_of_dots,
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
def x_and_targets(dots, i, j, pairs, SMOOTHED: tl.constexpr, EVEN: tl.constexpr, IDS: tl.constexpr):
    """x, the targets of matches and the smooth targets of all pairs; outside LOWEST, 0 and 0."""
    rows, cols, sign, diagonal, image_ids_ptr, text_ids_ptr, images_ptr, texts_ptr = pairs
    if IDS:
        match = tl.load(image_ids_ptr + i, mask=i < rows, other=-1)
        label = tl.load(text_ids_ptr + j, mask=j < cols, other=-2)
    else:
        match = i + diagonal
        label = j
    x = dots * sign
    if not EVEN:
        match = tl.where(i < rows, match, -1)
        label = tl.where(j < cols, label, -(2**31))
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        x = tl.where(inside, x, LOWEST)
    target = read_side(images_ptr, TARGET, i, rows, EVEN)[:, None]
    target += read_side(texts_ptr, TARGET, j, cols, EVEN)[None, :]
    target = tl.where(match[:, None] == label[None, :], target, 0.0)
    if SMOOTHED:
        smooth = read_side(images_ptr, SMOOTH, i, rows, EVEN)[:, None]
        smooth += read_side(texts_ptr, SMOOTH, j, cols, EVEN)[None, :]
        target += smooth if EVEN else tl.where(inside, smooth, 0.0)
    return x, target


@triton.jit
def add_logits(
    dots,  # (TILE_M, WIDTH) float32
    state,  # (TILE_M,) largest x and sum of exponentials, (THREADS,) sum of target * x
    cols_ptr, cols_stride,  # where the largest x of the first column goes, and then the sum
    row, col,  # of the first element of `dots`
    pairs, rate,
    SMOOTHED: tl.constexpr, EVEN: tl.constexpr, IDS: tl.constexpr, PIECES: tl.constexpr,
):
    """Stores the columns' part and adds to the rows', a piece of columns at a time."""
    TILE_M: tl.constexpr = dots.shape[0]
    WIDTH: tl.constexpr = dots.shape[1]
    if PIECES > 1:
        HALF: tl.constexpr = WIDTH // 2
        left, right = tl.split(dots.reshape(TILE_M, 2, HALF).permute(0, 2, 1))
        state = add_logits(
            left, state, cols_ptr, cols_stride, row, col, pairs, rate,
            SMOOTHED, EVEN, IDS, PIECES // 2,
        )
        state = add_logits(
            right, state, cols_ptr + HALF, cols_stride, row, col + HALF, pairs, rate,
            SMOOTHED, EVEN, IDS, PIECES // 2,
        )
    elif col < pairs[1]:  # a branch also keeps the compiler from mixing pieces
        i = row + tl.arange(0, TILE_M)
        j = col + tl.arange(0, WIDTH)
        x, target = x_and_targets(dots, i, j, pairs, SMOOTHED, EVEN, IDS)
        largest, total, targets = state
        THREADS: tl.constexpr = targets.shape[0]
        targets += sum_per_thread(target * x, THREADS)
        largest, total = add_exponentials(x, largest, total, rate)
        most = tl.max(x, 0)
        most_ptr = cols_ptr + tl.arange(0, WIDTH)
        tl.store(most_ptr, most)
        tl.store(most_ptr + cols_stride, tl.sum(tl.exp2((x - most[None, :]) * rate), 0))
        state = (largest, total, targets)
    return state


@triton.jit
def add_gradients(
    dots,  # (TILE_M, WIDTH) float32
    dz_x,  # (THREADS,) sum of dz * x
    grad_ptr,  # (TILE_M, 1): where the first column of dz goes
    row, col,  # of the first element of `dots`
    pairs, rate,
    SMOOTHED: tl.constexpr, EVEN: tl.constexpr, IDS: tl.constexpr, PIECES: tl.constexpr,
):
    """Stores dz and adds to the sum, a piece of columns at a time."""
    TILE_M: tl.constexpr = dots.shape[0]
    WIDTH: tl.constexpr = dots.shape[1]
    if PIECES > 1:
        HALF: tl.constexpr = WIDTH // 2
        left, right = tl.split(dots.reshape(TILE_M, 2, HALF).permute(0, 2, 1))
        dz_x = add_gradients(
            left, dz_x, grad_ptr, row, col, pairs, rate, SMOOTHED, EVEN, IDS, PIECES // 2
        )
        dz_x = add_gradients(
            right, dz_x, grad_ptr + HALF, row, col + HALF, pairs, rate,
            SMOOTHED, EVEN, IDS, PIECES // 2,
        )
    elif col < pairs[1]:
        i = row + tl.arange(0, TILE_M)
        j = col + tl.arange(0, WIDTH)
        rows, cols, _, _, _, _, images_ptr, texts_ptr = pairs
        x, target = x_and_targets(dots, i, j, pairs, SMOOTHED, EVEN, IDS)
        largest = read_side(images_ptr, LARGEST, i, rows, EVEN)[:, None]
        factor = read_side(images_ptr, FACTOR, i, rows, EVEN)[:, None]
        dz = factor * tl.exp2((x - largest) * rate) - target
        largest = read_side(texts_ptr, LARGEST, j, cols, EVEN)[None, :]
        factor = read_side(texts_ptr, FACTOR, j, cols, EVEN)[None, :]
        dz += factor * tl.exp2((x - largest) * rate)
        tl.store(grad_ptr + tl.arange(0, WIDTH)[None, :], dz.to(grad_ptr.dtype.element_ty))
        THREADS: tl.constexpr = dz_x.shape[0]
        dz_x += sum_per_thread(dz * x, THREADS)
    return dz_x


# Sizes are not specialised on: every batch runs the same binary.
SIZES = ["rows", "cols", "diagonal"]


@triton.jit(do_not_specialize=SIZES)
def clip_sums_tile(
    image_ptr,  # (rows, depth), unit stride in a row; if TMA, a descriptor of it
    text_ptr,  # (cols, depth), the same
    images_ptr, texts_ptr,  # the sides, (rows, 4), (cols, 4) float32
    scalars_ptr,  # the sign of x, the rate of its exponentials
    rows, cols, depth, image_stride, text_stride,
    diagonal,  # row i matches column i + diagonal
    image_ids_ptr, text_ids_ptr,  # (rows,), (cols,) int32 >= 0: if IDS, equal ones match instead
    row_parts_ptr,  # (2, tiles in a row, rows rounded up to whole tiles): largest x, sums
    col_parts_ptr,  # (2, tiles in a column, cols rounded up), the same
    sums_ptr,  # (programs,) float32: sums of target * x
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PIECES: tl.constexpr,
    THREADS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    TMA: tl.constexpr, IDS: tl.constexpr, SMOOTHED: tl.constexpr,
):
    """Pass 1: largest x and sum of exponentials of a tile's rows and of its columns."""
    row, col = tile_corner(rows, cols, TILE_M, TILE_N, GROUP)
    dots = tile_of_dots(
        image_ptr, text_ptr, row, col, rows, cols, depth, image_stride, text_stride,
        TILE_M, TILE_N, TILE_K, PRECISION, EVEN, TMA,
    )
    pairs = (
        rows, cols, tl.load(scalars_ptr), diagonal, image_ids_ptr, text_ids_ptr,
        images_ptr, texts_ptr,
    )
    padded_rows = tl.cdiv(rows, TILE_M).to(tl.int64) * TILE_M
    padded_cols = tl.cdiv(cols, TILE_N).to(tl.int64) * TILE_N
    state = (
        tl.full((TILE_M,), LOWEST, tl.float32), tl.zeros((TILE_M,), tl.float32),
        tl.zeros((THREADS,), tl.float32),
    )
    largest, total, targets = add_logits(
        dots, state, col_parts_ptr + row // TILE_M * padded_cols + col,
        tl.cdiv(rows, TILE_M) * padded_cols, row, col, pairs, tl.load(scalars_ptr + 1),
        SMOOTHED, EVEN, IDS, PIECES,
    )
    row_parts_ptr += col // TILE_N * padded_rows + row + tl.arange(0, TILE_M)
    tl.store(row_parts_ptr, largest)
    tl.store(row_parts_ptr + tl.cdiv(cols, TILE_N) * padded_rows, total)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(targets))


@triton.jit(do_not_specialize=SIZES)
def clip_gradient_tile(
    image_ptr, text_ptr, images_ptr, texts_ptr, scalars_ptr,
    rows, cols, depth, image_stride, text_stride,
    diagonal, image_ids_ptr, text_ids_ptr,  # all as in pass 1
    grad_ptr,  # (rows, cols) rounded up to whole tiles, unit stride in a row
    grad_stride,
    sums_ptr,  # (programs,) float32: sums of dz * x
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PIECES: tl.constexpr,
    THREADS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    TMA: tl.constexpr, IDS: tl.constexpr, SMOOTHED: tl.constexpr,
):
    """Pass 2: dz = d(loss)/d(logit) of one tile, in the units of the sides' factors and targets."""
    row, col = tile_corner(rows, cols, TILE_M, TILE_N, GROUP)
    dots = tile_of_dots(
        image_ptr, text_ptr, row, col, rows, cols, depth, image_stride, text_stride,
        TILE_M, TILE_N, TILE_K, PRECISION, EVEN, TMA,
    )
    pairs = (
        rows, cols, tl.load(scalars_ptr), diagonal, image_ids_ptr, text_ids_ptr,
        images_ptr, texts_ptr,
    )
    i = row + tl.arange(0, TILE_M)
    grad_ptr += i[:, None].to(tl.int64) * grad_stride + col
    dz_x = add_gradients(
        dots, tl.zeros((THREADS,), tl.float32), grad_ptr, row, col, pairs,
        tl.load(scalars_ptr + 1), SMOOTHED, EVEN, IDS, PIECES,
    )
    tl.store(sums_ptr + tl.program_id(0), tl.sum(dz_x))
