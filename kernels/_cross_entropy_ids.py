"""Cross entropies whose matches are equal ids: how their sides begin."""

import triton
import triton.language as tl

from tilewise.kernels._contrast import of_scale
from tilewise.kernels._cross_entropy_sums import store_side
from tilewise.kernels._finish import matched_rows


@triton.jit
def begin_counted_side(block, count_ptr, side_ptr, weight_ptr, size, weight, target, smooth,
                       BLOCK: tl.constexpr):
    """The state of BLOCK rows before pass 1; `target` is what the matches of a row share."""
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    count = tl.load(count_ptr + i, mask=inside, other=0)
    weight = tl.where(count > 0, weight, 0.0)
    target = target / tl.maximum(count, 1).to(tl.float64)
    store_side(i, inside, side_ptr, weight_ptr, weight, weight * target, weight * smooth)


@triton.jit(do_not_specialize=["rows", "cols", "smoothing"])
def begin_counted_sides(
    scale_ptr, scalars_ptr, unit_ptr,  # see `begin_sides`
    count_ptr,  # (rows + cols,) int32, as `match_ids` has it
    row_side_ptr, row_weight_ptr, col_side_ptr, col_weight_ptr,  # see `begin_sides`
    rows, cols, smoothing,
    WEIGHT: tl.constexpr,  # in kernels' units, of those that weigh most
    BLOCK: tl.constexpr,
):
    """Sides whose matches were counted; a mean runs over those that have a match."""
    program = tl.program_id(0)
    blocks = tl.cdiv(rows, BLOCK)
    of_rows = tl.maximum(matched_rows(count_ptr, rows), 1).to(tl.float64)
    fewest = of_rows
    if col_side_ptr is not None:
        of_cols = tl.maximum(matched_rows(count_ptr + rows, cols), 1).to(tl.float64)
        fewest = tl.minimum(of_rows, of_cols)
    target = 1.0 - smoothing
    if program == 0:
        sign, rate = of_scale(tl.load(scale_ptr))
        tl.store(scalars_ptr, sign)
        tl.store(scalars_ptr + 1, rate)
        sides: tl.constexpr = 1 if col_side_ptr is None else 2
        tl.store(unit_ptr, fewest * WEIGHT * sides)
    elif program <= blocks:
        smooth = smoothing / tl.maximum(cols, 1).to(tl.float64)
        begin_counted_side(program - 1, count_ptr, row_side_ptr, row_weight_ptr, rows,
                           WEIGHT * fewest / of_rows, target, smooth, BLOCK)
    else:
        if col_side_ptr is not None:
            smooth = smoothing / tl.maximum(rows, 1).to(tl.float64)
            begin_counted_side(program - 1 - blocks, count_ptr + rows, col_side_ptr,
                               col_weight_ptr, cols, WEIGHT * fewest / of_cols, target, smooth,
                               BLOCK)
