"""Sampling by the largest perturbed logits in Triton: a row is read, and indices are written.

k indices are found one after another among registers; of rows wider than a tile first in each of
its blocks, then among what these found. Where that is too many passes, rows of perturbed logits are
stored, a bounded number at a time, and sorted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels import _common, _gumbel_blocks, _philox, _rows, _short_rows
from tilewise.kernels.gumbel_softmax import LOWEST, perturbed, perturbed_pieces

SELECTED = 32  # up to so many indices are found among registers
PICKED = 16  # log-probabilities of a row at a time
FEWEST = 256  # columns of a tile of what blocks selected, at least
LAST = tl.constexpr(2**31 - 1)  # after every column
CHUNK_BYTES = 64 << 20  # workspace: perturbed logits of some rows; sorting them takes five times it


# Sizes are not specialised on: every batch runs the same binary, of whatever width. k = 1 is.
@triton.jit(do_not_specialize=["rows", "row_offset", "cols", "row_stride"])
def select_from_rows(
    x_ptr,  # (rows, cols) logits
    index_ptr,  # out: (rows, k) int64
    seed_ptr,  # one int64
    rows: tl.int64, row_offset: tl.int64,
    cols, row_stride,  # in UNITs
    col_stride, k,
    ROWS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr,
):
    """The k largest of each row that a tile holds, in order, the first ones of equals first."""
    cols, row_stride = cols * UNIT, row_stride * UNIT
    at = _short_rows.place(rows, cols, ROWS, COLS)
    col = _short_rows.columns(at, COLS)
    z = perturbed_pieces(
        x_ptr, tl.load(seed_ptr), at, row_offset, row_stride, col_stride, COLS, UNIT
    )
    z = tl.where(z == z, z, float("-inf"))  # NaN never wins
    top = _short_rows.of_rows(z, at, "max")[:, None]
    index = _short_rows.of_rows(tl.where(z == top, col, cols), at, "min")[:, None]
    out = index_ptr + at[0][:, None] * k
    own = _short_rows.first_pieces(at)[:, None]
    tl.store(out, index.to(tl.int64), mask=own)
    for i in range(1, k):
        later = (z < top) | ((z == top) & (col > index))
        top = _short_rows.of_rows(tl.where(later, z, float("-inf")), at, "max")[:, None]
        place = tl.where(later & (z == top), col, cols)
        index = _short_rows.of_rows(place, at, "min")[:, None]
        tl.store(out + i, index.to(tl.int64), mask=own)


@triton.jit
def store_largest(z, col, z_ptr, index_ptr, k, COUNT: tl.constexpr):
    """The k largest of z (1, COLS), in order, the first ones of equals first; z_ptr may be None."""
    top = tl.max(z, 1)[:, None]
    index = tl.min(tl.where(z == top, col, COUNT), 1)[:, None]
    zero = tl.arange(0, 1)[:, None]
    for i in range(0, k):
        if z_ptr is not None:
            tl.store(z_ptr + i + zero, top)
        tl.store(index_ptr + i + zero, index.to(index_ptr.dtype.element_ty))
        later = (z < top) | ((z == top) & (col > index))
        top = tl.max(tl.where(later, z, float("-inf")), 1)[:, None]
        index = tl.min(tl.where(later & (z == top), col, COUNT), 1)[:, None]


@triton.jit(do_not_specialize=["rows", "row_offset"])
def select_from_blocks(
    x_ptr,
    z_ptr, index_ptr,  # out: (rows, blocks, k) float32 and int32
    seed_ptr,
    rows: tl.int64, row_offset: tl.int64, cols, row_stride, col_stride, k,
    COLS: tl.constexpr,
):
    """The k largest of a block of COLS columns of a row; from `cols` on where it has fewer."""
    row, block, blocks = _rows.place(cols, 1, COLS)
    first = block * COLS
    z = perturbed(
        x_ptr, tl.load(seed_ptr), row, row_offset, first, rows, cols, row_stride, col_stride, COLS,
    )
    z = tl.where(z == z, z, float("-inf"))
    at = tl.program_id(0).to(tl.int64) * k
    col = first + tl.arange(0, COLS)[None, :]
    store_largest(z, col, z_ptr + at, index_ptr + at, k, LAST)


@triton.jit(do_not_specialize=["candidates"])
def select_from_selected(
    z_ptr, selected_ptr,  # (rows, candidates) float32 and int32
    index_ptr,  # out: (rows, k) int64
    candidates, k,
    COLS: tl.constexpr,
):
    """The k largest of a row, out of the largest of its blocks."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, COLS)[None, :]
    at = row * candidates + i
    z = tl.load(z_ptr + at, mask=i < candidates, other=float("-inf"))
    col = tl.load(selected_ptr + at, mask=i < candidates, other=LAST)
    store_largest(z, col, None, index_ptr + row * k, k, LAST)


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


@triton.jit
def store_log_softmax(
    x_ptr, index_ptr, value_ptr, row, own, top, total, row_stride, col_stride, k,
    PICKED: tl.constexpr,
):
    """Log softmax at k columns, PICKED at a time, of rows that are `own` and have `total`."""
    log_total = tl.where(total > 0, _philox.log(total), float("nan"))
    for first in range(0, k, PICKED):
        pick = first + tl.arange(0, PICKED)[None, :]
        keep = own[:, None] & (pick < k)
        place = row[:, None] * k + pick
        picked = tl.load(index_ptr + place, mask=keep, other=0)
        ptr = x_ptr + row[:, None] * row_stride + picked * col_stride
        chosen = tl.load(ptr, mask=keep, other=0.0).to(tl.float32)
        tl.store(value_ptr + place, chosen - top[:, None] - log_total[:, None], mask=keep)


@triton.jit(do_not_specialize=["rows", "cols", "row_stride"])
def log_softmax_at(
    x_ptr,  # (rows, cols) logits
    index_ptr,  # (rows, k) int64
    value_ptr,  # out: (rows, k) float32
    rows: tl.int64,
    cols, row_stride,  # in UNITs
    col_stride, k,
    ROWS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr, PICKED: tl.constexpr,
):
    """Log softmax of each row that a tile holds at k columns."""
    cols, row_stride = cols * UNIT, row_stride * UNIT
    at = _short_rows.place(rows, cols, ROWS, COLS)
    x = _short_rows.load(x_ptr, at, row_stride, col_stride, float("-inf"), COLS, UNIT)
    top = tl.maximum(_short_rows.of_rows(x, at, "max"), LOWEST)
    exponentials = tl.exp2((x - top[:, None]) * 1.4426950408889634)
    total = _short_rows.of_rows(exponentials, at, "sum")
    own = _short_rows.first_pieces(at)
    store_log_softmax(
        x_ptr, index_ptr, value_ptr, at[0], own, top, total, row_stride, col_stride, k, PICKED
    )


@triton.jit(do_not_specialize=["rows", "blocks"])
def log_softmax_of_blocks(
    x_ptr, index_ptr, value_ptr,
    top_ptr, total_ptr,  # (rows, blocks) float32, see `measure_blocks`
    blocks, rows: tl.int64, row_stride, col_stride, k,
    ROWS: tl.constexpr, COLS: tl.constexpr, PICKED: tl.constexpr,
):
    """The same of ROWS rows whose blocks were measured, COLS blocks at a time."""
    row = _rows.row_numbers(ROWS)
    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, blocks, COLS):
        block = first + tl.arange(0, COLS)[None, :]
        keep = (row < rows)[:, None] & (block < blocks)
        at = row[:, None] * blocks + block
        part = tl.maximum(tl.load(top_ptr + at, mask=keep, other=LOWEST), LOWEST)
        new = tl.maximum(top, tl.max(part, 1))
        share = tl.exp2((part - new[:, None]) * 1.4426950408889634)
        sums = tl.load(total_ptr + at, mask=keep, other=0.0)
        total = total * tl.exp2((top - new) * 1.4426950408889634) + tl.sum(sums * share, 1)
        top = new
    store_log_softmax(
        x_ptr, index_ptr, value_ptr, row, row < rows, top, total, row_stride, col_stride, k, PICKED
    )


def log_softmax(x: Tensor, index: Tensor, arch: str) -> Tensor:
    """(rows, k) float32, of x (rows, cols) at index (rows, k)."""
    rows, cols = x.shape
    k = index.shape[1]
    value = x.new_empty(rows, k, dtype=torch.float32)
    tile = _short_rows.choose_tile(rows, cols, x.stride()[:1], arch)
    if tile is not None:
        log_softmax_at[(tile.programs,)](
            x, index, value, rows, *tile.units(cols, x.stride(0)), x.stride(1), k,
            PICKED=1 if k == 1 or tile.cols == 4 else PICKED, **tile.constants(),
        )
        return value
    top, _, total = _gumbel_blocks.measured(
        x, None, None, 0, _rows.choose_tile(cols, arch, _rows.BLOCK)
    )
    merging = _rows.choose_tile(FEWEST, arch)
    log_softmax_of_blocks[(triton.cdiv(rows, merging.rows),)](
        x, index, value, top, total, top.shape[1], rows, *x.stride(), k,
        PICKED=1 if k == 1 else PICKED, ROWS=merging.rows, COLS=merging.cols,
        num_warps=merging.warps,
    )
    return value


def select(x: Tensor, seed: Tensor, row_offset: int, k: int, arch: str) -> Tensor:
    """(rows, k) int64."""
    rows, cols = x.shape
    short = _short_rows.choose_tile(rows, cols, x.stride()[:1], arch)
    tile = _rows.choose_tile(cols, arch, _rows.BLOCK)
    candidates = triton.cdiv(cols, tile.cols) * k
    if k > SELECTED or short is None and candidates > _rows.LONGEST:
        return sort(x, seed, row_offset, k, arch)
    index = x.new_empty(rows, k, dtype=torch.int64)
    if short is not None:
        select_from_rows[(short.programs,)](
            x, index, seed, rows, row_offset, *short.units(cols, x.stride(0)), x.stride(1), k,
            **short.constants(),
        )
        return index
    arguments = seed, rows, row_offset, cols, *x.stride(), k
    z = x.new_empty(rows, candidates, dtype=torch.float32)
    selected = z.new_empty(z.shape, dtype=torch.int32)
    select_from_blocks[(rows * candidates // k,)](
        x, z, selected, *arguments, COLS=tile.cols, num_warps=tile.warps,
    )
    width = FEWEST if candidates <= FEWEST else triton.next_power_of_2(candidates)
    select_from_selected[(rows,)](z, selected, index, candidates, k, COLS=width)
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

    Cost: one reading of the logits, two with `log_prob`. For k > SELECTED, and where k indices of
    each block are more than _rows.LONGEST, CHUNK_BYTES of workspace and a sort.
    """
    with _common.launching(logits=logits) as arch:
        x = _rows.as_rows(logits, dim)
        index = x.new_empty(len(x), k, dtype=torch.int64)
        if x.numel():
            index = select(x, seed, row_offset, k, arch)
        if not log_prob:
            value = x.new_empty(0, dtype=torch.float32)
        elif x.numel():
            value = _rows.from_rows(log_softmax(x, index, arch), logits, dim)
        else:
            value = _rows.from_rows(x.new_empty(index.shape, dtype=torch.float32), logits, dim)
        return _rows.from_rows(index, logits, dim), value
