"""Sampling by the largest perturbed logits in Triton: a row is read, and indices are written.

k indices are found one after another among registers. Where that is too many passes, or a row is
wider than a tile, rows of perturbed logits are stored, a bounded number at a time, and sorted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels import _common, _philox, _rows
from tilewise.kernels.gumbel_softmax import LOWEST, first_maximum, perturbed

SELECTED = 32  # up to so many indices are found among registers
CHUNK_BYTES = 64 << 20  # workspace: perturbed logits of some rows; sorting them takes five times it


# Rows are not specialised on: every batch runs the same binary. k = 1 is.
@triton.jit(do_not_specialize=["rows", "row_offset"])
def select_from_rows(
    x_ptr,  # (rows, cols) logits
    index_ptr,  # out: (rows, k) int64
    seed_ptr,  # one int64
    rows: tl.int64, row_offset: tl.int64, cols, row_stride, col_stride, k,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """The k largest of each of ROWS rows, in order, the first ones of equals first."""
    row = _rows.row_numbers(ROWS)
    col = tl.arange(0, COLS)[None, :]
    z = perturbed(
        x_ptr, tl.load(seed_ptr), row, row_offset, 0, rows, cols, row_stride, col_stride, COLS,
    )
    z = tl.where(z == z, z, float("-inf"))  # NaN never wins
    top = tl.max(z, 1)[:, None]
    index = tl.min(tl.where(z == top, col, cols), 1)[:, None]
    out = index_ptr + row[:, None] * k
    tl.store(out, index.to(tl.int64), mask=(row < rows)[:, None])
    for i in range(1, k):
        later = (z < top) | ((z == top) & (col > index))
        top = tl.max(tl.where(later, z, float("-inf")), 1)[:, None]
        index = tl.min(tl.where(later & (z == top), col, cols), 1)[:, None]
        tl.store(out + i, index.to(tl.int64), mask=(row < rows)[:, None])


@triton.jit(do_not_specialize=["rows", "row_offset"])
def select_from_wide_row(
    x_ptr, index_ptr, seed_ptr,
    rows: tl.int64, row_offset: tl.int64, cols, row_stride, col_stride,
    COLS: tl.constexpr,
):
    """The largest of one row of any width: index_ptr is (rows,)."""
    row = _rows.row_numbers(1)
    _, index, _ = first_maximum(
        x_ptr, tl.load(seed_ptr), row, row_offset, rows, cols, row_stride, col_stride, COLS,
    )
    tl.store(index_ptr + row, index)


@triton.jit(do_not_specialize=["rows", "row_offset"])
def perturb_tile(
    x_ptr, z_ptr, seed_ptr,
    rows: tl.int64, row_offset: tl.int64, cols, row_stride, col_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Stores perturbed logits, NaN as -inf: z_ptr is (rows, cols) float32, contiguous."""
    row = _rows.row_numbers(ROWS)
    first = tl.program_id(1) * COLS
    z = perturbed(
        x_ptr, tl.load(seed_ptr), row, row_offset, first, rows, cols, row_stride, col_stride, COLS,
    )
    z = tl.where(z == z, z, float("-inf"))
    _rows.store_tile(z_ptr, row, first + tl.arange(0, COLS), rows, cols, z)


@triton.jit(do_not_specialize=["rows"])
def log_softmax_at(
    x_ptr,  # (rows, cols) logits
    index_ptr,  # (rows, k) int64
    value_ptr,  # out: (rows, k) float32
    rows: tl.int64, cols, row_stride, col_stride, k,
    ROWS: tl.constexpr, COLS: tl.constexpr, PICKED: tl.constexpr,
):
    """Log softmax of ROWS rows of any width at k columns, PICKED at a time."""
    row = _rows.row_numbers(ROWS)
    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        x = _rows.load_tile(x_ptr, row, col, rows, cols, row_stride, col_stride, float("-inf"))
        new = tl.maximum(top, tl.max(x, 1))
        p = tl.exp2((x - new[:, None]) * 1.4426950408889634)
        total = total * tl.exp2((top - new) * 1.4426950408889634) + tl.sum(p, 1)
        top = new
    log_total = tl.where(total > 0, _philox.log(total), float("nan"))
    for first in range(0, k, PICKED):
        pick = first + tl.arange(0, PICKED)[None, :]
        keep = (row < rows)[:, None] & (pick < k)
        place = row[:, None] * k + pick
        col = tl.load(index_ptr + place, mask=keep, other=0)
        ptr = x_ptr + row[:, None] * row_stride + col * col_stride
        x = tl.load(ptr, mask=keep, other=0.0).to(tl.float32)
        tl.store(value_ptr + place, x - top[:, None] - log_total[:, None], mask=keep)


def select(x: Tensor, seed: Tensor, row_offset: int, k: int, arch: str) -> Tensor:
    """(rows, k) int64."""
    rows, cols = x.shape
    tile = _rows.choose_tile(cols, arch)
    whole = cols <= tile.cols
    if k > (SELECTED if whole else 1):
        return sort(x, seed, row_offset, k, arch)
    index = x.new_empty(rows, k, dtype=torch.int64)
    arguments = x, index, seed, rows, row_offset, cols, *x.stride()
    if whole:
        select_from_rows[(triton.cdiv(rows, tile.rows),)](
            *arguments, k, ROWS=tile.rows, COLS=tile.cols, num_warps=tile.warps,
        )
    else:
        select_from_wide_row[(rows,)](*arguments, COLS=tile.cols, num_warps=tile.warps)
    return index


def sort(x: Tensor, seed: Tensor, row_offset: int, k: int, arch: str) -> Tensor:
    """(rows, k) int64, of sorted rows."""
    rows, cols = x.shape
    tile = _rows.choose_tile(min(cols, _rows.BLOCK), arch)
    index = x.new_empty(rows, k, dtype=torch.int64)
    chunk = max(CHUNK_BYTES // (4 * cols), 1)
    z = x.new_empty(min(chunk, rows), cols, dtype=torch.float32)
    for r in range(0, rows, chunk):
        part = x[r : r + chunk]
        grid = triton.cdiv(len(part), tile.rows), triton.cdiv(cols, tile.cols)
        perturb_tile[grid](
            part, z, seed, len(part), row_offset + r, cols, *part.stride(),
            ROWS=tile.rows, COLS=tile.cols, num_warps=tile.warps,
        )
        order = z[: len(part)].sort(dim=1, descending=True, stable=True).indices
        index[r : r + chunk] = order[:, :k]
    return index


def gumbel_argmax(
    logits: Tensor, seed: Tensor, row_offset: int, dim: int, k: int, log_prob: bool
) -> tuple[Tensor, Tensor]:
    """k categories without replacement, in the order in which they are drawn.

        index = the k largest of logits + g along dim

    Args:
        logits: any shape, float16, bfloat16 or float32, any strides.
        seed: one int64 on the device.
        row_offset: the number of the first row.
        k: at most the number of categories.

    Returns:
        index int64, as the logits but k along dim; log softmax of the logits there, float32, empty
        without `log_prob`. Equal bits on every run.

    Cost: one reading of the logits, two with `log_prob`. For k > SELECTED, and k > 1 of more than
    _rows.LONGEST columns, CHUNK_BYTES of workspace and a sort.
    """
    with _common.launching(logits=logits) as arch:
        x = _rows.as_rows(logits, dim)
        index = x.new_empty(len(x), k, dtype=torch.int64)
        if x.numel():
            index = select(x, seed, row_offset, k, arch)
        value = x.new_empty(index.shape if log_prob else 0, dtype=torch.float32)
        if log_prob and x.numel():
            tile = _rows.choose_tile(x.shape[1], arch)
            log_softmax_at[(triton.cdiv(len(x), tile.rows),)](
                x, index, value, *x.shape, *x.stride(), k,
                ROWS=tile.rows, COLS=tile.cols, PICKED=1 if k == 1 else 16, num_warps=tile.warps,
            )
        if log_prob:
            value = _rows.from_rows(value, logits, dim)
        return _rows.from_rows(index, logits, dim), value
