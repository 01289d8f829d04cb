"""Counts and sums of the rows of each code in Triton, without atomics and without a one-hot matrix.

The rows are sorted by code. A code's rows are cut into parts of PART rows, so that a code with most
of the rows does not keep one program busy while the others wait; parts are summed, then the parts
of each code. Every sum has an order that depends on sizes alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels import _common

PART = 256  # rows
BLOCK, SEARCHED = 1024, 256  # rows whose keys, codes whose positions one program finds


class Blocks(NamedTuple):
    """What one program works on."""

    segments: int
    rows: int  # at a time
    cols: int
    warps: int


BLOCKS = Blocks(1, 16, 128, 4)
INTERPRETER_BLOCKS = Blocks(32, 4, 32, 1)


# Sizes are not specialised on: every batch runs the same binary.
@triton.jit(do_not_specialize=["positions", "codes", "rows"])
def code_keys(
    index_ptr,  # (H * rows,) int64
    key_ptr,  # out: (H * rows,): the code, counted through all heads, or H * codes for none
    positions, codes, rows,
    BLOCK: tl.constexpr,
):
    """What rows are sorted by."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(index_ptr + i, mask=i < positions, other=-1)
    none = positions // rows * codes
    key = tl.where((code >= 0) & (code < codes), code + i // rows * codes, none)
    tl.store(key_ptr + i, key.to(key_ptr.dtype.element_ty), mask=i < positions)


@triton.jit(do_not_specialize=["positions", "codes", "steps"])
def code_starts(
    key_ptr,  # (positions,), sorted
    start_ptr,  # out: (codes + 1,) int64: the first position whose key is not less
    count_ptr,  # out: (codes,) int64
    parts_ptr,  # out: (codes + 1,) int64: how many parts the code before has
    positions, codes, steps,  # 2^steps > positions
    PART: tl.constexpr, BLOCK: tl.constexpr,
):
    """Where the positions of each code begin, and how many there are; codes of all heads."""
    code = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = tl.arange(0, 2)[:, None] == 0  # a code and the one before
    wanted = tl.where(own, code[None, :], code[None, :] - 1)
    low = tl.zeros((2, BLOCK), tl.int64)
    high = low + positions
    for _ in range(steps):
        middle = (low + high) // 2
        less = tl.load(key_ptr + middle, mask=low < high, other=0) < wanted
        low, high = (
            tl.where((low < high) & less, middle + 1, low),
            tl.where((low < high) & ~less, middle, high),
        )
    start = tl.sum(tl.where(own, low, 0), 0)
    count = start - tl.sum(tl.where(own, 0, low), 0)  # of the code before
    tl.store(start_ptr + code, start, mask=code <= codes)
    tl.store(count_ptr + code - 1, count, mask=(code > 0) & (code <= codes))
    tl.store(parts_ptr + code, (count + (PART - 1)) // PART, mask=code <= codes)


@triton.jit
def code_of_part(part, first_ptr, codes, steps):
    """The last code whose first part is not after `part`; `codes` if `part` is no code's."""
    low = part * 0
    high = low + codes
    for _ in range(steps):
        middle = (low + high + 1) // 2
        begins = tl.load(first_ptr + middle) <= part
        low, high = tl.where(begins, middle, low), tl.where(begins, high, middle - 1)
    return low


@triton.jit
def sum_positions(
    x_ptr, first, last, col, inside, row_stride, order_ptr, head_stride, head, rows,
    ROWS: tl.constexpr,
):
    """(SEGMENTS, COLS) sums of the rows at positions from `first` up to `last`, (SEGMENTS,)."""
    sums = tl.zeros((first.shape[0], ROWS, col.shape[0]), tl.float32)
    for step in range(0, tl.max(last - first), ROWS):
        at = first[:, None] + step + tl.arange(0, ROWS)[None, :]
        keep = at < last[:, None]
        row = at
        if order_ptr is not None:
            row = tl.load(order_ptr + at, mask=keep, other=0) - head[:, None] * rows
        ptr = x_ptr + head[:, None] * head_stride + row * row_stride
        x = tl.load(
            ptr[:, :, None] + col[None, None, :],
            mask=keep[:, :, None] & inside[None, None, :], other=0.0,
        )
        sums += x.to(tl.float32)
    return tl.sum(sums, 1)


@triton.jit(do_not_specialize=["parts", "codes", "all_codes", "rows", "steps"])
def sum_parts(
    x_ptr,  # (H, rows, dim), unit stride in a row
    order_ptr,  # (H * rows,) int64: which row stands at each position, counted through all heads
    start_ptr, first_ptr,  # (H * codes + 1,) int64: each code's first position and first part
    sums_ptr,  # out: (parts, dim) float32; 0 where there is no such part
    parts, codes, all_codes, rows,
    steps,  # 2^steps > all_codes
    dim, head_stride, row_stride,
    PART: tl.constexpr, SEGMENTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Sums of up to PART rows of a code."""
    part = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)
    code = code_of_part(part, first_ptr, all_codes, steps)
    real = (part < parts) & (code < all_codes)
    first = tl.load(start_ptr + code, mask=real, other=0)
    stop = tl.load(start_ptr + code + 1, mask=real, other=0)
    first += PART * (part - tl.load(first_ptr + code, mask=real, other=0))
    last = tl.where(real, tl.minimum(stop, first + PART), first)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = col < dim
    sums = sum_positions(
        x_ptr, first, last, col, inside, row_stride, order_ptr, head_stride, code // codes, rows,
        ROWS,
    )
    keep = (part < parts)[:, None] & inside[None, :]
    tl.store(sums_ptr + part[:, None] * dim + col[None, :], sums, mask=keep)


@triton.jit(do_not_specialize=["codes"])
def sum_codes(
    parts_ptr,  # (parts, dim) float32
    first_ptr,  # (codes + 1,) int64
    sums_ptr,  # out: (codes, dim) float32
    codes, dim,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Sums of the parts of each code; codes of all heads."""
    code = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)
    real = code < codes
    first = tl.load(first_ptr + code, mask=real, other=0)
    last = tl.load(first_ptr + code + 1, mask=real, other=0)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = col < dim
    sums = sum_positions(parts_ptr, first, last, col, inside, dim, None, 0, code * 0, 0, ROWS)
    keep = real[:, None] & inside[None, :]
    tl.store(sums_ptr + code[:, None] * dim + col[None, :], sums, mask=keep)


class Sorted(NamedTuple):
    """Rows in the order of their codes; codes of all heads are numbered through, 0 to H * K - 1."""

    order: Tensor  # (H * N,) int64: rows, of all heads too; those without a code come last
    start: Tensor  # (H * K + 1,) int64: each code's first position
    first_part: Tensor  # (H * K + 1,) int64
    counts: Tensor  # (H * K,) int64


def sort_rows(index: Tensor, num_codes: int) -> Sorted:
    """Sorts rows by index (H, N); a stable sort, so that rows of a code keep their order."""
    heads, rows = index.shape
    codes, positions = heads * num_codes, index.numel()
    key = index.new_empty(positions, dtype=torch.int32 if codes < 2**31 - 1 else torch.int64)
    code_keys[(triton.cdiv(positions, BLOCK),)](
        index.contiguous(), key, positions, num_codes, rows, BLOCK=BLOCK
    )
    key, order = key.sort(stable=True)
    start, counts, parts = (index.new_empty(codes + more) for more in (1, 0, 1))
    code_starts[(triton.cdiv(codes + 1, SEARCHED),)](
        key, start, counts, parts, positions, codes, positions.bit_length(),
        PART=PART, BLOCK=SEARCHED,
    )
    return Sorted(order, start, parts.cumsum(0), counts)


def _code_sums(x: Tensor, index: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    heads, rows, dim = x.shape
    codes = heads * num_codes
    if codes == 0 or rows == 0:
        counts = torch.zeros(heads, num_codes, dtype=torch.int64, device=x.device)
        return counts, x.new_zeros(heads, num_codes, dim, dtype=torch.float32)
    x = x if x.stride(2) == 1 else x.contiguous()
    by_code = sort_rows(index, num_codes)
    sums = x.new_empty(codes, dim, dtype=torch.float32)
    if dim:
        arch = _common.architecture(x.device)
        blocks = INTERPRETER_BLOCKS if arch == "interpreter" else BLOCKS
        cols = min(blocks.cols, max(triton.next_power_of_2(dim), 16))
        constants = {
            "SEGMENTS": blocks.segments, "ROWS": blocks.rows, "COLS": cols,
            "num_warps": blocks.warps,
        }
        most = heads * rows // PART + min(heads * rows, codes)  # each code can have one not full
        parts = x.new_empty(most, dim, dtype=torch.float32)
        width = triton.cdiv(dim, cols)
        sum_parts[(triton.cdiv(most, blocks.segments), width)](
            x, by_code.order, by_code.start, by_code.first_part, parts, most, num_codes, codes,
            rows, codes.bit_length(), dim, x.stride(0) if heads > 1 else 0, x.stride(1),
            PART=PART, **constants,
        )
        sum_codes[(triton.cdiv(codes, blocks.segments), width)](
            parts, by_code.first_part, sums, codes, dim, **constants
        )
    return by_code.counts.view(heads, num_codes), sums.view(heads, num_codes, dim)


def code_sums(x: Tensor, index: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts and sums of the rows of each code, without a host sync.

    Args:
        x: (H, N, D) or (N, D), float16, bfloat16 or float32, any strides.
        index: (H, N) or (N), int64. Rows whose index is negative, or num_codes or more, are left
            out.
        num_codes: K.

    Returns:
        counts (H, K) int64, sums (H, K, D) float32, without H where x has none. Equal bits on every
        run.

    Cost: a sort, traffic of x once and of the sums three times; memory of the sums, once or twice,
    and 24 bytes for each row.
    """
    with _common.launching(x=x):
        if x.dim() == 3:
            return _code_sums(x, index, num_codes)
        counts, sums = _code_sums(x[None], index[None], num_codes)
        return counts[0], sums[0]
