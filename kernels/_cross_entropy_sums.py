"""Cross entropies between their passes: sides begin, parts are merged, results are finished.

Each is one small launch, and every sum has an order that depends on sizes alone.
"""

import triton
import triton.language as tl

from tilewise.kernels._contrast import LOWEST, of_scale, with_parts
from tilewise.kernels._cross_entropy_tiles import FACTOR, LARGEST, SMOOTH, TARGET
from tilewise.kernels._finish import scale_one, total

BLOCK = 128  # rows or columns of a program
PARTS = 16  # of them at a time


@triton.jit
def store_side(i, inside, side_ptr, weight_ptr, weight, target, smooth):
    """What is known of rows before pass 1: their weights, and nothing of their exponentials."""
    tl.store(weight_ptr + i, weight.to(tl.float64), mask=inside)
    side_ptr += i.to(tl.int64) * 4
    tl.store(side_ptr + LARGEST, tl.full(i.shape, LOWEST, tl.float32), mask=inside)
    tl.store(side_ptr + FACTOR, tl.zeros(i.shape, tl.float32), mask=inside)
    tl.store(side_ptr + TARGET, target.to(tl.float32), mask=inside)
    tl.store(side_ptr + SMOOTH, smooth.to(tl.float32), mask=inside)


@triton.jit
def begin_side(block, side_ptr, weight_ptr, size, others, offset, weight, target, smooth,
               BLOCK: tl.constexpr):
    """The state of BLOCK rows before pass 1; row i has a match if there is another i + offset."""
    i = block * BLOCK + tl.arange(0, BLOCK)
    matched = (i + offset >= 0) & (i + offset < others)
    inside = i < size
    weight, target = tl.where(matched, weight, 0.0), tl.where(matched, target, 0.0)
    store_side(i, inside, side_ptr, weight_ptr, weight, target, tl.where(matched, smooth, 0.0))


@triton.jit(do_not_specialize=["rows", "cols", "offset", "pairs", "target", "row_smooth",
                               "col_smooth"])
def begin_sides(
    scale_ptr,  # one float32
    scalars_ptr,  # out: the sign of x, the rate of its exponentials, float32
    unit_ptr,  # out: one float64, what weights are multiplied by
    row_side_ptr, row_weight_ptr,  # out: (rows, 4) float32, (rows,) float64
    col_side_ptr, col_weight_ptr,  # out, of the columns; or None
    rows, cols, offset, pairs,  # how many rows have a match
    target, row_smooth, col_smooth,  # times the weight: of a match, of every pair
    WEIGHT: tl.constexpr,  # in kernels' units, of each that has a match
    UNIT: tl.constexpr,  # by the number of pairs
    BLOCK: tl.constexpr,
):
    """Sides whose matches are an offset's: nothing has to be counted."""
    program = tl.program_id(0)
    blocks = tl.cdiv(rows, BLOCK)
    if program == 0:
        sign, rate = of_scale(tl.load(scale_ptr))
        tl.store(scalars_ptr, sign)
        tl.store(scalars_ptr + 1, rate)
        tl.store(unit_ptr, pairs.to(tl.float64) * UNIT)
    elif program <= blocks:
        begin_side(program - 1, row_side_ptr, row_weight_ptr, rows, cols, offset, WEIGHT, target,
                   row_smooth, BLOCK)
    else:
        if col_side_ptr is not None:
            begin_side(program - 1 - blocks, col_side_ptr, col_weight_ptr, cols, rows, -offset,
                       WEIGHT, target, col_smooth, BLOCK)


@triton.jit
def merge_side(
    block, side_ptr, weight_ptr, log_ptr, parts_ptr, size, padded, parts, last, rate, scale,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):
    """Merges BLOCK columns of parts; with the last ones FACTOR becomes a factor."""
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    side_ptr += i.to(tl.int64) * 4
    largest = tl.load(side_ptr + LARGEST, mask=inside, other=LOWEST)
    exponentials = tl.load(side_ptr + FACTOR, mask=inside, other=0.0)
    largest, exponentials = with_parts(
        largest, exponentials, parts_ptr, i, inside, padded, parts, rate, PARTS
    )
    tl.store(side_ptr + LARGEST, largest, mask=inside)
    logs = tl.zeros((BLOCK,), tl.float64)
    if last != 0:
        weight = tl.load(weight_ptr + i, mask=inside, other=0.0)
        exact = exponentials.to(tl.float64)
        logs = weight * (scale * largest.to(tl.float64) + tl.log(exact))
        logs = tl.where(weight != 0, logs, 0.0)
        exponentials = tl.where(weight != 0, weight / exact, 0.0).to(tl.float32)
    tl.store(log_ptr + i, logs, mask=inside)
    tl.store(side_ptr + FACTOR, exponentials, mask=inside)


@triton.jit(do_not_specialize=[
    "rows", "cols", "row_parts", "col_parts", "padded_rows", "padded_cols", "last_rows",
    "last_cols",
])
def merge_sums(
    scale_ptr, scalars_ptr,  # one float32; sign and rate
    # Of the chunk: its sides, weights and, out with the last parts, weighted logarithms, float64.
    row_side_ptr, row_weight_ptr, row_log_ptr,
    col_side_ptr, col_weight_ptr, col_log_ptr,  # or None
    row_parts_ptr, col_parts_ptr,  # as pass 1 stores them
    rows, cols, row_parts, col_parts, padded_rows, padded_cols,
    last_rows, last_cols,  # whether these are the last parts of the chunk's rows, of its columns
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):
    """Merges a chunk's largest x and sums of exponentials with those of the chunks before."""
    program = tl.program_id(0)
    blocks = tl.cdiv(rows, BLOCK)
    rate = tl.load(scalars_ptr + 1)
    scale = tl.abs(tl.load(scale_ptr).to(tl.float64))
    if program < blocks:
        merge_side(
            program, row_side_ptr, row_weight_ptr, row_log_ptr, row_parts_ptr, rows, padded_rows,
            row_parts, last_rows, rate, scale, BLOCK, PARTS,
        )
    else:
        if col_side_ptr is not None:
            merge_side(
                program - blocks, col_side_ptr, col_weight_ptr, col_log_ptr, col_parts_ptr, cols,
                padded_cols, col_parts, last_cols, rate, scale, BLOCK, PARTS,
            )


@triton.jit(do_not_specialize=["rows", "cols", "targets", "programs", "image_rows", "text_rows"])
def finish_cross_entropy(
    scale_ptr, scalars_ptr, unit_ptr,
    row_log_ptr, rows, col_log_ptr, cols,  # (rows,) float64 and (cols,) or None, as merge_sums has
    targets_ptr, targets,  # (targets,) float32: of target * x
    dz_x_ptr, programs,  # (programs,) float32: of dz * x
    loss_ptr, d_scale_ptr,  # out: one float32 each; or None
    # Both gradients by features, without a factor; and out, with it. See `Gradients`.
    image_ptr, image_out_ptr, image_rows, text_ptr, text_out_ptr, text_rows, stride, depth,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Adds up what the passes left, and scales gradients by logit_scale / unit."""
    program = tl.program_id(0)
    scale = tl.load(scale_ptr).to(tl.float64)
    unit = tl.load(unit_ptr)
    if program == 0:
        if loss_ptr is not None:
            loss = total(row_log_ptr, rows, 1)
            if col_log_ptr is not None:
                loss += total(col_log_ptr, cols, 1)
            loss -= total(targets_ptr, targets, 1) * tl.abs(scale)
            tl.store(loss_ptr, (loss / unit).to(tl.float32))
        if d_scale_ptr is not None:
            sign = tl.load(scalars_ptr).to(tl.float64)
            d_scale = total(dz_x_ptr, programs, 1) * sign / unit
            tl.store(d_scale_ptr, d_scale.to(tl.float32))
    else:
        gradients = (
            image_ptr, image_out_ptr, image_rows, text_ptr, text_out_ptr, text_rows, stride,
        )
        factor = (scale / unit).to(tl.float32)
        scale_one(program - 1, gradients, depth, factor, ROWS, COLS)
