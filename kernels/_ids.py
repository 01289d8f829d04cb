"""Ids that match where they are equal: numbers for them, and how many matches each has."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # ids of a program that searches sorted ones
FEW = 8192  # up to so many ids every two are compared, which saves two launches and more
COMPARING, COMPARED = 32, 128  # ids of a program, and how many it compares these with at a time


@triton.jit
def first_position(x_ptr, low, high, value, steps, GREATER: tl.constexpr):
    """The first of the sorted x from low to high that is not less than value, or is greater."""
    for _ in range(steps):
        middle = (low + high) // 2
        x = tl.load(x_ptr + middle, mask=low < high, other=0)
        before = (x <= value) if GREATER else (x < value)
        low, high = (
            tl.where((low < high) & before, middle + 1, low),
            tl.where((low < high) & ~before, middle, high),
        )
    return low


@triton.jit(do_not_specialize=["rows", "cols", "steps"])
def match_ids(
    ids_ptr,  # (rows + cols,) int64: of the rows, then of the columns
    sorted_ptr, order_ptr,  # the same, sorted, and where they were: of equal ones rows come first
    number_ptr,  # out: (rows + cols,) int32 >= 0: equal where ids are, and half as long
    count_ptr,  # out: (rows + cols,) int32: how many of the other kind have the same id
    rows, cols,
    steps,  # 2^steps > rows + cols
    BLOCK: tl.constexpr,
):
    """Numbers ids, and counts the matches of each row and column."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < rows + cols
    wanted = tl.load(ids_ptr + i, mask=inside, other=0)
    begin, end = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32) + (rows + cols)
    first = first_position(sorted_ptr, begin, end, wanted, steps, False)
    end = first_position(sorted_ptr, first, end, wanted, steps, True)
    of_cols = first_position(order_ptr, first, end, rows, steps, False)
    tl.store(number_ptr + i, first, mask=inside)
    tl.store(count_ptr + i, tl.where(i < rows, end - of_cols, of_cols - first), mask=inside)


@triton.jit
def id_at(row_ids_ptr, col_ids_ptr, i, rows, cols):
    """The id of row i, or of column i - rows."""
    of_row = tl.load(row_ids_ptr + i, mask=i < rows, other=0)
    of_col = tl.load(col_ids_ptr + (i - rows), mask=(i >= rows) & (i < rows + cols), other=0)
    return tl.where(i < rows, of_row, of_col)


@triton.jit(do_not_specialize=["rows", "cols"])
def match_few_ids(
    row_ids_ptr, col_ids_ptr,  # (rows,) and (cols,) int64
    number_ptr, count_ptr,  # as `match_ids` has them
    rows, cols,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):
    """What `match_ids` does, by comparing every two: of few ids sooner than they are sorted."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wanted = id_at(row_ids_ptr, col_ids_ptr, i, rows, cols)
    first = tl.full((BLOCK,), 2147483647, tl.int32)
    in_rows, in_cols = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, rows + cols, STEP):
        j = begin + tl.arange(0, STEP)
        other = id_at(row_ids_ptr, col_ids_ptr, j, rows, cols)
        same = (wanted[:, None] == other[None, :]) & (j < rows + cols)[None, :]
        first = tl.minimum(first, tl.min(tl.where(same, j[None, :], 2147483647), 1))
        in_rows += tl.sum((same & (j < rows)[None, :]).to(tl.int32), 1)
        in_cols += tl.sum((same & (j >= rows)[None, :]).to(tl.int32), 1)
    inside = i < rows + cols
    tl.store(number_ptr + i, first, mask=inside)
    tl.store(count_ptr + i, tl.where(i < rows, in_cols, in_rows), mask=inside)


def matched_ids(row_ids: Tensor, col_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (rows + cols,) of ids, equal where these are, and how many matches each has."""
    rows, cols = len(row_ids), len(col_ids)
    numbers, counts = (row_ids.new_empty(rows + cols, dtype=torch.int32) for _ in range(2))
    if rows + cols <= FEW:
        match_few_ids[(max(triton.cdiv(rows + cols, COMPARING), 1),)](
            row_ids.contiguous(), col_ids.contiguous(), numbers, counts, rows, cols,
            BLOCK=COMPARING, STEP=COMPARED,
        )
    else:
        ids = torch.cat([row_ids, col_ids])
        known, order = ids.sort(stable=True)
        match_ids[(triton.cdiv(rows + cols, BLOCK),)](
            ids, known, order, numbers, counts, rows, cols, len(ids).bit_length(), BLOCK=BLOCK
        )
    return numbers, counts


def renumber(row_ids: Tensor, col_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same equalities in int32 numbers from 0, which take half the registers."""
    numbers, _ = matched_ids(row_ids, col_ids)
    return numbers[: len(row_ids)], numbers[len(row_ids) :]
